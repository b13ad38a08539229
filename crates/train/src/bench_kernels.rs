//! Each operation of a step by itself, forward and backward, beside its plain reference and beside the
//! least that the device could take for it.

use std::time::Instant;

use burn::tensor::{DType, Device, Distribution, Int, Tensor};
use calor_kernels::{AdamWUpdate, AttentionOptions, Lora, reference};
use serde::Serialize;

use crate::TrainError;
use crate::device::{DeviceSpec, describe_with_products, synchronise};
use crate::recipe::Dtype;
use crate::session::{float_dtype, open_device};

/// The sizes of a decoder's block, its output layer, and the tokens that go through them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct BlockShape {
    /// Rows.
    pub batch: usize,
    /// Tokens a row, all of one segment.
    pub seq: usize,
    /// Width of the states.
    pub hidden: usize,
    /// Width of the feed-forward block.
    pub intermediate: usize,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Rows of the output layer.
    pub vocab: usize,
    /// Rank of the adapter's pairs.
    pub rank: usize,
}

/// What is benchmarked.
#[derive(Clone, Debug)]
pub struct KernelBenchOptions {
    /// The sizes.
    pub shape: BlockShape,
    /// Where to compute.
    pub device: DeviceSpec,
    /// Type of activations and frozen weights.
    pub dtype: Dtype,
    /// Whether the plain references are timed as well.
    pub with_reference: bool,
    /// Operations whose name contains this; all where it is empty.
    pub only: String,
    /// Seconds that an operation is repeated for.
    pub repeat_s: f64,
}

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub struct KernelBenchReport {
    /// The device.
    pub device: String,
    /// What the device is.
    pub device_description: String,
    /// Type of activations and frozen weights.
    pub dtype: Dtype,
    /// The sizes.
    pub shape: BlockShape,
    /// Operations a second of a large matrix product in this type, measured.
    pub peak_flops: f64,
    /// Bytes a second, read and written, of a copy, measured.
    pub peak_bytes_per_s: f64,
    /// One entry an operation.
    pub operations: Vec<OperationTime>,
}

/// The times of one operation, medians.
#[derive(Clone, Debug, Serialize)]
pub struct OperationTime {
    /// Its name.
    pub name: String,
    /// Of the forward pass.
    pub forward_s: f64,
    /// Of forward and backward pass together.
    pub both_s: f64,
    /// The same of the plain reference, where it was asked for and is another one.
    pub reference_both_s: Option<f64>,
    /// The least time that forward and backward pass need: their products at the measured rate, or
    /// each tensor read and written once at the measured bandwidth, whichever is more.
    pub floor_s: f64,
}

/// Times every operation.
///
/// # Errors
/// A device that is not there or fails.
pub fn kernel_bench(options: &KernelBenchOptions) -> Result<KernelBenchReport, TrainError> {
    let device = open_device(options.device, options.dtype)?;
    let mut bench = Bench {
        device: &device,
        dtype: DType::from(float_dtype(options.dtype)),
        options,
        peak_flops: f64::NAN,
        peak_bytes_per_s: f64::NAN,
        operations: Vec::new(),
    };
    bench.measure_peaks()?;
    bench.linears()?;
    bench.attention()?;
    bench.elementwise()?;
    bench.cross_entropy()?;
    bench.adamw()?;
    Ok(KernelBenchReport {
        device: options.device.to_string(),
        device_description: describe_with_products(&device),
        dtype: options.dtype,
        shape: options.shape,
        peak_flops: bench.peak_flops,
        peak_bytes_per_s: bench.peak_bytes_per_s,
        operations: bench.operations,
    })
}

struct Bench<'a> {
    device: &'a Device,
    dtype: DType,
    options: &'a KernelBenchOptions,
    peak_flops: f64,
    peak_bytes_per_s: f64,
    operations: Vec<OperationTime>,
}

/// What forward and backward pass have to do at least.
struct Work {
    flops: f64,
    bytes: f64,
}

