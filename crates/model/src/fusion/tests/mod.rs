//! The fused part on tiny backbones of both families.

mod calibration;
mod checks;
mod gradients;
mod items;
mod saving;
mod sequences;
mod towers;
mod vectors;

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::fusion::{
    EncoderSpec, FusionOptions, ItemTensors, ModalityKind, OmicsEncoderOptions, PatchOptions,
    Placement, ResamplerOptions, SeriesOptions, SignalOptions, SoftInput, StreamSpec,
    WindowsOptions,
};
use crate::random::Stream;
use crate::{
    Checkpoint, HeadOptions, LoraOptions, Model, ModelInput, ModelOptions, ParameterGroup,
    ParameterVisitor, Pooling, Problem, SampleSpan,
};

/// Backbones of both families with every pooling.
const MODELS: [(&str, Pooling); 8] = [
    ("llama3", Pooling::Last),
    ("bert", Pooling::Cls),
    ("bert", Pooling::Mean),
    ("roberta", Pooling::Cls),
    // Its embeddings are scaled, those of the next are narrower than its states.
    ("gemma2", Pooling::Last),
    ("electra", Pooling::Cls),
    ("modernbert", Pooling::Cls),
    ("deberta", Pooling::Mean),
];

// Streams, in the order of `options`.
const IMAGE: usize = 0;
const WAVE: usize = 1;
const LABS: usize = 2;
const GENES: usize = 3;
const VOICE: usize = 4;

fn device() -> Device {
    Device::flex()
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

fn options(seed: u64) -> FusionOptions {
    let stream = |name: &str, modality, tokens, encoder| StreamSpec {
        name: name.to_owned(),
        modality,
        encoder,
        tokens,
        resampler: ResamplerOptions {
            width: 16,
            depth: 2,
            heads: 2,
        },
    };
    let signal = |leads| {
        EncoderSpec::Signal(SignalOptions {
            leads,
            patch_samples: 4,
            kernel_samples: 6,
            stride_samples: 2,
            width: 16,
            depth: 1,
            heads: 2,
        })
    };
    let patches = EncoderSpec::Patches(PatchOptions {
        patch: 4,
        width: 16,
        depth: 1,
        heads: 2,
    });
    let series = EncoderSpec::Series(SeriesOptions {
        variables: 3,
        time_scale_days: 0.5,
        hidden: 5,
        width: 12,
        depth: 1,
        heads: 2,
    });
    let omics = EncoderSpec::Omics(OmicsEncoderOptions {
        features: 7,
        groups: vec![vec![0, 1, 2], vec![2, 5], vec![6, 4, 3, 1]],
        width: 12,
        depth: 1,
        heads: 2,
        ..OmicsEncoderOptions::default()
    });
    FusionOptions {
        streams: vec![
            stream("xray", ModalityKind::Image, 2, patches),
            stream("ecg", ModalityKind::Waveform, 3, signal(2)),
            stream("labs", ModalityKind::Series, 1, series),
            stream("genes", ModalityKind::Omics, 2, omics),
            stream("voice", ModalityKind::Speech, 2, signal(4)),
        ],
        sites: 2,
        seed,
    }
}

/// Normal numbers that belong to a name.
fn normal<const D: usize>(name: &str, shape: [usize; D]) -> Tensor<D> {
    let values = Stream::new(7, name).normal(shape.iter().product(), 1.0);
    Tensor::from_data(TensorData::new(values, shape), &device())
}

/// 1, and 0 at about one place in five.
fn presence<const D: usize>(name: &str, shape: [usize; D]) -> Tensor<D> {
    let values = Stream::new(7, name).uniform(shape.iter().product(), 1.0);
    let values = values.iter().map(|&v| f32::from(v > -0.6)).collect();
    Tensor::from_data(TensorData::new(values, shape), &device())
}

fn floats<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values, shape), &device())
}

fn integers<const D: usize>(values: Vec<i32>, shape: [usize; D]) -> Tensor<D, Int> {
    Tensor::from_data(TensorData::new(values, shape), &device())
}

/// Three items of each stream.
fn items() -> Vec<Option<ItemTensors>> {
    let present = presence("ecg there", [3, 2, 10]);
    let mut within = vec![1f32; 3 * 2 * 10];
    // Lengths of 10, 7 and 3 samples.
    for (item, length) in [(1, 7), (2, 3)] {
        for lead in 0..2 {
            let row = (item * 2 + lead) * 10;
            within[row + length..row + 10].fill(0.0);
        }
    }
    let present = present * floats(within, [3, 2, 10]);
    let observed = floats(
        [
            [1.0; 6].to_vec(),
            vec![1.0, 1.0, 0.0, 0.0, 0.0, 0.0],
            vec![1.0, 1.0, 1.0, 1.0, 0.0, 0.0],
        ]
        .concat(),
        [3, 6],
    );
    let measured = presence("genes there", [3, 7]);
    vec![
        Some(ItemTensors::Image(normal("xray", [3, 3, 8, 8]))),
        Some(ItemTensors::Dense {
            values: normal("ecg", [3, 2, 10]) * present.clone(),
            present,
            lengths: vec![10, 7, 3],
        }),
        Some(ItemTensors::Series {
            time_days: normal("labs time", [3, 6]).abs(),
            variable: integers((0..18).map(|i| i % 3).collect(), [3, 6]),
            value: normal("labs", [3, 6]),
            present: observed,
        }),
        Some(ItemTensors::Omics {
            values: normal("genes", [3, 7]) * measured.clone(),
            present: measured,
        }),
        Some(ItemTensors::Mel(normal("voice", [3, 4, 12]))),
    ]
}

