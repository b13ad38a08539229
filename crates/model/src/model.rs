//! The model: a backbone, an adapter on it, a head.

use std::path::Path;
use std::sync::Arc;

use burn::tensor::{DType, Device, FloatDType, Tensor};
use calor_kernels::Quantization;

use crate::adapter_file;
use crate::architecture::{self, ModuleSpec, TaskClass};
use crate::backbone::Backbone;
use crate::builder::Builder;
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::embedding::TokenEmbedding;
use crate::error::ModelError;
use crate::fusion::{Fusion, FusionOptions};
use crate::head::{self, Classifier, Head, HeadOptions, Pooling};
use crate::lora::{BiasMode, LoraOptions, PairInit, Plan};
use crate::names::OUTPUT_LAYER;
use crate::parameter::{
    Parameter, ParameterGroup, ParameterKind, ParameterVisitor, Visit, peft_key,
};
use crate::recompute::Recompute;
use crate::weight::{QuantizedParameter, Weight};
use crate::weights::TensorFile;

/// How a checkpoint becomes a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelOptions {
    /// The low-rank adapter; without one only the head is trained.
    pub lora: Option<LoraOptions>,
    /// What the model predicts.
    pub head: HeadOptions,
    /// Units of a hidden layer with GELU between the mean and the logits; 0 for none. Without one,
    /// what the states say is added up and nothing more: such a head cannot weigh one modality by
    /// another. Needs [`Pooling::Mean`].
    pub head_hidden: usize,
    /// The streams of modality items that become soft tokens; without them the model reads tokens
    /// only.
    pub fusion: Option<FusionOptions>,
    /// Fixes the new weights: adapter and head. Those of `fusion` have a seed of their own.
    pub seed: u64,
    /// The frozen weights' type, and that of the activations. What is trained is always f32.
    pub dtype: FloatDType,
    /// In how many bits the frozen weights of the backbone's linear layers are kept; the embeddings
    /// and the head keep `dtype`, in which everything is computed. Without it they are kept as the
    /// checkpoint has them.
    pub quantization: Option<Quantization>,
}

/// How frozen weights are held: [`ModelOptions::dtype`] and [`ModelOptions::quantization`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FrozenWeights {
    /// Their type, and that of the activations.
    pub dtype: FloatDType,
    /// Bits of the backbone's linear layers.
    pub quantization: Option<Quantization>,
}

impl From<FloatDType> for FrozenWeights {
    fn from(dtype: FloatDType) -> FrozenWeights {
        FrozenWeights {
            dtype,
            quantization: None,
        }
    }
}

impl Default for ModelOptions {
    fn default() -> Self {
        ModelOptions {
            lora: None,
            head: HeadOptions::None,
            head_hidden: 0,
            fusion: None,
            seed: 0,
            dtype: FloatDType::F32,
            quantization: None,
        }
    }
}

/// A pretrained transformer with an adapter and a head. Cloning shares the tensors.
#[derive(Debug, Clone)]
pub struct Model {
    pub(crate) config: Arc<ModelConfig>,
    pub(crate) options: ModelOptions,
    pub(crate) class: TaskClass,
    pub(crate) plan: Arc<Plan>,
    pub(crate) modules_to_save: Vec<String>,
    pub(crate) backbone: Box<Backbone>,
    pub(crate) fusion: Option<Fusion>,
    pub(crate) head: Head,
    pub(crate) recompute: Recompute,
    device: Device,
}

impl Model {
    /// Reads the checkpoint's weights onto `device` and adds the adapter and the head.
    ///
    /// What is trained becomes a leaf of the autodiff graph; the rest stays outside it, whether or
    /// not `device` has autodiff switched on.
    ///
    /// # Errors
    /// Options that do not fit the model, an adapter that matches nothing, an unreadable file. What
    /// the data asks of `fusion` is checked by [`FusionOptions::check`].
    pub fn load(
        checkpoint: &Checkpoint,
        options: &ModelOptions,
        device: &Device,
    ) -> Result<Model, ModelError> {
        Model::load_again(checkpoint, options, None, device)
    }

