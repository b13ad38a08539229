//! The cache file: tokens, samples, targets and the report of a preparation, memory-mapped.
//!
//! Layout, little-endian: a header of 4,096 bytes, then the tokens (`u32`; where every token has a
//! target, a sample's targets follow its tokens), the sample records,
//! the targets (`u32` bits), the records of modality items, their contents (paths, and the values
//! of series), and the report as JSON, each section at a multiple of 8 bytes. The
//! header carries the key, the sections' places, a checksum of everything behind it and a checksum
//! of itself.

mod writer;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use bytemuck::{Pod, Zeroable};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::labels::TargetKind;
pub(crate) use writer::CacheWriter;

const MAGIC: [u8; 8] = *b"CALORSEQ";
/// Changes with the layout of the file.
const VERSION: u32 = 2;
const BYTE_ORDER: u32 = 0x0102_0304;
const HEADER_BYTES: u64 = 4096;
/// The checksum is the hash of the hashes of blocks of this size, so that it is computed while
/// writing and checked in parallel.
const BLOCK_BYTES: u64 = 1 << 24;

/// One sample: where its tokens are and how they came about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct SampleRecord {
    /// Position of its first token.
    pub start: u64,
    pub subject_id: i64,
    pub prediction_time_us: i64,
    pub length: u32,
    /// Length without truncation.
    pub full_length: u32,
    pub rows: u32,
    pub dropped_rows: u32,
    pub oversized_rows: u32,
    /// 0 none, 1 train, 2 tuning, 3 held out.
    pub split: u32,
    /// Position of its first item.
    pub items_start: u64,
    pub items: u32,
    /// Items beyond the streams' `max_items`.
    pub dropped_items: u32,
}

/// One modality item of a sample.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct ItemRecord {
    /// Microseconds since 1970-01-01, [`NO_TIME`] for an item without time.
    pub time_us: i64,
    /// Where its content begins: bytes from the start of the section.
    pub start: u64,
    /// Bytes of its content; 0 for an item that is missing.
    pub bytes: u32,
    pub stream: u32,
    /// Number of the site from 1; 0 where it is not known.
    pub site: u32,
    pub padding: u32,
}

/// Stands for no time.
pub(crate) const NO_TIME: i64 = i64::MIN;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: u32,
    byte_order: u32,
    key: [u8; 32],
    samples: u64,
    tokens: u64,
    target_width: u64,
    target_kind: u64,
    records_at: u64,
    targets_at: u64,
    items_at: u64,
    contents_at: u64,
    report_at: u64,
    file_bytes: u64,
    contents: [u8; 32],
    /// Of all fields above.
    checksum: [u8; 32],
}

/// What was found under a cache's name.
pub(crate) enum Found {
    Nothing,
    /// A file that is not a complete cache of this key, and why.
    Unusable(String),
    Cache(Cache),
}

/// An opened cache.
pub(crate) struct Cache {
    map: memmap2::Mmap,
    header: Header,
}

