//! Every adapter variant against PEFT: from the same initial tensors, ten steps of AdamW on the same
//! batch, through the code of the training loop.
//!
//! `scripts/references/adapter_variants.py` makes the fixtures; the checkpoints are those of
//! calor-model.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, FloatDType, Int, Tensor, TensorData};
use calor_meter::{EnergyOptions, Meter, MeteredDevice, Purpose};
use calor_model::{
    Checkpoint, Mode, Model, ModelInput, ParameterGroup, ParameterVisitor, SampleSpan, loss,
    shifted_targets,
};
use calor_train::optimizer::{LearningRates, LoraPlus, OptimizerOptions, TensorRules};
use calor_train::step::TrainStep;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::Deserialize;

/// Losses are means of a few dozen terms near 1, computed in f32 in another order than PyTorch's; ten
/// steps carry a difference on. Ten times what is measured is well below this.
const LOSS_TOLERANCE: f64 = 1e-3;
/// A step moves an element by at most the learning rate, 1e-3 (1.6e-2 under LoRA+), whatever its
/// gradient's size: Adam divides by it. Elements whose gradient is near the rounding of f32 move by
/// what rounding leaves, the others agree to it.
const TENSOR_TOLERANCE: f32 = 1e-4;

const VARIANTS: [&str; 12] = [
    "lora",
    "rslora",
    "dora",
    "pissa",
    "pissa-dora",
    "lora-plus",
    "embedding",
    "embedding-lora-plus",
    "tokens",
    "layers",
    "bias-all",
    "bias-lora",
];

/// `steps.json`
#[derive(Deserialize)]
struct Steps {
    base: String,
    family: String,
    losses: Vec<f64>,
    gradient_norms: Vec<f64>,
    learning_rate: f64,
    weight_decay: f64,
    max_grad_norm: f64,
    lora_plus_ratio: Option<f64>,
    lora_plus_embedding_learning_rate: f64,
}

#[test]
fn ten_steps_of_every_variant_of_a_decoder_are_those_of_peft() {
    VARIANTS
        .iter()
        .for_each(|variant| compare("llama", variant));
}

#[test]
fn ten_steps_of_every_variant_of_an_encoder_are_those_of_peft() {
    VARIANTS.iter().for_each(|variant| compare("bert", variant));
}

#[test]
fn every_variant_is_written_so_that_it_reads_the_same() {
    for family in ["llama", "bert"] {
        for variant in VARIANTS {
            let (folder, steps) = fixture(family, variant);
            let checkpoint = Checkpoint::open(&checkpoint_folder(&steps.base)).unwrap();
            let (input, _) = batch(family);
            let mut model = load(&checkpoint, &folder);
            // Away from the start: a pair that adds nothing hides what is wrong with it.
            model.visit_trainable(&mut Perturb);
            let written = tempfile::tempdir().unwrap();
            model.save_adapter(written.path(), &steps.base).unwrap();
            let loaded = load(&checkpoint, written.path());
            let (ours, theirs) = (states(&model, &input), states(&loaded, &input));
            // PiSSA's pair of twice the rank adds what the weight lacks in another order.
            let tolerance = if variant.contains("pissa") { 2e-5 } else { 0.0 };
            let difference = largest_difference(&ours, &theirs);
            assert!(difference <= tolerance, "{family}-{variant}: {difference}");

            // And into a model that is there, as a run takes up its best adapter again.
            let mut other = load(&checkpoint, &folder);
            other
                .load_adapter(written.path())
                .unwrap_or_else(|error| panic!("{family}-{variant}: {error}"));
            assert_eq!(states(&other, &input), ours, "{family}-{variant}");
        }
    }
}

