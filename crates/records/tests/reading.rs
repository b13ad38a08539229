//! A cohort read back is the cohort written, whatever the layout of its files.

mod common;

use std::collections::HashSet;
use std::sync::Arc;

use arrow_array::builder::{ListBuilder, StringBuilder};
use arrow_array::{
    ArrayRef, BooleanArray, Date32Array, Decimal128Array, Float32Array, Float64Array, Int64Array,
    NullArray, StringArray, StructArray, TimestampMicrosecondArray,
};
use arrow_schema::{DataType, Field};
use calor_records::{
    Cohort, Patient, RecordsError, ShardOptions, Split, write_shard, write_splits,
};
use common::*;
use parquet::basic::{Compression, ZstdLevel};
use proptest::prelude::*;

fn by_subject(mut patients: Vec<Patient>) -> Vec<Patient> {
    patients.sort_by_key(|patient| patient.subject_id);
    patients
}

#[test]
fn every_encoding_gives_the_same_patients() {
    let written = patients(100, 1);
    for text in Text::ALL {
        for (compression, parquet_dictionary, version_2, row_group_rows, page_rows) in [
            (
                Compression::ZSTD(ZstdLevel::default()),
                true,
                false,
                1 << 20,
                20_000,
            ),
            (Compression::SNAPPY, false, false, 100, 10),
            (Compression::LZ4_RAW, true, true, 37, 5),
            (Compression::UNCOMPRESSED, false, true, 1000, 1000),
            (Compression::GZIP(Default::default()), true, false, 9, 1),
        ] {
            let layout = Layout {
                text,
                compression,
                parquet_dictionary,
                version_2,
                row_group_rows,
                page_rows,
                ..Layout::default()
            };
            let folder = tempfile::tempdir().unwrap();
            write_layout(&shard(folder.path(), "0.parquet"), &written, &layout);
            let cohort = Cohort::open(folder.path()).unwrap();
            assert_eq!(cohort.subject_count(), written.len());
            assert_eq!(read_all(&cohort), written, "{layout:?}");
        }
    }
}

#[test]
fn our_own_writer_reads_back_and_leaves_nothing_else_behind() {
    let written = patients(50, 2);
    let folder = tempfile::tempdir().unwrap();
    let options = ShardOptions {
        row_group_rows: 64,
        ..ShardOptions::default()
    };
    write_shard(&shard(folder.path(), "a/0.parquet"), &written, options).unwrap();
    let cohort = Cohort::open(folder.path()).unwrap();
    assert_eq!(read_all(&cohort), written);
    assert_eq!(
        std::fs::read_dir(folder.path().join("data/a"))
            .unwrap()
            .count(),
        1
    );
}

#[test]
fn sharding_does_not_matter() {
    let written = patients(200, 3);
    for sizes in [vec![200], vec![1, 199], vec![50; 4], vec![20; 10]] {
        let folder = tempfile::tempdir().unwrap();
        let mut rest = &written[..];
        for (number, size) in sizes.iter().enumerate() {
            let (part, later) = rest.split_at(*size);
            let name = match number % 3 {
                0 => format!("{number}.parquet"),
                1 => format!("train/{number}.parquet"),
                _ => format!("held out/deep/{number}.parquet"),
            };
            write_layout(&shard(folder.path(), &name), part, &Layout::default());
            rest = later;
        }
        std::fs::write(shard(folder.path(), ".hidden.parquet"), "not parquet").unwrap();
        std::fs::write(shard(folder.path(), "notes.txt"), "not parquet").unwrap();
        let cohort = Cohort::open(folder.path()).unwrap();
        assert_eq!(cohort.shards().len(), sizes.len());
        assert_eq!(by_subject(read_all(&cohort)), by_subject(written.clone()));
        let subjects: Vec<i64> = cohort.subjects().collect();
        let expected: Vec<i64> = by_subject(written.clone())
            .iter()
            .map(|patient| patient.subject_id)
            .collect();
        assert_eq!(subjects, expected);
    }
}

