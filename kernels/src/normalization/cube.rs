//! The norms on a GPU: only what is normalised is kept, and statistics and derivative are computed from
//! it in f32. A sum is normalised where it is made, and what else it is used for adds its gradient in the
//! same pass. The gradient of a weight, which is seldom trained, is in plain tensor operations.

use burn::backend::Cube;
use burn::tensor::{DType, Tensor};

use super::rows::NormRows;
use super::{Form, Norm};
use crate::gpu::operation::{JointOperation, Value, apply_joint, input, tensor, value};
use crate::joint::{Joint, Results};

/// The results of a form: the norm last.
pub(super) fn apply<const D: usize>(
    form: Form,
    x: Tensor<D>,
    update: Option<Tensor<D>>,
    norm: Norm,
) -> Vec<Tensor<D>> {
    let operation = RowNorm::<D> {
        form,
        epsilon: norm.epsilon,
        centred: norm.bias.is_some(),
    };
    let mut inputs = vec![input(x)];
    inputs.extend(update.map(input));
    inputs.push(input(norm.weight));
    inputs.extend(norm.bias.map(input));
    apply_joint(operation, inputs)
}

/// Inputs in order: x, what is added to it if something is, the weight, the bias if the mean is taken
/// out.
#[derive(Debug, Clone, Copy)]
struct RowNorm<const D: usize> {
    form: Form,
    epsilon: f64,
    centred: bool,
}

impl<const D: usize> RowNorm<D> {
    /// x of mean square 1.
    fn normalized(&self, x: Tensor<D>) -> Tensor<D> {
        let mut x = x.cast(DType::F32);
        if self.centred {
            x = x.clone() - x.mean_dim(D - 1);
        }
        let factor = (x.clone().square().mean_dim(D - 1) + self.epsilon)
            .sqrt()
            .recip();
        x * factor
    }

    /// The gradient of what is normalised: through the norm, and beside it.
    fn of_input(
        &self,
        x: Value,
        weight: Value,
        through: Option<Value>,
        beside: Option<Value>,
    ) -> Option<Value> {
        let Some(through) = through else {
            return beside;
        };
        let adds = beside.is_some();
        // Where nothing is added, nothing is read of it.
        let addend = beside.unwrap_or_else(|| through.clone());
        let epsilon = self.epsilon as f32;
        Some(Cube::norm_rows_backward(
            x,
            weight,
            through,
            addend,
            epsilon,
            self.centred,
            adds,
        ))
    }
}

impl<const D: usize> JointOperation for RowNorm<D> {
    fn name(&self) -> &'static str {
        match self.centred {
            true => "layer_norm",
            false => "rms_norm",
        }
    }
}

impl<const D: usize> Joint<Cube> for RowNorm<D> {
    fn forward(&self, inputs: Vec<Value>, tracked: bool) -> Results<Value> {
        let mut inputs = inputs.into_iter();
        let mut next = || inputs.next().expect("all inputs");
        let x = next();
        let update = (self.form == Form::Added).then(&mut next);
        let weight = next();
        // Without a mean to take out there is no bias, and nothing is read of it.
        let bias = match self.centred {
            true => {
                let dtype = tensor::<1>(weight.clone()).dtype();
                value(tensor::<1>(next()).cast(dtype))
            }
            false => weight.clone(),
        };
        let (epsilon, centred) = (self.epsilon as f32, self.centred);
        let (input, results) = match update {
            Some(update) => {
                let weight = weight.clone();
                let (sum, normed) =
                    Cube::residual_norm_rows(x, update, weight, bias, epsilon, centred);
                (sum.clone(), vec![sum, normed])
            }
            None => {
                let normed = Cube::norm_rows(x.clone(), weight.clone(), bias, epsilon, centred);
                match self.form {
                    Form::Alone => (x, vec![normed]),
                    _ => (x.clone(), vec![x, normed]),
                }
            }
        };
        let saved = match tracked {
            true => vec![input, weight],
            false => vec![],
        };
        (results, saved)
    }

    fn backward(
        &self,
        saved: Vec<Value>,
        mut gradients: Vec<Option<Value>>,
        wanted: &[bool],
    ) -> Vec<Option<Value>> {
        let [x, weight]: [Value; 2] = saved.try_into().expect("what forward kept");
        let mut found = vec![None; wanted.len()];
        let through = gradients.pop().flatten();
        let beside = gradients.pop().flatten();
        let (inputs, parameters) = wanted.split_at(self.form.weight());
        if let Some(gradient) = &through
            && parameters.contains(&true)
        {
            let weight_dtype = tensor::<1>(weight.clone()).dtype();
            let gradient = tensor::<D>(gradient.clone()).cast(DType::F32);
            let normalized = self.normalized(tensor::<D>(x.clone()));
            let columns = normalized.dims()[D - 1];
            let rows = normalized.dims().iter().product::<usize>() / columns;
            let summed = |tensor: Tensor<D>| {
                let sum = tensor
                    .reshape([rows, columns])
                    .sum_dim(0)
                    .reshape([columns]);
                value::<1>(sum.cast(weight_dtype))
            };
            if parameters[0] {
                found[self.form.weight()] = Some(summed(gradient.clone() * normalized));
            }
            if parameters.get(1) == Some(&true) {
                found[self.form.weight() + 1] = Some(summed(gradient));
            }
        }
        if inputs.contains(&true) {
            let of_input = self.of_input(x, weight, through, beside);
            for place in &mut found[..self.form.weight()] {
                *place = of_input.clone();
            }
        }
        found
    }
}
