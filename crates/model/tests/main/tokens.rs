//! Chosen tokens of a batch, and texts that are continued with a key-value cache.

use crate::common::{device, fixture, largest_difference, packed, sequences, values};
use burn::tensor::{Device, FloatDType, Int, Tensor, TensorData};
use calor_model::{
    Checkpoint, HeadOptions, KeyValueCache, LoraOptions, Mode, Model, ModelError, ModelOptions,
    ParameterGroup, ParameterVisitor,
};

fn load(base: &str, head: HeadOptions) -> Model {
    let checkpoint = Checkpoint::open(&fixture(base)).unwrap();
    let options = ModelOptions {
        lora: Some(LoraOptions {
            r: 2,
            ..LoraOptions::default()
        }),
        head,
        seed: 5,
        ..ModelOptions::default()
    };
    let mut model = Model::load(&checkpoint, &options, &device()).unwrap();
    move_all(&mut model);
    model
}

/// Gives everything trained other values, so that the adapter does something.
fn move_all(model: &mut Model) {
    struct Move;
    impl ParameterVisitor for Move {
        fn visit<const D: usize>(&mut self, _: &str, _: ParameterGroup, tensor: &mut Tensor<D>) {
            let shape = tensor.shape();
            let moves = (0..shape.num_elements()).map(|place| ((place % 7) as f32 - 3.0) * 0.02);
            let moves = TensorData::new(moves.collect::<Vec<_>>(), shape);
            let moves = Tensor::<D>::from_data(moves, &device());
            *tensor = (tensor.clone().inner() + moves).autodiff().require_grad();
        }
    }
    model.visit_trainable(&mut Move);
}

fn integers(values: &[i32]) -> Tensor<1, Int> {
    let device: Device = device();
    Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), &device)
}

/// The logits after each token are those of the whole text without a cache, also where texts of
/// different lengths share one, and with a sliding window. Both add up the same products in another
/// order, hence 2e-5 for logits of about 1.
#[test]
fn a_cache_changes_no_logits() {
    for base in ["llama3", "mistral", "qwen2-window", "qwen3"] {
        let model = load(base, HeadOptions::CausalLm).for_inference();
        let texts = sequences();
        let whole: Vec<Vec<f32>> = texts
            .iter()
            .map(|text| {
                let input = packed(&[vec![text.clone()]], text.len());
                values(model.logits(&input, Mode::Infer))
            })
            .collect();
        let vocab = model.config().vocab_size();
        let started = [4, 1, 6, 2];
        let mut cache = KeyValueCache::new();
        let mut next: Vec<Vec<u32>> = texts
            .iter()
            .zip(started)
            .map(|(text, start)| text[..start].iter().map(|token| *token as u32).collect())
            .collect();
        let mut compared = 0;
        for step in 0..6 {
            let logits = values(model.extend(&mut cache, &next));
            assert_eq!(logits.len(), texts.len() * vocab);
            for (row, logits) in logits.chunks(vocab).enumerate() {
                let place = started[row] + step - 1;
                if place < texts[row].len() {
                    let expected = &whole[row][place * vocab..][..vocab];
                    let difference = largest_difference(logits, expected);
                    assert!(difference < 2e-5, "{base} {row} {step}: {difference}");
                    compared += 1;
                }
            }
            next = texts
                .iter()
                .zip(started)
                .map(|(text, start)| vec![text.get(start + step).map_or(3, |token| *token as u32)])
                .collect();
        }
        assert!(compared > 15);
        assert_eq!(cache.lengths(), started.map(|start| start + 5));
    }
}

#[test]
fn several_tokens_at_once_are_as_many_as_one_by_one() {
    let model = load("llama3", HeadOptions::CausalLm).for_inference();
    let text: Vec<u32> = sequences()[2].iter().map(|token| *token as u32).collect();
    let mut cache = KeyValueCache::new();
    for token in &text {
        model.extend(&mut cache, &[vec![*token]]);
    }
    let one_by_one = values(model.extend(&mut cache, &[vec![7]]));
    let mut cache = KeyValueCache::new();
    model.extend(&mut cache, &[text[..3].to_vec()]);
    model.extend(&mut cache, &[text[3..].to_vec()]);
    let in_pieces = values(model.extend(&mut cache, &[vec![7]]));
    assert!(largest_difference(&one_by_one, &in_pieces) < 2e-5);
}

/// At chosen tokens the loss and its gradient are those of all tokens with the others ignored.
#[test]
fn the_loss_at_chosen_tokens_is_that_of_the_whole() {
    let model = load("llama3", HeadOptions::CausalLm);
    let input = packed(&[vec![sequences()[0].clone(), sequences()[1].clone()]], 12);
    let (places, chosen) = ([0, 3, 5, 8], [9, 4, 11, 6]);
    let mut targets = vec![-100; 12];
    for (place, target) in places.iter().zip(chosen) {
        targets[*place as usize] = target;
    }
    struct Gradients<'a>(&'a burn::tensor::Gradients, Vec<f32>);
    impl ParameterVisitor for Gradients<'_> {
        fn visit<const D: usize>(&mut self, _: &str, _: ParameterGroup, tensor: &mut Tensor<D>) {
            let gradient = tensor.grad(self.0).expect("a gradient");
            self.1.extend(values(gradient));
        }
    }
    let results = [
        model.causal_lm_loss(&input, integers(&targets), Mode::Infer),
        model.causal_lm_loss_at(&input, integers(&places), integers(&chosen), Mode::Infer),
    ]
    .map(|loss| {
        let gradients = loss.backward();
        let mut found = Gradients(&gradients, Vec::new());
        model.clone().visit_trainable(&mut found);
        (values(loss)[0], found.1)
    });
    let [(whole, all), (at, some)] = results;
    assert!((whole - at).abs() < 1e-5 * whole.abs(), "{whole} {at}");
    let size = all.iter().fold(0f32, |size, value| size.max(value.abs()));
    assert!(size > 0.0 && largest_difference(&all, &some) < 1e-5 * size);
    let terms =
        model
            .for_inference()
            .causal_lm_losses_at(&input, integers(&places), integers(&chosen));
    let terms = values(terms);
    assert_eq!(terms.len(), 4);
    assert!((terms.iter().sum::<f32>() - at).abs() < 1e-5 * at.abs());
}