#[test]
fn one_subject_is_found_wherever_it_is() {
    let written = patients(120, 4);
    let folder = tempfile::tempdir().unwrap();
    let layout = Layout {
        row_group_rows: 33,
        page_rows: 7,
        ..Layout::default()
    };
    let empty: [Patient; 0] = [];
    write_shard(
        &shard(folder.path(), "0.parquet"),
        &empty,
        ShardOptions::default(),
    )
    .unwrap();
    write_layout(&shard(folder.path(), "1.parquet"), &written[..50], &layout);
    write_shard(
        &shard(folder.path(), "2.parquet"),
        &empty,
        ShardOptions::default(),
    )
    .unwrap();
    write_layout(&shard(folder.path(), "3.parquet"), &written[50..], &layout);
    write_shard(
        &shard(folder.path(), "4.parquet"),
        &empty,
        ShardOptions::default(),
    )
    .unwrap();
    let cohort = Cohort::open(folder.path()).unwrap();
    for patient in &written {
        let id = patient.subject_id;
        assert_eq!(cohort.read_subject(id).unwrap().as_ref(), Some(patient));
        assert_eq!(cohort.rows_of(id), Some(patient.events.len() as u64));
        assert!(cohort.contains(id));
    }
    assert_eq!(cohort.read_subject(2).unwrap(), None);
    assert!(!cohort.contains(2));
    assert_eq!(cohort.row_count(), rows(&written).len() as u64);
}

#[test]
fn equal_codes_and_sites_share_one_allocation() {
    let written = patients(100, 5);
    let folder = tempfile::tempdir().unwrap();
    let layout = Layout {
        row_group_rows: 50,
        ..Layout::default()
    };
    write_layout(&shard(folder.path(), "0.parquet"), &written, &layout);
    let cohort = Cohort::open(folder.path()).unwrap();
    let read = read_all(&cohort);
    let mut codes: HashSet<*const u8> = HashSet::new();
    let mut names: HashSet<&str> = HashSet::new();
    for event in read.iter().flat_map(|patient| &patient.events) {
        codes.insert(event.code.as_ptr());
        names.insert(&event.code);
    }
    assert!(names.len() > 100);
    assert_eq!(codes.len(), names.len());
}

#[test]
fn optional_columns_may_be_missing_or_without_a_type() {
    let written = patients(40, 6);
    let all = rows(&written);
    let bare: Vec<Patient> = written
        .iter()
        .map(|patient| Patient {
            subject_id: patient.subject_id,
            events: patient
                .events
                .iter()
                .map(|row| event(row.time_us, &row.code))
                .collect(),
        })
        .collect();
    let mut missing = columns(&all, Text::Plain);
    missing.truncate(3);
    let mut untyped = missing.clone();
    let nothing: ArrayRef = Arc::new(NullArray::new(all.len()));
    for name in ["numeric_value", "text_value", "site"] {
        untyped.push((name, nothing.clone()));
    }
    for columns in [missing, untyped] {
        let folder = tempfile::tempdir().unwrap();
        write_columns(&shard(folder.path(), "0.parquet"), columns);
        let cohort = Cohort::open(folder.path()).unwrap();
        assert_eq!(read_all(&cohort), bare);
    }
}

