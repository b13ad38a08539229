//! Safetensors files: the header checked in full before any tensor is read, then tensor by tensor.
//!
//! A tensor stored in the type it is wanted in is used where it lies, through a memory map. Any
//! other is converted in small pieces, so that the file's pages and the converted copy are never
//! both in memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use burn::backend::AllocationProperty;
use burn::tensor::{Bytes, DType, Device, Int, Tensor, TensorData};
use half::{bf16, f16};
use serde_json::{Map, Value};

use crate::error::ModelError;
use crate::mapped;

/// The longest header the format allows.
const HEADER_MAX: u64 = 100_000_000;
/// Bytes read at once when a tensor is converted.
const PIECE: usize = 1 << 20;

/// An opened safetensors file: its header, checked against the file's length.
#[derive(Debug)]
pub(crate) struct TensorFile {
    path: PathBuf,
    entries: BTreeMap<String, TensorEntry>,
    mapping: bytes::Bytes,
}

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TensorEntry {
    /// As the header spells it: `F32`, `BF16`, …
    pub dtype: String,
    pub shape: Vec<usize>,
    /// First byte in the file, and one past the last.
    range: (u64, u64),
}

impl TensorFile {
    /// Reads and checks the header; maps the file without reading it.
    pub fn open(path: &Path) -> Result<TensorFile, ModelError> {
        let mut file = File::open(path).map_err(ModelError::io(path))?;
        let file_len = file.metadata().map_err(ModelError::io(path))?.len();
        let wrong = |message: String| ModelError::Header {
            path: path.to_owned(),
            message,
        };
        let mut prefix = [0u8; 8];
        if file_len < 8 {
            return Err(wrong(format!(
                "{file_len} bytes are too few for a safetensors file; download it again"
            )));
        }
        file.read_exact(&mut prefix).map_err(ModelError::io(path))?;
        let header_len = u64::from_le_bytes(prefix);
        if header_len > HEADER_MAX || header_len > file_len - 8 {
            return Err(wrong(format!(
                "the header claims {header_len} bytes, the file has {file_len}; it is truncated or \
                 not a safetensors file"
            )));
        }
        let mut header = vec![0u8; header_len as usize];
        file.read_exact(&mut header).map_err(ModelError::io(path))?;
        let header: Map<String, Value> = serde_json::from_slice(&header)
            .map_err(|error| wrong(format!("the header is not a JSON object: {error}")))?;
        let entries = entries(path, &header, 8 + header_len, file_len)?;
        let mapping = mapped::map(&file).map_err(ModelError::io(path))?;
        Ok(TensorFile {
            path: path.to_owned(),
            entries,
            mapping,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn entries(&self) -> impl Iterator<Item = (&str, &TensorEntry)> {
        self.entries
            .iter()
            .map(|(name, entry)| (name.as_str(), entry))
    }

    pub fn entry(&self, name: &str) -> Option<&TensorEntry> {
        self.entries.get(name)
    }

    fn existing(&self, name: &str) -> Result<&TensorEntry, ModelError> {
        self.entries
            .get(name)
            .ok_or_else(|| ModelError::MissingTensor {
                path: self.path.clone(),
                tensor: name.to_owned(),
                expected: Vec::new(),
            })
    }

    /// A floating-point tensor as `dtype` on `device`.
    pub fn tensor<const D: usize>(
        &self,
        name: &str,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor<D>, ModelError> {
        let entry = self.existing(name)?;
        let data = match entry.float() {
            Some(stored) if stored == dtype => self.stored(entry, stored),
            Some(stored) => self.converted(name, entry, stored, dtype)?,
            None => return Err(self.not_float(name, entry)),
        };
        Ok(Tensor::from_data(data, (device, dtype)))
    }

    /// A floating-point tensor's values, in the file's order.
    pub fn floats(&self, name: &str) -> Result<Vec<f32>, ModelError> {
        let entry = self.existing(name)?;
        let stored = entry.float().ok_or_else(|| self.not_float(name, entry))?;
        let mut values = Vec::with_capacity(entry.elements());
        self.pieces(entry, |piece| to_f32(piece, stored, &mut values))?;
        Ok(values)
    }

    /// A tensor's bytes, as they are in the file.
    pub fn raw(&self, name: &str) -> Result<Vec<u8>, ModelError> {
        let entry = self.existing(name)?;
        let mut bytes = Vec::with_capacity((entry.range.1 - entry.range.0) as usize);
        self.pieces(entry, |piece| bytes.extend_from_slice(piece))?;
        Ok(bytes)
    }

    /// An integer tensor's values.
    pub fn integers(&self, name: &str) -> Result<Vec<i64>, ModelError> {
        let entry = self.existing(name)?;
        let mut values = Vec::with_capacity(entry.elements());
        let (width, read): (usize, fn(&[u8]) -> i64) = match entry.dtype.as_str() {
            "I64" => (8, |b| i64::from_le_bytes(b.try_into().expect("8 bytes"))),
            "I32" => (4, |b| {
                i64::from(i32::from_le_bytes(b.try_into().expect("4 bytes")))
            }),
            "BOOL" | "U8" => (1, |b| i64::from(b[0])),
            other => {
                return Err(ModelError::Tensor {
                    path: self.path.clone(),
                    tensor: name.to_owned(),
                    message: format!("is {other}; I64, I32 or BOOL is expected"),
                });
            }
        };
        self.pieces(entry, |piece| {
            values.extend(piece.chunks_exact(width).map(read));
        })?;
        Ok(values)
    }

    /// Whether two tensors are equal, read in pieces.
    pub fn same(
        &self,
        name: &str,
        other: &TensorFile,
        other_name: &str,
    ) -> Result<bool, ModelError> {
        let (a, b) = (self.existing(name)?, other.existing(other_name)?);
        if a.dtype != b.dtype || a.shape != b.shape {
            return Ok(false);
        }
        let mut file = File::open(&other.path).map_err(ModelError::io(&other.path))?;
        file.seek(SeekFrom::Start(b.range.0))
            .map_err(ModelError::io(&other.path))?;
        let mut buffer = vec![0u8; PIECE];
        let mut same = Ok(true);
        self.pieces(a, |piece| {
            let theirs = &mut buffer[..piece.len()];
            match (&same, file.read_exact(theirs)) {
                (Ok(true), Ok(())) => same = Ok(piece == theirs),
                (Ok(_), Err(error)) => same = Err(error),
                _ => {}
            }
        })?;
        same.map_err(ModelError::io(&other.path))
    }

    fn stored(&self, entry: &TensorEntry, dtype: DType) -> TensorData {
        let range = entry.range.0 as usize..entry.range.1 as usize;
        let bytes = if range.start.is_multiple_of(dtype.size()) {
            Bytes::from_shared(self.mapping.slice(range), AllocationProperty::File)
        } else {
            Bytes::from_bytes_vec(self.mapping[range].to_vec())
        };
        TensorData::from_bytes(bytes, entry.shape.clone(), dtype)
    }

    fn converted(
        &self,
        name: &str,
        entry: &TensorEntry,
        stored: DType,
        dtype: DType,
    ) -> Result<TensorData, ModelError> {
        let mut scratch = Vec::with_capacity(PIECE);
        let elements = entry.elements();
        let shape = entry.shape.clone();
        match dtype {
            DType::F32 => {
                let mut values: Vec<f32> = Vec::with_capacity(elements);
                self.pieces(entry, |piece| to_f32(piece, stored, &mut values))?;
                Ok(TensorData::new(values, shape))
            }
            DType::F16 => {
                let mut values: Vec<f16> = Vec::with_capacity(elements);
                self.pieces(entry, |piece| {
                    scratch.clear();
                    to_f32(piece, stored, &mut scratch);
                    values.extend(scratch.iter().map(|&value| f16::from_f32(value)));
                })?;
                Ok(TensorData::new(values, shape))
            }
            DType::BF16 => {
                let mut values: Vec<bf16> = Vec::with_capacity(elements);
                self.pieces(entry, |piece| {
                    scratch.clear();
                    to_f32(piece, stored, &mut scratch);
                    values.extend(scratch.iter().map(|&value| bf16::from_f32(value)));
                })?;
                Ok(TensorData::new(values, shape))
            }
            other => Err(ModelError::Tensor {
                path: self.path.clone(),
                tensor: name.to_owned(),
                message: format!("cannot be loaded as {other:?}; use f32, f16 or bf16"),
            }),
        }
    }

    /// Reads a tensor in pieces of whole elements.
    fn pieces(
        &self,
        entry: &TensorEntry,
        mut use_piece: impl FnMut(&[u8]),
    ) -> Result<(), ModelError> {
        let mut file = File::open(&self.path).map_err(ModelError::io(&self.path))?;
        file.seek(SeekFrom::Start(entry.range.0))
            .map_err(ModelError::io(&self.path))?;
        let mut left = (entry.range.1 - entry.range.0) as usize;
        let mut buffer = vec![0u8; PIECE.min(left)];
        while left > 0 {
            let piece = &mut buffer[..PIECE.min(left)];
            file.read_exact(piece).map_err(ModelError::io(&self.path))?;
            use_piece(piece);
            left -= piece.len();
        }
        Ok(())
    }

    fn not_float(&self, name: &str, entry: &TensorEntry) -> ModelError {
        ModelError::Tensor {
            path: self.path.clone(),
            tensor: name.to_owned(),
            message: format!("is {}; weights have to be F32, F16 or BF16", entry.dtype),
        }
    }
}

impl TensorEntry {
    /// The type as burn names it, where it is one that weights may have.
    pub fn float(&self) -> Option<DType> {
        match self.dtype.as_str() {
            "F32" => Some(DType::F32),
            "F16" => Some(DType::F16),
            "BF16" => Some(DType::BF16),
            _ => None,
        }
    }

    pub fn byte_length(&self) -> usize {
        (self.range.1 - self.range.0) as usize
    }

    fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A type of weights as headers spell it.
pub(crate) fn float_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "F16",
        DType::BF16 => "BF16",
        _ => "F32",
    }
}

/// `[len]` integers on the device.
pub(crate) fn integer_tensor(values: Vec<i32>, device: &Device) -> Tensor<1, Int> {
    let len = values.len();
    Tensor::from_data(TensorData::new(values, [len]), device)
}

fn to_f32(piece: &[u8], stored: DType, values: &mut Vec<f32>) {
    match stored {
        DType::F16 => values.extend(
            piece
                .chunks_exact(2)
                .map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()),
        ),
        DType::BF16 => values.extend(
            piece
                .chunks_exact(2)
                .map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()),
        ),
        _ => values.extend(
            piece
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        ),
    }
}

/// Checks every entry: dtype, shape, length, no overlap, no gap, nothing beyond the file's end.
fn entries(
    path: &Path,
    header: &Map<String, Value>,
    data_start: u64,
    file_len: u64,
) -> Result<BTreeMap<String, TensorEntry>, ModelError> {
    let mut entries = BTreeMap::new();
    for (name, value) in header.iter().filter(|(name, _)| *name != "__metadata__") {
        let wrong = |message: String| ModelError::Tensor {
            path: path.to_owned(),
            tensor: name.clone(),
            message,
        };
        let numbers = |key: &str| -> Option<Vec<u64>> {
            value
                .get(key)?
                .as_array()?
                .iter()
                .map(Value::as_u64)
                .collect()
        };
        let dtype = value
            .get("dtype")
            .and_then(Value::as_str)
            .ok_or_else(|| wrong("has no `dtype`".to_owned()))?;
        let shape = numbers("shape").ok_or_else(|| wrong("has no valid `shape`".to_owned()))?;
        let offsets = numbers("data_offsets")
            .filter(|offsets| offsets.len() == 2 && offsets[0] <= offsets[1])
            .ok_or_else(|| wrong("has no valid `data_offsets`".to_owned()))?;
        let (start, end) = (
            offsets[0].saturating_add(data_start),
            offsets[1].saturating_add(data_start),
        );
        let expected = width(dtype).and_then(|width| {
            shape
                .iter()
                .try_fold(width, |bytes, &length| bytes.checked_mul(length))
        });
        if width(dtype).is_some() && expected != Some(offsets[1] - offsets[0]) {
            return Err(wrong(format!(
                "has {} bytes in the file, {dtype} {shape:?} needs {}",
                offsets[1] - offsets[0],
                expected.map_or_else(|| "more than 2^64".to_owned(), |bytes| bytes.to_string()),
            )));
        }
        if end > file_len {
            return Err(wrong(format!(
                "ends at byte {end}, the file has {file_len}: it is truncated; download it again"
            )));
        }
        entries.insert(
            name.clone(),
            TensorEntry {
                dtype: dtype.to_owned(),
                shape: shape.iter().map(|&length| length as usize).collect(),
                range: (start, end),
            },
        );
    }
    let mut order: Vec<(&String, &TensorEntry)> = entries.iter().collect();
    order.sort_by_key(|(_, entry)| entry.range);
    let mut position = data_start;
    for (name, entry) in order {
        if entry.range.0 != position {
            return Err(ModelError::Tensor {
                path: path.to_owned(),
                tensor: name.clone(),
                message: format!(
                    "starts at byte {}, the tensor before it ends at byte {position}; the header \
                     is wrong",
                    entry.range.0
                ),
            });
        }
        position = entry.range.1;
    }
    if position != file_len {
        return Err(ModelError::Header {
            path: path.to_owned(),
            message: format!(
                "the header describes {position} bytes, the file has {file_len}; the header or the \
                 file is wrong"
            ),
        });
    }
    Ok(entries)
}

/// Bytes an element; `None` for types that are not one of whole bytes or not known.
fn width(dtype: &str) -> Option<u64> {
    match dtype {
        "F64" | "I64" | "U64" => Some(8),
        "F32" | "I32" | "U32" => Some(4),
        "F16" | "BF16" | "I16" | "U16" => Some(2),
        "BOOL" | "I8" | "U8" | "F8_E4M3" | "F8_E5M2" => Some(1),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(data);
        std::fs::write(&path, bytes).unwrap();
        (dir, path)
    }

    fn error(header: &str, data: &[u8]) -> String {
        let (_dir, path) = file(header, data);
        TensorFile::open(&path).unwrap_err().to_string()
    }

    #[test]
    fn every_defect_of_a_header_is_named() {
        let good = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
        let (_dir, path) = file(good, &[0; 8]);
        TensorFile::open(&path).unwrap();

        assert!(error(good, &[0; 7]).contains("tensor `a`: ends at byte"));
        assert!(error(good, &[0; 9]).contains("the header describes"));
        assert!(error("{", &[]).contains("not a JSON object"));
        let shape = r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#;
        assert!(error(shape, &[0; 8]).contains("tensor `a`: has 8 bytes"));
        let huge = r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}"#;
        assert!(error(huge, &[0; 8]).contains("tensor `a`"));
        let gap = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#;
        assert!(error(gap, &[0; 8]).contains("tensor `a`: starts at byte"));
        let overlap = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#;
        assert!(error(overlap, &[0; 8]).contains("tensor `b`: starts at byte"));
        let backwards = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[8,4]}}"#;
        assert!(error(backwards, &[0; 8]).contains("data_offsets"));
    }

    #[test]
    fn a_length_beyond_the_file_costs_no_memory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        for bytes in [&[0xff; 16][..], &[1, 2, 3]] {
            std::fs::write(&path, bytes).unwrap();
            assert!(matches!(
                TensorFile::open(&path),
                Err(ModelError::Header { .. })
            ));
        }
    }

    #[test]
    fn half_precision_is_converted_exactly() {
        let values = [1.5f32, -0.25, 65504.0, 0.0];
        let f16s: Vec<u8> = values
            .iter()
            .flat_map(|&value| f16::from_f32(value).to_le_bytes())
            .collect();
        let header = r#"{"a":{"dtype":"F16","shape":[4],"data_offsets":[0,8]}}"#;
        let (_dir, path) = file(header, &f16s);
        assert_eq!(
            TensorFile::open(&path).unwrap().floats("a").unwrap(),
            values
        );
    }
}