/// A piece of a sample.
#[derive(Clone)]
enum Part {
    Text(Vec<i32>),
    Item(Placement),
}

/// An item somewhere in a sample, with a time and a site.
fn item(stream: usize, item: Option<usize>) -> Part {
    let number = stream + 3 * item.unwrap_or(2);
    Part::Item(Placement {
        stream,
        item,
        row: 0,
        start: 0,
        days_before: (!number.is_multiple_of(4)).then_some(13.7 * number as f32),
        site: (!number.is_multiple_of(3)).then_some(number % 2),
    })
}

fn text(first: i32, length: i32) -> Part {
    Part::Text(
        (0..length)
            .map(|t| 3 + (first * 31 + t * 11) % 110)
            .collect(),
    )
}

/// Four samples with every stream, items alone, several of one kind, and missing ones.
fn samples() -> Vec<Vec<Part>> {
    vec![
        vec![
            text(1, 3),
            item(IMAGE, Some(0)),
            text(2, 2),
            item(LABS, Some(1)),
            text(3, 1),
            item(VOICE, None),
        ],
        vec![
            text(4, 2),
            item(WAVE, Some(1)),
            item(GENES, None),
            item(VOICE, Some(0)),
        ],
        vec![
            item(IMAGE, Some(2)),
            item(IMAGE, Some(1)),
            item(GENES, Some(2)),
            item(LABS, None),
            text(5, 4),
        ],
        vec![
            text(6, 1),
            item(WAVE, None),
            item(LABS, Some(0)),
            item(WAVE, Some(2)),
            item(VOICE, Some(1)),
            item(IMAGE, None),
            text(7, 2),
        ],
    ]
}

/// Rows of samples packed one behind the other, padded to `seq`; `filler` is the token number at the
/// slots.
fn pack(rows: &[Vec<Vec<Part>>], seq: usize, filler: i32) -> ModelInput {
    let tokens: Vec<usize> = options(0)
        .streams
        .iter()
        .map(|stream| stream.tokens)
        .collect();
    let mut ids = vec![0; rows.len() * seq];
    let mut positions = vec![0; rows.len() * seq];
    let mut segments = vec![0; rows.len() * seq];
    let mut spans = Vec::new();
    let mut placements = Vec::new();
    for (row, samples) in rows.iter().enumerate() {
        let mut start = 0;
        for (number, parts) in samples.iter().enumerate() {
            let mut length = 0;
            for part in parts {
                let piece = match part {
                    Part::Text(piece) => piece.clone(),
                    Part::Item(placement) => {
                        placements.push(Placement {
                            row,
                            start: start + length,
                            ..*placement
                        });
                        vec![filler; tokens[placement.stream]]
                    }
                };
                let place = row * seq + start + length;
                ids[place..place + piece.len()].copy_from_slice(&piece);
                length += piece.len();
            }
            for position in 0..length {
                positions[row * seq + start + position] = position as i32;
                segments[row * seq + start + position] = number as i32 + 1;
            }
            spans.push(SampleSpan { row, start, length });
            start += length;
        }
        assert!(start <= seq, "the samples do not fit");
    }
    let shape = [rows.len(), seq];
    ModelInput {
        input_ids: integers(ids, shape),
        positions: integers(positions, shape),
        segments: integers(segments, shape),
        samples: spans,
        soft: Some(SoftInput {
            streams: items(),
            placements,
        }),
    }
}

/// Each sample in a row of its own.
fn separate(samples: &[Vec<Part>], seq: usize) -> ModelInput {
    let rows: Vec<_> = samples.iter().map(|sample| vec![sample.clone()]).collect();
    pack(&rows, seq, 0)
}

fn model_options(pooling: Pooling, fusion: Option<FusionOptions>) -> ModelOptions {
    ModelOptions {
        lora: Some(LoraOptions {
            r: 2,
            ..LoraOptions::default()
        }),
        head: HeadOptions::Classifier {
            labels: 3,
            pooling,
            problem: Problem::Multiclass,
        },
        fusion,
        ..ModelOptions::default()
    }
}

fn load(base: &str, pooling: Pooling) -> Model {
    let checkpoint = Checkpoint::open(&fixture(base)).unwrap();
    let options = model_options(pooling, Some(options(3)));
    Model::load(&checkpoint, &options, &device()).unwrap()
}

/// As [`load`], with everything trained moved by a fixed pattern, so that nothing is zero.
fn moved(base: &str, pooling: Pooling) -> Model {
    let mut model = load(base, pooling);
    move_all(&mut model);
    model
}

fn move_all(model: &mut Model) {
    struct Move;
    impl ParameterVisitor for Move {
        fn visit<const D: usize>(&mut self, name: &str, _: ParameterGroup, tensor: &mut Tensor<D>) {
            let shape = tensor.dims();
            let pattern = Stream::new(1, name).normal(shape.iter().product(), 0.1);
            let moved = tensor.clone().inner() + floats(pattern, shape);
            *tensor = moved.autodiff().require_grad();
        }
    }
    model.visit_trainable(&mut Move);
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.inner().into_data().try_to_vec().expect("f32")
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max)
}

/// Everything trained, by name.
#[derive(Default)]
struct Trained(Vec<(String, ParameterGroup, Vec<usize>, Vec<f32>)>);

impl ParameterVisitor for Trained {
    fn visit<const D: usize>(&mut self, name: &str, group: ParameterGroup, tensor: &mut Tensor<D>) {
        let shape = tensor.dims().to_vec();
        let numbers = values(tensor.clone());
        self.0.push((name.to_owned(), group, shape, numbers));
    }
}

fn trained(model: &Model) -> Trained {
    let mut trained = Trained::default();
    model.clone().visit_trainable(&mut trained);
    trained
}
