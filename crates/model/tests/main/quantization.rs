//! Quantised weights against what bitsandbytes makes of the same weights, checkpoints that it has
//! stored, and what quantising does to a model.

use crate::common::copy::Copy;
use crate::common::{device, fixture, packed, sequences};
use burn::tensor::FloatDType;
use calor_kernels::{BlockScales, HostWeight, NF4};
use calor_model::{
    Checkpoint, HeadOptions, LoraOptions, MemoryModel, Mode, Model, ModelError, ModelOptions,
    PassDevice, PassShape, Pooling, Problem, Quantization, Recompute, parity,
};
use half::bf16;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

const NF4_DOUBLE: Quantization = Quantization::Nf4 { double: true };
const KINDS: [Quantization; 3] = [
    Quantization::Int8,
    Quantization::Nf4 { double: false },
    NF4_DOUBLE,
];

fn floats(view: &TensorView) -> Vec<f32> {
    match view.dtype() {
        Dtype::F32 => view
            .data()
            .chunks_exact(4)
            .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
            .collect(),
        _ => view
            .data()
            .chunks_exact(2)
            .map(|bytes| bf16::from_le_bytes(bytes.try_into().unwrap()).to_f32())
            .collect(),
    }
}

/// The same codes, but for a few that differ by one.
fn assert_neighbours(ours: &[u8], stored: &[u8], few: usize, name: &str) {
    assert_eq!(ours.len(), stored.len(), "{name}");
    let by = |(ours, stored): (&u8, &u8)| ours.wrapping_sub(*stored) as i8;
    let others: Vec<i8> = ours
        .iter()
        .zip(stored)
        .map(by)
        .filter(|by| *by != 0)
        .collect();
    assert!(others.iter().all(|by| by.abs() == 1), "{name}: {others:?}");
    assert!(others.len() <= few, "{name}: {} differ", others.len());
}

