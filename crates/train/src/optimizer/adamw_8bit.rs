//! AdamW with moments in eight bits (Dettmers et al. 2022), as in bitsandbytes.
//!
//! Between updates each moment is held as one byte an element: the number of the nearest of 256
//! values, times the largest magnitude of the element's block of 256. The values are spread by
//! powers of ten ("dynamic" quantisation): evenly within 0.1 to 1, with half as many for each power
//! of ten below, down to 1e-7. An update restores both moments to f32, is AdamW's, and quantises them
//! again. Tensors with fewer than 4,096 elements keep f32 moments, as there.
//!
//! Four bytes share an i32, so that every backend can hold them.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use super::adamw::AdamWOptions;
use super::saved::{float_tensor, host};
use super::{SavedPart, SavedState, TensorState, Update, bytes_of};

/// Tensors with fewer elements keep f32 moments.
pub(super) const SMALLEST: usize = 4096;
/// Elements that share a scale.
const BLOCK: usize = 256;
/// Bytes in one i32.
const PACKED: usize = 4;

/// The 256 values of a code with the bounds between them, on the device.
#[derive(Clone)]
pub(super) struct CodeMap {
    /// `[256]`, increasing.
    values: Tensor<1>,
    /// `[255]`: half-way between neighbours.
    bounds: Tensor<1>,
}

/// The codes of both moments.
#[derive(Clone)]
pub(super) struct CodeMaps {
    /// With a sign.
    first: CodeMap,
    /// Without.
    second: CodeMap,
}

impl CodeMaps {
    pub fn new(device: &Device) -> CodeMaps {
        CodeMaps {
            first: CodeMap::new(true, device),
            second: CodeMap::new(false, device),
        }
    }
}

impl CodeMap {
    fn new(signed: bool, device: &Device) -> CodeMap {
        let values = code_values(signed);
        let bounds = values
            .windows(2)
            .map(|pair| (pair[0] + pair[1]) / 2.0)
            .collect();
        CodeMap {
            values: float_tensor(values, device),
            bounds: float_tensor(bounds, device),
        }
    }
}

/// The values of the code, increasing. Of seven decades the highest has 64 (signed) or 128 steps, each
/// lower one half as many; 0 and 1 come on top.
fn code_values(signed: bool) -> Vec<f32> {
    const DECADES: u32 = 7;
    let mut values = vec![0.0, 1.0];
    for decade in 0..DECADES {
        let steps = 1usize << (decade + u32::from(!signed));
        let scale = 10f64.powi(decade as i32 - (DECADES as i32 - 1)) as f32;
        let bound = |index: usize| bound(index, steps);
        for step in 0..steps {
            let value = (bound(step) + bound(step + 1)) / 2.0 * scale;
            values.push(value);
            if signed {
                values.push(-value);
            }
        }
    }
    values.sort_by(f32::total_cmp);
    values
}

/// Bound `index` of `steps` equal steps from 0.1 to 1, in f32 from the nearer end with one rounding, as
/// PyTorch's `linspace` computes it.
fn bound(index: usize, steps: usize) -> f32 {
    let width = (1.0f32 - 0.1) / steps as f32;
    if index < steps.div_ceil(2) {
        width.mul_add(index as f32, 0.1)
    } else {
        width.mul_add(-((steps - index) as f32), 1.0)
    }
}

/// A flat tensor in eight bits.
struct Quantised {
    elements: usize,
    /// `[blocks · 64]`, i32, four codes each, the first in the lowest byte.
    codes: Tensor<1, Int>,
    /// `[blocks]`: the largest magnitude of each block.
    largest: Tensor<1>,
}

impl Quantised {
    /// Zeros.
    fn zeros(elements: usize, device: &Device) -> Quantised {
        let blocks = elements.div_ceil(BLOCK);
        let codes = vec![0i32; blocks * BLOCK / PACKED];
        Quantised {
            elements,
            codes: Tensor::from_data(
                TensorData::new(codes, [blocks * BLOCK / PACKED]),
                (device, DType::I32),
            ),
            largest: float_tensor(vec![0.0; blocks], device),
        }
    }

    /// The nearest values of the code; of a value half-way between two the lower one.
    fn quantise(values: Tensor<1>, code: &CodeMap) -> Quantised {
        let device = values.device();
        let [elements] = values.dims();
        let blocks = elements.div_ceil(BLOCK);
        let missing = blocks * BLOCK - elements;
        let values = match missing {
            0 => values,
            _ => Tensor::cat(vec![values, float_tensor(vec![0.0; missing], &device)], 0),
        };
        let values = values.reshape([blocks, BLOCK]);
        let largest = values.clone().abs().max_dim(1);
        let scaled = (values * largest.clone().clamp_min(1e-38).recip())
            .clamp(-1.0, 1.0)
            .reshape([blocks * BLOCK]);
        // How many bounds lie below each value, bit by bit from the highest.
        let mut place: Tensor<1, Int> = Tensor::zeros([blocks * BLOCK], (&device, DType::I32));
        for bit in (0..8).rev() {
            let step = 1i32 << bit;
            let bound = code
                .bounds
                .clone()
                .select(0, place.clone().add_scalar(step - 1));
            let further = place.clone().add_scalar(step);
            place = place.mask_where(scaled.clone().greater(bound), further);
        }
        Quantised {
            elements,
            codes: pack(place, blocks),
            largest: largest.reshape([blocks]),
        }
    }

