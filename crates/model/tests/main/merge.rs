//! Adapters folded into their checkpoints and combined with each other, each result compared with
//! checkpoint and adapter as they are.

use std::path::{Path, PathBuf};

use crate::common::copy::Copy;
use crate::common::{device, fixture, largest_difference, packed, sequences, values};
use burn::tensor::FloatDType;
use calor_model::{
    AdapterConfig, Checkpoint, Combination, HeadOptions, MergeOptions, Merged, Mode, Model,
    ModelError, ModelOptions, Weighted, merge, restrictions,
};

/// The adapters of every variant after ten steps, by family and name.
fn variants() -> Vec<(String, PathBuf)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../train/tests/fixtures/variants");
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir() && !path.to_string_lossy().contains("pissa"))
        .collect();
    found.sort();
    assert!(found.len() >= 20);
    found
        .into_iter()
        .map(|path| {
            let base = AdapterConfig::read(&path).unwrap().base_model_name_or_path;
            (base.unwrap(), path)
        })
        .collect()
}

/// The variant's adapter as it is after its steps.
fn trained(variant: &Path) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (from, to) in [
        ("final.safetensors", "adapter_model.safetensors"),
        ("adapter_config.json", "adapter_config.json"),
    ] {
        std::fs::copy(variant.join(from), dir.path().join(to)).unwrap();
    }
    dir
}

fn options(adapters: &[(&Path, f64)], method: Combination) -> MergeOptions {
    MergeOptions {
        adapters: adapters
            .iter()
            .map(|(adapter, weight)| Weighted {
                adapter: adapter.to_path_buf(),
                weight: *weight,
            })
            .collect(),
        method,
        rank: None,
        dtype: None,
        adapter_only: false,
    }
}

fn merge_one(base: &Path, adapter: &Path, out: &Path) -> Result<Merged, ModelError> {
    let checkpoint = Checkpoint::open(base).unwrap();
    let options = options(&[(adapter, 1.0)], Combination::Concatenate);
    merge(&checkpoint, &options, out, &device())
}

/// The hidden states of a checkpoint, with an adapter on it or without.
fn states(base: &Path, adapter: Option<&Path>) -> Vec<f32> {
    let checkpoint = Checkpoint::open(base).unwrap();
    let model = match adapter {
        Some(adapter) => {
            Model::load_with_adapter(&checkpoint, adapter, FloatDType::F32, &device()).unwrap()
        }
        None => Model::load(&checkpoint, &ModelOptions::default(), &device()).unwrap(),
    };
    values(model.hidden(&packed(&[sequences()], 32), Mode::Infer))
}

#[test]
fn every_adapter_folds_into_a_checkpoint_that_computes_the_same() {
    let stored = [
        ("llama2", "adapter-causal"),
        ("llama3", "adapter-tied"),
        ("llama3", "adapter-output"),
        ("mistral", "adapter-llama-classifier"),
        ("bert", "adapter-bert-classifier"),
        ("roberta", "adapter-roberta-classifier"),
        ("bert", "adapter-backbone"),
    ];
    let stored = stored.map(|(base, adapter)| (base.to_owned(), fixture(adapter), None));
    let variants = variants().into_iter().map(|(base, path)| {
        let dir = trained(&path);
        (base, dir.path().to_owned(), Some(dir))
    });
    for (base, adapter, _kept) in stored.into_iter().chain(variants) {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("merged");
        let merged = merge_one(&fixture(&base), &adapter, &out)
            .unwrap_or_else(|error| panic!("{}: {error}", adapter.display()));
        let agreement = merged.agreement.unwrap();
        // f32: the same sums in another order, through two layers.
        assert!(
            agreement.largest_difference <= 1e-5 * agreement.largest_magnitude,
            "{}: {agreement:?}",
            adapter.display()
        );
        let (tensors, changed) = merged.tensors.unwrap();
        assert!(changed > 0 && changed <= tensors);
        // The adapter is in it: alone it is another model than the one it was made from.
        if !adapter.ends_with("adapter-output") {
            assert_ne!(states(&out, None), states(&fixture(&base), None));
        }
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
        assert_eq!(left.len(), 1, "nothing is left beside the result");
    }
}

