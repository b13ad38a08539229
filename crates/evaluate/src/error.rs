//! Why predictions cannot be evaluated. No message holds a value or a patient's identifier.

/// What is wrong with the input of an evaluation, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EvaluateError {
    /// There are no rows.
    #[error("there are no predictions to evaluate: the split is empty")]
    Empty,

    /// More rows than an index can name.
    #[error(
        "{rows} predictions are too many: at most {} can be evaluated at once",
        u32::MAX
    )]
    TooManyRows { rows: usize },

    /// Arrays that belong together differ in length.
    #[error("{what} has {found} entries, and {expected} were expected")]
    LengthMismatch {
        what: &'static str,
        expected: usize,
        found: usize,
    },

    /// A prediction or a target is NaN or infinite.
    #[error(
        "{what} in row {row}{} is not a finite number: the model or its labels are broken there",
        column_text(*.column)
    )]
    NotFinite {
        what: &'static str,
        row: usize,
        column: Option<usize>,
    },

    /// A probability is not from 0 to 1.
    #[error(
        "the prediction in row {row}{} is not a probability from 0 to 1: apply the sigmoid or softmax first",
        column_text(*.column)
    )]
    NotAProbability { row: usize, column: Option<usize> },

    /// The probabilities of a row do not add up to 1.
    #[error("the class probabilities in row {row} do not sum to 1: apply the softmax first")]
    RowSum { row: usize },

    /// A target names a class that does not exist.
    #[error("the target in row {row} is not among the {classes} classes")]
    ClassOutOfRange { row: usize, classes: usize },

    /// A task with too few classes or labels.
    #[error("{what} must be at least {least}, and is {found}")]
    TooFew {
        what: &'static str,
        least: usize,
        found: usize,
    },

    /// An option means nothing.
    #[error("`{key}` {reason}")]
    InvalidOption {
        key: &'static str,
        reason: &'static str,
    },

    /// A single metric has no value on this input.
    #[error("{metric} is undefined: {reason}")]
    Undefined {
        metric: &'static str,
        reason: String,
    },
}

fn column_text(column: Option<usize>) -> String {
    column.map_or(String::new(), |column| format!(", column {column}"))
}