#[test]
fn unknown_columns_of_any_type_are_passed_over() {
    let written = patients(40, 7);
    let all = rows(&written);
    let count = all.len();
    let mut lists = ListBuilder::new(StringBuilder::new());
    for row in 0..count {
        lists.values().append_value("x");
        lists.append(row % 2 == 0);
    }
    let inner: ArrayRef = Arc::new(StringArray::from(vec!["code"; count]));
    let extras: Vec<(&str, ArrayRef)> = vec![
        ("flag", Arc::new(BooleanArray::from(vec![true; count]))),
        ("double", Arc::new(Float64Array::from(vec![0.5; count]))),
        ("date", Arc::new(Date32Array::from(vec![3; count]))),
        ("decimal", Arc::new(Decimal128Array::from(vec![3; count]))),
        ("list", Arc::new(lists.finish())),
        (
            "struct",
            Arc::new(StructArray::from(vec![(
                Arc::new(Field::new("code", DataType::Utf8, true)),
                inner,
            )])),
        ),
        ("null", Arc::new(NullArray::new(count))),
    ];
    let mut with_extras = extras.clone();
    with_extras.extend(columns(&all, Text::Dictionary));
    with_extras.extend(extras.into_iter().map(|(name, column)| {
        let name: &'static str = Box::leak(format!("{name} 2").into_boxed_str());
        (name, column)
    }));
    let folder = tempfile::tempdir().unwrap();
    write_columns(&shard(folder.path(), "0.parquet"), with_extras);
    assert_eq!(read_all(&Cohort::open(folder.path()).unwrap()), written);
}

