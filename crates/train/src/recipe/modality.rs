//! `[modality]`: what becomes soft tokens beside the text, and how.

use std::path::PathBuf;
use std::sync::Arc;

use calor_model::{
    EncoderSpec, FusionOptions, ModalityKind, OmicsEncoderOptions, PatchOptions, ResamplerOptions,
    SeriesOptions, SignalOptions, StreamSpec,
};
use calor_records::{
    ImageOptions, Modality, OmicsGroups, OmicsOptions, SpeechOptions, WaveformOptions,
    decode_image, decode_omics, decode_speech, decode_waveform, omics_names_file,
};
use calor_sequence::{Decoding, MissingItem, SequenceOptions, StreamOptions};
use serde::{Deserialize, Serialize};

use super::section::section;
use super::{Key, KeyKind};
use crate::TrainError;

/// The rows that are written as text, as `modality.exclude` and ablations call them.
pub const TEXT: &str = "text";

section! {
    /// `[modality]`: what becomes soft tokens beside the text.
    ModalitySection at "modality." {
        /// Chance with which each modality of a patient is withheld in a training step, so that the model learns to do without.
        dropout: f64 = 0.1 => Number;
        /// Modalities left out of training and evaluation although they have a section: `image`, `waveform`, `series`, `omics`, `speech`, or `text` for the rows that are written as text.
        exclude: Vec<String> = Vec::new() => List;
        /// Mebibytes of decoded items that are held in memory; the others are read from the cache on the disk.
        memory_mib: u64 = 256 => Integer;
        /// Pictures: the column `image_path`.
        #[serde(skip_serializing_if = "Option::is_none")]
        image: Option<ImageSection> = None => Section;
        /// Dense signals: the column `waveform_path`.
        #[serde(skip_serializing_if = "Option::is_none")]
        waveform: Option<WaveformSection> = None => Section;
        /// The numeric rows as an irregular time series.
        #[serde(skip_serializing_if = "Option::is_none")]
        series: Option<SeriesSection> = None => Section;
        /// Feature vectors: the column `omics_path`.
        #[serde(skip_serializing_if = "Option::is_none")]
        omics: Option<OmicsSection> = None => Section;
        /// Speech: the column `audio_path`.
        #[serde(skip_serializing_if = "Option::is_none")]
        speech: Option<SpeechSection> = None => Section;
    }
}

section! {
    /// `[modality.image]`: pictures.
    ImageSection at "modality.image." {
        /// Soft tokens a picture.
        tokens: usize = 4 => Integer;
        /// Pictures a patient at most; the latest are kept.
        max_items: usize = 1 => Integer;
        /// A file that cannot be decoded: `error`, or `absent` (it counts as missing and is counted).
        on_missing: MissingItem = MissingItem::Error => Text;
        /// How a file becomes numbers: `height`, `width`, `resize`, `filter`, `window` and more. With a pretrained tower its preprocessor_config.json decides, but for what concerns medical images.
        decode: ImageOptions = small_image() => Map;
        /// What reads it: `{ kind = "patches", patch = 8, width = 64, depth = 2, heads = 4 }`, trained from new weights, or `{ kind = "vision", folder = "google/vit-base-patch16-224" }`, a pretrained tower.
        encoder: EncoderSpec = EncoderSpec::Patches(PatchOptions { patch: 8, width: 64, depth: 2, heads: 4 }) => Map;
        /// What makes soft tokens of the encoder's output: `{ width = 64, depth = 1, heads = 4 }`.
        resampler: ResamplerOptions = small_resampler() => Map;
    }
}

section! {
    /// `[modality.waveform]`: dense signals.
    WaveformSection at "modality.waveform." {
        /// Soft tokens a signal.
        tokens: usize = 4 => Integer;
        /// Signals a patient at most; the latest are kept.
        max_items: usize = 1 => Integer;
        /// A file that cannot be decoded: `error`, or `absent` (it counts as missing and is counted).
        on_missing: MissingItem = MissingItem::Error => Text;
        /// How a file becomes numbers: `rate_hz`, `max_seconds`, `leads` and what else the source needs.
        decode: WaveformOptions = WaveformOptions::default() => Map;
        /// Whether leads are standardised with the mean and deviation of training patients.
        standardise: bool = true => Boolean;
        /// What reads it: `{ kind = "signal", patch_samples = 25, kernel_samples = 15, stride_samples = 5, width = 64, depth = 2, heads = 4 }`.
        encoder: EncoderSpec = EncoderSpec::Signal(SignalOptions { leads: 1, patch_samples: 25, kernel_samples: 15, stride_samples: 5, width: 64, depth: 2, heads: 4 }) => Map;
        /// What makes soft tokens of the encoder's output.
        resampler: ResamplerOptions = small_resampler() => Map;
    }
}

