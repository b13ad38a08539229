use std::path::Path;
use std::sync::Mutex;

use calor_records::{Chunk, Cohort, Split};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::SequenceError;
use crate::cache::{Cache, CacheWriter, Found, ItemRecord, NO_TIME, SampleRecord};
use crate::fit::{Fitted, fit};
use crate::labels::{TargetKind, TaskLabels};
use crate::options::{NumberStyle, Overlength, Repeat, SequenceOptions};
use crate::prepared::{Contents, ItemCounts, PrepareReport, Prepared, split_number};
use crate::render::Renderer;
use crate::statistics::{StatisticsBuilder, ValueStatistics};
use crate::stream::{DraftContent, DraftItem, DraftItems};
use crate::tokenizer::{PatientTokenizer, WordCache};

/// Raised whenever the same patient, tokenizer and options give other tokens than before, so that
/// caches written earlier are not taken for current ones.
const RENDERING: u32 = 3;

/// Rows that one thread works through at a time. Large, since the rows of a Parquet row group
/// before those that are wanted cost time as well.
const CHUNK_ROWS: u64 = 131_072;

/// How far a preparation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    pub phase: Phase,
    /// Rows of the cohort gone through in this phase, and their number.
    pub rows: u64,
    pub total_rows: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Values of training patients are counted for their quantiles.
    Statistics,
    /// Patients become tokens.
    Sequences,
}

/// Renders, tokenises and truncates every labelled sample in parallel, writes the tokens to a file
/// in `cache_dir` as they come, and returns that file memory-mapped. The file's name is a SHA-256
/// over everything that shaped it (cohort, splits, labels, tokenizer, options, statistics, this
/// code), and a complete file of that name is taken as it is; a damaged one is written anew.
///
/// Quantiles come from the rows of training patients visible at their prediction times, or from
/// `statistics` where a model was trained with those. What is held in memory does not grow with
/// the rows of the cohort: 64 bytes and the target a sample, 32 bytes a modality item.
///
/// # Errors
/// What is wrong with a shard, an option or the labels; samples longer than `max_tokens` where
/// that is an error.
pub fn prepare(
    cohort: &Cohort,
    labels: &TaskLabels,
    tokenizer: &PatientTokenizer,
    options: &SequenceOptions,
    statistics: Option<&ValueStatistics>,
    cache_dir: &Path,
    progress: &dyn Fn(Progress),
) -> Result<Prepared, SequenceError> {
    options.check()?;
    if let Some(given) = statistics
        && uses_statistics(options)
        && given.levels != options.quantile_levels
    {
        return Err(SequenceError::Option {
            key: "quantile_levels",
            problem: "differ from those of the statistics that come with the model".to_string(),
        });
    }
    let splits: Vec<Option<Split>> = labels
        .keys()
        .iter()
        .map(|(subject_id, _)| cohort.splits().split_of(*subject_id))
        .collect();
    let key = cache_key(cohort, labels, &splits, tokenizer, options, statistics)?;
    let hash = hexadecimal(&key);
    let path = cache_dir.join(format!("{hash}.sequences"));
    let mut rebuilt_because = None;
    match Cache::open(&path, &key).map_err(|error| SequenceError::io(&path, error))? {
        Found::Nothing => {}
        Found::Unusable(reason) => rebuilt_because = Some(reason),
        Found::Cache(cache) => match serde_json::from_slice(cache.report()) {
            Ok(contents) => return Ok(assemble(cache, &path, options, contents, None)),
            Err(_) => rebuilt_because = Some("its report cannot be read".to_string()),
        },
    }

    let work = Work {
        cohort,
        labels,
        options,
        chunks: cohort.chunks(CHUNK_ROWS),
        progress,
    };
    let computed;
    let statistics = match statistics {
        Some(given) => given,
        None if uses_statistics(options) => {
            computed = work.statistics(&splits)?;
            &computed
        }
        None => {
            computed = ValueStatistics::default();
            &computed
        }
    };

    std::fs::create_dir_all(cache_dir).map_err(|error| SequenceError::io(cache_dir, error))?;
    let failed = |error| SequenceError::io(&path, error);
    let mut writer = CacheWriter::create(&path).map_err(failed)?;
    let mut records: Vec<Option<SampleRecord>> = vec![None; labels.len()];
    let mut overlong = (0, 0);
    let mut item_counts = vec![ItemCounts::default(); options.streams.len()];
    work.sequences(tokenizer, statistics, |sample, fitted, items| {
        let length = fitted.tokens.len();
        if length > options.max_tokens {
            debug_assert_eq!(options.overlength, Overlength::Error);
            overlong = (overlong.0 + 1, overlong.1.max(length as u64));
        }
        let (subject_id, prediction_time_us) = labels.keys()[sample];
        let items_start = writer.item_count();
        let start = writer.push_tokens(&fitted.tokens).map_err(failed)?;
        writer
            .push_tokens(bytemuck::cast_slice(&fitted.targets))
            .map_err(failed)?;
        for item in &items.items {
            item_counts[item.stream].count(item);
            let (record, content) = item_record(item, statistics);
            writer.push_item(record, &content).map_err(failed)?;
        }
        records[sample] = Some(SampleRecord {
            items_start,
            items: items.items.len() as u32,
            dropped_items: items.dropped,
            start,
            subject_id,
            prediction_time_us,
            length: length as u32,
            full_length: fitted.full_length,
            rows: fitted.rows,
            dropped_rows: fitted.dropped_rows,
            oversized_rows: fitted.oversized_rows,
            split: split_number(splits[sample]),
        });
        Ok(())
    })?;
    if overlong.0 > 0 {
        return Err(SequenceError::Overlong {
            samples: overlong.0,
            total: labels.len() as u64,
            longest: overlong.1,
            max_tokens: options.max_tokens,
        });
    }

    let targets: Vec<u32> = (0..labels.len())
        .filter(|&sample| records[sample].is_some())
        .flat_map(|sample| labels.bits_of(sample))
        .copied()
        .collect();
    let records: Vec<SampleRecord> = records.into_iter().flatten().collect();
    if records.is_empty() {
        return Err(SequenceError::NoPatients {
            task: labels.task().to_string(),
            labelled: labels.len(),
        });
    }
    let contents = Contents {
        report: PrepareReport {
            hash,
            samples_without_data: (labels.len() - records.len()) as u64,
            codes_with_quantiles: statistics.codes.len() as u64,
            modalities: options
                .streams
                .iter()
                .map(|stream| stream.modality.name().to_string())
                .zip(item_counts)
                .collect(),
            ..PrepareReport::of(&records)
        },
        classes: labels.classes().to_vec(),
        statistics: statistics.clone(),
    };
    let json = serde_json::to_vec(&contents).expect("the report is plain data");
    writer
        .finish(
            &key,
            &records,
            labels.kind().number(),
            labels.width(),
            &targets,
            &json,
        )
        .map_err(failed)?;
    match Cache::open(&path, &key).map_err(failed)? {
        Found::Cache(cache) => {
            let mut prepared = assemble(cache, &path, options, contents, rebuilt_because);
            prepared.cache_hit = false;
            Ok(prepared)
        }
        Found::Nothing | Found::Unusable(_) => Err(failed(std::io::Error::other(
            "the cache just written cannot be read back; is the disk full or failing?",
        ))),
    }
}

