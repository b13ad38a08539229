//! A changed copy of a fixture's folder: what a download or a conversion may have broken.

use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;

use super::fixture;

/// A tensor of a changed copy.
pub struct Owned {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// The tensors and the configuration of a fixture, to be changed and written elsewhere.
pub struct Copy {
    pub tensors: Vec<Owned>,
    pub config: Value,
    pub dir: tempfile::TempDir,
}

impl Copy {
    pub fn of(name: &str) -> Copy {
        let bytes = std::fs::read(fixture(name).join("model.safetensors")).unwrap();
        let stored = SafeTensors::deserialize(&bytes).unwrap();
        let mut tensors = stored.tensors();
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        let config = std::fs::read_to_string(fixture(name).join("config.json")).unwrap();
        Copy {
            tensors: tensors
                .into_iter()
                .map(|(name, view)| Owned {
                    name,
                    dtype: view.dtype(),
                    shape: view.shape().to_vec(),
                    bytes: view.data().to_vec(),
                })
                .collect(),
            config: serde_json::from_str(&config).unwrap(),
            dir: tempfile::tempdir().unwrap(),
        }
    }

    pub fn tensor(&mut self, name: &str) -> &mut Owned {
        self.tensors
            .iter_mut()
            .find(|tensor| tensor.name == name)
            .unwrap()
    }

    pub fn add(&mut self, name: &str, dtype: Dtype, shape: &[usize]) {
        let width = dtype.bitsize() / 8;
        self.tensors.push(Owned {
            name: name.to_owned(),
            dtype,
            shape: shape.to_vec(),
            bytes: vec![0; width * shape.iter().product::<usize>()],
        });
    }

    pub fn write(&self) -> &Path {
        std::fs::write(self.dir.path().join("config.json"), self.config.to_string()).unwrap();
        self.write_file("model.safetensors", |_| true);
        self.dir.path()
    }

    pub fn write_file(&self, file: &str, wanted: impl Fn(usize) -> bool) {
        let views = self
            .tensors
            .iter()
            .enumerate()
            .filter(|(index, _)| wanted(*index))
            .map(|(_, tensor)| {
                let view =
                    TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes).unwrap();
                (tensor.name.clone(), view)
            });
        let bytes = safetensors::serialize(views, None).unwrap();
        std::fs::write(self.dir.path().join(file), bytes).unwrap();
    }
}
