//! Every rule is kept by a good cohort, and a cohort that breaks one is told so by its name, file
//! and row.

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;

use arrow_array::builder::{ListBuilder, StringBuilder};
use arrow_array::{ArrayRef, Float32Array, Int64Array, TimestampMicrosecondArray};
use calor_records::{Rule, ShardOptions, ValidationReport, validate, write_shard};
use common::cohort::{broken, good, only};
use common::*;

fn small(
    ids: &[Option<i64>],
    times: &[Option<i64>],
    codes: &[Option<&str>],
) -> Vec<(&'static str, ArrayRef)> {
    vec![
        (
            "subject_id",
            Arc::new(Int64Array::from(ids.to_vec())) as ArrayRef,
        ),
        ("time", timestamps(times.to_vec())),
        ("code", strings(Text::Plain, codes)),
    ]
}

/// A cohort of one shard and no metadata: three rules of advice are broken, no other.
fn bare(columns: Vec<(&'static str, ArrayRef)>) -> (tempfile::TempDir, ValidationReport) {
    let folder = tempfile::tempdir().unwrap();
    write_columns(&shard(folder.path(), "0.parquet"), columns);
    let report = validate(folder.path());
    (folder, report)
}

const ADVICE: [&str; 3] = ["dataset_missing", "codes_missing", "splits_missing"];

fn errors(report: &ValidationReport) -> Vec<&'static str> {
    let mut names = broken(report);
    names.retain(|name| !ADVICE.contains(name));
    names
}

#[test]
fn a_good_cohort_keeps_every_rule() {
    let (folder, written) = good();
    let report = validate(folder.path());
    assert_eq!(broken(&report), [] as [&str; 0]);
    assert!(report.valid);
    assert_eq!(report.rules.len(), Rule::ALL.len());
    assert_eq!(report.subjects, 30);
    assert_eq!(report.rows, rows(&written).len() as u64);
    assert_eq!(report.data_files, 2);
}

#[test]
fn rules_have_names_of_their_own() {
    let names: BTreeSet<&str> = Rule::ALL.iter().map(|rule| rule.name()).collect();
    assert_eq!(names.len(), Rule::ALL.len());
}

#[test]
fn without_metadata_a_cohort_is_valid_but_advised() {
    let (_folder, report) = bare(small(&[Some(1)], &[None], &[Some("a")]));
    assert!(report.valid);
    assert_eq!(broken(&report), ADVICE);
    assert_eq!((report.errors, report.warnings), (0, 3));
}

#[test]
fn a_folder_without_data_breaks_the_first_rule() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(errors(&validate(folder.path())), ["data_files"]);
    std::fs::create_dir(folder.path().join("data")).unwrap();
    assert_eq!(errors(&validate(folder.path())), ["data_files"]);
}

#[test]
fn rows_out_of_order_are_all_found() {
    let (_folder, report) = bare(small(
        &[1, 1, 1, 1, 2, 2, 1, 2].map(Some),
        &[
            None,
            Some(5),
            Some(4),
            None,
            Some(1),
            Some(0),
            Some(9),
            None,
        ],
        &[Some("a"); 8],
    ));
    assert_eq!(
        errors(&report),
        ["subject_contiguous", "time_sorted", "static_first"]
    );
    let found = |rule| {
        let rule = report.rule(rule).unwrap();
        let rows: Vec<u64> = rule
            .findings
            .iter()
            .filter_map(|finding| finding.row)
            .collect();
        rows
    };
    assert_eq!(found(Rule::TimeSorted), [2, 5]);
    assert_eq!(found(Rule::StaticFirst), [3]);
    assert_eq!(found(Rule::SubjectContiguous), [6, 7]);
    assert_eq!(report.subjects, 2);
    assert!(!report.valid);
}

#[test]
fn a_subject_in_two_files_is_found() {
    let (folder, written) = good();
    write_shard(
        &shard(folder.path(), "z.parquet"),
        &written[3..4],
        ShardOptions::default(),
    )
    .unwrap();
    only(
        folder.path(),
        Rule::SubjectInOneFile,
        1,
        "data/z.parquet",
        Some(0),
    );
}

#[test]
fn nulls_are_all_found_and_counted_beyond_those_shown() {
    let (_folder, report) = bare(small(
        &[Some(1), None, None],
        &[None; 3],
        &[None, Some("a"), None],
    ));
    assert_eq!(errors(&report), ["subject_id_not_null", "code_not_null"]);
    assert_eq!(report.rule(Rule::SubjectIdNotNull).unwrap().count, 2);

    let (_folder, report) = bare(small(&[Some(1); 100], &[None; 100], &[None; 100]));
    let nulls = report.rule(Rule::CodeNotNull).unwrap();
    assert_eq!((nulls.count, nulls.findings.len()), (100, 20));
}

