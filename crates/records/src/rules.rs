//! The rules a cohort is checked against, and what was found.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;

/// Findings of one rule that a report shows in full; the others are counted.
const FINDINGS_SHOWN: usize = 20;

/// Whether a finding makes the cohort unfit or is only worth knowing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    Error,
    Warning,
}

macro_rules! rules {
    ($($variant:ident, $name:literal, $severity:ident, $statement:literal;)*) => {
        /// A rule of MEDS 0.4 (errors), of Calor's path columns and survival sidecar (errors), or
        /// advice (warnings).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Rule {
            $(#[doc = $statement] $variant,)*
        }

        impl Rule {
            pub const ALL: &'static [Rule] = &[$(Rule::$variant,)*];

            pub fn name(self) -> &'static str {
                match self { $(Rule::$variant => $name,)* }
            }

            pub fn severity(self) -> Severity {
                match self { $(Rule::$variant => Severity::$severity,)* }
            }

            pub fn statement(self) -> &'static str {
                match self { $(Rule::$variant => $statement,)* }
            }
        }
    };
}

rules! {
    DataFiles, "data_files", Error,
        "`data/` holds at least one .parquet file.";
    FileReadable, "file_readable", Error,
        "Every file is whole and can be decoded.";
    SubjectIdType, "subject_id_type", Error,
        "Every data file has a column `subject_id` of type int64.";
    SubjectIdNotNull, "subject_id_not_null", Error,
        "`subject_id` is never null.";
    TimeType, "time_type", Error,
        "Every data file has a column `time` of type timestamp[us] without a time zone.";
    CodeType, "code_type", Error,
        "Every data file has a column `code` of strings.";
    CodeNotNull, "code_not_null", Error,
        "`code` is never null.";
    NumericValueType, "numeric_value_type", Error,
        "`numeric_value`, if there, is float32.";
    TextValueType, "text_value_type", Error,
        "`text_value`, if there, is a column of strings.";
    SubjectInOneFile, "subject_in_one_file", Error,
        "A subject's rows are all in one file.";
    SubjectContiguous, "subject_contiguous", Error,
        "A subject's rows stand together.";
    TimeSorted, "time_sorted", Error,
        "A subject's rows are sorted by time.";
    StaticFirst, "static_first", Error,
        "A subject's rows without time stand before those with one.";
    PathType, "path_type", Error,
        "`image_path`, `waveform_path`, `omics_path` and `audio_path`, if there, are columns of \
         strings.";
    PathInside, "path_inside", Error,
        "The path of an item is relative to the cohort's folder and stays inside it.";
    PathFile, "path_file", Error,
        "The path of an item names a file that is there.";
    DatasetJson, "dataset_json", Error,
        "`metadata/dataset.json` is a JSON object.";
    DatasetFields, "dataset_fields", Error,
        "The fields of `dataset.json` have the types MEDS gives them.";
    DatasetCreatedAt, "dataset_created_at", Error,
        "`created_at` in `dataset.json` is a time of ISO 8601.";
    DatasetColumns, "dataset_columns", Error,
        "Columns named in `dataset.json` are in the data; code modifiers are strings.";
    CodesSchema, "codes_schema", Error,
        "`metadata/codes.parquet` has `code` (string), and `description` (string) and \
         `parent_codes` (list of string) if there are such.";
    CodesNotNull, "codes_not_null", Error,
        "`code` in `codes.parquet` is never null.";
    CodesComplete, "codes_complete", Error,
        "Every code of the data is in `codes.parquet`.";
    SplitsSchema, "splits_schema", Error,
        "`metadata/subject_splits.parquet` has `subject_id` (int64) and `split` (string), and \
         nothing else.";
    SplitsNotNull, "splits_not_null", Error,
        "`subject_id` and `split` in `subject_splits.parquet` are never null.";
    SplitsDisjoint, "splits_disjoint", Error,
        "No subject is in two splits.";
    LabelsSchema, "labels_schema", Error,
        "A label file has `subject_id` (int64), `prediction_time` (timestamp[us]), and of \
         `boolean_value`, `integer_value` (int64), `float_value` (float32) and \
         `categorical_value` (string) at least one; nothing else.";
    LabelsNotNull, "labels_not_null", Error,
        "No column of a label file has a null.";
    LabelsOneKind, "labels_one_kind", Error,
        "A task has values in one column alone, and they are finite.";
    SurvivalSchema, "survival_schema", Error,
        "A survival sidecar has `subject_id` (int64), `prediction_time` (timestamp[us]), \
         `duration_days` (float32) and `event` (int32).";
    SurvivalValues, "survival_values", Error,
        "A survival sidecar has no null, no negative or non-finite duration and no negative event.";
    DatasetMissing, "dataset_missing", Warning,
        "`metadata/dataset.json` is there.";
    CodesMissing, "codes_missing", Warning,
        "`metadata/codes.parquet` is there; without it a code is all that is known of an event.";
    CodesDescribed, "codes_described", Warning,
        "Every code of the data has a description.";
    CodesUnique, "codes_unique", Warning,
        "`codes.parquet` has one row a code.";
    SplitsMissing, "splits_missing", Warning,
        "`metadata/subject_splits.parquet` is there; training needs it.";
    SplitsNames, "splits_names", Warning,
        "Splits are called `train`, `tuning` and `held_out`; others are not used.";
    SplitsKnown, "splits_known", Warning,
        "Every subject of `subject_splits.parquet` is in the data.";
    SplitsCover, "splits_cover", Warning,
        "Every subject of the data is in `subject_splits.parquet`.";
    LabelsKnown, "labels_known", Warning,
        "Every subject of a label file or a survival sidecar is in the data.";
    NumbersFinite, "numbers_finite", Warning,
        "`numeric_value` is null or finite; what is not a number is read as null.";
}

