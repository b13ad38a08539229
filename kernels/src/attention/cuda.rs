//! Attention in tiles on NVIDIA's tensor cores, in bf16 and f16; see `flash.cu`.

use std::ffi::c_void;
use std::sync::Arc;

use burn::backend::DispatchDevice;
use burn::tensor::{DType, Tensor};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;

use super::AttentionOptions;
use super::cube::sums_shape;
use crate::cuda::module::{Launch, Module};
use crate::cuda::{Session, WORKSPACE_BYTES};
use crate::gpu::empty_like;

const SOURCE: &str = include_str!("flash.cu");
const MOST_HEAD_DIM: usize = 128;
/// Warps of a block, 16 rows each.
const FORWARD_WARPS: u32 = 4;
const BACKWARD_WARPS: u32 = 4;
/// Rows of the other side that a block holds at a time; `COLUMNS` of the source.
const COLUMNS: u32 = 64;
const WARP: u32 = 32;
const BOUND_THREADS: u32 = 1024;

/// Whether these kernels serve such queries, with keys and values of the same type.
pub(super) fn serves(query: &Tensor<4>, options: &AttentionOptions) -> bool {
    let [batch, seq, heads, head_dim] = query.dims();
    let half = matches!(query.dtype(), DType::BF16 | DType::F16);
    let scratch = Scratch::new(batch, seq, heads).bytes;
    if !half || !head_dim.is_multiple_of(8) || head_dim > MOST_HEAD_DIM || scratch > WORKSPACE_BYTES
    {
        return false;
    }
    let device = query.device().without_autodiff();
    let DispatchDevice::Cube(device) = device.as_dispatch() else {
        return false;
    };
    let Some(Ok(session)) = Session::of(device) else {
        return false;
    };
    module(&session, query.dtype(), head_dim, options).is_ok()
}

/// The output, and the logarithm to base 2 of each row's sum.
pub(super) fn forward(
    query: CubeTensor,
    key: CubeTensor,
    value: CubeTensor,
    segments: CubeTensor,
    options: &AttentionOptions,
) -> (CubeTensor, CubeTensor) {
    let [query, key, value] = [query, key, value].map(readable);
    let segments = into_contiguous(segments);
    let output = empty_like(&query, query.meta.shape().clone(), query.dtype);
    let sums = empty_like(&query, sums_shape(query.meta.shape()), DType::F32);
    let tensors = [&query, &key, &value, &segments, &output, &sums];
    submit(&tensors, options, |run, at| {
        let mut arguments = run.arguments([&query, &key, &value, &output], [at[0], at[1], at[2]]);
        arguments.output = at[4];
        arguments.sums = at[5];
        run.bounds(&mut arguments, at[3])?;
        run.launch(
            "attention_forward",
            FORWARD_WARPS,
            run.heads,
            FORWARD_WARPS * 16 + 4 * COLUMNS,
            &mut arguments,
        )
    });
    (output, sums)
}

/// The gradients of query, key and value.
pub(super) fn backward(
    inputs: [CubeTensor; 3],
    segments: CubeTensor,
    kept: [CubeTensor; 3],
    options: &AttentionOptions,
) -> (CubeTensor, CubeTensor, CubeTensor) {
    let [query, key, value] = inputs.map(readable);
    let segments = into_contiguous(segments);
    let [output, sums, gradient] = kept.map(into_contiguous);
    let found = [&query, &key, &value]
        .map(|tensor| empty_like(tensor, tensor.meta.shape().clone(), tensor.dtype));
    let [dq, dk, dv] = &found;
    let tensors = [
        &query, &key, &value, &segments, &output, &sums, &gradient, dq, dk, dv,
    ];
    submit(&tensors, options, |run, at| {
        let mut arguments = run.arguments([&query, &key, &value, &output], [at[0], at[1], at[2]]);
        arguments.output = at[4];
        arguments.sums = at[5];
        arguments.output_gradient = at[6];
        arguments.gradients = [at[7], at[8], at[9]];
        arguments.query_gradient_strides = Strides::of(dq);
        arguments.key_gradient_strides = Strides::of(dk);
        run.bounds(&mut arguments, at[3])?;
        run.deltas(&mut arguments)?;
        let rows = 2 * (BACKWARD_WARPS * 16) + 2 * COLUMNS;
        run.launch(
            "attention_query_gradient",
            BACKWARD_WARPS,
            run.heads,
            rows,
            &mut arguments,
        )?;
        run.launch(
            "attention_key_value_gradient",
            BACKWARD_WARPS,
            run.kv_heads,
            rows,
            &mut arguments,
        )
    });
    let [dq, dk, dv] = found;
    (dq, dk, dv)
}

