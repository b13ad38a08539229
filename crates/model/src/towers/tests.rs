//! Towers against what Transformers and PEFT computed (`scripts/references/towers.py`), and what
//! becomes of their tensors.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Gradients, Tensor, TensorData};

use super::*;
use crate::lora::Targets;
use crate::matching::{Patterned, Patterns};
use crate::weights::TensorFile;

/// f32 sums in another order; of each tensor's largest magnitude.
const TOLERANCE: f32 = 1e-5;
const PREFIX: &str = "fusion.scan.encoder.";
const FIXTURES: [&str; 5] = [
    "towers_vit",
    "towers_vit_wide",
    "towers_clip",
    "towers_siglip",
    "towers_whisper",
];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

fn build(name: &str, lora: Option<LoraOptions>) -> Tower {
    let options = TowerOptions {
        lora,
        seed: 3,
        name_prefix: PREFIX.to_owned(),
        ..TowerOptions::default()
    };
    let checkpoint = Tower::open(&fixture(name)).unwrap();
    Tower::build(&checkpoint, &options, &Device::flex()).unwrap()
}

/// The adapter that the script put on the fixture's tower.
fn adapter(name: &str) -> LoraOptions {
    let list = |names: &[&str]| Targets::List(names.iter().map(|name| (*name).into()).collect());
    let (r, alpha, targets) = match name {
        "towers_vit" => (3, 6.0, list(&["q_proj", "v_proj"])),
        "towers_vit_wide" => (2, 3.0, Targets::AllLinear),
        "towers_clip" => (4, 2.0, Targets::AllLinear),
        "towers_siglip" => (2, 4.0, Targets::AllLinear),
        _ => (3, 6.0, list(&["q_proj", "k_proj", "fc2"])),
    };
    let mut options = LoraOptions {
        r,
        alpha,
        targets,
        use_rslora: name == "towers_clip",
        ..LoraOptions::default()
    };
    if name == "towers_siglip" {
        // The tower has no pooling head; excluding it, as PEFT has to, changes nothing.
        options.exclude = Some(Patterns::Regex(r"head\..*".to_owned()));
        options.rank_pattern = Patterned(vec![(r"layers\.1\..*".to_owned(), 3)]);
    }
    options
}

/// Stored results of one fixture.
struct Reference(TensorFile);

impl Reference {
    fn of(name: &str) -> Reference {
        Reference(TensorFile::open(&fixture(name).join("reference.safetensors")).unwrap())
    }

    fn tensor<const D: usize>(&self, name: &str) -> Tensor<D> {
        let shape = self.0.entry(name).unwrap().shape.clone();
        let data = TensorData::new(self.0.floats(name).unwrap(), shape);
        Tensor::from_data(data, &Device::flex())
    }

    /// What comes after `start` in every name that starts so.
    fn names(&self, start: &str) -> BTreeSet<String> {
        self.0
            .entries()
            .filter_map(|(name, _)| name.strip_prefix(start))
            .map(str::to_owned)
            .collect()
    }

    fn compare(&self, name: &str, ours: &[f32]) {
        let theirs = self.0.floats(name).unwrap();
        assert_eq!(ours.len(), theirs.len(), "{name}");
        let magnitude = theirs
            .iter()
            .fold(0.0, |most: f32, value| most.max(value.abs()));
        assert!(magnitude > 1e-6, "{name} is zero: nothing is compared");
        for (index, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
            let difference = (ours - theirs).abs();
            assert!(
                difference <= TOLERANCE * magnitude,
                "{name}[{index}]: {ours}, Transformers has {theirs} (largest {magnitude})"
            );
        }
    }

    /// Runs the tower, compares the last hidden state, then the gradients of its mean square; the
    /// names of results start with `start`.
    fn check(&self, tower: &mut Tower, start: &str) {
        let wanted = self.names(&format!("{start}grad."));
        tower.visit(&mut Track { names: &wanted });
        let (hidden, gradients, input) = match tower.config.tower_type {
            TowerType::Whisper => {
                let mel = self.tensor::<3>("input").autodiff().require_grad();
                let hidden = tower.forward(TowerInput::Mel(mel.clone()), Mode::Infer);
                let gradients = mean_square(&hidden).backward();
                let input = values(mel.grad(&gradients).unwrap());
                (hidden, gradients, input)
            }
            _ => {
                let pixels = self.tensor::<4>("input").autodiff().require_grad();
                let hidden = tower.forward(TowerInput::Image(pixels.clone()), Mode::Infer);
                let gradients = mean_square(&hidden).backward();
                let input = values(pixels.grad(&gradients).unwrap());
                (hidden, gradients, input)
            }
        };
        let [_, tokens, width] = hidden.dims();
        assert_eq!(width, tower.width());
        let shape = &self.0.entry("input").unwrap().shape;
        let item = match shape[..] {
            [_, channels, height, width] => ItemShape::Image {
                channels,
                height,
                width,
            },
            [_, bins, frames] => ItemShape::Mel { bins, frames },
            _ => panic!("an input of three or four dimensions"),
        };
        assert_eq!(tokens, tower.token_count(item).unwrap());
        self.compare(&format!("{start}last_hidden_state"), &values(hidden));
        self.compare(&format!("{start}grad.input"), &input);
        let mut gather = Gather {
            gradients: &gradients,
            found: BTreeMap::new(),
        };
        tower.visit(&mut gather);
        let found: BTreeSet<String> = gather.found.keys().cloned().collect();
        let mut expected = wanted;
        expected.remove("input");
        assert_eq!(found, expected);
        for (name, gradient) in gather.found {
            self.compare(&format!("{start}grad.{name}"), &gradient);
        }
    }
}

