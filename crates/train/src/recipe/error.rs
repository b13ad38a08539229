//! What is wrong with a recipe.

use std::fmt;
use std::path::PathBuf;

/// A recipe that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// The file cannot be read.
    #[error("cannot read the recipe {}", path.display())]
    Read {
        /// The recipe.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// Keys or values are wrong; all that were found.
    #[error("{}", Problem::list(problems))]
    Problems {
        /// In the order of the file; `--set` assignments last.
        problems: Vec<Problem>,
    },
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// File and line, or the `--set` assignment.
    pub place: Place,
    /// Dotted path of the key; empty where there is none.
    pub key: String,
    /// What is wrong.
    pub message: String,
    /// What to do, a whole clause; empty where the message says it.
    pub hint: String,
}

/// Where a problem is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// The recipe's file, and the line from 1 where it is known.
    File(PathBuf, Option<usize>),
    /// An assignment of the command line, as it was written.
    Set(String),
}

impl fmt::Display for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::File(path, Some(line)) => write!(formatter, "{}:{line}", path.display()),
            Place::File(path, None) => write!(formatter, "{}", path.display()),
            Place::Set(assignment) => write!(formatter, "--set {assignment}"),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}", self.place, self.message)?;
        if !self.hint.is_empty() {
            write!(formatter, "; {}", self.hint)?;
        }
        Ok(())
    }
}

impl Problem {
    fn list(problems: &[Problem]) -> String {
        problems
            .iter()
            .map(Problem::to_string)
            .collect::<Vec<_>>()
            .join("\n")
    }
}

impl RecipeError {
    /// Everything that was found, none where the file could not be read.
    pub fn problems(&self) -> &[Problem] {
        match self {
            RecipeError::Read { .. } => &[],
            RecipeError::Problems { problems } => problems,
        }
    }
}
