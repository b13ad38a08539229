//! Modality items of a host batch as the tensors that the model's encoders read.

use burn::tensor::Device;
use calor_model::{
    EncoderSpec, FusionOptions, ItemTensors, ModalityKind, Placement, SoftInput, WindowsOptions,
};
use calor_sequence::{
    HostBatch, ItemContent, PlacedItem, SeriesValue, WINDOW_STATISTICS, series_windows,
};

use crate::TrainError;
use crate::upload::{floats, integers};

/// The items of a micro-batch on `device`; `None` for a model without streams. An item that
/// `withheld` names counts as missing.
///
/// # Errors
/// Items of one stream that differ in shape where they may not.
pub(crate) fn input(
    batch: &HostBatch,
    fusion: Option<&FusionOptions>,
    withheld: impl Fn(&PlacedItem) -> bool,
    device: &Device,
) -> Result<Option<SoftInput>, TrainError> {
    let Some(fusion) = fusion else {
        return Ok(None);
    };
    let mut groups: Vec<Vec<&ItemContent>> = vec![Vec::new(); fusion.streams.len()];
    let mut placements = Vec::with_capacity(batch.items.len());
    for item in &batch.items {
        let there = item.content != ItemContent::Missing && !withheld(item);
        let group = &mut groups[item.stream];
        let number = there.then(|| {
            group.push(&item.content);
            group.len() - 1
        });
        placements.push(Placement {
            stream: item.stream,
            item: number,
            row: item.row,
            start: item.start,
            days_before: item.days_before.filter(|_| there),
            site: item.site.filter(|_| there),
        });
    }
    let mut streams = Vec::with_capacity(groups.len());
    for (group, spec) in groups.iter().zip(&fusion.streams) {
        streams.push(match group.is_empty() {
            true => None,
            false => Some(
                tensors(group, spec.modality, &spec.encoder, device).map_err(|problem| {
                    TrainError::Item {
                        modality: spec.modality.name(),
                        problem,
                    }
                })?,
            ),
        });
    }
    Ok(Some(SoftInput {
        streams,
        placements,
    }))
}

fn tensors(
    group: &[&ItemContent],
    modality: ModalityKind,
    encoder: &EncoderSpec,
    device: &Device,
) -> Result<ItemTensors, String> {
    let items = group.len();
    if modality == ModalityKind::Series {
        return Ok(match encoder {
            EncoderSpec::Windows(options) => windows(group, options, device),
            _ => series(group, device),
        });
    }
    let decoded: Vec<(&[usize], &[f32])> = group
        .iter()
        .map(|content| match content {
            ItemContent::Decoded(decoded) => Ok((&decoded.shape[..], &decoded.values[..])),
            _ => Err("an item was not decoded before it was to be uploaded".to_owned()),
        })
        .collect::<Result<_, _>>()?;
    let first = decoded[0].0;
    let alike = |what: &str, fixed: usize| {
        let other = decoded
            .iter()
            .find(|(shape, _)| shape.len() != first.len() || shape[..fixed] != first[..fixed]);
        match other {
            None => Ok(()),
            Some((shape, _)) => Err(format!(
                "{what} differ in shape, {first:?} and {shape:?}; make `decode` give one shape"
            )),
        }
    };
    let rank = |expected: usize| {
        if first.len() == expected {
            Ok(())
        } else {
            Err(format!(
                "an item has {} dimensions, {expected} are expected",
                first.len()
            ))
        }
    };
    match (modality, encoder) {
        (ModalityKind::Image, _) => {
            rank(3)?;
            alike("pictures", 3)?;
            let values = decoded
                .iter()
                .flat_map(|(_, values)| values.iter().copied());
            let shape = [items, first[0], first[1], first[2]];
            Ok(ItemTensors::Image(floats(values.collect(), shape, device)))
        }
        (ModalityKind::Omics, _) => {
            rank(1)?;
            alike("vectors", 1)?;
            let values: Vec<f32> = decoded
                .iter()
                .flat_map(|(_, values)| values.iter().copied())
                .collect();
            let (values, present) = split_missing(&values);
            let shape = [items, first[0]];
            Ok(ItemTensors::Omics {
                values: floats(values, shape, device),
                present: floats(present, shape, device),
            })
        }
        (_, EncoderSpec::Whisper { .. }) => {
            rank(2)?;
            alike("recordings", 2)?;
            let values = decoded
                .iter()
                .flat_map(|(_, values)| values.iter().copied());
            let shape = [items, first[0], first[1]];
            Ok(ItemTensors::Mel(floats(values.collect(), shape, device)))
        }
        _ => {
            rank(2)?;
            alike("signals", 1)?;
            let leads = first[0];
            let lengths: Vec<usize> = decoded.iter().map(|(shape, _)| shape[1]).collect();
            let samples = lengths.iter().copied().max().unwrap_or(0);
            let mut padded = vec![f32::NAN; items * leads * samples];
            for (item, (shape, values)) in decoded.iter().enumerate() {
                for (lead, values) in values.chunks(shape[1].max(1)).enumerate() {
                    let start = (item * leads + lead) * samples;
                    padded[start..start + values.len()].copy_from_slice(values);
                }
            }
            let (values, present) = split_missing(&padded);
            let shape = [items, leads, samples];
            Ok(ItemTensors::Dense {
                values: floats(values, shape, device),
                present: floats(present, shape, device),
                lengths,
            })
        }
    }
}

fn values_of<'a>(group: &[&'a ItemContent]) -> Vec<&'a [SeriesValue]> {
    let values = group.iter().map(|content| match content {
        ItemContent::Series(values) => &values[..],
        _ => &[],
    });
    values.collect()
}

fn windows(group: &[&ItemContent], options: &WindowsOptions, device: &Device) -> ItemTensors {
    const { assert!(WindowsOptions::STATISTICS == WINDOW_STATISTICS) };
    let statistics: Vec<f32> = values_of(group)
        .into_iter()
        .flat_map(|values| {
            series_windows(
                values,
                options.variables,
                options.windows,
                options.span_days,
            )
        })
        .collect();
    let shape = [group.len(), statistics.len() / group.len().max(1)];
    let (values, present) = split_missing(&statistics);
    ItemTensors::Windows {
        values: floats(values, shape, device),
        present: floats(present, shape, device),
    }
}

fn series(group: &[&ItemContent], device: &Device) -> ItemTensors {
    let series = values_of(group);
    let items = series.len();
    let longest = series.iter().map(|values| values.len()).max().unwrap_or(0);
    let shape = [items, longest];
    let mut time_days = vec![0.0; items * longest];
    let mut variable = vec![0; items * longest];
    let mut value = vec![0.0; items * longest];
    let mut present = vec![0.0; items * longest];
    for (item, values) in series.iter().enumerate() {
        for (place, found) in (item * longest..).zip(*values) {
            time_days[place] = found.time_days;
            variable[place] = found.variable as i32;
            value[place] = found.value;
            present[place] = 1.0;
        }
    }
    ItemTensors::Series {
        time_days: floats(time_days, shape, device),
        variable: integers(&variable, shape, device),
        value: floats(value, shape, device),
        present: floats(present, shape, device),
    }
}

/// Values with zeros where they are missing, and where they are there.
fn split_missing(values: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let there = |value: &f32| value.is_finite();
    (
        values
            .iter()
            .map(|value| if there(value) { *value } else { 0.0 })
            .collect(),
        values
            .iter()
            .map(|value| f32::from(u8::from(there(value))))
            .collect(),
    )
}
