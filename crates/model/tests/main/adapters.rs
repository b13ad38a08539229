//! Adapter folders: PEFT's read and written back byte for byte, ours written and read again.

use std::path::Path;

use crate::common::{device, fixture, largest_difference, packed, sequences, values};
use burn::tensor::{FloatDType, Tensor};
use calor_model::{
    Checkpoint, HeadOptions, LoraOptions, Mode, Model, ModelError, ModelOptions, ParameterGroup,
    ParameterVisitor, Pooling, Problem, Targets,
};

const CAUSAL: HeadOptions = HeadOptions::CausalLm;

fn load(base: &str, adapter: &Path) -> Result<Model, ModelError> {
    let checkpoint = Checkpoint::open(&fixture(base)).unwrap();
    Model::load_with_adapter(&checkpoint, adapter, FloatDType::F32, &device())
}

fn create(base: &str, head: HeadOptions, seed: u64) -> Model {
    let checkpoint = Checkpoint::open(&fixture(base)).unwrap();
    let options = ModelOptions {
        lora: Some(LoraOptions {
            r: 3,
            alpha: 6.0,
            ..LoraOptions::default()
        }),
        head,
        seed,
        ..ModelOptions::default()
    };
    Model::load(&checkpoint, &options, &device()).unwrap()
}

fn classifier(labels: usize, pooling: Pooling, problem: Problem) -> HeadOptions {
    HeadOptions::Classifier {
        labels,
        pooling,
        problem,
    }
}

/// Adds a fixed pattern to everything trained, so that no pair stays zero.
struct Perturb;

impl ParameterVisitor for Perturb {
    fn visit<const D: usize>(&mut self, name: &str, _: ParameterGroup, tensor: &mut Tensor<D>) {
        let shape = tensor.shape();
        let pattern: Vec<f32> = (0..shape.num_elements())
            .map(|i| 0.05 * ((i * 7 + name.len()) as f32).sin())
            .collect();
        let pattern =
            Tensor::<D>::from_data(burn::tensor::TensorData::new(pattern, shape), &device());
        *tensor = Tensor::from_inner(tensor.clone().inner() + pattern).require_grad();
    }
}

#[derive(Default)]
struct Names(Vec<(String, ParameterGroup, Vec<usize>)>);

impl ParameterVisitor for Names {
    fn visit<const D: usize>(&mut self, name: &str, group: ParameterGroup, tensor: &mut Tensor<D>) {
        assert!(tensor.is_require_grad(), "{name} is a leaf");
        self.0
            .push((name.to_owned(), group, tensor.dims().to_vec()));
    }
}

#[test]
fn what_peft_wrote_is_written_back_byte_for_byte() {
    for (base, adapter) in [
        ("llama2", "adapter-causal"),
        ("llama3", "adapter-tied"),
        ("llama3", "adapter-output"),
        ("mistral", "adapter-llama-classifier"),
        ("bert", "adapter-bert-classifier"),
        ("roberta", "adapter-roberta-classifier"),
        ("bert", "adapter-bert-tokens"),
        ("roberta", "adapter-roberta-tokens"),
        ("llama3", "adapter-llama-tokens"),
        ("gpt2", "adapter-gpt2"),
        ("phi3", "adapter-phi3"),
        ("gpt-neox", "adapter-gpt-neox"),
        ("gemma2", "adapter-gemma2"),
        ("gpt2", "adapter-gpt2-classifier"),
        ("electra", "adapter-electra-classifier"),
        ("modernbert", "adapter-modernbert-classifier"),
        ("modernbert-bias", "adapter-modernbert-mean"),
        ("deberta", "adapter-deberta-classifier"),
        ("deberta", "adapter-deberta"),
        ("modernbert", "adapter-modernbert"),
    ] {
        let folder = fixture(adapter);
        let model = load(base, &folder).unwrap_or_else(|error| panic!("{adapter}: {error}"));
        let written = tempfile::tempdir().unwrap();
        model.save_adapter(written.path(), base).unwrap();
        for file in ["adapter_model.safetensors", "adapter_config.json"] {
            let theirs = std::fs::read(folder.join(file)).unwrap();
            let ours = std::fs::read(written.path().join(file)).unwrap();
            assert!(
                theirs == ours,
                "{adapter}/{file}:\n{}\n{}",
                String::from_utf8_lossy(&theirs[..theirs.len().min(1500)]),
                String::from_utf8_lossy(&ours[..ours.len().min(1500)]),
            );
        }
    }
}

