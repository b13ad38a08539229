//! The files behind modality items: decoded when a batch needs them, in parallel, and kept.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::UNIX_EPOCH;

use calor_records::{Decoded, RecordsError};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::SequenceError;
use crate::batch::{HostBatch, ItemContent};
use crate::prepared::{Prepared, SampleSet};
use crate::scaling::{Scaling, ScalingBuilder};

const MAGIC: [u8; 8] = *b"CALORIT2";
const CHECKSUM_BYTES: usize = 8;
/// Items decoded between two merges when statistics are made.
const ITEMS_AT_ONCE: usize = 256;

/// What becomes of an item that cannot be decoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MissingItem {
    /// The run stops and names it.
    #[default]
    Error,
    /// It counts as missing, and is counted.
    Absent,
}

/// Gives an item its numbers from its file.
pub type Decode = Arc<dyn Fn(&Path) -> Result<Decoded, RecordsError> + Send + Sync>;

/// How the files of one modality are read.
#[derive(Clone)]
pub struct Decoding {
    /// Everything that shapes what is decoded but the file, for the cache's key.
    pub key: String,
    pub decode: Decode,
    pub on_missing: MissingItem,
    /// Whether channels are standardised with the [`Scaling`] of the training items.
    pub standardise: bool,
    /// Whether channels have names, which have to be those of the training items.
    pub named: bool,
    /// The file beside an item's that decides as well what is decoded.
    pub beside: Option<fn(&Path) -> Option<PathBuf>>,
    /// Where values are cut, on both sides of 0, after standardising.
    pub clip: Option<f32>,
}

impl Decoding {
    /// Values as they are decoded, a file that cannot be being an error.
    pub fn new(key: String, decode: Decode) -> Decoding {
        Decoding {
            key,
            decode,
            on_missing: MissingItem::Error,
            standardise: false,
            named: false,
            beside: None,
            clip: None,
        }
    }
}

/// Stream and path of an item.
type Place = (usize, Arc<str>);

/// Gives a batch its decoded items.
///
/// A decoded item is kept on the disk under a hash of the file's name, length, time of change and
/// of [`Decoding::key`]; as many as fit into `memory_bytes` stay in memory as well. What is held
/// beyond that is what the waiting batches hold.
pub struct ItemStore {
    cohort: PathBuf,
    cache: PathBuf,
    decodings: Vec<Option<Decoding>>,
    scalings: Vec<Option<Scaling>>,
    memory_bytes: u64,
    held_bytes: AtomicU64,
    held: Mutex<HashMap<Place, Arc<Decoded>>>,
    absent: Vec<Mutex<HashSet<[u8; 16]>>>,
    cut: Mutex<HashMap<[u8; 16], f64>>,
}

impl ItemStore {
    /// `decodings` are in the order of the streams, `None` for those without files. Decoded items
    /// are kept in `cache_dir/items`.
    pub fn new(
        cohort: &Path,
        cache_dir: &Path,
        decodings: Vec<Option<Decoding>>,
        memory_bytes: u64,
    ) -> ItemStore {
        ItemStore {
            cohort: cohort.to_path_buf(),
            cache: cache_dir.join("items"),
            scalings: vec![None; decodings.len()],
            absent: decodings.iter().map(|_| Mutex::default()).collect(),
            decodings,
            memory_bytes,
            held_bytes: AtomicU64::new(0),
            held: Mutex::default(),
            cut: Mutex::default(),
        }
    }

    /// For sequences without modality items.
    pub fn none() -> ItemStore {
        ItemStore::new(Path::new(""), Path::new(""), Vec::new(), 0)
    }

    /// The scalings in the order of the streams.
    pub fn scalings(&self) -> &[Option<Scaling>] {
        &self.scalings
    }

    /// Takes the scalings of a model's training.
    pub fn set_scalings(&mut self, scalings: Vec<Option<Scaling>>) {
        self.scalings = scalings;
        self.scalings.resize(self.decodings.len(), None);
    }

    /// Computes the scalings from the items of a set of samples (each file once), whichever the
    /// number of threads.
    ///
    /// # Errors
    /// As [`ItemStore::fill`].
    pub fn fit_scalings(
        &mut self,
        prepared: &Prepared,
        training: &SampleSet,
    ) -> Result<(), SequenceError> {
        for stream in 0..self.decodings.len() {
            let Some(decoding) = &self.decodings[stream] else {
                continue;
            };
            let standardise = decoding.standardise;
            if !standardise && !decoding.named {
                continue;
            }
            let mut builder = ScalingBuilder::default();
            let mut seen = HashSet::new();
            let mut paths: Vec<Arc<str>> = Vec::new();
            for &sample in training.samples() {
                let items = prepared.sample(sample as usize).items;
                for path in items
                    .iter()
                    .filter(|item| item.stream == stream)
                    .filter_map(|item| item.path())
                {
                    if seen.insert(short_hash(path.as_bytes())) {
                        paths.push(path.into());
                    }
                }
                if paths.len() >= ITEMS_AT_ONCE {
                    self.add_all(stream, &paths, &mut builder)?;
                    paths.clear();
                }
            }
            self.add_all(stream, &paths, &mut builder)?;
            self.scalings[stream] = builder.finish(standardise);
        }
        Ok(())
    }

