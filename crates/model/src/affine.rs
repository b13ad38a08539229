//! A scale and a shift of each coordinate, set from data before the first step.

use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::parameter::{Parameter, ParameterGroup, ParameterKind, Visit};

/// `x · scale + shift`: ones and zeros until [`Affine::calibrate`]; trained like the rest.
#[derive(Debug, Clone)]
pub(crate) struct Affine {
    /// Both `[tokens, width]`.
    scale: Parameter<2>,
    shift: Parameter<2>,
}

impl Affine {
    pub fn new(path: &str, shape: [usize; 2], group: ParameterGroup, device: &Device) -> Affine {
        let parameter = |name: &str, value: Tensor<2>| {
            Parameter::new(format!("{path}.{name}"), value, ParameterKind::Own(group))
        };
        Affine {
            scale: parameter("scale", Tensor::ones(shape, (device, DType::F32))),
            shift: parameter("shift", Tensor::zeros(shape, (device, DType::F32))),
        }
    }

    /// `[items, tokens, width]`, the same shape comes out
    pub fn forward(&self, tokens: Tensor<3>) -> Tensor<3> {
        tokens * self.scale.tensor.clone().unsqueeze::<3>()
            + self.shift.tensor.clone().unsqueeze::<3>()
    }

    /// Gives each coordinate mean 0 and deviation 1 over the items that were added up. One whose
    /// deviation is less than `smallest` of the root mean square of all stays smaller; of fewer than two
    /// items nothing can be said.
    pub fn calibrate(&mut self, sums: &Sums, smallest: f64) {
        if sums.count < 2 {
            return;
        }
        let count = sums.count as f64;
        let all = sums.squares.iter().sum::<f64>() / (count * sums.squares.len() as f64);
        let floor = (smallest * all.sqrt()).max(f64::from(f32::MIN_POSITIVE).sqrt());
        let mut scale = Vec::with_capacity(sums.values.len());
        let mut shift = Vec::with_capacity(sums.values.len());
        for (sum, squares) in sums.values.iter().zip(&sums.squares) {
            let mean = sum / count;
            let deviation = (squares / count - mean * mean).max(0.0).sqrt();
            let factor = 1.0 / deviation.max(floor);
            scale.push(factor as f32);
            shift.push((-mean * factor) as f32);
        }
        set(&mut self.scale, scale);
        set(&mut self.shift, shift);
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        visitor.visit(&mut self.scale);
        visitor.visit(&mut self.shift);
    }
}

/// Makes numbers on the host the value of a parameter.
pub(crate) fn set<const D: usize>(parameter: &mut Parameter<D>, values: Vec<f32>) {
    let device = parameter.tensor.device().inner();
    let data = TensorData::new(values, parameter.tensor.dims());
    let value = Tensor::from_data(data, (&device, DType::F32));
    *parameter = Parameter::new(parameter.name.clone(), value, parameter.kind);
}

/// Sums over items of each coordinate.
#[derive(Default)]
pub(crate) struct Sums {
    count: u64,
    values: Vec<f64>,
    squares: Vec<f64>,
}

impl Sums {
    /// `[items, tokens, width]`
    pub fn add(&mut self, tokens: Tensor<3>) {
        let [items, count, width] = tokens.dims();
        let values: Vec<f32> = tokens
            .inner()
            .cast(DType::F32)
            .into_data()
            .try_to_vec()
            .expect("the tensor was cast to f32");
        self.values.resize(count * width, 0.0);
        self.squares.resize(count * width, 0.0);
        self.count += items as u64;
        for item in values.chunks(count * width) {
            for (place, &value) in item.iter().enumerate() {
                let value = f64::from(value);
                self.values[place] += value;
                self.squares[place] += value * value;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coordinates_get_mean_0_and_deviation_1_and_a_constant_stays_small() {
        let device = Device::flex();
        let mut affine = Affine::new("a", [1, 3], ParameterGroup::Head, &device);
        let items = Tensor::<3>::from_data(
            TensorData::new(
                vec![1.0f32, 10.0, 5.0, 3.0, 14.0, 5.0, 5.0, 18.0, 5.0],
                [3, 1, 3],
            ),
            &device,
        );
        let mut sums = Sums::default();
        sums.add(items.clone().narrow(0, 0, 1));
        affine.calibrate(&sums, 0.01);
        let untouched: Vec<f32> = affine
            .forward(items.clone())
            .into_data()
            .try_to_vec()
            .expect("f32");
        assert_eq!(untouched[3..6], [3.0, 14.0, 5.0]);

        sums.add(items.clone().narrow(0, 1, 2));
        affine.calibrate(&sums, 0.01);
        let found: Vec<f32> = affine.forward(items).into_data().try_to_vec().expect("f32");
        let high = 1.5f32.sqrt();
        let expected = [-high, -high, 0.0, 0.0, 0.0, 0.0, high, high, 0.0];
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-5, "{found} {expected}");
        }
    }
}
