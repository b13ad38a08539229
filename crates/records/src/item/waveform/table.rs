//! Signals in tables: a row a moment, a column a lead.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use arrow_array::{Array, RecordBatch};
use arrow_schema::{DataType, TimeUnit};

use super::{
    Lead, MAX_SAMPLES, Recording, WaveformOptions, choose, item_error, unreadable, whole_samples,
};
use crate::RecordsError;
use crate::numbers::numbers;
use crate::table::{Decode, Table, type_name};

/// Rows of Parquet decoded at a time.
const BATCH_ROWS: usize = 1 << 14;
/// Bytes of a text file that its separator is guessed from.
const HEADING_BYTES: usize = 1 << 16;

const REWRITE_HINT: &str = "write the file again";
const NUMBER_HINT: &str = "correct the value, or name other columns in `leads`";

/// Reads comma-, semicolon-, tab- or bar-separated text with a row of names. Empty fields and
/// those that say that a value is missing (`NA`, `NaN`, `null`, …) are missing values.
pub(super) fn read_text(path: &Path, options: &WaveformOptions) -> Result<Recording, RecordsError> {
    let file = File::open(path).map_err(|source| unreadable(path, &source))?;
    let mut reader = BufReader::with_capacity(HEADING_BYTES, file);
    let delimiter = delimiter(&mut reader).map_err(|source| unreadable(path, &source))?;
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(delimiter)
        .trim(csv::Trim::All)
        .from_reader(reader);
    let heading = reader
        .byte_headers()
        .map_err(|error| text_error(path, &error))?;
    let names: Vec<String> = heading
        .iter()
        .enumerate()
        .map(|(index, name)| {
            let name = String::from_utf8_lossy(name);
            match index {
                0 => name.trim_start_matches('\u{feff}').trim().to_string(),
                _ => name.into_owned(),
            }
        })
        .collect();
    if names.iter().all(|name| name.is_empty()) {
        return Err(item_error(path, "the file is empty", REWRITE_HINT));
    }
    if names.iter().all(|name| name.parse::<f64>().is_ok()) {
        return Err(item_error(
            path,
            "the first row holds numbers, not the names of columns",
            "write a row of names before it",
        ));
    }
    let columns = Columns::choose(path, &names, options)?;
    let mut rows = Rows::new(path, &columns, options)?;
    let mut record = csv::ByteRecord::new();
    while reader
        .read_byte_record(&mut record)
        .map_err(|error| text_error(path, &error))?
    {
        let row = rows.seen;
        let field = |column: usize| {
            number(record.get(column).unwrap_or_default()).ok_or_else(|| {
                item_error(
                    path,
                    format!(
                        "column `{}` holds something other than a number in row {row}",
                        names[column]
                    ),
                    NUMBER_HINT,
                )
            })
        };
        let time_s = columns.time.map(field).transpose()?;
        if rows.wants(time_s)? {
            let values = columns
                .leads
                .iter()
                .map(|&column| field(column))
                .collect::<Result<Vec<_>, _>>()?;
            rows.push(&values);
        }
    }
    rows.finish()
}

