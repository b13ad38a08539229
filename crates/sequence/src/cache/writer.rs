//! The cache while it is being written.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::{
    BLOCK_BYTES, BYTE_ORDER, HEADER_BYTES, Header, ItemRecord, MAGIC, SampleRecord, VERSION,
};

/// A temporary file that nobody has written to for so long belongs to nobody.
pub(super) const ABANDONED_AFTER: Duration = Duration::from_secs(3600);

/// Writes a cache under a temporary name; [`CacheWriter::finish`] gives it its own. Dropped before
/// that, it leaves nothing.
pub(crate) struct CacheWriter {
    file: std::io::BufWriter<File>,
    path: PathBuf,
    temporary: PathBuf,
    finished: bool,
    written: u64,
    block: Sha256,
    block_bytes: u64,
    blocks: Vec<u8>,
    tokens: u64,
    items: Vec<ItemRecord>,
    /// Contents of items wait here, since their section follows later in the file.
    contents: Option<(PathBuf, std::io::BufWriter<File>)>,
    content_bytes: u64,
}

impl CacheWriter {
    pub(crate) fn create(path: &Path) -> std::io::Result<CacheWriter> {
        // Distinct for every writer, so that two preparations of one cache do not meet.
        static WRITERS: AtomicU64 = AtomicU64::new(0);
        let number = WRITERS.fetch_add(1, Ordering::Relaxed);
        remove_abandoned(path)?;
        let temporary = path.with_extension(format!("{}-{number}.tmp", std::process::id()));
        let mut file = File::create(&temporary)?;
        file.write_all(&[0; HEADER_BYTES as usize])?;
        Ok(CacheWriter {
            file: std::io::BufWriter::with_capacity(1 << 20, file),
            path: path.to_path_buf(),
            temporary,
            finished: false,
            written: 0,
            block: Sha256::new(),
            block_bytes: 0,
            blocks: Vec::new(),
            tokens: 0,
            items: Vec::new(),
            contents: None,
            content_bytes: 0,
        })
    }

    /// Appends an item with its content, which may be empty; its place and length are filled in.
    pub(crate) fn push_item(&mut self, item: ItemRecord, content: &[u8]) -> std::io::Result<()> {
        let start = self.content_bytes;
        if !content.is_empty() {
            let (_, file) = match &mut self.contents {
                Some(contents) => contents,
                none => {
                    let path = self.temporary.with_extension("contents.tmp");
                    let file = File::options()
                        .read(true)
                        .write(true)
                        .create(true)
                        .truncate(true)
                        .open(&path)?;
                    none.insert((path, std::io::BufWriter::with_capacity(1 << 18, file)))
                }
            };
            file.write_all(content)?;
            // Values are read as 32-bit numbers where they lie.
            let padding = content.len().next_multiple_of(4) - content.len();
            file.write_all(&[0; 4][..padding])?;
            self.content_bytes += (content.len() + padding) as u64;
        }
        self.items.push(ItemRecord {
            start,
            bytes: content.len() as u32,
            ..item
        });
        Ok(())
    }

    /// Items so far.
    pub(crate) fn item_count(&self) -> u64 {
        self.items.len() as u64
    }

    /// Appends tokens and returns the position of the first.
    pub(crate) fn push_tokens(&mut self, tokens: &[u32]) -> std::io::Result<u64> {
        let start = self.tokens;
        self.write(bytemuck::cast_slice(tokens))?;
        self.tokens += tokens.len() as u64;
        Ok(start)
    }

