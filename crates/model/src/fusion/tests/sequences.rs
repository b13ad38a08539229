//! Soft tokens in sequences: where they start, packing, padding.

use burn::tensor::Tensor;
use safetensors::tensor::{Dtype, TensorView};

use super::*;
use crate::Mode;
use crate::fusion::projector::Embeddings;
use crate::loss;

/// f32 sums in another order; logits here are around 1.
const CLOSE: f32 = 1e-5;
/// A token number that no text here has.
const UNUSED: i32 = 119;

/// The fixture with the embedding of [`UNUSED`] replaced by the mean of the original embeddings.
fn with_the_mean_as_a_token(base: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let weights = std::fs::read(fixture(base).join("model.safetensors")).unwrap();
    let stored = safetensors::SafeTensors::deserialize(&weights).unwrap();
    let is_embedding = |name: &str| {
        ["embed_tokens", "word_embeddings", "tok_embeddings"]
            .iter()
            .any(|table| name.ends_with(&format!("{table}.weight")))
    };
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = stored
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            assert_eq!(view.dtype(), Dtype::F32);
            let shape = view.shape().to_vec();
            let mut bytes = view.data().to_vec();
            if is_embedding(&name) {
                let numbers: Vec<f32> = bytes
                    .chunks_exact(4)
                    .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                    .collect();
                let mean = values(Embeddings::of(&floats(numbers, [shape[0], shape[1]])).mean);
                let row = UNUSED as usize * shape[1] * 4;
                for (place, number) in mean.iter().enumerate() {
                    bytes[row + 4 * place..row + 4 * place + 4]
                        .copy_from_slice(&number.to_le_bytes());
                }
            }
            (name, shape, bytes)
        })
        .collect();
    assert!(tensors.iter().any(|(name, ..)| is_embedding(name)));
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap();
        (name.as_str(), view)
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    let config = fixture(base).join("config.json");
    std::fs::copy(config, folder.path().join("config.json")).unwrap();
    folder
}

#[test]
fn training_starts_from_the_backbone_on_the_mean_embedding() {
    for (base, pooling) in MODELS {
        let rows = [samples()[..2].to_vec(), samples()[2..].to_vec()];
        let input = pack(&rows, 32, UNUSED);
        let ours = load(base, pooling).for_inference();
        let folder = with_the_mean_as_a_token(base);
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let plain = model_options(pooling, None);
        let plain = Model::load(&checkpoint, &plain, &device()).unwrap();
        let without = ModelInput {
            soft: None,
            ..input.clone()
        };
        let expected = plain.for_inference();
        assert_eq!(
            values(ours.hidden(&input, Mode::Infer)),
            values(expected.hidden(&without, Mode::Infer)),
            "{base}"
        );
        assert_eq!(
            values(ours.forward(&input, Mode::Infer)),
            values(expected.forward(&without, Mode::Infer)),
            "{base}"
        );
        // The slots do count: another token there gives other logits.
        let other = pack(&rows, 32, UNUSED - 1);
        let other = ModelInput {
            soft: None,
            ..other
        };
        assert_ne!(
            values(expected.forward(&other, Mode::Infer)),
            values(expected.forward(&without, Mode::Infer)),
            "{base}"
        );
    }
}

#[test]
fn without_items_a_fused_model_is_the_unfused_one() {
    for (base, pooling) in MODELS {
        let checkpoint = Checkpoint::open(&fixture(base)).unwrap();
        let plain = Model::load(&checkpoint, &model_options(pooling, None), &device()).unwrap();
        let fused = load(base, pooling);
        let input = separate(&[vec![text(1, 9)], vec![text(2, 4)]], 10);
        let mut without = input.clone();
        without.soft = None;
        let expected = values(plain.forward(&without, Mode::Infer));
        assert_eq!(values(fused.forward(&without, Mode::Infer)), expected);
        // Nor do items that nobody placed matter.
        assert_eq!(values(fused.forward(&input, Mode::Infer)), expected);
        assert!(
            fused
                .soft_tokens(&input.soft.unwrap(), Mode::Infer)
                .unwrap()
                .is_none()
        );
    }
}

#[test]
fn packing_and_padding_do_not_change_a_sample() {
    for (base, pooling) in MODELS {
        let model = moved(base, pooling).for_inference();
        let alone = values(model.forward(&separate(&samples(), 16), Mode::Infer));
        let samples = samples();
        let packed = pack(std::slice::from_ref(&samples), 60, 5);
        let packed = values(model.forward(&packed, Mode::Infer));
        assert!(
            largest_difference(&alone, &packed) < CLOSE,
            "{base}: {alone:?} {packed:?}"
        );
        let rows = [samples[..2].to_vec(), samples[2..].to_vec()];
        let two_rows = values(model.forward(&pack(&rows, 33, 9), Mode::Infer));
        assert!(largest_difference(&alone, &two_rows) < CLOSE, "{base}");
    }
}