pub(crate) fn assemble(
    cache: Cache,
    path: &Path,
    options: &SequenceOptions,
    contents: Contents,
    rebuilt_because: Option<String>,
) -> Prepared {
    let kind = TargetKind::ALL[cache.target_kind() as usize];
    Prepared {
        cache,
        path: path.to_path_buf(),
        kind,
        streams: options.streams.clone(),
        contents,
        cache_hit: true,
        rebuilt_because,
    }
}

/// Quantile words need quantiles, directions the interquartile range.
fn uses_statistics(options: &SequenceOptions) -> bool {
    let words = options.numbers != NumberStyle::Value && !options.quantile_levels.is_empty();
    words || options.repeat == Repeat::Latest || !options.streams.is_empty()
}

/// What the cache keeps of an item.
fn item_record(item: &DraftItem, statistics: &ValueStatistics) -> (ItemRecord, Vec<u8>) {
    let content = match &item.content {
        DraftContent::Missing => Vec::new(),
        DraftContent::File(path) => path.as_bytes().to_vec(),
        DraftContent::Series(values) => bytemuck::cast_slice(values).to_vec(),
    };
    // The sites are sorted.
    let site = item.site.as_deref().and_then(|site| {
        statistics
            .sites
            .binary_search_by(|known| known.as_str().cmp(site))
            .ok()
    });
    let record = ItemRecord {
        time_us: item.time_us.unwrap_or(NO_TIME),
        stream: item.stream as u32,
        site: site.map_or(0, |number| number as u32 + 1),
        ..ItemRecord::default()
    };
    (record, content)
}

fn cache_key(
    cohort: &Cohort,
    labels: &TaskLabels,
    splits: &[Option<Split>],
    tokenizer: &PatientTokenizer,
    options: &SequenceOptions,
    statistics: Option<&ValueStatistics>,
) -> Result<[u8; 32], SequenceError> {
    let mut hash = Sha256::new();
    // Each part after its length, so that no two different inputs read the same.
    let mut part = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    part(format!("{} {RENDERING}", env!("CARGO_PKG_VERSION")).as_bytes());
    part(cohort.fingerprint()?.digest().as_bytes());
    part(&tokenizer.digest());
    part(options.cache_key_json().as_bytes());
    part(&statistics.map_or([0; 32], ValueStatistics::digest));
    part(&[labels.kind().number() as u8, labels.width() as u8]);
    if let Some(notes) = labels.learned_notes() {
        part(&serde_json::to_vec(notes).expect("notes are plain data"));
    }
    for class in labels.classes() {
        part(class.as_bytes());
    }
    for (sample, (subject_id, prediction_time_us)) in labels.keys().iter().enumerate() {
        hash.update(subject_id.to_le_bytes());
        hash.update(prediction_time_us.to_le_bytes());
        hash.update(split_number(splits[sample]).to_le_bytes());
        for bits in labels.bits_of(sample) {
            hash.update(bits.to_le_bytes());
        }
    }
    Ok(hash.finalize().into())
}