#[test]
fn what_peft_wrote_of_every_variant_is_written_back_byte_for_byte() {
    for family in ["llama", "bert"] {
        // PiSSA's pairs are written for other frozen weights than PEFT's, and of biases not what
        // nothing reads.
        for variant in VARIANTS
            .iter()
            .filter(|variant| !variant.contains("pissa") && **variant != "bias-all")
        {
            let (folder, steps) = fixture(family, variant);
            let checkpoint = Checkpoint::open(&checkpoint_folder(&steps.base)).unwrap();
            let written = tempfile::tempdir().unwrap();
            load(&checkpoint, &folder)
                .save_adapter(written.path(), &steps.base)
                .unwrap();
            for file in ["adapter_model.safetensors", "adapter_config.json"] {
                let theirs = std::fs::read(folder.join(file)).unwrap();
                let ours = std::fs::read(written.path().join(file)).unwrap();
                assert!(
                    theirs == ours,
                    "{family}-{variant}/{file}:\n{}\n{}",
                    String::from_utf8_lossy(&theirs[..theirs.len().min(2500)]),
                    String::from_utf8_lossy(&ours[..ours.len().min(2500)]),
                );
            }
        }
    }
}

#[test]
fn a_model_that_starts_from_its_weights_starts_again_from_what_it_saved() {
    for (family, init) in [("llama", "pissa"), ("bert", "pissa_niter_2")] {
        let (folder, steps) = fixture(family, "pissa");
        let checkpoint = Checkpoint::open(&checkpoint_folder(&steps.base)).unwrap();
        let mut options = load(&checkpoint, &folder).options().clone();
        options.lora.as_mut().unwrap().init = init.parse().unwrap();
        options.seed = 11;
        let mut model = Model::load(&checkpoint, &options, &device()).unwrap();
        let plain = {
            let mut options = options.clone();
            options.lora = None;
            Model::load(&checkpoint, &options, &device()).unwrap()
        };
        let (input, _) = batch(family);
        let difference = largest_difference(
            &values(plain.hidden(&input, Mode::Infer)),
            &values(model.hidden(&input, Mode::Infer)),
        );
        // Weight and pair together are the weight, but for the rounding of both.
        assert!(difference < 1e-5, "{family}: {difference}");

        model.visit_trainable(&mut Perturb);
        let written = tempfile::tempdir().unwrap();
        model.save_adapter(written.path(), &steps.base).unwrap();
        // Another seed finds other vectors where the search is cut short; what was saved counts.
        options.seed = 12;
        let mut resumed =
            Model::load_again(&checkpoint, &options, Some(written.path()), &device()).unwrap();
        resumed.load_adapter(written.path()).unwrap();
        assert_eq!(states(&resumed, &input), states(&model, &input), "{family}");
    }
}

/// Writes an adapter of every variant, away from its start, and what it computes, for
/// `scripts/references/check_adapter.py` to load in PEFT: into the folder that `CALOR_VARIANTS` names.
#[test]
#[ignore = "writes files for a script"]
fn variants_for_peft() {
    let Some(out) = std::env::var_os("CALOR_VARIANTS").map(PathBuf::from) else {
        return;
    };
    for family in ["llama", "bert"] {
        for variant in VARIANTS {
            let (folder, steps) = fixture(family, variant);
            let checkpoint = Checkpoint::open(&checkpoint_folder(&steps.base)).unwrap();
            let mut model = load(&checkpoint, &folder);
            model.visit_trainable(&mut Perturb);
            let out = out.join(format!("{family}-{variant}"));
            model.save_adapter(&out, &steps.base).unwrap();
            let (input, _) = batch(family);
            let logits = states(&model, &input);
            let [rows, seq] = input.input_ids.dims();
            let shape = match family {
                "llama" => vec![rows, seq, logits.len() / (rows * seq)],
                _ => vec![rows, logits.len() / rows],
            };
            let bytes = std::fs::read(here().join(format!("{family}.safetensors"))).unwrap();
            let given = SafeTensors::deserialize(&bytes).unwrap();
            let logits: Vec<u8> = logits.iter().flat_map(|v| v.to_le_bytes()).collect();
            let logits = TensorView::new(Dtype::F32, shape, &logits).unwrap();
            let tensors = [
                ("input_ids", given.tensor("input_ids").unwrap()),
                ("attention_mask", given.tensor("attention_mask").unwrap()),
                ("logits", logits),
            ];
            let expect = safetensors::serialize(tensors, None).unwrap();
            std::fs::write(out.join("expect.safetensors"), expect).unwrap();
        }
    }
}