#[test]
fn a_saved_model_gives_the_same_results() {
    let cases = [
        ("llama2", classifier(1, Pooling::Last, Problem::Binary)),
        ("qwen3", classifier(4, Pooling::Last, Problem::Multilabel)),
        ("bert", classifier(3, Pooling::Cls, Problem::Multiclass)),
        ("bert", classifier(1, Pooling::Mean, Problem::Binary)),
        ("roberta", classifier(2, Pooling::Cls, Problem::Regression)),
        ("roberta", classifier(2, Pooling::Mean, Problem::Multiclass)),
        ("olmo2", classifier(2, Pooling::Last, Problem::Multiclass)),
        ("gpt2", classifier(3, Pooling::Last, Problem::Multiclass)),
        ("gemma3", classifier(1, Pooling::Last, Problem::Binary)),
        ("electra", classifier(2, Pooling::Cls, Problem::Multiclass)),
        ("electra", classifier(1, Pooling::Mean, Problem::Binary)),
        (
            "modernbert",
            classifier(2, Pooling::Cls, Problem::Multiclass),
        ),
        ("deberta", classifier(2, Pooling::Cls, Problem::Multiclass)),
    ];
    let input = packed(&[sequences()], 32);
    for (base, head) in cases {
        let mut model = create(base, head, 5);
        model.visit_trainable(&mut Perturb);
        let before = values(model.forward(&input, Mode::Infer));
        let dir = tempfile::tempdir().unwrap();
        model.save_adapter(dir.path(), base).unwrap();
        let own = dir.path().join("calor.safetensors").exists();
        assert_eq!(
            own,
            matches!(
                head,
                HeadOptions::Classifier {
                    pooling: Pooling::Mean,
                    ..
                }
            )
        );

        let loaded = load(base, dir.path()).unwrap_or_else(|error| panic!("{base}: {error}"));
        assert_eq!(loaded.options().head, head);
        assert_eq!(
            values(loaded.forward(&input, Mode::Infer)),
            before,
            "{base}"
        );

        // Into a model of the same shape that has other values.
        let mut other = create(base, head, 6);
        assert_ne!(values(other.forward(&input, Mode::Infer)), before);
        other.load_adapter(dir.path()).unwrap();
        assert_eq!(values(other.forward(&input, Mode::Infer)), before, "{base}");
        let inference = values(other.for_inference().forward(&input, Mode::Infer));
        match base {
            // Its attention is in plain tensor operations, some of which round in another way where
            // nothing is recorded.
            "deberta" => assert!(largest_difference(&inference, &before) < 1e-6),
            _ => assert_eq!(inference, before, "{base}"),
        }
    }
}

#[test]
fn a_head_without_low_rank_pairs_is_saved_as_peft_saves_one() {
    let checkpoint = Checkpoint::open(&fixture("bert")).unwrap();
    let options = ModelOptions {
        head: classifier(2, Pooling::Cls, Problem::Multiclass),
        ..ModelOptions::default()
    };
    let mut model = Model::load(&checkpoint, &options, &device()).unwrap();
    let mut names = Names::default();
    model.visit_trainable(&mut names);
    let keys: Vec<&str> = names.0.iter().map(|(name, ..)| name.as_str()).collect();
    assert_eq!(
        keys,
        [
            "base_model.model.classifier.weight",
            "base_model.model.classifier.bias"
        ]
    );
    let dir = tempfile::tempdir().unwrap();
    model.save_adapter(dir.path(), "bert").unwrap();
    let input = packed(&[sequences()], 32);
    let loaded = load("bert", dir.path()).unwrap();
    assert!(loaded.lora_modules().is_empty());
    assert_eq!(
        values(loaded.forward(&input, Mode::Infer)),
        values(model.forward(&input, Mode::Infer))
    );
}