section! {
    /// `[modality.series]`: numeric rows as an irregular time series.
    SeriesSection at "modality.series." {
        /// Soft tokens of the series.
        tokens: usize = 4 => Integer;
        /// Values a patient at most; the latest are kept.
        max_values: usize = 512 => Integer;
        /// Codes whose numbers are taken; an entry ending in `*` stands for every code that begins so. Empty: every code with enough values among training patients.
        codes: Vec<String> = Vec::new() => List;
        /// Whether these rows are written as text as well.
        in_text: bool = true => Boolean;
        /// What reads it: `{ kind = "series", time_scale_days = 1.0, width = 64, depth = 2, heads = 4 }`, value by value, or `{ kind = "windows", windows = 2, span_days = 2.0, width = 64, depth = 2, heads = 4 }`, count, mean, extremes, latest and change of each variable in windows of time.
        encoder: EncoderSpec = EncoderSpec::Series(SeriesOptions::default()) => Map;
        /// What makes soft tokens of the encoder's output.
        resampler: ResamplerOptions = small_resampler() => Map;
    }
}

section! {
    /// `[modality.omics]`: feature vectors.
    OmicsSection at "modality.omics." {
        /// Soft tokens a vector.
        tokens: usize = 4 => Integer;
        /// Vectors a patient at most; the latest are kept.
        max_items: usize = 1 => Integer;
        /// A file that cannot be decoded: `error`, or `absent` (it counts as missing and is counted).
        on_missing: MissingItem = MissingItem::Error => Text;
        /// How a file becomes numbers: `features` (names, in order) and more.
        decode: OmicsOptions = OmicsOptions::default() => Map;
        /// Whether features are standardised with the mean and deviation of training patients.
        standardise: bool = true => Boolean;
        /// Standardised values beyond this on either side of 0 are cut to it; 0 cuts none.
        clip: f64 = 10.0 => Number;
        /// Features that the encoder reads as one token: `{ kind = "gmt", path = "hallmarks.gmt" }`, the gene sets of a file, or `{ kind = "prefix", separator = "_" }`, those whose names begin alike. Without it, `encoder.chunk` features at a time, in their order.
        #[serde(skip_serializing_if = "Option::is_none")]
        groups: Option<OmicsGrouping> = None => Map;
        /// What reads it: `{ kind = "omics", chunk = 64, width = 64, depth = 2, heads = 4 }`.
        encoder: EncoderSpec = EncoderSpec::Omics(OmicsEncoderOptions::default()) => Map;
        /// What makes soft tokens of the encoder's output.
        resampler: ResamplerOptions = small_resampler() => Map;
    }
}

section! {
    /// `[modality.speech]`: recordings of speech.
    SpeechSection at "modality.speech." {
        /// Soft tokens a recording.
        tokens: usize = 4 => Integer;
        /// Recordings a patient at most; the latest are kept.
        max_items: usize = 1 => Integer;
        /// A file that cannot be decoded: `error`, or `absent` (it counts as missing and is counted).
        on_missing: MissingItem = MissingItem::Error => Text;
        /// How a file becomes log-mel frames, as Whisper's: `mel_bins`, `max_seconds`, `pad_to_max`.
        decode: SpeechOptions = SpeechOptions::default() => Map;
        /// What reads it: `{ kind = "signal", patch_samples = 10, width = 64, depth = 2, heads = 4 }`, trained from new weights, or `{ kind = "whisper", folder = "openai/whisper-tiny" }`, a pretrained encoder.
        encoder: EncoderSpec = EncoderSpec::Signal(SignalOptions { leads: 80, patch_samples: 10, kernel_samples: 15, stride_samples: 5, width: 64, depth: 2, heads: 4 }) => Map;
        /// What makes soft tokens of the encoder's output.
        resampler: ResamplerOptions = small_resampler() => Map;
    }
}

/// How an omics vector's features are grouped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum OmicsGrouping {
    /// The gene sets of a GMT file; what is in none of them follows in groups of their size.
    Gmt {
        /// The file, relative to where `calor` is started.
        path: PathBuf,
    },
    /// Features whose names begin alike, up to the first separator.
    Prefix {
        /// What ends the beginning.
        separator: String,
    },
}