/// Reads numeric columns of a Parquet file; null is missing.
pub(super) fn read_parquet(
    path: &Path,
    options: &WaveformOptions,
) -> Result<Recording, RecordsError> {
    let table = Table::open(path).map_err(|error| parquet_error(path, error))?;
    let names: Vec<String> = table
        .fields()
        .iter()
        .map(|field| field.name().clone())
        .collect();
    let columns = Columns::choose(path, &names, options)?;
    for &column in columns.leads.iter().chain(&columns.time) {
        let found = table.fields()[column].data_type();
        let timestamp = matches!(found, DataType::Timestamp(..)) && columns.time == Some(column);
        if !found.is_numeric() && !timestamp {
            return Err(item_error(
                path,
                format!("column `{}` is {}", names[column], type_name(found)),
                "cast it to numbers, or name other columns in `leads`",
            ));
        }
    }
    let wanted: Vec<(&str, Decode)> = columns
        .leads
        .iter()
        .chain(&columns.time)
        .map(|&column| (names[column].as_str(), Decode::Plain))
        .collect();
    let mut rows = Rows::new(path, &columns, options)?;
    let batches = table
        .batches(&wanted, None, BATCH_ROWS, 0)
        .map_err(|error| parquet_error(path, error))?;
    for batch in batches {
        let batch = batch.map_err(|error| parquet_error(path, error))?;
        let leads = columns
            .leads
            .iter()
            .map(|&column| column_values(path, &batch, &names[column]))
            .collect::<Result<Vec<_>, _>>()?;
        let times = columns
            .time
            .map(|column| column_values(path, &batch, &names[column]))
            .transpose()?;
        let mut values = vec![0.0; leads.len()];
        for row in 0..batch.num_rows() {
            if rows.wants(times.as_ref().map(|times| times[row]))? {
                for (value, lead) in values.iter_mut().zip(&leads) {
                    *value = lead[row];
                }
                if values.iter().any(|value| value.is_infinite()) {
                    return Err(item_error(
                        path,
                        format!("a value of row {} is infinite", rows.seen - 1),
                        NUMBER_HINT,
                    ));
                }
                rows.push(&values);
            }
        }
    }
    rows.finish()
}

/// The columns that are read, by their place.
struct Columns {
    leads: Vec<usize>,
    time: Option<usize>,
}

impl Columns {
    fn choose(
        path: &Path,
        names: &[String],
        options: &WaveformOptions,
    ) -> Result<Columns, RecordsError> {
        let time = match &options.time_column {
            Some(wanted) => Some(names.iter().position(|name| name == wanted).ok_or_else(
                || {
                    item_error(
                        path,
                        format!("there is no column `{wanted}`"),
                        "correct `time_column`",
                    )
                },
            )?),
            None => None,
        };
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut leads = choose(path, &names, options)?;
        if options.leads.is_none() {
            leads.retain(|&lead| Some(lead) != time);
        }
        if leads.is_empty() {
            return Err(item_error(
                path,
                "there is no column beside the time",
                REWRITE_HINT,
            ));
        }
        Ok(Columns { leads, time })
    }
}

/// Rows as they come in, up to the limit.
struct Rows<'a> {
    path: &'a Path,
    max_seconds: f64,
    rate_hz: Option<f64>,
    /// Rows to keep where there is no time column.
    limit: u64,
    /// The value of every lead, row after row.
    values: Vec<Vec<f64>>,
    /// Seconds since the first row, of the rows kept.
    times_s: Vec<f64>,
    first_s: f64,
    last_s: f64,
    timed: bool,
    seen: u64,
}

impl<'a> Rows<'a> {
    fn new(
        path: &'a Path,
        columns: &Columns,
        options: &WaveformOptions,
    ) -> Result<Self, RecordsError> {
        let limit = match (options.source_rate_hz, columns.time) {
            (Some(rate_hz), _) => whole_samples(options.max_seconds, rate_hz),
            (None, Some(_)) => u64::MAX,
            (None, None) => {
                return Err(item_error(
                    path,
                    "a table does not say how many rows a second it has",
                    "set `source_rate_hz` or `time_column`",
                ));
            }
        };
        Ok(Self {
            path,
            max_seconds: options.max_seconds,
            rate_hz: options.source_rate_hz,
            limit,
            values: vec![Vec::new(); columns.leads.len()],
            times_s: Vec::new(),
            first_s: 0.0,
            last_s: f64::NEG_INFINITY,
            timed: columns.time.is_some(),
            seen: 0,
        })
    }

