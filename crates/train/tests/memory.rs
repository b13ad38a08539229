//! Memory as predicted against the bytes that an optimizer step holds at its peak, counted by the
//! allocator. One test alone in its process: the count is the process's.

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use calor_meter::EnergyOptions;
use calor_model::{
    Checkpoint, HeadOptions, LoraOptions, MemoryModel, ModelOptions, PassDevice, PassShape,
    Pooling, Problem, Recompute, RecomputedBlocks,
};
use calor_train::recipe::{Dtype, KernelChoice};
use calor_train::{BenchTask, DeviceSpec, StepBenchOptions, step_bench};
use safetensors::tensor::{Dtype as FileDtype, TensorView};
use serde_json::{Value, json};

/// Live bytes, and the most there were.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator with the same arguments.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        MOST.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        let live = LIVE.fetch_add(size, Ordering::Relaxed) + size;
        MOST.fetch_max(live, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const VOCAB: usize = 3000;
const HIDDEN: usize = 192;
const WIDE: usize = 512;
const LAYERS: usize = 6;
const SEQ: usize = 512;

/// A share that the prediction may be off.
const CLOSE: f64 = 0.1;

#[derive(Clone, Copy)]
struct Rows {
    count: usize,
    seq: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Llama,
    Bert,
}

#[test]
fn a_step_holds_what_was_predicted() {
    let folder = tempfile::tempdir().unwrap();
    let mut worst = 0f64;
    for kind in [Kind::Llama, Kind::Bert] {
        let model = folder.path().join(format!("{kind:?}"));
        write_checkpoint(&model, kind);
        for dtype in [Dtype::F32, Dtype::Bf16] {
            for (blocks, dropout, batch) in [
                (RecomputedBlocks::None, 0.0, 2),
                (RecomputedBlocks::None, 0.1, 3),
                (RecomputedBlocks::All, 0.0, 4),
                (RecomputedBlocks::All, 0.1, 4),
                (RecomputedBlocks::Every(2), 0.0, 3),
                (RecomputedBlocks::First(4), 0.0, 3),
            ] {
                let lora = LoraOptions {
                    r: 16,
                    alpha: 32.0,
                    dropout,
                    ..LoraOptions::default()
                };
                let rows = Rows {
                    count: batch,
                    seq: SEQ,
                };
                let off = off(&model, kind, dtype, &lora, rows, blocks);
                worst = worst.max(off.abs());
            }
        }
    }
    assert!(
        worst < CLOSE,
        "the worst prediction is {:.1} % off",
        100.0 * worst
    );
    every_architecture();
}

/// The same for the tiny models of the other architectures, with enough rows that what a pass keeps is
/// nearly all there is.
fn every_architecture() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures");
    let mut bad = Vec::new();
    let many = Rows {
        count: 1600,
        seq: 24,
    };
    // The scores of all pairs count for more.
    let longer = Rows {
        count: 800,
        seq: 48,
    };
    for (name, kind, rows) in [
        ("llama3", Kind::Llama, many),
        ("qwen3", Kind::Llama, many),
        ("olmo2", Kind::Llama, many),
        ("phi3", Kind::Llama, many),
        ("gemma2", Kind::Llama, many),
        ("gemma3", Kind::Llama, many),
        ("gpt2", Kind::Llama, many),
        ("gpt-neox", Kind::Llama, many),
        ("bert", Kind::Bert, many),
        ("roberta", Kind::Bert, many),
        ("electra", Kind::Bert, many),
        ("modernbert", Kind::Bert, many),
        ("deberta", Kind::Bert, many),
        ("deberta", Kind::Bert, longer),
    ] {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            // Rows of 16 numbers are padded to a tile of 32, which no real model's are.
            if dtype == Dtype::Bf16 && calor_kernels::multiplies_halves() {
                continue;
            }
            for blocks in [RecomputedBlocks::None, RecomputedBlocks::All] {
                let lora = LoraOptions::default();
                let model = fixtures.join(name);
                let off = off(&model, kind, dtype, &lora, rows, blocks);
                if off.abs() > CLOSE {
                    bad.push(format!(
                        "{name} {dtype:?} {blocks:?}: {:+.1} %",
                        100.0 * off
                    ));
                }
            }
        }
    }
    assert!(bad.is_empty(), "{bad:#?}");
}

/// How far the prediction is from what a step holds, as a share of that.
fn off(
    model: &Path,
    kind: Kind,
    dtype: Dtype,
    lora: &LoraOptions,
    rows: Rows,
    blocks: RecomputedBlocks,
) -> f64 {
    let recompute = Recompute {
        blocks,
        offload: false,
    };
    let predicted = predicted(model, kind, dtype, lora, rows, recompute);
    let measured = measured(model, kind, dtype, lora, rows, recompute);
    let off = predicted / measured - 1.0;
    println!(
        "{} {dtype:?} {blocks:?} dropout {} {} × {}: predicted {:.1} MiB, held {:.1} MiB, {:+.1} %",
        model.file_name().unwrap().display(),
        lora.dropout,
        rows.count,
        rows.seq,
        predicted / 1048576.0,
        measured / 1048576.0,
        100.0 * off
    );
    off
}

