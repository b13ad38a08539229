//! Which tensors and modules a tower has.
//!
//! Module paths are those of the class in Transformers 5.17 that is the tower alone: `ViTModel`,
//! `CLIPVisionModel`, `SiglipVisionModel` and `WhisperEncoder`, without the heads that pool. An
//! adapter's patterns refer to them. Files spell the tensors of ViT in an older way, and put a
//! prefix before them where the tower is a part of something larger.

use crate::architecture::{ModuleSpec, Role};

use super::config::{CHANNELS, Reads, TowerConfig, TowerType};

/// Names of the parts of a transformer layer, and of what stands around the layers.
pub(super) struct Names {
    pub layers: &'static str,
    pub query: &'static str,
    pub key: &'static str,
    pub value: &'static str,
    pub output: &'static str,
    pub attention_norm: &'static str,
    pub up: &'static str,
    pub down: &'static str,
    pub mlp_norm: &'static str,
    /// Of the layer norm after the last layer, where the last hidden state has passed one.
    pub final_norm: Option<&'static str>,
    /// Of the convolutions that make tokens of the input.
    pub convolutions: &'static [&'static str],
}

const VIT: Names = Names {
    layers: "layers",
    query: "attention.q_proj",
    key: "attention.k_proj",
    value: "attention.v_proj",
    output: "attention.o_proj",
    attention_norm: "layernorm_before",
    up: "mlp.fc1",
    down: "mlp.fc2",
    mlp_norm: "layernorm_after",
    final_norm: Some("layernorm"),
    convolutions: &["embeddings.patch_embeddings.projection"],
};

/// Transformers' `last_hidden_state` of CLIP has not passed `post_layernorm`; only the pooled class
/// token does.
const CLIP: Names = Names {
    layers: "encoder.layers",
    query: "self_attn.q_proj",
    key: "self_attn.k_proj",
    value: "self_attn.v_proj",
    output: "self_attn.out_proj",
    attention_norm: "layer_norm1",
    up: "mlp.fc1",
    down: "mlp.fc2",
    mlp_norm: "layer_norm2",
    final_norm: None,
    convolutions: &["embeddings.patch_embedding"],
};

const SIGLIP: Names = Names {
    final_norm: Some("post_layernorm"),
    ..CLIP
};

const WHISPER: Names = Names {
    layers: "layers",
    attention_norm: "self_attn_layer_norm",
    up: "fc1",
    down: "fc2",
    mlp_norm: "final_layer_norm",
    final_norm: Some("layer_norm"),
    convolutions: &["conv1", "conv2"],
    ..CLIP
};

/// ViT's layers as files spell them, and as the class does. In order: the end of an attention
/// block's name is also that of a layer's.
const VIT_SPELLING: [(&str, &str); 7] = [
    ("encoder.layer.", "layers."),
    (".attention.attention.query.", ".attention.q_proj."),
    (".attention.attention.key.", ".attention.k_proj."),
    (".attention.attention.value.", ".attention.v_proj."),
    (".attention.output.dense.", ".attention.o_proj."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
];

impl TowerType {
    pub(super) fn names(self) -> &'static Names {
        match self {
            TowerType::Vit => &VIT,
            TowerType::Clip => &CLIP,
            TowerType::Siglip => &SIGLIP,
            TowerType::Whisper => &WHISPER,
        }
    }

    /// What the classes that hold the tower put before its tensors; the longest first.
    pub(super) fn prefixes(self) -> &'static [&'static str] {
        match self {
            TowerType::Vit => &["vit."],
            TowerType::Clip | TowerType::Siglip => &["vision_model."],
            TowerType::Whisper => &["model.encoder.", "encoder."],
        }
    }

    /// The module's name of a stored tensor; another part's keeps its own, less `model.`.
    pub(super) fn canonical(self, stored: &str) -> String {
        let mut prefixes = self.prefixes().iter().chain(&["model."]);
        let name = prefixes
            .find_map(|prefix| stored.strip_prefix(prefix))
            .unwrap_or(stored);
        match self {
            TowerType::Vit if name.starts_with(VIT_SPELLING[0].0) => VIT_SPELLING
                .iter()
                .fold(name.to_owned(), |name, (old, new)| name.replace(old, new)),
            _ => name.to_owned(),
        }
    }

    /// How files spell a tensor of the tower, without prefix.
    pub(super) fn hub_name(self, name: &str) -> String {
        match self {
            TowerType::Vit if name.starts_with(VIT_SPELLING[0].1) => VIT_SPELLING
                .iter()
                .fold(name.to_owned(), |name, (old, new)| name.replace(new, old)),
            _ => name.to_owned(),
        }
    }

    /// Whether hub files carry this tensor although the tower's last hidden state does not depend
    /// on it: the other parts of the model, heads and poolers, buffers that are computed.
    pub(super) fn tolerated(self, name: &str) -> bool {
        let prefixes: &[&str] = match self {
            TowerType::Vit => &[
                "pooler.",
                "classifier.",
                "decoder.",
                "embeddings.mask_token",
            ],
            TowerType::Clip => &[
                "post_layernorm.",
                "visual_projection.",
                "text_model.",
                "text_projection.",
                "logit_scale",
                "classifier.",
                "embeddings.position_ids",
            ],
            TowerType::Siglip => &[
                "head.",
                "text_model.",
                "logit_scale",
                "logit_bias",
                "classifier.",
                "embeddings.position_ids",
            ],
            TowerType::Whisper => &[
                "decoder.",
                "proj_out.",
                "projector.",
                "classifier.",
                "layer_weights",
            ],
        };
        prefixes.iter().any(|prefix| name.starts_with(prefix))
    }
}

