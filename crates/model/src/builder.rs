//! Builds the model's parts from a checkpoint: reads tensors, decides which are trained, draws new
//! ones.

use burn::tensor::{DType, Device, Tensor, TensorData};

use calor_kernels::{HostWeight, Quantization, QuantizedWeight};

use crate::architecture::{ModuleSpec, Parts, Role};
use crate::bitsandbytes;
use crate::config::{ModelConfig, NormKind};
use crate::dora::Dora;
use crate::embedding::{EmbeddingPair, TokenEmbedding, TrainedRows};
use crate::error::ModelError;
use crate::linear::{Linear, LowRank};
use crate::lora::{BiasMode, Pair, PairInit, Plan};
use crate::matching;
use crate::names::{OUTPUT_LAYER, Slot};
use crate::norm::{LayerNorm, Norm, RmsNorm};
use crate::parameter::{Parameter, ParameterKind};
use crate::pissa::Start;
use crate::random::Stream;
use crate::stored::Stored;
use crate::weight::{QuantizedParameter, Weight};
use crate::weights::TensorFile;

pub(crate) struct Builder<'a> {
    pub stored: &'a Stored,
    /// What stands before the stored names in the paths of the Transformers class.
    pub prefix: &'static str,
    /// Standard deviation of weights that the checkpoint lacks.
    pub initializer_range: f64,
    pub plan: Plan,
    pub modules_to_save: Vec<String>,
    pub bias: BiasMode,
    /// Tokens whose embeddings are trained, and nothing else of the embedding.
    pub trained_tokens: Vec<u32>,
    pub dtype: DType,
    /// In how many bits frozen linear layers are kept; as they are stored, without.
    pub quantization: Option<Quantization>,
    pub seed: u64,
    /// An adapter that was saved from pairs with a start, to take the start from.
    pub starts: Option<TensorFile>,
    pub device: &'a Device,
}

