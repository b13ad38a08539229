//! Which files of a repository or a folder make a checkpoint.

use std::fs;
use std::path::Path;

use super::SnapshotFile;
use crate::failure::Failure;

pub(super) const INDEX: &str = "model.safetensors.index.json";
pub(super) const SINGLE: &str = "model.safetensors";
/// Small files that say how text becomes tokens; taken when the repository has them.
pub(super) const OPTIONAL: [&str; 5] = [
    "preprocessor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
];

/// What a repository is fetched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A language model: text becomes tokens.
    LanguageModel,
    /// The encoder of a modality.
    Tower,
}

impl Purpose {
    /// Files that have to be there beside the weights.
    pub(super) fn needed(self) -> &'static [&'static str] {
        match self {
            Purpose::LanguageModel => &["config.json", "tokenizer.json"],
            Purpose::Tower => &["config.json"],
        }
    }
}

/// How a checkpoint's weights are stored.
pub(super) enum Weights {
    Single,
    Sharded,
}

/// How the weights are stored, or what is missing from the list of files.
pub(super) fn weight_files(files: &[String], purpose: Purpose) -> Result<Weights, String> {
    let has = |name: &str| files.iter().any(|file| file == name);
    let needed = purpose.needed().iter().copied();
    let missing: Vec<&str> = needed.filter(|name| !has(name)).collect();
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
pub(super) fn shards_of(index: &Path) -> Result<Vec<String>, Failure> {
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
pub(super) fn checkpoint_files(folder: &Path, purpose: Purpose) -> Option<Vec<SnapshotFile>> {
    let needed = purpose.needed().iter();
    let mut names: Vec<String> = needed.map(|name| (*name).to_owned()).collect();
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

#[cfg(test)]
mod tests {
    use super::*;

    fn names(files: &[&str]) -> Vec<String> {
        files.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn a_repository_says_what_it_lacks() {
        let missing = |files: &[&str]| {
            weight_files(&names(files), Purpose::LanguageModel)
                .err()
                .unwrap_or_default()
        };
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
        assert!(checkpoint_files(folder.path(), Purpose::LanguageModel).is_none());
        fs::write(
            folder.path().join(INDEX),
            r#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#,
        )
        .unwrap();
        fs::write(folder.path().join("1.safetensors"), "x").unwrap();
        assert!(checkpoint_files(folder.path(), Purpose::LanguageModel).is_none());
        fs::write(folder.path().join("2.safetensors"), "yz").unwrap();
        let files = checkpoint_files(folder.path(), Purpose::LanguageModel).unwrap();
        assert_eq!(
            files.iter().map(|file| file.bytes).sum::<u64>(),
            2 + 2 + 60 + 1 + 2
        );
    }
}