/// Runs the steps and compares every loss, every gradient norm and every tensor.
fn compare(family: &str, variant: &str) {
    let (folder, steps) = fixture(family, variant);
    let name = format!("{family}-{variant}");
    assert_eq!(steps.family, family);
    let checkpoint = Checkpoint::open(&checkpoint_folder(&steps.base)).unwrap();
    let mut model = load(&checkpoint, &folder);
    let (input, targets) = batch(family);
    let rates = LearningRates {
        lora_plus: steps.lora_plus_ratio.map(|ratio| LoraPlus {
            ratio,
            embedding: steps.lora_plus_embedding_learning_rate,
        }),
        ..LearningRates::uniform(steps.learning_rate)
    };
    let mut train_step = TrainStep::new(
        OptimizerOptions::default(),
        TensorRules::new(rates, steps.weight_decay),
        steps.max_grad_norm,
        true,
    );
    let mut meter = Meter::open(&EnergyOptions::default(), &MeteredDevice::Cpu).unwrap();
    meter.begin(Purpose::Training);
    let mut loss_difference = 0f64;
    for (index, (expected, norm)) in steps.losses.iter().zip(&steps.gradient_norms).enumerate() {
        let mode = Mode::Train { dropout_seed: 0 };
        let result = train_step
            .run(
                &mut model,
                std::iter::once(()),
                |model: &Model, (), _: &mut Meter| {
                    Ok(match family {
                        "llama" => model.causal_lm_loss(&input, targets.clone(), mode),
                        _ => loss::multiclass(model.forward(&input, mode), targets.clone(), None),
                    })
                },
                supervised(&targets),
                1.0,
                index as u64 + 1,
                &mut meter,
            )
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let difference = (result.loss - expected).abs() / expected;
        loss_difference = loss_difference.max(difference);
        assert!(
            difference < LOSS_TOLERANCE,
            "{name}, step {}: loss {} and {expected}",
            index + 1,
            result.loss
        );
        let difference = (result.grad_norm.unwrap() - norm).abs() / norm;
        assert!(
            difference < LOSS_TOLERANCE,
            "{name}, step {}: gradient norm {} and {norm}",
            index + 1,
            result.grad_norm.unwrap()
        );
    }
    let mut ours = Values::default();
    model.visit_trainable(&mut ours);
    let theirs = tensors(&folder.join("final.safetensors"));
    let start = tensors(&folder.join("adapter_model.safetensors"));
    let mut tensor_difference = 0f32;
    let mut moved = 0f32;
    for (key, ours) in &ours.0 {
        let theirs = theirs
            .get(key)
            .unwrap_or_else(|| panic!("{name}: PEFT has no {key}"));
        moved = moved.max(largest_difference(theirs, &start[key]));
        // A key's bias adds the same to all of a query's scores, so its gradient is zero, and Adam
        // makes steps of what rounding leaves of it.
        if key.ends_with("self.key.bias") || key.ends_with("k_proj.bias") {
            continue;
        }
        let difference = largest_difference(ours, theirs);
        tensor_difference = tensor_difference.max(difference);
        assert!(difference < TENSOR_TOLERANCE, "{name}, {key}: {difference}");
    }
    assert!(moved > 10.0 * TENSOR_TOLERANCE, "{name}: nothing moved");
    println!("{name}: losses to {loss_difference:.1e}, tensors to {tensor_difference:.1e}");
}

fn load(checkpoint: &Checkpoint, adapter: &Path) -> Model {
    Model::load_with_adapter(checkpoint, adapter, FloatDType::F32, &device())
        .unwrap_or_else(|error| panic!("{}: {error}", adapter.display()))
}

