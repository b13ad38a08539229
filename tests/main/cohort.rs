//! `calor cohort`.

use std::fs;
use std::sync::Arc;

use calor_records::{
    Event, ItemPath, Label, LabelValue, Modality, Patient, ShardOptions, Split, write_labels,
    write_shard, write_splits,
};

use crate::support::Workplace;

#[test]
fn inspect_shows_what_is_in_a_cohort() {
    let workplace = Workplace::new();
    let ended = workplace.run(["cohort", "inspect", "cohort"]).done();
    assert_eq!(ended.stderr, "");
    // The size of the files depends on the Parquet writer's version.
    insta::with_settings!({filters => vec![(r"\d+\.\d KiB", "[size]")]}, {
        assert_snapshot!(ended.stdout);
    });
}

#[test]
fn inspect_gives_the_same_numbers_as_json() {
    let workplace = Workplace::new();
    let found = workplace
        .run(["cohort", "inspect", "cohort", "--codes", "2", "--json"])
        .done()
        .json();
    assert_eq!(found["patients"], 48);
    assert_eq!(found["codes"]["top"].as_array().map(Vec::len), Some(2));
    assert_eq!(found["labels"][0]["task"], "outcome");
    assert_eq!(found["labels"][0]["labels"], 48);
    let sites: Vec<_> = found["sites"]
        .as_array()
        .expect("sites")
        .iter()
        .map(|site| site["site"].clone())
        .collect();
    assert_eq!(sites.len(), 3);
}

/// Items of a cohort are counted in the table and in JSON, and a file that is not there is found.
#[test]
fn items_are_counted_and_their_files_looked_for() {
    let workplace = Workplace::empty();
    let cohort = workplace.path("cohort");
    let patients: Vec<Patient> = (0..6)
        .map(|subject_id| {
            let item = |modality, name: &str| ItemPath {
                modality,
                path: Arc::from(format!("items/{subject_id}.{name}")),
            };
            let mut items = Vec::new();
            if subject_id % 2 == 0 {
                items.push(item(Modality::Image, "png"));
            }
            if subject_id % 3 == 0 {
                items.push(item(Modality::Omics, "npy"));
            }
            let event = |items: Vec<ItemPath>| Event {
                time_us: None,
                code: Arc::from("EXAM"),
                numeric_value: None,
                text_value: None,
                site: None,
                items: (!items.is_empty()).then(|| items.into_boxed_slice()),
            };
            Patient {
                subject_id,
                events: vec![event(items.clone()), event(items)],
            }
        })
        .collect();
    let shard = cohort.join("data/0.parquet");
    write_shard(&shard, &patients, ShardOptions::default()).expect("a shard");
    fs::create_dir(cohort.join("items")).expect("a folder");
    for name in ["0.png", "2.png", "0.npy", "3.npy"] {
        fs::write(cohort.join("items").join(name), "x").expect("an item");
    }

    let shown = workplace.run(["cohort", "inspect", "cohort"]).done().stdout;
    let items = shown.split("\n\n").find(|part| part.starts_with("Items\n"));
    assert_snapshot!(items.unwrap_or(&shown));
    let found = workplace
        .run(["cohort", "inspect", "cohort", "--json"])
        .done()
        .json();
    assert_eq!(found["items"][1]["modality"], "omics");
    assert_eq!(found["items"][1]["column"], "omics_path");
    assert_eq!(found["items"][1]["items"], 4);
    assert_eq!(found["items"][1]["patients"], 2);

    let report = workplace
        .run(["cohort", "validate", "cohort"])
        .with_status(1)
        .stdout;
    let broken: Vec<&str> = report
        .lines()
        .skip_while(|line| !line.starts_with("broken"))
        .take_while(|line| !line.starts_with("advice"))
        .collect();
    assert_snapshot!(broken.join("\n"));
}

#[test]
fn a_sound_cohort_is_valid() {
    let workplace = Workplace::new();
    let ended = workplace.run(["cohort", "validate", "cohort"]).done();
    assert_eq!(ended.stderr, "");
    assert_snapshot!(ended.stdout);
    let report = workplace
        .run(["cohort", "validate", "cohort", "--json"])
        .done()
        .json();
    assert_eq!(report["valid"], true);
    assert!(
        report["rules"]
            .as_array()
            .is_some_and(|rules| rules.len() > 20)
    );
}

/// Every rule that a few wrong files can break is named with file and row, and no identifier,
/// value or code of a patient is in what is said.
#[test]
fn a_broken_cohort_is_told_rule_file_and_row() {
    let workplace = Workplace::empty();
    let cohort = workplace.path("cohort");
    let event = |time_us: Option<i64>| Event {
        time_us,
        code: Arc::from("SECRETCODE"),
        numeric_value: Some(987_654.0),
        text_value: Some(Arc::from("secret words")),
        site: None,
        items: None,
    };
    let patient = |subject_id, events| Patient { subject_id, events };
    let shards = [
        // Out of order, a static row after one in time, a subject that comes twice.
        vec![
            patient(770_001, vec![event(Some(20)), event(Some(10))]),
            patient(770_002, vec![event(Some(20)), event(None)]),
            patient(770_003, vec![event(Some(1))]),
            patient(770_001, vec![event(Some(30))]),
        ],
        // A subject of the other file.
        vec![patient(770_003, vec![event(Some(2))])],
    ];
    for (number, shard) in shards.iter().enumerate() {
        write_shard(
            &cohort.join(format!("data/{number}.parquet")),
            shard,
            ShardOptions::default(),
        )
        .expect("a shard");
    }
    let whole = fs::read(cohort.join("data/1.parquet")).expect("a shard");
    fs::write(cohort.join("data/2.parquet"), &whole[..whole.len() - 7]).expect("a shard");
    write_splits(
        &cohort,
        &[(770_001, Split::Train), (770_001, Split::HeldOut)],
    )
    .expect("splits");
    let label = Label {
        subject_id: 770_009,
        prediction_time_us: 0,
        value: LabelValue::Boolean(true),
    };
    write_labels(&cohort.join("labels/outcome/0.parquet"), &[label]).expect("labels");
    fs::write(cohort.join("metadata/dataset.json"), "[1, 2").expect("dataset.json");

    let ended = workplace
        .run(["cohort", "validate", "cohort"])
        .with_status(1);
    assert_eq!(ended.stderr, "");
    for secret in ["7700", "SECRETCODE", "987654", "secret"] {
        assert!(
            !ended.stdout.contains(secret),
            "`{secret}` of a patient is in\n{}",
            ended.stdout
        );
    }
    assert_snapshot!(ended.stdout);

    let report = workplace
        .run(["cohort", "validate", "cohort", "--json"])
        .with_status(1)
        .json();
    assert_eq!(report["valid"], false);
    let broken: Vec<&str> = report["rules"]
        .as_array()
        .expect("rules")
        .iter()
        .filter(|rule| rule["count"] != 0 && rule["severity"] == "error")
        .filter_map(|rule| rule["rule"].as_str())
        .collect();
    for rule in [
        "file_readable",
        "time_sorted",
        "static_first",
        "subject_contiguous",
        "subject_in_one_file",
        "splits_disjoint",
        "dataset_json",
    ] {
        assert!(broken.contains(&rule), "{rule} is not among {broken:?}");
    }
}
