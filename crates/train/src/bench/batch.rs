//! The batch of a benchmark: from a file, or of random tokens.

use std::path::Path;

use calor_meter::Counts;
use calor_model::HeadOptions;
use calor_sequence::{HostBatch, NO_TARGET, Span, Targets};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype as FileDtype;

use crate::TrainError;
use crate::recipe::TaskKind;
use crate::seed::derive;

/// One sequence and what is to be said of it.
#[derive(Clone, Debug, PartialEq)]
struct Sample {
    tokens: Vec<i32>,
    targets: Targets,
}

/// Samples side by side.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Batch(pub HostBatch);

impl Batch {
    /// Reads `input_ids` `[rows, seq]`, `labels` `[rows, seq]` (−100 counts in no loss) or
    /// `[rows]`, and `attention_mask` `[rows, seq]`, all int64. With `pack`, rows are put one behind
    /// the other as long as they fit into the file's row length.
    pub fn read(
        path: &Path,
        kind: TaskKind,
        vocab: usize,
        pack: bool,
    ) -> Result<Batch, TrainError> {
        let bytes = std::fs::read(path).map_err(TrainError::io("read", path))?;
        let wrong = |problem: String| TrainError::Bench {
            path: path.to_owned(),
            problem,
        };
        let file = SafeTensors::deserialize(&bytes)
            .map_err(|error| wrong(format!("is not a safetensors file: {error}")))?;
        let read = |name: &str| -> Result<(Vec<usize>, Vec<i64>), TrainError> {
            let view = file
                .tensor(name)
                .map_err(|_| wrong(format!("has no tensor `{name}`")))?;
            if view.dtype() != FileDtype::I64 {
                return Err(wrong(format!("`{name}` is {:?}, not I64", view.dtype())));
            }
            let chunks = view.data().chunks_exact(8);
            let values = chunks.map(|bytes| i64::from_le_bytes(bytes.try_into().expect("eight")));
            Ok((view.shape().to_vec(), values.collect()))
        };
        let (shape, input_ids) = read("input_ids")?;
        let &[rows, seq] = shape.as_slice() else {
            return Err(wrong(format!("`input_ids` is {shape:?}, not [rows, seq]")));
        };
        if rows == 0 || seq == 0 {
            return Err(wrong("`input_ids` is empty".to_owned()));
        }
        if let Some(id) = input_ids.iter().find(|id| !(0..vocab as i64).contains(*id)) {
            return Err(wrong(format!(
                "`input_ids` holds {id}, and the checkpoint has {vocab} tokens"
            )));
        }
        let mask = match file.tensor("attention_mask") {
            Ok(_) => read("attention_mask")?.1,
            Err(_) => vec![1; rows * seq],
        };
        if mask.len() != rows * seq {
            return Err(wrong(
                "`attention_mask` has another shape than `input_ids`".to_owned(),
            ));
        }
        let mut lengths = Vec::with_capacity(rows);
        for mask in mask.chunks(seq) {
            let length = mask.iter().take_while(|value| **value != 0).count();
            if length == 0 || mask[length..].iter().any(|value| *value != 0) {
                return Err(wrong(
                    "a row of `attention_mask` is empty or padded elsewhere than on the right"
                        .to_owned(),
                ));
            }
            lengths.push(length);
        }
        let (shape, labels) = read("labels")?;
        let expected = match kind {
            TaskKind::CausalLm | TaskKind::Tokens => vec![rows, seq],
            TaskKind::Binary | TaskKind::Multiclass => vec![rows],
            TaskKind::Multilabel | TaskKind::Regression => {
                let name = kind.name();
                return Err(wrong(format!("cannot hold the labels of a {name} task")));
            }
        };
        if shape != expected {
            return Err(wrong(format!("`labels` is {shape:?}, not {expected:?}")));
        }
        let labels: Vec<i32> = labels.into_iter().map(|label| label as i32).collect();
        let sample = |(row, length): (usize, usize)| {
            let place = row * seq..row * seq + length;
            let tokens = input_ids[place.clone()].iter();
            Sample {
                tokens: tokens.map(|id| *id as i32).collect(),
                targets: match kind.per_token() {
                    true => of_tokens(labels[place].to_vec(), kind),
                    false => Targets::Class(labels[row]),
                },
            }
        };
        let samples: Vec<Sample> = lengths.into_iter().enumerate().map(sample).collect();
        let batch = Batch::lay_out(&samples, seq, pack);
        if batch.0.supervised_count == 0 {
            return Err(wrong("no label counts in the loss".to_owned()));
        }
        Ok(batch)
    }

