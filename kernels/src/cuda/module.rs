//! Kernels in CUDA C++, compiled for the GPU at hand when they are first asked for, and kept on disk
//! beside CubeCL's.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use cudarc::driver::{result, sys};
use cudarc::nvrtc;

use super::session::{Queue, Refused, Session};

/// What every kernel here begins with.
const PRIMITIVES: &str = include_str!("primitives.cu");
/// More shared memory than this has to be asked for.
const USUAL_SHARED_BYTES: u32 = 48 << 10;

/// Compiled modules, or why they could not be.
pub(super) type Modules = Mutex<HashMap<Vec<String>, Result<Arc<Module>, String>>>;

/// A compiled source.
pub(crate) struct Module {
    module: sys::CUmodule,
}

// SAFETY: a module is a handle of the driver's, usable from any thread; it is never unloaded.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

/// How many threads, and what they share.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Launch {
    pub(crate) blocks: [u32; 3],
    pub(crate) threads: u32,
    pub(crate) shared_bytes: u32,
}

impl Session {
    /// `source` compiled with macros defined as `NAME=value`. The error says what the compiler or the
    /// driver refused.
    pub(crate) fn module(&self, source: &str, macros: &[String]) -> Result<Arc<Module>, String> {
        let mut key = vec![source.len().to_string()];
        key.extend_from_slice(macros);
        let mut modules = self
            .modules
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let found = modules
            .entry(key)
            .or_insert_with(|| self.load(source, macros).map(Arc::new));
        found.clone()
    }

    fn load(&self, source: &str, macros: &[String]) -> Result<Module, String> {
        let [major, minor] = self.capability;
        if major < 8 {
            return Err(format!(
                "GPUs of compute capability {major}.{minor} have no bf16 products"
            ));
        }
        let source = format!("{PRIMITIVES}\n{source}");
        let mut options: Vec<String> = macros.iter().map(|name| format!("-D{name}")).collect();
        // `a`: what only this generation has; such code runs on no other.
        let suffix = if major >= 9 { "a" } else { "" };
        options.push(format!("--gpu-architecture=sm_{major}{minor}{suffix}"));
        options.push("--std=c++17".to_string());
        let file = kept(&source, &options);
        let compiled = match fs::read(&file) {
            Ok(found) => found,
            Err(_) => {
                let compiled = compile(&source, &options)?;
                // Without it the next run compiles again, that is all.
                let _ = keep(&file, &compiled);
                compiled
            }
        };
        // SAFETY: the image is whole, made by this compiler or one whose options and source were the
        // same; the driver copies it.
        let module = unsafe {
            result::ctx::set_current(self.context).map_err(|error| error.to_string())?;
            result::module::load_data(compiled.as_ptr().cast())
        };
        match module {
            Ok(module) => Ok(Module { module }),
            Err(error) => {
                let _ = fs::remove_file(&file);
                Err(format!("the driver refused a compiled kernel: {error}"))
            }
        }
    }
}

impl Module {
    /// Submits a kernel.
    ///
    /// # Safety
    /// `arguments` point at values of the types that the kernel declares, in its order, and what they
    /// address is alive on the queue's device.
    pub(crate) unsafe fn launch(
        &self,
        queue: &Queue,
        name: &str,
        launch: Launch,
        arguments: &mut [*mut c_void],
    ) -> Result<(), Refused> {
        let name = CString::new(name).expect("a kernel's name");
        crate::profile::launched();
        // SAFETY: the module is loaded; of the arguments the caller answers.
        unsafe {
            let function = result::module::get_function(self.module, name)?;
            if launch.shared_bytes > USUAL_SHARED_BYTES {
                result::function::set_function_attribute(
                    function,
                    sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    launch.shared_bytes as i32,
                )?;
            }
            let [x, y, z] = launch.blocks;
            result::launch_kernel(
                function,
                (x, y, z),
                (launch.threads, 1, 1),
                launch.shared_bytes,
                queue.stream,
                arguments,
            )?;
        }
        Ok(())
    }
}

/// Where a compiled source is kept: beside CubeCL's kernels.
fn kept(source: &str, options: &[String]) -> PathBuf {
    let mut hasher = DefaultHasher::new();
    (source, options, env!("CARGO_PKG_VERSION")).hash(&mut hasher);
    cubecl::environment::root().join(format!("calor-{:016x}.cubin", hasher.finish()))
}

fn keep(file: &PathBuf, compiled: &[u8]) -> std::io::Result<()> {
    fs::create_dir_all(file.parent().expect("a file in a folder"))?;
    // Another process may be writing the same.
    let temporary = file.with_extension(format!("{}.tmp", std::process::id()));
    let mut written = fs::File::create(&temporary)?;
    written.write_all(compiled)?;
    written.sync_all()?;
    fs::rename(temporary, file)
}

fn compile(source: &str, options: &[String]) -> Result<Vec<u8>, String> {
    // SAFETY: loads a library and reads nothing of it.
    if !unsafe { nvrtc::sys::is_culib_present() } {
        return Err("libnvrtc.so was not found".to_string());
    }
    let refused = |error: nvrtc::result::NvrtcError| format!("NVRTC: {error}");
    let source = CString::new(source).expect("a source without zeros");
    let program = nvrtc::result::create_program(&source, None).map_err(refused)?;
    // SAFETY: the program was made above and is destroyed below, after its last use.
    unsafe {
        let compiled = match nvrtc::result::compile_program(program, options) {
            Ok(()) => binary(program).map_err(refused),
            Err(error) => {
                let log = nvrtc::result::get_program_log(program).unwrap_or_default();
                let log: Vec<u8> = log
                    .iter()
                    .map(|&c| c as u8)
                    .take_while(|&c| c != 0)
                    .collect();
                Err(format!("NVRTC: {error}: {}", String::from_utf8_lossy(&log)))
            }
        };
        let _ = nvrtc::result::destroy_program(program);
        compiled
    }
}

/// # Safety
/// The program is compiled, for a real architecture.
unsafe fn binary(program: nvrtc::sys::nvrtcProgram) -> Result<Vec<u8>, nvrtc::result::NvrtcError> {
    let mut size = 0usize;
    // SAFETY: as the caller promises; the buffer has the size that was asked for.
    unsafe {
        nvrtc::sys::nvrtcGetCUBINSize(program, &mut size).result()?;
        let mut binary = vec![0u8; size];
        nvrtc::sys::nvrtcGetCUBIN(program, binary.as_mut_ptr().cast()).result()?;
        Ok(binary)
    }
}
