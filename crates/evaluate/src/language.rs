//! Language models by their loss, token classifiers by the entities they find.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::measure::Measure;
use crate::score::Value;

pub(crate) const LANGUAGE_METRICS: [&str; 2] = ["loss", "perplexity"];

/// The loss of each row, summed over its tokens, and their number.
pub(crate) struct LanguageMeasure {
    pub losses: Vec<f64>,
    pub tokens: Vec<u64>,
}

impl Measure for LanguageMeasure {
    fn measure(&self, weights: &[u32]) -> Vec<Value> {
        let (mut loss, mut tokens) = (0.0, 0.0);
        for ((row, count), &weight) in self.losses.iter().zip(&self.tokens).zip(weights) {
            loss += f64::from(weight) * row;
            tokens += f64::from(weight) * *count as f64;
        }
        if tokens == 0.0 {
            let none = || Err("no token has a target".into());
            return vec![none(), none()];
        }
        vec![Ok(loss / tokens), Ok((loss / tokens).exp())]
    }
}

pub(crate) const TOKEN_METRICS: [&str; 4] = ["f1", "precision", "recall", "accuracy"];

/// Entities and words of each row.
pub(crate) struct EntityMeasure {
    rows: Vec<RowCounts>,
}

#[derive(Clone, Copy, Default)]
struct RowCounts {
    entities: EntityCounts,
    words: u64,
    right_words: u64,
}

#[derive(Clone, Copy, Default)]
struct EntityCounts {
    found: u64,
    predicted: u64,
    expected: u64,
}

/// How well the entities of one type are found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EntityScores {
    /// The type, as it stands behind the dash of the tags.
    pub name: String,
    /// Entities of this type.
    pub support: u64,
    /// Entities that are predicted to be of this type.
    pub predicted: u64,
    pub precision: f64,
    pub recall: f64,
    pub f1: f64,
}

/// A part of a row: its type, first and last word.
pub type Entity<'a> = (&'a str, usize, usize);

/// The entities of a row's tags, as seqeval's default reads them (which is how the CoNLL evaluation
/// does): B, I, E and S may begin an entity, and an I without a B before it, or of another type than
/// what stands before it, begins one as well.
pub fn entities<'a>(tags: &[&'a str]) -> Vec<Entity<'a>> {
    let mut found = Vec::new();
    let (mut before, mut type_before) = ('O', "");
    let mut start = 0;
    // One more, so that an entity at the end is closed.
    for (position, tag) in tags.iter().copied().chain(["O"]).enumerate() {
        let (letter, kind) = split(tag);
        if ends(before, letter, type_before != kind) {
            found.push((type_before, start, position - 1));
        }
        if begins(before, letter, type_before != kind) {
            start = position;
        }
        (before, type_before) = (letter, kind);
    }
    found
}

/// The letter of a tag and the type behind its dash; `_` for one without type.
fn split(tag: &str) -> (char, &str) {
    let mut letters = tag.chars();
    let letter = letters.next().unwrap_or('O');
    let rest = letters.as_str();
    let kind = rest.split_once('-').map_or(rest, |(_, kind)| kind);
    (letter, if kind.is_empty() { "_" } else { kind })
}

fn outside(letter: char) -> bool {
    matches!(letter, 'O' | '.')
}

/// Whether an entity that includes the word before ends there.
fn ends(before: char, letter: char, other_type: bool) -> bool {
    match before {
        'E' | 'S' => true,
        'B' | 'I' if matches!(letter, 'B' | 'S' | 'O') => true,
        _ => !outside(before) && other_type,
    }
}

/// Whether an entity begins with this word.
fn begins(before: char, letter: char, other_type: bool) -> bool {
    match letter {
        'B' | 'S' => true,
        'E' | 'I' if matches!(before, 'E' | 'S' | 'O') => true,
        _ => !outside(letter) && other_type,
    }
}