#[test]
fn tied_embeddings_part_where_one_of_them_changes_and_stay_where_both_do() {
    let tied = |out: &Path| {
        let text = std::fs::read_to_string(out.join("config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_str(&text).unwrap();
        config["tie_word_embeddings"].as_bool().unwrap()
    };
    let tokens = variants()
        .into_iter()
        .find(|(_, path)| path.ends_with("llama-tokens"))
        .unwrap();
    let tokens = trained(&tokens.1);
    for (adapter, stays) in [
        (fixture("adapter-tied"), false),
        (fixture("adapter-output"), false),
        (tokens.path().to_owned(), true),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("merged");
        let merged = merge_one(&fixture("llama3"), &adapter, &out).unwrap();
        assert_eq!(tied(&out), stays, "{}", adapter.display());
        assert_eq!(merged.notes.is_empty(), stays);
    }
}

#[test]
fn shards_stay_shards_and_types_stay_or_become_the_one_asked_for() {
    let copy = Copy::of("llama2");
    let half = copy.tensors.len() / 2;
    std::fs::write(copy.dir.path().join("config.json"), copy.config.to_string()).unwrap();
    std::fs::write(copy.dir.path().join("tokenizer.json"), "{}").unwrap();
    let names = [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ];
    copy.write_file(names[0], |index| index < half);
    copy.write_file(names[1], |index| index >= half);
    let map: serde_json::Map<String, serde_json::Value> = copy
        .tensors
        .iter()
        .enumerate()
        .map(|(index, tensor)| {
            (
                tensor.name.clone(),
                names[usize::from(index >= half)].into(),
            )
        })
        .collect();
    let index = serde_json::json!({ "metadata": {}, "weight_map": map });
    std::fs::write(
        copy.dir.path().join("model.safetensors.index.json"),
        index.to_string(),
    )
    .unwrap();
    let checkpoint = Checkpoint::open(copy.dir.path()).unwrap();
    let adapter = fixture("adapter-causal");
    let dir = tempfile::tempdir().unwrap();
    for (dtype, tolerance) in [
        (None, 1e-5),
        (Some(FloatDType::BF16), 5e-2),
        (Some(FloatDType::F16), 1e-2),
    ] {
        let out = dir.path().join(format!("{dtype:?}"));
        let mut options = options(&[(&adapter, 1.0)], Combination::Concatenate);
        options.dtype = dtype;
        let merged = merge(&checkpoint, &options, &out, &device()).unwrap();
        let agreement = merged.agreement.unwrap();
        assert!(agreement.largest_difference <= tolerance * agreement.largest_magnitude);
        for name in names.iter().chain(&["tokenizer.json", "config.json"]) {
            assert!(out.join(name).exists(), "{name}");
        }
        assert!(!out.join("model.safetensors").exists());
        // The index and the shards describe one checkpoint.
        Checkpoint::open(&out).unwrap();
        let bytes = |folder: &Path| -> u64 {
            let size = |name: &&str| std::fs::metadata(folder.join(name)).unwrap().len();
            names.iter().map(size).sum()
        };
        let halved = bytes(&out) < bytes(copy.dir.path()) * 2 / 3;
        assert_eq!(halved, dtype.is_some());
    }
}

#[test]
fn adapters_side_by_side_are_their_weighted_sum() {
    let variants = variants();
    let find = |name: &str| {
        let found = variants.iter().find(|(_, path)| path.ends_with(name));
        trained(&found.unwrap().1)
    };
    // Other scalings, and modules that only one of them adapts.
    for (base, first, second) in [
        ("llama2", "llama-rslora", "llama-embedding"),
        ("llama2", "llama-layers", "llama-lora"),
    ] {
        let (first, second) = (find(first), find(second));
        let adapters = [(first.path(), 0.5), (second.path(), -2.0)];
        let dir = tempfile::tempdir().unwrap();
        let checkpoint = Checkpoint::open(&fixture(base)).unwrap();
        let expected = {
            let once = dir.path().join("once");
            let half = options(&adapters[..1], Combination::Concatenate);
            merge(&checkpoint, &half, &once, &device()).unwrap();
            let twice = dir.path().join("twice");
            let once = Checkpoint::open(&once).unwrap();
            let other = options(&adapters[1..], Combination::Concatenate);
            merge(&once, &other, &twice, &device()).unwrap();
            states(&twice, None)
        };
        for method in [Combination::Concatenate, Combination::Svd] {
            let mut options = options(&adapters, method);
            let out = dir.path().join(format!("{method:?}"));
            merge(&checkpoint, &options, &out, &device()).unwrap();
            // Two roundings of each weight to f32 instead of one.
            let difference = largest_difference(&states(&out, None), &expected);
            assert!(difference < 2e-5, "{method:?}: {difference}");

            options.adapter_only = true;
            let out = dir.path().join(format!("{method:?} adapter"));
            merge(&checkpoint, &options, &out, &device()).unwrap();
            let difference = largest_difference(&states(&fixture(base), Some(&out)), &expected);
            assert!(difference < 2e-5, "{method:?}: {difference}");
        }
        let mut options = options(&adapters, Combination::Svd);
        options.rank = Some(3);
        options.adapter_only = true;
        let out = dir.path().join("cut");
        merge(&checkpoint, &options, &out, &device()).unwrap();
        let cut = AdapterConfig::read(&out).unwrap().lora.unwrap();
        assert_eq!((cut.r, cut.alpha), (3, 3.0));
        let difference = largest_difference(&states(&fixture(base), Some(&out)), &expected);
        assert!(difference > 1e-4, "a cut loses something");
    }
}

#[test]
fn a_linear_combination_of_an_adapter_with_itself_is_the_adapter() {
    // √½·A + √½·A = √2·A, and likewise B: the pair counts twice.
    let variants = variants();
    let lora = variants
        .iter()
        .find(|(_, path)| path.ends_with("llama-lora"));
    let lora = trained(&lora.unwrap().1);
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(&fixture("llama2")).unwrap();
    let result = |adapters: &[(&Path, f64)], method, name: &str| {
        let out = dir.path().join(name);
        merge(&checkpoint, &options(adapters, method), &out, &device()).unwrap();
        states(&out, None)
    };
    let path = lora.path();
    let twice = result(&[(path, 0.5), (path, 0.5)], Combination::Linear, "linear");
    let expected = result(&[(path, 2.0)], Combination::Concatenate, "doubled");
    assert!(largest_difference(&twice, &expected) < 1e-5);
    let negative = result(&[(path, -1.0)], Combination::Linear, "negative");
    let expected = result(&[(path, -1.0)], Combination::Concatenate, "subtracted");
    assert!(largest_difference(&negative, &expected) < 1e-5);
}

#[test]
fn what_cannot_be_merged_is_refused_by_name() {
    let variants = variants();
    let find = |name: &str| {
        let found = variants.iter().find(|(_, path)| path.ends_with(name));
        trained(&found.unwrap().1)
    };
    let dir = tempfile::tempdir().unwrap();
    let refused = |base: &str, adapters: &[&Path], method| {
        let checkpoint = Checkpoint::open(&fixture(base)).unwrap();
        let adapters: Vec<(&Path, f64)> = adapters.iter().map(|path| (*path, 1.0)).collect();
        let options = options(&adapters, method);
        let error = merge(&checkpoint, &options, &dir.path().join("out"), &device());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        error.unwrap_err().to_string()
    };
    let (lora, dora, tokens) = (find("llama-lora"), find("llama-dora"), find("llama-tokens"));
    let cat = Combination::Concatenate;
    let error = refused("llama2", &[lora.path(), dora.path()], cat);
    assert!(error.contains("DoRA"), "{error}");
    let error = refused("llama3", &[tokens.path(), tokens.path()], cat);
    assert!(error.contains("tokens"), "{error}");
    let heads = [find("bert-lora"), find("bert-rslora")];
    let error = refused("bert", &[heads[0].path(), heads[1].path()], cat);
    assert!(error.contains("head"), "{error}");
    let layers = fixture("adapter-causal");
    let error = refused("llama2", &[lora.path(), &layers], Combination::Linear);
    assert!(error.contains("rank"), "{error}");

    let there = tempfile::tempdir().unwrap();
    let error = merge_one(&fixture("llama2"), lora.path(), there.path()).unwrap_err();
    assert!(error.to_string().contains("is there already"), "{error}");

    let soft = find("bert-lora");
    let own = r#"{"format": 1, "head": {"kind": "classifier", "labels": 2, "pooling": "cls",
        "problem": "multiclass"}, "fusion": {"streams": []}}"#;
    std::fs::write(soft.path().join("calor.json"), own).unwrap();
    let error = refused("bert", &[soft.path()], cat);
    assert!(error.contains("soft tokens"), "{error}");
}