fn mean_square(hidden: &Tensor<3>) -> Tensor<1> {
    (hidden.clone() * hidden.clone()).mean()
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.inner().into_data().try_to_vec().unwrap()
}

fn plain(name: &str) -> &str {
    name.strip_prefix(PREFIX)
        .expect("every name has the prefix")
}

/// Makes leaves of frozen tensors whose gradients are compared.
struct Track<'a> {
    names: &'a BTreeSet<String>,
}

impl Visit for Track<'_> {
    fn visit<const D: usize>(&mut self, parameter: &mut Parameter<D>) {
        if parameter.kind == ParameterKind::Frozen && self.names.contains(plain(&parameter.name)) {
            parameter.tensor = parameter.tensor.clone().autodiff().require_grad();
        }
    }
}

struct Gather<'a> {
    gradients: &'a Gradients,
    found: BTreeMap<String, Vec<f32>>,
}

impl Visit for Gather<'_> {
    fn visit<const D: usize>(&mut self, parameter: &mut Parameter<D>) {
        if let Some(gradient) = parameter.tensor.grad(self.gradients) {
            self.found
                .insert(plain(&parameter.name).to_owned(), values(gradient));
        }
    }
}

/// Gives trained tensors the reference's values.
struct Load<'a> {
    reference: &'a Reference,
    loaded: BTreeSet<String>,
}

impl Visit for Load<'_> {
    fn visit<const D: usize>(&mut self, parameter: &mut Parameter<D>) {
        if parameter.kind != ParameterKind::Frozen {
            assert_eq!(parameter.kind, ParameterKind::Own(ParameterGroup::Encoder));
            let name = plain(&parameter.name);
            let value = self.reference.tensor::<D>(&format!("adapter.{name}"));
            assert_eq!(value.dims(), parameter.tensor.dims());
            parameter.tensor = value.autodiff().require_grad();
            self.loaded.insert(name.to_owned());
        }
    }
}

/// Names and values of everything that is trained.
struct Trained(BTreeMap<String, Vec<f32>>);

impl Visit for Trained {
    fn visit<const D: usize>(&mut self, parameter: &mut Parameter<D>) {
        if parameter.kind != ParameterKind::Frozen {
            assert!(parameter.tensor.is_require_grad());
            let value = values(parameter.tensor.clone());
            self.0.insert(parameter.name.clone(), value);
        }
    }
}

fn trained(tower: &mut Tower) -> BTreeMap<String, Vec<f32>> {
    let mut trained = Trained(BTreeMap::new());
    tower.visit(&mut trained);
    trained.0
}

fn input(name: &str) -> TowerInput {
    let reference = Reference::of(name);
    match name {
        "towers_whisper" => TowerInput::Mel(reference.tensor("input")),
        _ => TowerInput::Image(reference.tensor("input")),
    }
}

#[test]
fn hidden_states_and_gradients_are_those_of_transformers() {
    for name in FIXTURES {
        Reference::of(name).check(&mut build(name, None), "");
    }
}

#[test]
fn adapters_are_those_of_peft() {
    for name in FIXTURES {
        let reference = Reference::of(name);
        let mut tower = build(name, Some(adapter(name)));
        let mut load = Load {
            reference: &reference,
            loaded: BTreeSet::new(),
        };
        tower.visit(&mut load);
        let pairs: BTreeSet<String> = reference
            .names("adapter.")
            .into_iter()
            .filter(|name| name.contains(".lora_") && !name.starts_with("grad."))
            .collect();
        assert_eq!(load.loaded, pairs, "{name}");
        assert_eq!(2 * tower.lora_modules().len(), pairs.len());
        reference.check(&mut tower, "adapter.");
    }
}