fn device() -> Device {
    Device::flex()
}

fn here() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/variants")
}

fn checkpoint_folder(base: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../model/tests/fixtures")
        .join(base)
}

fn fixture(family: &str, variant: &str) -> (PathBuf, Steps) {
    let folder = here().join(format!("{family}-{variant}"));
    let text = std::fs::read_to_string(folder.join("steps.json")).unwrap();
    (folder, serde_json::from_str(&text).unwrap())
}

/// The family's batch, and its targets: the next token of each token, or a class a row.
fn batch(family: &str) -> (ModelInput, Tensor<1, Int>) {
    let bytes = std::fs::read(here().join(format!("{family}.safetensors"))).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let integers = |name: &str| -> Vec<i32> {
        let data = file.tensor(name).unwrap().data();
        data.chunks_exact(8)
            .map(|bytes| i64::from_le_bytes(bytes.try_into().unwrap()) as i32)
            .collect()
    };
    let shape = file.tensor("input_ids").unwrap().shape().to_vec();
    let (rows, seq) = (shape[0], shape[1]);
    let (ids, mask) = (integers("input_ids"), integers("attention_mask"));
    let matrix = |values: Vec<i32>| {
        Tensor::<2, Int>::from_data(TensorData::new(values, [rows, seq]), &device())
    };
    let targets = match family {
        "llama" => shifted_targets(&ids, &mask, rows, seq),
        _ => integers("labels"),
    };
    let count = targets.len();
    let input = ModelInput {
        input_ids: matrix(ids),
        positions: matrix((0..rows * seq).map(|place| (place % seq) as i32).collect()),
        segments: matrix(mask.clone()),
        samples: (0..rows)
            .map(|row| SampleSpan {
                row,
                start: 0,
                length: mask[row * seq..(row + 1) * seq].iter().sum::<i32>() as usize,
            })
            .collect(),
        soft: None,
    };
    let targets = Tensor::from_data(TensorData::new(targets, [count]), &device());
    (input, targets)
}

/// How many targets count.
fn supervised(targets: &Tensor<1, Int>) -> f64 {
    let values: Vec<i32> = targets.clone().into_data().try_to_vec().unwrap();
    values.iter().filter(|target| **target >= 0).count() as f64
}

/// What the model computes: logits where it has a head over the vocabulary or over classes.
fn states(model: &Model, input: &ModelInput) -> Vec<f32> {
    match model.options().head {
        calor_model::HeadOptions::CausalLm => values(model.logits(input, Mode::Infer)),
        _ => values(model.forward(input, Mode::Infer)),
    }
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.inner().into_data().try_to_vec().unwrap()
}

fn tensors(path: &Path) -> BTreeMap<String, Vec<f32>> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.tensors()
        .into_iter()
        .map(|(name, view)| {
            let values = view.data().chunks_exact(4);
            let values = values.map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()));
            (name, values.collect())
        })
        .collect()
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let pairs = a.iter().zip(b);
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[derive(Default)]
struct Values(BTreeMap<String, Vec<f32>>);

impl ParameterVisitor for Values {
    fn visit<const D: usize>(&mut self, name: &str, _: ParameterGroup, tensor: &mut Tensor<D>) {
        self.0.insert(name.to_owned(), values(tensor.clone()));
    }
}

/// Adds a fixed pattern to everything trained.
struct Perturb;

impl ParameterVisitor for Perturb {
    fn visit<const D: usize>(&mut self, name: &str, _: ParameterGroup, tensor: &mut Tensor<D>) {
        let shape = tensor.shape();
        let pattern: Vec<f32> = (0..shape.num_elements())
            .map(|index| 0.03 * ((index * 7 + name.len()) as f32).sin())
            .collect();
        let pattern = Tensor::<D>::from_data(TensorData::new(pattern, shape), &device());
        *tensor = Tensor::from_inner(tensor.clone().inner() + pattern).require_grad();
    }
}
