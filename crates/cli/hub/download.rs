//! One file from the hub into the cache, with its progress, compared with the promised digest.

use std::fs;
use std::io::{self, IsTerminal};
use std::path::Path;

use hf_hub::api::sync::{ApiError, ApiRepo};
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};

use super::SnapshotFile;
use crate::failure::Failure;
use crate::output;

/// Downloads one file unless it is there, and compares it with the digest that the hub names.
pub(super) fn download(repo: &ApiRepo, folder: &Path, name: &str) -> Result<SnapshotFile, Failure> {
    let path = folder.join(name);
    if !path.exists() {
        repo.download_with_progress(name, Download::new(name))
            .map_err(|error| download_failure(name, error))?;
    }
    // The cache keeps a file under its entity tag, which for large files is its SHA-256.
    let blob = fs::canonicalize(&path)?;
    let promised = blob
        .file_name()
        .and_then(|tag| tag.to_str())
        .filter(|tag| is_sha256(tag))
        .map(str::to_owned);
    if let Some(promised) = &promised {
        let digest = sha256(&blob)?;
        if digest != *promised {
            return Err(Failure::failed(format!(
                "{name} is damaged: its SHA-256 is {digest}, the hub promised {promised}"
            ))
            .hint(format!("remove {} and fetch again", blob.display())));
        }
    }
    Ok(SnapshotFile {
        name: name.to_owned(),
        bytes: fs::metadata(&path)?.len(),
        sha256: promised,
    })
}

fn download_failure(name: &str, error: ApiError) -> Failure {
    let hint = match &error {
        ApiError::InvalidResume => {
            "an earlier download left a longer piece than the file: remove the `.part` files from the cache's `blobs` folder and fetch again"
        }
        ApiError::LockAcquisition(_) => {
            "another program is fetching the same file: wait for it, then fetch again"
        }
        ApiError::IoError(_) => {
            "look at the space and the rights of the cache folder, then fetch again: the download goes on where it stopped"
        }
        _ => "fetch again: the download goes on where it stopped",
    };
    Failure::failed(format!("cannot download {name}: {error}")).hint(hint)
}

fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn sha256(path: &Path) -> io::Result<String> {
    let mut digest = Sha256::new();
    io::copy(&mut fs::File::open(path)?, &mut digest)?;
    Ok(digest
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

/// A bar on a terminal, a line a file elsewhere.
struct Download {
    name: String,
    bar: Option<ProgressBar>,
    started: bool,
}

impl Download {
    fn new(name: &str) -> Download {
        let bar = io::stderr().is_terminal().then(|| {
            let style = "{msg}  {bytes}/{total_bytes}  {wide_bar:.dim}  {bytes_per_sec}  {eta}";
            let style = ProgressStyle::with_template(style)
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(0)
                .with_style(style)
                .with_message(name.to_owned())
        });
        Download {
            name: name.to_owned(),
            bar,
            started: false,
        }
    }
}

impl hf_hub::api::Progress for Download {
    fn init(&mut self, size: usize, _name: &str) {
        match &self.bar {
            Some(bar) => {
                bar.set_length(size as u64);
                bar.set_position(0);
            }
            // Called again at each attempt; a log needs the line once.
            None if !self.started => {
                eprintln!("Fetching {} ({})", self.name, output::bytes(size as u64))
            }
            None => {}
        }
        self.started = true;
    }

    fn update(&mut self, size: usize) {
        if let Some(bar) = &self.bar {
            bar.inc(size as u64);
        }
    }

    fn finish(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish();
        }
    }
}