#[test]
fn codes_scales_and_values_are_those_of_bitsandbytes() {
    let bytes = std::fs::read(fixture("quantization.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |name: &str| file.tensor(name).unwrap();
    assert_eq!(floats(&tensor("nf4.map")), NF4);
    for name in ["small", "half", "large"] {
        let of = |part: &str| tensor(&format!("{name}.{part}"));
        let weight = of("weight");
        let width = weight.shape()[1];
        let values = floats(&weight);

        let host = HostWeight::quantize(&values, width, Quantization::Nf4 { double: false });
        let HostWeight::Nf4 {
            codes,
            block: 64,
            absmax: BlockScales::Plain(absmax),
        } = &host
        else {
            panic!("blocks of 64 with plain scales");
        };
        assert_eq!(codes, of("nf4.codes").data(), "{name}");
        assert_eq!(absmax, &floats(&of("nf4.absmax")), "{name}");
        let count = values.len();
        if name == "small" {
            assert_eq!(host.dequantize(count, width), floats(&of("nf4.values")));
        }

        let offset = floats(&of("double.offset"))[0];
        let scales = BlockScales::double(absmax, offset);
        let BlockScales::Double {
            codes: nested,
            map,
            absmax: nested_absmax,
            ..
        } = &scales
        else {
            panic!("quantised scales");
        };
        assert_eq!(map, &floats(&tensor("dynamic.map")));
        // bitsandbytes finds codes by a table and takes the second nearest now and then.
        assert_neighbours(nested, of("double.codes").data(), nested.len() / 200, name);
        assert_eq!(nested_absmax, &floats(&of("double.absmax")), "{name}");
        if name == "small" {
            let host = HostWeight::Nf4 {
                codes: codes.clone(),
                block: 64,
                absmax: scales.clone(),
            };
            assert_eq!(host.dequantize(count, width), floats(&of("double.values")));
        }
        // Our mean of the scales is summed in f64, PyTorch's in f32: the last bits may differ.
        let HostWeight::Nf4 {
            absmax: BlockScales::Double { offset: ours, .. },
            ..
        } = HostWeight::quantize(&values, width, NF4_DOUBLE)
        else {
            panic!("quantised scales");
        };
        assert!(
            (ours - offset).abs() <= 5e-7 * offset.abs(),
            "{ours} {offset}"
        );

        let host = HostWeight::quantize(&values, width, Quantization::Int8);
        let HostWeight::Int8 { codes, absmax } = &host else {
            panic!("8 bits");
        };
        let codes: Vec<u8> = codes.iter().map(|&code| code as u8).collect();
        // bitsandbytes scales in the weight's own type: what lies half way between two codes in bf16
        // may be rounded to the other.
        let few = if name == "small" {
            0
        } else {
            codes.len() / 100
        };
        assert_neighbours(&codes, of("int8.codes").data(), few, name);
        assert_eq!(absmax, &floats(&of("int8.absmax")), "{name}");
        if name == "small" {
            assert_eq!(host.dequantize(count, width), floats(&of("int8.values")));
        }
    }
}

#[test]
fn stored_checkpoints_agree_with_transformers() {
    for (name, quantization) in [
        ("llama-nf4", NF4_DOUBLE),
        ("llama-nf4-single", Quantization::Nf4 { double: false }),
        ("llama-int8", Quantization::Int8),
        ("bert-nf4", NF4_DOUBLE),
    ] {
        let checkpoint = Checkpoint::open(&fixture(name)).unwrap();
        assert_eq!(
            checkpoint.config().stored_quantization(),
            Some(quantization)
        );
        let reference = fixture(name).join("reference.safetensors");
        // f32 sums in another order, as for dense checkpoints.
        let compared = parity::compare(&fixture(name), None, &reference, 1e-5, &device()).unwrap();
        assert!(compared.len() == 1 || compared.len() >= 4, "{name}");
        for comparison in compared {
            assert!(comparison.within, "{name}: {comparison:?}");
            assert!(comparison.reference_max > 0.0);
        }
    }
}

#[test]
fn what_a_stored_checkpoint_lacks_or_has_wrong_is_named() {
    let error = |name: &str, change: &dyn Fn(&mut Copy)| {
        let mut copy = Copy::of(name);
        change(&mut copy);
        match Checkpoint::open(copy.write()) {
            Err(error) => error.to_string(),
            Ok(checkpoint) => Model::load(&checkpoint, &ModelOptions::default(), &device())
                .unwrap_err()
                .to_string(),
        }
    };
    let module = "model.layers.0.self_attn.q_proj";
    let remove = |copy: &mut Copy, name: &str| copy.tensors.retain(|tensor| tensor.name != name);

    let found = error("llama-nf4", &|copy| {
        remove(copy, &format!("{module}.weight.nested_absmax"));
    });
    assert!(found.contains("q_proj.weight.nested_absmax"), "{found}");
    let found = error("llama-nf4", &|copy| {
        let codes = copy.tensor(&format!("{module}.weight"));
        codes.bytes.pop();
        codes.shape[0] -= 1;
    });
    assert!(found.contains("in 4 bits needs"), "{found}");
    let found = error("llama-nf4", &|copy| {
        let map = copy.tensor(&format!("{module}.weight.quant_map"));
        map.bytes[..4].copy_from_slice(&(-0.9f32).to_le_bytes());
    });
    assert!(found.contains("NF4"), "{found}");
    let found = error("llama-nf4", &|copy| {
        let scales = copy.tensor(&format!("{module}.weight.nested_absmax"));
        scales.bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    assert!(found.contains("not finite"), "{found}");
    let state = format!("{module}.weight.quant_state.bitsandbytes__nf4");
    let found = error("llama-nf4", &|copy| {
        let state = copy.tensor(&state);
        let text = String::from_utf8(state.bytes.clone()).unwrap();
        state.bytes = text
            .replace("\"blocksize\": 64", "\"blocksize\": 63")
            .into();
    });
    assert!(found.contains("blocksize"), "{found}");
    let found = error("llama-nf4", &|copy| {
        copy.tensor(&state).name = state.replace("nf4", "fp4");
    });
    assert!(found.contains("fp4"), "{found}");
    let found = error("llama-int8", &|copy| remove(copy, &format!("{module}.SCB")));
    assert!(found.contains("q_proj.weight"), "{found}");
    let found = error("llama-int8", &|copy| {
        copy.tensor(&format!("{module}.weight_format")).bytes = vec![1];
    });
    assert!(found.contains("row by row"), "{found}");
    for change in [
        serde_json::json!({"load_in_4bit": true, "bnb_4bit_quant_type": "fp4"}),
        serde_json::json!({"load_in_4bit": true}),
        serde_json::json!({"quant_method": "gptq", "bits": 4}),
    ] {
        let found = error("llama-nf4", &|copy| {
            copy.config["quantization_config"] = change.clone();
        });
        assert!(found.contains("quantization_config"), "{found}");
    }
}

#[test]
fn a_stored_format_is_not_changed_into_another() {
    let checkpoint = Checkpoint::open(&fixture("llama-nf4")).unwrap();
    let load = |quantization| {
        let options = ModelOptions {
            quantization: Some(quantization),
            ..ModelOptions::default()
        };
        Model::load(&checkpoint, &options, &device())
    };
    let error = load(Quantization::Int8).unwrap_err();
    assert!(matches!(error, ModelError::Options { .. }), "{error}");
    load(NF4_DOUBLE).unwrap();
}

fn classifier(quantization: Option<Quantization>, dtype: FloatDType) -> ModelOptions {
    ModelOptions {
        lora: Some(LoraOptions {
            modules_to_save: vec!["layers.0.mlp.up_proj".to_owned()],
            exclude: Some(calor_model::Patterns::List(vec!["up_proj".to_owned()])),
            ..LoraOptions::default()
        }),
        head: HeadOptions::Classifier {
            labels: 2,
            pooling: Pooling::Last,
            problem: Problem::Multiclass,
        },
        quantization,
        dtype,
        ..ModelOptions::default()
    }
}

#[test]
fn a_quantised_model_is_small_and_close_and_counts_the_same_parameters() {
    let checkpoint = Checkpoint::open(&fixture("llama2")).unwrap();
    let input = packed(&[sequences()], 32);
    let logits = |quantization, dtype| {
        let options = classifier(quantization, dtype);
        let model = Model::load(&checkpoint, &options, &device()).unwrap();
        let logits = model.forward(&input, Mode::Infer).into_data();
        (model.size(), logits.try_into_vec::<f32>().unwrap())
    };
    let (dense, exact) = logits(None, FloatDType::F32);
    let scale = exact.iter().fold(0.0f32, |scale, x| scale.max(x.abs()));
    // What the rounding of random weights leaves of 2 layers: 8 bits are near, 4 bits roughly there.
    for (quantization, dtype, bound) in [
        (Quantization::Int8, FloatDType::F32, 0.05),
        (NF4_DOUBLE, FloatDType::F32, 0.5),
        (Quantization::Int8, FloatDType::BF16, 0.1),
        (NF4_DOUBLE, FloatDType::BF16, 0.5),
    ] {
        let (size, logits) = logits(Some(quantization), dtype);
        assert_eq!(size.base_parameters, dense.base_parameters);
        assert_eq!(size.adapter_parameters, dense.adapter_parameters);
        assert_eq!(size.head_parameters, dense.head_parameters);
        let most = dense.frozen_bytes - 2 * dense.base_parameters;
        assert!(size.frozen_bytes < most, "{} {most}", size.frozen_bytes);
        for (a, b) in logits.iter().zip(&exact) {
            let difference = (a - b).abs() / scale;
            assert!(
                difference > 0.0 && difference < bound,
                "{quantization:?} {difference}"
            );
        }
    }
}

#[test]
fn the_adapter_of_a_quantised_model_is_that_of_a_dense_one() {
    let checkpoint = Checkpoint::open(&fixture("llama2")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let dense = tempfile::tempdir().unwrap();
    for (folder, quantization) in [(&folder, Some(NF4_DOUBLE)), (&dense, None)] {
        let options = classifier(quantization, FloatDType::F32);
        let model = Model::load(&checkpoint, &options, &device()).unwrap();
        model.save_adapter(folder.path(), "base").unwrap();
    }
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        let read = |folder: &tempfile::TempDir| std::fs::read(folder.path().join(file)).unwrap();
        assert!(read(&folder) == read(&dense), "{file}");
    }
    let input = packed(&[sequences()], 32);
    for quantization in KINDS {
        let frozen = calor_model::FrozenWeights {
            dtype: FloatDType::F32,
            quantization: Some(quantization),
        };
        let read = Model::load_with_adapter(&checkpoint, folder.path(), frozen, &device()).unwrap();
        let options = classifier(Some(quantization), FloatDType::F32);
        let made = Model::load(&checkpoint, &options, &device()).unwrap();
        let logits = |model: &Model| model.forward(&input, Mode::Infer).into_data();
        logits(&read).assert_eq(&logits(&made), true);
    }
}

#[test]
fn weights_that_are_not_finite_cannot_be_quantised() {
    let mut copy = Copy::of("llama2");
    let weight = copy.tensor("model.layers.1.mlp.down_proj.weight");
    weight.bytes[..4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    let checkpoint = Checkpoint::open(copy.write()).unwrap();
    let options = ModelOptions {
        quantization: Some(NF4_DOUBLE),
        ..ModelOptions::default()
    };
    let error = Model::load(&checkpoint, &options, &device()).unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("down_proj.weight") && error.contains("not finite"),
        "{error}"
    );
}

#[test]
fn the_weight_of_a_module_is_what_its_codes_say() {
    let checkpoint = Checkpoint::open(&fixture("llama2")).unwrap();
    let weight = |quantization, module: &str| {
        let options = ModelOptions {
            quantization,
            ..ModelOptions::default()
        };
        let model = Model::load(&checkpoint, &options, &device()).unwrap();
        let weight = model.linear_weight(module)?;
        Some((
            weight.dims(),
            weight.into_data().try_into_vec::<f32>().unwrap(),
        ))
    };
    let module = "layers.1.mlp.down_proj";
    let (shape, values) = weight(None, module).unwrap();
    for quantization in KINDS {
        let (found_shape, found) = weight(Some(quantization), module).unwrap();
        assert_eq!(found_shape, shape);
        let host = HostWeight::quantize(&values, shape[1], quantization);
        assert_eq!(found, host.dequantize(values.len(), shape[1]));
    }
    assert!(weight(None, "layers.7.mlp.down_proj").is_none());
}

#[test]
fn memory_is_predicted_to_the_byte() {
    for (name, quantizations) in [
        (
            "llama2",
            &[None, Some(KINDS[0]), Some(KINDS[1]), Some(KINDS[2])][..],
        ),
        ("bert", &[Some(NF4_DOUBLE)]),
        ("llama-int8", &[None]),
    ] {
        let checkpoint = Checkpoint::open(&fixture(name)).unwrap();
        for &quantization in quantizations {
            for dtype in [FloatDType::F32, FloatDType::BF16] {
                let options = ModelOptions {
                    lora: Some(LoraOptions::default()),
                    quantization,
                    dtype,
                    ..ModelOptions::default()
                };
                let predicted = MemoryModel::new(&checkpoint, &options).unwrap();
                let model = Model::load(&checkpoint, &options, &device()).unwrap();
                let size = model.size();
                assert_eq!(
                    predicted.frozen_bytes(),
                    size.frozen_bytes,
                    "{name} {quantization:?} {dtype:?}"
                );
            }
        }
    }
}

#[test]
fn a_device_holds_one_weight_dequantised_in_the_type_of_the_activations() {
    let checkpoint = Checkpoint::open(&fixture("llama2")).unwrap();
    let shape = PassShape {
        rows: 2,
        seq: 16,
        samples: 2,
    };
    let working = |quantization, dtype, use_dora, dequantizes| {
        let options = ModelOptions {
            lora: Some(LoraOptions {
                use_dora,
                ..LoraOptions::default()
            }),
            ..classifier(quantization, dtype)
        };
        let model = MemoryModel::new(&checkpoint, &options).unwrap();
        let device = PassDevice::Device { dequantizes };
        let memory = model.training(shape, Recompute::default(), device);
        memory.working_bytes
    };
    // Its widest: 32 × 48. DoRA's norms read it in f32.
    for (dtype, use_dora, dequantizes, element) in [
        (FloatDType::F32, false, true, 4),
        (FloatDType::BF16, false, true, 2),
        (FloatDType::BF16, true, true, 4),
        (FloatDType::BF16, false, false, 0),
        (FloatDType::BF16, true, false, 4),
    ] {
        let more = working(Some(NF4_DOUBLE), dtype, use_dora, dequantizes)
            - working(None, dtype, use_dora, dequantizes);
        assert_eq!(
            more,
            element * 32 * 48,
            "{dtype:?} {use_dora} {dequantizes}"
        );
    }
}

#[test]
fn dora_takes_a_quantised_weight_and_pissa_does_not() {
    let checkpoint = Checkpoint::open(&fixture("llama2")).unwrap();
    let input = packed(&[sequences()], 32);
    let load = |lora: LoraOptions, quantization| {
        let options = ModelOptions {
            lora: Some(lora),
            ..classifier(quantization, FloatDType::F32)
        };
        Model::load(&checkpoint, &options, &device())
    };
    let logits = |lora: LoraOptions| {
        let model = load(lora, Some(NF4_DOUBLE)).unwrap();
        let logits = model.forward(&input, Mode::Infer).into_data();
        logits.try_into_vec::<f32>().unwrap()
    };
    let dora = LoraOptions {
        use_dora: true,
        ..LoraOptions::default()
    };
    // Magnitudes start as the norms of the rows that are computed with, so nothing changes but for
    // the rounding of m / ‖W‖.
    let (with, without) = (logits(dora), logits(LoraOptions::default()));
    for (a, b) in with.iter().zip(&without) {
        assert!((a - b).abs() < 1e-5 * b.abs().max(0.1), "{a} {b}");
    }
    let pissa = LoraOptions {
        init: calor_model::PairInit::Pissa,
        ..LoraOptions::default()
    };
    let error = load(pissa, Some(NF4_DOUBLE)).unwrap_err().to_string();
    assert!(error.contains("PiSSA"), "{error}");
}
