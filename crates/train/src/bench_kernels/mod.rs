//! Each operation of a step by itself, forward and backward, beside its plain reference and beside the
//! least that the device could take for it.

mod cases;
mod compare;

use std::time::Instant;

use burn::tensor::{DType, Device, Distribution, Tensor};
use serde::Serialize;

use crate::TrainError;
use crate::device::{DeviceSpec, describe_with_products, synchronise};
use crate::recipe::Dtype;
use crate::session::{float_dtype, open_device};

use compare::Leaf;
pub use compare::TensorError;

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
    /// Whether the plain references are run as well, timed, and compared with.
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
    /// The same of the plain reference, where it was asked for.
    pub reference_both_s: Option<f64>,
    /// The least time that forward and backward pass need: their products at the measured rate, or
    /// each tensor read and written once at the measured bandwidth, whichever is more.
    pub floor_s: f64,
    /// How far the output and the gradients of the inputs are from the reference's, where that was
    /// asked for: the same inputs in the same type.
    pub errors: Vec<TensorError>,
    /// Bytes of a device's own memory that its allocator reserved for one forward and backward pass
    /// beside the inputs, in pages; where the reference was asked for.
    pub peak_bytes: Option<u64>,
    /// The same of the reference.
    pub reference_peak_bytes: Option<u64>,
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
    bench.joint_linears()?;
    bench.quantized_linears()?;
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
        // Of a graphics adapter every buffer has to fit into one binding, 128 MiB of many.
        let (largest, rows) = match self.options.device {
            DeviceSpec::Cpu => (2048, 0),
            DeviceSpec::Cuda(_) => (8192, 1 << 16),
            DeviceSpec::Wgpu(_) => (4096, 1 << 12),
        };
        self.peak_flops = self.product_rate(largest)?;
        self.peak_bytes_per_s = match on_host {
            true => host_copy_rate(),
            false => {
                let columns = 1 << 12;
                let large = self.of([rows, columns]);
                let elapsed_s = self.sorted_s(|| large.clone() * 2.0)?[0];
                (2 * rows * columns * self.dtype.size()) as f64 / elapsed_s
            }
        };
        Ok(())
    }

    /// Of square products, up to the largest or the first that takes a while: a slow device would take
    /// minutes for what a fast one needs to be seen at its best.
    fn product_rate(&self, largest: usize) -> Result<f64, TrainError> {
        let (mut size, mut best) = (512, 0.0f64);
        loop {
            let (a, b) = (self.of([size, size]), self.of([size, size]));
            let elapsed_s = self.sorted_s(|| calor_kernels::matmul(a.clone(), b.clone()))?[0];
            best = best.max(2.0 * (size as f64).powi(3) / elapsed_s);
            if size >= largest || elapsed_s > 0.1 {
                return Ok(best);
            }
            size *= 2;
        }
    }

    fn time<const D: usize>(
        &mut self,
        name: &str,
        work: Work,
        inputs: &[Leaf],
        kernel: impl Fn() -> Tensor<D>,
        plain: impl Fn() -> Tensor<D>,
    ) -> Result<(), TrainError> {
        let (flops_s, bytes_s) = (
            work.flops / self.peak_flops,
            work.bytes / self.peak_bytes_per_s,
        );
        let mut found = OperationTime {
            name: name.to_owned(),
            forward_s: self.median_s(&kernel)?,
            both_s: self.median_s(|| kernel().sum().backward())?,
            reference_both_s: None,
            floor_s: flops_s.max(bytes_s),
            errors: Vec::new(),
            peak_bytes: None,
            reference_peak_bytes: None,
        };
        if self.options.with_reference {
            found.reference_both_s = Some(self.median_s(|| plain().sum().backward())?);
            found.errors = compare::errors(inputs, &kernel, &plain);
            found.peak_bytes = self.peak_bytes(|| kernel().sum().backward())?;
            found.reference_peak_bytes = self.peak_bytes(|| plain().sum().backward())?;
        }
        self.operations.push(found);
        Ok(())
    }

    /// Pages that the device's allocator takes for one run, beside those that it needs anyway. The
    /// CPU has no such allocator.
    fn peak_bytes<T>(&self, run: impl Fn() -> T) -> Result<Option<u64>, TrainError> {
        let reserved = || {
            synchronise(self.device, "measuring memory")?;
            Ok::<_, TrainError>(
                self.device
                    .memory_pool_usage()
                    .map(|usage| usage.bytes_reserved),
            )
        };
        if !self.options.device.is_asynchronous() {
            return Ok(None);
        }
        synchronise(self.device, "measuring memory")?;
        self.device.memory_cleanup();
        let before = reserved()?;
        let result = run();
        let after = reserved()?;
        drop(result);
        Ok(before
            .zip(after)
            .map(|(before, after)| after.saturating_sub(before)))
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
