//! One optimizer step again and again: the code of the training loop, on a batch from a file
//! or of random tokens, for comparison with other engines.

use std::path::{Path, PathBuf};

use burn::tensor::{Int, Tensor};
use calor_meter::{Counts, EnergyOptions, Meter, MeterReport, Purpose, Quantity};
use calor_model::{
    Checkpoint, FrozenWeights, HeadOptions, LoraOptions, MemoryModel, Mode, Model, ModelInput,
    ModelOptions, PassShape, Pooling, Problem, Quantization, Recompute, SampleSpan, loss,
};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype as FileDtype;
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::device::{DeviceSpec, describe_with_products, synchronise};
use crate::loss_scale::LossScale;
use crate::optimizer::{OptimizerOptions, TensorRules};
use crate::recipe::Dtype;
use crate::seed::derive;
use crate::session::{describe_work, float_dtype, open_device, record_device_memory};
use crate::step::TrainStep;
use crate::upload;

/// A target that counts in no loss.
const IGNORED: i32 = -100;

/// What a benchmarked step minimises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BenchTask {
    /// Mean next-token cross-entropy.
    CausalLm,
    /// Mean cross-entropy of two classes, a label a row.
    SequenceClassification,
}

/// What is benchmarked.
#[derive(Clone, Debug)]
pub struct StepBenchOptions {
    /// The checkpoint's folder.
    pub model: PathBuf,
    /// What is minimised.
    pub task: BenchTask,
    /// A PEFT adapter to start from; without one, `lora` is drawn anew.
    pub adapter: Option<PathBuf>,
    /// The adapter where none is given.
    pub lora: LoraOptions,
    /// A safetensors file with `input_ids` and `labels`, and `attention_mask` where there is
    /// padding; without one, rows of `seq` random tokens.
    pub data: Option<PathBuf>,
    /// Rows, where no file is given.
    pub batch: usize,
    /// Tokens a row, where no file is given.
    pub seq: usize,
    /// Steps that are timed.
    pub steps: usize,
    /// Steps before them that are not.
    pub warmup: usize,
    /// The learning rate, the same at every step.
    pub learning_rate: f64,
    /// Norm that gradients are clipped to; 0 for no clipping.
    pub max_grad_norm: f64,
    /// Seed of what is drawn.
    pub seed: u64,
    /// Where to compute.
    pub device: DeviceSpec,
    /// Type of the frozen weights.
    pub dtype: Dtype,
    /// Blocks that are run again in the backward pass.
    pub recompute: Recompute,
    /// Bits of the backbone's frozen linear layers.
    pub quantization: Option<Quantization>,
    /// How energy is measured.
    pub energy: EnergyOptions,
}

/// What a benchmark found.
#[derive(Clone, Debug, Serialize)]
pub struct StepBenchReport {
    /// The checkpoint's folder.
    pub model: String,
    /// What was minimised.
    pub task: BenchTask,
    /// The device.
    pub device: String,
    /// What the device is.
    pub device_description: String,
    /// Rows.
    pub batch: usize,
    /// Tokens a row, padding included.
    pub seq: usize,
    /// Bytes of the frozen weights.
    pub frozen_bytes: u64,
    /// Loss of every step before its update, warm-up steps first.
    pub losses: Vec<f64>,
    /// Norm of the gradients before clipping, likewise.
    pub gradient_norms: Vec<f64>,
    /// Wall time of each timed step.
    pub step_s: Vec<f64>,
    /// Tokens without padding over the median step time.
    pub tokens_per_s: f64,
    /// Joules of the timed steps.
    pub energy_j: Quantity,
    /// The same a token.
    pub energy_j_per_token: Quantity,
    /// Peak memory of the process.
    pub peak_memory_bytes: Quantity,
    /// Peak memory of the device, where it has its own.
    pub device_peak_bytes: Quantity,
    /// Bytes that a step was predicted to hold at its peak: on the device, or on the host beside the
    /// program itself.
    pub predicted_peak_bytes: u64,
    /// All that was measured.
    pub meter: MeterReport,
}

