//! Path columns: read wherever they are, written where there are items, checked and counted.

mod common;

use std::path::Path;
use std::sync::Arc;

use arrow_array::{ArrayRef, Int64Array, NullArray};
use calor_records::{
    Cohort, Event, InspectOptions, ItemPath, Modality, Patient, RecordsError, Rule, ShardOptions,
    ShardWriter, inspect, validate, write_dataset, write_shard,
};
use common::cohort::{broken, good, only};
use common::*;
use proptest::prelude::*;

const COLUMNS: [(Modality, &str); 4] = [
    (Modality::Image, "image_path"),
    (Modality::Waveform, "waveform_path"),
    (Modality::Omics, "omics_path"),
    (Modality::Speech, "audio_path"),
];

fn items(found: &[(Modality, &str)]) -> Option<Box<[ItemPath]>> {
    let items: Box<[ItemPath]> = found
        .iter()
        .map(|&(modality, path)| ItemPath {
            modality,
            path: path.into(),
        })
        .collect();
    (!items.is_empty()).then_some(items)
}

/// Patients with items in some of their rows, all of them or one in three without any.
fn patients_with_items(count: usize, seed: u64) -> Vec<Patient> {
    let mut random = Random::new(seed + 77);
    let mut patients = patients(count, seed);
    for patient in &mut patients {
        let without = random.below(3) == 0;
        for (row, event) in patient.events.iter_mut().enumerate() {
            if without {
                continue;
            }
            let paths: Vec<(Modality, String)> = COLUMNS
                .iter()
                .filter(|_| random.below(6) == 0)
                .map(|(modality, _)| (*modality, format!("{}/ø {row}.x", modality.name())))
                .collect();
            let borrowed: Vec<(Modality, &str)> = paths
                .iter()
                .map(|(modality, path)| (*modality, path.as_str()))
                .collect();
            event.items = items(&borrowed);
        }
    }
    patients
}

/// The path column of one modality, as a file of another tool has it.
fn path_column(rows: &[(i64, &Event)], modality: Modality, text: Text) -> ArrayRef {
    let paths: Vec<Option<&str>> = rows
        .iter()
        .map(|(_, event)| {
            let items = event.items.as_deref().unwrap_or_default();
            let item = items.iter().find(|item| item.modality == modality);
            item.map(|item| &*item.path)
        })
        .collect();
    strings(text, &paths)
}

/// A shard with two rows of one subject and a column of paths.
fn two_rows(root: &Path, column: &'static str, paths: ArrayRef) {
    write_columns(
        &shard(root, "0.parquet"),
        vec![
            ("subject_id", Arc::new(Int64Array::from(vec![77_001; 2]))),
            ("time", timestamps(vec![None, Some(1)])),
            ("code", strings(Text::Plain, &[Some("a"), Some("b")])),
            (column, paths),
        ],
    );
}

#[test]
fn paths_are_read_in_every_encoding() {
    let written = patients_with_items(60, 1);
    let all = rows(&written);
    for text in Text::ALL {
        if matches!(text, Text::NarrowDictionary) {
            continue;
        }
        let mut with_paths = columns(&all, text);
        // In another order than they are read in.
        for (modality, column) in COLUMNS.iter().rev() {
            with_paths.push((column, path_column(&all, *modality, text)));
        }
        let folder = tempfile::tempdir().unwrap();
        write_columns(&shard(folder.path(), "0.parquet"), with_paths);
        let cohort = Cohort::open(folder.path()).unwrap();
        assert_eq!(read_all(&cohort), written, "{text:?}");
        for patient in &written {
            let read = cohort.read_subject(patient.subject_id).unwrap();
            assert_eq!(read.as_ref(), Some(patient));
        }
    }
}

#[test]
fn null_and_empty_paths_are_no_items() {
    for paths in [
        strings(Text::Plain, &[None, Some("")]),
        Arc::new(NullArray::new(2)) as ArrayRef,
    ] {
        let folder = tempfile::tempdir().unwrap();
        two_rows(folder.path(), "image_path", paths);
        let read = read_all(&Cohort::open(folder.path()).unwrap());
        assert!(read[0].events.iter().all(|event| event.items.is_none()));
        let report = validate(folder.path());
        assert!(report.valid);
    }
}

#[test]
fn a_path_that_leads_out_is_named_by_column_and_row_alone() {
    for (path, expected) in [
        ("/secret-77001.png", "is an absolute path"),
        ("../secret-77001.png", "leads out of the cohort's folder"),
        (
            "a/../../secret-77001.png",
            "leads out of the cohort's folder",
        ),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let paths = strings(Text::Plain, &[None, Some(path)]);
        two_rows(folder.path(), "audio_path", paths);
        let cohort = Cohort::open(folder.path()).unwrap();
        let error = cohort.read_subject(77_001).unwrap_err();
        assert!(matches!(error, RecordsError::InvalidValue { row: 1, .. }));
        let message = error.to_string();
        for part in ["0.parquet", "row 1", "`audio_path`", expected] {
            assert!(message.contains(part), "{message}");
        }
        assert!(
            !message.contains("secret") && !message.contains("77001"),
            "{message}"
        );

        let report = validate(folder.path());
        let rule = report.rule(Rule::PathInside).unwrap();
        assert_eq!((rule.count, rule.findings[0].row), (1, Some(1)));
        assert!(rule.findings[0].message.contains(expected));
        assert!(!rule.findings[0].message.contains("secret"));
    }
}

