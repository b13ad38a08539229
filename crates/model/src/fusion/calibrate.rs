//! Centres what the projectors' last layers read, before the first step.

use burn::tensor::{DType, Tensor, TensorData};

use super::SoftInput;
use super::projector::Projector;
use crate::error::ModelError;
use crate::model::Model;
use crate::parameter::Parameter;
use crate::run::Mode;

/// Of a coordinate; one that does not vary stays small.
const SMALLEST_DEVIATION: f64 = 0.01;

/// Sums over items of each coordinate of a projector's inside.
#[derive(Default)]
struct Sums {
    count: u64,
    values: Vec<f64>,
    squares: Vec<f64>,
}

impl Model {
    /// Gives each coordinate inside the projectors mean 0 and deviation 1 over these items: a
    /// data-dependent initialisation in the manner of Salimans and Kingma 2016.
    ///
    /// New encoders say nearly the same of every item. To a last layer that starts at zero what they all
    /// share is noise, which moves it further than what tells items apart. The scale and shift found
    /// here are trained and saved like the rest; nothing changes before the projector's last layer, so
    /// that training still starts from the unmodified model.
    ///
    /// # Errors
    /// Those of the iterator, and items that do not fit the model.
    pub fn calibrate<E: From<ModelError>>(
        &mut self,
        batches: impl IntoIterator<Item = Result<SoftInput, E>>,
    ) -> Result<(), E> {
        let Some(fusion) = &mut self.fusion else {
            return Ok(());
        };
        let mut sums: Vec<Sums> = fusion.streams.iter().map(|_| Sums::default()).collect();
        for soft in batches {
            let soft = soft?;
            fusion.check(&soft)?;
            let items = soft.streams.iter();
            for ((stream, items), sums) in fusion.streams.iter().zip(items).zip(&mut sums) {
                if let Some(items) = items {
                    let encoded = stream.encoder.forward(items, Mode::Infer);
                    let resampled = stream.resampler.forward(encoded, Mode::Infer);
                    sums.add(stream.projector.wide(resampled, Mode::Infer));
                }
            }
        }
        for (stream, sums) in fusion.streams.iter_mut().zip(sums) {
            stream.projector.calibrate(&sums);
        }
        Ok(())
    }
}

impl Sums {
    /// `[items, K, hidden]`
    fn add(&mut self, tokens: Tensor<3>) {
        let [items, count, hidden] = tokens.dims();
        let values: Vec<f32> = tokens
            .inner()
            .cast(DType::F32)
            .into_data()
            .try_to_vec()
            .expect("the tensor was cast to f32");
        self.values.resize(count * hidden, 0.0);
        self.squares.resize(count * hidden, 0.0);
        self.count += items as u64;
        for item in values.chunks(count * hidden) {
            for (place, &value) in item.iter().enumerate() {
                let value = f64::from(value);
                self.values[place] += value;
                self.squares[place] += value * value;
            }
        }
    }
}

impl Projector {
    fn calibrate(&mut self, sums: &Sums) {
        // Of one item nothing can be said.
        if sums.count < 2 {
            return;
        }
        let count = sums.count as f64;
        let mut scale = Vec::with_capacity(sums.values.len());
        let mut shift = Vec::with_capacity(sums.values.len());
        for (sum, squares) in sums.values.iter().zip(&sums.squares) {
            let mean = sum / count;
            let deviation = (squares / count - mean * mean).max(0.0).sqrt();
            let factor = 1.0 / deviation.max(SMALLEST_DEVIATION);
            scale.push(factor as f32);
            shift.push((-mean * factor) as f32);
        }
        set(&mut self.scale, scale);
        set(&mut self.shift, shift);
    }
}

fn set(parameter: &mut Parameter<2>, values: Vec<f32>) {
    let device = parameter.tensor.device().inner();
    let data = TensorData::new(values, parameter.tensor.dims());
    let value = Tensor::from_data(data, (&device, DType::F32));
    *parameter = Parameter::new(parameter.name.clone(), value, parameter.kind);
}
