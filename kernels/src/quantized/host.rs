//! Quantising and dequantising in host memory, by the rules and in the byte order of bitsandbytes, so
//! that what it has stored can be read and what is made here is what it would have made.
//!
//! NF4 (Dettmers et al. 2023, QLoRA): 16 values at quantiles of the normal distribution, blocks along
//! the row-major weight with one scale each, which is the largest magnitude; double quantisation keeps
//! those scales, less their mean, in 8 bits. 8 bits: one scale an output channel (Dettmers et al.
//! 2022, LLM.int8(), without its outliers).

use std::fmt;
use std::sync::LazyLock;

use rayon::prelude::*;

/// The values of the sixteen codes.
pub const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Elements that share a scale.
const BLOCK: usize = 64;
/// Scales that share a scale of their own.
const DOUBLE_BLOCK: usize = 256;
/// What one thread takes at once; whole blocks of every size that there is.
const PIECE: usize = 1 << 16;

/// How many bits a frozen weight is kept in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Quantization {
    /// 8 bits, one scale an output channel.
    Int8,
    /// 4 bits of normal-float in blocks of 64.
    Nf4 {
        /// Whether the blocks' scales are quantised too: 4.13 instead of 4.5 bits a weight.
        double: bool,
    },
}

impl Quantization {
    /// Bytes that a matrix `[out, in]` takes: its codes, their scales, what the scales are quantised
    /// with.
    pub fn bytes(self, [outputs, inputs]: [usize; 2]) -> usize {
        let elements = outputs * inputs;
        let blocks = elements.div_ceil(BLOCK);
        match self {
            Quantization::Int8 => elements + 4 * outputs,
            Quantization::Nf4 { double: false } => elements.div_ceil(2) + 4 * blocks,
            Quantization::Nf4 { double: true } => {
                elements.div_ceil(2) + blocks + 4 * (blocks.div_ceil(DOUBLE_BLOCK) + 256)
            }
        }
    }
}

impl fmt::Display for Quantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Quantization::Int8 => "int8",
            Quantization::Nf4 { double: true } => "nf4",
            Quantization::Nf4 { double: false } => "nf4 with scales in 32 bits",
        })
    }
}

/// A quantised matrix `[out, in]` in host memory.
#[derive(Debug, Clone, PartialEq)]
pub enum HostWeight {
    /// One code a weight.
    Int8 {
        /// `out · in`, row-major.
        codes: Vec<i8>,
        /// `out`: the largest magnitude of each row, which is code 127.
        absmax: Vec<f32>,
    },
    /// Two codes a byte, the first in the high half.
    Nf4 {
        /// `⌈out · in / 2⌉`, row-major.
        codes: Vec<u8>,
        /// Weights a block; a power of two, 32 at least.
        block: usize,
        /// The scale of each block.
        absmax: BlockScales,
    },
}

/// The scales of blocks.
#[derive(Debug, Clone, PartialEq)]
pub enum BlockScales {
    /// As they are.
    Plain(Vec<f32>),
    /// Quantised themselves: `map[codes[i]] · absmax[i / block] + offset`.
    Double {
        /// One a block of weights.
        codes: Vec<u8>,
        /// Scales a block of scales; a multiple of four.
        block: usize,
        /// The values of the 256 codes.
        map: Vec<f32>,
        /// One a block of scales.
        absmax: Vec<f32>,
        /// The mean of the scales.
        offset: f32,
    },
}

impl HostWeight {
    /// Quantises the row-major `values` of a matrix whose rows have `width` elements.
    pub fn quantize(values: &[f32], width: usize, quantization: Quantization) -> HostWeight {
        match quantization {
            Quantization::Int8 => int8(values, width),
            Quantization::Nf4 { double } => {
                let (codes, absmax) = nf4(values);
                HostWeight::Nf4 {
                    codes,
                    block: BLOCK,
                    absmax: if double {
                        let sum: f64 = absmax.iter().map(|&scale| f64::from(scale)).sum();
                        let mean = sum / absmax.len().max(1) as f64;
                        BlockScales::double(&absmax, mean as f32)
                    } else {
                        BlockScales::Plain(absmax)
                    },
                }
            }
        }
    }

