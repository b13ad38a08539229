//! Files and folders that appear whole or not at all.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::TrainError;

/// Writes `bytes` to a temporary file beside `path`, makes them durable and renames.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), TrainError> {
    let temporary = beside(path, "partial");
    let written = (|| {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()
    })();
    if let Err(error) = written {
        let _ = fs::remove_file(&temporary);
        return Err(TrainError::io("write", path)(error));
    }
    fs::rename(&temporary, path).map_err(TrainError::io("rename the new file to", path))?;
    sync_parent(path)
}

/// Writes a value as indented JSON with a final newline; see [`write_whole`].
pub(crate) fn write_json<T: serde::Serialize>(path: &Path, value: &T) -> Result<(), TrainError> {
    let mut bytes = serde_json::to_vec_pretty(value).map_err(|error| TrainError::Corrupt {
        path: path.to_owned(),
        problem: format!("cannot be written as JSON: {error}"),
    })?;
    bytes.push(b'\n');
    write_whole(path, &bytes)
}

/// Reads a JSON file.
pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, TrainError> {
    let bytes = fs::read(path).map_err(TrainError::io("read", path))?;
    serde_json::from_slice(&bytes).map_err(|error| TrainError::Corrupt {
        path: path.to_owned(),
        problem: format!("is not what it should be: {error}"),
    })
}

/// Fills a new folder through `fill` and puts it at `path`, replacing what is there. Whoever
/// looks at `path` sees the old folder or the new one, complete.
///
/// Between the two renames of a replacement there is no folder at `path`; the old one
/// then lies beside it and [`recover_folder`] puts it back.
pub(crate) fn write_folder(
    path: &Path,
    fill: impl FnOnce(&Path) -> Result<(), TrainError>,
) -> Result<(), TrainError> {
    let temporary = beside(path, "partial");
    remove(&temporary)?;
    fs::create_dir_all(&temporary).map_err(TrainError::io("create", &temporary))?;
    fill(&temporary)?;
    sync_tree(&temporary).map_err(TrainError::io("make durable", &temporary))?;
    let old = beside(path, "old");
    remove(&old)?;
    if path.exists() {
        fs::rename(path, &old).map_err(TrainError::io("set aside", path))?;
    }
    fs::rename(&temporary, path).map_err(TrainError::io("rename the new folder to", path))?;
    sync_parent(path)?;
    remove(&old)
}

/// Completes or undoes a replacement by [`write_folder`] that was cut off.
pub(crate) fn recover_folder(path: &Path) -> Result<(), TrainError> {
    let old = beside(path, "old");
    if old.exists() {
        if path.exists() {
            remove(&old)?;
        } else {
            fs::rename(&old, path).map_err(TrainError::io("restore", path))?;
        }
    }
    remove(&beside(path, "partial"))
}

/// SHA-256 of a file's bytes in hexadecimal, and its length.
pub(crate) fn hash_file(path: &Path) -> Result<(String, u64), TrainError> {
    let mut file = File::open(path).map_err(TrainError::io("read", path))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut length = 0;
    loop {
        match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => {
                hash.update(&buffer[..count]);
                length += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(TrainError::io("read", path)(error)),
        }
    }
    Ok((hex(&hash.finalize()), length))
}

/// Bytes in hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// All files below `folder`, relative to it, sorted.
pub(crate) fn files_below(folder: &Path) -> Result<Vec<PathBuf>, TrainError> {
    fn visit(folder: &Path, relative: &Path, found: &mut Vec<PathBuf>) -> io::Result<()> {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let relative = relative.join(entry.file_name());
            if entry.file_type()?.is_dir() {
                visit(&entry.path(), &relative, found)?;
            } else {
                found.push(relative);
            }
        }
        Ok(())
    }
    let mut found = Vec::new();
    visit(folder, Path::new(""), &mut found).map_err(TrainError::io("list", folder))?;
    found.sort();
    Ok(found)
}

/// Removes a file or a folder with all in it, if there is one.
pub(crate) fn remove(path: &Path) -> Result<(), TrainError> {
    let removed = match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    };
    removed.map_err(TrainError::io("remove", path))
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{suffix}"))
}

fn sync_parent(path: &Path) -> Result<(), TrainError> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(parent)
        .and_then(|folder| folder.sync_all())
        .map_err(TrainError::io("make durable", parent))
}

fn sync_tree(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_tree(&entry.path())?;
        } else {
            File::open(entry.path())?.sync_all()?;
        }
    }
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_replaced_as_a_whole_and_a_failure_leaves_the_old_one() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("adapter");
        let fill = |text: &'static str| {
            move |folder: &Path| write_whole(&folder.join("a"), text.as_bytes())
        };
        write_folder(&path, fill("one")).unwrap();
        write_folder(&path, fill("two")).unwrap();
        assert_eq!(fs::read_to_string(path.join("a")).unwrap(), "two");
        let failed = write_folder(&path, |_| {
            Err(TrainError::RunFolder {
                path: PathBuf::new(),
                problem: String::new(),
            })
        });
        assert!(failed.is_err());
        assert_eq!(fs::read_to_string(path.join("a")).unwrap(), "two");
        recover_folder(&path).unwrap();
        assert_eq!(
            files_below(home.path()).unwrap(),
            [PathBuf::from("adapter/a")]
        );
    }

    #[test]
    fn a_replacement_cut_off_between_the_renames_is_undone() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("adapter");
        write_folder(&path, |folder| write_whole(&folder.join("a"), b"one")).unwrap();
        fs::rename(&path, home.path().join(".adapter.old")).unwrap();
        fs::create_dir(home.path().join(".adapter.partial")).unwrap();
        recover_folder(&path).unwrap();
        assert_eq!(fs::read_to_string(path.join("a")).unwrap(), "one");
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_hash_is_sha_256() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("x");
        write_whole(&path, b"abc").unwrap();
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(hash_file(&path).unwrap(), (expected.to_owned(), 3));
    }
}