    /// `rows` of `seq` tokens each, all drawn from the `vocab` that there is, with targets for the
    /// head.
    pub fn random(
        [rows, seq]: [usize; 2],
        kind: TaskKind,
        head: &HeadOptions,
        vocab: usize,
        seed: u64,
    ) -> Batch {
        let draw = |purpose: &str, index: usize, below: usize| {
            (derive(seed, purpose, &[index as u64]) % below.max(1) as u64) as i32
        };
        let classes = match head {
            HeadOptions::Classifier { labels, .. } | HeadOptions::TokenClassifier { labels } => {
                *labels
            }
            HeadOptions::None | HeadOptions::CausalLm => 0,
        };
        let targets = |row: usize, tokens: &[i32]| match kind {
            TaskKind::CausalLm => of_tokens(tokens.to_vec(), kind),
            TaskKind::Tokens => {
                let tag = |place| draw("class", row * seq + place, classes);
                of_tokens((0..seq).map(tag).collect(), kind)
            }
            TaskKind::Binary => Targets::Class(draw("class", row, 2)),
            TaskKind::Multiclass => Targets::Class(draw("class", row, classes)),
            TaskKind::Multilabel => {
                let label = |index| draw("class", row * classes + index, 2) as f32;
                Targets::Multilabel((0..classes).map(label).collect())
            }
            TaskKind::Regression => Targets::Real(draw("class", row, 5) as f32 - 2.0),
        };
        let samples: Vec<Sample> = (0..rows)
            .map(|row| {
                let tokens: Vec<i32> = (0..seq)
                    .map(|place| draw("token", row * seq + place, vocab))
                    .collect();
                Sample {
                    targets: targets(row, &tokens),
                    tokens,
                }
            })
            .collect();
        Batch::lay_out(&samples, seq, false)
    }

    /// A sample a row, padded to `seq`; or each in the first row that has room for it, and rows as
    /// long as the longest is then.
    fn lay_out(samples: &[Sample], seq: usize, pack: bool) -> Batch {
        let mut rows: Vec<Vec<usize>> = Vec::new();
        let mut used: Vec<usize> = Vec::new();
        for (index, sample) in samples.iter().enumerate() {
            let length = sample.tokens.len();
            let room = used.iter().position(|used| pack && used + length <= seq);
            let row = room.unwrap_or_else(|| {
                rows.push(Vec::new());
                used.push(0);
                rows.len() - 1
            });
            rows[row].push(index);
            used[row] += length;
        }
        let seq = match pack {
            true => used.iter().copied().max().unwrap_or(0),
            false => seq,
        };
        let positions = rows.len() * seq;
        let mut batch = HostBatch {
            rows: rows.len(),
            seq,
            input_ids: vec![0; positions],
            positions: vec![0; positions],
            segments: vec![0; positions],
            spans: Vec::new(),
            samples: Vec::new(),
            targets: Vec::new(),
            token_count: 0,
            padded_token_count: positions,
            supervised_count: 0,
            items: Vec::new(),
        };
        for (row, members) in rows.iter().enumerate() {
            let mut start = 0;
            for (segment, &index) in (1..).zip(members) {
                let Sample { tokens, targets } = &samples[index];
                for (offset, &token) in tokens.iter().enumerate() {
                    let place = row * seq + start + offset;
                    batch.input_ids[place] = token;
                    batch.positions[place] = offset as i32;
                    batch.segments[place] = segment;
                }
                let length = tokens.len();
                batch.spans.push(Span { row, start, length });
                batch.samples.push(index as u64);
                batch.supervised_count += targets.supervised_count();
                batch.targets.push(targets.clone());
                batch.token_count += length;
                start += length;
            }
        }
        Batch(batch)
    }

    /// Tokens of each sample.
    pub fn lengths(&self) -> Vec<usize> {
        self.0.spans.iter().map(|span| span.length).collect()
    }

    pub fn counts(&self) -> Counts {
        Counts {
            sequences: self.0.spans.len() as u64,
            padded_tokens: self.0.padded_token_count as u64,
            tokens: self.0.token_count as u64,
            supervised: self.0.supervised_count as u64,
        }
    }
}