    /// How it was quantised.
    pub fn quantization(&self) -> Quantization {
        match self {
            HostWeight::Int8 { .. } => Quantization::Int8,
            HostWeight::Nf4 { absmax, .. } => Quantization::Nf4 {
                double: matches!(absmax, BlockScales::Double { .. }),
            },
        }
    }

    /// The values of a matrix whose rows have `width` elements, `elements` in all.
    pub fn dequantize(&self, elements: usize, width: usize) -> Vec<f32> {
        let mut values = vec![0.0; elements];
        match self {
            HostWeight::Int8 { codes, absmax } => int8_rows(codes, absmax, width, &mut values),
            HostWeight::Nf4 {
                codes,
                block,
                absmax,
            } => nf4_range(codes, *block, &absmax.view(), 0, &mut values),
        }
        values
    }
}

impl BlockScales {
    /// Quantises scales, less `offset`, to the 8-bit dynamic map in blocks of 256.
    pub fn double(scales: &[f32], offset: f32) -> BlockScales {
        let map = dynamic_map();
        let mut codes = Vec::with_capacity(scales.len());
        let mut absmax = Vec::with_capacity(scales.len().div_ceil(DOUBLE_BLOCK));
        for block in scales.chunks(DOUBLE_BLOCK) {
            let largest = block
                .iter()
                .fold(0.0f32, |largest, scale| largest.max((scale - offset).abs()));
            absmax.push(largest);
            codes.extend(block.iter().map(|scale| {
                // All scales alike: any code gives 0.
                let x = if largest > 0.0 {
                    (scale - offset) / largest
                } else {
                    0.0
                };
                nearest(map, x)
            }));
        }
        BlockScales::Double {
            codes,
            block: DOUBLE_BLOCK,
            map: map.to_vec(),
            absmax,
            offset,
        }
    }

    pub(super) fn view(&self) -> ScaleView<'_> {
        match self {
            BlockScales::Plain(scales) => ScaleView::Plain(scales),
            BlockScales::Double {
                codes,
                block,
                map,
                absmax,
                offset,
            } => ScaleView::Double {
                codes,
                block: *block,
                map,
                absmax,
                offset: *offset,
            },
        }
    }
}

/// The scales of blocks, wherever they lie.
#[derive(Clone, Copy)]
pub(super) enum ScaleView<'a> {
    Plain(&'a [f32]),
    Double {
        codes: &'a [u8],
        block: usize,
        map: &'a [f32],
        absmax: &'a [f32],
        offset: f32,
    },
}

impl ScaleView<'_> {
    fn at(&self, index: usize) -> f32 {
        match self {
            ScaleView::Plain(scales) => scales[index],
            ScaleView::Double {
                codes,
                block,
                map,
                absmax,
                offset,
            } => map[usize::from(codes[index])] * absmax[index / block] + offset,
        }
    }
}

/// Dequantises the weights from `start` on, in parallel.
pub(super) fn nf4_range(
    codes: &[u8],
    block: usize,
    scales: &ScaleView,
    start: usize,
    output: &mut [f32],
) {
    output
        .par_chunks_mut(PIECE)
        .enumerate()
        .for_each(|(number, mut rest)| {
            let mut position = start + number * PIECE;
            while !rest.is_empty() {
                let index = position / block;
                let length = ((index + 1) * block - position).min(rest.len());
                let (now, later) = rest.split_at_mut(length);
                nf4_block(codes, position, scales.at(index), now);
                position += length;
                rest = later;
            }
        });
}