impl Builder<'_> {
    /// A linear module of the backbone as its architecture describes it.
    ///
    /// # Errors
    /// One that is stored transposed and named by `modules_to_save`: PEFT would have it transposed.
    pub fn linear_of(&self, spec: &ModuleSpec) -> Result<Linear, ModelError> {
        if spec.role != Role::LinearTransposed {
            return self.linear(&spec.path, spec.bias);
        }
        let path = self.path(&spec.path);
        if self.kind(&path) != ParameterKind::Frozen {
            return Err(ModelError::Target {
                module: path,
                message: "is a `Conv1D`; training it in full is not built, give it a low-rank pair"
                    .to_owned(),
            });
        }
        Linear {
            weight: self.transposed_weight(spec, &path)?,
            bias: match spec.bias {
                true => Some(self.read(&spec.path, &path, "bias")?),
                false => None,
            },
            lora: None,
        }
        .with_pair(self, &path)
    }

    /// The frozen weight of a `Conv1D`, as `[out, in]`.
    fn transposed_weight(&self, spec: &ModuleSpec, path: &str) -> Result<Weight, ModelError> {
        let Some(quantization) = self.quantization else {
            let mut weight = self.read_as(&spec.path, path, "weight", |weight: Tensor<2>| {
                // Through the host, so that the transposed weight lies row by row: every product
                // would copy a transposed view.
                let (dtype, device) = (weight.dtype(), weight.device());
                Tensor::from_data(weight.transpose().into_data(), (&device, dtype))
            })?;
            weight.transposed = true;
            return Ok(weight.into());
        };
        let values = self.finite(&format!("{}.weight", spec.path))?;
        let [input, output] = [spec.shape[0], spec.shape[1]];
        let values: Vec<f32> = (0..output)
            .flat_map(|column| values[column..].iter().step_by(output).copied())
            .collect();
        let host = HostWeight::quantize(&values, input, quantization);
        Ok(self.quantized(format!("{path}.weight"), host, [output, input]))
    }

    /// A tensor's values, which are to be quantised.
    fn finite(&self, stored_name: &str) -> Result<Vec<f32>, ModelError> {
        let values = self.stored.floats(stored_name)?;
        if !values.iter().all(|value| value.is_finite()) {
            let message = "holds numbers that are not finite, which cannot be quantised";
            return Err(self.stored.wrong(stored_name, message));
        }
        Ok(values)
    }

    /// A linear module of the backbone, by its name without class prefix.
    pub fn linear(&self, name: &str, bias: bool) -> Result<Linear, ModelError> {
        let path = self.path(name);
        Linear {
            weight: self.weight(name, &path)?,
            bias: match bias {
                true => Some(self.read(name, &path, "bias")?),
                false => None,
            },
            lora: None,
        }
        .with_pair(self, &path)
    }

    /// The weight of a linear module: quantised where it is frozen and either the checkpoint has it
    /// so or `quantization` asks for it, one weight at a time.
    fn weight(&self, name: &str, path: &str) -> Result<Weight, ModelError> {
        let stored_name = format!("{name}.weight");
        let full_name = format!("{path}.weight");
        let kind = self.kind(path);
        let frozen = kind == ParameterKind::Frozen;
        if let Some((host, shape)) = bitsandbytes::read(self.stored, name)? {
            if frozen {
                return Ok(self.quantized(full_name, host, shape));
            }
            let values = host.dequantize(shape[0] * shape[1], shape[1]);
            let values = TensorData::new(values, shape);
            let values = Tensor::from_data(values, (self.device, DType::F32));
            return Ok(Parameter::new(full_name, values, kind).into());
        }
        let Some(quantization) = self.quantization.filter(|_| frozen) else {
            return Ok(self.read(name, path, "weight")?.into());
        };
        let values = self.finite(&stored_name)?;
        let shape = self.stored.shape(&stored_name).unwrap_or_default();
        let shape = [shape[0], shape[1]];
        let host = HostWeight::quantize(&values, shape[1], quantization);
        Ok(self.quantized(full_name, host, shape))
    }

    fn quantized(&self, name: String, host: HostWeight, shape: [usize; 2]) -> Weight {
        Weight::Quantized(QuantizedParameter {
            name,
            weight: Box::new(QuantizedWeight::new(host, shape, self.device)),
        })
    }

    /// A convolution as the linear layer it is on unfolded input: its weight of `R` dimensions
    /// `[out, in, …]` becomes `[out, in · …]`, `shape`.
    pub fn convolution<const R: usize>(
        &self,
        name: &str,
        shape: [usize; 2],
        bias: bool,
    ) -> Result<Linear, ModelError> {
        let path = self.path(name);
        Ok(Linear {
            weight: self
                .read_as(name, &path, "weight", |weight: Tensor<R>| {
                    weight.reshape(shape)
                })?
                .into(),
            bias: match bias {
                true => Some(self.read(name, &path, "bias")?),
                false => None,
            },
            lora: None,
        })
    }

    /// A tensor of `R` dimensions that is no module's weight or bias, such as a class token.
    pub fn loose<const R: usize, const D: usize>(
        &self,
        module: &str,
        tensor: &str,
        shape: [usize; D],
    ) -> Result<Parameter<D>, ModelError> {
        let path = self.path(module);
        self.read_as(module, &path, tensor, |value: Tensor<R>| {
            value.reshape(shape)
        })
    }

    /// A linear module behind the backbone, `prefix` before its path in the class; drawn as
    /// Transformers does where the checkpoint lacks it.
    pub fn linear_or_new(&self, spec: &ModuleSpec, prefix: &str) -> Result<Linear, ModelError> {
        let path = format!("{prefix}{}", spec.path);
        if !spec.tensors().all(|(name, _)| self.stored.has(&name)) {
            return self
                .drawn(spec, &path, self.kind(&path))
                .with_pair(self, &path);
        }
        Linear {
            weight: self.weight(&spec.path, &path)?,
            bias: match spec.bias {
                true => Some(self.read(&spec.path, &path, "bias")?),
                false => None,
            },
            lora: None,
        }
        .with_pair(self, &path)
    }

    /// The norm of a slot, where the model has one.
    pub fn norm_of(
        &self,
        parts: &Parts,
        slot: Slot,
        config: &ModelConfig,
    ) -> Result<Option<Norm>, ModelError> {
        let Some(spec) = parts.get(slot) else {
            return Ok(None);
        };
        let path = self.path(&spec.path);
        let weight = self.read(&spec.path, &path, "weight")?;
        let bias = match spec.bias {
            true => Some(self.read(&spec.path, &path, "bias")?),
            false => None,
        };
        Ok(Some(Norm::new(weight, bias, config)))
    }

    /// A norm behind the backbone, as [`Builder::linear_or_new`].
    pub fn norm_or_new(
        &self,
        spec: &ModuleSpec,
        prefix: &str,
        config: &ModelConfig,
    ) -> Result<Norm, ModelError> {
        let path = format!("{prefix}{}", spec.path);
        let stored = spec.tensors().all(|(name, _)| self.stored.has(&name));
        let kind = self.kind(&path);
        let parameter = |tensor: &str, start: f32| match stored {
            true => self.read(&spec.path, &path, tensor),
            false => {
                let values = Tensor::full([spec.shape[0]], start, (self.device, DType::F32));
                Ok(Parameter::new(format!("{path}.{tensor}"), values, kind))
            }
        };
        let weight = parameter("weight", 1.0)?;
        let bias = match spec.bias {
            true => Some(parameter("bias", 0.0)?),
            false => None,
        };
        Ok(Norm::new(weight, bias, config))
    }

    /// Whether the checkpoint has a head of this shape.
    pub fn has_head(&self, spec: &ModuleSpec) -> bool {
        spec.tensors()
            .all(|(name, shape)| self.stored.shape(&name) == Some(&shape))
    }

    /// A linear module of a head: the checkpoint's where it has one of this shape, else new.
    pub fn head(&self, spec: &ModuleSpec, kind: ParameterKind) -> Result<Linear, ModelError> {
        if !self.has_head(spec) || matches!(kind, ParameterKind::Own(_)) {
            return Ok(self.drawn(spec, &spec.path, kind));
        }
        fn read<const D: usize>(
            builder: &Builder,
            name: String,
            kind: ParameterKind,
        ) -> Result<Parameter<D>, ModelError> {
            let value = builder.stored.tensor(&name, DType::F32, builder.device)?;
            Ok(Parameter::new(name, value, kind))
        }
        Ok(Linear {
            weight: read::<2>(self, format!("{}.weight", spec.path), kind)?.into(),
            bias: match spec.bias {
                true => Some(read(self, format!("{}.bias", spec.path), kind)?),
                false => None,
            },
            lora: None,
        })
    }

    pub fn embedding(&self, name: &str) -> Result<Parameter<2>, ModelError> {
        self.read(name, &self.path(name), "weight")
    }

    /// The embedding of the vocabulary, with what an adapter adds to it.
    pub fn token_embedding(
        &self,
        name: &str,
        padding: Option<u32>,
    ) -> Result<TokenEmbedding, ModelError> {
        let path = self.path(name);
        let weight = self.embedding(name)?;
        if weight.kind != ParameterKind::Frozen && !self.trained_tokens.is_empty() {
            return Err(ModelError::options(format!(
                "`{path}` is in `modules_to_save` and some of its tokens in `trained_tokens`; \
                 choose one of the two"
            )));
        }
        let [vocab, width] = weight.tensor.dims();
        let pair = self.plan.get(&path).map(|pair| {
            let name = format!("{path}.lora_embedding_B");
            // As PEFT draws them: A zero, B normal.
            let b = Stream::new(self.seed, &name).normal(width * pair.rank, 1.0);
            let b = TensorData::new(b, [width, pair.rank]);
            EmbeddingPair {
                a: Parameter::new(
                    format!("{path}.lora_embedding_A"),
                    Tensor::zeros([pair.rank, vocab], (self.device, DType::F32)),
                    ParameterKind::Adapter,
                ),
                b: Parameter::new(
                    name,
                    Tensor::from_data(b, (self.device, DType::F32)),
                    ParameterKind::Adapter,
                ),
                scaling: pair.scaling,
            }
        });
        let rows = match self.trained_tokens.is_empty() {
            true => None,
            false => Some(TrainedRows::new(
                &path,
                &weight.tensor,
                &self.trained_tokens,
            )?),
        };
        Ok(TokenEmbedding {
            weight,
            padding,
            pair,
            rows,
        })
    }

    pub fn layer_norm(&self, name: &str, epsilon: f64) -> Result<LayerNorm, ModelError> {
        let path = self.path(name);
        Ok(LayerNorm {
            weight: self.read(name, &path, "weight")?,
            bias: Some(self.read(name, &path, "bias")?),
            epsilon,
        })
    }

    /// The decoder's output layer: stored on its own, or the token embedding where `embedding` is
    /// given. The second of the returned pair says whether it stays the embedding in training.
    pub fn lm_head(&self, embedding: Option<&Parameter<2>>) -> Result<(Linear, bool), ModelError> {
        let name = OUTPUT_LAYER;
        let kind = self.kind(name);
        let (weight, tied) = match embedding {
            None => (self.read(name, name, "weight")?, false),
            Some(embedding) => {
                // PEFT trains a copy of whichever of the two `modules_to_save` names.
                let tied = kind == ParameterKind::Frozen && embedding.kind == ParameterKind::Frozen;
                let tensor = embedding.tensor.clone().inner();
                let weight = Parameter::new(format!("{name}.weight"), tensor, kind);
                (weight, tied)
            }
        };
        let head = Linear {
            weight: weight.into(),
            bias: None,
            lora: None,
        };
        Ok((head.with_pair(self, name)?, tied))
    }

    /// Path in the Transformers class.
    fn path(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn kind(&self, path: &str) -> ParameterKind {
        if matching::saved(&self.modules_to_save, path) {
            ParameterKind::Saved
        } else {
            ParameterKind::Frozen
        }
    }

    /// What becomes of a tensor of a module, and its name where PEFT gives it one of its own: it
    /// keeps an adapted module's as that of its `base_layer`.
    fn kind_of(&self, path: &str, tensor: &str) -> (ParameterKind, String) {
        let name = format!("{path}.{tensor}");
        let kind = self.kind(path);
        if kind != ParameterKind::Frozen || tensor != "bias" {
            return (kind, name);
        }
        let adapted = self.plan.contains_key(path);
        match self.bias {
            BiasMode::None => (kind, name),
            BiasMode::LoraOnly if !adapted => (kind, name),
            _ if adapted => (ParameterKind::Adapter, format!("{path}.base_layer.bias")),
            _ => (ParameterKind::Adapter, name),
        }
    }

    fn read<const D: usize>(
        &self,
        name: &str,
        path: &str,
        tensor: &str,
    ) -> Result<Parameter<D>, ModelError> {
        self.read_as(name, path, tensor, |value: Tensor<D>| value)
    }

    /// Reads a tensor of `R` dimensions and gives it another shape.
    fn read_as<const R: usize, const D: usize>(
        &self,
        name: &str,
        path: &str,
        tensor: &str,
        shaped: impl FnOnce(Tensor<R>) -> Tensor<D>,
    ) -> Result<Parameter<D>, ModelError> {
        let (kind, full_name) = self.kind_of(path, tensor);
        // What is trained is kept in f32: small updates vanish in half precision.
        let dtype = match kind {
            ParameterKind::Frozen => self.dtype,
            _ => DType::F32,
        };
        let value = self
            .stored
            .tensor(&format!("{name}.{tensor}"), dtype, self.device)?;
        Ok(Parameter::new(full_name, shaped(value), kind))
    }

    /// Draws a new module's weights with another deviation.
    pub fn redraw(&self, linear: &mut Linear, deviation: f64) {
        let factor = deviation / self.initializer_range;
        if let Weight::Dense(weight) = &mut linear.weight {
            let redrawn = weight.tensor.clone().inner().mul_scalar(factor);
            *weight = Parameter::new(weight.name.clone(), redrawn, weight.kind);
        }
    }

    /// New weights as Transformers draws them: normal with `initializer_range`, biases zero.
    fn drawn(&self, spec: &ModuleSpec, path: &str, kind: ParameterKind) -> Linear {
        let deviation = self.initializer_range;
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
            weight: Parameter::new(weight, tensor, kind).into(),
            bias: spec.bias.then(|| {
                Parameter::new(
                    format!("{path}.bias"),
                    Tensor::zeros([spec.shape[0]], (self.device, dtype)),
                    kind,
                )
            }),
            lora: None,
        }
    }

    /// The pair of a module: `A` uniform as PEFT draws it (Kaiming with a = √5, which is
    /// `±1/√in`), `B` zero; or the weight's largest singular vectors, which the weight then lacks.
    fn pair(&self, path: &str, pair: &Pair, weight: &mut Weight) -> Result<LowRank, ModelError> {
        let [output, input] = weight.dims();
        let name = format!("{path}.lora_A.weight");
        let mut start = None;
        let (a, b) = if pair.init == PairInit::Default {
            let bound = 1.0 / (input as f64).sqrt();
            let a = Stream::new(self.seed, &name).uniform(pair.rank * input, bound);
            let a = TensorData::new(a, [pair.rank, input]);
            (
                Tensor::from_data(a, (self.device, DType::F32)),
                Tensor::zeros([output, pair.rank], (self.device, DType::F32)),
            )
        } else {
            let Weight::Dense(weight) = weight else {
                return Err(ModelError::options(format!(
                    "`{path}` is kept in 8 or 4 bits, and PiSSA takes singular vectors out of the \
                     weight itself; use another `init`, or keep the base as it is"
                )));
            };
            let whole = weight.tensor.clone().inner();
            let saved = self.starts.as_ref();
            let found = Start::new(path, &whole, pair, self.seed, saved, self.device)?;
            weight.tensor = found.rest;
            start = Some([
                Parameter::new(name.clone(), found.a.clone(), ParameterKind::Start),
                Parameter::new(
                    format!("{path}.lora_B.weight"),
                    found.b.clone(),
                    ParameterKind::Start,
                ),
            ]);
            (found.a, found.b)
        };
        let a = Parameter::new(name, a, ParameterKind::Adapter);
        let b = Parameter::new(format!("{path}.lora_B.weight"), b, ParameterKind::Adapter);
        let dora = pair
            .dora
            .then(|| Dora::new(path, &weight.stored_values(), [&a, &b], pair.scaling));
        Ok(LowRank {
            a,
            b,
            scaling: pair.scaling,
            dropout: pair.dropout,
            index: pair.index,
            dora,
            start,
        })
    }
}

impl Norm {
    /// Of the kind that the configuration says.
    fn new(weight: Parameter<1>, bias: Option<Parameter<1>>, config: &ModelConfig) -> Norm {
        let epsilon = config.norm_epsilon;
        match config.design.norm {
            NormKind::Layer { .. } => Norm::Layer(Box::new(LayerNorm {
                weight,
                bias,
                epsilon,
            })),
            kind => Norm::Rms(Box::new(RmsNorm {
                weight,
                epsilon,
                offset: kind == NormKind::RmsOffset,
            })),
        }
    }
}

impl Linear {
    fn with_pair(mut self, builder: &Builder, path: &str) -> Result<Linear, ModelError> {
        if let Some(pair) = builder.plan.get(path) {
            self.lora = Some(builder.pair(path, pair, &mut self.weight)?);
        }
        Ok(self)
    }
}
