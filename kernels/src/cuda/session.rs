//! The stream of native operations on one device, and how it takes turns with CubeCL's.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};

use burn_cubecl::CubeDevice;
use burn_cubecl::tensor::CubeTensor;
use cubecl::client::Client;
use cubecl_cuda::CudaRuntime;
use cubecl_runtime::runtime::Runtime;
use cudarc::cublaslt::sys as cublas;
use cudarc::driver::{DriverError, result, sys};

use super::module::Modules;
use super::product::Products;

/// What a product may use beside its operands; what NVIDIA recommends for Hopper.
pub(crate) const WORKSPACE_BYTES: usize = 32 << 20;

type OnContext = unsafe extern "C" fn(sys::CUcontext, sys::CUevent) -> sys::CUresult;
type Server = <CudaRuntime as Runtime>::Server;

/// One device's native side.
pub(crate) struct Session {
    pub(super) context: sys::CUcontext,
    /// Major and minor.
    pub(super) capability: [i32; 2],
    /// The most that a block may share.
    pub(crate) shared_bytes: u32,
    pub(crate) multiprocessors: u32,
    stream: sys::CUstream,
    /// Everything that CubeCL submitted before the operation.
    before: sys::CUevent,
    /// The operation itself.
    after: sys::CUevent,
    record_context: OnContext,
    wait_context: OnContext,
    workspace: sys::CUdeviceptr,
    products: Mutex<Products>,
    pub(super) modules: Modules,
}

// SAFETY: the handles are the driver's and may be used from any thread; `run` is the only one that
// submits with them, on CubeCL's thread of the device, so one operation at a time.
unsafe impl Send for Session {}
// SAFETY: as above; `products` has a lock.
unsafe impl Sync for Session {}

/// Why a native operation was not submitted.
#[derive(Debug, Clone)]
pub(crate) struct Refused(pub(super) String);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<DriverError> for Refused {
    fn from(error: DriverError) -> Refused {
        Refused(error.to_string())
    }
}

/// Where a native operation puts its work.
pub(crate) struct Queue<'a> {
    pub(super) stream: sys::CUstream,
    /// Memory that the operation may use until it ends; the next one uses it too.
    pub(crate) workspace: sys::CUdeviceptr,
    pub(crate) workspace_bytes: usize,
    pub(super) products: &'a Mutex<Products>,
}

impl Session {
    /// The session of a device, made when it is first asked for; none of a device that is not
    /// CUDA's. The error says what is missing.
    pub(crate) fn of(device: &CubeDevice) -> Option<Result<Arc<Session>, String>> {
        let CubeDevice::Cuda(device) = device else {
            return None;
        };
        type Sessions = Mutex<HashMap<usize, Result<Arc<Session>, String>>>;
        static SESSIONS: OnceLock<Sessions> = OnceLock::new();
        let mut sessions = SESSIONS
            .get_or_init(Mutex::default)
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let found = sessions
            .entry(device.index)
            .or_insert_with(|| Session::new(device.index).map(Arc::new));
        Some(found.clone())
    }

