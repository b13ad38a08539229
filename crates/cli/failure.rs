//! How a command ends: exit statuses, and errors as people read them.

use std::error::Error;
use std::fmt;

use calor_train::TrainError;
use calor_train::recipe::RecipeError;

/// Exit statuses, as schedulers and scripts see them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// Failed while running, or what was checked is not as it should be.
    Failed = 1,
    /// The command line or the recipe is wrong.
    Usage = 2,
    /// Stopped by a signal, with a checkpoint written: `--resume` goes on from it.
    Stopped = 3,
}

/// Why a command did not do what it was asked.
#[derive(Debug)]
pub struct Failure {
    /// With what status to exit.
    pub exit: Exit,
    error: Box<dyn Error + Send + Sync>,
    hint: Option<String>,
}

impl Failure {
    /// The command line or the recipe is wrong.
    pub fn usage(message: impl Into<String>) -> Failure {
        Failure {
            exit: Exit::Usage,
            error: message.into().into(),
            hint: None,
        }
    }

    /// Something failed while running.
    pub fn failed(message: impl Into<String>) -> Failure {
        Failure {
            exit: Exit::Failed,
            error: message.into().into(),
            hint: None,
        }
    }

    /// Adds what to do about it.
    pub fn hint(mut self, hint: impl Into<String>) -> Failure {
        self.hint = Some(hint.into());
        self
    }
}

impl<E: Error + Send + Sync + 'static> From<E> for Failure {
    fn from(error: E) -> Failure {
        let any = &error as &dyn std::any::Any;
        let usage = any.is::<RecipeError>()
            || any
                .downcast_ref::<TrainError>()
                .is_some_and(TrainError::is_usage);
        let exit = if usage { Exit::Usage } else { Exit::Failed };
        Failure {
            exit,
            error: Box::new(error),
            hint: None,
        }
    }
}

/// The message, each cause on a line of its own, and the hint.
impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut said = self.error.to_string();
        write!(formatter, "error: {said}")?;
        let mut source = self.error.source();
        while let Some(cause) = source {
            let text = cause.to_string();
            // Some messages already say their cause.
            if !said.contains(&text) {
                write!(
                    formatter,
                    "\n  cause: {}",
                    text.replace('\n', "\n         ")
                )?;
                said = text;
            }
            source = cause.source();
        }
        if let Some(hint) = &self.hint {
            write!(formatter, "\n  hint: {}", hint.replace('\n', "\n        "))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Outer(std::io::Error);

    impl fmt::Display for Outer {
        fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(formatter, "cannot read recipe.toml")
        }
    }

    impl Error for Outer {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            Some(&self.0)
        }
    }

    #[test]
    fn causes_and_hint_stand_on_lines_of_their_own() {
        let error = Outer(std::io::Error::other("the disk is gone"));
        let failure = Failure::from(error).hint("mount it");
        assert_eq!(
            failure.to_string(),
            "error: cannot read recipe.toml\n  cause: the disk is gone\n  hint: mount it"
        );
        assert_eq!(failure.exit, Exit::Failed);
    }

    #[test]
    fn a_message_is_not_said_twice() {
        let inner = std::io::Error::other("the disk is gone");
        let wrapped = std::io::Error::other(inner);
        assert_eq!(
            Failure::from(wrapped).to_string(),
            "error: the disk is gone"
        );
    }
}
