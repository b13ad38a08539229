//! An optimizer's state on the host, as checkpoints hold it.

use std::collections::BTreeMap;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

/// What is kept of one tensor, by the name of the part: `exp_avg`, `step`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SavedState(BTreeMap<String, SavedPart>);

/// One part of it.
#[derive(Clone, Debug, PartialEq)]
pub enum SavedPart {
    /// Flat f32 values.
    Floats(Vec<f32>),
    /// Flat i32 values.
    Integers(Vec<i32>),
    /// A count.
    Count(u64),
    /// A number.
    Number(f64),
}

impl SavedState {
    /// Adds a part.
    pub fn insert(&mut self, part: &str, value: SavedPart) {
        self.0.insert(part.to_owned(), value);
    }

    /// With a part more.
    pub(super) fn with(mut self, part: &str, value: SavedPart) -> SavedState {
        self.insert(part, value);
        self
    }

    /// Whether it has no part.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All parts.
    pub fn parts(&self) -> impl Iterator<Item = (&str, &SavedPart)> {
        self.0.iter().map(|(part, value)| (part.as_str(), value))
    }

    pub(super) fn has(&self, part: &str) -> bool {
        self.0.contains_key(part)
    }

    /// Takes a part out, if it is there.
    pub(super) fn take(&mut self, part: &str) -> Option<SavedPart> {
        self.0.remove(part)
    }

    pub(super) fn floats(&mut self, part: &str, device: &Device) -> Result<Tensor<1>, String> {
        match self.take(part) {
            Some(SavedPart::Floats(values)) => Ok(float_tensor(values, device)),
            found => Err(missing(part, found)),
        }
    }

    pub(super) fn integers(
        &mut self,
        part: &str,
        device: &Device,
    ) -> Result<Tensor<1, Int>, String> {
        match self.take(part) {
            Some(SavedPart::Integers(values)) => {
                let length = values.len();
                Ok(Tensor::from_data(
                    TensorData::new(values, [length]),
                    (device, DType::I32),
                ))
            }
            found => Err(missing(part, found)),
        }
    }

    pub(super) fn count(&mut self, part: &str) -> Result<u64, String> {
        match self.take(part) {
            Some(SavedPart::Count(value)) => Ok(value),
            found => Err(missing(part, found)),
        }
    }

    pub(super) fn number(&mut self, part: &str) -> Result<f64, String> {
        match self.take(part) {
            Some(SavedPart::Number(value)) => Ok(value),
            found => Err(missing(part, found)),
        }
    }

    /// All parts have to be taken out.
    pub(super) fn finish(&self) -> Result<(), String> {
        match self.0.keys().next() {
            None => Ok(()),
            Some(part) => Err(format!(
                "holds `{part}`, which this optimizer does not keep"
            )),
        }
    }
}

fn missing(part: &str, found: Option<SavedPart>) -> String {
    match found {
        None => format!("has no `{part}`"),
        Some(_) => format!("has a `{part}` of another type"),
    }
}

pub(super) fn float_tensor(values: Vec<f32>, device: &Device) -> Tensor<1> {
    let length = values.len();
    Tensor::from_data(TensorData::new(values, [length]), device)
}

/// The values of a flat f32 tensor on the host.
pub(super) fn host(tensor: &Tensor<1>) -> SavedPart {
    SavedPart::Floats(
        tensor
            .to_data()
            .try_to_vec()
            .expect("an optimizer's state is f32"),
    )
}
