//! Builds the model's parts from a checkpoint: reads tensors, decides which are trained, draws new
//! ones.

use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::architecture::{ModuleSpec, TaskClass};
use crate::checkpoint::Checkpoint;
use crate::error::ModelError;
use crate::linear::{Linear, LowRank};
use crate::lora::{Pair, Plan};
use crate::matching;
use crate::norm::{LayerNorm, RmsNorm};
use crate::parameter::{Parameter, ParameterKind};
use crate::random::Stream;

pub(crate) struct Builder<'a> {
    pub checkpoint: &'a Checkpoint,
    pub class: TaskClass,
    pub plan: Plan,
    pub modules_to_save: Vec<String>,
    pub dtype: DType,
    pub seed: u64,
    pub device: &'a Device,
}

impl Builder<'_> {
    /// A linear module of the backbone, by its name without class prefix.
    pub fn linear(&self, name: &str, bias: bool) -> Result<Linear, ModelError> {
        let path = self.path(name);
        Ok(Linear {
            weight: self.stored(name, &path, "weight")?,
            bias: match bias {
                true => Some(self.stored(name, &path, "bias")?),
                false => None,
            },
            lora: None,
        }
        .with_pair(self, &path))
    }

    /// As [`Builder::linear`]; drawn as Transformers does where the checkpoint lacks it.
    pub fn linear_or_new(&self, spec: &ModuleSpec) -> Result<Linear, ModelError> {
        if spec.tensors().all(|(name, _)| self.checkpoint.has(&name)) {
            return self.linear(&spec.path, spec.bias);
        }
        let path = self.path(&spec.path);
        Ok(self.drawn(spec, &path, self.kind(&path)))
    }

    /// A linear module of a head: the checkpoint's where it has one of this shape, else new.
    pub fn head(&self, spec: &ModuleSpec, kind: ParameterKind) -> Result<Linear, ModelError> {
        let fits = spec
            .tensors()
            .all(|(name, shape)| self.checkpoint.shape(&name) == Some(&shape));
        if !fits || kind == ParameterKind::Own {
            return Ok(self.drawn(spec, &spec.path, kind));
        }
        fn read<const D: usize>(
            builder: &Builder,
            name: String,
            kind: ParameterKind,
        ) -> Result<Parameter<D>, ModelError> {
            let value = builder
                .checkpoint
                .tensor(&name, DType::F32, builder.device)?;
            Ok(Parameter::new(name, value, kind))
        }
        Ok(Linear {
            weight: read(self, format!("{}.weight", spec.path), kind)?,
            bias: match spec.bias {
                true => Some(read(self, format!("{}.bias", spec.path), kind)?),
                false => None,
            },
            lora: None,
        })
    }

    pub fn embedding(&self, name: &str) -> Result<Parameter<2>, ModelError> {
        self.stored(name, &self.path(name), "weight")
    }

    pub fn rms_norm(&self, name: &str, epsilon: f64) -> Result<RmsNorm, ModelError> {
        Ok(RmsNorm {
            weight: self.stored(name, &self.path(name), "weight")?,
            epsilon,
        })
    }

    pub fn layer_norm(&self, name: &str, epsilon: f64) -> Result<LayerNorm, ModelError> {
        let path = self.path(name);
        Ok(LayerNorm {
            weight: self.stored(name, &path, "weight")?,
            bias: self.stored(name, &path, "bias")?,
            epsilon,
        })
    }

    /// The decoder's output layer: stored on its own, or the token embedding where `embedding` is
    /// given. The second of the returned pair says whether it stays the embedding in training.
    pub fn lm_head(&self, embedding: Option<&Parameter<2>>) -> Result<(Linear, bool), ModelError> {
        let name = "lm_head";
        let kind = self.kind(name);
        let (weight, tied) = match embedding {
            None => (self.stored(name, name, "weight")?, false),
            Some(embedding) => {
                // PEFT trains a copy of whichever of the two `modules_to_save` names.
                let tied = kind == ParameterKind::Frozen && embedding.kind == ParameterKind::Frozen;
                let tensor = embedding.tensor.clone().inner();
                let weight = Parameter::new(format!("{name}.weight"), tensor, kind);
                (weight, tied)
            }
        };
        let head = Linear {
            weight,
            bias: None,
            lora: None,
        };
        Ok((head.with_pair(self, name), tied))
    }

    /// Path in the Transformers class.
    fn path(&self, name: &str) -> String {
        let prefix = self.class.prefix(self.checkpoint.config().model_type);
        format!("{prefix}{name}")
    }

    fn kind(&self, path: &str) -> ParameterKind {
        if matching::saved(&self.modules_to_save, path) {
            ParameterKind::Saved
        } else {
            ParameterKind::Frozen
        }
    }

    fn stored<const D: usize>(
        &self,
        name: &str,
        path: &str,
        tensor: &str,
    ) -> Result<Parameter<D>, ModelError> {
        let kind = self.kind(path);
        // What is trained is kept in f32: small updates vanish in half precision.
        let dtype = match kind {
            ParameterKind::Frozen => self.dtype,
            _ => DType::F32,
        };
        let value = self
            .checkpoint
            .tensor(&format!("{name}.{tensor}"), dtype, self.device)?;
        Ok(Parameter::new(format!("{path}.{tensor}"), value, kind))
    }

    /// New weights as Transformers draws them: normal with `initializer_range`, biases zero.
    fn drawn(&self, spec: &ModuleSpec, path: &str, kind: ParameterKind) -> Linear {
        let deviation = self.checkpoint.config().initializer_range;
        let shape = [spec.shape[0], spec.shape[1]];
        let weight = format!("{path}.weight");
        let values = Stream::new(self.seed, &weight).normal(spec.shape.iter().product(), deviation);
        let dtype = match kind {
            ParameterKind::Frozen => self.dtype,
            _ => DType::F32,
        };
        let data = TensorData::new(values, shape);
        let tensor = Tensor::<2>::from_data(data, (self.device, DType::F32)).cast(dtype);
        Linear {
            weight: Parameter::new(weight, tensor, kind),
            bias: spec.bias.then(|| {
                Parameter::new(
                    format!("{path}.bias"),
                    Tensor::zeros([spec.shape[0]], (self.device, dtype)),
                    kind,
                )
            }),
            lora: None,
        }
        .with_pair(self, path)
    }

    /// The pair of a module: `A` uniform as PEFT draws it (Kaiming with a = √5, which is
    /// `±1/√in`), `B` zero.
    fn pair(&self, path: &str, pair: &Pair, input: usize, output: usize) -> LowRank {
        let name = format!("{path}.lora_A.weight");
        let bound = 1.0 / (input as f64).sqrt();
        let a = Stream::new(self.seed, &name).uniform(pair.rank * input, bound);
        let a = Tensor::from_data(
            TensorData::new(a, [pair.rank, input]),
            (self.device, DType::F32),
        );
        let b = Tensor::zeros([output, pair.rank], (self.device, DType::F32));
        LowRank {
            a: Parameter::new(name, a, ParameterKind::Adapter),
            b: Parameter::new(format!("{path}.lora_B.weight"), b, ParameterKind::Adapter),
            scaling: pair.scaling,
            dropout: pair.dropout,
            index: pair.index,
        }
    }
}

impl Linear {
    fn with_pair(mut self, builder: &Builder, path: &str) -> Linear {
        let [output, input] = self.weight.tensor.dims();
        self.lora = builder
            .plan
            .get(path)
            .map(|pair| builder.pair(path, pair, input, output));
        self
    }
}