/// A tensor that is no module's weight or bias.
pub(super) struct Loose {
    /// The module that holds it.
    pub module: &'static str,
    pub tensor: &'static str,
    pub shape: Vec<usize>,
}

/// The class token, and ViT's position embeddings.
pub(super) fn loose(config: &TowerConfig) -> Vec<Loose> {
    let module = "embeddings";
    let width = config.width;
    let tokens = config.image_tokens();
    match config.tower_type {
        TowerType::Vit => vec![
            Loose {
                module,
                tensor: "cls_token",
                shape: vec![1, 1, width],
            },
            Loose {
                module,
                tensor: "position_embeddings",
                shape: vec![1, tokens, width],
            },
        ],
        TowerType::Clip => vec![Loose {
            module,
            tensor: "class_embedding",
            shape: vec![width],
        }],
        _ => Vec::new(),
    }
}

/// Every module with weights, in the order Transformers registers them.
pub(super) fn modules(config: &TowerConfig) -> Vec<ModuleSpec> {
    let (width, wide) = (config.width, config.intermediate);
    let names = config.tower_type.names();
    let norm = |name: &str| ModuleSpec::norm(name.to_owned(), width, true);
    let mut modules = Vec::new();
    for (index, path) in names.convolutions.iter().enumerate() {
        modules.push(ModuleSpec {
            path: (*path).to_owned(),
            role: Role::Convolution,
            shape: match config.reads {
                Reads::Image { patch, .. } => vec![width, CHANNELS, patch[0], patch[1]],
                Reads::Mel { bins, .. } => vec![width, if index == 0 { bins } else { width }, 3],
            },
            bias: config.tower_type != TowerType::Clip,
        });
    }
    let embedding = |path, entries| ModuleSpec::embedding(path, entries, width);
    match (config.tower_type, config.reads) {
        (TowerType::Vit, _) => {}
        (TowerType::Clip, _) => modules.extend([
            embedding("embeddings.position_embedding", config.image_tokens()),
            norm("pre_layrnorm"),
        ]),
        (_, Reads::Image { .. }) => {
            modules.push(embedding(
                "embeddings.position_embedding",
                config.image_tokens(),
            ));
        }
        (_, Reads::Mel { positions, .. }) => modules.push(embedding("embed_positions", positions)),
    }
    for layer in 0..config.layers {
        let at = |name: &str| format!("{}.{layer}.{name}", names.layers);
        let linear =
            |name: &str, output, input, bias| ModuleSpec::linear(at(name), output, input, bias);
        let qkv = |name: &str, bias| linear(name, width, width, bias);
        let key_bias = config.qkv_bias && config.tower_type != TowerType::Whisper;
        modules.extend([
            qkv(names.query, config.qkv_bias),
            qkv(names.key, key_bias),
            qkv(names.value, config.qkv_bias),
            qkv(names.output, true),
            norm(&at(names.attention_norm)),
            linear(names.up, wide, width, true),
            linear(names.down, width, wide, true),
            norm(&at(names.mlp_norm)),
        ]);
    }
    modules.extend(names.final_norm.map(norm));
    modules
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_of_vit_are_one_name() {
        for (stored, name) in [
            (
                "vit.encoder.layer.3.attention.attention.query.bias",
                "layers.3.attention.q_proj.bias",
            ),
            (
                "encoder.layer.0.attention.output.dense.weight",
                "layers.0.attention.o_proj.weight",
            ),
            (
                "encoder.layer.11.intermediate.dense.weight",
                "layers.11.mlp.fc1.weight",
            ),
            (
                "encoder.layer.11.output.dense.bias",
                "layers.11.mlp.fc2.bias",
            ),
            (
                "encoder.layer.0.layernorm_before.weight",
                "layers.0.layernorm_before.weight",
            ),
            ("layers.0.mlp.fc2.weight", "layers.0.mlp.fc2.weight"),
            ("vit.embeddings.cls_token", "embeddings.cls_token"),
            ("pooler.dense.weight", "pooler.dense.weight"),
        ] {
            assert_eq!(TowerType::Vit.canonical(stored), name);
            let spelled = TowerType::Vit.hub_name(name);
            assert_eq!(TowerType::Vit.canonical(&spelled), name);
        }
        let name = "layers.3.attention.q_proj.bias";
        let spelled = "encoder.layer.3.attention.attention.query.bias";
        assert_eq!(TowerType::Vit.hub_name(name), spelled);
        let name = "layers.3.mlp.fc2.bias";
        assert_eq!(
            TowerType::Vit.hub_name(name),
            "encoder.layer.3.output.dense.bias"
        );
    }

    #[test]
    fn the_tower_is_found_among_the_other_parts() {
        let whisper = TowerType::Whisper;
        for stored in [
            "model.encoder.conv1.weight",
            "encoder.conv1.weight",
            "conv1.weight",
        ] {
            assert_eq!(whisper.canonical(stored), "conv1.weight");
        }
        let decoder = whisper.canonical("model.decoder.layers.0.fc1.weight");
        assert!(whisper.tolerated(&decoder) && !whisper.tolerated("layers.0.fc1.weight"));
        assert!(whisper.tolerated(&whisper.canonical("proj_out.weight")));
        let clip = TowerType::Clip;
        assert_eq!(
            clip.canonical("vision_model.pre_layrnorm.bias"),
            "pre_layrnorm.bias"
        );
        assert!(clip.tolerated(&clip.canonical("text_model.embeddings.position_ids")));
        assert!(!clip.tolerated("embeddings.class_embedding"));
    }
}
