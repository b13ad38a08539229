//! What a recipe says about modality items: which streams there are and what reads each.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::lora::LoraOptions;

/// The streams of modality items that join a patient's tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FusionOptions {
    /// One entry a stream, in the order of [`SoftInput::streams`](crate::SoftInput::streams).
    pub streams: Vec<StreamSpec>,
    /// Number of sites that items may come from; 0 leaves the site embedding out.
    #[serde(default)]
    pub sites: usize,
    /// Fixes the new weights.
    #[serde(default)]
    pub seed: u64,
}

/// One stream of items: what they are and how each becomes `tokens` soft tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamSpec {
    /// Part of the names of the stream's tensors, `fusion.<name>.…`: letters, digits, `_` and `-`.
    pub name: String,
    /// What the items are.
    pub modality: ModalityKind,
    /// What reads an item.
    pub encoder: EncoderSpec,
    /// Soft tokens an item.
    #[serde(default = "default_tokens")]
    pub tokens: usize,
    /// What makes `tokens` of them out of the encoder's output, whatever its length.
    #[serde(default)]
    pub resampler: ResamplerOptions,
}

fn default_tokens() -> usize {
    4
}

/// What an item is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModalityKind {
    /// A picture.
    Image,
    /// A dense signal of one or several leads.
    Waveform,
    /// An irregular series of values of several variables.
    Series,
    /// A vector of named features.
    Omics,
    /// A recording of speech, as log-mel frames.
    Speech,
}

impl ModalityKind {
    /// The name in recipes and messages.
    pub fn name(self) -> &'static str {
        match self {
            ModalityKind::Image => "image",
            ModalityKind::Waveform => "waveform",
            ModalityKind::Series => "series",
            ModalityKind::Omics => "omics",
            ModalityKind::Speech => "speech",
        }
    }

    /// What the first dimension of an item counts.
    pub(super) fn features(self) -> &'static str {
        match self {
            ModalityKind::Image => "channels",
            ModalityKind::Waveform => "leads",
            ModalityKind::Series => "variables",
            ModalityKind::Omics => "features",
            ModalityKind::Speech => "mel bins",
        }
    }
}

/// What reads an item: a pretrained tower, frozen but for a LoRA adapter of its own, or a small
/// encoder of ours, trained from new weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum EncoderSpec {
    /// The vision tower of a ViT, CLIP or SigLIP checkpoint.
    Vision {
        /// The checkpoint's folder.
        folder: PathBuf,
        /// An adapter on the tower's linear layers.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lora: Option<LoraOptions>,
    },
    /// The encoder of a Whisper checkpoint.
    Whisper {
        /// The checkpoint's folder.
        folder: PathBuf,
        /// An adapter on the encoder's linear layers.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lora: Option<LoraOptions>,
    },
    /// Patches of a dense signal, or of log-mel frames, and a transformer.
    Signal(SignalOptions),
    /// Triplets of time, variable and value, and a transformer.
    Series(SeriesOptions),
    /// Statistics of windows of an irregular series, a token a variable, and a transformer.
    Windows(WindowsOptions),
    /// Groups of features and a transformer.
    Omics(OmicsEncoderOptions),
    /// Patches of an image and a transformer.
    Patches(PatchOptions),
}

/// The resampler of a stream: queries that attend to the encoder's output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ResamplerOptions {
    /// Width of the queries.
    pub width: usize,
    /// Blocks of cross-attention and feed-forward layer; at least 1.
    pub depth: usize,
    /// Attention heads; divides `width`.
    pub heads: usize,
}

impl Default for ResamplerOptions {
    fn default() -> Self {
        ResamplerOptions {
            width: 128,
            depth: 2,
            heads: 4,
        }
    }
}

/// The encoder of dense signals.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SignalOptions {
    /// Leads of the signal, or mel bins of speech.
    pub leads: usize,
    /// Samples a patch: the stride of the second convolution, and its length.
    pub patch_samples: usize,
    /// Samples that a filter of the first convolution sees; a multiple of its stride.
    pub kernel_samples: usize,
    /// Stride of the first convolution in samples; divides `patch_samples`.
    pub stride_samples: usize,
    /// Width of the transformer.
    pub width: usize,
    /// Layers of the transformer.
    pub depth: usize,
    /// Attention heads; divides `width`.
    pub heads: usize,
}

impl Default for SignalOptions {
    fn default() -> Self {
        SignalOptions {
            leads: 1,
            patch_samples: 50,
            kernel_samples: 15,
            stride_samples: 5,
            width: 128,
            depth: 2,
            heads: 4,
        }
    }
}

/// The encoder of irregular series.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SeriesOptions {
    /// Number of variables.
    pub variables: usize,
    /// Days that make one unit of time: about the spacing that matters.
    pub time_scale_days: f64,
    /// Hidden units of the networks that embed a value and a time.
    pub hidden: usize,
    /// Width of the transformer.
    pub width: usize,
    /// Layers of the transformer.
    pub depth: usize,
    /// Attention heads; divides `width`.
    pub heads: usize,
}