/// A token classifier says the same of a token wherever its text stands, and comes back from its
/// folder, which is PEFT's of a TOKEN_CLS task.
#[test]
fn a_token_classifier_is_saved_as_peft_saves_it() {
    let cases = [
        ("bert", "classifier"),
        ("roberta", "classifier"),
        ("llama3", "score"),
    ];
    for (base, name) in cases {
        let model = load(base, HeadOptions::TokenClassifier { labels: 3 });
        let texts = sequences();
        let alone = packed(&[vec![texts[0].clone()]], 7);
        let second = packed(&[vec![texts[1].clone(), texts[0].clone()]], 12);
        let logits = |model: &Model, input, places: &[i32]| {
            values(model.token_logits(input, integers(places), Mode::Infer))
        };
        let expected = logits(&model, &alone, &[0, 2, 6]);
        assert_eq!(expected.len(), 9);
        let difference = largest_difference(&expected, &logits(&model, &second, &[3, 5, 9]));
        assert!(difference < 2e-5, "{base}: {difference}");

        let folder = tempfile::tempdir().unwrap();
        model.save_adapter(folder.path(), "base").unwrap();
        let config = std::fs::read_to_string(folder.path().join("adapter_config.json")).unwrap();
        assert!(config.contains("\"task_type\": \"TOKEN_CLS\""));
        let tensors = std::fs::read(folder.path().join("adapter_model.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&tensors).unwrap();
        for part in ["weight", "bias"] {
            let key = format!("base_model.model.{name}.{part}");
            assert!(tensors.tensor(&key).is_ok(), "{base}: {key}");
        }
        let checkpoint = Checkpoint::open(&fixture(base)).unwrap();
        let read = |folder: &std::path::Path| -> Result<Model, ModelError> {
            Model::load_with_adapter(&checkpoint, folder, FloatDType::F32, &device())
        };
        let again = read(folder.path()).unwrap();
        assert_eq!(logits(&again, &alone, &[0, 2, 6]), expected, "{base}");
        // PEFT's own folders have no file of ours.
        std::fs::remove_file(folder.path().join("calor.json")).unwrap();
        let again = read(folder.path()).unwrap();
        assert_eq!(
            again.options().head,
            HeadOptions::TokenClassifier { labels: 3 }
        );
        assert_eq!(logits(&again, &alone, &[0, 2, 6]), expected, "{base}");
    }
}

/// Logits of every token, as PEFT and Transformers compute them with an adapter of theirs
/// (`scripts/references/models.py`). Both work in f32; logits are about 1.
#[test]
fn a_token_classifier_of_peft_gives_the_same_logits() {
    for (base, adapter) in [
        ("bert", "adapter-bert-tokens"),
        ("roberta", "adapter-roberta-tokens"),
        ("llama3", "adapter-llama-tokens"),
    ] {
        let folder = fixture(adapter);
        let reference = std::fs::read(folder.join("reference.safetensors")).unwrap();
        let reference = safetensors::SafeTensors::deserialize(&reference).unwrap();
        let ids = reference.tensor("input_ids").unwrap();
        let seq = ids.shape()[1];
        let ids: Vec<i32> = ids
            .data()
            .chunks_exact(8)
            .map(|bytes| i64::from_le_bytes(bytes.try_into().unwrap()) as i32)
            .collect();
        let expected: Vec<f32> = reference
            .tensor("logits")
            .unwrap()
            .data()
            .chunks_exact(4)
            .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
            .collect();
        let rows: Vec<Vec<Vec<i32>>> = ids.chunks(seq).map(|row| vec![row.to_vec()]).collect();
        let checkpoint = Checkpoint::open(&fixture(base)).unwrap();
        let model =
            Model::load_with_adapter(&checkpoint, &folder, FloatDType::F32, &device()).unwrap();
        let places: Vec<i32> = (0..ids.len() as i32).collect();
        let logits = model.token_logits(&packed(&rows, seq), integers(&places), Mode::Infer);
        let difference = largest_difference(&values(logits), &expected);
        assert!(difference < 2e-5, "{adapter}: {difference}");
    }
}

#[test]
fn one_class_is_refused() {
    let checkpoint = Checkpoint::open(&fixture("bert")).unwrap();
    let options = ModelOptions {
        head: HeadOptions::TokenClassifier { labels: 1 },
        ..ModelOptions::default()
    };
    let error = Model::load(&checkpoint, &options, &device()).unwrap_err();
    assert!(error.to_string().contains("at least two classes"));
}
