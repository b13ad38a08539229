use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{add_error, check_closed, check_columns, each_batch, open};
use crate::metadata::{
    CODE_COLUMNS, CODES_FILE, CodeTable, DATASET_FILE, SPLIT_COLUMNS, SPLITS_FILE, value_at,
};
use crate::patient::Split;
use crate::rules::{Findings, Rule};
use crate::table::Decode;
use crate::time::is_iso_8601;
use crate::values::{Strings, int64};

pub(super) fn check_dataset(
    cohort: &Path,
    columns: &HashMap<String, bool>,
    has_data: bool,
    findings: &mut Findings,
) {
    let path = cohort.join(DATASET_FILE);
    let file = Some(path.as_path());
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            findings.add(Rule::DatasetMissing, file, None, "there is no such file");
            return;
        }
        Err(error) => {
            findings.add(Rule::FileReadable, file, None, error.to_string());
            return;
        }
    };
    let object = match serde_json::from_slice(&bytes) {
        Ok(serde_json::Value::Object(object)) => object,
        Ok(_) => {
            findings.add(
                Rule::DatasetJson,
                file,
                None,
                "it is JSON but not an object",
            );
            return;
        }
        Err(error) => {
            findings.add(Rule::DatasetJson, file, None, error.to_string());
            return;
        }
    };
    for key in [
        "dataset_name",
        "dataset_version",
        "etl_name",
        "etl_version",
        "meds_version",
        "created_at",
        "license",
        "location_uri",
        "description_uri",
    ] {
        match object.get(key) {
            Some(serde_json::Value::String(text)) if key == "created_at" && !is_iso_8601(text) => {
                findings.add(
                    Rule::DatasetCreatedAt,
                    file,
                    None,
                    "`created_at` is not a time of ISO 8601",
                );
            }
            None | Some(serde_json::Value::String(_)) => {}
            Some(_) => findings.add(
                Rule::DatasetFields,
                file,
                None,
                format!("`{key}` must be a string"),
            ),
        }
    }
    for key in [
        "raw_source_id_columns",
        "code_modifier_columns",
        "additional_value_modality_columns",
        "site_id_columns",
        "other_extension_columns",
    ] {
        let Some(value) = object.get(key) else {
            continue;
        };
        let names: Option<Vec<&str>> = value
            .as_array()
            .and_then(|items| items.iter().map(serde_json::Value::as_str).collect());
        let Some(names) = names else {
            findings.add(
                Rule::DatasetFields,
                file,
                None,
                format!("`{key}` must be a list of strings"),
            );
            continue;
        };
        for name in names.into_iter().filter(|_| has_data) {
            let problem = match columns.get(name) {
                None => "names a column that no data file has",
                Some(false) if key == "code_modifier_columns" => {
                    "names a column that does not hold strings"
                }
                Some(_) => continue,
            };
            findings.add(
                Rule::DatasetColumns,
                file,
                None,
                format!("`{key}` {problem}: `{name}`"),
            );
        }
    }
}

