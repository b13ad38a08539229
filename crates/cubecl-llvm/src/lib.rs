//! A stand-in for `cubecl-llvm`, put in its place by `[patch.crates-io]`.
//!
//! `cubecl-cuda` compiles kernels either as CUDA C++ through NVRTC or through LLVM, and always
//! links both. Building the real LLVM path downloads an LLVM bundle, which fails on a closed
//! network, and that path has none of Hopper's features (tensor memory access, clusters,
//! asynchronous copies, bf16 atomics). Calor therefore turns on cubecl's `cuda-cpp`, which makes
//! NVRTC the backend, and this crate carries the few names that `cubecl-cuda` mentions.
//!
//! Nothing here generates code. Should a build leave `cuda-cpp` out, the first kernel fails with
//! [`NOT_BUILT`], which says what is missing.

#![forbid(unsafe_code)]

use core::ffi::c_char;
use core::fmt;

use cubecl_core::ir::nvidia::SmArch;
use cubecl_environment::backtrace::BackTrace;
use cubecl_runtime::compiler::{CompilationError, Compiler};
use cubecl_runtime::kernel::{BufferIOAttr, KernelDefinition};

use crate::nvptx::ptx_version::PtxVersion;

/// What a kernel sent to the LLVM backend answers.
pub const NOT_BUILT: &str = "LLVM code generation is not built into this program: kernels for \
     CUDA are compiled by NVRTC. Build with cubecl's feature `cuda-cpp` (calor's feature `cuda` \
     turns it on)";

/// The backend's target. CUDA is the only one whose runtime Calor builds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LlvmTarget {
    /// PTX for an NVIDIA device.
    Nvptx,
}

/// The compiler that would lower a kernel through LLVM; every kernel given to it is refused.
#[derive(Clone, Debug)]
pub struct PlironCompiler {
    /// What it would compile for.
    pub target: LlvmTarget,
}

/// What `cubecl-cuda` tells the compiler about the device.
#[derive(Clone, Debug, Default)]
pub struct PlironOptions {
    /// Architecture of an AMD device, by name; CUDA leaves it out.
    pub arch: Option<String>,
    /// Architecture of an NVIDIA device.
    pub sm_arch: Option<SmArch>,
    /// The newest PTX version that the driver loads.
    pub ptx_version: Option<PtxVersion>,
    /// Whether launch parameters are passed as grid constants.
    pub grid_constants: bool,
    /// Alignment of a buffer on the CPU, in bytes; CUDA leaves it out.
    pub cpu_buffer_alignment: Option<u32>,
}

/// A compiled PTX module. No value of it is ever made here.
#[derive(Clone, Debug)]
pub struct NvptxModule {
    /// PTX, ended by a NUL.
    pub ptx: Vec<c_char>,
    /// Name of the kernel in the module.
    pub entrypoint: String,
    /// The code it was made from, for logs and cache keys.
    pub ir: String,
    /// Shared memory of a launch, in bytes.
    pub shared_memory_size: usize,
    /// What the kernel does with each buffer, in binding order.
    pub io: Vec<BufferIOAttr>,
}

/// What a compilation would give. No value of it is ever made here.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum PlironArtifact {
    /// PTX for an NVIDIA device.
    NvptxCode(NvptxModule),
}

impl fmt::Display for PlironArtifact {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PlironArtifact::NvptxCode(module) => formatter.write_str(&module.ir),
        }
    }
}

impl Compiler for PlironCompiler {
    type Representation = PlironArtifact;
    type CompilationOptions = PlironOptions;

    fn compile(
        &mut self,
        _kernel: KernelDefinition,
        _options: &PlironOptions,
    ) -> Result<PlironArtifact, CompilationError> {
        Err(CompilationError::Generic {
            reason: NOT_BUILT.to_string(),
            backtrace: BackTrace::capture(),
        })
    }

    fn extension(&self) -> &'static str {
        "ll"
    }

    fn lang_tag(&self) -> &'static str {
        "llvm"
    }
}

/// NVIDIA devices.
pub mod nvptx {
    /// PTX versions.
    pub mod ptx_version {
        use core::fmt;

        /// A PTX version: 8.7 is 87. It only names a cache of the LLVM backend, so none is made.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub struct PtxVersion(u32);

        impl PtxVersion {
            /// The newest version that a driver loads: none, because no PTX is emitted here.
            pub fn for_driver(_driver: i32) -> Option<Self> {
                None
            }
        }

        impl fmt::Display for PtxVersion {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(formatter, "ptx{}", self.0)
            }
        }
    }
}

/// What the backends of all targets share.
pub mod shared {
    /// Narrowing a device's features to those that the LLVM backend lowers.
    pub mod lowered_features {
        use cubecl_core::ir::DeviceProperties;

        /// The target whose features are narrowed.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum GpuTarget {
            /// An NVIDIA device.
            Nvptx,
        }

        /// Leaves the features alone: the compiler refuses every kernel, so none is promised.
        pub fn restrict_features(_properties: &mut DeviceProperties, _target: GpuTarget) {}
    }
}