/// A target a token; nothing stands before the first one that could tell it.
fn of_tokens(mut targets: Vec<i32>, kind: TaskKind) -> Targets {
    if kind == TaskKind::CausalLm
        && let Some(first) = targets.first_mut()
    {
        *first = NO_TARGET;
    }
    Targets::Tokens(targets)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(tensors: &[(&str, Vec<usize>, Vec<i64>)]) -> tempfile::NamedTempFile {
        use safetensors::tensor::TensorView;
        let bytes: Vec<Vec<u8>> = tensors
            .iter()
            .map(|(_, _, values)| {
                values
                    .iter()
                    .flat_map(|value| value.to_le_bytes())
                    .collect()
            })
            .collect();
        let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
            let view = TensorView::new(FileDtype::I64, shape.clone(), bytes).unwrap();
            (*name, view)
        });
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), safetensors::serialize(views, None).unwrap()).unwrap();
        file
    }

    /// Three rows of 4, 2 and 2 tokens.
    fn ragged() -> tempfile::NamedTempFile {
        file(&[
            (
                "input_ids",
                vec![3, 4],
                vec![5, 6, 7, 8, 1, 2, 0, 0, 3, 4, 0, 0],
            ),
            (
                "attention_mask",
                vec![3, 4],
                vec![1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0],
            ),
            (
                "labels",
                vec![3, 4],
                vec![5, -100, 7, 8, 1, 2, -100, -100, 3, 4, -100, -100],
            ),
        ])
    }

    #[test]
    fn a_token_is_told_by_those_before_it_and_padding_by_none() {
        let batch = Batch::read(ragged().path(), TaskKind::CausalLm, 10, false).unwrap();
        assert_eq!((batch.0.rows, batch.0.seq), (3, 4));
        let targets: Vec<_> = batch.0.targets.clone();
        assert_eq!(targets[0], Targets::Tokens(vec![-100, -100, 7, 8]));
        assert_eq!(targets[1], Targets::Tokens(vec![-100, 2]));
        assert_eq!((batch.0.supervised_count, batch.0.token_count), (4, 8));
        assert_eq!(batch.lengths(), [4, 2, 2]);
        assert_eq!(batch.counts().padded_tokens, 12);
        assert_eq!(batch.0.segments, [1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0]);
    }

    #[test]
    fn packed_rows_hold_what_fits_and_every_sample_begins_anew() {
        let batch = Batch::read(ragged().path(), TaskKind::CausalLm, 10, true).unwrap();
        assert_eq!((batch.0.rows, batch.0.seq), (2, 4));
        assert_eq!(batch.0.input_ids, [5, 6, 7, 8, 1, 2, 3, 4]);
        assert_eq!(batch.0.positions, [0, 1, 2, 3, 0, 1, 0, 1]);
        assert_eq!(batch.0.segments, [1, 1, 1, 1, 1, 1, 2, 2]);
        assert_eq!((batch.0.supervised_count, batch.0.token_count), (4, 8));
        let second = batch.0.spans[2];
        assert_eq!((second.row, second.start, second.length), (1, 2, 2));
    }

    #[test]
    fn random_targets_fit_the_head() {
        let head = |labels| HeadOptions::TokenClassifier { labels };
        for (kind, supervised) in [
            (TaskKind::CausalLm, 8),
            (TaskKind::Tokens, 10),
            (TaskKind::Binary, 2),
            (TaskKind::Multiclass, 2),
            (TaskKind::Multilabel, 6),
            (TaskKind::Regression, 2),
        ] {
            let batch = Batch::random([2, 5], kind, &head(3), 7, 0);
            assert_eq!(batch.0.supervised_count, supervised, "{kind:?}");
            assert!(batch.0.input_ids.iter().all(|id| (0..7).contains(id)));
            for targets in &batch.0.targets {
                let right = match (kind, targets) {
                    (TaskKind::CausalLm, Targets::Tokens(found)) => found[0] == NO_TARGET,
                    (TaskKind::Tokens, Targets::Tokens(found)) => {
                        found.iter().all(|tag| (0..3).contains(tag))
                    }
                    (TaskKind::Binary, Targets::Class(class)) => (0..2).contains(class),
                    (TaskKind::Multiclass, Targets::Class(class)) => (0..3).contains(class),
                    (TaskKind::Multilabel, Targets::Multilabel(found)) => found.len() == 3,
                    (TaskKind::Regression, Targets::Real(_)) => true,
                    _ => false,
                };
                assert!(right, "{kind:?}: {targets:?}");
            }
        }
    }

    #[test]
    fn a_batch_that_does_not_fit_is_named_by_its_tensor() {
        let complaint = |tensors: &[(&str, Vec<usize>, Vec<i64>)]| {
            Batch::read(file(tensors).path(), TaskKind::Multiclass, 10, false)
                .unwrap_err()
                .to_string()
        };
        let ids = ("input_ids", vec![1, 2], vec![1, 2]);
        assert!(complaint(&[]).contains("no tensor `input_ids`"));
        assert!(complaint(std::slice::from_ref(&ids)).contains("no tensor `labels`"));
        let labels = ("labels", vec![1, 2], vec![0, 0]);
        assert!(complaint(&[ids.clone(), labels]).contains("`labels` is [1, 2], not [1]"));
        let high = ("input_ids", vec![1, 2], vec![1, 10]);
        assert!(complaint(&[high]).contains("holds 10"));
        let left = ("attention_mask", vec![1, 2], vec![0, 1]);
        assert!(complaint(&[ids, left]).contains("attention_mask"));
    }
}
