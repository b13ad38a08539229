//! A synthetic cohort that is made where it is needed: the default data of a recipe.

use std::path::{Path, PathBuf};

use crate::error::RecordsError;
use crate::files::partial_name;

use super::options::SynthOptions;
use super::write::{MODEL_FILE, synthesize};

/// Sees to it that `path` holds the synthetic cohort of these options; whether it had to be made.
///
/// A cohort is made beside `path` and moved there when it is complete, so that `path` never holds a
/// part of one. Where two processes make the same cohort, the first one's is kept. `progress` is that
/// of [`synthesize`].
///
/// # Errors
/// What [`synthesize`] refuses; a folder that holds something else, or the cohort of other options.
pub fn ensure_synthetic(
    path: &Path,
    options: &SynthOptions,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<bool, RecordsError> {
    options.check()?;
    if is_there(path, options)? {
        return Ok(false);
    }
    let name = path.file_name().ok_or_else(|| RecordsError::Write {
        path: path.to_path_buf(),
        reason: "it names no folder".to_string(),
    })?;
    let scratch = Scratch(path.with_file_name(partial_name(name)));
    scratch.clear()?;
    synthesize(&scratch.0, options, progress)?;
    match std::fs::rename(&scratch.0, path) {
        Ok(()) => Ok(true),
        Err(source) => match is_there(path, options) {
            Ok(true) => Ok(false),
            Ok(false) => Err(RecordsError::io(path, source)),
            Err(error) => Err(error),
        },
    }
}

/// Removed when it is dropped; once it was moved, there is nothing to remove.
struct Scratch(PathBuf);

impl Scratch {
    /// Of what a killed process with the same number left.
    fn clear(&self) -> Result<(), RecordsError> {
        match std::fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(RecordsError::io(&self.0, error))
            }
            _ => Ok(()),
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Whether the cohort is there; an error where something else is.
fn is_there(path: &Path, options: &SynthOptions) -> Result<bool, RecordsError> {
    match std::fs::read_dir(path).map(|mut entries| entries.next().is_none()) {
        Ok(true) => return Ok(false),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Ok(false) => {}
        Err(source) => return Err(RecordsError::io(path, source)),
    }
    let file = path.join(MODEL_FILE);
    let found = match std::fs::read(&file) {
        Ok(bytes) => serde_json::from_slice::<serde_json::Value>(&bytes)
            .and_then(|mut value| serde_json::from_value(value["report"]["options"].take()))
            .map_err(|source| RecordsError::Json { path: file, source })?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(RecordsError::NotSynthetic {
                path: path.to_path_buf(),
            });
        }
        Err(source) => return Err(RecordsError::io(&file, source)),
    };
    match difference(&found, options) {
        None => Ok(true),
        Some(difference) => Err(RecordsError::OtherSynthetic {
            path: path.to_path_buf(),
            difference,
        }),
    }
}

/// The first option that differs: `patients` 4000 instead of 8000.
fn difference(found: &SynthOptions, wanted: &SynthOptions) -> Option<String> {
    let fields = |options| match serde_json::to_value(options) {
        Ok(serde_json::Value::Object(fields)) => fields,
        _ => serde_json::Map::new(),
    };
    let (found, wanted) = (fields(found), fields(wanted));
    wanted.iter().find_map(|(name, wanted)| {
        let found = found.get(name)?;
        (found != wanted).then(|| format!("`{name}` {found} instead of {wanted}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Cohort;

    fn options(patients: u64) -> SynthOptions {
        SynthOptions {
            patients,
            modalities: vec![super::super::SynthModality::Register],
            ..SynthOptions::default()
        }
    }

    #[test]
    fn a_cohort_is_made_once_and_that_of_other_options_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/cohort");
        assert!(ensure_synthetic(&path, &options(20), &|_| {}).unwrap());
        assert_eq!(Cohort::open(&path).unwrap().shards().len(), 1);
        assert!(!ensure_synthetic(&path, &options(20), &|_| panic!("made again")).unwrap());
        let left: Vec<_> = std::fs::read_dir(path.parent().unwrap()).unwrap().collect();
        assert_eq!(left.len(), 1);

        let error = ensure_synthetic(&path, &options(21), &|_| {}).unwrap_err();
        assert!(
            error.to_string().contains("`patients` 20 instead of 21"),
            "{error}"
        );
    }

    #[test]
    fn a_folder_of_something_else_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("thesis.txt"), "years").unwrap();
        let error = ensure_synthetic(folder.path(), &options(20), &|_| {}).unwrap_err();
        assert!(
            matches!(error, RecordsError::NotSynthetic { .. }),
            "{error}"
        );
        assert!(folder.path().join("thesis.txt").exists());
    }

    #[test]
    fn nothing_is_left_of_a_cohort_that_could_not_be_made() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cohort");
        assert!(ensure_synthetic(&path, &options(0), &|_| {}).is_err());
        assert!(std::fs::read_dir(folder.path()).unwrap().next().is_none());
    }
}
