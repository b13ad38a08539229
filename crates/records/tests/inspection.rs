//! What is counted is what is there.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use arrow_array::{ArrayRef, BooleanArray};
use calor_records::{
    CodeEntry, Cohort, InspectOptions, Label, LabelKind, LabelValue, Patient, Split, SurvivalLabel,
    inspect, write_codes, write_labels, write_splits, write_survival,
};
use common::*;

const YEAR_US: i64 = 31_556_952_000_000;

fn timed(time_us: i64, code: &str, number: Option<f32>, site: &str) -> calor_records::Event {
    let mut row = event(Some(time_us), code);
    row.numeric_value = number;
    row.site = Some(site.into());
    row
}

#[test]
fn a_small_cohort_is_counted_by_hand() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let mut note = timed(YEAR_US, "NOTE", None, "hospital");
    note.text_value = Some("text".into());
    let first = Patient {
        subject_id: 10,
        events: vec![
            event(None, "SEX//F"),
            timed(-YEAR_US * 30, "MEDS_BIRTH", None, "register"),
            timed(0, "LAB", Some(1.0), "hospital"),
            timed(0, "LAB", Some(2.0), "clinic"),
            note,
        ],
    };
    let second = Patient {
        subject_id: 11,
        events: vec![
            event(None, "SEX//M"),
            timed(2 * YEAR_US, "LAB", None, "hospital"),
        ],
    };
    let third = Patient {
        subject_id: 12,
        events: vec![event(None, "SEX//M")],
    };
    let all = [first.clone(), second.clone()];
    let mut with_flag = columns(&rows(&all), Text::Plain);
    let flags: ArrayRef = Arc::new(BooleanArray::from(vec![true; 7]));
    with_flag.push(("flag", flags));
    write_columns(&shard(root, "a.parquet"), with_flag);
    write_layout(&shard(root, "b.parquet"), &[third], &Layout::default());
    let described = CodeEntry {
        description: Some("a laboratory value".into()),
        parent_codes: Vec::new(),
    };
    let codes = [("LAB", &described), ("UNUSED", &described)];
    write_codes(root, codes).unwrap();
    write_splits(
        root,
        &[(10, Split::Train), (11, Split::HeldOut), (99, Split::Train)],
    )
    .unwrap();
    let label = |subject_id, value| Label {
        subject_id,
        prediction_time_us: 0,
        value: LabelValue::Boolean(value),
    };
    let labels = [
        label(10, true),
        label(11, false),
        label(12, true),
        label(99, false),
    ];
    write_labels(&root.join("labels/outcome/0.parquet"), &labels).unwrap();
    let survival = [
        SurvivalLabel {
            subject_id: 10,
            prediction_time_us: 0,
            duration_days: 30.0,
            event: 2,
        },
        SurvivalLabel {
            subject_id: 99,
            prediction_time_us: 0,
            duration_days: 10.0,
            event: 0,
        },
    ];
    write_survival(&root.join("survival/outcome/0.parquet"), &survival).unwrap();

    let cohort = Cohort::open(root).unwrap();
    assert_eq!(cohort.label_tasks().unwrap(), ["outcome"]);
    assert_eq!(cohort.survival_tasks().unwrap(), ["outcome"]);
    let found = inspect(&cohort, &InspectOptions { top_codes: 2 }).unwrap();
    assert_eq!(
        (found.patients, found.events, found.static_events),
        (3, 8, 3)
    );
    assert_eq!(found.data_files, 2);
    let sizes = ["a", "b"].map(|name| {
        let path = shard(root, &format!("{name}.parquet"));
        std::fs::metadata(path).unwrap().len()
    });
    assert_eq!(found.data_bytes, sizes[0] + sizes[1]);
    let events = found.events_per_patient.unwrap();
    assert_eq!(
        (events.minimum, events.median, events.maximum),
        (1.0, 2.0, 5.0)
    );
    assert_eq!(found.first_time.as_deref(), Some("1970-01-01T00:00:00"));
    assert_eq!(found.last_time.as_deref(), Some("1972-01-01T11:38:24"));
    let span = found.span_years.unwrap();
    assert!((span.maximum - 1.0).abs() < 1e-9 && span.minimum == 0.0);

    let sites: Vec<(Option<&str>, u64, u64)> = found
        .sites
        .iter()
        .map(|site| (site.site.as_deref(), site.events, site.patients))
        .collect();
    assert_eq!(
        sites,
        [
            (None, 3, 3),
            (Some("hospital"), 3, 2),
            (Some("clinic"), 1, 1),
            (Some("register"), 1, 1),
        ]
    );
    assert_eq!(
        (
            found.codes.distinct,
            found.codes.described,
            found.codes.listed
        ),
        (5, 1, 2)
    );
    assert_eq!(found.codes.top.len(), 2);
    let top = &found.codes.top[0];
    assert_eq!((top.code.as_str(), top.events, top.patients), ("LAB", 3, 2));
    assert_eq!((top.with_number, top.with_text), (2, 0));
    assert_eq!(top.description.as_deref(), Some("a laboratory value"));
    assert_eq!(found.codes.top[1].code, "SEX//M");

    let splits: Vec<(Option<&str>, u64)> = found
        .splits
        .iter()
        .map(|split| (split.split.as_deref(), split.patients))
        .collect();
    assert_eq!(
        splits,
        [
            (Some("train"), 2),
            (Some("tuning"), 0),
            (Some("held_out"), 1),
            (None, 1)
        ]
    );
    let task = &found.labels[0];
    assert_eq!(task.kind, LabelKind::Boolean);
    assert_eq!((task.labels, task.patients, task.without_data), (4, 4, 1));
    let values: Vec<(Option<Split>, u64, Option<&u64>)> = task
        .by_split
        .iter()
        .map(|split| (split.split, split.labels, split.values.get("true")))
        .collect();
    assert_eq!(
        values,
        [
            (Some(Split::Train), 2, Some(&1)),
            (Some(Split::Tuning), 0, None),
            (Some(Split::HeldOut), 1, None),
            (None, 1, Some(&1)),
        ]
    );
    let survival = &found.survival[0];
    assert_eq!((survival.labels, survival.without_data), (2, 1));
    assert_eq!(
        survival.by_split[0].events,
        BTreeMap::from([(0, 1), (2, 1)])
    );
    assert_eq!(survival.by_split[0].duration_days.unwrap().mean, 20.0);

    let missing = &found.missingness;
    assert_eq!(missing.events_without_time, 3);
    assert_eq!(missing.events_without_number, 6);
    assert_eq!(missing.events_without_text, 7);
    assert_eq!(missing.events_without_number_and_text, 5);
    assert_eq!(missing.events_without_site, 3);
    assert_eq!(missing.events_without_description, 5);
    assert_eq!(missing.patients_without_birth, 2);
    assert_eq!(missing.patients_without_timed_events, 1);
    assert_eq!(missing.patients_without_split, 1);
    let extra: Vec<(&str, u64)> = found
        .extra_columns
        .iter()
        .map(|column| (column.name.as_str(), column.files))
        .collect();
    assert_eq!(extra, [("flag", 1), ("site", 2)]);
    assert_eq!(found.extra_columns[0].types, ["boolean"]);
    assert!(serde_json::to_value(&found).unwrap()["codes"]["top"].is_array());
}

#[test]
fn counts_do_not_depend_on_the_sharding() {
    let written = patients(150, 3);
    let mut reports = Vec::new();
    for parts in [1, 7] {
        let folder = tempfile::tempdir().unwrap();
        for (number, part) in written.chunks(150 / parts).enumerate() {
            write_layout(
                &shard(folder.path(), &format!("{number}.parquet")),
                part,
                &Layout::default(),
            );
        }
        let cohort = Cohort::open(folder.path()).unwrap();
        let found = inspect(&cohort, &InspectOptions { top_codes: 1000 }).unwrap();
        let codes: BTreeSet<&str> = rows(&written)
            .iter()
            .map(|(_, event)| &*event.code)
            .collect();
        assert_eq!(found.codes.top.len(), codes.len());
        reports.push((
            found.codes,
            found.sites,
            found.missingness,
            found.events_per_patient,
            found.first_time,
            found.last_time,
        ));
    }
    assert_eq!(reports[0], reports[1]);
}
