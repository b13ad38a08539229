//! `metrics.jsonl`: one object an optimizer step, one an evaluation.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::files::write_whole;

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum MetricsLine {
    /// An optimizer step.
    Step(StepLine),
    /// An evaluation of the `tuning` patients.
    Evaluation(EvaluationLine),
}

/// What an optimizer step was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepLine {
    /// Optimizer steps done, this one included.
    pub step: u64,
    /// Epochs done, as a fraction.
    pub epoch: f64,
    /// Mean loss over the step's labels.
    pub loss: f64,
    /// Norm of all gradients together, before clipping; none where an f16 gradient overflowed and the
    /// step was left out.
    pub grad_norm: Option<f64>,
    /// What the loss was multiplied by in the backward pass; f16 only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f64>,
    /// Learning rate of the adapter.
    pub learning_rate: f64,
    /// Learning rate of the head.
    pub head_learning_rate: f64,
    /// Wall time of the step.
    pub elapsed_s: f64,
    /// Time by phase.
    pub data_s: f64,
    /// Time by phase.
    pub forward_s: f64,
    /// Time by phase.
    pub backward_s: f64,
    /// Time by phase.
    pub optimizer_s: f64,
    /// Tokens, padding excluded.
    pub tokens: u64,
    /// Tokens, padding included.
    pub padded_tokens: u64,
    /// Labels that the loss was taken over.
    pub supervised: u64,
    /// Tokens a second, padding excluded; none if the clock did not move.
    pub tokens_per_s: Option<f64>,
    /// Power while the step ran; none where it cannot be read or modelled.
    pub watts: Option<f64>,
}

/// What an evaluation found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvaluationLine {
    /// Optimizer steps done.
    pub step: u64,
    /// Epochs done, as a fraction.
    pub epoch: f64,
    /// Wall time.
    pub elapsed_s: f64,
    /// Metrics by name, `loss` among them. One that is undefined (a single class) is null.
    pub metrics: BTreeMap<String, Option<f64>>,
    /// Whether this is the best evaluation so far.
    pub best: bool,
}

impl MetricsLine {
    /// The step the line belongs to.
    pub fn step(&self) -> u64 {
        match self {
            MetricsLine::Step(line) => line.step,
            MetricsLine::Evaluation(line) => line.step,
        }
    }
}

/// The open file.
pub struct MetricsFile {
    path: PathBuf,
    file: File,
}

impl MetricsFile {
    /// Opens `metrics.jsonl` in the run's folder and takes back what was written after
    /// `step`: a resumed run does those steps again. Gives the lines that stay.
    pub fn open(run: &Path, step: u64) -> Result<(MetricsFile, Vec<MetricsLine>), TrainError> {
        let path = run.join("metrics.jsonl");
        let kept: Vec<MetricsLine> = read(&path)?
            .into_iter()
            .filter(|line| line.step() <= step)
            .collect();
        let mut text = Vec::new();
        for line in &kept {
            append(&mut text, line);
        }
        write_whole(&path, &text)?;
        let file = OpenOptions::new()
            .append(true)
            .open(&path)
            .map_err(TrainError::io("open", &path))?;
        Ok((MetricsFile { path, file }, kept))
    }

    /// Appends a line; a reader sees it whole.
    pub fn write(&mut self, line: &MetricsLine) -> Result<(), TrainError> {
        let mut text = Vec::new();
        append(&mut text, line);
        self.file
            .write_all(&text)
            .map_err(TrainError::io("write", &self.path))
    }
}

/// All lines of a `metrics.jsonl`; a last line that was cut off is left out, a missing file is empty.
pub fn read(path: &Path) -> Result<Vec<MetricsLine>, TrainError> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let file = fs::File::open(path).map_err(TrainError::io("read", path))?;
    let mut lines = Vec::new();
    for line in BufReader::new(file).split(b'\n') {
        let line = line.map_err(TrainError::io("read", path))?;
        match serde_json::from_slice(&line) {
            Ok(line) => lines.push(line),
            Err(_) => break,
        }
    }
    Ok(lines)
}

fn append(text: &mut Vec<u8>, line: &MetricsLine) {
    serde_json::to_writer(&mut *text, line).expect("a line holds nothing that JSON cannot write");
    text.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64) -> MetricsLine {
        MetricsLine::Step(StepLine {
            step,
            epoch: step as f64 / 10.0,
            loss: 0.5,
            grad_norm: Some(1.0),
            loss_scale: None,
            learning_rate: 1e-4,
            head_learning_rate: 1e-3,
            elapsed_s: 0.1,
            data_s: 0.0,
            forward_s: 0.04,
            backward_s: 0.05,
            optimizer_s: 0.01,
            tokens: 900,
            padded_tokens: 1024,
            supervised: 8,
            tokens_per_s: Some(9000.0),
            watts: None,
        })
    }

    fn evaluation(step: u64) -> MetricsLine {
        let metrics = BTreeMap::from([("auroc".to_owned(), Some(0.8)), ("auprc".to_owned(), None)]);
        MetricsLine::Evaluation(EvaluationLine {
            step,
            epoch: 0.2,
            elapsed_s: 1.0,
            metrics,
            best: true,
        })
    }

    #[test]
    fn a_resumed_run_leaves_no_step_twice() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("metrics.jsonl");
        let (mut file, kept) = MetricsFile::open(home.path(), 0).unwrap();
        assert!(kept.is_empty());
        for line in [step(1), step(2), evaluation(2), step(3)] {
            file.write(&line).unwrap();
        }
        drop(file);
        // Killed in the middle of a line.
        OpenOptions::new()
            .append(true)
            .open(&path)
            .unwrap()
            .write_all(b"{\"event\":\"step\",\"st")
            .unwrap();
        let (mut file, kept) = MetricsFile::open(home.path(), 2).unwrap();
        assert_eq!(kept, [step(1), step(2), evaluation(2)]);
        file.write(&step(3)).unwrap();
        assert_eq!(
            read(&path).unwrap(),
            [step(1), step(2), evaluation(2), step(3)]
        );
        let text = fs::read_to_string(&path).unwrap();
        assert!(
            text.lines()
                .all(|line| serde_json::from_str::<serde_json::Value>(line).is_ok())
        );
        assert!(
            text.starts_with("{\"event\":\"step\",\"step\":1,"),
            "{text}"
        );
    }
}
