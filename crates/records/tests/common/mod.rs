//! Cohorts for the tests, in the shapes that other tools write.
#![allow(dead_code)]

pub mod cohort;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::builder::StringDictionaryBuilder;
use arrow_array::types::{ArrowDictionaryKeyType, Int8Type, Int32Type, UInt32Type};
use arrow_array::{
    Array, ArrayRef, Float32Array, Int64Array, LargeStringArray, RecordBatch, StringArray,
    StringViewArray, TimestampMicrosecondArray,
};
use arrow_schema::{DataType, Field, Schema, TimeUnit};
use calor_records::{Cohort, Event, Patient};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::{WriterProperties, WriterVersion};

pub const DAY_US: i64 = 86_400_000_000;

/// A small deterministic generator (xorshift64*), so that a failing case can be repeated.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize) % bound
    }
}

/// Patients with static rows, ties in time, nulls in every optional column, and text.
pub fn patients(count: usize, seed: u64) -> Vec<Patient> {
    let mut random = Random::new(seed);
    let mut ids: Vec<i64> = (0..count as i64).map(|id| id * 7 - 20).collect();
    for position in (1..count).rev() {
        ids.swap(position, random.below(position + 1));
    }
    ids.into_iter()
        .map(|subject_id| {
            let mut events = vec![event(
                None,
                if random.below(2) == 0 {
                    "SEX//F"
                } else {
                    "SEX//M"
                },
            )];
            events[0].site = Some("register".into());
            let mut time = random.below(20_000) as i64 * DAY_US - 5_000 * DAY_US;
            for _ in 0..random.below(40) {
                time += random.below(3) as i64 * DAY_US;
                let mut row = event(Some(time), &format!("LAB//{}", random.below(300)));
                if random.below(3) > 0 {
                    row.numeric_value = Some(random.below(1000) as f32 / 8.0);
                }
                if random.below(5) == 0 {
                    row.text_value = Some("søvn og smerte, 傷 ".repeat(random.below(4)).into());
                }
                if random.below(4) > 0 {
                    row.site = Some(["hospital", "general practice"][random.below(2)].into());
                }
                events.push(row);
            }
            Patient { subject_id, events }
        })
        .collect()
}

pub fn event(time_us: Option<i64>, code: &str) -> Event {
    Event {
        time_us,
        code: code.into(),
        numeric_value: None,
        text_value: None,
        site: None,
        items: None,
    }
}

/// How a string column is written.
#[derive(Clone, Copy, Debug)]
pub enum Text {
    Plain,
    Large,
    View,
    /// Dictionary with int32 keys, as pyarrow.
    Dictionary,
    /// With uint32 keys, as polars' categories.
    Categories,
    /// With int8 keys, as pandas; too narrow to be merged over row groups.
    NarrowDictionary,
}

impl Text {
    pub const ALL: [Text; 6] = [
        Text::Plain,
        Text::Large,
        Text::View,
        Text::Dictionary,
        Text::Categories,
        Text::NarrowDictionary,
    ];
}

#[derive(Clone, Copy, Debug)]
pub struct Layout {
    pub text: Text,
    pub compression: Compression,
    pub parquet_dictionary: bool,
    pub version_2: bool,
    pub row_group_rows: usize,
    pub page_rows: usize,
    /// Rows handed over to the writer at a time.
    pub batch_rows: usize,
}

impl Default for Layout {
    fn default() -> Self {
        Layout {
            text: Text::Plain,
            compression: Compression::ZSTD(ZstdLevel::default()),
            parquet_dictionary: true,
            version_2: false,
            row_group_rows: 1 << 20,
            page_rows: 20_000,
            batch_rows: 1024,
        }
    }
}

pub fn strings(text: Text, values: &[Option<&str>]) -> ArrayRef {
    fn dictionary<K: ArrowDictionaryKeyType>(values: &[Option<&str>]) -> ArrayRef {
        let mut builder = StringDictionaryBuilder::<K>::new();
        for value in values {
            match value {
                Some(value) => {
                    builder.append(value).expect("the keys suffice");
                }
                None => builder.append_null(),
            }
        }
        Arc::new(builder.finish())
    }
    match text {
        Text::Plain => Arc::new(StringArray::from(values.to_vec())),
        Text::Large => Arc::new(LargeStringArray::from(values.to_vec())),
        Text::View => Arc::new(StringViewArray::from(values.to_vec())),
        Text::Dictionary => dictionary::<Int32Type>(values),
        Text::Categories => dictionary::<UInt32Type>(values),
        Text::NarrowDictionary => dictionary::<Int8Type>(values),
    }
}