#[test]
fn a_path_column_must_be_of_strings() {
    let folder = tempfile::tempdir().unwrap();
    let numbers: ArrayRef = Arc::new(Int64Array::from(vec![1, 2]));
    two_rows(folder.path(), "waveform_path", numbers);
    let error = Cohort::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("0.parquet"), "{error}");
    assert!(
        error.contains("`waveform_path` is int64 and must be string"),
        "{error}"
    );
    let report = validate(folder.path());
    let rule = report.rule(Rule::PathType).unwrap();
    assert_eq!(rule.count, 1);
    assert!(
        rule.findings[0]
            .message
            .contains("`waveform_path` is int64")
    );
    assert!(!report.valid);
}

#[test]
fn the_writer_refuses_what_could_not_be_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = shard(folder.path(), "0.parquet");
    let patient = |found: &[(Modality, &str)]| {
        let mut row = event(None, "a");
        row.items = items(found);
        Patient {
            subject_id: 77_001,
            events: vec![row],
        }
    };
    for (found, expected) in [
        (vec![(Modality::Image, "../x")], "leads out"),
        (vec![(Modality::Image, "/x")], "absolute"),
        (vec![(Modality::Image, "")], "is empty"),
        (vec![(Modality::Series, "x")], "has no path"),
        (
            vec![(Modality::Image, "a"), (Modality::Image, "b")],
            "two `image` items",
        ),
    ] {
        let error = write_shard(&path, &[patient(&found)], ShardOptions::default()).unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains(expected) && !error.contains("77001"),
            "{error}"
        );
        assert!(!path.exists());
    }
    let image = patient(&[(Modality::Image, "a.png")]);
    let mut writer = ShardWriter::create(&path, ShardOptions::default()).unwrap();
    let error = writer.write(&image).unwrap_err().to_string();
    assert!(error.contains("`image_path`"), "{error}");
    let options = ShardOptions {
        items: &[Modality::Omics, Modality::Image],
        ..ShardOptions::default()
    };
    let mut writer = ShardWriter::create(&path, options).unwrap();
    writer.write(&image).unwrap();
    writer.finish().unwrap();
    assert_eq!(read_all(&Cohort::open(folder.path()).unwrap()), [image]);
}

#[test]
fn the_writer_names_the_path_columns_in_the_metadata() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let mut written = patients(20, 5);
    let none = serde_json::json!({"dataset_name": "x"});
    write_shard(
        &shard(root, "0.parquet"),
        &written[..10],
        ShardOptions::default(),
    )
    .unwrap();
    write_dataset(root, none.as_object().unwrap()).unwrap();
    let cohort = Cohort::open(root).unwrap();
    assert!(
        !cohort
            .dataset()
            .raw
            .contains_key("additional_value_modality_columns")
    );
    let found = inspect(&cohort, &InspectOptions::default()).unwrap();
    let extra: Vec<&str> = found
        .extra_columns
        .iter()
        .map(|column| column.name.as_str())
        .collect();
    assert_eq!(extra, ["site"], "no column for items that nobody has");

    written[12].events[0].items = items(&[(Modality::Omics, "o.npy")]);
    written[13].events[0].items = items(&[(Modality::Image, "i.png"), (Modality::Speech, "s")]);
    write_shard(
        &shard(root, "1.parquet"),
        &written[10..],
        ShardOptions::default(),
    )
    .unwrap();
    let named = serde_json::json!({
        "additional_value_modality_columns": ["ecg_text", "omics_path"],
        "dataset_name": "x",
    });
    write_dataset(root, named.as_object().unwrap()).unwrap();
    let cohort = Cohort::open(root).unwrap();
    assert_eq!(
        cohort.dataset().additional_value_modality_columns,
        ["ecg_text", "omics_path", "image_path", "audio_path"]
    );
    assert_eq!(read_all(&cohort), written);

    let wrong = serde_json::json!({"additional_value_modality_columns": "omics_path"});
    let error = write_dataset(root, wrong.as_object().unwrap()).unwrap_err();
    assert!(matches!(error, RecordsError::JsonShape { .. }), "{error}");
}