impl OmicsGrouping {
    /// The numbers of each group's features.
    ///
    /// # Errors
    /// A GMT file that cannot be read or is none.
    pub(crate) fn groups(&self, features: &[String]) -> Result<Vec<Vec<usize>>, TrainError> {
        let groups = match self {
            OmicsGrouping::Gmt { path } => OmicsGroups::from_gmt(path)?,
            OmicsGrouping::Prefix { separator } => OmicsGroups::by_prefix(separator),
        };
        Ok(groups.group(features))
    }
}

fn small_resampler() -> ResamplerOptions {
    ResamplerOptions {
        width: 64,
        depth: 1,
        heads: 4,
    }
}

fn small_image() -> ImageOptions {
    ImageOptions {
        height: 32,
        width: 32,
        ..ImageOptions::default()
    }
}

/// The keys of all sections.
pub(super) fn keys() -> Vec<Key> {
    [
        ModalitySection::KEYS,
        ImageSection::KEYS,
        WaveformSection::KEYS,
        SeriesSection::KEYS,
        OmicsSection::KEYS,
        SpeechSection::KEYS,
    ]
    .concat()
}

/// One modality of a recipe: how its items are found, decoded and encoded.
#[derive(Clone)]
pub(crate) struct Stream {
    pub options: StreamOptions,
    /// `None` for a modality without files.
    pub decoding: Option<Decoding>,
    pub encoder: EncoderSpec,
    pub resampler: ResamplerOptions,
}

impl ModalitySection {
    /// The modalities that take part, in the order of [`Modality::ALL`].
    pub(crate) fn streams(&self) -> Vec<Stream> {
        let mut streams = Vec::new();
        if let Some(image) = &self.image {
            let decode = image.decode.clone();
            streams.push(Stream {
                options: files(Modality::Image, image.tokens, image.max_items),
                decoding: Some(Decoding {
                    on_missing: image.on_missing,
                    ..Decoding::new(
                        key(&decode),
                        Arc::new(move |path| decode_image(path, &decode)),
                    )
                }),
                encoder: image.encoder.clone(),
                resampler: image.resampler.clone(),
            });
        }
        if let Some(waveform) = &self.waveform {
            let decode = waveform.decode.clone();
            streams.push(Stream {
                options: files(Modality::Waveform, waveform.tokens, waveform.max_items),
                decoding: Some(Decoding {
                    on_missing: waveform.on_missing,
                    standardise: waveform.standardise,
                    ..Decoding::new(
                        key(&decode),
                        Arc::new(move |path| decode_waveform(path, &decode)),
                    )
                }),
                encoder: waveform.encoder.clone(),
                resampler: waveform.resampler.clone(),
            });
        }
        if let Some(series) = &self.series {
            streams.push(Stream {
                options: StreamOptions {
                    max_values: series.max_values,
                    codes: series.codes.clone(),
                    in_text: series.in_text,
                    ..files(Modality::Series, series.tokens, 1)
                },
                decoding: None,
                encoder: series.encoder.clone(),
                resampler: series.resampler.clone(),
            });
        }
        if let Some(omics) = &self.omics {
            let decode = omics.decode.clone();
            streams.push(Stream {
                options: files(Modality::Omics, omics.tokens, omics.max_items),
                decoding: Some(Decoding {
                    on_missing: omics.on_missing,
                    standardise: omics.standardise,
                    named: true,
                    beside: Some(omics_names_file),
                    clip: (omics.clip > 0.0).then_some(omics.clip as f32),
                    ..Decoding::new(
                        key(&decode),
                        Arc::new(move |path| decode_omics(path, &decode)),
                    )
                }),
                encoder: omics.encoder.clone(),
                resampler: omics.resampler.clone(),
            });
        }
        if let Some(speech) = &self.speech {
            let decode = speech.decode.clone();
            streams.push(Stream {
                options: files(Modality::Speech, speech.tokens, speech.max_items),
                decoding: Some(Decoding {
                    on_missing: speech.on_missing,
                    ..Decoding::new(
                        key(&decode),
                        Arc::new(move |path| decode_speech(path, &decode)),
                    )
                }),
                encoder: speech.encoder.clone(),
                resampler: speech.resampler.clone(),
            });
        }
        streams.retain(|stream| !self.excludes(stream.options.modality.name()));
        streams
    }

