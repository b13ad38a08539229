//! The cohort written: shards in parallel, one patient at a time, each file under its name only
//! when it is whole; the description of the model comes last.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arrow_array::{ArrayRef, Int64Array, StringArray};
use arrow_schema::{DataType, Field};
use rayon::prelude::*;
use serde_json::json;

use crate::error::RecordsError;
use crate::files::write_whole;
use crate::item::{ItemPath, Modality};
use crate::labels::{Label, LabelValue, SurvivalLabel};
use crate::metadata::SPLITS_FILE;
use crate::patient::Split;
use crate::writer::{
    ShardOptions, ShardWriter, TableWriter, write_codes, write_dataset, write_labels,
    write_survival,
};

use super::model::{Draw, Model};
use super::optimum::Oracle;
use super::options::{Modalities, SynthModality, SynthOptions};
use super::report::{self, HeldOutScores, ShardTally, SynthReport};
use super::rows::Rows;
use super::truth::TruthWriter;
use super::{images, omics, speech, waveforms};

const PATIENTS_PER_SHARD: u64 = 500;
/// Held-out patients are scored in so many shards (about 75,000 of them), so that what is kept of
/// them does not grow with the cohort.
const SCORED_SHARDS: u64 = 1_000;
/// Path columns of every shard, whatever is made, so that all shards have the same columns.
const ITEM_COLUMNS: [Modality; 4] = [
    Modality::Image,
    Modality::Waveform,
    Modality::Omics,
    Modality::Speech,
];
const SPLIT_ROWS: u64 = 65_536;
pub(super) const MODEL_FILE: &str = "generating_model.json";

/// Writes a synthetic cohort into `out`, a folder that is empty or not there yet. `progress` is
/// told how many patients are written; it is called from several threads.
///
/// Files of items are not synchronised one by one, five to a patient: what says that a cohort is
/// complete is its `generating_model.json`, and what is lost is made again from the seed.
///
/// # Errors
/// An option that cannot be, a folder that is not empty, a file that cannot be written.
pub fn synthesize(
    out: &Path,
    options: &SynthOptions,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<SynthReport, RecordsError> {
    options.check()?;
    refuse_used(out)?;
    let model = Model::new(options);
    let writer = CohortWriter {
        out,
        oracle: Oracle::new(&model),
        model: &model,
        rows: Rows::new(options.seed),
        omics_header: omics::csv_header(),
    };
    let optimum = writer.oracle.optimum();

    let written = AtomicU64::new(0);
    let tallies = (0..options.patients.div_ceil(PATIENTS_PER_SHARD))
        .into_par_iter()
        .map(|shard| {
            writer.shard(shard, &|| {
                progress(written.fetch_add(1, Ordering::Relaxed) + 1);
            })
        })
        .try_reduce(ShardTally::default, |a, b| Ok(a.plus(b)))?;
    writer.metadata()?;

    let report = SynthReport::new(&model, optimum, &tallies);
    let path = out.join(MODEL_FILE);
    let mut bytes =
        serde_json::to_vec_pretty(&report::description(&model, &report)).map_err(|source| {
            RecordsError::Json {
                path: path.clone(),
                source,
            }
        })?;
    bytes.push(b'\n');
    write_whole(&path, &bytes)?;
    Ok(report)
}

/// Nothing is written over: a cohort half replaced would be two.
fn refuse_used(out: &Path) -> Result<(), RecordsError> {
    let mut entries = match std::fs::read_dir(out) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(RecordsError::io(out, source)),
    };
    if entries.next().is_some() {
        return Err(RecordsError::Write {
            path: out.to_path_buf(),
            reason: "there is something in the folder already; remove it or name another folder"
                .to_string(),
        });
    }
    Ok(())
}

struct CohortWriter<'a> {
    out: &'a Path,
    model: &'a Model,
    oracle: Oracle<'a>,
    rows: Rows,
    omics_header: String,
}

