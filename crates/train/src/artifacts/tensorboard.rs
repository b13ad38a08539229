//! Event files that TensorBoard reads.
//!
//! Three messages of its protocol are enough for scalars: the file's version, the start of a
//! session and a summary with one value. They are encoded here, since the crate that has them
//! brings an image codec for every format and two runtimes that are no longer kept.
//! Sources: `tensorflow/core/util/event.proto`, `tensorflow/core/framework/summary.proto`, and
//! `tensorflow/core/lib/io/record_writer.h` for the framing.

use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::TrainError;

/// Writes scalars to a new event file in `tensorboard/` of the run.
pub struct TensorBoard {
    path: PathBuf,
    writer: BufWriter<File>,
}

impl TensorBoard {
    /// Starts a new event file. `next_step` is the first step that will be written: what
    /// earlier files hold from there on is taken back, as TensorBoard does for a restarted
    /// session.
    pub fn open(run: &Path, next_step: u64) -> Result<TensorBoard, TrainError> {
        let folder = run.join("tensorboard");
        fs::create_dir_all(&folder).map_err(TrainError::io("create", &folder))?;
        let (path, file) = new_file(&folder)?;
        let mut board = TensorBoard {
            path,
            writer: BufWriter::new(file),
        };
        board.write(0, |event| event.bytes(FILE_VERSION, b"brain.Event:2"))?;
        if next_step > 1 {
            board.write(next_step, |event| {
                let mut log = Message::default();
                log.varint(SESSION_STATUS, SESSION_START);
                event.bytes(SESSION_LOG, &log.0);
            })?;
        }
        board.flush()?;
        Ok(board)
    }

    /// Writes one number; a value that is not finite shows as a gap.
    pub fn scalar(&mut self, tag: &str, value: f64, step: u64) -> Result<(), TrainError> {
        self.write(step, |event| {
            let mut scalar = Message::default();
            scalar.bytes(VALUE_TAG, tag.as_bytes());
            scalar.float(VALUE_SIMPLE, value as f32);
            let mut summary = Message::default();
            summary.bytes(SUMMARY_VALUE, &scalar.0);
            event.bytes(SUMMARY, &summary.0);
        })
    }

    /// Hands everything to the operating system.
    pub fn flush(&mut self) -> Result<(), TrainError> {
        self.writer
            .flush()
            .map_err(TrainError::io("write", &self.path))
    }

    fn write(&mut self, step: u64, fill: impl FnOnce(&mut Message)) -> Result<(), TrainError> {
        let mut event = Message::default();
        event.double(WALL_TIME, now().as_secs_f64());
        event.varint(STEP, step);
        fill(&mut event);
        let length = (event.0.len() as u64).to_le_bytes();
        [
            &length[..],
            &masked_checksum(&length).to_le_bytes(),
            &event.0,
            &masked_checksum(&event.0).to_le_bytes(),
        ]
        .iter()
        .try_for_each(|part| self.writer.write_all(part))
        .map_err(TrainError::io("write", &self.path))
    }
}

// Field numbers of `Event`, of the messages in it, and the one enumerator used.
const WALL_TIME: u32 = 1;
const STEP: u32 = 2;
const FILE_VERSION: u32 = 3;
const SUMMARY: u32 = 5;
const SESSION_LOG: u32 = 7;
const SUMMARY_VALUE: u32 = 1;
const VALUE_TAG: u32 = 1;
const VALUE_SIMPLE: u32 = 2;
const SESSION_STATUS: u32 = 1;
const SESSION_START: u64 = 1;