    fn new(index: usize) -> Result<Session, String> {
        if std::env::var("CALOR_CUDA_LIBRARIES").is_ok_and(|value| value == "off") {
            return Err("CALOR_CUDA_LIBRARIES=off".to_string());
        }
        let record_context = entry_point(b"cuCtxRecordEvent\0")?;
        let wait_context = entry_point(b"cuCtxWaitEvent\0")?;
        // SAFETY: loads a library and reads nothing of it.
        if !unsafe { cublas::is_culib_present() } {
            return Err(
                "libcublasLt.so was not found: install CUDA's cuBLAS and name its folder in \
                        LD_LIBRARY_PATH"
                    .to_string(),
            );
        }
        let index = i32::try_from(index).expect("the number of a GPU is small");
        let said = |error: DriverError| format!("CUDA refused a stream: {error}");
        result::init().map_err(said)?;
        let device = result::device::get(index).map_err(said)?;
        // SAFETY: the device is one of the driver's; the primary context is CubeCL's as well, and is
        // kept for the life of the process.
        let context = unsafe {
            let context = result::primary_ctx::retain(device).map_err(said)?;
            result::ctx::set_current(context).map_err(said)?;
            context
        };
        let attribute = |name| {
            // SAFETY: the device is one of the driver's.
            unsafe { result::device::get_attribute(device, name) }.map_err(said)
        };
        use sys::CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
            CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN as SHARED_BYTES,
            CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as MULTIPROCESSORS,
        };
        let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
        Ok(Session {
            context,
            capability: [attribute(MAJOR)?, attribute(MINOR)?],
            shared_bytes: attribute(SHARED_BYTES)?.max(0) as u32,
            multiprocessors: attribute(MULTIPROCESSORS)?.max(0) as u32,
            stream: result::stream::create(result::stream::StreamKind::NonBlocking)
                .map_err(said)?,
            before: event().map_err(said)?,
            after: event().map_err(said)?,
            record_context,
            wait_context,
            // SAFETY: the context is current; the allocation is kept for the life of the process.
            workspace: unsafe { result::malloc_sync(WORKSPACE_BYTES) }.map_err(said)?,
            products: Mutex::new(Products::new()?),
            modules: Mutex::default(),
        })
    }

    /// The name and version of the library.
    pub(super) fn name(self: &Arc<Session>) -> String {
        // SAFETY: takes nothing.
        let version = unsafe { cublas::cublasLtGetVersion() };
        format!(
            "cuBLASLt {}.{}.{}",
            version / 10_000,
            version / 100 % 100,
            version % 100
        )
    }

    /// Submits an operation that reads and writes `tensors`, whose addresses `work` gets in their
    /// order. The host waits until it is submitted, not until it has run.
    pub(crate) fn run<Work>(
        &self,
        client: &Client,
        tensors: &[&CubeTensor],
        work: Work,
    ) -> Result<(), Refused>
    where
        Work: FnOnce(&Queue, &[u64]) -> Result<(), Refused> + Send,
    {
        let submitted = client.exclusive(|| {
            let mut held = Vec::with_capacity(tensors.len());
            for tensor in tensors {
                let resource = client
                    .get_resource::<Server>(tensor.handle.clone())
                    .map_err(|error| Refused(error.to_string()))?;
                held.push(resource);
            }
            let addresses: Vec<u64> = held.iter().map(|found| found.resource().ptr).collect();
            let queue = Queue {
                stream: self.stream,
                workspace: self.workspace,
                workspace_bytes: WORKSPACE_BYTES,
                products: &self.products,
            };
            // SAFETY: context, stream and events are this session's and alive; the events order what
            // `work` submits after all that was submitted before and before all that comes later,
            // and the memory is CubeCL's, which hands it out again only to later work.
            unsafe {
                result::ctx::set_current(self.context)?;
                (self.record_context)(self.context, self.before).result()?;
                result::stream::wait_event(
                    self.stream,
                    self.before,
                    sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT,
                )?;
                let done = work(&queue, &addresses);
                result::event::record(self.after, self.stream)?;
                (self.wait_context)(self.context, self.after).result()?;
                done
            }
        });
        submitted.unwrap_or_else(|error| Err(Refused(error.to_string())))
    }
}

/// A function of the driver that older ones lack.
fn entry_point(name: &'static [u8]) -> Result<OnContext, String> {
    // SAFETY: the driver's library stays loaded, and both functions that are asked for have this
    // signature (CUDA driver API, context management).
    let found = unsafe { sys::culib().get::<OnContext>(name) };
    found.map(|symbol| *symbol).map_err(|_| {
        "the driver is older than CUDA 12.5, so native operations cannot take turns with CubeCL's: \
         install a driver of version 555 or newer"
            .to_string()
    })
}