    /// Shape and file of the first of the samples' items of a stream that can be decoded; `None`
    /// where there is none.
    ///
    /// # Errors
    /// As [`ItemStore::fill`].
    pub fn shape(
        &self,
        prepared: &Prepared,
        samples: &SampleSet,
        stream: usize,
    ) -> Result<Option<(Vec<usize>, PathBuf)>, SequenceError> {
        for &sample in samples.samples() {
            let items = prepared.sample(sample as usize).items;
            let paths = items
                .iter()
                .filter(|item| item.stream == stream)
                .filter_map(|item| item.path());
            for path in paths {
                if let Some(decoded) = self.decoded(stream, &path.into())? {
                    return Ok(Some((decoded.shape, self.cohort.join(path))));
                }
            }
        }
        Ok(None)
    }

    fn add_all(
        &self,
        stream: usize,
        paths: &[Arc<str>],
        builder: &mut ScalingBuilder,
    ) -> Result<(), SequenceError> {
        let decoded: Vec<_> = paths
            .par_iter()
            .map(|path| self.decoded(stream, path))
            .collect();
        for (path, decoded) in paths.iter().zip(decoded) {
            if let Some(decoded) = decoded? {
                builder
                    .add(&decoded)
                    .map_err(|problem| self.misfit(path, problem))?;
            }
        }
        Ok(())
    }

    /// Reads every file that the batch's items name.
    ///
    /// # Errors
    /// A file that cannot be decoded, or has another shape than the training items, where that is
    /// not to be counted as missing.
    pub fn fill(&self, batch: &mut HostBatch) -> Result<(), SequenceError> {
        batch.items.par_iter_mut().try_for_each(|item| {
            if let ItemContent::File(path) = &item.content {
                item.content = match self.load(item.stream, path)? {
                    Some(decoded) => ItemContent::Decoded(decoded),
                    None => ItemContent::Missing,
                };
            }
            Ok(())
        })
    }