/// Runs the steps.
///
/// # Errors
/// A checkpoint, an adapter or a batch that does not fit; a loss that is not finite.
pub fn step_bench(options: &StepBenchOptions) -> Result<StepBenchReport, TrainError> {
    let device = open_device(options.device, options.dtype)?;
    device.seed(derive(options.seed, "device", &[]));
    let checkpoint = Checkpoint::open(&options.model)?;
    let frozen = FrozenWeights {
        dtype: float_dtype(options.dtype),
        quantization: options.quantization,
    };
    let mut model = match &options.adapter {
        Some(adapter) => Model::load_with_adapter(&checkpoint, adapter, frozen, &device)?,
        None => {
            let head = match options.task {
                BenchTask::CausalLm => HeadOptions::CausalLm,
                BenchTask::SequenceClassification => HeadOptions::Classifier {
                    labels: 2,
                    pooling: Pooling::default_for(checkpoint.config().family()),
                    problem: Problem::Multiclass,
                },
            };
            let lora = Some(options.lora.clone());
            let seed = derive(options.seed, "new weights", &[]);
            let options = ModelOptions {
                lora,
                head,
                head_hidden: 0,
                fusion: None,
                seed,
                dtype: frozen.dtype,
                quantization: frozen.quantization,
            };
            Model::load(&checkpoint, &options, &device)?
        }
    };
    model.set_recompute(options.recompute);
    let vocab = checkpoint.config().vocab_size();
    let batch = match &options.data {
        Some(path) => Batch::read(path, options.task, vocab)?,
        None => Batch::random(options, vocab),
    };
    match (options.task, &model.options().head) {
        (BenchTask::CausalLm, HeadOptions::CausalLm) => {}
        (BenchTask::SequenceClassification, HeadOptions::Classifier { labels, .. })
            if *labels >= 2 => {}
        (_, found) => {
            let path = options.adapter.clone().unwrap_or_default();
            let problem = format!(
                "its head is {found:?}; name the task it was made for (causal_lm or \
                 sequence_classification)"
            );
            return Err(TrainError::Bench { path, problem });
        }
    }

    let predicted = MemoryModel::new(&checkpoint, model.options())?.training(
        PassShape {
            rows: batch.rows,
            seq: batch.seq,
            samples: batch.rows,
        },
        options.recompute,
        options.device.pass(),
    );
    let mut meter = Meter::open(&options.energy, &options.device.metered(&device))
        .map_err(|error| TrainError::Meter(Box::new(error)))?;
    meter.measure_idle();
    describe_work(&mut meter, &model, options.device, options.dtype)?;
    let input = batch.input(&device);
    let targets: Tensor<1, Int> = upload::integers(&batch.targets, [batch.targets.len()], &device);
    let mut step = TrainStep::new(
        OptimizerOptions::default(),
        TensorRules::uniform(options.learning_rate),
        options.max_grad_norm,
        true,
    );
    step.loss_scale = (options.dtype == Dtype::F16).then(LossScale::default);
    let mut report = Found::default();
    for number in 1..=options.warmup + options.steps {
        let timed = number > options.warmup;
        let purpose = if timed {
            Purpose::Training
        } else {
            Purpose::WarmUp
        };
        if number == 1 || number == options.warmup + 1 {
            synchronise(&device, "benchmarking")?;
            meter.begin(purpose);
        }
        meter.count(purpose, batch.counts(), &batch.lengths);
        let mode = Mode::Train {
            dropout_seed: derive(options.seed, "dropout", &[number as u64]),
        };
        let started = std::time::Instant::now();
        let result = step.run(
            &mut model,
            std::iter::once((input.clone(), targets.clone())),
            |model: &Model, (input, targets): (ModelInput, Tensor<1, Int>), _: &mut Meter| {
                Ok(match options.task {
                    BenchTask::CausalLm => model.causal_lm_loss(&input, targets, mode),
                    BenchTask::SequenceClassification => {
                        loss::multiclass(model.forward(&input, mode), targets, None)
                    }
                })
            },
            batch.supervised as f64,
            1.0,
            number as u64,
            &mut meter,
        )?;
        synchronise(&device, "benchmarking")?;
        meter.finish_step();
        report.losses.push(result.loss);
        report
            .gradient_norms
            .push(result.grad_norm.unwrap_or(f64::NAN));
        if timed {
            report.step_s.push(started.elapsed().as_secs_f64());
        }
    }
    record_device_memory(&mut meter, options.device, &device);
    meter.end();
    let meter = meter.report();
    let mut sorted = report.step_s.clone();
    sorted.sort_by(f64::total_cmp);
    let median_s = match sorted.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => sorted[count / 2],
        count => (sorted[count / 2 - 1] + sorted[count / 2]) / 2.0,
    };
    Ok(StepBenchReport {
        model: options.model.display().to_string(),
        task: options.task,
        device: options.device.to_string(),
        device_description: describe_with_products(&device),
        batch: batch.rows,
        seq: batch.seq,
        frozen_bytes: model.size().frozen_bytes,
        losses: report.losses,
        gradient_norms: report.gradient_norms,
        step_s: report.step_s,
        tokens_per_s: batch.tokens() as f64 / median_s,
        energy_j: meter.energy.training.gross_j.clone(),
        energy_j_per_token: meter.energy.training.gross_j_per_token.clone(),
        peak_memory_bytes: meter.memory.host_peak_bytes.clone(),
        device_peak_bytes: meter.memory.device_peak_bytes.clone(),
        predicted_peak_bytes: predicted.device_bytes(),
        meter,
    })
}