/// Rows of class numbers, and the tags they stand for.
#[derive(Clone, Copy)]
pub(crate) struct Tagged<'a> {
    pub tags: &'a [String],
    pub predicted: &'a [Vec<usize>],
    pub targets: &'a [Vec<usize>],
}

impl<'a> Tagged<'a> {
    fn names(&self, row: &[usize]) -> Vec<&'a str> {
        row.iter().map(|&tag| self.tags[tag].as_str()).collect()
    }

    /// Predicted and expected entities of each row.
    fn entities(&self) -> impl Iterator<Item = (BTreeSet<Entity<'a>>, BTreeSet<Entity<'a>>)> + '_ {
        self.predicted
            .iter()
            .zip(self.targets)
            .map(|(predicted, targets)| {
                let of = |row: &[usize]| entities(&self.names(row)).into_iter().collect();
                (of(predicted), of(targets))
            })
    }
}

impl EntityMeasure {
    pub fn new(tagged: Tagged<'_>) -> EntityMeasure {
        let words = tagged.predicted.iter().zip(tagged.targets);
        let rows = tagged
            .entities()
            .zip(words)
            .map(|((predicted, expected), (words, targets))| RowCounts {
                entities: EntityCounts {
                    found: predicted.intersection(&expected).count() as u64,
                    predicted: predicted.len() as u64,
                    expected: expected.len() as u64,
                },
                words: targets.len() as u64,
                right_words: words.iter().zip(targets).filter(|(a, b)| a == b).count() as u64,
            })
            .collect();
        EntityMeasure { rows }
    }
}

impl EntityCounts {
    fn add(&mut self, other: EntityCounts, weight: u64) {
        self.found += weight * other.found;
        self.predicted += weight * other.predicted;
        self.expected += weight * other.expected;
    }

    /// Precision, recall and F1; 0 where there is nothing to divide by, as in seqeval.
    fn scores(&self) -> [f64; 3] {
        let share = |found: u64, all: u64| match all {
            0 => 0.0,
            _ => found as f64 / all as f64,
        };
        [
            share(self.found, self.predicted),
            share(self.found, self.expected),
            share(2 * self.found, self.predicted + self.expected),
        ]
    }
}

impl Measure for EntityMeasure {
    fn measure(&self, weights: &[u32]) -> Vec<Value> {
        let mut counts = EntityCounts::default();
        let (mut words, mut right) = (0, 0);
        for (row, &weight) in self.rows.iter().zip(weights) {
            let weight = u64::from(weight);
            counts.add(row.entities, weight);
            words += weight * row.words;
            right += weight * row.right_words;
        }
        let [precision, recall, f1] = counts.scores();
        let accuracy = match words {
            0 => Err("no word has a tag".into()),
            _ => Ok(right as f64 / words as f64),
        };
        vec![Ok(f1), Ok(precision), Ok(recall), accuracy]
    }
}

/// Each type of entity by itself, in alphabetical order.
pub fn entity_scores(
    tags: &[String],
    predicted: &[Vec<usize>],
    targets: &[Vec<usize>],
) -> Vec<EntityScores> {
    let tagged = Tagged {
        tags,
        predicted,
        targets,
    };
    let mut counts: BTreeMap<&str, EntityCounts> = BTreeMap::new();
    for (predicted, expected) in tagged.entities() {
        for entity in &predicted {
            let of_type = counts.entry(entity.0).or_default();
            of_type.predicted += 1;
            of_type.found += u64::from(expected.contains(entity));
        }
        for entity in &expected {
            counts.entry(entity.0).or_default().expected += 1;
        }
    }
    let scores = counts.into_iter().map(|(name, counts)| {
        let [precision, recall, f1] = counts.scores();
        EntityScores {
            name: name.to_owned(),
            support: counts.expected,
            predicted: counts.predicted,
            precision,
            recall,
            f1,
        }
    });
    scores.collect()
}