/// The tensor, copied where its heads are not rows of whole 16 bytes.
fn readable(tensor: CubeTensor) -> CubeTensor {
    let strides = tensor.meta.strides();
    let whole = strides[3] == 1 && (0..3).all(|dimension| strides[dimension].is_multiple_of(8));
    let starts = tensor.handle.offset_start.unwrap_or(0).is_multiple_of(16);
    match whole && starts {
        true => tensor,
        false => into_contiguous(tensor),
    }
}

/// Runs `work` with the addresses of `tensors`, query and key first.
fn submit<Work>(tensors: &[&CubeTensor], options: &AttentionOptions, work: Work)
where
    Work: Fn(&Run, &[u64]) -> Result<(), crate::cuda::Refused> + Send + Sync,
{
    let (query, key) = (tensors[0], tensors[1]);
    let shape: Vec<usize> = query.meta.shape().iter().copied().collect();
    let session = Session::of(&query.device)
        .and_then(Result::ok)
        .expect("asked only where `serves` found a session");
    let module = module(&session, query.dtype, shape[3], options)
        .expect("asked only where `serves` compiled it");
    let submitted = session.run(&query.client, tensors, |queue, at| {
        let run = Run {
            module: &module,
            queue,
            options: *options,
            batch: shape[0] as u32,
            seq: shape[1] as u32,
            heads: shape[2] as u32,
            kv_heads: key.meta.shape()[2] as u32,
            head_dim: shape[3] as u32,
            scratch: Scratch::new(shape[0], shape[1], shape[2]),
        };
        work(&run, at)
    });
    if let Err(refused) = submitted {
        panic!("attention on CUDA: {refused}; CALOR_CUDA_LIBRARIES=off goes on without it");
    }
}

fn module(
    session: &Session,
    dtype: DType,
    head_dim: usize,
    options: &AttentionOptions,
) -> Result<Arc<Module>, String> {
    let macros = [
        ("HEAD_DIM", padded(head_dim as u32)),
        ("HALF", u32::from(dtype == DType::F16)),
        ("CAPPED", u32::from(options.soft_cap.is_some())),
        ("FORWARD_WARPS", FORWARD_WARPS),
        ("BACKWARD_WARPS", BACKWARD_WARPS),
    ];
    session.module(
        SOURCE,
        &macros.map(|(name, value)| format!("{name}={value}")),
    )
}

fn padded(head_dim: u32) -> u32 {
    head_dim.next_multiple_of(16)
}

/// What the kernels hand each other in the session's workspace.
struct Scratch {
    /// From the start of one array of bounds to the next.
    bounds_bytes: usize,
    bytes: usize,
}

impl Scratch {
    fn new(batch: usize, seq: usize, heads: usize) -> Scratch {
        let bounds_bytes = (batch * seq * size_of::<i32>()).next_multiple_of(256);
        Scratch {
            bounds_bytes,
            bytes: 4 * bounds_bytes + batch * seq * heads * size_of::<f32>(),
        }
    }
}

/// Elements from one place to the next.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Strides {
    batch: i64,
    seq: i64,
    head: i64,
}