#[test]
fn a_missing_pooler_is_trained_and_saved() {
    // A checkpoint without its pooler, as many encoders are distributed.
    let dir = tempfile::tempdir().unwrap();
    let bytes = std::fs::read(fixture("bert").join("model.safetensors")).unwrap();
    let stored = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let kept: Vec<_> = stored
        .tensors()
        .into_iter()
        .filter(|(name, _)| !name.contains("pooler"))
        .collect();
    assert!(kept.len() + 2 == stored.len());
    let bytes = safetensors::serialize(kept, None).unwrap();
    std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    std::fs::copy(
        fixture("bert").join("config.json"),
        dir.path().join("config.json"),
    )
    .unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let options = ModelOptions {
        lora: Some(LoraOptions::default()),
        head: classifier(1, Pooling::Cls, Problem::Binary),
        ..ModelOptions::default()
    };
    let mut model = Model::load(&checkpoint, &options, &device()).unwrap();
    let mut names = Names::default();
    model.visit_trainable(&mut names);
    let pooler = "base_model.model.bert.pooler.dense.weight";
    assert!(
        names
            .0
            .iter()
            .any(|(name, group, _)| name == pooler && *group == ParameterGroup::Head)
    );
    assert!(
        !model
            .lora_modules()
            .iter()
            .any(|path| path.contains("pooler"))
    );
    let adapter = dir.path().join("adapter");
    model.save_adapter(&adapter, "base").unwrap();
    let input = packed(&[sequences()], 32);
    let loaded =
        Model::load_with_adapter(&checkpoint, &adapter, FloatDType::F32, &device()).unwrap();
    assert_eq!(
        values(loaded.forward(&input, Mode::Infer)),
        values(model.forward(&input, Mode::Infer))
    );
}

#[test]
fn missing_unused_and_misshapen_keys_are_named() {
    let folder = fixture("adapter-causal");
    let bytes = std::fs::read(folder.join("adapter_model.safetensors")).unwrap();
    let stored = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let victim = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight";
    type Tensors<'a> = Vec<(String, safetensors::tensor::TensorView<'a>)>;
    let with = |change: &dyn Fn(&mut Tensors)| -> String {
        let dir = tempfile::tempdir().unwrap();
        let mut tensors = stored.tensors();
        change(&mut tensors);
        let bytes = safetensors::serialize(tensors, None).unwrap();
        std::fs::write(dir.path().join("adapter_model.safetensors"), bytes).unwrap();
        std::fs::copy(
            folder.join("adapter_config.json"),
            dir.path().join("adapter_config.json"),
        )
        .unwrap();
        load("llama2", dir.path()).unwrap_err().to_string()
    };
    let missing = with(&|tensors| tensors.retain(|(name, _)| name != victim));
    assert!(
        missing.contains(victim) && missing.contains("missing"),
        "{missing}"
    );
    let unused = with(&|tensors| {
        let copy = tensors[0].1.clone();
        tensors.push(("base_model.model.model.layers.9.extra".to_owned(), copy));
    });
    assert!(unused.contains("layers.9.extra"), "{unused}");
    let misshapen = with(&|tensors| {
        let other = tensors
            .iter()
            .find(|(name, _)| name.contains("layers.0.self_attn.v_proj.lora_A"))
            .unwrap()
            .1
            .clone();
        for (name, tensor) in tensors.iter_mut() {
            if name == victim {
                *tensor = other.clone();
            }
        }
    });
    assert!(
        misshapen.contains(victim) && misshapen.contains("shape"),
        "{misshapen}"
    );
}

