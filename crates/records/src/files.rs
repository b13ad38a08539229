//! Folders walked in a fixed order, files written whole or not at all.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::RecordsError;

/// Every `*.parquet` file under `folder`, at any depth, sorted by path. Hidden files and folders
/// are passed over.
pub(crate) fn parquet_files(folder: &Path) -> Result<Vec<PathBuf>, RecordsError> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        let entries =
            std::fs::read_dir(&folder).map_err(|source| RecordsError::io(&folder, source))?;
        for entry in entries {
            let entry = entry.map_err(|source| RecordsError::io(&folder, source))?;
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                continue;
            }
            let path = entry.path();
            let metadata =
                std::fs::metadata(&path).map_err(|source| RecordsError::io(&path, source))?;
            if metadata.is_dir() {
                folders.push(path);
            } else if path
                .extension()
                .is_some_and(|extension| extension == "parquet")
            {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

/// What something is called until it is complete: hidden, and told apart by the process.
pub(crate) fn partial_name(name: &OsStr) -> OsString {
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".{}.partial", std::process::id()));
    hidden
}

/// A file that appears under its name when it is complete: written beside it, synced, renamed.
pub(crate) struct PendingFile {
    path: PathBuf,
    temporary: PathBuf,
    file: Option<File>,
}

impl PendingFile {
    pub(crate) fn create(path: &Path) -> Result<PendingFile, RecordsError> {
        let name = path.file_name().ok_or_else(|| RecordsError::Write {
            path: path.to_path_buf(),
            reason: "it names no file".to_string(),
        })?;
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(|source| RecordsError::io(folder, source))?;
        }
        let temporary = path.with_file_name(partial_name(name));
        let file =
            File::create(&temporary).map_err(|source| RecordsError::io(&temporary, source))?;
        Ok(PendingFile {
            path: path.to_path_buf(),
            temporary,
            file: Some(file),
        })
    }

    pub(crate) fn handle(&self) -> Result<File, RecordsError> {
        match &self.file {
            Some(file) => file
                .try_clone()
                .map_err(|source| RecordsError::io(&self.temporary, source)),
            None => Err(RecordsError::Write {
                path: self.path.clone(),
                reason: "it is already complete".to_string(),
            }),
        }
    }

    pub(crate) fn commit(mut self) -> Result<(), RecordsError> {
        if let Some(mut file) = self.file.take() {
            file.flush()
                .and_then(|()| file.sync_all())
                .map_err(|source| RecordsError::io(&self.temporary, source))?;
        }
        std::fs::rename(&self.temporary, &self.path)
            .map_err(|source| RecordsError::io(&self.path, source))
    }
}

impl Drop for PendingFile {
    fn drop(&mut self) {
        if self.file.is_some() {
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), RecordsError> {
    let pending = PendingFile::create(path)?;
    let mut file = pending.handle()?;
    file.write_all(bytes)
        .map_err(|source| RecordsError::io(path, source))?;
    pending.commit()
}
