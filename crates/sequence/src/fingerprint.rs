use std::path::Path;
use std::time::UNIX_EPOCH;

use calor_records::Cohort;
use sha2::{Digest, Sha256};

use crate::SequenceError;

/// SHA-256 of what tells one state of a cohort from another: the path under the cohort, length and
/// time of change of every shard, and the contents of the metadata. Reading all rows to hash them
/// would take as long as the preparation that a cache is there to save.
pub(crate) fn fingerprint(cohort: &Cohort) -> Result<[u8; 32], SequenceError> {
    let mut hash = Sha256::new();
    for shard in cohort.shards() {
        let metadata = std::fs::metadata(&shard.path)
            .map_err(|error| SequenceError::io(&shard.path, error))?;
        let changed = metadata
            .modified()
            .map_err(|error| SequenceError::io(&shard.path, error))?;
        // Before 1970 counts backwards; either way the number differs when the time does.
        let changed_ns = match changed.duration_since(UNIX_EPOCH) {
            Ok(since) => since.as_nanos() as i128,
            Err(before) => -(before.duration().as_nanos() as i128),
        };
        let name = shard
            .path
            .strip_prefix(cohort.path())
            .unwrap_or(&shard.path);
        update(&mut hash, name.as_os_str().as_encoded_bytes());
        hash.update(metadata.len().to_le_bytes());
        hash.update(changed_ns.to_le_bytes());
    }
    update(&mut hash, cohort.sites().unwrap_or("").as_bytes());
    for name in ["dataset.json", "codes.parquet", "subject_splits.parquet"] {
        let path = cohort.path().join("metadata").join(name);
        update(&mut hash, &contents(&path)?);
    }
    Ok(hash.finalize().into())
}

/// Empty for a file that is not there: all three are optional.
fn contents(path: &Path) -> Result<Vec<u8>, SequenceError> {
    match std::fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other.map_err(|error| SequenceError::io(path, error)),
    }
}

/// Each part after its length, so that no two different inputs read the same.
fn update(hash: &mut Sha256, bytes: &[u8]) {
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}