impl CohortWriter<'_> {
    fn shard(&self, shard: u64, count: &(dyn Fn() + Sync)) -> Result<ShardTally, RecordsError> {
        let name = format!("{shard:05}");
        let file = |folder: &str| self.out.join(folder).join(&name).with_extension("parquet");
        for modality in self.model.kept.iter().filter(|one| one.item().is_some()) {
            let folder = self.out.join(item_folder(modality, &name));
            std::fs::create_dir_all(&folder).map_err(|source| RecordsError::io(&folder, source))?;
        }
        let mut data = ShardWriter::create(
            &file("data"),
            ShardOptions {
                items: &ITEM_COLUMNS,
                ..ShardOptions::default()
            },
        )?;
        let mut truth = TruthWriter::new(&self.model.options);
        let mut tally = ShardTally::default();
        let (mut labels, mut survival) = (Vec::new(), Vec::new());
        let first = shard * PATIENTS_PER_SHARD;
        let last = (first + PATIENTS_PER_SHARD).min(self.model.options.patients);
        for subject_id in first + 1..=last {
            let draw = self.model.draw(subject_id as i64);
            let items = self.items(&draw, &name, &mut tally)?;
            let patient = self
                .rows
                .patient(&draw, self.model.site_shift(draw.site), items);
            tally.add(&draw, patient.events.len());
            data.write(&patient)?;
            truth.add(self.model, &self.oracle, &draw);
            labels.push(Label {
                subject_id: draw.subject_id,
                prediction_time_us: draw.prediction_time_us,
                value: LabelValue::Boolean(draw.recorded),
            });
            survival.push(SurvivalLabel {
                subject_id: draw.subject_id,
                prediction_time_us: draw.prediction_time_us,
                duration_days: draw.duration_days as f32,
                event: i32::from(draw.event),
            });
            if draw.split == Split::HeldOut && shard < SCORED_SHARDS {
                tally.held_out.push(self.scores(&draw));
            }
            count();
        }
        // The shard comes last: what it points to is there.
        write_labels(&file("labels/outcome"), &labels)?;
        write_survival(&file("survival/outcome"), &survival)?;
        truth.write(&file("truth"))?;
        data.finish()?;
        Ok(tally)
    }

    /// Writes the files of a patient's items.
    fn items(
        &self,
        draw: &Draw,
        shard: &str,
        tally: &mut ShardTally,
    ) -> Result<Vec<ItemPath>, RecordsError> {
        let seed = self.model.options.seed;
        let name = format!("{:09}", draw.subject_id);
        let mut items = Vec::new();
        for modality in draw.observed.iter() {
            let Some(item) = modality.item() else {
                continue;
            };
            let folder = item_folder(modality, shard);
            let mut write = |extension: &str, bytes: &[u8]| {
                let path = format!("{folder}/{name}.{extension}");
                let full = self.out.join(&path);
                std::fs::write(&full, bytes).map_err(|source| RecordsError::io(&full, source))?;
                tally.files += 1;
                tally.bytes += bytes.len() as u64;
                Ok::<String, RecordsError>(path)
            };
            let path = match item {
                Modality::Image => {
                    let png = images::png(&images::pixels(seed, draw)).map_err(|error| {
                        RecordsError::Write {
                            path: self.out.join(&folder),
                            reason: error.to_string(),
                        }
                    })?;
                    write("png", &png)?
                }
                Modality::Waveform => {
                    let samples = waveforms::samples(seed, draw);
                    write("dat", &waveforms::dat(&samples))?;
                    write("hea", waveforms::hea(&name, &samples).as_bytes())?
                }
                Modality::Omics => write(
                    "csv",
                    &omics::csv(&self.omics_header, &omics::values(seed, draw)),
                )?,
                Modality::Speech => write("wav", &speech::wav(&speech::samples(seed, draw)))?,
                Modality::Series => continue,
            };
            items.push(ItemPath {
                modality: item,
                path: path.into(),
            });
        }
        Ok(items)
    }

    /// The best scores of a patient by what is seen of them.
    fn scores(&self, draw: &Draw) -> HeldOutScores {
        let best = |visible: Modalities| self.oracle.probability(draw, visible) as f32;
        HeldOutScores {
            recorded: draw.recorded,
            everything: best(self.model.kept),
            observed: best(draw.observed),
            alone: SynthModality::ALL
                .map(|modality| best(draw.observed.and(Modalities::of(&[modality])))),
        }
    }

    fn metadata(&self) -> Result<(), RecordsError> {
        self.splits()?;
        let codes = Rows::code_entries();
        write_codes(self.out, codes.iter().map(|(code, entry)| (*code, entry)))?;
        if self.model.kept.contains(SynthModality::Omics) {
            write_whole(
                &self.out.join("metadata/pathways.gmt"),
                omics::gmt().as_bytes(),
            )?;
        }
        let dataset = json!({
            "dataset_name": "Calor synthetic cohort",
            "dataset_version": "1",
            "etl_name": "calor cohort synth",
            "etl_version": env!("CARGO_PKG_VERSION"),
            "meds_version": "0.4.0",
            "site_id_columns": ["site"],
        });
        let dataset = dataset.as_object().cloned().unwrap_or_default();
        write_dataset(self.out, &dataset)
    }

    /// Streams `metadata/subject_splits.parquet`.
    fn splits(&self) -> Result<(), RecordsError> {
        let fields = vec![
            Field::new("subject_id", DataType::Int64, false),
            Field::new("split", DataType::Utf8, false),
        ];
        let path: PathBuf = self.out.join(SPLITS_FILE);
        let rows = ShardOptions::default().row_group_rows;
        let mut table = TableWriter::create(&path, fields, rows)?;
        let patients = self.model.options.patients;
        for first in (0..patients).step_by(SPLIT_ROWS as usize) {
            let subjects = first as i64 + 1..=(first + SPLIT_ROWS).min(patients) as i64;
            let splits = subjects
                .clone()
                .map(|subject| self.model.split(subject).name());
            let splits: StringArray = splits.map(Some).collect();
            let subjects: Int64Array = subjects.collect();
            let columns: Vec<ArrayRef> = vec![Arc::new(subjects), Arc::new(splits)];
            table.write(columns)?;
        }
        table.finish()
    }
}

/// Relative to the cohort.
fn item_folder(modality: SynthModality, shard: &str) -> String {
    format!("items/{modality}/{shard}")
}

#[cfg(test)]
#[path = "write_tests.rs"]
mod tests;
