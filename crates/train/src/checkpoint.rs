//! Checkpoints: everything that a run needs to go on as if it had never stopped.
//!
//! `checkpoints/step-N/` holds
//! - `adapter/`: adapter and head as PEFT writes them, for `calor predict` and others,
//! - `trainer.safetensors`: every trainable tensor and what the optimizer keeps of it, bit for bit,
//! - `state.json`: the [`TrainerState`],
//! - `manifest.json`: length and SHA-256 of each of these files.
//!
//! A checkpoint is filled in a hidden folder, made durable and renamed; what a
//! `kill -9` leaves behind is never taken for one.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, Tensor, TensorData};
use calor_model::{ParameterGroup, ParameterVisitor};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::files::{
    files_below, hash_file, read_json, recover_folder, remove, write_folder, write_json,
    write_whole,
};
use crate::loss_scale::LossScale;
use crate::optimizer::{Parameters, SavedPart, SavedState};
use crate::recipe::Metric;

const MANIFEST: &str = "manifest.json";
const STATE: &str = "state.json";
const TENSORS: &str = "trainer.safetensors";
const ADAPTER: &str = "adapter";
const PREFIX: &str = "step-";
/// What a tensor's values are called, beside the parts of its optimizer's state.
const PARAMETER: &str = "parameter";

/// Where the loop stands. What it draws follows from the seed and `step` alone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainerState {
    /// Optimizer steps done.
    pub step: u64,
    /// Hash of the prepared sequences that the run is trained on.
    pub data_hash: String,
    /// The best evaluation so far.
    pub best: Option<Best>,
    /// Evaluations in a row since then.
    pub evaluations_without_improvement: u64,
    /// The step of the last evaluation; an evaluation that a signal cut off is made up for.
    pub evaluated_step: Option<u64>,
    /// Whether the patience has run out.
    pub stopped_early: bool,
    /// The factor of the loss; f16 only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<LossScale>,
    /// Optimizer steps of each process that worked on the run before, oldest first.
    pub earlier_sessions: Vec<Session>,
}

impl TrainerState {
    /// The beginning of a run.
    pub fn new(data_hash: String) -> TrainerState {
        TrainerState {
            step: 0,
            data_hash,
            best: None,
            evaluations_without_improvement: 0,
            evaluated_step: None,
            stopped_early: false,
            loss_scale: None,
            earlier_sessions: Vec::new(),
        }
    }

    /// Takes note of an evaluation at the present step; whether it is the best so far.
    pub fn evaluated(&mut self, metric: Metric, value: f64, patience: u64) -> bool {
        self.evaluated_step = Some(self.step);
        let better = match &self.best {
            None => !value.is_nan(),
            Some(best) if metric.higher_is_better() => value > best.value,
            Some(best) => value < best.value,
        };
        if better {
            self.best = Some(Best {
                step: self.step,
                metric,
                value,
            });
            self.evaluations_without_improvement = 0;
        } else {
            self.evaluations_without_improvement += 1;
            self.stopped_early = patience > 0 && self.evaluations_without_improvement >= patience;
        }
        better
    }
}

/// The best evaluation so far.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Best {
    /// Optimizer steps done when it was made.
    pub step: u64,
    /// What was compared.
    pub metric: Metric,
    /// Its value, kept exactly.
    #[serde(with = "exact")]
    pub value: f64,
}

/// What one process did for a run that was resumed later.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Session {
    /// Its first optimizer step, counted from 1.
    pub first_step: u64,
    /// Its last optimizer step.
    pub last_step: u64,
    /// What its meter had measured at its last checkpoint.
    pub meter: calor_meter::MeterReport,
}

/// A float as text: JSON readers may round the last bit of a number.
mod exact {
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// The folder `checkpoints/` of a run.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    folder: PathBuf,
    keep: usize,
}

/// A checkpoint that was found complete.
#[derive(Clone, Debug)]
pub struct FoundCheckpoint {
    /// Its folder.
    pub path: PathBuf,
    /// Where the loop stood.
    pub state: TrainerState,
}

impl FoundCheckpoint {
    /// The folder of its adapter.
    pub fn adapter(&self) -> PathBuf {
        self.path.join(ADAPTER)
    }
}

#[derive(Serialize, Deserialize)]
struct Manifest {
    files: BTreeMap<String, FileEntry>,
}

#[derive(Serialize, Deserialize, PartialEq)]
struct FileEntry {
    bytes: u64,
    sha256: String,
}

impl Checkpoints {
    /// The checkpoints of the run at `run`, of which the newest `keep` are kept.
    pub fn new(run: &Path, keep: usize) -> Checkpoints {
        Checkpoints {
            folder: run.join("checkpoints"),
            keep: keep.max(1),
        }
    }

    /// Where the checkpoint of a step is.
    pub fn path_of(&self, step: u64) -> PathBuf {
        self.folder.join(format!("{PREFIX}{step}"))
    }

