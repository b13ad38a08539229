//! Everything that can go wrong between a checkpoint folder and a running model.

use std::path::PathBuf;

use thiserror::Error;

/// Why a checkpoint, an adapter or a reference could not be used. Each says where, and what to do.
#[derive(Debug, Error)]
pub enum ModelError {
    /// A file or folder could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// A JSON file is not JSON, or a key of it has another type than expected.
    #[error("{}: not valid: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where in it, and why.
        source: serde_json::Error,
    },
    /// `config.json` asks for something that is not built.
    #[error("{}: `{key}` is {value}, which is not supported; {supported}", path.display())]
    Unsupported {
        /// The configuration file.
        path: PathBuf,
        /// The key.
        key: String,
        /// Its value, as written.
        value: String,
        /// What is supported instead.
        supported: String,
    },
    /// `config.json` (or `adapter_config.json`) contradicts itself or lacks a key.
    #[error("{}: {message}", path.display())]
    Config {
        /// The configuration file.
        path: PathBuf,
        /// What is wrong and what to do.
        message: String,
    },
    /// No weights in the folder.
    #[error(
        "{}: neither model.safetensors nor model.safetensors.index.json is here; \
         a PyTorch .bin checkpoint has to be converted to safetensors first",
        path.display()
    )]
    NoWeights {
        /// The folder.
        path: PathBuf,
    },
    /// The header of a safetensors file is wrong, or the file is shorter or longer than it says.
    #[error("{}: {message}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        message: String,
    },
    /// A tensor's entry in a safetensors header is wrong.
    #[error("{}: tensor `{tensor}`: {message}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name in the file.
        tensor: String,
        /// What is wrong with it.
        message: String,
    },
    /// A tensor the architecture needs is not there.
    #[error(
        "{}: tensor `{tensor}` {expected:?} is missing; the files do not hold the model that \
         its configuration describes",
        path.display()
    )]
    MissingTensor {
        /// The checkpoint or adapter folder.
        path: PathBuf,
        /// The name that was looked for.
        tensor: String,
        /// Its expected shape.
        expected: Vec<usize>,
    },
    /// A tensor that no part of the model uses.
    #[error(
        "{}: tensor `{tensor}` belongs to no part of the model; the files do not hold the model \
         that its configuration describes",
        path.display()
    )]
    UnusedTensor {
        /// The checkpoint or adapter folder.
        path: PathBuf,
        /// The tensor's name in the file.
        tensor: String,
    },
    /// A tensor with another shape than the configuration gives it.
    #[error(
        "{}: tensor `{tensor}` has shape {found:?}, the configuration asks for {expected:?}",
        path.display()
    )]
    Shape {
        /// The checkpoint or adapter folder.
        path: PathBuf,
        /// The tensor's name in the file.
        tensor: String,
        /// The shape in the file.
        found: Vec<usize>,
        /// The shape the configuration asks for.
        expected: Vec<usize>,
    },
    /// Options that do not fit the model.
    #[error("{message}")]
    Options {
        /// What is wrong and what to do.
        message: String,
    },
    /// A stream of modality items whose options fit neither the model nor the data.
    #[error("stream `{stream}`: {message}")]
    Stream {
        /// The stream's name.
        stream: String,
        /// What is wrong and what to do.
        message: String,
    },
    /// A pattern of the adapter's options is not a regular expression.
    #[error("`{pattern}` is not a regular expression: {source}")]
    Pattern {
        /// The pattern as given.
        pattern: String,
        /// Why.
        #[source]
        source: Box<fancy_regex::Error>,
    },
    /// The adapter's `target_modules` matches nothing, or something LoRA cannot adapt.
    #[error("target `{module}`: {message}")]
    Target {
        /// The pattern or module path.
        module: String,
        /// What is wrong and what to do.
        message: String,
    },
    /// A reference file lacks something or does not fit the model.
    #[error("{}: {message}", path.display())]
    Reference {
        /// The reference file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
}

impl ModelError {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> ModelError {
        let path = path.into();
        move |source| ModelError::Io { path, source }
    }

    pub(crate) fn options(message: impl Into<String>) -> ModelError {
        ModelError::Options {
            message: message.into(),
        }
    }
}
