//! Peak memory of each operation on the CPU, forward and backward pass together, beside its inputs: of
//! the kernel and of its plain reference, counted by the allocator, at the sizes of a LoRA step on
//! SmolLM2-135M (2 × 256 tokens, rank 16). Run `cargo bench -p calor-kernels --bench memory`.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::RefCell;
use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::tensor::{DType, Device, Distribution, Int, Tensor, TensorData};
use calor_kernels::{
    AdamWTensor, AdamWUpdate, AttentionOptions, FrozenWeight, HostWeight, LinearPart, Lora, Norm,
    Quantization, QuantizedWeight, reference,
};

/// Live bytes, and the most there were.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

fn grown(bytes: usize) {
    let live = LIVE.fetch_add(bytes, Ordering::Relaxed) + bytes;
    MOST.fetch_max(live, Ordering::Relaxed);
}

// SAFETY: every call goes to the system's allocator with the same arguments.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        grown(size);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const BATCH: usize = 2;
const SEQ: usize = 256;
const HIDDEN: usize = 576;
const INTERMEDIATE: usize = 1536;
const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const HEAD_DIM: usize = 64;
const VOCAB: usize = 49_152;
const RANK: usize = 16;

/// Runs an operation forward and backward.
type Run<'a> = &'a dyn Fn();

/// Peak bytes of the kernel and of the reference.
type Peaks = [usize; 2];

fn main() {
    let dtypes = [DType::F32, DType::BF16];
    println!(
        "Peak of forward and backward pass beside the inputs, MiB; 2 × 256 tokens of SmolLM2-135M"
    );
    println!(
        "{:34} {:>10} {:>10} {:>10} {:>10}",
        "operation", "f32", "reference", "bf16", "reference"
    );
    let found = dtypes.map(peaks);
    for (index, (name, _)) in found[0].iter().enumerate() {
        print!("{name:34}");
        for dtype in &found {
            for peak in dtype[index].1 {
                print!(" {:>10.2}", peak as f64 / f64::from(1 << 20));
            }
        }
        println!();
    }
}

fn device() -> Device {
    Device::flex().autodiff()
}

fn random<const D: usize>(shape: [usize; D], dtype: DType) -> Tensor<D> {
    let drawn = Tensor::<D>::random(shape, Distribution::Normal(0.0, 0.5), &device());
    // Cast outside autodiff, so that it is a leaf.
    Tensor::from_inner(drawn.inner().cast(dtype))
}

fn leaf<const D: usize>(shape: [usize; D], dtype: DType) -> Tensor<D> {
    random(shape, dtype).require_grad()
}

fn lora(inputs: usize, outputs: usize) -> Lora {
    Lora {
        a: leaf([RANK, inputs], DType::F32),
        b: leaf([outputs, RANK], DType::F32),
        scaling: 2.0,
        dropout: 0.0,
        dropout_seed: 0,
    }
}

fn backward<const D: usize>(output: Tensor<D>) {
    black_box(output.sum().backward());
}

/// The most that is live in a run beside what there was before it. The first run sets up threads and
/// their buffers.
fn measured(run: Run) -> usize {
    run();
    let before = LIVE.load(Ordering::Relaxed);
    MOST.store(before, Ordering::Relaxed);
    run();
    MOST.load(Ordering::Relaxed) - before
}

fn peaks(dtype: DType) -> Vec<(&'static str, Peaks)> {
    let mut found = Vec::new();
    linears(dtype, &mut found);
    attentions(dtype, &mut found);
    elementwise(dtype, &mut found);
    loss_and_update(dtype, &mut found);
    found
}

