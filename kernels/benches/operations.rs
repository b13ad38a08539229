//! Each operation against its plain reference, forward and backward, at the shapes of a LoRA step on
//! SmolLM2-135M (2 × 256 tokens) and MiniLM (32 × 128). Run `cargo bench -p calor-kernels`.

use std::hint::black_box;

use burn::tensor::{DType, Device, Distribution, Int, Tensor};
use calor_kernels::{AttentionOptions, HostWeight, Lora, Quantization, QuantizedWeight, reference};
use criterion::{Criterion, criterion_group, criterion_main};

fn device() -> Device {
    Device::flex().autodiff()
}

fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 0.5), &device())
}

fn backward<const D: usize>(output: Tensor<D>) {
    black_box(output.sum().backward());
    device().sync().expect("a CPU device always syncs");
}

fn lora(inputs: usize, outputs: usize) -> Lora {
    Lora {
        a: random([16, inputs]).require_grad(),
        b: random([outputs, 16]).require_grad(),
        scaling: 2.0,
        dropout: 0.0,
        dropout_seed: 0,
    }
}

fn linear(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("lora_linear");
    group.sample_size(20);
    for (tokens, inputs, outputs) in [
        (512, 576, 576),
        (512, 576, 1536),
        (512, 1536, 576),
        (4096, 384, 384),
        (4096, 384, 1536),
        (4096, 1536, 384),
    ] {
        let x = random([1, tokens, inputs]).require_grad();
        let weight = random([outputs, inputs]);
        let lora = lora(inputs, outputs);
        let name = format!("{tokens}x{inputs}x{outputs}");
        group.bench_function(format!("kernel/{name}"), |b| {
            b.iter(|| {
                backward(calor_kernels::lora_linear(
                    x.clone(),
                    weight.clone(),
                    None,
                    Some(&lora),
                ))
            });
        });
        group.bench_function(format!("reference/{name}"), |b| {
            b.iter(|| {
                backward(reference::lora_linear(
                    x.clone(),
                    weight.clone(),
                    None,
                    Some(&lora),
                    None,
                ))
            });
        });
    }
    group.finish();
}

/// The linear layer with a weight in fewer bits, and what dequantising alone takes.
fn quantized(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("quantized_linear");
    group.sample_size(20);
    for (tokens, inputs, outputs) in [(512, 576, 1536), (32, 576, 1536), (4096, 384, 384)] {
        let x = random([1, tokens, inputs]).require_grad();
        let weight = random([outputs, inputs]).inner();
        let lora = lora(inputs, outputs);
        let name = format!("{tokens}x{inputs}x{outputs}");
        group.bench_function(format!("dense/{name}"), |b| {
            b.iter(|| {
                backward(calor_kernels::lora_linear(
                    x.clone(),
                    weight.clone(),
                    None,
                    Some(&lora),
                ))
            });
        });
        let values = weight.into_data().try_into_vec::<f32>().expect("f32");
        for (kind, quantization) in [
            ("int8", Quantization::Int8),
            ("nf4", Quantization::Nf4 { double: true }),
        ] {
            let host = HostWeight::quantize(&values, inputs, quantization);
            let weight = QuantizedWeight::new(host, [outputs, inputs], &device());
            group.bench_function(format!("{kind}/{name}"), |b| {
                b.iter(|| {
                    backward(calor_kernels::quantized_linear(
                        x.clone(),
                        &weight,
                        None,
                        Some(&lora),
                    ))
                });
            });
            group.bench_function(format!("{kind}-dequantise/{name}"), |b| {
                b.iter(|| black_box(weight.dequantize(DType::F32)));
            });
        }
    }
    group.finish();
}

type AttentionFunction =
    fn(Tensor<4>, Tensor<4>, Tensor<4>, Tensor<2, Int>, &AttentionOptions) -> Tensor<4>;

fn attention(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attention");
    group.sample_size(20);
    for (batch, seq, heads, kv_heads, head_dim, causal) in
        [(2, 256, 9, 3, 64, true), (32, 128, 12, 12, 32, false)]
    {
        let query = random([batch, seq, heads, head_dim]).require_grad();
        let key = random([batch, seq, kv_heads, head_dim]).require_grad();
        let value = random([batch, seq, kv_heads, head_dim]).require_grad();
        let segments = Tensor::<2, Int>::ones([batch, seq], &device());
        let options = AttentionOptions {
            soft_cap: None,
            causal,
            window: None,
            scale: 0.125,
        };
        let versions: [(&str, AttentionFunction); 2] = [
            ("kernel", calor_kernels::attention),
            ("reference", reference::attention),
        ];
        for (name, function) in versions {
            group.bench_function(format!("{name}/{batch}x{seq}x{heads}x{head_dim}"), |b| {
                b.iter(|| {
                    backward(function(
                        query.clone(),
                        key.clone(),
                        value.clone(),
                        segments.clone(),
                        &options,
                    ))
                });
            });
        }
    }
    group.finish();
}

fn pointwise(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pointwise");
    group.sample_size(20);
    let x = random([1, 512, 576]).require_grad();
    let weight = random([576]);
    type Norm = fn(Tensor<3>, Tensor<1>, f64) -> Tensor<3>;
    let norms: [(&str, Norm); 2] = [
        ("kernel", calor_kernels::rms_norm),
        ("reference", reference::rms_norm),
    ];
    for (name, function) in norms {
        group.bench_function(format!("rms_norm/{name}"), |b| {
            b.iter(|| backward(function(x.clone(), weight.clone(), 1e-5)));
        });
    }
    let gate = random([1, 512, 1536]).require_grad();
    let up = random([1, 512, 1536]).require_grad();
    type Gate = fn(Tensor<3>, Tensor<3>) -> Tensor<3>;
    let gates: [(&str, Gate); 2] = [
        ("kernel", calor_kernels::swiglu),
        ("reference", reference::swiglu),
    ];
    for (name, function) in gates {
        group.bench_function(format!("swiglu/{name}"), |b| {
            b.iter(|| backward(function(gate.clone(), up.clone())));
        });
    }
    let input = random([32, 128, 1536]).require_grad();
    type Activation = fn(Tensor<3>) -> Tensor<3>;
    let activations: [(&str, Activation); 2] = [
        ("kernel", calor_kernels::gelu),
        ("reference", reference::gelu),
    ];
    for (name, function) in activations {
        group.bench_function(format!("gelu/{name}"), |b| {
            b.iter(|| backward(function(input.clone())));
        });
    }
    group.finish();
}

fn cross_entropy(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("linear_cross_entropy");
    group.sample_size(10);
    let hidden = random([512, 576]).require_grad();
    let weight = random([49_152, 576]);
    let targets = Tensor::<1, Int>::arange(0..512, &device());
    type Loss = fn(Tensor<2>, Tensor<2>, Tensor<1, Int>, Option<f32>) -> Tensor<1>;
    let losses: [(&str, Loss); 2] = [
        ("kernel", calor_kernels::linear_cross_entropy),
        ("reference", reference::linear_cross_entropy),
    ];
    for (name, function) in losses {
        group.bench_function(format!("{name}/512x576x49152"), |b| {
            b.iter(|| {
                backward(function(
                    hidden.clone(),
                    weight.clone(),
                    targets.clone(),
                    None,
                ))
            });
        });
    }
    group.finish();
}

criterion_group!(
    benches,
    linear,
    quantized,
    attention,
    pointwise,
    cross_entropy
);
criterion_main!(benches);
