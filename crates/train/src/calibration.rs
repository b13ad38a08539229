//! New parts of a model, set from training patients before the first step.

use calor_model::Model;
use calor_records::Split;
use calor_sequence::{HostBatch, MicroBatch, collate};

use crate::TrainError;
use crate::data::Data;
use crate::{soft, upload};

/// Training patients that it is done with.
const SAMPLES: usize = 256;

/// Calibrates the projectors ([`Model::calibrate`]) and the head ([`Model::calibrate_head`]) of a new
/// model with training patients from all over the split, `micro_batch` at a time.
///
/// # Errors
/// Items that cannot be decoded, or that the model cannot read.
pub(crate) fn calibrate(
    model: &mut Model,
    data: &Data,
    micro_batch: usize,
) -> Result<(), TrainError> {
    let device = model.device().clone();
    let fusion = model.options().fusion.clone();
    let training = data.set(Split::Train);
    let samples = training.samples();
    let stride = samples.len().div_ceil(SAMPLES).max(1);
    let rows: Vec<Vec<u32>> = samples
        .iter()
        .step_by(stride)
        .map(|&sample| vec![sample])
        .collect();
    let batches = || {
        rows.chunks(micro_batch.max(1)).map(|rows| {
            let micro = MicroBatch {
                rows: rows.to_vec(),
            };
            let mut batch = collate(&data.prepared, &micro, data.pad_id, 1);
            data.items.fill(&mut batch)?;
            Ok::<HostBatch, TrainError>(batch)
        })
    };
    if fusion.is_some() {
        model.calibrate(|| {
            batches().filter_map(|batch| {
                batch
                    .and_then(|batch| soft::input(&batch, fusion.as_ref(), |_| false, &device))
                    .transpose()
            })
        })?;
    }
    model.calibrate_head(
        batches().map(|batch| upload::input(&batch?, fusion.as_ref(), |_| false, &device)),
    )
}
