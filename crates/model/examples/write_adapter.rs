//! Writes an adapter and what the model computes with it, for PEFT to load and compare:
//!
//! ```text
//! cargo run --release -p calor-model --example write_adapter -- MODEL_DIR OUT [causal|LABELS]
//! scripts/references/check_adapter.py MODEL_DIR OUT --expect OUT/expect.safetensors
//! ```
//!
//! Without a third argument, causal for decoders and one label for encoders. The low-rank pairs and
//! the head get values away from their start.

use std::collections::HashMap;
use std::error::Error;
use std::path::PathBuf;

use burn::tensor::{Device, Int, Tensor, TensorData};
use calor_model::{
    Checkpoint, Family, HeadOptions, LoraOptions, Mode, Model, ModelInput, ModelOptions,
    ParameterGroup, ParameterVisitor, Pooling, Problem, SampleSpan,
};
use safetensors::tensor::{Dtype, TensorView};

const ROWS: usize = 2;
const SEQ: usize = 12;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(model_dir), Some(out)) = (arguments.next(), arguments.next()) else {
        return Err("usage: write_adapter MODEL_DIR OUT [causal|LABELS]".into());
    };
    let (model_dir, out) = (PathBuf::from(model_dir), PathBuf::from(out));
    let device = Device::flex();
    let checkpoint = Checkpoint::open(&model_dir)?;
    let family = checkpoint.config().family();
    let head = match (arguments.next().as_deref(), family) {
        (Some("causal"), _) | (None, Family::Decoder) => HeadOptions::CausalLm,
        (labels, _) => HeadOptions::Classifier {
            labels: labels.unwrap_or("1").parse()?,
            pooling: Pooling::default_for(family),
            problem: Problem::Regression,
        },
    };
    let options = ModelOptions {
        lora: Some(LoraOptions {
            r: 4,
            alpha: 8.0,
            use_rslora: true,
            ..LoraOptions::default()
        }),
        head,
        ..ModelOptions::default()
    };
    let mut model = Model::load(&checkpoint, &options, &device)?;
    model.visit_trainable(&mut Perturb);
    model.save_adapter(&out, &model_dir.to_string_lossy())?;

    let ids: Vec<i64> = (0..ROWS * SEQ).map(|i| 5 + (i as i64 * 37) % 90).collect();
    let integers = |values: Vec<i32>| -> Tensor<2, Int> {
        Tensor::from_data(TensorData::new(values, [ROWS, SEQ]), &device)
    };
    let input = ModelInput {
        input_ids: integers(ids.iter().map(|&id| id as i32).collect()),
        positions: integers((0..ROWS * SEQ).map(|i| (i % SEQ) as i32).collect()),
        segments: integers(vec![1; ROWS * SEQ]),
        samples: (0..ROWS)
            .map(|row| SampleSpan {
                row,
                start: 0,
                length: SEQ,
            })
            .collect(),
        soft: None,
    };
    let logits = match head {
        HeadOptions::CausalLm => model.logits(&input, Mode::Infer).inner().into_data(),
        _ => model.forward(&input, Mode::Infer).inner().into_data(),
    };
    let ids: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let views = HashMap::from([
        (
            "input_ids",
            TensorView::new(Dtype::I64, vec![ROWS, SEQ], &ids)?,
        ),
        (
            "logits",
            TensorView::new(Dtype::F32, logits.shape().to_vec(), logits.bytes())?,
        ),
    ]);
    std::fs::write(
        out.join("expect.safetensors"),
        safetensors::serialize(views, None)?,
    )?;
    Ok(())
}

/// Adds a small fixed pattern to everything trained.
struct Perturb;

impl ParameterVisitor for Perturb {
    fn visit<const D: usize>(&mut self, name: &str, _: ParameterGroup, tensor: &mut Tensor<D>) {
        let shape = tensor.shape();
        let pattern: Vec<f32> = (0..shape.num_elements())
            .map(|i| 0.02 * ((i * 7 + name.len()) as f32).sin())
            .collect();
        let plain = tensor.clone().inner();
        let pattern = Tensor::from_data(TensorData::new(pattern, shape), &plain.device());
        *tensor = Tensor::from_inner(plain + pattern).require_grad();
    }
}
