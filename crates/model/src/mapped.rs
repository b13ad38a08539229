//! The one place of this crate with unsafe code: mapping a file of weights into memory.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;

/// Maps `file` read-only. The bytes are shared with the page cache and with other processes that
/// map the same checkpoint.
pub(crate) fn map(file: &File) -> io::Result<bytes::Bytes> {
    // SAFETY: the mapping is read-only and private to this process. It stays valid while the file
    // keeps its length and content; a checkpoint is written once and then only read, and the tools
    // that replace one (the hub's cache, our own writer) write a new file and rename it, which
    // leaves this mapping on the old one.
    let mapping = unsafe { memmap2::Mmap::map(file)? };
    Ok(bytes::Bytes::from_owner(mapping))
}
