//! Text files instead of a cohort: conversations, prompts with responses, sentences with tags,
//! texts with labels.

mod encode;
mod python;
mod rows;
mod template;

use std::collections::BTreeSet;
use std::io::Read;
use std::path::{Path, PathBuf};

use calor_records::Split;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub use encode::DialogueEncoder;
pub use template::ChatTemplate;

use crate::SequenceError;
use crate::cache::{Cache, CacheWriter, Found, SampleRecord};
use crate::labels::{TargetKind, truth_classes};
use crate::options::{Overlength, SequenceOptions};
use crate::prepare::{Phase, Progress, assemble, hexadecimal};
use crate::prepared::{Contents, PrepareReport, Prepared, split_number};
use crate::statistics::ValueStatistics;
use crate::tokenizer::PatientTokenizer;
use encode::{Encoded, tagged_words, whole_text};
use rows::{Format, RawRow, Row, Rows, Wanted};

/// Raised whenever the same row, tokenizer and options give other tokens than before.
const ENCODING: u32 = 1;
/// Rows that are read before they are encoded in parallel.
const ROWS_AT_ONCE: usize = 2048;

/// The files of a task, each with the rows of one split. A file whose name ends in `.jsonl` holds a
/// JSON object a line; any other holds a word and its tag a line and an empty line after each
/// sentence.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TextFiles {
    pub files: Vec<(Split, PathBuf)>,
}

/// What is learned of the rows.
#[derive(Clone, Copy, Debug)]
pub enum TextTask<'a> {
    /// The next token. Rows have `messages`, or `prompt` and `response`, or `text`.
    CausalLm {
        template: Option<&'a ChatTemplate>,
        loss: LossOn,
    },
    /// The class of each word. Rows have `tokens` and `tags`.
    Tokens {
        /// The classes of a model trained before; without them, those of the training rows.
        classes: Option<&'a [String]>,
    },
    /// The class of a text. Rows have `text` and `label`.
    Class {
        classes: Option<&'a [String]>,
        /// Labels are true or false.
        binary: bool,
    },
}

/// Which tokens of an instruction row a language model learns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossOn {
    /// What the assistant says, the end-of-turn token included.
    Response,
    /// Every token but the first.
    All,
}

impl TextTask<'_> {
    fn wanted(&self) -> Wanted {
        match self {
            TextTask::CausalLm { .. } => Wanted::Language,
            TextTask::Tokens { .. } => Wanted::Tags,
            TextTask::Class { .. } => Wanted::Class,
        }
    }

    fn kind(&self) -> TargetKind {
        match self {
            TextTask::CausalLm { .. } | TextTask::Tokens { .. } => TargetKind::Tokens,
            TextTask::Class { .. } => TargetKind::Class,
        }
    }

    fn key(&self) -> String {
        match self {
            TextTask::CausalLm { template, loss } => {
                let template = template.map_or_else(String::new, ChatTemplate::key);
                format!("causal_lm {loss:?} {template}")
            }
            TextTask::Tokens { classes } => format!("tokens {classes:?}"),
            TextTask::Class { classes, binary } => format!("class {binary} {classes:?}"),
        }
    }
}