    /// As [`Model::load`], with what the pairs start from taken out of an adapter that this very
    /// model saved before, where they start from the weights ([`PairInit::Pissa`]): the frozen
    /// weights are then the same to the last bit, and nothing is decomposed a second time.
    ///
    /// # Errors
    /// Those of [`Model::load`], and an adapter folder that was not saved from such pairs.
    pub fn load_again(
        checkpoint: &Checkpoint,
        options: &ModelOptions,
        saved_adapter: Option<&Path>,
        device: &Device,
    ) -> Result<Model, ModelError> {
        let config = checkpoint.config();
        let class = options.head.class(config)?;
        let modules = class.modules(config, options.head.labels());
        let mut modules_to_save = match &options.lora {
            Some(lora) => lora.modules_to_save.clone(),
            None => Vec::new(),
        };
        for name in head::always_saved(class, checkpoint) {
            if !modules_to_save.contains(&name) {
                modules_to_save.push(name);
            }
        }
        let plan = match &options.lora {
            Some(lora) => LoraOptions {
                modules_to_save: modules_to_save.clone(),
                ..lora.clone()
            }
            .plan(class, &reachable(&modules, options))?,
            None => Plan::new(),
        };
        let starts_from_weights = plan.values().any(|pair| pair.init != PairInit::Default);
        let starts = saved_adapter
            .filter(|_| starts_from_weights)
            .map(|folder| folder.join(adapter_file::WEIGHTS));
        Model::build(
            checkpoint,
            options,
            class,
            plan,
            modules_to_save,
            starts.as_deref(),
            device,
        )
    }

    pub(crate) fn build(
        checkpoint: &Checkpoint,
        options: &ModelOptions,
        class: TaskClass,
        plan: Plan,
        modules_to_save: Vec<String>,
        starts: Option<&Path>,
        device: &Device,
    ) -> Result<Model, ModelError> {
        let config = checkpoint.config();
        if let Some(fusion) = &options.fusion {
            fusion.check_numbers(config)?;
        }
        if let (Some(stored), Some(asked)) = (config.quantization, options.quantization)
            && std::mem::discriminant(&stored) != std::mem::discriminant(&asked)
        {
            return Err(ModelError::options(format!(
                "{}: its weights are stored as {stored} and cannot become {asked}; leave the \
                 quantisation to the checkpoint",
                config.path.display()
            )));
        }
        let device = device.clone().inner();
        let lora = options.lora.as_ref();
        let builder = Builder {
            stored: &checkpoint.stored,
            prefix: class.prefix(config.model_type),
            initializer_range: config.initializer_range,
            plan,
            modules_to_save,
            bias: lora.map_or(BiasMode::None, |lora| lora.bias),
            trained_tokens: lora.map_or_else(Vec::new, |lora| lora.trained_tokens.clone()),
            dtype: DType::from(options.dtype),
            quantization: options.quantization,
            seed: options.seed,
            starts: starts.map(TensorFile::open).transpose()?,
            device: &device,
        };
        let pooler = architecture::pooler(config).filter(|pooler| {
            let path = format!("{}{}", pooler.prefix(config, class), pooler.dense.path);
            builder.plan.contains_key(&path)
                || crate::matching::saved(&builder.modules_to_save, &path)
                || pooler.read_by(class)
        });
        let pooler = pooler.map(|pooler| {
            let prefix = pooler.prefix(config, class);
            (pooler, prefix)
        });
        let backbone = Box::new(Backbone::build(&builder, config, pooler)?);
        let fusion = match &options.fusion {
            Some(fusion) => Some(Fusion::new(
                fusion,
                &backbone.embedding().weight.tensor,
                backbone.embedding_scale(),
                options.dtype,
                &device,
            )?),
            None => None,
        };
        let head = match options.head {
            HeadOptions::CausalLm => {
                let tied = checkpoint.tied_embeddings()?;
                let weight = format!("{OUTPUT_LAYER}.weight");
                if !tied && !checkpoint.has(&weight) {
                    let expected = vec![config.vocab, config.hidden];
                    return Err(checkpoint.missing(&weight, expected));
                }
                let embedding = tied.then(|| &backbone.embedding().weight);
                let (linear, tied) = builder.lm_head(embedding)?;
                Head::CausalLm {
                    linear: Box::new(linear),
                    tied,
                }
            }
            HeadOptions::Classifier {
                labels, pooling, ..
            } => Head::Classifier(Box::new(Classifier::build(
                &builder,
                config,
                labels,
                pooling,
                options.head_hidden,
            )?)),
            HeadOptions::TokenClassifier { labels } => {
                Head::Classifier(Box::new(Classifier::of_tokens(&builder, config, labels)?))
            }
            HeadOptions::None => Head::None,
        };
        let Builder {
            plan,
            modules_to_save,
            ..
        } = builder;
        Ok(Model {
            config: Arc::new(config.clone()),
            options: options.clone(),
            class,
            plan: Arc::new(plan),
            modules_to_save,
            backbone,
            fusion,
            head,
            recompute: Recompute::default(),
            device,
        })
    }