impl Cache {
    /// Opens and verifies a cache file: every byte of it is read once.
    pub(crate) fn open(path: &Path, key: &[u8; 32]) -> std::io::Result<Found> {
        let mut file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Found::Nothing);
            }
            Err(error) => return Err(error),
        };
        let unusable = |reason: &str| Ok(Found::Unusable(reason.to_string()));
        let file_bytes = file.metadata()?.len();
        if file_bytes < HEADER_BYTES {
            return unusable("it breaks off inside its header");
        }
        let mut header = Header::zeroed();
        file.read_exact(bytemuck::bytes_of_mut(&mut header))?;
        if header.magic != MAGIC {
            return unusable("it does not begin like a cache");
        }
        if header.version != VERSION || header.byte_order != BYTE_ORDER {
            return unusable("it is of another version or machine");
        }
        if header.checksum != header.own_checksum() {
            return unusable("its header is damaged");
        }
        if header.key != *key {
            return unusable("it belongs to other data");
        }
        if header.file_bytes != file_bytes {
            return unusable("it is not as long as it says");
        }
        if header.contents != checksum_of(path, file_bytes)? {
            return unusable("its contents are damaged");
        }
        let cache = Cache {
            map: crate::mmap::map(&file)?,
            header,
        };
        let tokens_each = if cache.has_token_targets() { 2 } else { 1 };
        let in_bounds = |record: &SampleRecord| {
            record
                .start
                .checked_add(tokens_each * u64::from(record.length))
                .is_some_and(|end| end <= header.tokens)
        };
        if !cache.records().iter().all(in_bounds) {
            return unusable("a sample points outside its tokens");
        }
        let items = cache.all_items();
        let contents = cache.header.report_at - cache.header.contents_at;
        let items_in_bounds = cache.records().iter().all(|record| {
            let end = record.items_start.checked_add(u64::from(record.items));
            end.is_some_and(|end| end <= items.len() as u64)
        }) && items.iter().all(|item| {
            let end = item.start.checked_add(u64::from(item.bytes));
            end.is_some_and(|end| end <= contents)
        });
        if !items_in_bounds {
            return unusable("an item points outside the file");
        }
        Ok(Found::Cache(cache))
    }

    pub(crate) fn records(&self) -> &[SampleRecord] {
        self.section(self.header.records_at, self.header.targets_at)
    }

    pub(crate) fn tokens(&self, record: &SampleRecord) -> &[u32] {
        let start = HEADER_BYTES + 4 * record.start;
        self.section(start, start + 4 * u64::from(record.length))
    }

    /// The target of each token; they stand behind the tokens.
    pub(crate) fn token_targets(&self, record: &SampleRecord) -> &[u32] {
        self.tokens(&SampleRecord {
            start: record.start + u64::from(record.length),
            ..*record
        })
    }

    fn has_token_targets(&self) -> bool {
        self.header.target_kind == u64::from(TargetKind::Tokens.number())
    }

    pub(crate) fn targets(&self, sample: usize) -> &[u32] {
        let width = self.header.target_width;
        let start = self.header.targets_at + 4 * width * sample as u64;
        self.section(start, start + 4 * width)
    }

    pub(crate) fn items(&self, record: &SampleRecord) -> &[ItemRecord] {
        let start = record.items_start as usize;
        &self.all_items()[start..start + record.items as usize]
    }

    /// Bytes of an item's path, or of its values.
    pub(crate) fn content(&self, item: &ItemRecord) -> &[u8] {
        let start = self.header.contents_at + item.start;
        self.section(start, start + u64::from(item.bytes))
    }

    fn all_items(&self) -> &[ItemRecord] {
        self.section(self.header.items_at, self.header.contents_at)
    }

    pub(crate) fn target_kind(&self) -> u32 {
        self.header.target_kind as u32
    }

    pub(crate) fn report(&self) -> &[u8] {
        self.section(self.header.report_at, self.header.file_bytes)
    }

    fn section<T: Pod>(&self, start: u64, end: u64) -> &[T] {
        let bytes = &self.map[start as usize..end as usize];
        let whole = bytes.len() - bytes.len() % size_of::<T>();
        bytemuck::cast_slice(&bytes[..whole])
    }
}

impl Header {
    fn own_checksum(&self) -> [u8; 32] {
        let bytes = bytemuck::bytes_of(self);
        Sha256::digest(&bytes[..bytes.len() - 32]).into()
    }
}

