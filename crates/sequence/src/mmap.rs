//! The one place of this crate that maps memory.
#![allow(unsafe_code)]

use std::fs::File;

/// Maps a file for reading.
pub(crate) fn map(file: &File) -> std::io::Result<memmap2::Mmap> {
    // SAFETY: the mapping is undefined if the file shrinks or changes under it. Cache files are
    // written under a temporary name and renamed when complete, and nothing in this crate writes
    // to one afterwards: a rebuild renames a new file over it, which leaves this one intact.
    unsafe { memmap2::Mmap::map(file) }
}
