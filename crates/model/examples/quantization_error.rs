//! What quantising does to each linear layer of a checkpoint's backbone.
//!
//! usage: cargo run --release --example quantization_error -- MODEL_DIR
//!
//! One line a layer: its shape, and for 8 bits and NF4 with plain and with quantised scales the root of
//! the mean squared error over that of the weight; then the means over all layers, and the bytes of
//! all frozen weights.

use std::path::Path;

use burn::tensor::Device;
use calor_model::{Checkpoint, LoraOptions, Model, ModelError, ModelOptions, Quantization};

const KINDS: [(&str, Option<Quantization>); 4] = [
    ("f32", None),
    ("int8", Some(Quantization::Int8)),
    ("nf4, f32 scales", Some(Quantization::Nf4 { double: false })),
    ("nf4", Some(Quantization::Nf4 { double: true })),
];

fn main() -> Result<(), ModelError> {
    let Some(folder) = std::env::args().nth(1) else {
        eprintln!("usage: quantization_error MODEL_DIR");
        std::process::exit(2);
    };
    let checkpoint = Checkpoint::open(Path::new(&folder))?;
    let models = KINDS
        .map(|(_, quantization)| {
            let options = ModelOptions {
                // Its targets are the linear layers of the backbone.
                lora: Some(LoraOptions::default()),
                quantization,
                ..ModelOptions::default()
            };
            Model::load(&checkpoint, &options, &Device::flex())
        })
        .into_iter()
        .collect::<Result<Vec<Model>, ModelError>>()?;

    println!("layer\tshape\tint8\tnf4, f32 scales\tnf4");
    let mut sums = [0.0; 3];
    let modules = models[0].lora_modules();
    for module in &modules {
        let Some(exact) = models[0].linear_weight(module) else {
            continue;
        };
        let [output, input] = exact.dims();
        let square = |tensor: burn::tensor::Tensor<2>| -> f32 {
            (tensor.clone() * tensor).mean().into_scalar()
        };
        let scale = square(exact.clone());
        let errors = [1, 2, 3].map(|kind| match models[kind].linear_weight(module) {
            Some(weight) => f64::from(square(weight - exact.clone()) / scale).sqrt(),
            None => f64::NAN,
        });
        for (sum, error) in sums.iter_mut().zip(errors) {
            *sum += error;
        }
        let [int8, single, double] = errors;
        println!("{module}\t{output} × {input}\t{int8:.5}\t{single:.5}\t{double:.5}");
    }
    let [int8, single, double] = sums.map(|sum| sum / modules.len().max(1) as f64);
    println!(
        "mean of {}\t\t{int8:.5}\t{single:.5}\t{double:.5}",
        modules.len()
    );
    for ((name, _), model) in KINDS.iter().zip(&models) {
        let mib = model.size().frozen_bytes as f64 / f64::from(1 << 20);
        println!("{name}\t{mib:.1} MiB of frozen weights");
    }
    Ok(())
}