#[test]
fn types_that_read_well_but_are_not_meds_are_found() {
    let mut columns = small(&[Some(1)], &[None], &[Some("a")]);
    let time = TimestampMicrosecondArray::from(vec![4]).with_timezone("UTC");
    columns[1] = ("time", Arc::new(time));
    columns.push(("numeric_value", Arc::new(arrow_array::NullArray::new(1))));
    let (_folder, report) = bare(columns);
    assert_eq!(errors(&report), ["time_type", "numeric_value_type"]);
}

#[test]
fn strings_may_be_encoded_in_any_way() {
    for text in Text::ALL {
        let folder = tempfile::tempdir().unwrap();
        let layout = Layout {
            text,
            row_group_rows: 50,
            ..Layout::default()
        };
        write_layout(
            &shard(folder.path(), "0.parquet"),
            &patients(40, 9),
            &layout,
        );
        assert_eq!(
            errors(&validate(folder.path())),
            [] as [&str; 0],
            "{text:?}"
        );
    }
}

#[test]
fn numbers_that_are_none_are_advised_against() {
    let mut columns = small(&[Some(1); 3], &[None; 3], &[Some("a"); 3]);
    let values = vec![Some(1.0), Some(f32::NAN), Some(f32::INFINITY)];
    columns.push(("numeric_value", Arc::new(Float32Array::from(values))));
    let (_folder, report) = bare(columns);
    assert_eq!(errors(&report), ["numbers_finite"]);
    assert_eq!(
        report.rule(Rule::NumbersFinite).unwrap().findings[0].row,
        Some(1)
    );
    assert!(report.valid);
}

