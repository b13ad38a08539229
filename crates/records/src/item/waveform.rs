//! Dense signals: WFDB records, CSV files and Parquet files, at one rate.
//!
//! A source gives each lead in physical units at its own rate; here the leads are cut to the
//! recipe's limit, resampled and put side by side.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::resample::{MAX_RATE_FACTOR, resample};
use super::{Decoded, wfdb};
use crate::RecordsError;

mod table;

/// How a waveform is read, and at what rate it is handed on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WaveformOptions {
    /// Samples a second that every lead is brought to.
    pub rate_hz: f64,
    /// What lies later than this is cut off, and how much that was is told.
    pub max_seconds: f64,
    /// The leads, or columns of a table, by name and in this order. Left out: all of them, in the
    /// file's order.
    pub leads: Option<Vec<String>>,
    /// Rows a second of a table without a time column; WFDB headers know their own rate.
    pub source_rate_hz: Option<f64>,
    /// The column of a table that holds the time: seconds from any origin, or a timestamp.
    pub time_column: Option<String>,
}

impl Default for WaveformOptions {
    fn default() -> Self {
        Self {
            rate_hz: 250.0,
            max_seconds: 60.0,
            leads: None,
            source_rate_hz: None,
            time_column: None,
        }
    }
}

impl WaveformOptions {
    /// What is wrong with the options whatever the file, if anything is.
    pub fn problem(&self) -> Option<String> {
        let positive = |value: f64| value.is_finite() && value > 0.0;
        if !positive(self.rate_hz) {
            return Some("`rate_hz` must be a positive number".into());
        }
        if !positive(self.max_seconds) {
            return Some("`max_seconds` must be a positive number".into());
        }
        if whole_samples(self.max_seconds, self.rate_hz) > MAX_SAMPLES {
            return Some(format!(
                "`max_seconds` at `rate_hz` is more than {MAX_SAMPLES} samples"
            ));
        }
        if self
            .source_rate_hz
            .is_some_and(|rate_hz| !positive(rate_hz))
        {
            return Some("`source_rate_hz` must be a positive number".into());
        }
        match self.leads.as_deref() {
            Some([]) => Some("`leads` must name at least one lead".into()),
            Some(leads) => leads
                .iter()
                .enumerate()
                .find(|(index, lead)| leads[..*index].contains(lead))
                .map(|(_, lead)| format!("`leads` names `{lead}` twice")),
            None => None,
        }
    }
}

/// Samples of an item, over all leads; more than this is a mistake or an attack.
pub(super) const MAX_SAMPLES: u64 = 1 << 27;

/// Largest value that 32 bits hold.
const MAX_VALUE: f64 = f32::MAX as f64;

/// A lead in physical units at its source's rate; NaN = missing.
pub(super) struct Lead {
    pub rate_hz: f64,
    pub values: Vec<f64>,
}

/// What a source gives: the wanted leads, up to the limit.
pub(super) struct Recording {
    pub leads: Vec<Lead>,
    /// Seconds that were kept, and seconds that there are.
    pub kept_s: f64,
    pub length_s: f64,
}

/// Reads the waveform at `path`: `[leads, samples]` in the source's physical units, `rate_hz`
/// samples a second, NaN where a value is missing, at most `max_seconds` of it.
///
/// A WFDB record is named by its header, with or without `.hea`; a table by its `.csv`, `.tsv`,
/// `.txt` or Parquet file. `RecordsError::Item` for a file that is missing, damaged or of another
/// kind, for a lead or column that is not there, and for an item without any information: all
/// leads constant or missing throughout.
pub fn decode_waveform(path: &Path, options: &WaveformOptions) -> Result<Decoded, RecordsError> {
    if let Some(problem) = options.problem() {
        return Err(item_error(path, problem, "correct the waveform options"));
    }
    let recording = match source(path)? {
        Source::Wfdb(header) => wfdb::read(&header, options)?,
        Source::Text => table::read_text(path, options)?,
        Source::Parquet => table::read_parquet(path, options)?,
    };
    finish(path, recording, options)
}

enum Source {
    /// The record's header.
    Wfdb(PathBuf),
    Text,
    Parquet,
}

/// What kind of file it is, by its name and first bytes.
fn source(path: &Path) -> Result<Source, RecordsError> {
    let extension = path
        .extension()
        .map(|extension| extension.to_string_lossy().to_ascii_lowercase())
        .unwrap_or_default();
    if !path.is_file() {
        let mut header = path.as_os_str().to_os_string();
        header.push(".hea");
        let header = PathBuf::from(header);
        return match header.is_file() {
            true => Ok(Source::Wfdb(header)),
            false => Err(unreadable(path, &io::ErrorKind::NotFound.into())),
        };
    }
    let mut first = Vec::new();
    File::open(path)
        .and_then(|file| file.take(4).read_to_end(&mut first))
        .map_err(|source| unreadable(path, &source))?;
    match extension.as_str() {
        _ if first == b"PAR1" => Ok(Source::Parquet),
        "hea" => Ok(Source::Wfdb(path.to_path_buf())),
        "csv" | "tsv" | "tab" | "txt" => Ok(Source::Text),
        "parquet" => Err(item_error(path, "not a Parquet file", "write it again")),
        _ => Err(item_error(
            path,
            "not a kind of waveform that is read here",
            "give a WFDB header (.hea), a .csv or a .parquet file",
        )),
    }
}