#[test]
fn sites_come_from_the_column_that_the_metadata_names() {
    let written = patients(30, 8);
    let all = rows(&written);
    let folder = tempfile::tempdir().unwrap();
    let mut with_clinic = columns(&all, Text::Plain);
    let numbers: ArrayRef = Arc::new(Int64Array::from_iter(
        (0..all.len() as i64).map(|row| (row % 3 > 0).then_some(row % 3)),
    ));
    with_clinic.push(("clinic", numbers));
    write_columns(&shard(folder.path(), "0.parquet"), with_clinic);
    let first_sites = |cohort: &Cohort| -> Vec<Option<String>> {
        let read = read_all(cohort);
        let sites = read.iter().flat_map(|patient| &patient.events);
        sites
            .take(6)
            .map(|event| event.site.as_deref().map(str::to_string))
            .collect()
    };

    let cohort = Cohort::open(folder.path()).unwrap();
    assert_eq!(cohort.sites(), Some("site"));
    assert_eq!(read_all(&cohort), written);

    std::fs::create_dir(folder.path().join("metadata")).unwrap();
    let dataset = folder.path().join("metadata/dataset.json");
    std::fs::write(&dataset, r#"{"site_id_columns": ["clinic"]}"#).unwrap();
    let cohort = Cohort::open(folder.path()).unwrap();
    assert_eq!(cohort.sites(), Some("clinic"));
    let clinics = [None, Some("1"), Some("2"), None, Some("1"), Some("2")];
    assert_eq!(
        first_sites(&cohort),
        clinics.map(|site| site.map(str::to_string))
    );

    std::fs::write(&dataset, r#"{"site_id_columns": ["ward"]}"#).unwrap();
    let cohort = Cohort::open(folder.path()).unwrap();
    assert_eq!(first_sites(&cohort), [const { None }; 6]);

    std::fs::write(&dataset, r#"{"site_id_columns": ["numeric_value"]}"#).unwrap();
    let error = Cohort::open(folder.path()).unwrap_err();
    assert!(matches!(error, RecordsError::ColumnType { .. }), "{error}");

    std::fs::write(&dataset, "{}").unwrap();
    assert_eq!(Cohort::open(folder.path()).unwrap().sites(), Some("site"));
}

#[test]
fn what_is_not_a_number_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    write_columns(
        &shard(folder.path(), "0.parquet"),
        vec![
            ("subject_id", Arc::new(Int64Array::from(vec![1, 1, 1]))),
            ("time", timestamps(vec![None, Some(1), Some(1)])),
            (
                "code",
                strings(Text::Plain, &[Some("a"), Some("b"), Some("b")]),
            ),
            (
                "numeric_value",
                Arc::new(Float32Array::from(vec![f32::NAN, f32::INFINITY, 1.5])),
            ),
        ],
    );
    let read = read_all(&Cohort::open(folder.path()).unwrap());
    let numbers: Vec<Option<f32>> = read[0]
        .events
        .iter()
        .map(|event| event.numeric_value)
        .collect();
    assert_eq!(numbers, [None, Some(f32::INFINITY), Some(1.5)]);
}

#[test]
fn a_time_zone_of_utc_says_nothing_new() {
    let folder = tempfile::tempdir().unwrap();
    let times = TimestampMicrosecondArray::from(vec![5, 6]).with_timezone("UTC");
    write_columns(
        &shard(folder.path(), "0.parquet"),
        vec![
            ("subject_id", Arc::new(Int64Array::from(vec![1, 1]))),
            ("time", Arc::new(times)),
            ("code", strings(Text::Plain, &[Some("a"), Some("b")])),
        ],
    );
    let read = read_all(&Cohort::open(folder.path()).unwrap());
    let times: Vec<Option<i64>> = read[0].events.iter().map(|event| event.time_us).collect();
    assert_eq!(times, [Some(5), Some(6)]);
}

#[test]
fn splits_are_looked_up_by_subject() {
    let written = patients(10, 9);
    let folder = tempfile::tempdir().unwrap();
    write_layout(
        &shard(folder.path(), "0.parquet"),
        &written,
        &Layout::default(),
    );
    let cohort = Cohort::open(folder.path()).unwrap();
    assert!(!cohort.splits().is_present());
    assert_eq!(cohort.splits().split_of(written[0].subject_id), None);

    let splits = [
        (1, Split::Tuning),
        (-20, Split::HeldOut),
        (8, Split::Train),
        (8, Split::Train),
    ];
    write_splits(folder.path(), &splits).unwrap();
    let cohort = Cohort::open(folder.path()).unwrap();
    let splits = cohort.splits();
    assert_eq!(splits.split_of(-20), Some(Split::HeldOut));
    assert_eq!(splits.split_of(1), Some(Split::Tuning));
    assert_eq!(splits.split_of(8), Some(Split::Train));
    assert_eq!(splits.split_of(9), None);
    assert_eq!((splits.len(), splits.count(Split::Train)), (3, 1));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any choice of patients, from any chunk of any layout, gives those patients and no others.
    #[test]
    fn a_choice_of_patients_is_read_exactly(
        seed in 0u64..1000,
        count in 1usize..60,
        row_group_rows in 1usize..80,
        page_rows in 1usize..20,
        target_rows in 1u64..200,
        wanted in prop::collection::vec(any::<bool>(), 60),
    ) {
        let written = patients(count, seed);
        let folder = tempfile::tempdir().unwrap();
        let layout = Layout { row_group_rows, page_rows, ..Layout::default() };
        let half = count / 2;
        if half > 0 {
            write_layout(&shard(folder.path(), "a.parquet"), &written[..half], &layout);
        }
        write_layout(&shard(folder.path(), "b.parquet"), &written[half..], &layout);
        let cohort = Cohort::open(folder.path()).unwrap();
        let is_wanted = |id: i64| wanted[((id + 20) / 7) as usize];
        let expected: Vec<Patient> = written
            .iter()
            .filter(|patient| is_wanted(patient.subject_id))
            .cloned()
            .collect();

        let mut by_shard = Vec::new();
        for shard in 0..cohort.shards().len() {
            for patient in cohort.read_shard(shard, &is_wanted).unwrap() {
                by_shard.push(patient.unwrap());
            }
        }
        prop_assert_eq!(&by_shard, &expected);

        let mut by_chunk = Vec::new();
        let chunks = cohort.chunks(target_rows);
        prop_assert_eq!(chunks.iter().map(|chunk| chunk.subjects).sum::<usize>(), count);
        prop_assert_eq!(chunks.iter().map(|chunk| chunk.rows).sum::<u64>(), cohort.row_count());
        for chunk in &chunks {
            for patient in cohort.read_chunk(chunk, &is_wanted).unwrap() {
                by_chunk.push(patient.unwrap());
            }
        }
        prop_assert_eq!(&by_chunk, &expected);
    }
}
