//! A JSON object read key by key, with errors that name the file and the key.

use std::path::Path;

use serde_json::{Map, Value};

use crate::config::Activation;
use crate::error::ModelError;

/// The most layers a configuration may ask for; keeps a damaged file from costing memory.
const LAYERS_MAX: usize = 10_000;

/// Reads a file that holds one JSON object.
pub(crate) fn read_object(path: &Path) -> Result<Map<String, Value>, ModelError> {
    let text = std::fs::read_to_string(path).map_err(ModelError::io(path))?;
    serde_json::from_str(&text).map_err(|source| ModelError::Json {
        path: path.to_owned(),
        source,
    })
}

/// `config.json` or a part of it.
pub(crate) struct Keys<'a> {
    pub path: &'a Path,
    pub object: &'a Map<String, Value>,
}

impl<'a> Keys<'a> {
    pub fn new(path: &'a Path, object: &'a Map<String, Value>) -> Keys<'a> {
        Keys { path, object }
    }

    /// Refuses checkpoints whose weights are stored in fewer bits.
    pub fn not_quantized(&self) -> Result<(), ModelError> {
        match self.get("quantization_config") {
            None => Ok(()),
            Some(_) => Err(self.unsupported(
                "quantization_config",
                "use the checkpoint's f32, f16 or bf16 version",
            )),
        }
    }

    /// A number of layers.
    pub fn layers(&self, key: &str, default: Option<usize>) -> Result<usize, ModelError> {
        let layers = match default {
            Some(default) => self.sized(key, default)?,
            None => self.required(key)?,
        };
        match layers {
            0..=LAYERS_MAX => Ok(layers),
            _ => Err(self.unsupported(key, "at most 10000 layers")),
        }
    }

    /// Width of each head; both numbers come with the key they were read from.
    pub fn head_dim(
        &self,
        (width_key, width): (&str, usize),
        (heads_key, heads): (&str, usize),
    ) -> Result<usize, ModelError> {
        if heads == 0 || !width.is_multiple_of(heads) {
            return Err(self.config(format!(
                "`{width_key}` ({width}) is not a multiple of `{heads_key}` ({heads})"
            )));
        }
        Ok(width / heads)
    }

    /// The activation of feed-forward blocks and poolers.
    pub fn activation(&self, key: &str, default: Activation) -> Result<Activation, ModelError> {
        match self.text(key)? {
            None => Ok(default),
            Some("gelu" | "gelu_python") => Ok(Activation::Gelu),
            // Four spellings of one formula in Transformers.
            Some("gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" | "gelu_accurate") => {
                Ok(Activation::GeluTanh)
            }
            Some("quick_gelu") => Ok(Activation::QuickGelu),
            Some("relu") => Ok(Activation::Relu),
            Some("silu" | "swish") => Ok(Activation::Silu),
            Some("tanh") => Ok(Activation::Tanh),
            Some(_) => Err(self.unsupported(
                key,
                "use gelu, gelu_new, gelu_fast, gelu_pytorch_tanh, quick_gelu, relu, silu or tanh",
            )),
        }
    }

    /// The key's value; `null` counts as absent.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    pub fn required(&self, key: &str) -> Result<usize, ModelError> {
        match self.size(key)? {
            Some(0) => Err(self.wrong(key, "at least 1")),
            Some(value) => Ok(value),
            None => Err(self.config(format!("`{key}` is missing"))),
        }
    }

    /// As [`Keys::size`] but never 0, with the default of the configuration class.
    pub fn sized(&self, key: &str, default: usize) -> Result<usize, ModelError> {
        match self.size(key)? {
            Some(0) => Err(self.wrong(key, "at least 1")),
            value => Ok(value.unwrap_or(default)),
        }
    }

    pub fn size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        self.get(key)
            .map(|value| {
                value
                    .as_u64()
                    .and_then(|value| usize::try_from(value).ok())
                    .ok_or_else(|| self.wrong(key, "a whole number"))
            })
            .transpose()
    }

    pub fn number(&self, key: &str) -> Result<Option<f64>, ModelError> {
        self.get(key)
            .map(|value| value.as_f64().ok_or_else(|| self.wrong(key, "a number")))
            .transpose()
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>, ModelError> {
        self.get(key)
            .map(|value| {
                value
                    .as_bool()
                    .ok_or_else(|| self.wrong(key, "true or false"))
            })
            .transpose()
    }

    pub fn text(&self, key: &str) -> Result<Option<&str>, ModelError> {
        self.get(key)
            .map(|value| value.as_str().ok_or_else(|| self.wrong(key, "a text")))
            .transpose()
    }

    pub fn texts(&self, key: &str) -> Result<Vec<String>, ModelError> {
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(values)) => values
                .iter()
                .map(|value| {
                    value
                        .as_str()
                        .map(str::to_owned)
                        .ok_or_else(|| self.wrong(key, "a list of texts"))
                })
                .collect(),
            Some(_) => Err(self.wrong(key, "a list of texts")),
        }
    }

    pub fn unsupported(&self, key: &str, supported: &str) -> ModelError {
        ModelError::Unsupported {
            path: self.path.to_owned(),
            key: key.to_owned(),
            value: match self.object.get(key) {
                Some(value) => value.to_string(),
                None => "not given".to_owned(),
            },
            supported: supported.to_owned(),
        }
    }

    pub fn wrong(&self, key: &str, expected: &str) -> ModelError {
        self.config(format!(
            "`{key}` is {}, expected {expected}",
            self.object.get(key).unwrap_or(&Value::Null)
        ))
    }

    pub fn config(&self, message: impl Into<String>) -> ModelError {
        ModelError::Config {
            path: self.path.to_owned(),
            message: message.into(),
        }
    }
}