#[test]
fn a_hidden_layer_of_the_head_is_counted_saved_and_loaded() {
    let checkpoint = Checkpoint::open(&fixture("bert")).unwrap();
    let options = |pooling, head_hidden| ModelOptions {
        head: classifier(2, pooling, Problem::Multiclass),
        head_hidden,
        ..ModelOptions::default()
    };
    let mut model = Model::load(&checkpoint, &options(Pooling::Mean, 5), &device()).unwrap();
    let width = checkpoint.config().hidden_size() as u64;
    // Scale and shift of what goes in, the hidden layer, the output layer.
    let counts = [2 * width, 5 * width + 5, 2 * 5 + 2];
    assert_eq!(model.size().head_parameters, counts.iter().sum::<u64>());
    model.visit_trainable(&mut Perturb);
    let dir = tempfile::tempdir().unwrap();
    model.save_adapter(dir.path(), "bert").unwrap();

    let input = packed(&[sequences()], 32);
    let logits = |model: &Model| values(model.forward(&input, Mode::Infer));
    let loaded = load("bert", dir.path()).unwrap();
    assert_eq!(logits(&model), logits(&loaded));

    // A linear head has no place for it, and a class's own head takes none.
    let mut linear = Model::load(&checkpoint, &options(Pooling::Mean, 0), &device()).unwrap();
    let error = linear.load_adapter(dir.path()).unwrap_err().to_string();
    assert!(error.contains("classifier"), "{error}");
    let refused = Model::load(&checkpoint, &options(Pooling::Cls, 5), &device());
    let error = refused.unwrap_err().to_string();
    assert!(error.contains("mean"), "{error}");
}

#[test]
fn an_adapter_with_another_scaling_is_not_loaded_into_a_model() {
    let model = create("llama2", CAUSAL, 1);
    let dir = tempfile::tempdir().unwrap();
    model.save_adapter(dir.path(), "llama2").unwrap();
    let checkpoint = Checkpoint::open(&fixture("llama2")).unwrap();
    let mut other = Model::load(
        &checkpoint,
        &ModelOptions {
            lora: Some(LoraOptions {
                r: 3,
                alpha: 12.0,
                ..LoraOptions::default()
            }),
            head: CAUSAL,
            ..ModelOptions::default()
        },
        &device(),
    )
    .unwrap();
    let error = other.load_adapter(dir.path()).unwrap_err().to_string();
    assert!(error.contains("scaling"), "{error}");
}

