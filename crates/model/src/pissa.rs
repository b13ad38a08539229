//! PiSSA (Meng et al. 2024): pairs that start from the weight's largest singular vectors, and how
//! they are saved for the weight as it was pretrained.
//!
//! With `W = R + s·B₀A₀`, what was learned is `s·(BA − B₀A₀) = s·[B, −B₀]·[A; A₀]`: a pair of twice
//! the rank at the same scaling. PEFT converts in the same way
//! (`path_initial_model_for_weight_conversion`).

use std::collections::BTreeMap;

use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::adapter_file::{Collect, HostTensor};
use crate::error::ModelError;
use crate::lora::{Pair, PairInit};
use crate::model::Model;
use crate::parameter::{Parameter, ParameterKind, Visit, peft_key};
use crate::random::Stream;
use crate::singular::{self, Effort};
use crate::weights::TensorFile;

const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";

/// A pair before the first step, and the weight without it.
pub(crate) struct Start {
    /// `[rank, in]`, f32
    pub a: Tensor<2>,
    /// `[out, rank]`, f32
    pub b: Tensor<2>,
    /// `[out, in]`, of the weight's type
    pub rest: Tensor<2>,
}

impl Start {
    /// Takes a weight apart, or takes the start from an adapter that a run with this start saved:
    /// then the weight is without exactly what that run's was, whichever machine found it.
    pub fn new(
        path: &str,
        weight: &Tensor<2>,
        pair: &Pair,
        seed: u64,
        saved: Option<&TensorFile>,
        device: &Device,
    ) -> Result<Start, ModelError> {
        let [outputs, inputs] = weight.dims();
        let rank = pair.rank;
        let values: Vec<f32> = weight
            .clone()
            .into_data_dtype(DType::F32)
            .try_to_vec()
            .expect("the data was converted to f32");
        let (a, b) = match saved {
            Some(file) => saved_start(file, path, rank)?,
            None => {
                let effort = match pair.init {
                    PairInit::PissaIterations(rounds) => Effort::Rounds(rounds),
                    _ => Effort::Converged,
                };
                let start = Stream::new(seed, &format!("{path}.pissa"));
                singular::largest(&values, [outputs, inputs], rank, effort, start)
                    .halves(f64::from(pair.scaling))
            }
        };
        let rest = add_product(values, &a, &b, rank, -f64::from(pair.scaling));
        let tensor = |values: Vec<f32>, shape: [usize; 2]| {
            Tensor::<2>::from_data(TensorData::new(values, shape), (device, DType::F32))
        };
        Ok(Start {
            a: tensor(a, [rank, inputs]),
            b: tensor(b, [outputs, rank]),
            rest: tensor(rest, [outputs, inputs]).cast(weight.dtype()),
        })
    }
}

/// `weight + factor · b · a`, each element summed in f64; weight `[out, in]`, a `[rank, in]`, b
/// `[out, rank]`.
pub(crate) fn add_product(
    mut weight: Vec<f32>,
    a: &[f32],
    b: &[f32],
    rank: usize,
    factor: f64,
) -> Vec<f32> {
    let inputs = a.len() / rank;
    let mut sums = vec![0f64; inputs];
    for (row, b) in weight.chunks_exact_mut(inputs).zip(b.chunks_exact(rank)) {
        sums.fill(0.0);
        for (b, a) in b.iter().zip(a.chunks_exact(inputs)) {
            for (sum, a) in sums.iter_mut().zip(a) {
                *sum += f64::from(*b) * f64::from(*a);
            }
        }
        for (value, sum) in row.iter_mut().zip(&sums) {
            *value = (f64::from(*value) + factor * sum) as f32;
        }
    }
    weight
}

/// The second half of a saved pair, which is its start.
fn saved_start(
    file: &TensorFile,
    path: &str,
    rank: usize,
) -> Result<(Vec<f32>, Vec<f32>), ModelError> {
    let a = file.floats(&peft_key(&format!("{path}{A}")))?;
    let name = peft_key(&format!("{path}{B}"));
    let b = file.floats(&name)?;
    let found = file.entry(&name).expect("it was read").shape.clone();
    if found.get(1) != Some(&(2 * rank)) || a.len() % (2 * rank) != 0 {
        return Err(ModelError::Shape {
            path: file.path().to_owned(),
            tensor: name,
            found: found.clone(),
            expected: vec![found[0], 2 * rank],
        });
    }
    let b = b
        .chunks_exact(2 * rank)
        .flat_map(|row| row[rank..].iter().map(|value| -value))
        .collect();
    Ok((a[a.len() / 2..].to_vec(), b))
}

/// The starts of all pairs that have one, by the key of the tensor they belong to.
#[derive(Default)]
pub(crate) struct Starts(BTreeMap<String, HostTensor>);

impl Starts {
    pub fn of(model: &Model) -> Starts {
        struct Find(Starts);
        impl Visit for Find {
            fn visit<const D: usize>(&mut self, parameter: &mut Parameter<D>) {
                if parameter.kind == ParameterKind::Start {
                    let host = HostTensor::of(parameter.tensor.clone().inner());
                    self.0.0.insert(peft_key(&parameter.name), host);
                }
            }
        }
        let mut find = Find(Starts::default());
        model.clone().visit(&mut find);
        find.0
    }

    /// Puts every start behind what its pair has become, subtracted.
    pub fn join(&self, collected: &mut Collect) {
        for (name, start) in &self.0 {
            let end = collected.tensors.remove(name).expect("a pair is trained");
            let rank = start.shape[usize::from(name.ends_with(B))];
            let (values, start) = (end.values(), start.values());
            let mut shape = end.shape;
            let joined = if name.ends_with(A) {
                shape[0] *= 2;
                [values, start].concat()
            } else {
                shape[1] *= 2;
                let rows = values.chunks_exact(rank).zip(start.chunks_exact(rank));
                rows.flat_map(|(end, start)| {
                    let start = start.iter().map(|value| -value);
                    end.iter().copied().chain(start).collect::<Vec<f32>>()
                })
                .collect()
            };
            let joined = HostTensor::new(shape, &joined);
            collected.tensors.insert(name.clone(), joined);
        }
    }

    /// Takes what a pair has become from what [`Starts::join`] made.
    ///
    /// # Errors
    /// The other half is not this model's start: the adapter belongs to another one.
    pub fn split(
        &self,
        file: &TensorFile,
        name: &str,
        joined: Vec<f32>,
    ) -> Result<Vec<f32>, ModelError> {
        let Some(start) = self.0.get(name) else {
            return Ok(joined);
        };
        let expected = start.values();
        let (end, found): (Vec<f32>, Vec<f32>) = match name.ends_with(A) {
            true => {
                let (end, start) = joined.split_at(joined.len() / 2);
                (end.to_vec(), start.to_vec())
            }
            false => {
                let rank = start.shape[1];
                let rows = || joined.chunks_exact(2 * rank);
                (
                    rows().flat_map(|row| row[..rank].to_vec()).collect(),
                    rows()
                        .flat_map(|row| row[rank..].iter().map(|value| -value))
                        .collect(),
                )
            }
        };
        if found != expected {
            return Err(ModelError::Tensor {
                path: file.path().to_owned(),
                tensor: name.to_owned(),
                message: "starts from other singular vectors than the model; load it onto the \
                          checkpoint as it was pretrained"
                    .to_owned(),
            });
        }
        Ok(end)
    }
}