    /// Counts a row; whether its values are to be pushed.
    fn wants(&mut self, time_s: Option<f64>) -> Result<bool, RecordsError> {
        let row = self.seen;
        self.seen += 1;
        let kept = match time_s {
            None => row < self.limit,
            Some(time_s) => {
                if !time_s.is_finite() {
                    return Err(item_error(
                        self.path,
                        format!("there is no time in row {row}"),
                        "give every row its time",
                    ));
                }
                if row == 0 {
                    self.first_s = time_s;
                }
                if time_s <= self.last_s {
                    return Err(item_error(
                        self.path,
                        format!("row {row} is no later than the row before it"),
                        "sort the rows by time, one a moment",
                    ));
                }
                self.last_s = time_s;
                let since_s = time_s - self.first_s;
                let kept = since_s < self.max_seconds;
                if kept {
                    self.times_s.push(since_s);
                }
                kept
            }
        };
        let held = self
            .values
            .iter()
            .map(|lead| lead.len() as u64)
            .sum::<u64>();
        if kept && held + self.values.len() as u64 > MAX_SAMPLES {
            return Err(self.too_many());
        }
        Ok(kept)
    }

    fn push(&mut self, values: &[f64]) {
        for (lead, value) in self.values.iter_mut().zip(values) {
            lead.push(*value);
        }
    }

    fn too_many(&self) -> RecordsError {
        item_error(
            self.path,
            format!("more than {MAX_SAMPLES} samples lie within `max_seconds`"),
            "lower `max_seconds` or name fewer `leads`",
        )
    }

    fn finish(self) -> Result<Recording, RecordsError> {
        if self.seen == 0 {
            return Err(item_error(self.path, "the table has no rows", REWRITE_HINT));
        }
        if self.timed {
            return self.placed();
        }
        // Without a time column there is a rate, or no `Rows`.
        let rate_hz = self.rate_hz.unwrap_or(1.0);
        let kept = self.values.first().map_or(0, Vec::len);
        let leads = self
            .values
            .into_iter()
            .map(|values| Lead { rate_hz, values });
        Ok(Recording {
            leads: leads.collect(),
            kept_s: kept as f64 / rate_hz,
            length_s: self.seen as f64 / rate_hz,
        })
    }

    /// Puts the rows where their times say, on a grid of the table's own step. Moments without a
    /// row are missing.
    fn placed(self) -> Result<Recording, RecordsError> {
        let step_s = match self.rate_hz {
            Some(rate_hz) => 1.0 / rate_hz,
            None => self.step_s()?,
        };
        let places: Vec<u64> = self
            .times_s
            .iter()
            .map(|time_s| (time_s / step_s).round() as u64)
            .collect();
        if let Some(row) = (1..places.len()).find(|&row| places[row] == places[row - 1]) {
            return Err(item_error(
                self.path,
                format!("rows {} and {row} fall on the same sample", row - 1),
                "give evenly spaced rows, or take the values into the record as a series",
            ));
        }
        let length = places.last().map_or(0, |last| last.saturating_add(1));
        if length.saturating_mul(self.values.len() as u64) > MAX_SAMPLES {
            return Err(self.too_many());
        }
        let leads = self.values.iter().map(|values| {
            let mut grid = vec![f64::NAN; length as usize];
            for (place, value) in places.iter().zip(values) {
                grid[*place as usize] = *value;
            }
            Lead {
                rate_hz: 1.0 / step_s,
                values: grid,
            }
        });
        Ok(Recording {
            leads: leads.collect(),
            kept_s: length as f64 * step_s,
            length_s: self.last_s - self.first_s + step_s,
        })
    }

    /// The step from row to row: the mean of the steps that are not gaps, so that times rounded to
    /// milliseconds still give the true rate.
    fn step_s(&self) -> Result<f64, RecordsError> {
        let mut steps: Vec<f64> = self
            .times_s
            .windows(2)
            .map(|pair| pair[1] - pair[0])
            .collect();
        if steps.is_empty() {
            return Err(item_error(
                self.path,
                "one row does not say how far apart rows are",
                "set `source_rate_hz`",
            ));
        }
        let middle = steps.len() / 2;
        let median = *steps.select_nth_unstable_by(middle, f64::total_cmp).1;
        let regular: Vec<f64> = steps
            .iter()
            .copied()
            .filter(|step| *step <= 1.5 * median)
            .collect();
        let mean = regular.iter().sum::<f64>() / regular.len() as f64;
        let spread = regular
            .iter()
            .map(|step| (step / mean - 1.0).abs())
            .sum::<f64>()
            / regular.len() as f64;
        if spread > 0.25 || !mean.is_normal() {
            return Err(item_error(
                self.path,
                "the rows are not evenly spaced in time",
                "give evenly spaced rows, or take the values into the record as a series",
            ));
        }
        Ok(mean)
    }
}

