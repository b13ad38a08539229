//! Event files that TensorBoard reads.

use std::fs::{self, File, OpenOptions};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use protobuf::Message;
use tensorboard_proto::event::{Event, SessionLog, SessionLog_SessionStatus};
use tensorboard_rs::record_writer::RecordWriter;
use tensorboard_rs::summary::scalar;

use crate::TrainError;

/// Writes scalars to a new event file in `tensorboard/` of the run.
///
/// The records and their checksums are tensorboard-rs's; its own file writer is not used
/// because it panics where a disk is full and names two runs of one second alike.
pub struct TensorBoard {
    path: PathBuf,
    writer: RecordWriter<BufWriter<File>>,
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
            writer: RecordWriter::new(BufWriter::new(file)),
        };
        let mut version = Event::new();
        version.set_file_version("brain.Event:2".to_owned());
        board.write(version)?;
        if next_step > 1 {
            let mut log = SessionLog::new();
            log.set_status(SessionLog_SessionStatus::START);
            let mut start = Event::new();
            start.set_step(next_step as i64);
            start.set_session_log(log);
            board.write(start)?;
        }
        board.flush()?;
        Ok(board)
    }

    /// Writes one number; a value that is not finite shows as a gap.
    pub fn scalar(&mut self, tag: &str, value: f64, step: u64) -> Result<(), TrainError> {
        let mut event = Event::new();
        event.set_step(step as i64);
        event.set_summary(scalar(tag, value as f32));
        self.write(event)
    }

    /// Hands everything to the operating system.
    pub fn flush(&mut self) -> Result<(), TrainError> {
        self.writer
            .flush()
            .map_err(TrainError::io("write", &self.path))
    }

    fn write(&mut self, mut event: Event) -> Result<(), TrainError> {
        event.set_wall_time(now().as_secs_f64());
        let bytes = event
            .write_to_bytes()
            .map_err(|error| TrainError::Corrupt {
                path: self.path.clone(),
                problem: format!("an event cannot be encoded: {error}"),
            })?;
        self.writer
            .write(&bytes)
            .map_err(TrainError::io("write", &self.path))
    }
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
    use tensorboard_rs::masked_crc32c::masked_crc32c;

    /// Reads the records of an event file, checking both checksums of each.
    fn events(path: &Path) -> Vec<Event> {
        let bytes = fs::read(path).unwrap();
        let mut rest = bytes.as_slice();
        let mut events = Vec::new();
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(
                u32::from_le_bytes(rest[8..12].try_into().unwrap()),
                masked_crc32c(&rest[..8]) as u32
            );
            let data = &rest[12..12 + length];
            assert_eq!(
                u32::from_le_bytes(rest[12 + length..16 + length].try_into().unwrap()),
                masked_crc32c(data) as u32
            );
            events.push(Event::parse_from_bytes(data).unwrap());
            rest = &rest[16 + length..];
        }
        events
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
        assert_eq!(first[0].get_file_version(), "brain.Event:2");
        assert_eq!(
            first[2].get_summary().get_value()[0].get_tag(),
            "train/loss"
        );
        assert_eq!(
            first[2].get_summary().get_value()[0].get_simple_value(),
            0.5
        );
        let second = events(&files[1]);
        assert_eq!(
            second[1].get_session_log().get_status(),
            SessionLog_SessionStatus::START
        );
        assert_eq!(second[1].get_step(), 3);
    }
}