impl Bench<'_> {
    fn measure_peaks(&mut self) -> Result<(), TrainError> {
        let on_host = !self.options.device.is_asynchronous();
        let size = if on_host { 2048 } else { 8192 };
        let (a, b) = (self.of([size, size]), self.of([size, size]));
        let elapsed_s = self.sorted_s(|| calor_kernels::matmul(a.clone(), b.clone()))?[0];
        self.peak_flops = 2.0 * (size as f64).powi(3) / elapsed_s;
        self.peak_bytes_per_s = match on_host {
            true => host_copy_rate(),
            false => {
                let [rows, columns] = [1 << 16, 1 << 12];
                let large = self.of([rows, columns]);
                let elapsed_s = self.sorted_s(|| large.clone() * 2.0)?[0];
                (2 * rows * columns * self.dtype.size()) as f64 / elapsed_s
            }
        };
        Ok(())
    }

    fn linears(&mut self) -> Result<(), TrainError> {
        let BlockShape {
            hidden,
            intermediate,
            rank,
            ..
        } = self.options.shape;
        for (name, inputs, outputs) in [
            ("lora_linear, hidden to hidden", hidden, hidden),
            ("lora_linear, hidden to intermediate", hidden, intermediate),
            ("lora_linear, intermediate to hidden", intermediate, hidden),
        ] {
            if !self.wanted(name) {
                continue;
            }
            let x = self.states(inputs).require_grad();
            let weight = self.of([outputs, inputs]);
            let lora = Lora {
                a: self.wide([rank, inputs]).require_grad(),
                b: self.wide([outputs, rank]).require_grad(),
                scaling: 2.0,
                dropout: 0.0,
                dropout_seed: 0,
            };
            let tokens = self.tokens();
            let [inputs, outputs, rank] = [inputs, outputs, rank].map(|size| size as f64);
            let work = Work {
                flops: tokens * (4.0 * inputs * outputs + 8.0 * rank * (inputs + outputs)),
                bytes: self.bytes(tokens * 3.0 * (inputs + outputs) + 2.0 * inputs * outputs),
            };
            self.time(
                name,
                work,
                || calor_kernels::lora_linear(x.clone(), weight.clone(), None, Some(&lora)),
                || reference::lora_linear(x.clone(), weight.clone(), None, Some(&lora), None),
            )?;
        }
        Ok(())
    }

    fn attention(&mut self) -> Result<(), TrainError> {
        let BlockShape {
            batch,
            seq,
            heads,
            kv_heads,
            head_dim,
            ..
        } = self.options.shape;
        let name = "attention, causal";
        if !self.wanted(name) {
            return Ok(());
        }
        let query = self.of([batch, seq, heads, head_dim]).require_grad();
        let key = self.of([batch, seq, kv_heads, head_dim]).require_grad();
        let value = self.of([batch, seq, kv_heads, head_dim]).require_grad();
        let segments = Tensor::<2, Int>::ones([batch, seq], self.device);
        let options = AttentionOptions {
            causal: true,
            window: None,
            scale: (head_dim as f32).sqrt().recip(),
            soft_cap: None,
        };
        let pairs = (batch * heads) as f64 * (seq as f64).powi(2) / 2.0;
        let work = Work {
            // Two products forward and five backward.
            flops: 14.0 * pairs * head_dim as f64,
            bytes: self.bytes(self.tokens() * (6 * (heads + kv_heads) * head_dim) as f64),
        };
        self.time(
            name,
            work,
            || {
                let (q, k, v) = (query.clone(), key.clone(), value.clone());
                calor_kernels::attention(q, k, v, segments.clone(), &options)
            },
            || {
                let (q, k, v) = (query.clone(), key.clone(), value.clone());
                reference::attention(q, k, v, segments.clone(), &options)
            },
        )
    }

    fn elementwise(&mut self) -> Result<(), TrainError> {
        let BlockShape {
            batch,
            seq,
            hidden,
            intermediate,
            heads,
            head_dim,
            ..
        } = self.options.shape;
        let states = self.tokens() * hidden as f64;
        if self.wanted("rms_norm") {
            let x = self.states(hidden).require_grad();
            let weight = self.of([hidden]);
            let work = self.moving(5.0 * states);
            self.time(
                "rms_norm",
                work,
                || calor_kernels::rms_norm(x.clone(), weight.clone(), 1e-5),
                || reference::rms_norm(x.clone(), weight.clone(), 1e-5),
            )?;
        }
        if self.wanted("swiglu") {
            let gate = self.states(intermediate).require_grad();
            let up = self.states(intermediate).require_grad();
            let work = self.moving(8.0 * self.tokens() * intermediate as f64);
            self.time(
                "swiglu",
                work,
                || calor_kernels::swiglu(gate.clone(), up.clone()),
                || reference::swiglu(gate.clone(), up.clone()),
            )?;
        }
        if self.wanted("rotary") {
            let x = self.of([batch, seq, heads, head_dim]).require_grad();
            let (cos, sin) = (
                self.of([batch, seq, head_dim]),
                self.of([batch, seq, head_dim]),
            );
            let work = self.moving(4.0 * self.tokens() * (heads * head_dim) as f64);
            self.time(
                "rotary",
                work,
                || calor_kernels::rotary(x.clone(), cos.clone(), sin.clone()),
                || reference::rotary(x.clone(), cos.clone(), sin.clone()),
            )?;
        }
        Ok(())
    }

    fn cross_entropy(&mut self) -> Result<(), TrainError> {
        let BlockShape {
            batch,
            seq,
            hidden,
            vocab,
            ..
        } = self.options.shape;
        let name = "linear_cross_entropy";
        if !self.wanted(name) {
            return Ok(());
        }
        let states = self.of([batch * seq, hidden]).require_grad();
        let weight = self.of([vocab, hidden]);
        let targets = Tensor::<1, Int>::arange(0..(batch * seq) as i64, self.device)
            .remainder_scalar(vocab as i64);
        let work = Work {
            flops: 4.0 * self.tokens() * (hidden * vocab) as f64,
            bytes: self.bytes(3.0 * self.tokens() * hidden as f64 + 2.0 * (hidden * vocab) as f64),
        };
        let (states, weight) = (&states, &weight);
        self.time(
            name,
            work,
            || {
                let (states, weight) = (states.clone(), weight.clone());
                calor_kernels::linear_cross_entropy(states, weight, targets.clone(), None)
            },
            || {
                let (states, weight) = (states.clone(), weight.clone());
                reference::linear_cross_entropy(states, weight, targets.clone(), None)
            },
        )
    }

    /// All pairs of one block's square linears, an update each.
    fn adamw(&mut self) -> Result<(), TrainError> {
        let name = "adamw, 14 tensors";
        if !self.wanted(name) {
            return Ok(());
        }
        let BlockShape { hidden, rank, .. } = self.options.shape;
        let tensors: Vec<Tensor<1>> = (0..14)
            .map(|_| {
                self.wide([1, rank * hidden])
                    .inner()
                    .reshape([rank * hidden])
            })
            .collect();
        let update = AdamWUpdate {
            beta_1: 0.9,
            beta_2: 0.999,
            epsilon: 1e-8,
            learning_rate: 1e-4,
            weight_decay: 0.01,
            step: 3,
        };
        let of = |tensor: &Tensor<1>| {
            let moment = tensor.clone().abs();
            (tensor.clone(), tensor.clone(), tensor.clone(), moment)
        };
        type Update =
            fn(Tensor<1>, Tensor<1>, Tensor<1>, Tensor<1>, &AdamWUpdate) -> [Tensor<1>; 3];
        let all = |run: Update| {
            let one = |tensor: &Tensor<1>| {
                let (values, gradient, first, second) = of(tensor);
                run(values, gradient, first, second, &update)
            };
            tensors.iter().map(one).collect::<Vec<_>>()
        };
        let both_s = self.median_s(|| all(calor_kernels::adamw))?;
        let reference_both_s = match self.options.with_reference {
            true => Some(self.median_s(|| all(reference::adamw))?),
            false => None,
        };
        self.operations.push(OperationTime {
            name: name.to_owned(),
            forward_s: both_s,
            both_s,
            reference_both_s,
            floor_s: (14 * rank * hidden * 7 * 4) as f64 / self.peak_bytes_per_s,
        });
        Ok(())
    }

    fn time<const D: usize>(
        &mut self,
        name: &str,
        work: Work,
        kernel: impl Fn() -> Tensor<D>,
        plain: impl Fn() -> Tensor<D>,
    ) -> Result<(), TrainError> {
        let forward_s = self.median_s(&kernel)?;
        let both_s = self.median_s(|| kernel().sum().backward())?;
        let reference_both_s = match self.options.with_reference {
            true => Some(self.median_s(|| plain().sum().backward())?),
            false => None,
        };
        let (flops_s, bytes_s) = (
            work.flops / self.peak_flops,
            work.bytes / self.peak_bytes_per_s,
        );
        self.operations.push(OperationTime {
            name: name.to_owned(),
            forward_s,
            both_s,
            reference_both_s,
            floor_s: flops_s.max(bytes_s),
        });
        Ok(())
    }

    fn median_s<T>(&self, run: impl Fn() -> T) -> Result<f64, TrainError> {
        let times = self.sorted_s(run)?;
        Ok(times[times.len() / 2])
    }

    /// The times of runs, the device's work done at the end of each, the shortest first.
    fn sorted_s<T>(&self, run: impl Fn() -> T) -> Result<Vec<f64>, TrainError> {
        let once = || {
            let started = Instant::now();
            // Kept until the device is done: what nobody holds is not computed.
            let result = run();
            synchronise(self.device, "benchmarking")?;
            drop(result);
            Ok::<f64, TrainError>(started.elapsed().as_secs_f64())
        };
        // The first ones compile, and set up memory.
        for _ in 0..3 {
            once()?;
        }
        let began = Instant::now();
        let mut times = vec![once()?];
        while began.elapsed().as_secs_f64() < self.options.repeat_s {
            times.push(once()?);
        }
        times.sort_by(f64::total_cmp);
        Ok(times)
    }

    fn wanted(&self, name: &str) -> bool {
        name.contains(&self.options.only)
    }

    fn tokens(&self) -> f64 {
        (self.options.shape.batch * self.options.shape.seq) as f64
    }

    fn bytes(&self, elements: f64) -> f64 {
        elements * self.dtype.size() as f64
    }

    fn moving(&self, elements: f64) -> Work {
        Work {
            flops: 0.0,
            bytes: self.bytes(elements),
        }
    }

    fn states(&self, width: usize) -> Tensor<3> {
        self.of([self.options.shape.batch, self.options.shape.seq, width])
    }

    fn of<const D: usize>(&self, shape: [usize; D]) -> Tensor<D> {
        self.wide(shape).cast(self.dtype)
    }

    fn wide<const D: usize>(&self, shape: [usize; D]) -> Tensor<D> {
        let drawn = Tensor::<D>::random(shape, Distribution::Normal(0.0, 0.5), self.device);
        drawn.cast(DType::F32).autodiff()
    }
}

/// Bytes a second, read and written, of all threads copying.
fn host_copy_rate() -> f64 {
    const BYTES: usize = 64 << 20;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let source = vec![1u8; BYTES];
    let mut target = vec![0u8; BYTES];
    let share = BYTES.div_ceil(threads);
    let mut shortest_s = f64::INFINITY;
    for _ in 0..5 {
        let started = Instant::now();
        std::thread::scope(|scope| {
            for (from, to) in source.chunks(share).zip(target.chunks_mut(share)) {
                scope.spawn(|| to.copy_from_slice(from));
            }
        });
        shortest_s = shortest_s.min(started.elapsed().as_secs_f64());
    }
    2.0 * BYTES as f64 / shortest_s
}