pub(super) fn check_codes(
    cohort: &Path,
    files: &[PathBuf],
    seen: &HashMap<Arc<str>, (usize, u64)>,
    findings: &mut Findings,
) {
    let path = cohort.join(CODES_FILE);
    let file = Some(path.as_path());
    if !path.is_file() {
        findings.add(Rule::CodesMissing, file, None, "there is no such file");
        return;
    }
    let Some(table) = open(&path, findings) else {
        return;
    };
    if !check_columns(&table, &CODE_COLUMNS, Rule::CodesSchema, findings) {
        return;
    }
    let before = findings.count(Rule::CodesNotNull);
    let mut listed: HashSet<String> = HashSet::new();
    let read = each_batch(&table, &[("code", Decode::Plain)], |first_row, batch| {
        let codes = Strings::of(batch, "code");
        for position in 0..batch.num_rows() {
            let row = Some(first_row + position as u64);
            match codes.get(position) {
                None => findings.add(Rule::CodesNotNull, file, row, "`code` is null"),
                Some(code) if !listed.insert(code.to_string()) => {
                    findings.add(Rule::CodesUnique, file, row, "this code has a row before");
                }
                Some(_) => {}
            }
        }
    });
    if let Err(error) = read {
        add_error(findings, Rule::FileReadable, &path, &error);
        return;
    }
    let mut places: Vec<(&Arc<str>, (usize, u64))> =
        seen.iter().map(|(code, place)| (code, *place)).collect();
    places.sort_unstable_by_key(|(_, place)| *place);
    for (code, (shard, row)) in &places {
        if !listed.contains(&***code) {
            findings.add(
                Rule::CodesComplete,
                Some(&files[*shard]),
                Some(*row),
                "the code of this row (and perhaps of others) is not listed",
            );
        }
    }
    if findings.count(Rule::CodesNotNull) > before {
        return;
    }
    if let Ok(codes) = CodeTable::read(cohort) {
        for (code, (shard, row)) in &places {
            if listed.contains(&***code) && codes.description(code).is_none() {
                findings.add(
                    Rule::CodesDescribed,
                    Some(&files[*shard]),
                    Some(*row),
                    "the code of this row (and perhaps of others) has no description",
                );
            }
        }
    }
}

pub(super) fn check_splits(cohort: &Path, subjects: &[i64], findings: &mut Findings) {
    let path = cohort.join(SPLITS_FILE);
    let file = Some(path.as_path());
    if !path.is_file() {
        findings.add(Rule::SplitsMissing, file, None, "there is no such file");
        return;
    }
    let Some(table) = open(&path, findings) else {
        return;
    };
    check_closed(&table, &SPLIT_COLUMNS, Rule::SplitsSchema, findings);
    if !check_columns(&table, &SPLIT_COLUMNS, Rule::SplitsSchema, findings) {
        return;
    }
    let mut names: Vec<String> = Split::ALL.map(|split| split.name().to_string()).to_vec();
    let mut members: HashMap<i64, (usize, u64)> = HashMap::new();
    let columns = [("subject_id", Decode::Plain), ("split", Decode::Dictionary)];
    let read = each_batch(&table, &columns, |first_row, batch| {
        let ids = int64(batch, "subject_id");
        let splits = Strings::of(batch, "split");
        for position in 0..batch.num_rows() {
            let row = first_row + position as u64;
            let subject = ids.as_ref().and_then(|ids| value_at(ids, position));
            let (Some(subject), Some(split)) = (subject, splits.get(position)) else {
                findings.add(
                    Rule::SplitsNotNull,
                    file,
                    Some(row),
                    "`subject_id` or `split` is null",
                );
                continue;
            };
            let name = names
                .iter()
                .position(|name| name == split)
                .unwrap_or_else(|| {
                    findings.add(
                        Rule::SplitsNames,
                        file,
                        Some(row),
                        "a split of another name, met first in this row",
                    );
                    names.push(split.to_string());
                    names.len() - 1
                });
            let (first, first_row) = *members.entry(subject).or_insert((name, row));
            if first != name {
                findings.add(
                    Rule::SplitsDisjoint,
                    file,
                    Some(row),
                    format!("this subject is in another split already (row {first_row})"),
                );
            } else if first_row == row && subjects.binary_search(&subject).is_err() {
                findings.add(
                    Rule::SplitsKnown,
                    file,
                    Some(row),
                    "this subject has no rows in the data",
                );
            }
        }
    });
    if let Err(error) = read {
        add_error(findings, Rule::FileReadable, &path, &error);
        return;
    }
    let missing = subjects
        .iter()
        .filter(|subject| !members.contains_key(subject))
        .count();
    if missing > 0 {
        findings.add(
            Rule::SplitsCover,
            file,
            None,
            format!("{missing} of {} subjects are in no split", subjects.len()),
        );
    }
}