#[test]
fn files_that_are_not_there_are_found_by_column_and_row() {
    let (folder, mut written) = good();
    let root = folder.path();
    std::fs::create_dir_all(root.join("items/folder")).unwrap();
    for name in ["a.png", "100.hea", "o.csv"] {
        std::fs::write(root.join("items").join(name), "x").unwrap();
    }
    let last = written.len() - 1;
    written[20].events[0].items = items(&[
        (Modality::Image, "items/a.png"),
        // A record of WFDB goes by its name.
        (Modality::Waveform, "items/100"),
        (Modality::Omics, "items/../items/o.csv"),
    ]);
    let rewrite = |written: &[Patient]| {
        write_shard(
            &shard(root, "train/1.parquet"),
            &written[20..],
            ShardOptions::default(),
        )
        .unwrap();
    };
    rewrite(&written);
    assert_eq!(broken(&validate(root)), [] as [&str; 0]);

    written[last].events[0].items = items(&[
        (Modality::Image, "items/secret.png"),
        (Modality::Omics, "items/folder"),
        (Modality::Speech, "items/100"),
    ]);
    rewrite(&written);
    let row = rows(&written[20..last]).len() as u64;
    let report = only(root, Rule::PathFile, 3, "data/train/1.parquet", Some(row));
    assert!(!report.valid);
    let messages: Vec<&str> = report
        .rule(Rule::PathFile)
        .unwrap()
        .findings
        .iter()
        .map(|finding| finding.message.as_str())
        .collect();
    assert_eq!(
        messages,
        [
            "`image_path` names a file that is not there",
            "`omics_path` names a folder and not a file",
            "`audio_path` names a file that is not there",
        ]
    );

    // Many are counted, some are shown.
    for patient in &mut written[20..] {
        for event in &mut patient.events {
            event.items = items(&[(Modality::Image, "nowhere")]);
        }
    }
    rewrite(&written);
    let report = validate(root);
    let rule = report.rule(Rule::PathFile).unwrap();
    assert_eq!(rule.count, rows(&written[20..]).len() as u64);
    assert_eq!(rule.findings.len(), 20);
}

#[test]
fn items_are_counted_by_modality() {
    let folder = tempfile::tempdir().unwrap();
    let mut written = patients(9, 6);
    for patient in &mut written {
        patient.events.push(event(Some(30_000 * DAY_US), "last"));
    }
    written[0].events[0].items = items(&[(Modality::Image, "a"), (Modality::Speech, "b")]);
    let end = written[0].events.len() - 1;
    written[0].events[end].items = items(&[(Modality::Image, "c")]);
    written[8].events[0].items = items(&[(Modality::Image, "a")]);
    for (number, part) in written.chunks(3).enumerate() {
        let path = shard(folder.path(), &format!("{number}.parquet"));
        write_shard(&path, part, ShardOptions::default()).unwrap();
    }
    let cohort = Cohort::open(folder.path()).unwrap();
    let found = inspect(&cohort, &InspectOptions::default()).unwrap();
    let counts: Vec<(Modality, &str, u64, u64)> = found
        .items
        .iter()
        .map(|found| (found.modality, found.column, found.items, found.patients))
        .collect();
    assert_eq!(
        counts,
        [
            (Modality::Image, "image_path", 3, 2),
            (Modality::Speech, "audio_path", 1, 1),
        ]
    );
    let json = serde_json::to_value(&found).unwrap();
    assert_eq!(json["items"][0]["modality"], "image");
    assert_eq!(json["items"][0]["patients"], 2);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever the patients and the layout: items come back as they were written, with their
    /// rows, and the rows in order of time.
    #[test]
    fn items_survive_being_written_and_read(
        seed in 0u64..1000,
        count in 1usize..50,
        row_group_rows in 1usize..90,
        cut in 0usize..50,
    ) {
        let written = patients_with_items(count, seed);
        let folder = tempfile::tempdir().unwrap();
        let options = ShardOptions { row_group_rows, ..ShardOptions::default() };
        let cut = cut.min(count);
        // Shards of one cohort need not have the same path columns.
        for (name, part) in [("a.parquet", &written[..cut]), ("b.parquet", &written[cut..])] {
            write_shard(&shard(folder.path(), name), part, options).unwrap();
        }
        let cohort = Cohort::open(folder.path()).unwrap();
        let read = read_all(&cohort);
        prop_assert_eq!(&read, &written);
        for patient in &read {
            prop_assert!(patient.events.windows(2).all(|pair| pair[0].time_us <= pair[1].time_us));
            for items in patient.events.iter().filter_map(|event| event.items.as_deref()) {
                prop_assert!(!items.is_empty());
                prop_assert!(items.windows(2).all(|pair| pair[0].modality < pair[1].modality));
            }
        }
        let counted = inspect(&cohort, &InspectOptions::default()).unwrap();
        let total: u64 = counted.items.iter().map(|found| found.items).sum();
        let expected: u64 = written
            .iter()
            .flat_map(|patient| &patient.events)
            .map(|event| event.items.as_deref().unwrap_or_default().len() as u64)
            .sum();
        prop_assert_eq!(total, expected);
    }
}