fn checksum_of(path: &Path, file_bytes: u64) -> std::io::Result<[u8; 32]> {
    let blocks = (file_bytes - HEADER_BYTES).div_ceil(BLOCK_BYTES);
    let hashes: Vec<[u8; 32]> = (0..blocks)
        .into_par_iter()
        .map(|block| {
            let start = HEADER_BYTES + block * BLOCK_BYTES;
            let mut file = File::open(path)?;
            file.seek(SeekFrom::Start(start))?;
            let mut hash = Sha256::new();
            std::io::copy(
                &mut file.take(BLOCK_BYTES.min(file_bytes - start)),
                &mut hash,
            )?;
            Ok(hash.finalize().into())
        })
        .collect::<std::io::Result<_>>()?;
    Ok(Sha256::digest(hashes.concat()).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, tokens: &[u32]) -> Vec<SampleRecord> {
        let mut writer = CacheWriter::create(path).unwrap();
        let mut records = Vec::new();
        for piece in tokens.chunks(7) {
            records.push(SampleRecord {
                start: writer.push_tokens(piece).unwrap(),
                length: piece.len() as u32,
                subject_id: -5,
                ..Default::default()
            });
        }
        let targets: Vec<u32> = (0..2 * records.len() as u32).collect();
        writer
            .finish(&[7; 32], &records, 3, 2, &targets, b"{\"a\": 1}")
            .unwrap();
        records
    }

    fn open(path: &Path, key: u8) -> Result<Cache, String> {
        match Cache::open(path, &[key; 32]).unwrap() {
            Found::Cache(cache) => Ok(cache),
            Found::Nothing => Err("nothing".into()),
            Found::Unusable(reason) => Err(reason),
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cache");
        assert_eq!(open(&path, 7).err().unwrap(), "nothing");
        let tokens: Vec<u32> = (0..61).collect();
        let records = write(&path, &tokens);
        let cache = open(&path, 7).unwrap();
        assert_eq!(cache.records(), records);
        let back: Vec<u32> = records
            .iter()
            .flat_map(|record| cache.tokens(record).to_vec())
            .collect();
        assert_eq!(back, tokens);
        assert_eq!(cache.targets(3), [6, 7]);
        assert_eq!(cache.target_kind(), 3);
        assert_eq!(cache.report(), b"{\"a\": 1}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn an_empty_cache_is_a_cache() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cache");
        write(&path, &[]);
        assert!(open(&path, 7).unwrap().records().is_empty());
    }

    #[test]
    fn tokens_of_several_blocks_are_verified() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cache");
        let tokens: Vec<u32> = (0..(2 * BLOCK_BYTES as u32 / 4 + 77)).collect();
        let records = write(&path, &tokens);
        assert_eq!(open(&path, 7).unwrap().records().len(), records.len());
    }

    #[test]
    fn any_damaged_byte_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cache");
        write(&path, &(0..61).collect::<Vec<u32>>());
        let whole = std::fs::read(&path).unwrap();
        // The unused rest of the header means nothing.
        let meaningful = (0..size_of::<Header>()).chain(HEADER_BYTES as usize..whole.len());
        for position in meaningful {
            let mut damaged = whole.clone();
            damaged[position] ^= 0x10;
            std::fs::write(&path, damaged).unwrap();
            assert!(open(&path, 7).is_err(), "byte {position}");
        }
        for length in [0, 100, HEADER_BYTES as usize, whole.len() - 1] {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert!(open(&path, 7).is_err(), "{length} bytes");
        }
        std::fs::write(&path, [&whole[..], b"x"].concat()).unwrap();
        assert!(open(&path, 7).is_err());
        std::fs::write(&path, &whole).unwrap();
        assert_eq!(open(&path, 8).err().unwrap(), "it belongs to other data");
        assert!(open(&path, 7).is_ok());
    }

    #[test]
    fn a_dropped_writer_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = CacheWriter::create(&folder.path().join("cache")).unwrap();
        writer.push_tokens(&[1, 2, 3]).unwrap();
        drop(writer);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_killed_writers_left_is_removed_and_what_others_write_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cache.sequences");
        let [old, new, other] = ["cache.1-0.tmp", "cache.2-0.tmp", "other.1-0.tmp"]
            .map(|name| folder.path().join(name));
        let long_ago = std::time::SystemTime::now() - 2 * writer::ABANDONED_AFTER;
        for (path, time) in [
            (&old, Some(long_ago)),
            (&new, None),
            (&other, Some(long_ago)),
        ] {
            let file = File::create(path).unwrap();
            if let Some(time) = time {
                file.set_modified(time).unwrap();
            }
        }
        write(&path, &[1, 2, 3]);
        assert!(!old.exists() && new.exists() && other.exists());
        assert!(open(&path, 7).is_ok());
    }
}
