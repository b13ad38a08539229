//! From pixels to tokens: patches, class token, position embeddings.

use burn::tensor::Tensor;
use burn::tensor::ops::PadMode;

use crate::builder::Builder;
use crate::error::ModelError;
use crate::linear::Linear;
use crate::norm::LayerNorm;
use crate::parameter::{Parameter, Visit};
use crate::run::Mode;

use super::config::{CHANNELS, Reads, TowerConfig, TowerType};

#[derive(Debug, Clone)]
pub(super) struct VisionStem {
    /// The convolution over patches, `[width, 3 · patch height · patch width]`.
    projection: Linear,
    /// `[1, 1, width]`
    class: Option<Parameter<3>>,
    /// `[1, tokens, width]`
    positions: Parameter<3>,
    /// CLIP's layer norm before the first layer.
    norm: Option<LayerNorm>,
    grid: [usize; 2],
    patch: [usize; 2],
}

impl VisionStem {
    pub fn build(builder: &Builder, config: &TowerConfig) -> Result<VisionStem, ModelError> {
        let Reads::Image { patch, .. } = config.reads else {
            unreachable!("a vision tower reads images");
        };
        let width = config.width;
        let table = [1, config.image_tokens(), width];
        Ok(VisionStem {
            projection: builder.convolution::<4>(
                config.tower_type.names().convolutions[0],
                [width, CHANNELS * patch[0] * patch[1]],
                config.tower_type != TowerType::Clip,
            )?,
            class: match config.tower_type {
                TowerType::Vit => {
                    Some(builder.loose::<3, 3>("embeddings", "cls_token", [1, 1, width])?)
                }
                TowerType::Clip => {
                    Some(builder.loose::<1, 3>("embeddings", "class_embedding", [1, 1, width])?)
                }
                _ => None,
            },
            positions: match config.tower_type {
                TowerType::Vit => {
                    builder.loose::<3, 3>("embeddings", "position_embeddings", table)?
                }
                _ => builder.loose::<2, 3>("embeddings.position_embedding", "weight", table)?,
            },
            norm: match config.tower_type {
                TowerType::Clip => Some(builder.layer_norm("pre_layrnorm", config.norm_epsilon)?),
                _ => None,
            },
            grid: config.grid(),
            patch,
        })
    }

    /// pixels `[items, 3, height, width]`, returns `[items, tokens, width]`
    pub fn forward(&self, pixels: Tensor<4>, mode: Mode) -> Tensor<3> {
        let patches = unfold(pixels, self.grid, self.patch);
        let mut states = self.projection.forward(patches, mode);
        let dtype = states.dtype();
        let mut table = self.positions.matching(dtype);
        if let Some(class) = &self.class {
            // The class token is a part of the table, at a place that no patch has: sums of the
            // same numbers as where it is put before the patches.
            let patches = states.dims()[1];
            states = states.pad([(1, 0), (0, 0)], PadMode::Constant(0.0));
            let class = class.matching(dtype);
            table = table + class.pad([(0, patches), (0, 0)], PadMode::Constant(0.0));
        }
        let states = states + table;
        match &self.norm {
            Some(norm) => norm.forward(states),
            None => states,
        }
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        if let Some(class) = &mut self.class {
            visitor.visit(class);
        }
        visitor.visit(&mut self.positions);
        self.projection.visit(visitor);
        if let Some(norm) = &mut self.norm {
            norm.visit(visitor);
        }
    }
}

/// Patches as rows, ordered as the weights of a convolution: channel, row, column.
///
/// What does not fill a patch, right and below, is left out as by a convolution without padding.
///
/// # Shapes
/// - pixels: `[items, channels, height, width]`
/// - returns: `[items, rows · columns, channels · patch height · patch width]`
fn unfold(
    pixels: Tensor<4>,
    [rows, columns]: [usize; 2],
    [patch_height, patch_width]: [usize; 2],
) -> Tensor<3> {
    let [items, channels, _, _] = pixels.dims();
    pixels
        .narrow(2, 0, rows * patch_height)
        .narrow(3, 0, columns * patch_width)
        .reshape([items, channels, rows, patch_height, columns, patch_width])
        .permute([0, 2, 4, 1, 3, 5])
        .reshape([items, rows * columns, channels * patch_height * patch_width])
}