/// Dequantises weights of one block, the first of which is the `start`-th of the matrix.
fn nf4_block(codes: &[u8], start: usize, scale: f32, output: &mut [f32]) {
    let mut byte = start / 2;
    let odd = (start % 2).min(output.len());
    let (first, output) = output.split_at_mut(odd);
    if let [value] = first {
        *value = PAIRS[usize::from(codes[byte])][1] * scale;
        byte += 1;
    }
    let (pairs, rest) = output.as_chunks_mut::<2>();
    let (whole, last) = codes[byte..].split_at(pairs.len());
    for (pair, &code) in pairs.iter_mut().zip(whole) {
        let values = PAIRS[usize::from(code)];
        *pair = [values[0] * scale, values[1] * scale];
    }
    if let [value] = rest {
        *value = PAIRS[usize::from(last[0])][0] * scale;
    }
}

/// The two values of every byte: one look-up for two weights.
static PAIRS: [[f32; 2]; 256] = {
    let mut pairs = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [NF4[byte >> 4], NF4[byte & 15]];
        byte += 1;
    }
    pairs
};

/// Dequantises whole rows, in parallel.
pub(super) fn int8_rows(codes: &[i8], absmax: &[f32], width: usize, output: &mut [f32]) {
    if width == 0 {
        return;
    }
    let rows = (PIECE / width).max(1);
    output
        .par_chunks_mut(rows * width)
        .zip(codes.par_chunks(rows * width).zip(absmax.par_chunks(rows)))
        .for_each(|(output, (codes, absmax))| {
            let rows = output.chunks_mut(width).zip(codes.chunks(width));
            for ((output, codes), &scale) in rows.zip(absmax) {
                for (value, &code) in output.iter_mut().zip(codes) {
                    // In this order, as bitsandbytes does it.
                    *value = f32::from(code) * scale * (1.0 / 127.0);
                }
            }
        });
}

fn int8(values: &[f32], width: usize) -> HostWeight {
    let rows = values.len().checked_div(width).unwrap_or(0);
    let mut codes = vec![0i8; values.len()];
    let mut absmax = vec![0.0f32; rows];
    codes
        .par_chunks_mut(width.max(1))
        .zip(values.par_chunks(width.max(1)))
        .zip(&mut absmax)
        .for_each(|((codes, values), absmax)| {
            *absmax = magnitude(values);
            let factor = 127.0 / *absmax;
            for (code, &value) in codes.iter_mut().zip(values) {
                // A row of zeros: 0 · ∞ is no number, which becomes 0.
                *code = (value * factor).round_ties_even() as i8;
            }
        });
    HostWeight::Int8 { codes, absmax }
}

/// Codes and scales in blocks of 64.
fn nf4(values: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let mut codes = vec![0u8; values.len().div_ceil(2)];
    let mut absmax = vec![0.0f32; values.len().div_ceil(BLOCK)];
    codes
        .par_chunks_mut(BLOCK / 2)
        .zip(values.par_chunks(BLOCK))
        .zip(&mut absmax)
        .with_min_len(PIECE / BLOCK)
        .for_each(|((codes, values), absmax)| {
            // bitsandbytes multiplies by the reciprocal, but divides in a last block that is not
            // full, whose scale it also keeps from being 0.
            let whole = values.len() == BLOCK;
            let largest = magnitude(values);
            let bounded = largest.max(1e-38);
            let reciprocal = 1.0 / bounded;
            *absmax = if whole { largest } else { bounded };
            let code = |value: f32| {
                let scaled = if whole {
                    value * reciprocal
                } else {
                    value / bounded
                };
                nf4_code(scaled.clamp(-1.0, 1.0))
            };
            for (byte, pair) in codes.iter_mut().zip(values.chunks(2)) {
                let second = pair.get(1).copied().unwrap_or(0.0);
                *byte = code(pair[0]) << 4 | code(second);
            }
        });
    (codes, absmax)
}

/// The nearest code, the lower of two at the same distance: how many midpoints lie below.
fn nf4_code(value: f32) -> u8 {
    const MIDPOINTS: [f32; 15] = {
        let mut midpoints = [0.0; 15];
        let mut code = 0;
        while code < 15 {
            midpoints[code] = (NF4[code] + NF4[code + 1]) / 2.0;
            code += 1;
        }
        midpoints
    };
    MIDPOINTS
        .iter()
        .map(|&midpoint| u8::from(value > midpoint))
        .sum()
}