impl Strides {
    fn of(tensor: &CubeTensor) -> Strides {
        let strides = tensor.meta.strides();
        Strides {
            batch: strides[0] as i64,
            seq: strides[1] as i64,
            head: strides[2] as i64,
        }
    }
}

/// `Arguments` of the source, field by field.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Arguments {
    query: u64,
    key: u64,
    value: u64,
    output: u64,
    sums: u64,
    bounds: [u64; 4],
    output_gradient: u64,
    deltas: u64,
    gradients: [u64; 3],
    strides: [Strides; 4],
    query_gradient_strides: Strides,
    key_gradient_strides: Strides,
    seq: i32,
    heads: i32,
    kv_heads: i32,
    head_dim: i32,
    scale: f32,
    cap: f32,
}

/// One operation on its way to the device.
struct Run<'a> {
    module: &'a Module,
    queue: &'a crate::cuda::Queue<'a>,
    options: AttentionOptions,
    batch: u32,
    seq: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    scratch: Scratch,
}

impl Run<'_> {
    /// What both passes need; `tensors` are query, key, value and output.
    fn arguments(&self, tensors: [&CubeTensor; 4], at: [u64; 3]) -> Arguments {
        let bounds = self.queue.workspace;
        let step = self.scratch.bounds_bytes as u64;
        Arguments {
            query: at[0],
            key: at[1],
            value: at[2],
            bounds: [0, 1, 2, 3].map(|index| bounds + index * step),
            deltas: bounds + 4 * step,
            strides: tensors.map(Strides::of),
            seq: self.seq as i32,
            heads: self.heads as i32,
            kv_heads: self.kv_heads as i32,
            head_dim: self.head_dim as i32,
            scale: self.options.scale,
            cap: self.options.soft_cap.unwrap_or(0.0),
            ..Arguments::default()
        }
    }

    /// What each token sees.
    fn bounds(
        &self,
        arguments: &mut Arguments,
        mut segments: u64,
    ) -> Result<(), crate::cuda::Refused> {
        let mut stride = i64::from(self.seq);
        let mut causal = i32::from(self.options.causal);
        // A window over the whole row is none.
        let window = self
            .options
            .window
            .filter(|&window| window < self.seq as usize);
        let mut window = window.unwrap_or(0) as i32;
        let launch = Launch {
            blocks: [self.batch, 1, 1],
            threads: BOUND_THREADS,
            shared_bytes: 0,
        };
        let mut list = [
            pointer(arguments),
            pointer(&mut segments),
            pointer(&mut stride),
            pointer(&mut causal),
            pointer(&mut window),
        ];
        // SAFETY: the kernel's parameters in their order; the tensors live as long as the run.
        unsafe {
            self.module
                .launch(self.queue, "attention_bounds", launch, &mut list)
        }
    }

    fn deltas(&self, arguments: &mut Arguments) -> Result<(), crate::cuda::Refused> {
        let rows = 8;
        let launch = Launch {
            blocks: [self.seq.div_ceil(rows), self.heads, self.batch],
            threads: rows * WARP,
            shared_bytes: 0,
        };
        // SAFETY: as above.
        unsafe {
            self.module.launch(
                self.queue,
                "attention_deltas",
                launch,
                &mut [pointer(arguments)],
            )
        }
    }

    /// A kernel whose blocks have `warps` of 16 rows each and hold `shared_rows` rows of a head.
    fn launch(
        &self,
        name: &str,
        warps: u32,
        heads: u32,
        shared_rows: u32,
        arguments: &mut Arguments,
    ) -> Result<(), crate::cuda::Refused> {
        let launch = Launch {
            blocks: [self.seq.div_ceil(warps * 16), heads, self.batch],
            threads: warps * WARP,
            shared_bytes: shared_rows * (padded(self.head_dim) + 8) * 2,
        };
        // SAFETY: as above.
        unsafe {
            self.module
                .launch(self.queue, name, launch, &mut [pointer(arguments)])
        }
    }
}

fn pointer<T>(value: &mut T) -> *mut c_void {
    (&raw mut *value).cast()
}
