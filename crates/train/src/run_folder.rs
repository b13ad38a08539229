//! The folder of a run: who may write there, and what it was started with.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::TrainError;
use crate::checkpoint::Checkpoints;
use crate::files::{hex, recover_folder, write_whole};
use crate::recipe::Recipe;

/// Keys that a resumed run may change: they shape no number of the training.
const MAY_CHANGE: [&str; 8] = [
    "name",
    "energy.",
    "train.keep_checkpoints",
    "train.checkpoint_every_steps",
    "evaluate.resamples",
    "train.recompute",
    "train.offload",
    "train.preflight",
];

/// A run's folder, held by this process alone.
pub struct RunFolder {
    path: PathBuf,
    recipe_sha256: String,
    /// The lock lasts as long as the open file.
    _lock: File,
}

impl RunFolder {
    /// Takes the folder for a new run, or for one that goes on. What an attempt left that failed
    /// before its first step (a path that was wrong, say) is no run.
    ///
    /// # Errors
    /// Another process works on it; it holds a run and `resume` is off; it holds the run of
    /// another recipe.
    pub fn open(path: &Path, recipe: &Recipe, resume: bool) -> Result<RunFolder, TrainError> {
        fs::create_dir_all(path).map_err(TrainError::io("create", path))?;
        let wrong = |problem: String| TrainError::RunFolder {
            path: path.to_owned(),
            problem,
        };
        let lock_path = path.join(".lock");
        let lock = File::create(&lock_path).map_err(TrainError::io("create", &lock_path))?;
        lock.try_lock().map_err(|error| match error {
            std::fs::TryLockError::WouldBlock => wrong(
                "another process is working on this run; wait for it or give another --out"
                    .to_owned(),
            ),
            std::fs::TryLockError::Error(source) => TrainError::io("lock", &lock_path)(source),
        })?;
        let recipe_path = path.join("recipe.toml");
        if recipe_path.exists() && has_begun(path)? {
            if !resume {
                return Err(wrong(
                    "holds a run already; go on with it by --resume, or give another --out"
                        .to_owned(),
                ));
            }
            let earlier = Recipe::load(&recipe_path, &[])?;
            let changed = differences(&earlier, recipe);
            if !changed.is_empty() {
                let changed = changed
                    .iter()
                    .map(|(key, was, is)| format!("\n  {key}: {was} then, {is} now"))
                    .collect::<String>();
                return Err(wrong(format!(
                    "was started with another recipe, so it cannot be resumed with this one:{changed}\nresume with {} or give another --out",
                    recipe_path.display()
                )));
            }
        }
        recover_folder(&path.join("adapter"))?;
        Checkpoints::new(path, 1).clean()?;
        let text = recipe.to_toml(&format!(
            "calor train {} --out {} --resume",
            recipe_path.display(),
            path.display()
        ));
        write_whole(&recipe_path, text.as_bytes())?;
        Ok(RunFolder {
            path: path.to_owned(),
            recipe_sha256: hash_text(&text),
            _lock: lock,
        })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// SHA-256 of `recipe.toml`.
    pub fn recipe_sha256(&self) -> &str {
        &self.recipe_sha256
    }

    /// Where the adapter is kept.
    pub fn adapter(&self) -> PathBuf {
        self.path.join("adapter")
    }
}

/// Whether a step was done, or something was left that a step leaves.
fn has_begun(path: &Path) -> Result<bool, TrainError> {
    let metrics = path.join("metrics.jsonl");
    let steps = metrics.exists()
        && fs::metadata(&metrics)
            .map_err(TrainError::io("read", &metrics))?
            .len()
            > 0;
    let left = [
        "adapter",
        "checkpoints",
        "predictions.parquet",
        "report.json",
    ];
    Ok(steps || left.iter().any(|name| path.join(name).exists()))
}

/// SHA-256 of a text in hexadecimal.
pub(crate) fn hash_text(text: &str) -> String {
    hex(&Sha256::digest(text.as_bytes()))
}

/// Keys that differ, with both values.
fn differences(earlier: &Recipe, now: &Recipe) -> Vec<(String, String, String)> {
    let (earlier, now) = (flat(earlier), flat(now));
    let mut keys: Vec<&String> = earlier.keys().chain(now.keys()).collect();
    keys.sort();
    keys.dedup();
    let text = |values: &BTreeMap<String, String>, key: &String| {
        values
            .get(key)
            .cloned()
            .unwrap_or_else(|| "not given".to_owned())
    };
    keys.into_iter()
        .filter(|key| {
            !MAY_CHANGE
                .iter()
                .any(|known| *key == known || (known.ends_with('.') && key.starts_with(known)))
        })
        .filter(|key| earlier.get(*key) != now.get(*key))
        .map(|key| (key.clone(), text(&earlier, key), text(&now, key)))
        .collect()
}

fn flat(recipe: &Recipe) -> BTreeMap<String, String> {
    fn visit(prefix: &str, value: &toml::Value, found: &mut BTreeMap<String, String>) {
        match value {
            toml::Value::Table(table) => {
                for (key, value) in table {
                    let path = if prefix.is_empty() {
                        key.clone()
                    } else {
                        format!("{prefix}.{key}")
                    };
                    visit(&path, value, found);
                }
            }
            value => {
                found.insert(prefix.to_owned(), value.to_string());
            }
        }
    }
    let mut found = BTreeMap::new();
    let value =
        toml::Value::try_from(recipe).expect("a recipe holds nothing that TOML cannot write");
    visit("", &value, &mut found);
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(set: &[&str]) -> Recipe {
        let text = "schema = 1\nname = \"x\"\n[model]\nid = \"m\"\n[task]\nkind = \"binary\"\nlabels = \"l\"\n[cohort]\npath = \"/c\"\n";
        Recipe::parse(
            text,
            Path::new("x.toml"),
            &set.iter().map(|set| (*set).to_owned()).collect::<Vec<_>>(),
        )
        .unwrap()
    }

    #[test]
    fn a_run_is_resumed_with_its_own_recipe_alone_and_on_request() {
        let home = tempfile::tempdir().unwrap();
        let out = home.path().join("run");
        drop(RunFolder::open(&out, &recipe(&[]), false).unwrap());
        // Nothing was done yet: the folder is free, for another recipe too.
        fs::write(out.join("metrics.jsonl"), "").unwrap();
        drop(RunFolder::open(&out, &recipe(&["adapter.r=2"]), false).unwrap());
        drop(RunFolder::open(&out, &recipe(&[]), false).unwrap());
        fs::write(out.join("metrics.jsonl"), "{}\n").unwrap();
        let complaint = |recipe: Recipe, resume| {
            RunFolder::open(&out, &recipe, resume)
                .map(|_| ())
                .unwrap_err()
                .to_string()
        };
        assert!(complaint(recipe(&[]), false).contains("--resume"));
        let other = complaint(recipe(&["train.learning_rate=1e-3", "adapter.r=4"]), true);
        assert!(
            other.contains("train.learning_rate: 0.0002 then, 0.001 now")
                && other.contains("adapter.r: 16 then, 4 now"),
            "{other}"
        );
        RunFolder::open(
            &out,
            &recipe(&["energy.idle_window_s=0", "evaluate.resamples=200"]),
            true,
        )
        .unwrap();
    }

    #[test]
    fn two_processes_do_not_write_to_one_run() {
        let home = tempfile::tempdir().unwrap();
        let _held = RunFolder::open(home.path(), &recipe(&[]), false).unwrap();
        let error = RunFolder::open(home.path(), &recipe(&[]), true)
            .map(|_| ())
            .unwrap_err();
        assert!(error.to_string().contains("another process"), "{error}");
    }
}