#[test]
fn dataset_json_is_checked_field_by_field() {
    let (folder, _) = good();
    let path = folder.path().join("metadata/dataset.json");
    let file = "metadata/dataset.json";
    for (content, rule, count) in [
        ("{", Rule::DatasetJson, 1),
        ("3", Rule::DatasetJson, 1),
        (
            r#"{"dataset_name": 1, "site_id_columns": [1]}"#,
            Rule::DatasetFields,
            2,
        ),
        (r#"{"created_at": "last week"}"#, Rule::DatasetCreatedAt, 1),
        (r#"{"site_id_columns": ["ward"]}"#, Rule::DatasetColumns, 1),
        (
            r#"{"code_modifier_columns": ["site", "numeric_value"]}"#,
            Rule::DatasetColumns,
            1,
        ),
    ] {
        std::fs::write(&path, content).unwrap();
        only(folder.path(), rule, count, file, None);
    }
    std::fs::write(&path, "{}").unwrap();
    assert_eq!(broken(&validate(folder.path())), [] as [&str; 0]);
    std::fs::remove_file(&path).unwrap();
    assert!(only(folder.path(), Rule::DatasetMissing, 1, file, None).valid);
}

#[test]
fn codes_are_checked_against_the_data() {
    let (folder, written) = good();
    let path = folder.path().join("metadata/codes.parquet");
    let all = rows(&written);
    let codes: Vec<&str> = {
        let codes: BTreeSet<&str> = all.iter().map(|(_, event)| &*event.code).collect();
        codes.into_iter().collect()
    };
    let table = |codes: &[Option<&str>], descriptions: &[Option<&str>]| {
        write_columns(
            &path,
            vec![
                ("code", strings(Text::Plain, codes)),
                ("description", strings(Text::Plain, descriptions)),
            ],
        );
    };
    let names: Vec<Option<&str>> = codes.iter().copied().map(Some).collect();

    // The code of the first row of the second file is not listed.
    let second = rows(&written[..20]).len();
    let unlisted = all[second..]
        .iter()
        .position(|(_, event)| {
            all[..second]
                .iter()
                .all(|(_, other)| other.code != event.code)
        })
        .unwrap();
    let code = &*all[second + unlisted].1.code;
    let others: Vec<Option<&str>> = names
        .iter()
        .copied()
        .filter(|name| *name != Some(code))
        .collect();
    table(&others, &vec![Some("x"); others.len()]);
    let report = only(
        folder.path(),
        Rule::CodesComplete,
        1,
        "data/train/1.parquet",
        Some(unlisted as u64),
    );
    assert!(!report.valid);

    let mut descriptions = vec![Some("x"); names.len()];
    descriptions[2] = None;
    descriptions[4] = Some("  ");
    table(&names, &descriptions);
    let report = validate(folder.path());
    assert_eq!(broken(&report), ["codes_described"]);
    assert_eq!(report.rule(Rule::CodesDescribed).unwrap().count, 2);

    let mut twice = names.clone();
    twice.push(names[0]);
    table(&twice, &vec![Some("x"); twice.len()]);
    only(
        folder.path(),
        Rule::CodesUnique,
        1,
        "metadata/codes.parquet",
        Some(names.len() as u64),
    );

    let mut with_null = names.clone();
    with_null.insert(1, None);
    table(&with_null, &vec![Some("x"); with_null.len()]);
    only(
        folder.path(),
        Rule::CodesNotNull,
        1,
        "metadata/codes.parquet",
        Some(1),
    );

    let mut parents = ListBuilder::new(StringBuilder::new());
    for _ in &names {
        parents.append(false);
    }
    let numbers: ArrayRef = Arc::new(Int64Array::from(vec![1; names.len()]));
    for (column, wrong) in [("description", numbers.clone()), ("parent_codes", numbers)] {
        write_columns(
            &path,
            vec![("code", strings(Text::Plain, &names)), (column, wrong)],
        );
        only(
            folder.path(),
            Rule::CodesSchema,
            1,
            "metadata/codes.parquet",
            None,
        );
    }
}

#[test]
fn splits_are_checked_against_the_data() {
    let (folder, written) = good();
    let path = folder.path().join("metadata/subject_splits.parquet");
    let file = "metadata/subject_splits.parquet";
    let ids: Vec<Option<i64>> = written
        .iter()
        .map(|patient| Some(patient.subject_id))
        .collect();
    let table = |ids: &[Option<i64>], names: &[Option<&str>]| {
        write_columns(
            &path,
            vec![
                (
                    "subject_id",
                    Arc::new(Int64Array::from(ids.to_vec())) as ArrayRef,
                ),
                ("split", strings(Text::Plain, names)),
            ],
        );
    };
    let with = |id: Option<i64>, name: Option<&'static str>| {
        let mut ids = ids.clone();
        let mut names = vec![Some("train"); ids.len()];
        ids.push(id);
        names.push(name);
        table(&ids, &names);
    };
    let last = Some(ids.len() as u64);
    with(None, Some("train"));
    only(folder.path(), Rule::SplitsNotNull, 1, file, last);
    with(ids[0], Some("tuning"));
    only(folder.path(), Rule::SplitsDisjoint, 1, file, last);
    with(Some(1_000_000), Some("train"));
    assert!(only(folder.path(), Rule::SplitsKnown, 1, file, last).valid);

    table(&ids[2..], &vec![Some("held_out"); ids.len() - 2]);
    let report = only(folder.path(), Rule::SplitsCover, 1, file, None);
    let finding = &report.rule(Rule::SplitsCover).unwrap().findings[0];
    assert!(
        finding.message.starts_with("2 of 30 subjects"),
        "{}",
        finding.message
    );

    let mut names = vec![Some("train"); ids.len()];
    names[5] = Some("test");
    names[6] = Some("test");
    table(&ids, &names);
    assert!(only(folder.path(), Rule::SplitsNames, 1, file, Some(5)).valid);

    write_columns(
        &path,
        vec![
            (
                "subject_id",
                Arc::new(Int64Array::from(ids.clone())) as ArrayRef,
            ),
            (
                "split",
                strings(Text::Plain, &vec![Some("train"); ids.len()]),
            ),
            ("fold", strings(Text::Plain, &vec![None; ids.len()])),
        ],
    );
    only(folder.path(), Rule::SplitsSchema, 1, file, None);
}

#[test]
fn a_report_is_json_with_rules_by_name() {
    let (_folder, report) = bare(small(&[None], &[None], &[Some("a")]));
    let json = serde_json::to_value(&report).unwrap();
    let rule = json["rules"]
        .as_array()
        .unwrap()
        .iter()
        .find(|rule| rule["rule"] == "subject_id_not_null")
        .unwrap();
    assert_eq!(rule["count"], 1);
    assert_eq!(rule["severity"], "error");
    assert_eq!(rule["findings"][0]["file"], "data/0.parquet");
    assert_eq!(rule["findings"][0]["row"], 0);
}