/// One protocol-buffer message under construction.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, field: u32, value: u64) {
        self.key(field, 0);
        self.unsigned(value);
    }

    fn double(&mut self, field: u32, value: f64) {
        self.key(field, 1);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn float(&mut self, field: u32, value: f32) {
        self.key(field, 5);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn bytes(&mut self, field: u32, value: &[u8]) {
        self.key(field, 2);
        self.unsigned(value.len() as u64);
        self.0.extend_from_slice(value);
    }

    fn key(&mut self, field: u32, wire_type: u32) {
        self.unsigned(u64::from(field << 3 | wire_type));
    }

    fn unsigned(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

/// CRC-32C, rotated and offset so that a record may hold records itself.
fn masked_checksum(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
        .rotate_right(15)
        .wrapping_add(0xa282_ead8)
}

/// TensorBoard reads the files of a folder in the order of their names.
fn new_file(folder: &Path) -> Result<(PathBuf, File), TrainError> {
    let seconds = now().as_secs();
    let process = std::process::id();
    for number in 0u32.. {
        let path = folder.join(format!(
            "events.out.tfevents.{seconds:010}.{number:04}.{process}.calor"
        ));
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(file) => return Ok((path, file)),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(TrainError::io("create", path)(error)),
        }
    }
    unreachable!("a folder does not hold four billion event files of one second")
}

fn now() -> std::time::Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The fields of a message in order: number, and the value's bytes (a varint's as eight).
    fn fields(mut rest: &[u8]) -> Vec<(u32, Vec<u8>)> {
        fn unsigned(rest: &mut &[u8]) -> u64 {
            let (mut value, mut shift) = (0, 0);
            loop {
                let byte = rest[0];
                *rest = &rest[1..];
                value |= u64::from(byte & 0x7f) << shift;
                shift += 7;
                if byte < 0x80 {
                    return value;
                }
            }
        }
        let mut fields = Vec::new();
        while !rest.is_empty() {
            let key = unsigned(&mut rest);
            let value = match key & 7 {
                0 => unsigned(&mut rest).to_le_bytes().to_vec(),
                wire_type => {
                    let length = match wire_type {
                        1 => 8,
                        2 => unsigned(&mut rest) as usize,
                        5 => 4,
                        other => panic!("wire type {other}"),
                    };
                    let (value, after) = rest.split_at(length);
                    rest = after;
                    value.to_vec()
                }
            };
            fields.push(((key >> 3) as u32, value));
        }
        fields
    }

    fn field(message: &[u8], number: u32) -> Vec<u8> {
        let found = fields(message)
            .into_iter()
            .find(|(field, _)| *field == number);
        found.expect("the field is there").1
    }

    /// Reads the records of an event file, checking both checksums of each.
    fn events(path: &Path) -> Vec<Vec<u8>> {
        let bytes = fs::read(path).unwrap();
        let mut rest = bytes.as_slice();
        let mut events = Vec::new();
        let checksum = |bytes: &[u8]| u32::from_le_bytes(bytes[..4].try_into().unwrap());
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(checksum(&rest[8..]), masked_checksum(&rest[..8]));
            let data = &rest[12..12 + length];
            assert_eq!(checksum(&rest[12 + length..]), masked_checksum(data));
            events.push(data.to_vec());
            rest = &rest[16 + length..];
        }
        events
    }

    #[test]
    fn the_bytes_are_those_that_tensorflow_writes() {
        // `Event(step=300, summary=Summary(value=[Summary.Value(tag="a", simple_value=0.5)]))`
        // by Python's protobuf, and its masked checksum by tensorboard's record writer.
        let mut scalar = Message::default();
        scalar.bytes(VALUE_TAG, b"a");
        scalar.float(VALUE_SIMPLE, 0.5);
        let mut summary = Message::default();
        summary.bytes(SUMMARY_VALUE, &scalar.0);
        let mut event = Message::default();
        event.varint(STEP, 300);
        event.bytes(SUMMARY, &summary.0);
        assert_eq!(event.0, b"\x10\xac\x02*\n\n\x08\n\x01a\x15\0\0\0?");
        assert_eq!(masked_checksum(&event.0), 0x764b_7ad2);
    }

    #[test]
    fn scalars_are_written_and_a_resumed_session_takes_back_what_comes_after_it() {
        let home = tempfile::tempdir().unwrap();
        for next_step in [1, 3] {
            let mut board = TensorBoard::open(home.path(), next_step).unwrap();
            for step in next_step..next_step + 4 {
                board.scalar("train/loss", 1.0 / step as f64, step).unwrap();
            }
            board.flush().unwrap();
        }
        let mut files: Vec<PathBuf> = fs::read_dir(home.path().join("tensorboard"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        files.sort();
        assert_eq!(files.len(), 2, "two sessions of one second have two files");
        let first = events(&files[0]);
        assert_eq!(first.len(), 5);
        assert_eq!(field(&first[0], FILE_VERSION), b"brain.Event:2");
        let value = field(&field(&first[2], SUMMARY), SUMMARY_VALUE);
        assert_eq!(field(&value, VALUE_TAG), b"train/loss");
        assert_eq!(field(&value, VALUE_SIMPLE), 0.5f32.to_le_bytes());
        let second = events(&files[1]);
        let log = field(&second[1], SESSION_LOG);
        assert_eq!(field(&log, SESSION_STATUS), SESSION_START.to_le_bytes());
        assert_eq!(field(&second[1], STEP), 3u64.to_le_bytes());
    }
}