impl Serialize for Rule {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// One breach of a rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Relative to the cohort.
    pub file: Option<PathBuf>,
    /// Counted from 0 in the file.
    pub row: Option<u64>,
    pub message: String,
}

/// What came of one rule.
#[derive(Clone, Debug, Serialize)]
pub struct RuleReport {
    pub rule: Rule,
    pub severity: Severity,
    pub statement: &'static str,
    /// All breaches, shown or not.
    pub count: u64,
    /// The first of them, by file and row.
    pub findings: Vec<Finding>,
}

/// What came of validating a cohort.
#[derive(Clone, Debug, Serialize)]
pub struct ValidationReport {
    pub path: PathBuf,
    pub data_files: usize,
    pub rows: u64,
    pub subjects: u64,
    pub valid: bool,
    pub errors: u64,
    pub warnings: u64,
    /// Every rule, kept or broken.
    pub rules: Vec<RuleReport>,
}

impl ValidationReport {
    pub fn rule(&self, rule: Rule) -> Option<&RuleReport> {
        self.rules.iter().find(|report| report.rule == rule)
    }

    /// The rules that were broken, errors first.
    pub fn broken(&self) -> impl Iterator<Item = &RuleReport> {
        self.rules.iter().filter(|report| report.count > 0)
    }
}

/// Findings gathered along the way, bounded for each rule.
pub(crate) struct Findings {
    root: PathBuf,
    rules: BTreeMap<Rule, (u64, Vec<Finding>)>,
}

impl Findings {
    pub(crate) fn new(root: &Path) -> Findings {
        Findings {
            root: root.to_path_buf(),
            rules: BTreeMap::new(),
        }
    }

    pub(crate) fn add(
        &mut self,
        rule: Rule,
        file: Option<&Path>,
        row: Option<u64>,
        message: impl Into<String>,
    ) {
        let (count, shown) = self.rules.entry(rule).or_default();
        *count += 1;
        if shown.len() < FINDINGS_SHOWN {
            shown.push(Finding {
                file: file.map(|file| file.strip_prefix(&self.root).unwrap_or(file).to_path_buf()),
                row,
                message: message.into(),
            });
        }
    }

    pub(crate) fn count(&self, rule: Rule) -> u64 {
        self.rules.get(&rule).map_or(0, |(count, _)| *count)
    }

    /// Appends the findings of files that come later.
    pub(crate) fn append(&mut self, later: Findings) {
        for (rule, (count, findings)) in later.rules {
            let (total, shown) = self.rules.entry(rule).or_default();
            *total += count;
            let room = FINDINGS_SHOWN.saturating_sub(shown.len());
            shown.extend(findings.into_iter().take(room));
        }
    }

    pub(crate) fn report(
        mut self,
        data_files: usize,
        rows: u64,
        subjects: u64,
    ) -> ValidationReport {
        let rules: Vec<RuleReport> = Rule::ALL
            .iter()
            .map(|&rule| {
                let (count, findings) = self.rules.remove(&rule).unwrap_or_default();
                RuleReport {
                    rule,
                    severity: rule.severity(),
                    statement: rule.statement(),
                    count,
                    findings,
                }
            })
            .collect();
        let total = |severity| {
            rules
                .iter()
                .filter(|report| report.severity == severity)
                .map(|report| report.count)
                .sum()
        };
        let errors = total(Severity::Error);
        ValidationReport {
            path: self.root,
            data_files,
            rows,
            subjects,
            valid: errors == 0,
            errors,
            warnings: total(Severity::Warning),
            rules,
        }
    }
}
