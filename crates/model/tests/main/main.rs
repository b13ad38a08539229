//! The model against stored references of Transformers and PEFT, as one binary: it is linked once.
//!
//! `CALOR_TEST_DEVICE=cuda` or `wgpu` runs the same tests on a GPU, in a build that has it.

mod adapters;
mod batches;
mod checkpoints;
mod common;
mod matching;
mod merge;
mod parity;
mod quantization;
mod recompute;
mod tokens;
mod towers;