#[test]
fn every_restriction_of_other_programs_is_a_line_with_a_fix() {
    let variants = variants();
    let problems = |name: &str| -> Vec<(&'static str, String)> {
        let (base, path) = variants
            .iter()
            .find(|(_, path)| path.ends_with(name))
            .unwrap();
        let checkpoint = Checkpoint::open(&fixture(base)).unwrap();
        let found = restrictions(&checkpoint, path).unwrap();
        assert!(found.iter().all(|found| !found.fix.is_empty()));
        found
            .into_iter()
            .map(|found| (found.program, found.problem))
            .collect()
    };
    assert_eq!(problems("llama-lora"), []);
    assert_eq!(problems("llama-rslora"), []);
    assert_eq!(problems("llama-layers"), []);
    for (name, word, programs) in [
        ("llama-dora", "use_dora", 2),
        ("llama-bias-all", "bias", 2),
        ("llama-tokens", "trainable_token_indices", 2),
        ("llama-embedding", "embed_tokens", 1),
        ("bert-lora", "encoder", 2),
        ("bert-lora", "modules_to_save", 2),
    ] {
        let found = problems(name);
        let matching = found.iter().filter(|(_, problem)| problem.contains(word));
        assert_eq!(matching.count(), programs, "{name}: {found:?}");
    }
    // Ranks of a pattern at another scaling: vLLM would not notice.
    let found = problems("llama-dora");
    assert!(
        found
            .iter()
            .any(|(program, problem)| { *program == "vLLM" && problem.contains("rank_pattern") })
    );

    // The same of a model that is not saved yet.
    let checkpoint = Checkpoint::open(&fixture("llama2")).unwrap();
    let mut lora = calor_model::LoraOptions {
        r: 300,
        init: calor_model::PairInit::Default,
        ..Default::default()
    };
    lora.bias = calor_model::BiasMode::All;
    let options = ModelOptions {
        lora: Some(lora),
        head: HeadOptions::CausalLm,
        ..ModelOptions::default()
    };
    let model = Model::load(&checkpoint, &options, &device()).unwrap();
    let found = model.restrictions();
    assert_eq!(found.len(), 2);
    assert!(found.iter().all(|found| found.problem.contains("bias")));
}