    /// The values, f32.
    fn restored(&self, code: &CodeMap) -> Tensor<1> {
        let [blocks] = self.largest.dims();
        code.values
            .clone()
            .select(0, unpack(self.codes.clone(), blocks))
            .reshape([blocks, BLOCK])
            .mul(self.largest.clone().reshape([blocks, 1]))
            .reshape([blocks * BLOCK])
            .narrow(0, 0, self.elements)
    }

    fn bytes(&self) -> u64 {
        4 * self.codes.dims()[0] as u64 + bytes_of(&self.largest)
    }
}

fn pack(codes: Tensor<1, Int>, blocks: usize) -> Tensor<1, Int> {
    let words = blocks * BLOCK / PACKED;
    let codes = codes.reshape([words, PACKED]);
    let byte = |index: usize| {
        codes
            .clone()
            .slice([0..words, index..index + 1])
            .bitwise_left_shift_scalar(8 * index as i32)
    };
    byte(0)
        .bitwise_or(byte(1))
        .bitwise_or(byte(2))
        .bitwise_or(byte(3))
        .reshape([words])
}

fn unpack(codes: Tensor<1, Int>, blocks: usize) -> Tensor<1, Int> {
    let words = blocks * BLOCK / PACKED;
    let codes = codes.reshape([words, 1]);
    let bytes = (0..PACKED).map(|index| {
        codes
            .clone()
            .bitwise_right_shift_scalar(8 * index as i32)
            .bitwise_and_scalar(255)
    });
    Tensor::cat(bytes.collect(), 1).reshape([blocks * BLOCK])
}

/// Both moments of one tensor.
pub(super) struct Moments8Bit {
    options: AdamWOptions,
    code: CodeMaps,
    step: u64,
    first: Quantised,
    second: Quantised,
}

impl Moments8Bit {
    pub fn new(options: AdamWOptions, code: CodeMaps, values: &Tensor<1>) -> Moments8Bit {
        let zeros = || Quantised::zeros(values.dims()[0], &values.device());
        Moments8Bit {
            options,
            code,
            step: 0,
            first: zeros(),
            second: zeros(),
        }
    }

    /// Whether a saved state is of this kind.
    pub fn wrote(saved: &SavedState) -> bool {
        saved.has("exp_avg_codes")
    }

    pub fn restore(
        options: AdamWOptions,
        code: CodeMaps,
        saved: &mut SavedState,
        device: &Device,
    ) -> Result<Moments8Bit, String> {
        let elements = saved.count("elements")? as usize;
        let mut moment = |part: &str| -> Result<Quantised, String> {
            let codes = saved.integers(&format!("{part}_codes"), device)?;
            let largest = saved.floats(&format!("{part}_largest"), device)?;
            let blocks = elements.div_ceil(BLOCK);
            if codes.dims()[0] != blocks * BLOCK / PACKED || largest.dims()[0] != blocks {
                return Err(format!("has a `{part}_codes` of another length"));
            }
            Ok(Quantised {
                elements,
                codes,
                largest,
            })
        };
        Ok(Moments8Bit {
            first: moment("exp_avg")?,
            second: moment("exp_avg_sq")?,
            step: saved.count("step")?,
            options,
            code,
        })
    }
}

impl TensorState for Moments8Bit {
    fn update(&mut self, update: Update<'_>) -> Tensor<1> {
        let (first, second) = self.options.moments(
            self.first.restored(&self.code.first),
            self.second.restored(&self.code.second),
            update.gradient,
        );
        self.step += 1;
        self.first = Quantised::quantise(first.clone(), &self.code.first);
        self.second = Quantised::quantise(second.clone(), &self.code.second);
        let rule = update.rule;
        self.options.moved(
            (update.values, rule.learning_rate, rule.weight_decay),
            first,
            second,
            self.step,
        )
    }

    fn save(&self) -> SavedState {
        let codes = |moment: &Quantised| {
            SavedPart::Integers(
                moment
                    .codes
                    .to_data()
                    .try_to_vec()
                    .expect("packed codes are i32"),
            )
        };
        SavedState::default()
            .with("step", SavedPart::Count(self.step))
            .with("elements", SavedPart::Count(self.first.elements as u64))
            .with("exp_avg_codes", codes(&self.first))
            .with("exp_avg_largest", host(&self.first.largest))
            .with("exp_avg_sq_codes", codes(&self.second))
            .with("exp_avg_sq_largest", host(&self.second.largest))
    }

    fn bytes(&self) -> u64 {
        self.first.bytes() + self.second.bytes()
    }
}

#[cfg(test)]
#[path = "adamw_8bit_tests.rs"]
mod tests;
