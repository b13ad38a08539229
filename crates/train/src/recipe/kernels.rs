//! What a recipe says about the operations of a run.

use serde::{Deserialize, Serialize};

/// What operations are computed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KernelChoice {
    /// Kernels, where the device has them.
    Fused,
    /// Plain tensor operations.
    Reference,
}

impl KernelChoice {
    /// Lets this process compute so from here on.
    pub(crate) fn take(self) {
        calor_kernels::use_references(self == KernelChoice::Reference);
    }
}