pub fn timestamps(values: Vec<Option<i64>>) -> ArrayRef {
    Arc::new(TimestampMicrosecondArray::from(values))
}

/// Rows of patients as columns, by name.
pub fn columns(rows: &[(i64, &Event)], text: Text) -> Vec<(&'static str, ArrayRef)> {
    let long = match text {
        Text::NarrowDictionary => Text::Dictionary,
        other => other,
    };
    let of = |text, get: fn(&Event) -> Option<&str>| {
        let values: Vec<Option<&str>> = rows.iter().map(|(_, event)| get(event)).collect();
        strings(text, &values)
    };
    vec![
        (
            "subject_id",
            Arc::new(Int64Array::from_iter_values(rows.iter().map(|row| row.0))),
        ),
        (
            "time",
            timestamps(rows.iter().map(|(_, event)| event.time_us).collect()),
        ),
        ("code", of(text, |event| Some(&event.code))),
        (
            "numeric_value",
            Arc::new(Float32Array::from_iter(
                rows.iter().map(|(_, event)| event.numeric_value),
            )),
        ),
        ("text_value", of(long, |event| event.text_value.as_deref())),
        ("site", of(text, |event| event.site.as_deref())),
    ]
}

pub fn rows(patients: &[Patient]) -> Vec<(i64, &Event)> {
    patients
        .iter()
        .flat_map(|patient| {
            patient
                .events
                .iter()
                .map(|event| (patient.subject_id, event))
        })
        .collect()
}

/// Writes patients as one shard in a layout.
pub fn write_layout(path: &Path, patients: &[Patient], layout: &Layout) {
    let rows = rows(patients);
    // Keys of 8 bits reach for 127 codes a batch.
    let batch_rows = match layout.text {
        Text::NarrowDictionary => layout.batch_rows.min(100),
        _ => layout.batch_rows,
    };
    let batches: Vec<Vec<(&str, ArrayRef)>> = rows
        .chunks(batch_rows)
        .map(|chunk| columns(chunk, layout.text))
        .collect();
    write_batches(path, &batches, layout);
}

pub fn write_columns(path: &Path, columns: Vec<(&str, ArrayRef)>) {
    write_batches(path, &[columns], &Layout::default());
}

pub fn write_batches(path: &Path, batches: &[Vec<(&str, ArrayRef)>], layout: &Layout) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let fields: Vec<Field> = batches[0]
        .iter()
        .map(|(name, column)| Field::new(*name, column.data_type().clone(), true))
        .collect();
    let schema = Arc::new(Schema::new(fields));
    let properties = WriterProperties::builder()
        .set_compression(layout.compression)
        .set_dictionary_enabled(layout.parquet_dictionary)
        .set_writer_version(if layout.version_2 {
            WriterVersion::PARQUET_2_0
        } else {
            WriterVersion::PARQUET_1_0
        })
        .set_max_row_group_row_count(Some(layout.row_group_rows))
        .set_data_page_row_count_limit(layout.page_rows)
        .set_write_batch_size(layout.page_rows.min(1024))
        .build();
    let file = File::create(path).unwrap();
    let mut writer = ArrowWriter::try_new(file, schema.clone(), Some(properties)).unwrap();
    for batch in batches {
        let columns = batch.iter().map(|(_, column)| column.clone()).collect();
        writer
            .write(&RecordBatch::try_new(schema.clone(), columns).unwrap())
            .unwrap();
    }
    writer.close().unwrap();
}

/// All patients of a cohort, in file order.
pub fn read_all(cohort: &Cohort) -> Vec<Patient> {
    (0..cohort.shards().len())
        .flat_map(|shard| cohort.read_shard(shard, &|_| true).unwrap())
        .map(Result::unwrap)
        .collect()
}

pub fn shard(folder: &Path, name: &str) -> PathBuf {
    folder.join("data").join(name)
}

pub fn timestamp_type(unit: TimeUnit) -> DataType {
    DataType::Timestamp(unit, None)
}