    /// Writes `step-N/` and removes what is older than the newest `keep`. `optimizer` is what is kept of
    /// each tensor; `save_adapter` fills the folder `adapter/`.
    pub fn write<P: Parameters>(
        &self,
        parameters: &mut P,
        optimizer: &BTreeMap<String, SavedState>,
        state: &TrainerState,
        save_adapter: impl FnOnce(&Path) -> Result<(), TrainError>,
    ) -> Result<PathBuf, TrainError> {
        fs::create_dir_all(&self.folder).map_err(TrainError::io("create", &self.folder))?;
        let path = self.path_of(state.step);
        write_folder(&path, |folder| {
            save_adapter(&folder.join(ADAPTER))?;
            write_whole(&folder.join(TENSORS), &tensors(parameters, optimizer)?)?;
            write_json(&folder.join(STATE), state)?;
            let mut files = BTreeMap::new();
            for file in files_below(folder)? {
                let (sha256, bytes) = hash_file(&folder.join(&file))?;
                files.insert(
                    file.to_string_lossy().into_owned(),
                    FileEntry { bytes, sha256 },
                );
            }
            write_json(&folder.join(MANIFEST), &Manifest { files })
        })?;
        let newest = self.list()?;
        for (_, old) in newest.iter().rev().skip(self.keep) {
            remove(old)?;
        }
        Ok(path)
    }

    /// The newest complete checkpoint, and the folders passed over because they are not.
    pub fn latest(&self) -> Result<(Option<FoundCheckpoint>, Vec<PathBuf>), TrainError> {
        let mut broken = Vec::new();
        for (step, path) in self.list()?.into_iter().rev() {
            match self.read_state(&path) {
                Ok(state) if state.step == step => {
                    return Ok((Some(FoundCheckpoint { path, state }), broken));
                }
                _ => broken.push(path),
            }
        }
        Ok((None, broken))
    }

    /// Removes what a process left that was killed while it wrote.
    pub fn clean(&self) -> Result<(), TrainError> {
        let Ok(entries) = fs::read_dir(&self.folder) else {
            return Ok(());
        };
        let names: Vec<String> = entries
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        for name in names {
            let Some(hidden) = name.strip_prefix('.') else {
                continue;
            };
            if let Some((target, "partial" | "old")) = hidden.rsplit_once('.') {
                recover_folder(&self.folder.join(target))?;
            }
        }
        Ok(())
    }

    /// Puts tensors back, bit for bit, and gives what the optimizer kept of each.
    ///
    /// # Errors
    /// A tensor of the model that the checkpoint lacks, one that the model lacks, or one
    /// of another shape: the recipe's adapter or task changed.
    pub fn restore<P: Parameters>(
        found: &FoundCheckpoint,
        parameters: &mut P,
        device: &Device,
    ) -> Result<BTreeMap<String, SavedState>, TrainError> {
        let path = found.path.join(TENSORS);
        let bytes = fs::read(&path).map_err(TrainError::io("read", &path))?;
        let corrupt = |problem: String| TrainError::Corrupt {
            path: path.clone(),
            problem,
        };
        let file = SafeTensors::deserialize(&bytes)
            .map_err(|error| corrupt(format!("is not a safetensors file: {error}")))?;
        let mut restore = Restore {
            file: &file,
            device: device.clone(),
            restored: Vec::new(),
            problem: None,
        };
        parameters.visit_parameters(&mut restore);
        if let Some(problem) = restore.problem {
            return Err(corrupt(problem));
        }
        let restored = restore.restored;
        let mut states: BTreeMap<String, SavedState> = BTreeMap::new();
        for (name, view) in file.iter() {
            let (part, parameter) = name
                .split_once('.')
                .ok_or_else(|| corrupt(format!("holds `{name}`, which belongs to no tensor")))?;
            if !restored.iter().any(|known| known == parameter) {
                return Err(corrupt(format!(
                    "holds `{parameter}`, which the model does not train; resume with the recipe that the run was started with"
                )));
            }
            if part != PARAMETER {
                let value = read_part(&view)
                    .ok_or_else(|| corrupt(format!("`{name}` is of a type that is not read")))?;
                states
                    .entry(parameter.to_owned())
                    .or_default()
                    .insert(part, value);
            }
        }
        Ok(states)
    }