pub(crate) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

struct Work<'a> {
    cohort: &'a Cohort,
    labels: &'a TaskLabels,
    options: &'a SequenceOptions,
    chunks: Vec<Chunk>,
    progress: &'a dyn Fn(Progress),
}

impl Work<'_> {
    fn statistics(&self, splits: &[Option<Split>]) -> Result<ValueStatistics, SequenceError> {
        let is_training = |subject_id| {
            let samples = self.labels.of_subject(subject_id);
            !samples.is_empty() && splits[samples.start] == Some(Split::Train)
        };
        if !splits.contains(&Some(Split::Train)) {
            return Err(SequenceError::NoTrainingPatients);
        }
        let mut total = StatisticsBuilder::default();
        self.in_order(
            Phase::Statistics,
            |chunk| {
                let mut part = StatisticsBuilder::default();
                for patient in self.cohort.read_chunk(chunk, &is_training)? {
                    let patient = patient?;
                    let samples = self.labels.of_subject(patient.subject_id);
                    let (_, latest) = self.labels.keys()[samples.end - 1];
                    part.add(&patient, latest, self.options);
                }
                Ok(part)
            },
            |part| {
                total.merge(part);
                Ok(())
            },
        )?;
        Ok(total.finish(self.options))
    }

    fn sequences(
        &self,
        tokenizer: &PatientTokenizer,
        statistics: &ValueStatistics,
        mut take: impl FnMut(usize, Fitted, DraftItems) -> Result<(), SequenceError>,
    ) -> Result<(), SequenceError> {
        // A thread takes the caches another one has put back, and makes new ones if there are none.
        let idle: Mutex<Vec<(Renderer<'_>, WordCache)>> = Mutex::default();
        let idle_caches = || {
            idle.lock()
                .expect("no thread panics while it holds the caches")
        };
        let is_labelled = |subject_id| !self.labels.of_subject(subject_id).is_empty();
        self.in_order(
            Phase::Sequences,
            |chunk| {
                let (mut renderer, mut words) = idle_caches().pop().unwrap_or_else(|| {
                    (
                        Renderer::new(self.cohort.codes(), statistics, self.options),
                        WordCache::default(),
                    )
                });
                let mut samples = Vec::new();
                for patient in self.cohort.read_chunk(chunk, &is_labelled)? {
                    let patient = patient?;
                    for sample in self.labels.of_subject(patient.subject_id) {
                        let (_, prediction_time_us) = self.labels.keys()[sample];
                        let rendered = renderer.render(&patient, prediction_time_us);
                        let fitted = match self.labels.learned_notes() {
                            None => fit(&rendered, tokenizer, self.options, &mut words)?,
                            Some(notes) => notes.fit(
                                &patient,
                                prediction_time_us,
                                &rendered,
                                tokenizer,
                                self.options,
                                &mut words,
                            )?,
                        };
                        samples.push((sample, fitted, rendered.items));
                    }
                }
                idle_caches().push((renderer, words));
                Ok(samples)
            },
            |samples| {
                samples
                    .into_iter()
                    .try_for_each(|(sample, fitted, items)| take(sample, fitted, items))
            },
        )
    }

    /// Maps chunks in parallel, a few for every thread at a time, and takes the results in the
    /// order of the chunks, so that the outcome does not depend on the number of threads.
    fn in_order<T: Send>(
        &self,
        phase: Phase,
        map: impl Fn(&Chunk) -> Result<T, SequenceError> + Sync,
        mut take: impl FnMut(T) -> Result<(), SequenceError>,
    ) -> Result<(), SequenceError> {
        let total_rows = self.cohort.row_count();
        let mut rows = 0;
        let map = &map;
        for window in self.chunks.chunks(2 * rayon::current_num_threads()) {
            (self.progress)(Progress {
                phase,
                rows,
                total_rows,
            });
            let results: Vec<Result<T, SequenceError>> = window.par_iter().map(map).collect();
            for result in results {
                take(result?)?;
            }
            rows += window.iter().map(|chunk| chunk.rows).sum::<u64>();
        }
        (self.progress)(Progress {
            phase,
            rows,
            total_rows,
        });
        Ok(())
    }
}

#[cfg(test)]
#[path = "prepare_tests.rs"]
mod tests;
