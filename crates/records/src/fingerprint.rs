//! What identifies the bytes of a cohort, for caches and for the record of a run.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::RecordsError;
use crate::files::parquet_files;
use crate::metadata::{CODES_FILE, DATASET_FILE, SPLITS_FILE};

/// Files up to this size are always hashed whole.
const WHOLE_BYTES: u64 = 16 << 20;
/// Of a larger file, so much of its end is hashed: Parquet keeps offsets, sizes and statistics there.
const TAIL_BYTES: u64 = 64 << 10;

/// The files of a cohort and what identifies each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Sorted by path.
    pub files: Vec<FileFingerprint>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileFingerprint {
    /// Relative to the cohort.
    pub path: PathBuf,
    pub bytes: u64,
    /// Time of the last change; `None` where the whole content is hashed.
    pub modified_ns: Option<u64>,
    /// SHA-256, hexadecimal, of the whole content or of the last 64 KiB.
    pub sha256: String,
}

impl Fingerprint {
    /// SHA-256, hexadecimal, over all of it.
    pub fn digest(&self) -> String {
        let mut hasher = Sha256::new();
        for file in &self.files {
            let path = file.path.as_os_str().as_encoded_bytes();
            hasher.update((path.len() as u64).to_le_bytes());
            hasher.update(path);
            hasher.update(file.bytes.to_le_bytes());
            hasher.update(file.modified_ns.unwrap_or(u64::MAX).to_le_bytes());
            hasher.update(file.sha256.as_bytes());
        }
        hex(&hasher.finalize())
    }

    /// Quick: files above 16 MiB are known by their size, time of change and last 64 KiB.
    pub(crate) fn quick(cohort: &Path) -> Result<Fingerprint, RecordsError> {
        Self::of(cohort, WHOLE_BYTES)
    }

    /// Every file hashed whole: the same wherever the cohort lies and whenever it was copied.
    pub(crate) fn content(cohort: &Path) -> Result<Fingerprint, RecordsError> {
        Self::of(cohort, u64::MAX)
    }

    fn of(cohort: &Path, whole_bytes: u64) -> Result<Fingerprint, RecordsError> {
        let mut paths = parquet_files(&cohort.join("data"))?;
        for name in [DATASET_FILE, CODES_FILE, SPLITS_FILE] {
            let path = cohort.join(name);
            if path.is_file() {
                paths.push(path);
            }
        }
        paths.sort();
        let files = paths
            .par_iter()
            .map(|path| {
                hash_file(cohort, path, whole_bytes)
                    .map_err(|source| RecordsError::io(path, source))
            })
            .collect::<Result<_, RecordsError>>()?;
        Ok(Fingerprint { files })
    }
}

fn hash_file(cohort: &Path, path: &Path, whole_bytes: u64) -> std::io::Result<FileFingerprint> {
    let mut file = File::open(path)?;
    let metadata = file.metadata()?;
    let bytes = metadata.len();
    let mut modified_ns = None;
    if bytes > whole_bytes {
        file.seek(SeekFrom::Start(bytes.saturating_sub(TAIL_BYTES)))?;
        let age = metadata.modified()?.duration_since(UNIX_EPOCH);
        modified_ns = Some(age.map_or(0, |age| age.as_nanos() as u64));
    }
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        hasher.update(&buffer[..read]);
    }
    Ok(FileFingerprint {
        path: path.strip_prefix(cohort).unwrap_or(path).to_path_buf(),
        bytes,
        modified_ns,
        sha256: hex(&hasher.finalize()),
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cohort() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("data/a")).unwrap();
        std::fs::write(folder.path().join("data/a/0.parquet"), b"abc").unwrap();
        std::fs::write(folder.path().join("data/1.parquet"), b"def").unwrap();
        folder
    }

    #[test]
    fn it_changes_with_the_bytes_and_names_and_with_nothing_else() {
        let (first, second) = (cohort(), cohort());
        let print = Fingerprint::quick(first.path()).unwrap();
        assert_eq!(print, Fingerprint::quick(second.path()).unwrap());
        assert_eq!(
            print.digest(),
            Fingerprint::content(second.path()).unwrap().digest()
        );
        // SHA-256 of "def", from sha256sum.
        assert_eq!(
            print.files[0].sha256,
            "cb8379ac2098aa165029e3938a51da0bcecfc008fd6795f401178647f96c5b34"
        );

        std::fs::write(second.path().join("data/1.parquet"), b"deg").unwrap();
        let changed = Fingerprint::quick(second.path()).unwrap();
        assert_ne!(print.digest(), changed.digest());
        std::fs::rename(
            first.path().join("data/1.parquet"),
            first.path().join("data/2.parquet"),
        )
        .unwrap();
        let renamed = Fingerprint::quick(first.path()).unwrap();
        assert_ne!(print.digest(), renamed.digest());
        std::fs::create_dir(first.path().join("metadata")).unwrap();
        std::fs::write(first.path().join(DATASET_FILE), b"{}").unwrap();
        let described = Fingerprint::quick(first.path()).unwrap();
        assert_ne!(renamed.digest(), described.digest());
    }

    #[test]
    fn a_large_file_is_known_by_its_end_and_its_time() {
        let folder = cohort();
        let print = Fingerprint::of(folder.path(), 2).unwrap();
        assert!(print.files.iter().all(|file| file.modified_ns.is_some()));
        let path = folder.path().join("data/1.parquet");
        let before = Fingerprint::of(folder.path(), 2).unwrap().digest();
        assert_eq!(print.digest(), before);
        let file = File::options().write(true).open(&path).unwrap();
        file.set_modified(UNIX_EPOCH + std::time::Duration::from_secs(1))
            .unwrap();
        assert_ne!(Fingerprint::of(folder.path(), 2).unwrap().digest(), before);
    }
}
