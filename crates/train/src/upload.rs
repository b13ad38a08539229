//! From host batches to the device: the only place that knows both.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use calor_model::{FusionOptions, ModelInput, SampleSpan};
use calor_sequence::{HostBatch, NO_TARGET, PlacedItem, Targets};

use crate::TrainError;
use crate::soft;

/// Tensors of a micro-batch on `device`; modality items that `withheld` names count as missing.
///
/// # Errors
/// Modality items that the model cannot read.
pub(crate) fn input(
    batch: &HostBatch,
    fusion: Option<&FusionOptions>,
    withheld: impl Fn(&PlacedItem) -> bool,
    device: &Device,
) -> Result<ModelInput, TrainError> {
    let matrix = |values: &[i32]| integers(values, [batch.rows, batch.seq], device);
    Ok(ModelInput {
        input_ids: matrix(&batch.input_ids),
        positions: matrix(&batch.positions),
        segments: matrix(&batch.segments),
        samples: batch
            .spans
            .iter()
            .map(|span| SampleSpan {
                row: span.row,
                start: span.start,
                length: span.length,
            })
            .collect(),
        soft: soft::input(batch, fusion, withheld, device)?,
    })
}

/// Class numbers, `[samples]`.
///
/// # Panics
/// When a target is no class: the task and its labels were checked when they were read.
pub(crate) fn classes(targets: &[Targets], device: &Device) -> Tensor<1, Int> {
    let values: Vec<i32> = targets
        .iter()
        .map(|target| match target {
            Targets::Class(class) => *class,
            other => unreachable!("a class is expected, not {other:?}"),
        })
        .collect();
    integers(&values, [values.len()], device)
}

/// Where a batch has tokens to learn from, and what is to be said there: positions in
/// `[rows · seq]` and class numbers, or, where the `next` token is learned, the positions before the
/// learned ones; `[tokens]` each, sample by sample.
pub(crate) fn token_targets(
    batch: &HostBatch,
    next: bool,
    device: &Device,
) -> (Tensor<1, Int>, Tensor<1, Int>) {
    let (mut places, mut classes) = (Vec::new(), Vec::new());
    for (span, targets) in batch.spans.iter().zip(&batch.targets) {
        let Targets::Tokens(targets) = targets else {
            unreachable!("targets of tokens are expected, not {targets:?}");
        };
        let start = span.row * batch.seq + span.start;
        for (offset, target) in targets.iter().enumerate() {
            if *target != NO_TARGET {
                places.push((start + offset - usize::from(next)) as i32);
                classes.push(*target);
            }
        }
    }
    let count = [places.len()];
    (
        integers(&places, count, device),
        integers(&classes, count, device),
    )
}

/// Numbers, `[samples, width]`: real targets, classes as numbers, or labels with NaN where
/// one is not known.
pub(crate) fn numbers(targets: &[Targets], device: &Device) -> Tensor<2> {
    let mut values = Vec::new();
    for target in targets {
        match target {
            Targets::Class(class) => values.push(*class as f32),
            Targets::Real(value) => values.push(*value),
            Targets::Multilabel(labels) => values.extend_from_slice(labels),
            Targets::None | Targets::Survival { .. } | Targets::Tokens(_) => {
                unreachable!("a number is expected, not {target:?}")
            }
        }
    }
    let width = values.len() / targets.len().max(1);
    floats(values, [targets.len(), width], device)
}

/// A float tensor, f32 whatever the device's default type is.
pub(crate) fn floats<const D: usize>(
    values: Vec<f32>,
    shape: [usize; D],
    device: &Device,
) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
}

/// An integer tensor.
pub(crate) fn integers<const D: usize>(
    values: &[i32],
    shape: [usize; D],
    device: &Device,
) -> Tensor<D, Int> {
    Tensor::from_data(
        TensorData::new(values.to_vec(), shape),
        (device, DType::I32),
    )
}