    /// The frozen weight of an output layer that carries a pair: PEFT stores it with the adapter.
    pub(crate) fn adapted_output_weight(&self) -> Option<Tensor<2>> {
        match &self.head {
            Head::CausalLm { linear, .. } if linear.lora.is_some() => {
                Some(self.output_layer().1.tensor.inner())
            }
            _ => None,
        }
    }

    /// Replaces that weight, which then no longer is the token embedding.
    pub(crate) fn set_output_weight(&mut self, weight: Tensor<2>) {
        if let Head::CausalLm { linear, tied } = &mut self.head {
            if let Some(dora) = linear.lora.as_mut().and_then(|pair| pair.dora.as_mut()) {
                dora.reweigh(&weight);
            }
            if let Weight::Dense(parameter) = &mut linear.weight {
                parameter.tensor = weight;
            }
            *tied = false;
        }
    }

    /// The token embedding, with what the adapter adds to it.
    pub(crate) fn token_embedding(&self) -> &TokenEmbedding {
        self.backbone.embedding()
    }

    pub(crate) fn token_embedding_mut(&mut self) -> &mut TokenEmbedding {
        self.backbone.embedding_mut()
    }

    pub(crate) fn output_layer(&self) -> (&crate::linear::Linear, Parameter<2>) {
        match &self.head {
            Head::CausalLm { linear, tied: true } => {
                (linear, self.backbone.embedding().output_weight())
            }
            Head::CausalLm { linear, .. } => {
                let weight = linear.weight.dense().cloned();
                (linear, weight.expect("output layers are never quantised"))
            }
            _ => panic!("the model was built without an output layer over the vocabulary"),
        }
    }