#[test]
fn patterns_whose_order_matters_survive_sorting() {
    let checkpoint = Checkpoint::open(&fixture("llama2")).unwrap();
    let lora = LoraOptions {
        r: 2,
        targets: Targets::List(vec!["q_proj".to_owned(), "v_proj".to_owned()]),
        // Sorted, `.*proj` would come first and decide everything.
        rank_pattern: calor_model::Patterned(vec![
            ("q_proj".to_owned(), 5),
            (".*proj".to_owned(), 3),
        ]),
        ..LoraOptions::default()
    };
    let options = ModelOptions {
        lora: Some(lora),
        head: CAUSAL,
        ..ModelOptions::default()
    };
    let model = Model::load(&checkpoint, &options, &device()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    model.save_adapter(dir.path(), "llama2").unwrap();
    let loaded = load("llama2", dir.path()).unwrap();
    let rank = |name: &str| loaded.lora_scaling(name).unwrap().0;
    assert_eq!(rank("model.layers.0.self_attn.q_proj"), 5);
    assert_eq!(rank("model.layers.0.self_attn.v_proj"), 3);
}

#[test]
fn the_order_of_parameters_is_fixed_and_groups_are_right() {
    let head = classifier(1, Pooling::Last, Problem::Binary);
    let mut names = [Names::default(), Names::default()];
    for names in &mut names {
        create("llama2", head, 0).visit_trainable(names);
    }
    assert_eq!(names[0].0, names[1].0);
    let (last, rest) = names[0].0.split_last().unwrap();
    assert_eq!(
        *last,
        (
            "base_model.model.score.weight".to_owned(),
            ParameterGroup::Head,
            vec![1, 32]
        )
    );
    assert_eq!(rest.len(), 2 * 7 * 2);
    assert!(
        rest.iter()
            .all(|(_, group, _)| *group == ParameterGroup::Adapter)
    );
    assert_eq!(
        rest[0].0,
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    );
    assert_eq!(rest[0].2, [3, 32]);
}

#[test]
fn size_counts_every_parameter_once() {
    let model = create("llama3", CAUSAL, 0);
    let size = model.size();
    let (hidden, wide, vocab, kv) = (32, 48, 120, 16);
    let layer = 2 * hidden * hidden + 2 * kv * hidden + 3 * hidden * wide + 2 * hidden;
    assert_eq!(size.embedding_parameters, vocab * hidden);
    // Tied: the embedding is multiplied with as the output layer.
    assert_eq!(size.base_parameters, 2 * layer + hidden + vocab * hidden);
    let pair = |output, input| 3 * (output + input);
    let adapter = 2
        * (2 * pair(hidden, hidden)
            + 2 * pair(kv, hidden)
            + 2 * pair(wide, hidden)
            + pair(hidden, wide));
    assert_eq!(size.adapter_parameters, adapter);
    assert_eq!(size.head_parameters, 0);
}

#[test]
fn a_zero_pair_changes_nothing() {
    // B starts at zero: the adapted model is the base, in every architecture.
    let input = packed(&[sequences()], 32);
    for base in ["llama2", "mistral", "qwen3", "bert", "roberta"] {
        let checkpoint = Checkpoint::open(&fixture(base)).unwrap();
        let plain = Model::load(&checkpoint, &ModelOptions::default(), &device()).unwrap();
        let adapted = create(base, HeadOptions::None, 3);
        let a = values(plain.hidden(&input, Mode::Infer));
        let b = values(adapted.hidden(&input, Mode::Infer));
        // The same products and sums, plus exact zeros.
        assert!(largest_difference(&a, &b) <= 1e-6, "{base}");
    }
}

#[test]
fn all_linear_is_what_peft_takes_it_for() {
    let sequence = |labels| classifier(labels, Pooling::Cls, Problem::Multiclass);
    for (base, adapter, head) in [
        ("gpt2", "adapter-gpt2", CAUSAL),
        ("phi3", "adapter-phi3", CAUSAL),
        ("gpt-neox", "adapter-gpt-neox", CAUSAL),
        ("gemma2", "adapter-gemma2", CAUSAL),
        ("modernbert", "adapter-modernbert", HeadOptions::None),
        ("deberta", "adapter-deberta", HeadOptions::None),
        ("electra", "adapter-electra-classifier", sequence(2)),
        ("modernbert", "adapter-modernbert-classifier", sequence(3)),
        ("deberta", "adapter-deberta-classifier", sequence(2)),
    ] {
        let theirs = load(base, &fixture(adapter)).unwrap().lora_modules();
        assert_eq!(create(base, head, 0).lora_modules(), theirs, "{adapter}");
    }
}

#[test]
fn a_transposed_layer_is_not_trained_in_full() {
    let checkpoint = Checkpoint::open(&fixture("gpt2")).unwrap();
    let options = ModelOptions {
        lora: Some(LoraOptions {
            targets: Targets::List(vec!["c_attn".to_owned()]),
            modules_to_save: vec!["c_fc".to_owned()],
            ..LoraOptions::default()
        }),
        head: CAUSAL,
        ..ModelOptions::default()
    };
    let error = Model::load(&checkpoint, &options, &device()).unwrap_err();
    let message = error.to_string();
    assert!(
        message.contains("mlp.c_fc") && message.contains("Conv1D"),
        "{message}"
    );
}

#[test]
fn sizes_count_each_weight_once() {
    // Of the fixtures' configurations: vocabulary 120, width 16, feed-forward 24, two layers.
    let gpt2 = create("gpt2", CAUSAL, 0).size();
    assert_eq!(gpt2.embedding_parameters, 120 * 16 + 40 * 16);
    let layer = 16 * 48 + 48 + 16 * 16 + 16 + 16 * 24 + 24 + 24 * 16 + 16 + 4 * 16;
    // Tied: the embedding is also what every token is multiplied with.
    assert_eq!(gpt2.base_parameters, 2 * layer + 2 * 16 + 120 * 16);
    let electra = create(
        "electra",
        classifier(2, Pooling::Mean, Problem::Multiclass),
        0,
    )
    .size();
    assert_eq!(electra.embedding_parameters, (120 + 40 + 2) * 12);
    let gemma = create("gemma2", CAUSAL, 0).size();
    assert_eq!(gemma.embedding_parameters, 120 * 16);
    assert_eq!(gemma.attention_width, 2 * 12);
    assert!(gemma.causal && !electra.causal);
}