    /// All checkpoint folders, oldest first, complete or not.
    fn list(&self) -> Result<Vec<(u64, PathBuf)>, TrainError> {
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(TrainError::io("list", &self.folder)(error)),
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(TrainError::io("list", &self.folder))?;
            let step = entry
                .file_name()
                .to_str()
                .and_then(|name| name.strip_prefix(PREFIX))
                .and_then(|step| step.parse().ok());
            found.extend(step.map(|step: u64| (step, entry.path())));
        }
        found.sort();
        Ok(found)
    }

    fn read_state(&self, path: &Path) -> Result<TrainerState, TrainError> {
        let manifest: Manifest = read_json(&path.join(MANIFEST))?;
        for (name, entry) in &manifest.files {
            let (sha256, bytes) = hash_file(&path.join(name))?;
            if *entry != (FileEntry { bytes, sha256 }) {
                return Err(TrainError::Corrupt {
                    path: path.join(name),
                    problem: "is not what was written".to_owned(),
                });
            }
        }
        read_json(&path.join(STATE))
    }
}

/// Every trainable tensor with what is kept of it as a safetensors file.
fn tensors<P: Parameters>(
    parameters: &mut P,
    optimizer: &BTreeMap<String, SavedState>,
) -> Result<Vec<u8>, TrainError> {
    struct Collect(Vec<(String, Dtype, Vec<usize>, Vec<u8>)>);
    impl ParameterVisitor for Collect {
        fn visit<const D: usize>(&mut self, name: &str, _: ParameterGroup, tensor: &mut Tensor<D>) {
            let data = tensor.to_data();
            assert_eq!(data.dtype(), DType::F32, "trainable tensors are f32");
            self.0.push((
                format!("{PARAMETER}.{name}"),
                Dtype::F32,
                data.shape().to_vec(),
                data.as_bytes().to_vec(),
            ));
        }
    }
    let mut collect = Collect(Vec::new());
    parameters.visit_parameters(&mut collect);
    let mut parts = collect.0;
    for (name, state) in optimizer {
        for (part, value) in state.parts() {
            let (dtype, length, bytes) = write_part(value);
            parts.push((format!("{part}.{name}"), dtype, vec![length], bytes));
        }
    }
    let views = parts.iter().map(|(name, dtype, shape, bytes)| {
        (
            name.as_str(),
            TensorView::new(*dtype, shape.clone(), bytes)
                .expect("the length follows from the shape"),
        )
    });
    safetensors::serialize(views, None).map_err(|error| TrainError::Corrupt {
        path: TENSORS.into(),
        problem: format!("cannot be written: {error}"),
    })
}

fn write_part(part: &SavedPart) -> (Dtype, usize, Vec<u8>) {
    match part {
        SavedPart::Floats(values) => (
            Dtype::F32,
            values.len(),
            values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect(),
        ),
        SavedPart::Integers(values) => (
            Dtype::I32,
            values.len(),
            values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect(),
        ),
        SavedPart::Count(value) => (Dtype::U64, 1, value.to_le_bytes().to_vec()),
        SavedPart::Number(value) => (Dtype::F64, 1, value.to_le_bytes().to_vec()),
    }
}

fn read_part(view: &TensorView<'_>) -> Option<SavedPart> {
    let data = view.data();
    match view.dtype() {
        Dtype::F32 => floats(view).map(SavedPart::Floats),
        Dtype::I32 => {
            let words = data.chunks_exact(4);
            let values =
                words.map(|bytes| i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
            Some(SavedPart::Integers(values.collect()))
        }
        Dtype::U64 => Some(SavedPart::Count(u64::from_le_bytes(data.try_into().ok()?))),
        Dtype::F64 => Some(SavedPart::Number(f64::from_le_bytes(data.try_into().ok()?))),
        _ => None,
    }
}

struct Restore<'a> {
    file: &'a SafeTensors<'a>,
    device: Device,
    restored: Vec<String>,
    problem: Option<String>,
}

impl ParameterVisitor for Restore<'_> {
    fn visit<const D: usize>(&mut self, name: &str, _: ParameterGroup, tensor: &mut Tensor<D>) {
        let other_recipe = "resume with the recipe that the run was started with";
        let Ok(view) = self.file.tensor(&format!("{PARAMETER}.{name}")) else {
            self.problem = Some(format!(
                "has no `{name}`, which the model trains; {other_recipe}"
            ));
            return;
        };
        let shape = tensor.shape();
        if view.shape() != shape.as_slice() {
            self.problem = Some(format!(
                "`{name}` is {:?} there and {:?} in the model; {other_recipe}",
                view.shape(),
                shape.as_slice()
            ));
            return;
        }
        let Some(values) = floats(&view) else {
            self.problem = Some(format!("`{name}` is not f32"));
            return;
        };
        *tensor = Tensor::from_data(TensorData::new(values, shape), &self.device)
            .autodiff()
            .require_grad();
        self.restored.push(name.to_owned());
    }
}

fn floats(view: &TensorView<'_>) -> Option<Vec<f32>> {
    if view.dtype() != Dtype::F32 {
        return None;
    }
    let chunks = view.data().chunks_exact(4);
    Some(
        chunks
            .map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
            .collect(),
    )
}

#[cfg(test)]
#[path = "checkpoint_tests.rs"]
mod tests;