/// The values of a column of numbers or timestamps (as seconds); NaN where null.
fn column_values(path: &Path, batch: &RecordBatch, name: &str) -> Result<Vec<f64>, RecordsError> {
    let column = batch
        .column_by_name(name)
        .ok_or_else(|| item_error(path, format!("column `{name}` is gone"), REWRITE_HINT))?;
    let per_second = match column.data_type() {
        DataType::Timestamp(TimeUnit::Second, _) => Some(1.0),
        DataType::Timestamp(TimeUnit::Millisecond, _) => Some(1e3),
        DataType::Timestamp(TimeUnit::Microsecond, _) => Some(1e6),
        DataType::Timestamp(TimeUnit::Nanosecond, _) => Some(1e9),
        _ => None,
    };
    let mut values = numbers(column).ok_or_else(|| {
        item_error(
            path,
            format!("column `{name}` cannot be read as numbers"),
            "cast it to float64",
        )
    })?;
    if let Some(per_second) = per_second {
        for value in &mut values {
            *value /= per_second;
        }
    }
    Ok(values)
}

/// The separator that the first line has most of, outside quotes.
fn delimiter(reader: &mut impl BufRead) -> std::io::Result<u8> {
    let mut quoted = false;
    let mut counts = [(b',', 0), (b';', 0), (b'\t', 0), (b'|', 0)];
    for &byte in reader.fill_buf()?.iter().take_while(|byte| **byte != b'\n') {
        quoted ^= byte == b'"';
        for (mark, count) in &mut counts {
            *count += u32::from(byte == *mark && !quoted);
        }
    }
    // The first of those with the highest count.
    let most = counts.iter().map(|(_, count)| *count).max().unwrap_or(0);
    Ok(counts
        .iter()
        .find(|(_, count)| *count == most)
        .map_or(b',', |(mark, _)| *mark))
}

/// A field as a number; NaN where it says that there is none, `None` where it is something else.
fn number(field: &[u8]) -> Option<f64> {
    let text = std::str::from_utf8(field).ok()?;
    if ["", "na", "nan", "n/a", "null", "none"]
        .iter()
        .any(|word| text.eq_ignore_ascii_case(word))
    {
        return Some(f64::NAN);
    }
    text.parse().ok().filter(|value: &f64| value.is_finite())
}

fn text_error(path: &Path, error: &csv::Error) -> RecordsError {
    match error.kind() {
        csv::ErrorKind::Io(source) => unreadable(path, source),
        csv::ErrorKind::UnequalLengths {
            pos,
            expected_len,
            len,
        } => item_error(
            path,
            match pos {
                Some(pos) => format!(
                    "line {} has {len} fields and the first one {expected_len}",
                    pos.line()
                ),
                None => format!("a line has {len} fields and the first one {expected_len}"),
            },
            REWRITE_HINT,
        ),
        _ => item_error(path, "not text of rows and columns", REWRITE_HINT),
    }
}

fn parquet_error(path: &Path, error: RecordsError) -> RecordsError {
    match error {
        RecordsError::Compression { codec, .. } => item_error(
            path,
            format!("compressed with {codec}, which is not read here"),
            "write it again with zstd or snappy",
        ),
        RecordsError::Io { source, .. } => unreadable(path, &source),
        RecordsError::CorruptRows { row, .. } | RecordsError::Undecodable { row, .. } => {
            item_error(
                path,
                format!("breaks off or is corrupt near row {row}"),
                REWRITE_HINT,
            )
        }
        _ => item_error(path, "truncated, corrupt or not Parquet", REWRITE_HINT),
    }
}