fn linears(dtype: DType, found: &mut Vec<(&'static str, Peaks)>) {
    for (name, inputs, outputs) in [
        ("lora_linear, 576 to 576", HIDDEN, HIDDEN),
        ("lora_linear, 576 to 1,536", HIDDEN, INTERMEDIATE),
        ("lora_linear, 1,536 to 576", INTERMEDIATE, HIDDEN),
    ] {
        let x = leaf([BATCH, SEQ, inputs], dtype);
        let weight = random([outputs, inputs], dtype);
        let lora = lora(inputs, outputs);
        let kernel = || {
            let weight = weight.clone();
            backward(calor_kernels::lora_linear(
                x.clone(),
                weight,
                None,
                Some(&lora),
            ));
        };
        let plain = || {
            let (weight, lora) = (weight.clone(), Some(&lora));
            backward(reference::lora_linear(x.clone(), weight, None, lora, None));
        };
        found.push((name, [measured(&kernel), measured(&plain)]));
    }
    for (name, widths) in [
        (
            "lora_linears, q/k/v",
            vec![HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM],
        ),
        ("lora_linears, gate/up", vec![INTERMEDIATE; 2]),
    ] {
        let x = leaf([BATCH, SEQ, HIDDEN], dtype);
        let weights: Vec<Tensor<2>> = widths
            .iter()
            .map(|outputs| random([*outputs, HIDDEN], dtype))
            .collect();
        let pairs: Vec<Lora> = widths
            .iter()
            .map(|outputs| lora(HIDDEN, *outputs))
            .collect();
        let run = |linears: fn(Tensor<3>, Vec<LinearPart<'_>>) -> Vec<Tensor<3>>| {
            let part = |(weight, lora): (_, &Lora)| LinearPart {
                weight: FrozenWeight::Dense(weight),
                bias: None,
                lora: Some(lora.clone()),
            };
            let parts = weights.iter().zip(&pairs).map(part).collect();
            let sums = linears(x.clone(), parts).into_iter().map(Tensor::sum);
            backward(sums.reduce(|sum, next| sum + next).expect("several"));
        };
        let peaks = [
            measured(&|| run(calor_kernels::lora_linears)),
            measured(&|| run(reference::lora_linears)),
        ];
        found.push((name, peaks));
    }
    for (name, quantization) in [
        ("quantized_linear, int8, to 1,536", Quantization::Int8),
        (
            "quantized_linear, nf4, to 1,536",
            Quantization::Nf4 { double: true },
        ),
    ] {
        let x = leaf([BATCH, SEQ, HIDDEN], dtype);
        let values = random([INTERMEDIATE, HIDDEN], DType::F32).into_data();
        let values = values.try_into_vec::<f32>().expect("drawn in f32");
        let host = HostWeight::quantize(&values, HIDDEN, quantization);
        let weight = QuantizedWeight::new(host, [INTERMEDIATE, HIDDEN], &device());
        let lora = lora(HIDDEN, INTERMEDIATE);
        let kernel = || {
            let lora = Some(&lora);
            backward(calor_kernels::quantized_linear(
                x.clone(),
                &weight,
                None,
                lora,
            ));
        };
        let plain = || {
            let lora = Some(&lora);
            backward(reference::quantized_linear(
                x.clone(),
                &weight,
                None,
                lora,
                None,
            ));
        };
        found.push((name, [measured(&kernel), measured(&plain)]));
    }
}

fn attentions(dtype: DType, found: &mut Vec<(&'static str, Peaks)>) {
    for (name, causal, lengths) in [
        ("attention, causal", true, vec![SEQ]),
        ("attention, to both sides, packed", false, vec![128, 85, 43]),
    ] {
        let query = leaf([BATCH, SEQ, HEADS, HEAD_DIM], dtype);
        let key = leaf([BATCH, SEQ, KV_HEADS, HEAD_DIM], dtype);
        let value = leaf([BATCH, SEQ, KV_HEADS, HEAD_DIM], dtype);
        let row = (1i32..).zip(lengths);
        let row: Vec<i32> = row
            .flat_map(|(number, length)| vec![number; length])
            .collect();
        let segments = TensorData::new([row.clone(), row].concat(), [BATCH, SEQ]);
        let segments = Tensor::<2, Int>::from_data(segments, &device());
        let options = AttentionOptions {
            causal,
            window: None,
            scale: 0.125,
            soft_cap: None,
        };
        type Attention =
            fn(Tensor<4>, Tensor<4>, Tensor<4>, Tensor<2, Int>, &AttentionOptions) -> Tensor<4>;
        let run = |attention: Attention| {
            let (query, key, value) = (query.clone(), key.clone(), value.clone());
            backward(attention(query, key, value, segments.clone(), &options));
        };
        let peaks = [
            measured(&|| run(calor_kernels::attention)),
            measured(&|| run(reference::attention)),
        ];
        found.push((name, peaks));
    }
}

fn elementwise(dtype: DType, found: &mut Vec<(&'static str, Peaks)>) {
    let states = leaf([BATCH, SEQ, HIDDEN], dtype);
    let (weight, bias) = (random([HIDDEN], dtype), random([HIDDEN], dtype));
    let gate = leaf([BATCH, SEQ, INTERMEDIATE], dtype);
    let up = leaf([BATCH, SEQ, INTERMEDIATE], dtype);
    let heads = leaf([BATCH, SEQ, HEADS, HEAD_DIM], dtype);
    let (cos, sin) = (
        random([BATCH, SEQ, HEAD_DIM], dtype),
        random([BATCH, SEQ, HEAD_DIM], dtype),
    );
    macro_rules! operation {
        ($name:ident, $($argument:expr),+) => {
            let kernel = || backward(calor_kernels::$name($($argument.clone()),+));
            let plain = || backward(reference::$name($($argument.clone()),+));
            found.push((stringify!($name), [measured(&kernel), measured(&plain)]));
        };
    }
    operation!(rms_norm, states, weight, 1e-5);
    operation!(layer_norm, states, weight, bias, 1e-5);
    let update = leaf([BATCH, SEQ, HIDDEN], dtype);
    type Residual = fn(Tensor<3>, Option<Tensor<3>>, Norm) -> (Tensor<3>, Tensor<3>);
    let run = |residual_norm: Residual| {
        let norm = Norm {
            weight: weight.clone(),
            bias: None,
            epsilon: 1e-5,
        };
        let (sum, normed) = residual_norm(states.clone(), Some(update.clone()), norm);
        backward(sum + normed);
    };
    let peaks = [
        measured(&|| run(calor_kernels::residual_norm)),
        measured(&|| run(reference::residual_norm)),
    ];
    found.push(("residual_norm", peaks));
    operation!(swiglu, gate, up);
    operation!(geglu, gate, up);
    operation!(gelu, gate);
    operation!(rotary, heads, cos, sin);
}

fn loss_and_update(dtype: DType, found: &mut Vec<(&'static str, Peaks)>) {
    let states = leaf([BATCH * SEQ, HIDDEN], dtype);
    let weight = random([VOCAB, HIDDEN], dtype);
    let targets = Tensor::<1, Int>::arange(0..(BATCH * SEQ) as i64, &device());
    type Loss = fn(Tensor<2>, Tensor<2>, Tensor<1, Int>, Option<f32>) -> Tensor<1>;
    let run = |loss: Loss| {
        let (states, weight) = (states.clone(), weight.clone());
        backward(loss(states, weight, targets.clone(), None));
    };
    let peaks = [
        measured(&|| run(calor_kernels::linear_cross_entropy)),
        measured(&|| run(reference::linear_cross_entropy)),
    ];
    found.push(("linear_cross_entropy", peaks));

    // Adapters and their moments are f32 whatever the activations are.
    let factor = || random([RANK * HIDDEN], DType::F32).inner();
    let (values, gradient, first, second) = (factor(), factor(), factor(), factor().abs());
    let update = AdamWUpdate {
        beta_1: 0.9,
        beta_2: 0.999,
        epsilon: 1e-8,
        learning_rate: 1e-4,
        weight_decay: 0.01,
        step: 3,
    };
    // As in training nothing else holds gradient and moments: what an update leaves is the next one's,
    // with the old values as its gradient.
    let state = RefCell::new(vec![([values, first, second], gradient)]);
    let run = |adamw: fn(Vec<AdamWTensor>, f32) -> Vec<[Tensor<1>; 3]>| {
        let ([values, first, second], gradient) = state.take().remove(0);
        let before = values.clone();
        let tensor = AdamWTensor {
            values,
            gradient,
            first,
            second,
            update,
        };
        let after = adamw(vec![tensor], 0.5).remove(0);
        state.replace(vec![(after, before)]);
    };
    let peaks = [
        measured(&|| run(calor_kernels::adamw)),
        measured(&|| run(reference::adamw)),
    ];
    found.push(("adamw", peaks));
}
