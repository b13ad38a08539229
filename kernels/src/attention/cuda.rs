//! Attention in tiles on NVIDIA's tensor cores, in bf16 and f16; see `flash.cu`.

use std::ffi::c_void;
use std::sync::{Arc, OnceLock};

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
const MOST_HEAD_DIM: usize = 256;
const WARP: u32 = 32;
/// What a kernel shares beside its tiles is less than this.
const OTHER_SHARED_BYTES: u32 = 1024;
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
    let Some(tiles) = Tiles::new(head_dim, options, session.shared_bytes) else {
        return false;
    };
    module(&session, query.dtype(), head_dim, tiles, options).is_ok()
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
        let (name, tall) = match run.tall() {
            true => ("attention_forward_tall", 2),
            false => ("attention_forward", 1),
        };
        let rows = run.tiles.forward_rows(tall);
        run.launch(name, run.heads, tall, rows, &mut arguments)
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
        let (name, tall) = match run.tall() {
            true => ("attention_query_gradient_tall", 2),
            false => ("attention_query_gradient", 1),
        };
        let rows = run.tiles.backward_rows(tall);
        run.launch(name, run.heads, tall, rows, &mut arguments)?;
        let (name, rows) = ("attention_key_value_gradient", run.tiles.backward_rows(1));
        run.launch(name, run.kv_heads, 1, rows, &mut arguments)
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
    let tiles = Tiles::new(shape[3], options, session.shared_bytes)
        .expect("asked only where `serves` found room for the tiles");
    let module = module(&session, query.dtype, shape[3], tiles, options)
        .expect("asked only where `serves` compiled it");
    let submitted = session.run(&query.client, tensors, |queue, at| {
        let run = Run {
            module: &module,
            queue,
            tiles,
            multiprocessors: session.multiprocessors,
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
    tiles: Tiles,
    options: &AttentionOptions,
) -> Result<Arc<Module>, String> {
    let macros = [
        ("HEAD_DIM", padded(head_dim as u32)),
        ("HALF", u32::from(dtype == DType::F16)),
        ("CAPPED", u32::from(options.soft_cap.is_some())),
        ("WARPS", tiles.warps),
        ("COLUMNS", tiles.columns),
    ];
    session.module(
        SOURCE,
        &macros.map(|(name, value)| format!("{name}={value}")),
    )
}

fn padded(head_dim: u32) -> u32 {
    head_dim.next_multiple_of(16)
}

/// What a block works on at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tiles {
    /// Of a block, 16 rows each.
    warps: u32,
    /// Rows of the other side that a block holds at a time.
    columns: u32,
    /// Whether a warp can have 32 rows of queries.
    can_be_tall: bool,
}

impl Tiles {
    /// The largest that fit into what a block may share; none if even the smallest do not. A warp holds
    /// the sums of its rows in registers, which wide heads leave fewer of for the scores.
    fn new(head_dim: usize, options: &AttentionOptions, shared_bytes: u32) -> Option<Tiles> {
        let columns = if head_dim <= 128 { 64 } else { 32 };
        let room = shared_bytes.checked_sub(OTHER_SHARED_BYTES)?;
        let fits = |rows: u32| rows * row_bytes(head_dim as u32) <= room;
        let of = |warps| Tiles {
            warps,
            columns,
            can_be_tall: false,
        };
        let tiles = [4, 2]
            .map(of)
            .into_iter()
            .find(|tiles| fits(tiles.forward_rows(1).max(tiles.backward_rows(1))))?;
        let registers = head_dim <= 128 && options.soft_cap.is_none();
        Some(Tiles {
            can_be_tall: registers && fits(tiles.forward_rows(2).max(tiles.backward_rows(2))),
            ..tiles
        })
    }

    /// Whether a warp has 32 rows of queries: where that leaves enough blocks for every multiprocessor to
    /// hold two. `CALOR_CUDA_ATTENTION_ROWS` is 16 or 32, for measuring.
    fn tall(self, heads_of_all: u32, seq: u32, multiprocessors: u32) -> bool {
        static ASKED: OnceLock<String> = OnceLock::new();
        let asked =
            ASKED.get_or_init(|| std::env::var("CALOR_CUDA_ATTENTION_ROWS").unwrap_or_default());
        let blocks = heads_of_all * seq.div_ceil(2 * self.warps * 16);
        self.can_be_tall
            && match asked.as_str() {
                "16" => false,
                "32" => true,
                _ => blocks >= 2 * multiprocessors,
            }
    }

    /// Queries, and two stages of keys and values.
    fn forward_rows(self, tall: u32) -> u32 {
        self.warps * 16 * tall + 4 * self.columns
    }

    /// Rows of two tensors on one side and of two on the other, of which tall tiles hold half as many.
    fn backward_rows(self, tall: u32) -> u32 {
        2 * (self.warps * 16) * tall + 2 * self.columns / tall
    }
}

/// A row of a head in shared memory; `ROW_LENGTH` of the source.
fn row_bytes(head_dim: u32) -> u32 {
    (padded(head_dim) + 8) * 2
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
    tiles: Tiles,
    multiprocessors: u32,
    options: AttentionOptions,
    batch: u32,
    seq: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    scratch: Scratch,
}

impl Run<'_> {
    fn tall(&self) -> bool {
        let heads = self.batch * self.heads;
        self.tiles.tall(heads, self.seq, self.multiprocessors)
    }

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

    /// A kernel whose warps have `tall` times 16 rows and whose blocks hold `shared_rows` rows of a head.
    fn launch(
        &self,
        name: &str,
        heads: u32,
        tall: u32,
        shared_rows: u32,
        arguments: &mut Arguments,
    ) -> Result<(), crate::cuda::Refused> {
        let launch = Launch {
            blocks: [
                self.seq.div_ceil(self.tiles.warps * 16 * tall),
                heads,
                self.batch,
            ],
            threads: self.tiles.warps * WARP,
            shared_bytes: shared_rows * row_bytes(self.head_dim),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_fit_into_what_a_block_may_share() {
        let plain = AttentionOptions {
            scale: 1.0,
            causal: true,
            window: None,
            soft_cap: None,
        };
        let bounded = AttentionOptions {
            soft_cap: Some(50.0),
            ..plain
        };
        let found = |head_dim, options, kib: u32| {
            let tiles = Tiles::new(head_dim, options, kib << 10)?;
            Some((tiles.warps, tiles.columns, tiles.can_be_tall))
        };
        // Hopper, Ampere's largest, a workstation's card, and what any card has.
        assert_eq!(found(128, &plain, 227), Some((4, 64, true)));
        assert_eq!(found(128, &bounded, 227), Some((4, 64, false)));
        assert_eq!(found(256, &bounded, 227), Some((4, 32, false)));
        assert_eq!(found(256, &plain, 163), Some((4, 32, false)));
        assert_eq!(found(128, &plain, 99), Some((4, 64, false)));
        assert_eq!(found(64, &plain, 99), Some((4, 64, true)));
        assert_eq!(found(256, &plain, 99), Some((2, 32, false)));
        assert_eq!(found(256, &plain, 48), None);
    }

    #[test]
    fn warps_have_more_rows_where_blocks_are_enough() {
        let tiles = Tiles {
            warps: 4,
            columns: 64,
            can_be_tall: true,
        };
        assert!(tiles.tall(64, 4096, 132));
        assert!(!tiles.tall(64, 512, 132));
        let never = Tiles {
            can_be_tall: false,
            ..tiles
        };
        assert!(!never.tall(64, 4096, 132));
    }
}