fn predicted(
    model: &Path,
    kind: Kind,
    dtype: Dtype,
    lora: &LoraOptions,
    rows: Rows,
    recompute: Recompute,
) -> f64 {
    let checkpoint = Checkpoint::open(model).unwrap();
    let options = ModelOptions {
        lora: Some(lora.clone()),
        head: match kind {
            Kind::Llama => HeadOptions::CausalLm,
            Kind::Bert => HeadOptions::Classifier {
                labels: 2,
                pooling: Pooling::Cls,
                problem: Problem::Multiclass,
            },
        },
        dtype: match dtype {
            Dtype::F32 => burn::tensor::FloatDType::F32,
            Dtype::Bf16 => burn::tensor::FloatDType::BF16,
            Dtype::F16 => burn::tensor::FloatDType::F16,
        },
        ..ModelOptions::default()
    };
    let shape = PassShape {
        rows: rows.count,
        seq: rows.seq,
        samples: rows.count,
    };
    let memory = MemoryModel::new(&checkpoint, &options).unwrap().training(
        shape,
        recompute,
        PassDevice::host(),
    );
    // Weights in the file's type are used where the file is mapped, which no allocator sees.
    let mapped = if dtype == Dtype::F32 {
        memory.weights_bytes
    } else {
        0
    };
    (memory.device_bytes() - mapped) as f64
}

fn measured(
    model: &Path,
    kind: Kind,
    dtype: Dtype,
    lora: &LoraOptions,
    rows: Rows,
    recompute: Recompute,
) -> f64 {
    let options = StepBenchOptions {
        model: model.to_owned(),
        task: match kind {
            Kind::Llama => BenchTask::CausalLm,
            Kind::Bert => BenchTask::SequenceClassification,
        },
        adapter: None,
        lora: lora.clone(),
        data: None,
        pack: false,
        batch: rows.count,
        seq: rows.seq,
        windows: 1,
        steps: 2,
        warmup: 0,
        profiled_steps: 0,
        large_products: false,
        learning_rate: 1e-4,
        max_grad_norm: 1.0,
        seed: 0,
        device: DeviceSpec::Cpu,
        dtype,
        quantization: None,
        recompute,
        kernels: KernelChoice::Fused,
        energy: EnergyOptions {
            idle_window_s: 0.0,
            ..EnergyOptions::default()
        },
        recipe: None,
    };
    let before = LIVE.load(Ordering::Relaxed);
    MOST.store(before, Ordering::Relaxed);
    step_bench(&options).unwrap();
    (MOST.load(Ordering::Relaxed) - before) as f64
}

fn write_checkpoint(folder: &Path, kind: Kind) {
    let (config, tensors) = match kind {
        Kind::Llama => llama(),
        Kind::Bert => bert(),
    };
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let mut state = 1u64;
    let mut draw = move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 40) as f32 / (1u64 << 24) as f32 * 0.1 - 0.05
    };
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .into_iter()
        .map(|(name, shape)| {
            let count: usize = shape.iter().product();
            let bytes = (0..count).flat_map(|_| draw().to_le_bytes()).collect();
            (name, shape, bytes)
        })
        .collect();
    let views = bytes.iter().map(|(name, shape, bytes)| {
        let view = TensorView::new(FileDtype::F32, shape.clone(), bytes).unwrap();
        (name.as_str(), view)
    });
    let file = safetensors::serialize(views, None).unwrap();
    std::fs::write(folder.join("model.safetensors"), file).unwrap();
}

fn llama() -> (Value, Vec<(String, Vec<usize>)>) {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB,
        "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": HIDDEN / 6, "intermediate_size": WIDE,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": SEQ, "tie_word_embeddings": true, "initializer_range": 0.02,
        "attention_bias": false, "mlp_bias": false, "bos_token_id": 1, "eos_token_id": 2,
    });
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCAB, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
    ];
    for layer in 0..LAYERS {
        for (name, shape) in [
            ("self_attn.q_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.k_proj", vec![HIDDEN / 3, HIDDEN]),
            ("self_attn.v_proj", vec![HIDDEN / 3, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, HIDDEN]),
            ("mlp.gate_proj", vec![WIDE, HIDDEN]),
            ("mlp.up_proj", vec![WIDE, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, WIDE]),
            ("input_layernorm", vec![HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
        ] {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    (config, tensors)
}

fn bert() -> (Value, Vec<(String, Vec<usize>)>) {
    let config = json!({
        "architectures": ["BertModel"], "model_type": "bert", "vocab_size": VOCAB,
        "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 6,
        "intermediate_size": WIDE, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
        "max_position_embeddings": SEQ, "type_vocab_size": 2, "initializer_range": 0.02,
        "pad_token_id": 0,
    });
    let mut tensors = vec![
        ("pooler.dense.weight".to_owned(), vec![HIDDEN, HIDDEN]),
        ("pooler.dense.bias".to_owned(), vec![HIDDEN]),
    ];
    for (name, entries) in [
        ("word_embeddings", VOCAB),
        ("position_embeddings", SEQ),
        ("token_type_embeddings", 2),
    ] {
        tensors.push((format!("embeddings.{name}.weight"), vec![entries, HIDDEN]));
    }
    let mut norms = vec!["embeddings".to_owned()];
    for layer in 0..LAYERS {
        let path = format!("encoder.layer.{layer}");
        for (name, output, input) in [
            ("attention.self.query", HIDDEN, HIDDEN),
            ("attention.self.key", HIDDEN, HIDDEN),
            ("attention.self.value", HIDDEN, HIDDEN),
            ("attention.output.dense", HIDDEN, HIDDEN),
            ("intermediate.dense", WIDE, HIDDEN),
            ("output.dense", HIDDEN, WIDE),
        ] {
            tensors.push((format!("{path}.{name}.weight"), vec![output, input]));
            tensors.push((format!("{path}.{name}.bias"), vec![output]));
        }
        norms.push(format!("{path}.attention.output"));
        norms.push(format!("{path}.output"));
    }
    for norm in norms {
        tensors.push((format!("{norm}.LayerNorm.weight"), vec![HIDDEN]));
        tensors.push((format!("{norm}.LayerNorm.bias"), vec![HIDDEN]));
    }
    (config, tensors)
}