/// Encodes every row in parallel and leaves tokens and targets in a memory-mapped cache, as
/// [`prepare`](crate::prepare()) does for patients: memory does not grow with the files but for 64
/// bytes a row. A row takes the place of a patient; its number in its file, from 0, that of the
/// subject.
///
/// Rows that nothing is left to learn of (a response that is cut off whole) are left out and counted
/// in [`PrepareReport::samples_without_data`].
///
/// # Errors
/// A row that is not what the task needs, by file and line; a class that is unknown; rows longer
/// than `max_tokens` where that is an error.
pub fn prepare_text(
    files: &TextFiles,
    task: &TextTask<'_>,
    tokenizer: &PatientTokenizer,
    options: &SequenceOptions,
    cache_dir: &Path,
    progress: &dyn Fn(Progress),
) -> Result<Prepared, SequenceError> {
    options.check()?;
    let work = Work::new(files, task, tokenizer, options, progress)?;
    let hash = hexadecimal(&work.key);
    let path = cache_dir.join(format!("{hash}.sequences"));
    let mut rebuilt_because = None;
    match Cache::open(&path, &work.key).map_err(|error| SequenceError::io(&path, error))? {
        Found::Nothing => {}
        Found::Unusable(reason) => rebuilt_because = Some(reason),
        Found::Cache(cache) => match serde_json::from_slice(cache.report()) {
            Ok(contents) => return Ok(assemble(cache, &path, options, contents, None)),
            Err(_) => rebuilt_because = Some("its report cannot be read".to_string()),
        },
    }
    let classes = work.classes()?;

    std::fs::create_dir_all(cache_dir).map_err(|error| SequenceError::io(cache_dir, error))?;
    let failed = |error| SequenceError::io(&path, error);
    let mut writer = CacheWriter::create(&path).map_err(failed)?;
    let mut records = Vec::new();
    let mut targets = Vec::new();
    let (mut left_out, mut overlong) = (0, (0, 0));
    work.rows(&classes, |split, number, encoded, class| {
        let length = encoded.tokens.len();
        if length > options.max_tokens {
            overlong = (overlong.0 + 1, overlong.1.max(length as u64));
        }
        if class.is_none() && !encoded.has_targets() {
            left_out += 1;
            return Ok(());
        }
        let start = writer.push_tokens(&encoded.tokens).map_err(failed)?;
        match class {
            Some(class) => targets.push(class),
            None => {
                writer
                    .push_tokens(bytemuck::cast_slice(&encoded.targets))
                    .map_err(failed)?;
            }
        }
        records.push(SampleRecord {
            start,
            subject_id: number as i64,
            length: length as u32,
            full_length: encoded.full_length as u32,
            rows: 1,
            split: split_number(Some(split)),
            ..SampleRecord::default()
        });
        Ok(())
    })?;
    if overlong.0 > 0 {
        return Err(SequenceError::Overlong {
            samples: overlong.0,
            total: records.len() as u64 + left_out,
            longest: overlong.1,
            max_tokens: options.max_tokens,
        });
    }
    if records.is_empty() {
        return Err(SequenceError::NoRows {
            files: work.names(),
        });
    }
    let contents = Contents {
        report: PrepareReport {
            hash,
            samples_without_data: left_out,
            ..PrepareReport::of(&records)
        },
        classes,
        statistics: ValueStatistics::default(),
    };
    let json = serde_json::to_vec(&contents).expect("the report is plain data");
    let width = usize::from(task.kind() == TargetKind::Class);
    let kind = task.kind().number();
    writer
        .finish(&work.key, &records, kind, width, &targets, &json)
        .map_err(failed)?;
    match Cache::open(&path, &work.key).map_err(failed)? {
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

struct Work<'a> {
    files: &'a TextFiles,
    task: &'a TextTask<'a>,
    tokenizer: &'a PatientTokenizer,
    options: &'a SequenceOptions,
    progress: &'a dyn Fn(Progress),
    key: [u8; 32],
    total_lines: u64,
}

impl<'a> Work<'a> {
    /// Reads every file once, for the key.
    fn new(
        files: &'a TextFiles,
        task: &'a TextTask<'a>,
        tokenizer: &'a PatientTokenizer,
        options: &'a SequenceOptions,
        progress: &'a dyn Fn(Progress),
    ) -> Result<Work<'a>, SequenceError> {
        let mut hash = Sha256::new();
        // Each part after its length, so that no two different inputs read the same.
        let mut part = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        part(format!("text {} {ENCODING}", env!("CARGO_PKG_VERSION")).as_bytes());
        part(&tokenizer.digest());
        part(options.cache_key_json().as_bytes());
        part(task.key().as_bytes());
        let mut total_lines = 0;
        for (split, path) in &files.files {
            let (digest, lines) = digest(path).map_err(|error| SequenceError::io(path, error))?;
            part(&[split_number(Some(*split)) as u8]);
            part(format!("{:?}", Format::of(path)).as_bytes());
            part(&digest);
            total_lines += lines;
        }
        Ok(Work {
            files,
            task,
            tokenizer,
            options,
            progress,
            key: hash.finalize().into(),
            total_lines,
        })
    }

    fn names(&self) -> String {
        let names = self.files.files.iter();
        let names: Vec<String> = names.map(|(_, path)| path.display().to_string()).collect();
        names.join(", ")
    }

    /// The classes given, or those of the training rows in alphabetical order (numbers by size).
    fn classes(&self) -> Result<Vec<String>, SequenceError> {
        let given = match *self.task {
            TextTask::CausalLm { .. } => return Ok(Vec::new()),
            TextTask::Class { binary: true, .. } => return Ok(truth_classes()),
            TextTask::Tokens { classes } | TextTask::Class { classes, .. } => classes,
        };
        if let Some(given) = given {
            return Ok(given.to_vec());
        }
        let mut found: BTreeSet<String> = BTreeSet::new();
        let read = |_, row| Ok(row);
        self.mapped(Phase::Statistics, &[Split::Train], read, |_, _, row| {
            match row {
                Row::Labelled { label, .. } => found.extend([label]),
                Row::Tagged { tags, .. } => found.extend(tags),
                _ => {}
            }
            Ok(())
        })?;
        let mut classes: Vec<String> = found.into_iter().collect();
        if classes.iter().all(|class| class.parse::<i64>().is_ok()) {
            classes.sort_by_key(|class| class.parse::<i64>().unwrap_or_default());
        }
        Ok(classes)
    }

    /// Encodes all rows in parallel, and takes them in order with their class, if a row has one.
    fn rows(
        &self,
        classes: &[String],
        mut take: impl FnMut(Split, usize, Encoded, Option<u32>) -> Result<(), SequenceError>,
    ) -> Result<(), SequenceError> {
        let dialogue = match self.task {
            TextTask::CausalLm { template, .. } => {
                Some(DialogueEncoder::new(self.tokenizer, *template))
            }
            _ => None,
        };
        let class = |name: &str| -> Result<u32, String> {
            match classes.iter().position(|class| class == name) {
                Some(class) => Ok(class as u32),
                None => Err(format!(
                    "has a class that is not one of the {} of the training rows",
                    classes.len()
                )),
            }
        };
        // Not all of `self` goes to other threads.
        let (tokenizer, options, task) = (self.tokenizer, self.options, self.task);
        let (prefix, suffix) = (tokenizer.prefix().len(), tokenizer.suffix().len());
        let encode = |_: Split, row: Row| -> Result<(Encoded, Option<u32>), String> {
            let told = |error: SequenceError| error.to_string();
            Ok(match (&row, task, &dialogue) {
                (Row::Labelled { text, label }, ..) => {
                    let mut encoded = whole_text(text, tokenizer).map_err(told)?;
                    encoded.cut(options, prefix, suffix);
                    (encoded, Some(class(label)?))
                }
                (Row::Tagged { words, tags }, ..) => {
                    let numbers: Vec<i32> = tags
                        .iter()
                        .map(|tag| class(tag).map(|class| class as i32))
                        .collect::<Result<_, _>>()?;
                    let mut encoded = tagged_words(words, &numbers, tokenizer).map_err(told)?;
                    encoded.cut(options, prefix, suffix);
                    (encoded, None)
                }
                (row, TextTask::CausalLm { loss, .. }, Some(dialogue)) => {
                    let mut encoded = dialogue.row(row, *loss)?;
                    encoded.cut(options, prefix, 0);
                    encoded.drop_first_target();
                    (encoded, None)
                }
                _ => unreachable!("rows are read for their task"),
            })
        };
        self.mapped(
            Phase::Sequences,
            &Split::ALL,
            encode,
            |split, number, (encoded, class)| take(split, number, encoded, class),
        )
    }

    fn mapped<T: Send>(
        &self,
        phase: Phase,
        splits: &[Split],
        map: impl Fn(Split, Row) -> Result<T, String> + Sync,
        mut take: impl FnMut(Split, usize, T) -> Result<(), SequenceError>,
    ) -> Result<(), SequenceError> {
        let wanted = self.task.wanted();
        let mut lines_before = 0;
        for (split, path) in &self.files.files {
            if !splits.contains(split) {
                continue;
            }
            let format = Format::of(path);
            if format == Format::Conll && wanted != Wanted::Tags {
                return Err(SequenceError::Row {
                    path: path.clone(),
                    line: 1,
                    problem: "is not read: a file of this task is JSON lines, and its name ends \
                              in .jsonl"
                        .to_owned(),
                });
            }
            let mut reader = Rows::open(path, format)?;
            let (mut number, mut last_line) = (0, 0);
            loop {
                (self.progress)(Progress {
                    phase,
                    rows: lines_before + last_line,
                    total_rows: self.total_lines,
                });
                let raw = reader.some(ROWS_AT_ONCE)?;
                if raw.is_empty() {
                    break;
                }
                let read = |row: &RawRow| {
                    row.parse(format, wanted)
                        .and_then(|row| map(*split, row))
                        .map_err(|problem| SequenceError::Row {
                            path: path.clone(),
                            line: row.line,
                            problem,
                        })
                };
                let results: Vec<Result<T, SequenceError>> = raw.par_iter().map(read).collect();
                last_line = raw.last().map_or(0, |row| row.line as u64);
                for result in results {
                    take(*split, number, result?)?;
                    number += 1;
                }
            }
            lines_before += last_line;
        }
        Ok(())
    }
}

/// SHA-256 of a file and the number of its lines.
fn digest(path: &Path) -> std::io::Result<([u8; 32], u64)> {
    let mut file = std::fs::File::open(path)?;
    let mut hash = Sha256::new();
    let mut piece = vec![0; 1 << 18];
    let mut lines = 0;
    loop {
        let length = file.read(&mut piece)?;
        if length == 0 {
            return Ok((hash.finalize().into(), lines));
        }
        hash.update(&piece[..length]);
        lines += piece[..length]
            .iter()
            .filter(|&&byte| byte == b'\n')
            .count() as u64;
    }
}

impl TextFiles {
    /// Whether rows that are too long can be cut as the options say.
    ///
    /// # Errors
    /// An option that is for patients alone.
    pub fn check(options: &SequenceOptions) -> Result<(), SequenceError> {
        match options.overlength {
            Overlength::DropOldestEvents => Err(SequenceError::Option {
                key: "overlength",
                problem: "is \"drop_oldest_events\", and a text has no events: set \"cut_end\", \
                          \"cut_start\" or \"error\""
                    .to_owned(),
            }),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
#[path = "text_tests.rs"]
mod tests;
