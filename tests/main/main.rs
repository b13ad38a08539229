//! The binary as a user meets it: what it says, what it writes, how it ends.

#![forbid(unsafe_code)]

/// Compares with the stored text; `cargo insta review` shows what changed.
macro_rules! assert_snapshot {
    ($text:expr) => {
        insta::with_settings!({omit_expression => true}, {
            insta::assert_snapshot!($text)
        })
    };
}

mod cohort;
mod errors;
mod fetch;
mod generate;
mod help;
mod init;
mod merge;
mod modalities;
mod recipes;
mod rouge;
mod support;
mod sweep;
mod training;
