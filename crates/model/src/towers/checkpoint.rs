//! A folder with a pretrained encoder: `config.json` and the weights.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::error::ModelError;
use crate::stored::Stored;

use super::config::TowerConfig;
use super::tensors;

/// An opened and checked folder; no weight has been read yet.
#[derive(Debug)]
pub struct TowerCheckpoint {
    path: PathBuf,
    config: TowerConfig,
    pub(super) stored: Stored,
    unused: Vec<String>,
}

impl TowerCheckpoint {
    /// Opens the folder `dir` and checks every tensor of the tower by its name, type, shape and
    /// length; other parts of a larger model may be there too.
    ///
    /// # Errors
    /// An unsupported `config.json`, missing files, a wrong header or truncated file, and a tensor
    /// that is missing, misshapen, of a type that weights do not have or used by nothing: each
    /// names the file and the tensor.
    pub fn open(dir: &Path) -> Result<TowerCheckpoint, ModelError> {
        let config = TowerConfig::read(dir)?;
        let tower_type = config.tower_type;
        let stored = Stored::open(dir, |name| tower_type.canonical(name))?;
        let prefix = stored.prefix(tower_type.prefixes());
        let loose = tensors::loose(&config).into_iter();
        let expected = loose
            .map(|loose| (format!("{}.{}", loose.module, loose.tensor), loose.shape))
            .chain(
                tensors::modules(&config)
                    .into_iter()
                    .flat_map(|module| module.tensors()),
            );
        let mut used = BTreeSet::new();
        for (name, shape) in expected {
            if !stored.check(&name, &shape)? {
                return Err(ModelError::MissingTensor {
                    path: dir.to_owned(),
                    tensor: format!("{prefix}{}", tower_type.hub_name(&name)),
                    expected: shape,
                });
            }
            used.insert(name);
        }
        let unused = stored.unused(&used, |name| tower_type.tolerated(name))?;
        Ok(TowerCheckpoint {
            path: dir.to_owned(),
            config,
            stored,
            unused,
        })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What its `config.json` says.
    pub fn config(&self) -> &TowerConfig {
        &self.config
    }

    /// Tensors that are there and that the tower does not read: the other parts of the model;
    /// worth a line in a log.
    pub fn unused_tensors(&self) -> &[String] {
        &self.unused
    }
}