    /// The options of `[sequence]` with what this section adds to them.
    pub(crate) fn sequence(&self, sequence: &SequenceOptions) -> SequenceOptions {
        let streams = self.streams().into_iter().map(|stream| stream.options);
        SequenceOptions {
            text: sequence.text && !self.excludes(TEXT),
            streams: streams.collect(),
            ..sequence.clone()
        }
    }

    /// Where the pretrained encoders are: hub ids or folders, as the recipe names them.
    pub fn towers(&mut self) -> Vec<&mut PathBuf> {
        let encoders = [
            self.image.as_mut().map(|section| &mut section.encoder),
            self.waveform.as_mut().map(|section| &mut section.encoder),
            self.series.as_mut().map(|section| &mut section.encoder),
            self.omics.as_mut().map(|section| &mut section.encoder),
            self.speech.as_mut().map(|section| &mut section.encoder),
        ];
        let folder = |encoder| match encoder {
            &mut EncoderSpec::Vision { ref mut folder, .. }
            | &mut EncoderSpec::Whisper { ref mut folder, .. } => Some(folder),
            _ => None,
        };
        encoders.into_iter().flatten().filter_map(folder).collect()
    }

    /// With a pretrained vision tower, decodes images as its `preprocessor_config.json` says; of the
    /// recipe's `decode` what concerns medical images stays.
    ///
    /// # Errors
    /// A file that is missing or asks for what cannot be done.
    pub fn take_preprocessing(&mut self) -> Result<(), TrainError> {
        let Some(image) = &mut self.image else {
            return Ok(());
        };
        let EncoderSpec::Vision { folder, .. } = &image.encoder else {
            return Ok(());
        };
        let path = folder.join("preprocessor_config.json");
        let text = std::fs::read_to_string(&path).map_err(TrainError::io("read", &path))?;
        let found =
            ImageOptions::from_preprocessor(&text).map_err(|error| TrainError::Corrupt {
                path: path.clone(),
                problem: error.to_string(),
            })?;
        let given = image.decode.clone();
        image.decode = ImageOptions {
            window: given.window,
            percentiles: given.percentiles,
            frame: given.frame,
            plane: given.plane,
            volume: given.volume,
            slice: given.slice,
            max_pixels: given.max_pixels,
            ..found
        };
        Ok(())
    }

    fn excludes(&self, name: &str) -> bool {
        self.exclude.iter().any(|excluded| excluded == name)
    }
}

/// The model's side of streams; `widths` are the channels, features or variables that the data has
/// of each.
pub(crate) fn fusion(
    streams: &[Stream],
    widths: &[Option<usize>],
    sites: usize,
    seed: u64,
) -> Option<FusionOptions> {
    if streams.is_empty() {
        return None;
    }
    let specs = streams.iter().zip(widths).map(|(stream, width)| {
        let mut encoder = stream.encoder.clone();
        // A modality that no training patient has is its missing token, whatever the width.
        let width = width.unwrap_or(1);
        match &mut encoder {
            EncoderSpec::Signal(options) => options.leads = width,
            EncoderSpec::Series(options) => options.variables = width,
            EncoderSpec::Windows(options) => options.variables = width,
            EncoderSpec::Omics(options) => options.features = width,
            EncoderSpec::Vision { .. } | EncoderSpec::Whisper { .. } | EncoderSpec::Patches(_) => {}
        }
        let modality = stream.options.modality;
        StreamSpec {
            name: modality.name().to_owned(),
            modality: match modality {
                Modality::Image => ModalityKind::Image,
                Modality::Waveform => ModalityKind::Waveform,
                Modality::Series => ModalityKind::Series,
                Modality::Omics => ModalityKind::Omics,
                Modality::Speech => ModalityKind::Speech,
            },
            encoder,
            tokens: stream.options.tokens,
            resampler: stream.resampler.clone(),
        }
    });
    Some(FusionOptions {
        streams: specs.collect(),
        sites,
        seed,
    })
}

fn files(modality: Modality, tokens: usize, max_items: usize) -> StreamOptions {
    StreamOptions {
        tokens,
        max_items,
        ..StreamOptions::new(modality)
    }
}

fn key<T: Serialize>(options: &T) -> String {
    format!(
        "{}:{}",
        std::any::type_name::<T>(),
        serde_json::to_string(options).expect("options are plain data")
    )
}