    /// Goes through everything that is trained, always in the same order: layers, the streams of
    /// modality items, the head.
    ///
    /// Names are keys of the adapter file: `base_model.model.….lora_A.weight`, or the plain name in
    /// `calor.safetensors` for what PEFT has no place for.
    pub fn visit_trainable<V: ParameterVisitor>(&mut self, visitor: &mut V) {
        struct Trainable<'a, V>(&'a mut V);
        impl<V: ParameterVisitor> Visit for Trainable<'_, V> {
            fn visit<const D: usize>(&mut self, parameter: &mut Parameter<D>) {
                let (name, group) = match parameter.kind {
                    ParameterKind::Frozen | ParameterKind::Start => return,
                    ParameterKind::Adapter => (peft_key(&parameter.name), ParameterGroup::Adapter),
                    ParameterKind::Saved => (peft_key(&parameter.name), ParameterGroup::Head),
                    ParameterKind::Own(group) => (parameter.name.clone(), group),
                };
                self.0.visit(&name, group, &mut parameter.tensor);
            }
        }
        self.visit(&mut Trainable(visitor));
    }

    /// The same tensors outside the autodiff graph: nothing is recorded, nothing kept for a
    /// backward pass.
    pub fn for_inference(&self) -> Model {
        struct Inner;
        impl Visit for Inner {
            fn visit<const D: usize>(&mut self, parameter: &mut Parameter<D>) {
                parameter.tensor = parameter.tensor.clone().inner();
            }
        }
        let mut model = self.clone();
        model.visit(&mut Inner);
        model
    }

    /// What the model was built with.
    pub fn options(&self) -> &ModelOptions {
        &self.options
    }

    /// What the checkpoint's `config.json` says.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Chooses the blocks that training runs a second time in the backward pass, to keep less in
    /// memory; none at first. Nothing that is computed changes.
    pub fn set_recompute(&mut self, recompute: Recompute) {
        self.recompute = recompute;
    }

    /// The blocks that training runs a second time.
    pub fn recompute(&self) -> Recompute {
        self.recompute
    }

    /// Share of the forward pass's operations on weights that the backward pass does again.
    pub fn recomputed_share(&self) -> f64 {
        let layers = self.config.layers();
        let size = self.size();
        let output = match &self.head {
            Head::CausalLm { .. } => (self.config.vocab * self.config.hidden) as u64,
            _ => 0,
        };
        let all = size.base_parameters + size.adapter_parameters + size.head_parameters;
        let blocks = (size.base_parameters + size.adapter_parameters).saturating_sub(output);
        self.recompute.blocks.count(layers) as f64 / layers.max(1) as f64 * blocks as f64
            / all.max(1) as f64
    }

    /// Where the tensors are; without autodiff.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The modules that carry a low-rank pair, by their paths in the Transformers class.
    pub fn lora_modules(&self) -> Vec<String> {
        self.plan.keys().cloned().collect()
    }

    /// Rank and scaling of a module's low-rank pair.
    pub fn lora_scaling(&self, module: &str) -> Option<(usize, f32)> {
        self.plan.get(module).map(|pair| (pair.rank, pair.scaling))
    }

    /// What a linear module multiplies with, by its path in the Transformers class: `[out, in]`, f32,
    /// dequantised where it is kept in fewer bits, and without what an adapter adds.
    pub fn linear_weight(&self, module: &str) -> Option<Tensor<2>> {
        struct Find {
            name: String,
            found: Option<Tensor<2>>,
        }
        impl Visit for Find {
            fn visit<const D: usize>(&mut self, parameter: &mut Parameter<D>) {
                if let (true, &[output, input]) = (
                    parameter.name == self.name,
                    parameter.tensor.dims().as_slice(),
                ) {
                    let weight = parameter.tensor.clone().inner().cast(DType::F32);
                    self.found = Some(weight.reshape([output, input]));
                }
            }

            fn visit_quantized(&mut self, parameter: &mut QuantizedParameter) {
                if parameter.name == self.name {
                    self.found = Some(parameter.weight.dequantize(DType::F32));
                }
            }
        }
        let mut find = Find {
            name: format!("{module}.weight"),
            found: None,
        };
        self.clone().visit(&mut find);
        find.found
    }

    /// Goes through every tensor, in the order of the Transformers class.
    pub(crate) fn visit<V: Visit>(&mut self, visitor: &mut V) {
        self.backbone.visit(visitor);
        if let Some(fusion) = &mut self.fusion {
            fusion.visit(visitor);
        }
        match &mut self.head {
            Head::None => {}
            // The weight was visited as the embedding.
            Head::CausalLm { linear, tied: true } => linear.visit_rest(visitor),
            Head::CausalLm { linear, .. } => linear.visit(visitor),
            Head::Classifier(classifier) => classifier.visit(visitor),
        }
    }
}

/// The modules an adapter may target when it is made. An encoder without a head never runs its
/// pooler, so a pair on it would never be trained.
pub(crate) fn reachable(modules: &[ModuleSpec], options: &ModelOptions) -> Vec<ModuleSpec> {
    let unused = options.head.pooling() == Some(Pooling::Mean) || options.head == HeadOptions::None;
    modules
        .iter()
        .filter(|module| !(unused && module.path == "pooler.dense"))
        .cloned()
        .collect()
}