/// Brings the leads to one rate and length.
fn finish(
    path: &Path,
    recording: Recording,
    options: &WaveformOptions,
) -> Result<Decoded, RecordsError> {
    let Recording {
        leads,
        kept_s,
        length_s,
    } = recording;
    check_informative(path, &leads)?;
    let limit = whole_samples(options.max_seconds, options.rate_hz);
    let expected = whole_samples(kept_s, options.rate_hz).min(limit);
    if expected.saturating_mul(leads.len() as u64) > MAX_SAMPLES {
        return Err(item_error(
            path,
            format!("more than {MAX_SAMPLES} samples at `rate_hz`"),
            "lower `max_seconds` or `rate_hz`, or name fewer `leads`",
        ));
    }
    let mut resampled = Vec::with_capacity(leads.len());
    for lead in leads {
        let Some(values) = resample(&lead.values, lead.rate_hz, options.rate_hz) else {
            return Err(item_error(
                path,
                format!(
                    "{} samples a second cannot become {}: the rates differ by more than {}",
                    lead.rate_hz, options.rate_hz, MAX_RATE_FACTOR
                ),
                "set a `rate_hz` nearer to it",
            ));
        };
        resampled.push(values);
    }
    // Leads last equally long, but for those that are nowhere and have no values.
    let lengths = resampled.iter().map(Vec::len).filter(|&length| length > 0);
    let samples = lengths.min().unwrap_or(0).min(limit as usize);
    let mut values = Vec::with_capacity(resampled.len() * samples);
    for lead in &resampled {
        let end = values.len() + samples;
        values.extend(lead.iter().take(samples).map(|&value| value as f32));
        values.resize(end, f32::NAN);
    }
    if values.iter().any(|value| value.is_infinite()) {
        return Err(too_large(path));
    }
    if values.iter().all(|value| value.is_nan()) {
        return Err(missing_throughout(path));
    }
    Ok(Decoded {
        shape: vec![resampled.len(), samples],
        values,
        cut_s: (length_s - options.max_seconds).max(0.0),
        layout: 0,
    })
}

/// A flat line is what a loose electrode gives; one among others is left to the model.
fn check_informative(path: &Path, leads: &[Lead]) -> Result<(), RecordsError> {
    let (mut any, mut varies) = (false, false);
    for lead in leads {
        if lead.values.iter().any(|value| value.abs() > MAX_VALUE) {
            return Err(too_large(path));
        }
        let mut values = lead.values.iter().filter(|value| !value.is_nan());
        if let Some(first) = values.next() {
            any = true;
            varies |= values.any(|value| value != first);
        }
    }
    match (any, varies) {
        (false, _) => Err(missing_throughout(path)),
        (true, false) => Err(item_error(
            path,
            "every lead is constant",
            "correct the file or take it out of the cohort",
        )),
        (true, true) => Ok(()),
    }
}

fn too_large(path: &Path) -> RecordsError {
    item_error(
        path,
        "values too large for 32 bits",
        "correct the gain or the unit",
    )
}

fn missing_throughout(path: &Path) -> RecordsError {
    item_error(
        path,
        "there is no value in it",
        "correct the file or take it out of the cohort",
    )
}

/// The places of the leads that the options name, among the names of the file.
pub(super) fn choose(
    path: &Path,
    names: &[&str],
    options: &WaveformOptions,
) -> Result<Vec<usize>, RecordsError> {
    let Some(leads) = &options.leads else {
        return match names.len() {
            0 => Err(item_error(path, "there are no leads", "get the file again")),
            count => Ok((0..count).collect()),
        };
    };
    leads
        .iter()
        .map(|lead| {
            names.iter().position(|name| name == lead).ok_or_else(|| {
                const SHOWN: usize = 20;
                let mut found: Vec<String> = names
                    .iter()
                    .take(SHOWN)
                    .map(|name| format!("`{name}`"))
                    .collect();
                if names.len() > SHOWN {
                    found.push(format!("and {} more", names.len() - SHOWN));
                }
                item_error(
                    path,
                    format!("there is no lead `{lead}`, only {}", found.join(", ")),
                    "correct `leads`",
                )
            })
        })
        .collect()
}

/// How many samples so many seconds need, at least one. A rounding error of the product adds none.
pub(super) fn whole_samples(seconds: f64, rate_hz: f64) -> u64 {
    // `as` saturates.
    ((seconds * rate_hz - 1e-6).ceil() as u64).max(1)
}

pub(super) fn item_error(
    path: &Path,
    problem: impl Into<String>,
    hint: &'static str,
) -> RecordsError {
    RecordsError::Item {
        path: path.to_path_buf(),
        problem: problem.into(),
        hint,
    }
}

/// A file that cannot be opened or read.
pub(super) fn unreadable(path: &Path, source: &io::Error) -> RecordsError {
    match source.kind() {
        io::ErrorKind::NotFound => item_error(
            path,
            "there is no such file",
            "put it there or correct the path in the cohort",
        ),
        _ => item_error(
            path,
            format!("cannot be read: {source}"),
            "look at the file and its permissions",
        ),
    }
}

#[cfg(test)]
mod tests;