#[test]
fn a_language_model_reads_soft_tokens() {
    let checkpoint = Checkpoint::open(&fixture("llama3")).unwrap();
    let options = ModelOptions {
        head: HeadOptions::CausalLm,
        fusion: Some(options(3)),
        ..ModelOptions::default()
    };
    let mut model = Model::load(&checkpoint, &options, &device()).unwrap();
    move_all(&mut model);
    let sample = |image| vec![text(1, 3), item(IMAGE, Some(image)), text(2, 4)];
    let seq = 9;
    let logits = |image| {
        let input = separate(&[sample(image)], seq);
        values(model.logits(&input, Mode::Infer))
    };
    let (first, second) = (logits(0), logits(1));
    let vocab = model.config().vocab_size();
    // Causal: what comes before the item does not see it, its slots and what follows do.
    assert_eq!(first[..3 * vocab], second[..3 * vocab]);
    for position in 3..seq {
        let range = position * vocab..(position + 1) * vocab;
        assert_ne!(first[range.clone()], second[range], "{position}");
    }
    // The slots themselves supervise nothing; the last of them predicts the text behind it.
    let input = separate(&[sample(0)], seq);
    let ids: Vec<i32> = input
        .input_ids
        .clone()
        .into_data_as::<i32>()
        .try_to_vec()
        .unwrap();
    let mut targets = crate::shifted_targets(&ids, &[1; 9], 1, seq);
    targets[2..4].fill(-100);
    let loss = model.causal_lm_loss(
        &input,
        integers(targets, [seq]),
        Mode::Train { dropout_seed: 1 },
    );
    let gradients = loss.backward();
    struct Reached<'a>(&'a burn::tensor::Gradients, usize);
    impl ParameterVisitor for Reached<'_> {
        fn visit<const D: usize>(&mut self, name: &str, _: ParameterGroup, tensor: &mut Tensor<D>) {
            if let Some(gradient) = tensor.grad(self.0) {
                let largest = values(gradient).iter().fold(0f32, |m, v| m.max(v.abs()));
                assert!(largest > 0.0 || gradients::cancels(name), "{name}");
                assert!(name.starts_with("fusion.xray.") || name.starts_with("fusion.shared."));
                self.1 += 1;
            }
        }
    }
    let mut reached = Reached(&gradients, 0);
    model.visit_trainable(&mut reached);
    assert!(reached.1 > 20, "{}", reached.1);
}

#[test]
fn what_is_padding_never_reaches_a_loss() {
    // Behind the placed items: one more of each stream, far from the others; longer signals; more
    // observations; longer rows.
    fn with_padding(items: ItemTensors) -> ItemTensors {
        let far = |tensor: Tensor<3>| {
            let [_, leads, samples] = tensor.dims();
            Tensor::cat(
                vec![
                    tensor,
                    floats(vec![50.0; leads * samples], [1, leads, samples]),
                ],
                0,
            )
        };
        let row = |tensor: Tensor<2>, value: f32| {
            let [_, width] = tensor.dims();
            Tensor::cat(vec![tensor, floats(vec![value; width], [1, width])], 0)
        };
        let column = |tensor: Tensor<2>, value: f32| {
            let [items, _] = tensor.dims();
            Tensor::cat(vec![tensor, floats(vec![value; items * 3], [items, 3])], 1)
        };
        match items {
            ItemTensors::Image(pixels) => {
                let far = floats(vec![50.0; 3 * 64], [1, 3, 8, 8]);
                ItemTensors::Image(Tensor::cat(vec![pixels, far], 0))
            }
            ItemTensors::Dense {
                values,
                present,
                mut lengths,
            } => {
                lengths.push(10);
                let longer = |tensor: Tensor<3>| {
                    let zeros = floats(vec![0.0; 4 * 2 * 7], [4, 2, 7]);
                    Tensor::cat(vec![far(tensor), zeros], 2)
                };
                ItemTensors::Dense {
                    values: longer(values),
                    present: longer(present),
                    lengths,
                }
            }
            ItemTensors::Mel(frames) => ItemTensors::Mel(far(frames)),
            ItemTensors::Series {
                time_days,
                variable,
                value,
                present,
            } => ItemTensors::Series {
                time_days: column(row(time_days, 50.0), 50.0),
                variable: Tensor::cat(
                    vec![
                        Tensor::cat(vec![variable, integers(vec![2; 6], [1, 6])], 0),
                        integers(vec![1; 12], [4, 3]),
                    ],
                    1,
                ),
                value: column(row(value, 50.0), -50.0),
                present: column(row(present, 1.0), 0.0),
            },
            ItemTensors::Omics { values, present } => ItemTensors::Omics {
                values: row(values, 50.0),
                present: row(present, 1.0),
            },
            ItemTensors::Windows { values, present } => ItemTensors::Windows {
                values: row(values, 50.0),
                present: row(present, 1.0),
            },
        }
    }

    for (base, pooling) in MODELS {
        let model = moved(base, pooling);
        let run = |padded: bool| {
            let samples = samples();
            let mut input = pack(&[samples], if padded { 70 } else { 52 }, 5);
            if padded {
                let soft = input.soft.as_mut().unwrap();
                let streams = std::mem::take(&mut soft.streams).into_iter();
                soft.streams = streams.map(|items| items.map(with_padding)).collect();
            }
            let mode = Mode::Train { dropout_seed: 1 };
            let targets = integers(vec![0, 2, 1, 2], [4]);
            let loss = loss::multiclass(model.forward(&input, mode), targets, None);
            (values(loss.clone()), gradients::of(&model, &loss))
        };
        let (loss, gradients) = run(false);
        let (padded_loss, padded_gradients) = run(true);
        assert!(largest_difference(&loss, &padded_loss) < CLOSE, "{base}");
        for ((name, a), (_, b)) in gradients.iter().zip(&padded_gradients) {
            let (a, b) = (a.as_ref().unwrap(), b.as_ref().unwrap());
            let largest = a.iter().fold(0f32, |m, v| m.max(v.abs()));
            let difference = largest_difference(a, b);
            assert!(
                difference <= 1e-3 * largest.max(1e-3),
                "{base} {name}: {difference} of {largest}"
            );
        }
    }
}