impl Default for SeriesOptions {
    fn default() -> Self {
        SeriesOptions {
            variables: 0,
            time_scale_days: 1.0,
            hidden: 16,
            width: 64,
            depth: 2,
            heads: 4,
        }
    }
}

/// The encoder of irregular series by what a table of features would have of them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WindowsOptions {
    /// Number of variables.
    pub variables: usize,
    /// Windows of equal length; they end with the prediction.
    pub windows: usize,
    /// Days that they reach back; what is older counts in the oldest window.
    pub span_days: f64,
    /// Share of the statistics that count as missing in training.
    #[serde(skip_serializing_if = "is_zero")]
    pub dropout: f64,
    /// Width of the transformer.
    pub width: usize,
    /// Layers of the transformer.
    pub depth: usize,
    /// Attention heads; divides `width`.
    pub heads: usize,
}

impl Default for WindowsOptions {
    fn default() -> Self {
        WindowsOptions {
            variables: 0,
            windows: 2,
            span_days: 2.0,
            dropout: 0.0,
            width: 64,
            depth: 2,
            heads: 4,
        }
    }
}

impl WindowsOptions {
    /// Numbers of a variable in a window.
    pub const STATISTICS: usize = 6;

    /// As an encoder of vectors: one group of features a variable, all of its windows.
    pub(super) fn groups(&self) -> OmicsEncoderOptions {
        let of_variable = self.windows * Self::STATISTICS;
        let features = self.variables * of_variable;
        OmicsEncoderOptions {
            features,
            groups: (0..features)
                .collect::<Vec<_>>()
                .chunks(of_variable.max(1))
                .map(<[usize]>::to_vec)
                .collect(),
            chunk: of_variable,
            dropout: self.dropout,
            width: self.width,
            depth: self.depth,
            heads: self.heads,
        }
    }
}

fn is_zero(value: &f64) -> bool {
    *value == 0.0
}

/// The encoder of feature vectors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OmicsEncoderOptions {
    /// Length of the vectors.
    pub features: usize,
    /// Feature numbers of each group, pathways say; groups may share features. Empty: chunks.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<Vec<usize>>,
    /// Features a chunk, where there are no groups.
    pub chunk: usize,
    /// Share of the features that count as missing in training.
    #[serde(skip_serializing_if = "is_zero")]
    pub dropout: f64,
    /// Width of the transformer.
    pub width: usize,
    /// Layers of the transformer.
    pub depth: usize,
    /// Attention heads; divides `width`.
    pub heads: usize,
}

impl Default for OmicsEncoderOptions {
    fn default() -> Self {
        OmicsEncoderOptions {
            features: 0,
            groups: Vec::new(),
            chunk: 64,
            dropout: 0.0,
            width: 64,
            depth: 2,
            heads: 4,
        }
    }
}

/// The small encoder of images, for want of a pretrained one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PatchOptions {
    /// Height and width of a patch in pixels.
    pub patch: usize,
    /// Width of the transformer; a multiple of 4.
    pub width: usize,
    /// Layers of the transformer.
    pub depth: usize,
    /// Attention heads; divides `width`.
    pub heads: usize,
}

impl Default for PatchOptions {
    fn default() -> Self {
        PatchOptions {
            patch: 16,
            width: 128,
            depth: 4,
            heads: 4,
        }
    }
}

impl FusionOptions {
    /// Soft tokens of a sample with so many items of each stream.
    pub fn slots(&self, items: &[usize]) -> usize {
        let tokens = self.streams.iter().map(|stream| stream.tokens);
        tokens
            .zip(items)
            .map(|(tokens, items)| tokens * items)
            .sum()
    }

    /// Whether weights trained with `other` fit: everything is the same but the seed and the places
    /// of pretrained towers.
    pub(crate) fn same_tensors(&self, other: &FusionOptions) -> bool {
        let neutral = |options: &FusionOptions| {
            let mut options = options.clone();
            options.seed = 0;
            for stream in &mut options.streams {
                if let EncoderSpec::Vision { folder, .. } | EncoderSpec::Whisper { folder, .. } =
                    &mut stream.encoder
                {
                    folder.clear();
                }
            }
            options
        };
        neutral(self) == neutral(other)
    }
}

impl EncoderSpec {
    /// The name in recipes and messages.
    pub fn name(&self) -> &'static str {
        match self {
            EncoderSpec::Vision { .. } => "vision",
            EncoderSpec::Whisper { .. } => "whisper",
            EncoderSpec::Signal(_) => "signal",
            EncoderSpec::Series(_) => "series",
            EncoderSpec::Windows(_) => "windows",
            EncoderSpec::Omics(_) => "omics",
            EncoderSpec::Patches(_) => "patches",
        }
    }
}