fn magnitude(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |largest, value| {
        let value = value.abs();
        if value > largest { value } else { largest }
    })
}

/// The code whose value is nearest, the lower of two at the same distance.
fn nearest(map: &[f32; 256], value: f32) -> u8 {
    let above = map.partition_point(|&entry| entry <= value);
    let left = above.saturating_sub(1);
    let right = above.min(255);
    let chosen = if (value - map[right]).abs() < (value - map[left]).abs() {
        right
    } else {
        left
    };
    chosen as u8
}

/// The signed dynamic map of 8 bits (Dettmers 2016, 8-bit approximations): seven decades, in the
/// i-th of which 2ⁱ values lie evenly, on both sides of 0, and 1.
fn dynamic_map() -> &'static [f32; 256] {
    static MAP: LazyLock<[f32; 256]> = LazyLock::new(|| {
        let mut map = [0.0f32; 256];
        let mut filled = 1; // the first stays 0
        map[filled] = 1.0;
        filled += 1;
        for decade in 0..7 {
            let intervals = 1usize << decade;
            let first = 0.1f32;
            let step = (1.0 - first) / intervals as f32;
            // Rounded once, and from the nearer end, as PyTorch spaces numbers.
            let boundary = |index: usize| {
                if index < intervals.div_ceil(2) {
                    (f64::from(first) + f64::from(step) * index as f64) as f32
                } else {
                    (1.0 - f64::from(step) * (intervals - index) as f64) as f32
                }
            };
            let scale = 10f64.powi(decade - 6) as f32;
            for index in 0..intervals {
                let value = (boundary(index) + boundary(index + 1)) / 2.0 * scale;
                map[filled] = value;
                map[filled + 1] = -value;
                filled += 2;
            }
        }
        map.sort_by(f32::total_cmp);
        map
    });
    &MAP
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_dynamic_map_is_odd_but_for_its_end() {
        let map = dynamic_map();
        assert!(map.is_sorted_by(|a, b| a < b), "256 different values");
        assert_eq!((map[127], map[255]), (0.0, 1.0));
        for index in 0..127 {
            assert_eq!(map[index], -map[254 - index]);
        }
    }

    #[test]
    fn zeros_stay_zeros() {
        for quantization in [
            Quantization::Int8,
            Quantization::Nf4 { double: false },
            Quantization::Nf4 { double: true },
        ] {
            for length in [5, 64, 320] {
                let weight = HostWeight::quantize(&vec![0.0; length], 5, quantization);
                assert!(
                    weight
                        .dequantize(length, 5)
                        .iter()
                        .all(|x| x.abs() <= 1e-30)
                );
            }
        }
    }

    proptest! {
        #[test]
        fn what_comes_back_is_near_and_stays(
            values in prop::collection::vec(-3.0f32..3.0, 1..400),
        ) {
            let width = values.len();
            // Half the widest gap of NF4 is 0.152 of a block's scale, of 8 bits 1/254.
            let bounds = [(Quantization::Int8, 0.004), (Quantization::Nf4 { double: false }, 0.153)];
            for (quantization, bound) in bounds {
                let weight = HostWeight::quantize(&values, width, quantization);
                let back = weight.dequantize(values.len(), width);
                let block = if quantization == Quantization::Int8 { width } else { BLOCK };
                for (values, back) in values.chunks(block).zip(back.chunks(block)) {
                    let scale = magnitude(values);
                    for (value, back) in values.iter().zip(back) {
                        prop_assert!((value - back).abs() <= bound * scale + 1e-30);
                    }
                }
                // What has been quantised once loses nothing more.
                let again = HostWeight::quantize(&back, width, quantization);
                match (&weight, &again) {
                    (HostWeight::Int8 { codes, .. }, HostWeight::Int8 { codes: again, .. }) => {
                        prop_assert_eq!(codes, again);
                    }
                    _ => prop_assert_eq!(&weight, &again),
                }
            }
        }
    }
}
