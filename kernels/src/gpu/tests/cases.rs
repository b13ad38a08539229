//! One entry an operation, or a way to call it.

use burn::tensor::{DType, Tensor};

use super::{Found, Side};
use crate::cpu::testing::random;
use crate::{
    AdamWTensor, AdamWUpdate, AttentionOptions, FrozenWeight, HostWeight, IGNORED_TARGET,
    LinearPart, Lora, Norm, Quantization, QuantizedWeight, adamw, attention, dropout, geglu,
    geglu_tanh, gelu, gelu_tanh, global_norm, layer_norm, linear_cross_entropy, lora_linear,
    lora_linears, matmul, quantized_linear, residual_norm, rms_norm, rotary, swiglu,
};

macro_rules! case {
    ($side:ident, $output:expr, $($leaf:ident),+) => {{
        let (output, gradients) = $side.backward($output);
        let mut found: Found = vec![("output", output)];
        $(
            let gradient = $leaf.grad(&gradients).expect(stringify!($leaf));
            let gradient = gradient.into_data_dtype(DType::F32);
            // As above.
            let _ = gradient.as_bytes().len();
            found.push((stringify!($leaf), gradient));
        )+
        found
    }};
}

/// Its name, and what it gives on a side.
pub(super) type Case = (&'static str, fn(&Side) -> Found);

pub(super) const CASES: &[Case] = &[
    ("matmul", |side| {
        let (a, b) = (side.leaf([130, 65], 1), side.leaf([65, 96], 2));
        case!(side, matmul(a.clone(), b.clone()), a, b)
    }),
    ("matmul, repeated operand", |side| {
        let (a, b) = (side.leaf([2, 3, 5, 16], 1), side.leaf([1, 3, 16, 9], 2));
        case!(side, matmul(a.clone(), b.clone()), a, b)
    }),
    ("matmul, transposed", |side| {
        let (a, b) = (side.leaf([2, 7, 3, 16], 1), side.leaf([2, 9, 3, 16], 2));
        let product = matmul(
            a.clone().swap_dims(1, 2),
            b.clone().swap_dims(1, 2).swap_dims(2, 3),
        );
        case!(side, product, a, b)
    }),
    ("lora_linear", |side| {
        let (x, weight) = (side.leaf([2, 33, 48], 1), side.leaf([40, 48], 2));
        let (a, b) = (side.wide([8, 48], 3), side.wide([40, 8], 4));
        let lora = adapter(&a, &b, 0.0);
        let y = lora_linear(x.clone(), weight.clone(), None, Some(&lora));
        case!(side, y, x, weight, a, b)
    }),
    ("lora_linear, bias and dropout", |side| {
        let (x, weight) = (side.leaf([2, 33, 48], 1), side.leaf([40, 48], 2));
        let (a, b, bias) = (
            side.wide([8, 48], 3),
            side.wide([40, 8], 4),
            side.leaf([40], 5),
        );
        let lora = adapter(&a, &b, 0.4);
        let y = lora_linear(x.clone(), weight.clone(), Some(bias.clone()), Some(&lora));
        case!(side, y, x, weight, a, b, bias)
    }),
    ("lora_linears", |side| linears(side, [0.0, 0.0])),
    ("lora_linears, dropout", |side| linears(side, [0.0, 0.4])),
    ("lora_linears, all with a pair, one quantized", |side| {
        pairs_of_one_input(side, 3)
    }),
    ("lora_linears, one result unused", |side| {
        pairs_of_one_input(side, 2)
    }),
    ("dequantize, int8", |side| {
        dequantized(side, Quantization::Int8)
    }),
    ("dequantize, nf4", |side| dequantized(side, NF4)),
    ("dequantize, nf4 double", |side| {
        dequantized(side, NF4_DOUBLE)
    }),
    ("quantized_linear, int8", |side| {
        quantized_product(side, Quantization::Int8, 9, [40, 50])
    }),
    ("quantized_linear, nf4", |side| {
        quantized_product(side, NF4, 9, [33, 71])
    }),
    ("quantized_linear, nf4 double", |side| {
        quantized_product(side, NF4_DOUBLE, 9, [40, 72])
    }),
    // Several blocks of the product each way, none of which is whole at the end.
    ("quantized_linear, nf4 double, many tokens", |side| {
        quantized_product(side, NF4_DOUBLE, 83, [140, 200])
    }),
    ("quantized_linear, int8, lora", |side| {
        quantized_lora(side, Quantization::Int8, [33, 71], 0.0)
    }),
    ("quantized_linear, nf4, lora", |side| {
        quantized_lora(side, NF4, [40, 72], 0.0)
    }),
    ("quantized_linear, nf4 double, lora, dropout", |side| {
        quantized_lora(side, NF4_DOUBLE, [33, 50], 0.4)
    }),
    ("dropout", |side| {
        let x = side.leaf([2, 33, 47], 1);
        case!(side, dropout(x.clone(), 0.3, 1 << 40 | 7), x)
    }),
    ("rms_norm", |side| {
        let (x, weight) = (side.leaf([2, 9, 70], 1), side.leaf([70], 2));
        case!(side, rms_norm(x.clone(), weight.clone(), 1e-5), x, weight)
    }),
    ("rms_norm, weight in f32", |side| {
        let (x, weight) = (side.leaf([2, 9, 70], 1), side.wide([70], 2));
        case!(side, rms_norm(x.clone(), weight.clone(), 1e-5), x, weight)
    }),
    ("layer_norm", |side| {
        let (x, weight, bias) = (
            side.leaf([2, 9, 70], 1),
            side.leaf([70], 2),
            side.leaf([70], 3),
        );
        let y = layer_norm(x.clone(), weight.clone(), bias.clone(), 1e-5);
        case!(side, y, x, weight, bias)
    }),
    ("residual_norm", |side| residual(side, true, false)),
    ("residual_norm, centred", |side| residual(side, true, true)),
    ("residual_norm, nothing added", |side| {
        residual(side, false, false)
    }),
    ("swiglu", |side| gated(side, swiglu)),
    ("geglu", |side| gated(side, geglu)),
    ("geglu_tanh", |side| gated(side, geglu_tanh)),
    ("gelu", |side| {
        let x = side.leaf([2, 9, 70], 1);
        case!(side, gelu(x.clone()), x)
    }),
    ("gelu_tanh", |side| {
        let x = side.leaf([2, 9, 70], 1);
        case!(side, gelu_tanh(x.clone()), x)
    }),
    ("rotary", |side| {
        let x = side.leaf([2, 9, 3, 16], 1);
        // The two halves of a table are the same.
        let table = |seed| {
            let half = side.of(random([2, 9, 8], seed), side.rounded, side.dtype);
            Tensor::cat(vec![half.clone(), half], 2)
        };
        case!(side, rotary(x.clone(), table(2), table(3)), x)
    }),
    ("adamw", updated),
    ("global_norm", |side| {
        let of = |(seed, length)| side.flat(length, seed);
        let norm = global_norm((0..).zip(LENGTHS).map(of).collect());
        vec![("norm", norm.expect("tensors").into_data())]
    }),
    ("linear_cross_entropy", |side| cross_entropy(side, None)),
    ("linear_cross_entropy, bounded", |side| {
        cross_entropy(side, Some(2.0))
    }),
    // A software driver compiles kernels for seconds: these share them where they can, by the width of
    // the heads (to 32, 64, 128, 192 and 256), whether it is a multiple of 4, and bounded scores.
    ("attention", |side| {
        attend(side, [2, 65, 2, 2, 64], false, None, None)
    }),
    ("attention, causal, grouped", |side| {
        attend(side, [2, 200, 4, 2, 64], true, None, None)
    }),
    ("attention, causal, heads of 128", |side| {
        attend(side, [1, 300, 2, 1, 128], true, None, None)
    }),
    ("attention, window, heads of 96", |side| {
        attend(side, [1, 101, 3, 3, 96], true, Some(40), None)
    }),
    ("attention, window, heads of 256", |side| {
        attend(side, [1, 70, 2, 1, 256], false, Some(12), None)
    }),
    ("attention, causal, heads of 21", |side| {
        attend(side, [1, 70, 2, 1, 21], true, None, None)
    }),
    ("attention, bounded scores, causal, window", |side| {
        attend(side, [1, 130, 2, 1, 32], true, Some(50), Some(2.0))
    }),
    ("attention, bounded scores, window, heads of 20", |side| {
        attend(side, [2, 77, 4, 2, 20], false, Some(9), Some(1.0))
    }),
    ("attention, bounded scores, heads of 8", |side| {
        attend(side, [2, 40, 3, 1, 8], false, None, Some(1.5))
    }),
];

/// Of tensors that are updated together: a few that go into one kernel, and odd ones.
const LENGTHS: [usize; 13] = [210, 64, 128, 64, 7, 64, 20_000, 64, 64, 1, 256, 64, 9];

fn updated(side: &Side) -> Found {
    let one = |(index, length): (usize, usize)| {
        let seed = 10 * index as u64;
        AdamWTensor {
            values: side.flat(length, seed + 1),
            gradient: side.flat(length, seed + 2),
            first: side.flat(length, seed + 3),
            second: side.flat(length, seed + 4).square(),
            update: AdamWUpdate {
                beta_1: 0.9,
                beta_2: 0.999,
                epsilon: 1e-8,
                // Some learn faster, and one came later.
                learning_rate: if index % 6 == 1 { 2e-2 } else { 1e-2 },
                weight_decay: 0.1,
                step: if index == 3 { 1 } else { 3 },
            },
        }
    };
    let tensors: Vec<AdamWTensor> = LENGTHS.into_iter().enumerate().map(one).collect();
    // Held elsewhere, so that it must not be written.
    let [gradient, moment] = [tensors[0].gradient.clone(), tensors[1].first.clone()];
    let names_held = ["gradient as it was", "moment as it was"];
    let names = ["values", "first", "second"];
    let moved = adamw(tensors, 0.3).into_iter();
    let moved = moved.flat_map(|parts| names.into_iter().zip(parts));
    let held = names_held.into_iter().zip([gradient, moment]);
    let all = moved.chain(held);
    all.map(|(name, tensor)| (name, tensor.into_data()))
        .collect()
}

fn adapter(a: &Tensor<2>, b: &Tensor<2>, dropout: f32) -> Lora {
    Lora {
        a: a.clone(),
        b: b.clone(),
        scaling: 1.5,
        dropout,
        dropout_seed: 0x1234_5678_9ABC,
    }
}

const NF4: Quantization = Quantization::Nf4 { double: false };
const NF4_DOUBLE: Quantization = Quantization::Nf4 { double: true };

fn quantized(side: &Side, quantization: Quantization, shape: [usize; 2]) -> QuantizedWeight {
    let values = random(shape, 2).into_data().try_into_vec::<f32>();
    let host = HostWeight::quantize(&values.expect("f32"), shape[1], quantization);
    QuantizedWeight::new(host, shape, &side.device)
}

/// All values and those of some rows, the same to the bit.
fn dequantized(side: &Side, quantization: Quantization) -> Found {
    let shapes = [
        // A row ends within a word, with vectors of one; and those of two, four and eight, within a
        // block. The last has several blocks of scales.
        ("1", [33, 71]),
        ("2", [9, 70]),
        ("4", [7, 100]),
        ("8", [5, 72]),
        ("many", [130, 130]),
    ];
    let mut found = vec![];
    for (name, shape) in shapes {
        let weight = quantized(side, quantization, shape);
        for rows in [0..shape[0], 2..5] {
            let values = weight.rows(rows, side.dtype).cast(side.rounded);
            let values = values.into_data_dtype(DType::F32);
            let _ = values.as_bytes().len();
            found.push((name, values));
        }
    }
    found
}

fn quantized_product(
    side: &Side,
    quantization: Quantization,
    seq: usize,
    shape: [usize; 2],
) -> Found {
    let weight = quantized(side, quantization, shape);
    let (x, bias) = (side.leaf([2, seq, shape[1]], 1), side.leaf([shape[0]], 3));
    let y = quantized_linear(x.clone(), &weight, Some(bias.clone()), None);
    case!(side, y, x, bias)
}

fn quantized_lora(
    side: &Side,
    quantization: Quantization,
    shape: [usize; 2],
    dropout: f32,
) -> Found {
    let weight = quantized(side, quantization, shape);
    let (x, bias) = (side.leaf([2, 9, shape[1]], 1), side.leaf([shape[0]], 3));
    let (a, b) = (side.wide([8, shape[1]], 4), side.wide([shape[0], 8], 5));
    let lora = adapter(&a, &b, dropout);
    let y = quantized_linear(x.clone(), &weight, Some(bias.clone()), Some(&lora));
    case!(side, y, x, bias, a, b)
}

/// Both results, weighed differently.
fn residual(side: &Side, added: bool, centred: bool) -> Found {
    let (x, update) = (side.leaf([2, 9, 70], 1), side.leaf([2, 9, 70], 2));
    let (weight, bias) = (side.leaf([70], 3), side.leaf([70], 4));
    let norm = Norm {
        weight: weight.clone(),
        bias: centred.then(|| bias.clone()),
        epsilon: 1e-5,
    };
    let (sum, normed) = residual_norm(x.clone(), added.then(|| update.clone()), norm);
    let both = Tensor::cat(vec![sum, normed], 2);
    match (added, centred) {
        (true, true) => case!(side, both, x, update, weight, bias),
        (true, false) => case!(side, both, x, update, weight),
        _ => case!(side, both, x, weight),
    }
}

/// A pair, none beside a bias, and another pair.
fn linears(side: &Side, dropout: [f32; 2]) -> Found {
    let x = side.leaf([2, 33, 48], 1);
    let weights = [40, 24, 32].map(|outputs| side.leaf([outputs, 48], outputs as u64));
    let bias = side.leaf([24], 2);
    let (a, b) = (side.wide([8, 48], 3), side.wide([40, 8], 4));
    let (a2, b2) = (side.wide([4, 48], 5), side.wide([32, 4], 6));
    let part = |index: usize, lora: Option<Lora>| LinearPart {
        weight: FrozenWeight::Dense(&weights[index]),
        bias: (index == 1).then(|| bias.clone()),
        lora,
    };
    let parts = vec![
        part(0, Some(adapter(&a, &b, dropout[0]))),
        part(1, None),
        part(2, Some(adapter(&a2, &b2, dropout[1]))),
    ];
    let y = Tensor::cat(lora_linears(x.clone(), parts), 2);
    let [w, w2, w3] = &weights;
    case!(side, y, x, w, w2, w3, bias, a, b, a2, b2)
}

/// Three with pairs, of which the first so many results are used; their biases are cast, so no leaves.
fn pairs_of_one_input(side: &Side, used: usize) -> Found {
    let x = side.leaf([2, 33, 48], 1);
    let weights = [40, 24].map(|outputs| side.leaf([outputs, 48], outputs as u64));
    let quantized = quantized(side, NF4, [32, 48]);
    let order = [
        FrozenWeight::Dense(&weights[0]),
        FrozenWeight::Quantized(&quantized),
        FrozenWeight::Dense(&weights[1]),
    ];
    let factors: Vec<[Tensor<2>; 2]> = [40, 32, 24]
        .into_iter()
        .map(|outputs| {
            [
                side.wide([8, 48], outputs + 1),
                side.wide([outputs as usize, 8], outputs),
            ]
        })
        .collect();
    let biases = [40, 32, 24].map(|outputs| side.wide([outputs], outputs as u64 + 2));
    let parts = order.into_iter().zip(&factors).zip(&biases);
    let parts = parts.map(|((weight, [a, b]), bias)| LinearPart {
        weight,
        bias: Some(bias.clone() * 2.0).map(|bias| bias.cast(side.dtype)),
        lora: Some(adapter(a, b, 0.0)),
    });
    let mut results = lora_linears(x.clone(), parts.collect());
    results.truncate(used);
    let y = Tensor::cat(results, 2);
    let [[a, b], [a2, b2], ..] = &factors[..] else {
        unreachable!("three pairs")
    };
    let (w, bias) = (&weights[0], &biases[1]);
    case!(side, y, x, w, bias, a, b, a2, b2)
}

fn gated(side: &Side, function: fn(Tensor<3>, Tensor<3>) -> Tensor<3>) -> Found {
    let (gate, up) = (side.leaf([2, 9, 70], 1), side.leaf([2, 9, 70], 2));
    case!(side, function(gate.clone(), up.clone()), gate, up)
}

fn cross_entropy(side: &Side, soft_cap: Option<f32>) -> Found {
    let (hidden, weight) = (side.leaf([37, 24], 1), side.leaf([101, 24], 2));
    let targets = (0..37).map(|i| match i % 5 {
        0 => IGNORED_TARGET as i32,
        _ => i * 29 % 101,
    });
    let targets = side.integers(targets.collect(), [37]);
    let loss = linear_cross_entropy(hidden.clone(), weight.clone(), targets, soft_cap);
    case!(side, loss, hidden, weight)
}

fn attend(
    side: &Side,
    [batch, seq, heads, kv_heads, head_dim]: [usize; 5],
    causal: bool,
    window: Option<usize>,
    soft_cap: Option<f32>,
) -> Found {
    let query = side.leaf([batch, seq, heads, head_dim], 1);
    let key = side.leaf([batch, seq, kv_heads, head_dim], 2);
    let value = side.leaf([batch, seq, kv_heads, head_dim], 3);
    let segment = |row: usize, place: usize| match place {
        _ if place == seq / 3 || place + 3 + row >= seq => 0,
        _ => 1 + i32::from(place > seq / 3) + i32::from(place > seq / 2 + row),
    };
    let segments = (0..batch).flat_map(|row| (0..seq).map(move |place| segment(row, place)));
    let segments = side.integers(segments.collect(), [batch, seq]);
    let options = AttentionOptions {
        causal,
        window,
        scale: (head_dim as f32).sqrt().recip(),
        soft_cap,
    };
    let y = attention(
        query.clone(),
        key.clone(),
        value.clone(),
        segments,
        &options,
    );
    case!(side, y, query, key, value)
}
