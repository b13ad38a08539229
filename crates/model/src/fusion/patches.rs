//! The encoder of images of ours, for want of a pretrained one: a small vision transformer
//! (Dosovitskiy et al. 2021) with the norm first and sinusoidal positions in both directions.

use burn::tensor::{Device, Tensor};

use super::CHANNELS;
use super::encoder::Encoded;
use super::new::New;
use super::options::PatchOptions;
use super::transformer::{Transformer, segments, sinusoids};
use crate::linear::Linear;
use crate::parameter::Visit;
use crate::run::Mode;

#[derive(Debug, Clone)]
pub(super) struct Patches {
    patch: Linear,
    transformer: Transformer,
    side: usize,
    width: usize,
}

impl Patches {
    pub fn new(new: &New, options: &PatchOptions) -> Patches {
        let inputs = CHANNELS * options.patch * options.patch;
        Patches {
            patch: new.linear("patch", inputs, options.width),
            transformer: Transformer::new(new, options.width, options.depth, options.heads),
            side: options.patch,
            width: options.width,
        }
    }

    pub fn width(&self) -> usize {
        self.width
    }

    /// pixels `[items, 3, height, width]`, both sides multiples of the patch's; returns
    /// `[items, patches, width]`, rows of patches from the top.
    pub fn forward(&self, pixels: Tensor<4>, mode: Mode) -> Encoded {
        let [items, channels, height, width] = pixels.dims();
        let device = pixels.device();
        let side = self.side;
        let (rows, columns) = (height / side, width / side);
        let patches = pixels
            .reshape([items, channels, rows, side, columns, side])
            .permute([0, 2, 4, 1, 3, 5])
            .reshape([items, rows * columns, channels * side * side]);
        let positions = self.positions(rows, columns, &device);
        let embedded = self.patch.forward(patches, mode) + positions;
        let segments = segments(&vec![rows * columns; items], rows * columns, &device);
        Encoded {
            tokens: self.transformer.forward(embedded, &segments, mode),
            mask: None,
        }
    }

    /// Half the width says the row, half the column: `[1, rows · columns, width]`.
    fn positions(&self, rows: usize, columns: usize, device: &Device) -> Tensor<3> {
        let half = self.width / 2;
        let down = sinusoids(rows, half, device)
            .reshape([rows, 1, half])
            .repeat_dim(1, columns);
        let across = sinusoids(columns, half, device)
            .reshape([1, columns, half])
            .repeat_dim(0, rows);
        Tensor::cat(vec![down, across], 2).reshape([1, rows * columns, self.width])
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        self.patch.visit(visitor);
        self.transformer.visit(visitor);
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::TensorData;

    use super::*;
    use crate::parameter::ParameterGroup;

    #[test]
    fn a_pixel_is_in_the_patch_where_it_lies() {
        let device = Device::flex();
        let new = New {
            seed: 1,
            device: &device,
            group: ParameterGroup::Encoder,
            path: "patches".to_owned(),
        };
        let options = PatchOptions {
            patch: 2,
            width: 8,
            depth: 0,
            heads: 1,
        };
        let patches = Patches::new(&new, &options);
        // Four rows and six columns of pixels: two rows of three patches.
        let tokens = |lit: Option<usize>| -> Vec<f32> {
            let mut pixels = vec![0f32; 3 * 4 * 6];
            if let Some(lit) = lit {
                pixels[lit] = 1.0;
            }
            let pixels = Tensor::from_data(TensorData::new(pixels, [1, 3, 4, 6]), &device);
            let tokens = patches.forward(pixels, Mode::Infer).tokens;
            tokens.inner().into_data().try_to_vec().expect("f32")
        };
        let dark = tokens(None);
        for (channel, row, column, patch) in [
            (0, 0, 0, 0),
            (1, 1, 3, 1),
            (2, 0, 5, 2),
            (0, 2, 1, 3),
            (2, 3, 5, 5),
        ] {
            let lit = tokens(Some(channel * 24 + row * 6 + column));
            let changed: Vec<usize> = (0..6)
                .filter(|token| lit[token * 8..][..8] != dark[token * 8..][..8])
                .collect();
            assert_eq!(changed, [patch]);
        }
        // Positions tell all patches apart.
        for first in 0..6 {
            for second in 0..first {
                assert_ne!(dark[first * 8..][..8], dark[second * 8..][..8]);
            }
        }
    }
}