#[derive(Default)]
struct Found {
    losses: Vec<f64>,
    gradient_norms: Vec<f64>,
    step_s: Vec<f64>,
}

/// The one batch that every step sees.
#[derive(Debug)]
struct Batch {
    rows: usize,
    seq: usize,
    input_ids: Vec<i32>,
    /// Tokens of each row, without its padding on the right.
    lengths: Vec<usize>,
    /// Next tokens `[rows · seq]`, or classes `[rows]`.
    targets: Vec<i32>,
    supervised: usize,
}

impl Batch {
    /// Reads `input_ids` `[rows, seq]`, `labels` `[rows, seq]` (−100 counts in no loss) or
    /// `[rows]`, and `attention_mask` `[rows, seq]`, all int64.
    fn read(path: &Path, task: BenchTask, vocab: usize) -> Result<Batch, TrainError> {
        let bytes = std::fs::read(path).map_err(TrainError::io("read", path))?;
        let wrong = |problem: String| TrainError::Bench {
            path: path.to_owned(),
            problem,
        };
        let file = SafeTensors::deserialize(&bytes)
            .map_err(|error| wrong(format!("is not a safetensors file: {error}")))?;
        let read = |name: &str| -> Result<(Vec<usize>, Vec<i64>), TrainError> {
            let view = file
                .tensor(name)
                .map_err(|_| wrong(format!("has no tensor `{name}`")))?;
            if view.dtype() != FileDtype::I64 {
                return Err(wrong(format!("`{name}` is {:?}, not I64", view.dtype())));
            }
            let chunks = view.data().chunks_exact(8);
            let values = chunks.map(|bytes| i64::from_le_bytes(bytes.try_into().expect("eight")));
            Ok((view.shape().to_vec(), values.collect()))
        };
        let (shape, input_ids) = read("input_ids")?;
        let &[rows, seq] = shape.as_slice() else {
            return Err(wrong(format!("`input_ids` is {shape:?}, not [rows, seq]")));
        };
        if rows == 0 || seq == 0 {
            return Err(wrong("`input_ids` is empty".to_owned()));
        }
        if let Some(id) = input_ids.iter().find(|id| !(0..vocab as i64).contains(*id)) {
            return Err(wrong(format!(
                "`input_ids` holds {id}, and the checkpoint has {vocab} tokens"
            )));
        }
        let mask = match file.tensor("attention_mask") {
            Ok(_) => read("attention_mask")?.1,
            Err(_) => vec![1; rows * seq],
        };
        if mask.len() != rows * seq {
            return Err(wrong(
                "`attention_mask` has another shape than `input_ids`".to_owned(),
            ));
        }
        let mut lengths = Vec::with_capacity(rows);
        for row in mask.chunks(seq) {
            let length = row.iter().take_while(|value| **value != 0).count();
            if length == 0 || row[length..].iter().any(|value| *value != 0) {
                return Err(wrong(
                    "a row of `attention_mask` is empty or padded elsewhere than on the right"
                        .to_owned(),
                ));
            }
            lengths.push(length);
        }
        let (shape, labels) = read("labels")?;
        let expected = match task {
            BenchTask::CausalLm => vec![rows, seq],
            BenchTask::SequenceClassification => vec![rows],
        };
        if shape != expected {
            return Err(wrong(format!("`labels` is {shape:?}, not {expected:?}")));
        }
        let targets = match task {
            BenchTask::CausalLm => shifted(&labels, seq),
            BenchTask::SequenceClassification => labels.iter().map(|label| *label as i32).collect(),
        };
        let input_ids = input_ids.into_iter().map(|id| id as i32).collect();
        let batch = Batch::new(rows, seq, input_ids, lengths, targets);
        if batch.supervised == 0 {
            return Err(wrong("no label counts in the loss".to_owned()));
        }
        Ok(batch)
    }

