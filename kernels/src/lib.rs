//! Fused operations for training with frozen weights, one folder an operation.
//!
//! Every folder holds the public function (what is computed, its shapes), a `reference` in plain
//! tensor operations, and kernels where a backend has them: `cpu`, hand-written for the Flex backend,
//! and `cube`, for CUDA and wgpu through CubeCL, with a backward pass that keeps only what it needs. On
//! CUDA products go through cuBLASLt and attention in bf16 and f16 through kernels in CUDA C++ (`cuda`).
//! The public function picks the kernel when the tensors live on a device that has one and falls back to
//! the reference otherwise; all are differentiable in every tracked input, and each kernel is tested
//! against its reference or against the CPU, forward and gradient. What has several results (linears that
//! read the same input, a sum and its norm) is one operation through `joint`.
//!
//! Shapes use one vocabulary: `batch, seq, hidden, heads, head_dim, rank, vocab`.

#![deny(unsafe_op_in_unsafe_fn)]

mod activation;
mod adamw;
mod attention;
#[cfg(feature = "cpu")]
mod cpu;
mod cross_entropy;
#[cfg(feature = "cuda")]
mod cuda;
mod global_norm;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod gpu;
mod joint;
mod lora_linear;
mod masked_softmax;
mod matmul;
mod normalization;
pub mod profile;
mod quantized;
mod recompute;
mod rotary;

pub use activation::{geglu, geglu_tanh, gelu, gelu_tanh, swiglu};
pub use adamw::{AdamWTensor, AdamWUpdate, adamw};
pub use attention::{AttentionOptions, attention};
#[cfg(feature = "cpu")]
pub use cpu::allocator::keep_freed_memory;
pub use cross_entropy::{IGNORED_TARGET, fuses_cross_entropy, linear_cross_entropy};
#[cfg(feature = "cuda")]
pub use cuda::product_library;
pub use global_norm::global_norm;
pub use lora_linear::{
    FrozenWeight, LinearPart, Lora, dropout, dropout_keeps, lora_linear, lora_linears,
};
pub use masked_softmax::{ScoreOptions, masked_softmax};
pub use matmul::matmul;
pub use normalization::{Norm, layer_norm, residual_norm, rms_norm};
pub use quantized::{
    BlockScales, HostWeight, NF4, Quantization, QuantizedWeight, quantized_linear,
};
pub use recompute::{AnyTensor, KeptOn, Segment, SegmentGradients, Wanted, recompute};
pub use rotary::rotary;

/// The plain versions, for tests and for measuring what a kernel gains.
pub mod reference {
    pub use crate::activation::reference::{geglu, geglu_tanh, gelu, gelu_tanh, swiglu};
    pub use crate::adamw::reference::{adamw, moments, moved};
    pub use crate::attention::reference::{attention, soft_cap, spread_heads};
    pub use crate::cross_entropy::reference::linear_cross_entropy;
    pub use crate::global_norm::reference::global_norm;
    pub use crate::lora_linear::reference::{lora_linear, lora_linears};
    pub use crate::masked_softmax::reference::masked_softmax;
    pub use crate::normalization::reference::{layer_norm, residual_norm, rms_norm};
    pub use crate::quantized::reference::{dequantize, quantized_linear};
    pub use crate::rotary::reference::rotary;
}

use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::{DType, Tensor};

static REFERENCES: AtomicBool = AtomicBool::new(false);

/// Whether every operation of this process takes its plain reference from here on, for measuring what
/// the kernels gain. It takes far more memory, and on a GPU far longer. Products of two matrices stay
/// as they are, since burn's own round f32 on a GPU, and so does [`recompute`], which has no other way.
pub fn use_references(on: bool) {
    REFERENCES.store(on, Ordering::Relaxed);
}

/// See [`use_references`].
pub(crate) fn references() -> bool {
    REFERENCES.load(Ordering::Relaxed)
}

/// Names the folder where kernels that were compiled for a GPU are kept from one run to the next;
/// before a GPU is opened.
#[cfg(any(feature = "cuda", feature = "wgpu"))]
pub fn keep_compiled_in(folder: std::path::PathBuf) {
    use cubecl::config::cache::CacheConfig;
    use cubecl::config::{CubeClRuntimeConfig, RuntimeConfig};

    let mut config = CubeClRuntimeConfig::from_current_dir().override_from_env();
    config.compilation.cache = true;
    config.environment.path = CacheConfig::Directory(folder);
    // Someone else may have opened a device already; then nothing is kept.
    let _ = CubeClRuntimeConfig::try_set(config);
}

/// How this machine's processor multiplies matrices of bf16, and why, in words for people: "AMX", or
/// "widened to f32 (…)".
#[cfg(feature = "cpu")]
pub fn half_products() -> &'static str {
    &cpu::halves::choice().reason
}

/// Whether this machine's processor multiplies matrices of bf16 as they are stored; else they are widened
/// to f32.
pub fn multiplies_halves() -> bool {
    #[cfg(feature = "cpu")]
    {
        cpu::halves::engine().is_some()
    }
    #[cfg(not(feature = "cpu"))]
    {
        false
    }
}

/// Whether the hand-written CPU kernels serve this tensor: Flex device; f32, or bf16 and f16, which
/// they store and compute in f32; and no references are asked for.
fn on_cpu<const D: usize>(tensor: &Tensor<D>) -> bool {
    #[cfg(feature = "cpu")]
    {
        !references()
            && matches!(tensor.dtype(), DType::F32 | DType::BF16 | DType::F16)
            && cpu::is_flex(&tensor.device())
    }
    #[cfg(not(feature = "cpu"))]
    {
        let _ = (tensor, DType::F32);
        false
    }
}