    /// A decoded and standardised item; `None` if it counts as missing.
    ///
    /// # Errors
    /// As [`ItemStore::fill`].
    pub fn load(
        &self,
        stream: usize,
        path: &Arc<str>,
    ) -> Result<Option<Arc<Decoded>>, SequenceError> {
        let place = (stream, path.clone());
        if let Some(held) = lock(&self.held).get(&place) {
            return Ok(Some(held.clone()));
        }
        let Some(mut decoded) = self.decoded(stream, path)? else {
            return Ok(None);
        };
        if let Some(scaling) = self.scalings.get(stream).and_then(Option::as_ref) {
            scaling
                .apply(&mut decoded)
                .map_err(|problem| self.misfit(path, problem))?;
        }
        let decoding = self.decodings.get(stream).and_then(Option::as_ref);
        if let Some(limit) = decoding.and_then(|decoding| decoding.clip) {
            // NaN, a missing value, stays as it is.
            for value in &mut decoded.values {
                *value = value.clamp(-limit, limit);
            }
        }
        let decoded = Arc::new(decoded);
        let bytes = 4 * decoded.values.len() as u64;
        if self.held_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes <= self.memory_bytes {
            lock(&self.held).insert(place, decoded.clone());
        } else {
            self.held_bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
        Ok(Some(decoded))
    }

    /// Files of each stream that counted as missing because they could not be decoded.
    pub fn absent(&self) -> Vec<u64> {
        self.absent
            .iter()
            .map(|absent| lock(absent).len() as u64)
            .collect()
    }

    /// Items that a length limit cut, and the seconds that went.
    pub fn cut(&self) -> (u64, f64) {
        let cut = lock(&self.cut);
        (cut.len() as u64, cut.values().sum())
    }

    /// As the file has it, from the disk's cache or decoded now.
    fn decoded(&self, stream: usize, path: &Arc<str>) -> Result<Option<Decoded>, SequenceError> {
        let decoding = self.decodings.get(stream).and_then(Option::as_ref);
        let decoding = decoding.ok_or_else(|| SequenceError::Item {
            path: PathBuf::from(&**path),
            problem: "its modality has no files".to_string(),
        })?;
        let file = self.cohort.join(&**path);
        let beside = decoding.beside.and_then(|beside| beside(&file));
        let key = cache_key(path, &file, beside.as_deref(), &decoding.key);
        let kept = key.map(|key| {
            let folder = self.cache.join(format!("{:02x}", key[0]));
            (folder.join(hexadecimal(&key)), folder)
        });
        if let Some((kept, _)) = &kept
            && let Some(decoded) = std::fs::read(kept).ok().and_then(|bytes| parse(&bytes))
        {
            self.note_cut(path, &decoded);
            return Ok(Some(decoded));
        }
        let decoded = match (decoding.decode)(&file) {
            Ok(decoded) => decoded,
            Err(_) if decoding.on_missing == MissingItem::Absent => {
                lock(&self.absent[stream]).insert(short_hash(path.as_bytes()));
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        };
        if let Some((kept, folder)) = &kept {
            keep(kept, folder, &decoded).map_err(|error| SequenceError::io(kept, error))?;
        }
        self.note_cut(path, &decoded);
        Ok(Some(decoded))
    }

    fn note_cut(&self, path: &str, decoded: &Decoded) {
        if decoded.cut_s > 0.0 {
            lock(&self.cut).insert(short_hash(path.as_bytes()), decoded.cut_s);
        }
    }

    fn misfit(&self, path: &str, problem: String) -> SequenceError {
        SequenceError::Item {
            path: self.cohort.join(path),
            problem,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // What the lock guards is valid after every single operation on it.
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// `None` where the file's metadata cannot be read; decoding it will say why.
fn cache_key(path: &str, file: &Path, beside: Option<&Path>, key: &str) -> Option<[u8; 32]> {
    let mut hash = Sha256::new();
    for part in [
        env!("CARGO_PKG_VERSION").as_bytes(),
        file.as_os_str().as_encoded_bytes(),
        path.as_bytes(),
        key.as_bytes(),
    ] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    for file in std::iter::once(file).chain(beside) {
        let metadata = std::fs::metadata(file).ok()?;
        let changed = metadata.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
        hash.update(metadata.len().to_le_bytes());
        hash.update(changed.as_nanos().to_le_bytes());
    }
    Some(hash.finalize().into())
}

fn short_hash(bytes: &[u8]) -> [u8; 16] {
    let hash: [u8; 32] = Sha256::digest(bytes).into();
    let mut short = [0; 16];
    short.copy_from_slice(&hash[..16]);
    short
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Magic, dimensions, the seconds that were cut, the layout, the values, a checksum. Not synchronised with the
/// disk: the checksum finds a torn file, and decoding again gives the same.
fn keep(path: &Path, folder: &Path, decoded: &Decoded) -> std::io::Result<()> {
    static WRITERS: AtomicU64 = AtomicU64::new(0);
    let mut bytes = Vec::with_capacity(64 + 4 * decoded.values.len());
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&(decoded.shape.len() as u64).to_le_bytes());
    for length in &decoded.shape {
        bytes.extend_from_slice(&(*length as u64).to_le_bytes());
    }
    bytes.extend_from_slice(&decoded.cut_s.to_le_bytes());
    bytes.extend_from_slice(&decoded.layout.to_le_bytes());
    bytes.extend_from_slice(bytemuck::cast_slice(&decoded.values));
    let checksum = Sha256::digest(&bytes);
    bytes.extend_from_slice(&checksum[..CHECKSUM_BYTES]);
    std::fs::create_dir_all(folder)?;
    let number = WRITERS.fetch_add(1, Ordering::Relaxed);
    let temporary = path.with_extension(format!("{}-{number}.tmp", std::process::id()));
    std::fs::write(&temporary, bytes)?;
    std::fs::rename(temporary, path)
}

fn parse(bytes: &[u8]) -> Option<Decoded> {
    let (bytes, checksum) = bytes.split_at_checked(bytes.len().checked_sub(CHECKSUM_BYTES)?)?;
    if Sha256::digest(bytes)[..CHECKSUM_BYTES] != *checksum {
        return None;
    }
    let mut rest = bytes.strip_prefix(&MAGIC)?;
    let mut number = || {
        let (first, behind) = rest.split_first_chunk::<8>()?;
        rest = behind;
        Some(*first)
    };
    let dimensions = u64::from_le_bytes(number()?);
    let shape: Vec<usize> = (0..dimensions)
        .map(|_| usize::try_from(u64::from_le_bytes(number()?)).ok())
        .collect::<Option<_>>()?;
    let cut_s = f64::from_le_bytes(number()?);
    let layout = u64::from_le_bytes(number()?);
    let values: Vec<f32> = rest
        .chunks_exact(4)
        .map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
        .collect();
    (shape.iter().product::<usize>() == values.len()).then_some(Decoded {
        shape,
        values,
        cut_s,
        layout,
    })
}

#[cfg(test)]
#[path = "items_tests.rs"]
mod tests;