    fn random(options: &StepBenchOptions, vocab: usize) -> Batch {
        let (rows, seq) = (options.batch, options.seq);
        let draw = |purpose: &str, index: usize, below: usize| {
            (derive(options.seed, purpose, &[index as u64]) % below.max(1) as u64) as i32
        };
        let input_ids: Vec<i32> = (0..rows * seq)
            .map(|index| draw("token", index, vocab))
            .collect();
        let targets = match options.task {
            BenchTask::CausalLm => {
                let labels: Vec<i64> = input_ids.iter().map(|id| i64::from(*id)).collect();
                shifted(&labels, seq)
            }
            BenchTask::SequenceClassification => {
                (0..rows).map(|row| draw("class", row, 2)).collect()
            }
        };
        Batch::new(rows, seq, input_ids, vec![seq; rows], targets)
    }

    fn new(
        rows: usize,
        seq: usize,
        input_ids: Vec<i32>,
        lengths: Vec<usize>,
        targets: Vec<i32>,
    ) -> Batch {
        let supervised = targets.iter().filter(|target| **target != IGNORED).count();
        Batch {
            rows,
            seq,
            input_ids,
            lengths,
            targets,
            supervised,
        }
    }

    fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    fn counts(&self) -> Counts {
        Counts {
            sequences: self.rows as u64,
            padded_tokens: (self.rows * self.seq) as u64,
            tokens: self.tokens() as u64,
            supervised: self.supervised as u64,
        }
    }

    fn input(&self, device: &burn::tensor::Device) -> ModelInput {
        let shape = [self.rows, self.seq];
        let mut positions = vec![0; self.rows * self.seq];
        let mut segments = vec![0; self.rows * self.seq];
        for (row, length) in self.lengths.iter().enumerate() {
            for column in 0..*length {
                positions[row * self.seq + column] = column as i32;
                segments[row * self.seq + column] = 1;
            }
        }
        let spans = self.lengths.iter().enumerate();
        ModelInput {
            input_ids: upload::integers(&self.input_ids, shape, device),
            positions: upload::integers(&positions, shape, device),
            segments: upload::integers(&segments, shape, device),
            samples: spans
                .map(|(row, length)| SampleSpan {
                    row,
                    start: 0,
                    length: *length,
                })
                .collect(),
            soft: None,
        }
    }
}

/// The label of the next position, −100 at the end of a row.
fn shifted(labels: &[i64], seq: usize) -> Vec<i32> {
    labels
        .chunks(seq)
        .flat_map(|row| row[1..].iter().map(|label| *label as i32).chain([IGNORED]))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(tensors: &[(&str, Vec<usize>, Vec<i64>)]) -> tempfile::NamedTempFile {
        use safetensors::tensor::TensorView;
        let bytes: Vec<Vec<u8>> = tensors
            .iter()
            .map(|(_, _, values)| {
                values
                    .iter()
                    .flat_map(|value| value.to_le_bytes())
                    .collect()
            })
            .collect();
        let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
            let view = TensorView::new(FileDtype::I64, shape.clone(), bytes).unwrap();
            (*name, view)
        });
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), safetensors::serialize(views, None).unwrap()).unwrap();
        file
    }

    #[test]
    fn labels_are_shifted_and_padding_is_left_out() {
        let file = file(&[
            ("input_ids", vec![2, 3], vec![5, 6, 7, 8, 9, 0]),
            ("attention_mask", vec![2, 3], vec![1, 1, 1, 1, 1, 0]),
            ("labels", vec![2, 3], vec![5, 6, 7, 8, 9, -100]),
        ]);
        let batch = Batch::read(file.path(), BenchTask::CausalLm, 10).unwrap();
        assert_eq!(batch.targets, [6, 7, IGNORED, 9, IGNORED, IGNORED]);
        assert_eq!((batch.supervised, batch.tokens()), (3, 5));
        assert_eq!(batch.lengths, [3, 2]);
    }

    #[test]
    fn a_batch_that_does_not_fit_is_named_by_its_tensor() {
        let complaint = |tensors: &[(&str, Vec<usize>, Vec<i64>)]| {
            Batch::read(file(tensors).path(), BenchTask::SequenceClassification, 10)
                .unwrap_err()
                .to_string()
        };
        let ids = ("input_ids", vec![1, 2], vec![1, 2]);
        assert!(complaint(&[]).contains("no tensor `input_ids`"));
        assert!(complaint(std::slice::from_ref(&ids)).contains("no tensor `labels`"));
        let labels = ("labels", vec![1, 2], vec![0, 0]);
        assert!(complaint(&[ids.clone(), labels]).contains("`labels` is [1, 2], not [1]"));
        let high = ("input_ids", vec![1, 2], vec![1, 10]);
        assert!(complaint(&[high]).contains("holds 10"));
        let left = ("attention_mask", vec![1, 2], vec![0, 1]);
        assert!(complaint(&[ids, left]).contains("attention_mask"));
    }
}