    /// Writes the other sections and the header, brings everything to the disk, and renames the
    /// file. `targets` is `[samples, target_width]`.
    pub(crate) fn finish(
        mut self,
        key: &[u8; 32],
        records: &[SampleRecord],
        target_kind: u32,
        target_width: usize,
        targets: &[u32],
        report: &[u8],
    ) -> std::io::Result<()> {
        debug_assert_eq!(targets.len(), records.len() * target_width);
        self.align()?;
        let records_at = HEADER_BYTES + self.written;
        self.write(bytemuck::cast_slice(records))?;
        let targets_at = HEADER_BYTES + self.written;
        self.write(bytemuck::cast_slice(targets))?;
        self.align()?;
        let items_at = HEADER_BYTES + self.written;
        let items = std::mem::take(&mut self.items);
        self.write(bytemuck::cast_slice(&items))?;
        let contents_at = HEADER_BYTES + self.written;
        self.append_contents()?;
        self.align()?;
        let report_at = HEADER_BYTES + self.written;
        self.write(report)?;
        let last = std::mem::take(&mut self.block).finalize();
        if self.block_bytes > 0 {
            self.blocks.extend_from_slice(&last);
        }
        let mut header = Header {
            magic: MAGIC,
            version: VERSION,
            byte_order: BYTE_ORDER,
            key: *key,
            samples: records.len() as u64,
            tokens: self.tokens,
            target_width: target_width as u64,
            target_kind: u64::from(target_kind),
            records_at,
            targets_at,
            items_at,
            contents_at,
            report_at,
            file_bytes: HEADER_BYTES + self.written,
            contents: Sha256::digest(&self.blocks).into(),
            checksum: [0; 32],
        };
        header.checksum = header.own_checksum();
        self.file.seek(SeekFrom::Start(0))?;
        self.file.write_all(bytemuck::bytes_of(&header))?;
        self.file.flush()?;
        self.file.get_ref().sync_all()?;
        std::fs::rename(&self.temporary, &self.path)?;
        self.finished = true;
        // The rename itself lasts once the folder is on the disk; where folders cannot be opened
        // (Windows) the file system sees to that.
        if let Some(folder) = self.path.parent()
            && let Ok(folder) = File::open(folder)
        {
            folder.sync_all()?;
        }
        Ok(())
    }

    fn append_contents(&mut self) -> std::io::Result<()> {
        let Some((path, file)) = self.contents.take() else {
            return Ok(());
        };
        let mut file = file.into_inner().map_err(|error| error.into_error())?;
        file.seek(SeekFrom::Start(0))?;
        let mut piece = vec![0; 1 << 18];
        loop {
            let length = file.read(&mut piece)?;
            if length == 0 {
                break;
            }
            self.write(&piece[..length])?;
        }
        std::fs::remove_file(path)
    }

    fn align(&mut self) -> std::io::Result<()> {
        let padding = self.written.next_multiple_of(8) - self.written;
        self.write(&[0; 8][..padding as usize])
    }

    fn write(&mut self, mut bytes: &[u8]) -> std::io::Result<()> {
        self.file.write_all(bytes)?;
        self.written += bytes.len() as u64;
        while !bytes.is_empty() {
            let room = (BLOCK_BYTES - self.block_bytes) as usize;
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.block.update(now);
            self.block_bytes += now.len() as u64;
            if self.block_bytes == BLOCK_BYTES {
                let full = std::mem::take(&mut self.block).finalize();
                self.blocks.extend_from_slice(&full);
                self.block_bytes = 0;
            }
            bytes = later;
        }
        Ok(())
    }
}

/// Removes what writers of this cache left behind when they were killed. One that is at work
/// touches its file all the time.
fn remove_abandoned(path: &Path) -> std::io::Result<()> {
    let (Some(folder), Some(stem)) = (path.parent(), path.file_stem()) else {
        return Ok(());
    };
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?.path();
        let name = entry.file_name().unwrap_or_default().as_encoded_bytes();
        if !name.starts_with(stem.as_encoded_bytes()) || !name.ends_with(b".tmp") {
            continue;
        }
        // It may be gone by now, or not be ours to remove: then it stays.
        let idle = std::fs::metadata(&entry)
            .and_then(|metadata| metadata.modified())
            .map(|modified| modified.elapsed().unwrap_or_default());
        if idle.is_ok_and(|idle| idle > ABANDONED_AFTER) {
            let _ = std::fs::remove_file(&entry);
        }
    }
    Ok(())
}

impl Drop for CacheWriter {
    fn drop(&mut self) {
        if !self.finished {
            // Nothing more can be done about a temporary file that cannot be removed.
            let _ = std::fs::remove_file(&self.temporary);
            if let Some((path, _)) = &self.contents {
                let _ = std::fs::remove_file(path);
            }
        }
    }
}