#[test]
fn a_new_adapter_changes_nothing() {
    for name in FIXTURES {
        let frozen = build(name, None).forward(input(name), Mode::Infer);
        assert!(!frozen.is_require_grad() && !frozen.device().is_autodiff());
        let adapted = build(name, Some(adapter(name))).forward(input(name), Mode::Infer);
        assert_eq!(values(adapted), values(frozen), "{name}");
    }
}

#[test]
fn fewer_frames_get_the_first_positions() {
    let reference = Reference::of("towers_whisper");
    let tower = build("towers_whisper", None);
    let mel = reference.tensor::<3>("input").narrow(2, 0, 9);
    let hidden = tower.forward(TowerInput::Mel(mel), Mode::Infer);
    assert_eq!(hidden.dims(), [2, 5, 24]);
    reference.compare("short.last_hidden_state", &values(hidden));
}

#[test]
fn modules_to_save_are_trained_in_full() {
    // Each time some of what the tokens are summed from is trained and some is not.
    for (fixture, saved, expected) in [
        (
            "towers_vit",
            "patch_embeddings",
            vec![
                "embeddings.patch_embeddings.projection.bias",
                "embeddings.patch_embeddings.projection.weight",
            ],
        ),
        (
            "towers_vit_wide",
            "embeddings",
            vec![
                "embeddings.cls_token",
                "embeddings.patch_embeddings.projection.bias",
                "embeddings.patch_embeddings.projection.weight",
                "embeddings.position_embeddings",
            ],
        ),
        (
            "towers_clip",
            "position_embedding",
            vec!["embeddings.position_embedding.weight"],
        ),
        (
            "towers_whisper",
            "conv1",
            vec!["conv1.bias", "conv1.weight"],
        ),
    ] {
        let mut tower = build(
            fixture,
            Some(LoraOptions {
                targets: Targets::List(vec!["q_proj".to_owned()]),
                modules_to_save: vec![saved.to_owned()],
                ..LoraOptions::default()
            }),
        );
        let full: Vec<String> = trained(&mut tower)
            .into_keys()
            .filter(|name| !name.contains(".lora_"))
            .collect();
        let full: Vec<&str> = full.iter().map(|name| plain(name)).collect();
        assert_eq!(full, expected, "{fixture}");
        let hidden = tower.forward(input(fixture), Mode::Infer);
        let gradients = mean_square(&hidden).backward();
        let mut gather = Gather {
            gradients: &gradients,
            found: BTreeMap::new(),
        };
        tower.visit(&mut gather);
        for name in expected {
            // The same gradient as where all of the tower is tracked.
            let compared = format!("grad.{name}");
            let reference = Reference::of(fixture);
            if reference.0.entry(&compared).is_some() {
                reference.compare(&compared, &gather.found[name]);
            }
            assert!(
                gather.found[name].iter().any(|value| *value != 0.0),
                "{name}"
            );
        }
    }
}

#[test]
fn towers_under_one_seed_draw_different_numbers() {
    let named = |name_prefix: &str| {
        let options = TowerOptions {
            lora: Some(LoraOptions {
                dropout: 0.5,
                ..adapter("towers_clip")
            }),
            name_prefix: name_prefix.to_owned(),
            ..TowerOptions::default()
        };
        let checkpoint = Tower::open(&fixture("towers_clip")).unwrap();
        Tower::build(&checkpoint, &options, &Device::flex()).unwrap()
    };
    let drawn = |tower: &mut Tower| -> Vec<Vec<f32>> {
        trained(tower)
            .into_values()
            .filter(|value| value.iter().any(|v| *v != 0.0))
            .collect()
    };
    let (mut left, mut again, mut right) = (named("left."), named("left."), named("right."));
    assert_eq!(drawn(&mut left), drawn(&mut again));
    for (left, right) in drawn(&mut left).iter().zip(&drawn(&mut right)) {
        assert_ne!(left, right);
    }
    // The same values in both, so that only what is dropped differs.
    struct Fill;
    impl Visit for Fill {
        fn visit<const D: usize>(&mut self, parameter: &mut Parameter<D>) {
            if parameter.kind != ParameterKind::Frozen {
                let value = parameter.tensor.clone().inner();
                parameter.tensor = value.full_like(0.1).autodiff().require_grad();
            }
        }
    }
    for tower in [&mut left, &mut again, &mut right] {
        tower.visit(&mut Fill);
    }
    let run = |tower: &Tower, dropout_seed| {
        values(tower.forward(input("towers_clip"), Mode::Train { dropout_seed }))
    };
    assert_eq!(run(&left, 1), run(&again, 1));
    assert_ne!(run(&left, 1), run(&left, 2));
    assert_ne!(run(&left, 1), run(&right, 1));
    let infer = |tower: &Tower| values(tower.forward(input("towers_clip"), Mode::Infer));
    assert_eq!(infer(&left), infer(&right));
}
