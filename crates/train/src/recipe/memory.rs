//! What a recipe says about memory.

use calor_model::{Recompute, RecomputedBlocks};
use serde::{Deserialize, Serialize};

use super::TrainSection;

/// Which blocks keep nothing but their input for the backward pass, which runs them again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "expected `none`, `all`, `auto` or a whole number"
)]
pub enum RecomputeChoice {
    /// By name.
    Named(RecomputeName),
    /// The first block and every n-th after it.
    Every(usize),
}

/// Blocks by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RecomputeName {
    /// None.
    None,
    /// All of them.
    All,
    /// As many as the memory there is asks for.
    Auto,
}

impl TrainSection {
    /// What the model is told; none where it depends on the memory there is.
    pub fn recompute(&self) -> Option<Recompute> {
        let blocks = match self.recompute {
            RecomputeChoice::Named(RecomputeName::None) => RecomputedBlocks::None,
            RecomputeChoice::Named(RecomputeName::All) => RecomputedBlocks::All,
            RecomputeChoice::Named(RecomputeName::Auto) => return None,
            RecomputeChoice::Every(step) => RecomputedBlocks::Every(step),
        };
        Some(Recompute {
            blocks,
            offload: self.offload,
        })
    }
}
