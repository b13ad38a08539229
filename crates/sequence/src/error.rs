use std::path::PathBuf;

use calor_records::RecordsError;

/// Everything that can go wrong between a cohort and a batch.
///
/// A message names the file and the rule, never a patient's identifier, value or text.
#[derive(Debug, thiserror::Error)]
pub enum SequenceError {
    #[error(transparent)]
    Records(#[from] RecordsError),

    #[error("{path}: {source}", path = path.display())]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },

    #[error(
        "{path} is missing: the checkpoint needs a tokenizer.json (Transformers writes one with \
         `AutoTokenizer.from_pretrained(…).save_pretrained(…)`)",
        path = path.display()
    )]
    TokenizerMissing { path: PathBuf },

    #[error("{path} is not a tokenizer this engine can run: {reason}", path = path.display())]
    TokenizerInvalid { path: PathBuf, reason: String },

    #[error("{path} is not valid JSON: {source}", path = path.display())]
    Json {
        path: PathBuf,
        source: serde_json::Error,
    },

    #[error("the tokenizer cannot encode a rendered sequence: {reason}")]
    Tokenize { reason: String },

    #[error("{path}: {problem}", path = path.display())]
    Item { path: PathBuf, problem: String },

    #[error("modality `{modality}`: {problem}")]
    Modality {
        modality: &'static str,
        problem: String,
    },

    #[error("sequence.{key} {problem}")]
    Option { key: &'static str, problem: String },

    #[error(
        "{samples} of {total} samples are longer than sequence.max_tokens = {max_tokens} (the \
         longest has {longest} tokens): raise max_tokens, or set overlength = \"drop_oldest_events\" \
         (patients), \"cut_end\" or \"cut_start\" (texts)"
    )]
    Overlong {
        samples: u64,
        total: u64,
        longest: u64,
        max_tokens: usize,
    },

    #[error(
        "sequence.max_tokens = {max_tokens} leaves no room for a patient's age and sex, which need \
         {needed} tokens with the special tokens: raise it"
    )]
    HeaderTooLong { needed: usize, max_tokens: usize },

    #[error("the labels of task `{task}` are {found}, and a {expected} task needs {needed}")]
    LabelKind {
        task: String,
        expected: &'static str,
        needed: &'static str,
        found: &'static str,
    },

    #[error("task `{task}`, label row {row} (in the order of subject and time): {problem}")]
    Label {
        task: String,
        row: usize,
        problem: String,
    },

    #[error("{path}, line {line}: the row {problem}", path = path.display())]
    Row {
        path: PathBuf,
        line: usize,
        problem: String,
    },

    #[error("{files} hold no row that anything can be learned of")]
    NoRows { files: String },

    #[error("{path}: {problem}", path = path.display())]
    Template { path: PathBuf, problem: String },

    #[error("task `{task}` has no labels")]
    NoLabels { task: String },

    #[error(
        "task `{task}` has labels of {labelled} subjects, and none of them is in the cohort's data"
    )]
    NoPatients { task: String, labelled: usize },

    #[error(
        "no labelled patient belongs to the split `train`, so quantiles have nothing to be computed \
         from: does metadata/subject_splits.parquet name the labelled patients?"
    )]
    NoTrainingPatients,

    #[error(
        "a sequence of {length} tokens (position {position}) does not fit into rows of {capacity}"
    )]
    DoesNotPack {
        position: usize,
        length: usize,
        capacity: usize,
    },

    #[error("{what} must be at least 1")]
    Zero { what: &'static str },
}

impl SequenceError {
    pub(crate) fn io(path: &std::path::Path, source: std::io::Error) -> Self {
        Self::Io {
            path: path.to_path_buf(),
            source,
        }
    }
}
