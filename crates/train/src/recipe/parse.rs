//! TOML in, TOML out, and `--set` between.

use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

use super::extends::{Document, EXTENDS};
use super::{Key, KeyKind, Metric, Place, Problem, Recipe, RecipeError, ScheduleKind, keys};

impl Recipe {
    /// Reads the recipe at `path`, applies the `--set` assignments (`dotted.key=value`)
    /// in their order, checks everything and fills in what other keys decide.
    ///
    /// # Errors
    /// All problems at once: syntax, unknown keys (with the nearest known one), missing
    /// keys, wrong types, values out of range; each with file and line or the assignment.
    pub fn load(path: &Path, set: &[String]) -> Result<Recipe, RecipeError> {
        let text = std::fs::read_to_string(path).map_err(|source| RecipeError::Read {
            path: path.to_owned(),
            source,
        })?;
        Recipe::parse(&text, path, set)
    }

    /// As [`Recipe::load`], from `text`; `path` is what errors call it.
    pub fn parse(text: &str, path: &Path, set: &[String]) -> Result<Recipe, RecipeError> {
        let reader = Reader::new(path);
        let mut recipe = reader
            .read(text, set)
            .map_err(|problems| RecipeError::Problems { problems })?;
        recipe.resolve();
        Ok(recipe)
    }

    /// The recipe as TOML with every key spelled out; `command` becomes its first comment
    /// line. What it gives is read back as the same recipe.
    pub fn to_toml(&self, command: &str) -> String {
        let body = toml::to_string(self).expect("a recipe holds nothing that TOML cannot write");
        format!("# {command}\n{body}")
    }

    /// Fills in the keys whose defaults follow from others, and makes paths independent
    /// of the folder that the command was started in.
    fn resolve(&mut self) {
        let train = &mut self.train;
        let head = *train.head_learning_rate.get_or_insert(train.learning_rate);
        if !self.modality.streams().is_empty() {
            train.encoder_learning_rate.get_or_insert(head);
            train.projector_learning_rate.get_or_insert(head);
        }
        train
            .checkpoint_every_steps
            .get_or_insert(self.evaluate.every_steps);
        if train.schedule.warmup_steps.is_none() {
            train.schedule.warmup_fraction.get_or_insert(0.0);
        }
        if train.schedule.kind == ScheduleKind::Wsd && train.schedule.decay_steps.is_none() {
            train.schedule.decay_fraction.get_or_insert(0.2);
        }
        self.evaluate
            .metric
            .get_or_insert(Metric::default_of(self.task.kind));
        self.evaluate.micro_batch.get_or_insert(train.micro_batch);
        if let Ok(path) = std::path::absolute(&self.cohort.path) {
            self.cohort.path = path;
        }
        self.text.resolve();
    }
}

/// Spans of a document's values by dotted path.
type Spans = Vec<(String, Range<usize>)>;

/// Reads the file at `path`; a base is read by a reader of its own.
pub(super) struct Reader {
    pub path: PathBuf,
    pub keys: Vec<Key>,
}

impl Reader {
    pub fn new(path: &Path) -> Reader {
        Reader {
            path: path.to_owned(),
            keys: keys(),
        }
    }

    fn read(&self, text: &str, set: &[String]) -> Result<Recipe, Vec<Problem>> {
        let (mut table, mut places) = self.document(text)?.extended(self)?;
        let mut problems = Vec::new();
        for assignment in set {
            match self.assign(&mut table, assignment) {
                Ok((segments, _)) => {
                    places.insert(segments.join("."), Place::Set(assignment.clone()));
                }
                Err(mut found) => problems.append(&mut found),
            }
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        for key in self.keys.iter().filter(|key| key.required) {
            if lookup(&table, key.path).is_none() && !excused(&table, key.path) {
                let place = Place::File(self.path.clone(), None);
                problems.push(self.problem(
                    place,
                    key.path,
                    format!("`{}` is missing", key.path),
                    &format!("it is {}: {}", key.kind.describe(), key.doc.trim()),
                ));
            }
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let recipe = toml::Value::Table(table)
            .try_into::<Recipe>()
            .expect("each assignment was checked above");
        let place = |key: &str| {
            places
                .get(key)
                .cloned()
                .unwrap_or_else(|| Place::File(self.path.clone(), None))
        };
        let problems = super::validate::problems(&recipe, &place);
        if problems.is_empty() {
            Ok(recipe)
        } else {
            Err(problems)
        }
    }

    /// Reads one file: every key known, every value of its type.
    pub(super) fn document(&self, text: &str) -> Result<Document, Vec<Problem>> {
        let document = DeTable::parse(text).map_err(|error| {
            let line = error.span().map(|span| line_of(text, span.start));
            vec![self.problem(
                Place::File(self.path.clone(), line),
                "",
                error.message().to_owned(),
                "",
            )]
        })?;
        let mut spans = Spans::new();
        let mut problems = Vec::new();
        let place =
            |span: &Range<usize>| Place::File(self.path.clone(), Some(line_of(text, span.start)));
        self.walk(document.get_ref(), "", &mut spans, &place, &mut problems);
        if !problems.is_empty() {
            return Err(problems);
        }
        if let Err(error) = toml::from_str::<Recipe>(text) {
            let key = error.span().map_or("", |span| innermost(&spans, &span));
            let place = match error.span() {
                Some(span) => place(&span),
                None => Place::File(self.path.clone(), None),
            };
            return Err(vec![self.type_problem(place, key, error.message())]);
        }
        let places = spans.iter().map(|(path, span)| (path.clone(), place(span)));
        Ok(Document {
            places: places.collect(),
            table: text.parse().expect("the text was read as TOML above"),
        })
    }

    /// Records the span of every value and names the keys that a recipe does not have.
    fn walk(
        &self,
        table: &DeTable<'_>,
        prefix: &str,
        spans: &mut Spans,
        place: &dyn Fn(&Range<usize>) -> Place,
        problems: &mut Vec<Problem>,
    ) {
        for (name, value) in table {
            let path = format!("{prefix}{}", name.get_ref());
            spans.push((path.clone(), value.span()));
            let Some(key) = self.keys.iter().find(|key| key.path == path) else {
                problems.push(self.unknown(place(&name.span()), &path));
                continue;
            };
            if key.kind == KeyKind::Section {
                match value.get_ref() {
                    DeValue::Table(inner) => {
                        self.walk(inner, &format!("{path}."), spans, place, problems)
                    }
                    other => problems.push(self.problem(
                        place(&value.span()),
                        &path,
                        format!("`{path}` is a section, not {}", other.type_str()),
                        &format!("write `[{path}]` and its keys below it"),
                    )),
                }
            }
        }
    }

    /// Applies `dotted.key=value`; gives the key, segment by segment, and the value.
    pub(super) fn assign(
        &self,
        table: &mut toml::Table,
        assignment: &str,
    ) -> Result<(Vec<String>, toml::Value), Vec<Problem>> {
        let place = Place::Set(assignment.to_owned());
        let Some((name, raw)) = assignment.split_once('=') else {
            return Err(vec![self.problem(
                place,
                "",
                "there is no `=`".to_owned(),
                "write `--set section.key=value`",
            )]);
        };
        let (name, raw) = (name.trim(), raw.trim());
        if name == EXTENDS {
            return Err(vec![self.problem(
                place,
                name,
                "`extends` cannot be set: it says where the other keys are read".to_owned(),
                "write it into the recipe",
            )]);
        }
        let top = name.split_once('.').map_or(name, |(section, _)| section);
        let map_key = self
            .keys
            .iter()
            .find(|key| key.kind == KeyKind::Map && name.starts_with(&format!("{}.", key.path)));
        let Some(key) = map_key.or_else(|| self.keys.iter().find(|key| key.path == name)) else {
            return Err(vec![
                self.unknown(place, if name.is_empty() { top } else { name }),
            ]);
        };
        let quoted = raw.starts_with(['"', '\'']);
        let plain = match key.kind {
            KeyKind::Text => !quoted,
            KeyKind::TextOrList => !quoted && !raw.starts_with('['),
            KeyKind::TextOrInteger => !quoted && raw.parse::<i64>().is_err(),
            _ => false,
        };
        let expected = if map_key.is_some() {
            "a number"
        } else {
            key.kind.describe()
        };
        let parsed = |raw: &str| {
            let table = format!("value = {raw}").parse::<toml::Table>();
            table.ok().and_then(|mut table| table.remove("value"))
        };
        let value = if plain || (map_key.is_some() && parsed(raw).is_none()) {
            toml::Value::String(raw.to_owned())
        } else {
            match parsed(raw) {
                Some(value) => value,
                None => {
                    return Err(vec![self.problem(
                        place,
                        name,
                        format!("`{raw}` is not {expected}"),
                        "",
                    )]);
                }
            }
        };
        if key.kind == KeyKind::Section {
            let mut problems = Vec::new();
            let text = format!("{name} = {raw}");
            if let Ok(document) = DeTable::parse(&text) {
                self.walk(
                    document.get_ref(),
                    "",
                    &mut Spans::new(),
                    &|_| place.clone(),
                    &mut problems,
                );
            }
            if !problems.is_empty() {
                return Err(problems);
            }
        }

        let mut changed = table.clone();
        let segments: Vec<&str> = match map_key {
            // A pattern is one key, dots and all.
            Some(map) => {
                let pattern = name[map.path.len() + 1..].trim_matches(['"', '\'']);
                map.path.split('.').chain([pattern]).collect()
            }
            None => name.split('.').collect(),
        };
        insert(&mut changed, &segments, value.clone());
        // A command line cannot take a key away.
        if let Some(other) = replaced_by(name) {
            remove(&mut changed, other);
        }
        if let Err(error) = toml::Value::Table(changed.clone()).try_into::<Recipe>() {
            return Err(vec![self.type_problem(place, name, error.message())]);
        }
        *table = changed;
        let segments = segments.into_iter().map(str::to_owned).collect();
        Ok((segments, value))
    }

    pub(super) fn problem(&self, place: Place, key: &str, message: String, hint: &str) -> Problem {
        Problem {
            place,
            key: key.to_owned(),
            message,
            hint: hint.to_owned(),
        }
    }

    /// A value of the wrong type or an unknown choice, in words that name the key.
    fn type_problem(&self, place: Place, key: &str, message: &str) -> Problem {
        let message = message.trim();
        let mut quoted = message.split('`').skip(1).step_by(2);
        let hint = if message.starts_with("unknown variant") {
            let wrong = quoted.next().unwrap_or_default();
            nearest(wrong, quoted)
                .map_or(String::new(), |choice| format!("did you mean `{choice}`?"))
        } else {
            self.keys
                .iter()
                .find(|known| known.path == key)
                .map_or(String::new(), |known| {
                    format!("it is {}: {}", known.kind.describe(), known.doc.trim())
                })
        };
        let message = message.replace("unknown variant", "unknown choice");
        let message = if key.is_empty() {
            message
        } else {
            format!("`{key}`: {message}")
        };
        self.problem(place, key, message, &hint)
    }

    fn unknown(&self, place: Place, path: &str) -> Problem {
        let (section, name) = path.rsplit_once('.').unwrap_or(("", path));
        let siblings: Vec<&str> = self
            .keys
            .iter()
            .filter(|key| key.path.rsplit_once('.').map_or("", |(section, _)| section) == section)
            .map(|key| key.path)
            .collect();
        let last = |path: &str| path.rsplit('.').next().unwrap_or_default().to_owned();
        let here = nearest(
            name,
            siblings
                .iter()
                .map(|path| last(path))
                .collect::<Vec<_>>()
                .iter()
                .map(String::as_str),
        )
        .map(|found| {
            if section.is_empty() {
                found.to_owned()
            } else {
                format!("{section}.{found}")
            }
        });
        let elsewhere = || {
            self.keys
                .iter()
                .map(|key| key.path)
                .find(|path| last(path) == name && path.contains('.'))
                .map(str::to_owned)
        };
        let full = || nearest(path, self.keys.iter().map(|key| key.path)).map(str::to_owned);
        let hint = match elsewhere().or(here).or_else(full) {
            Some(known) => format!("did you mean `{known}`?"),
            None if siblings.is_empty() => format!(
                "the sections are {}",
                join(
                    self.keys
                        .iter()
                        .filter(|key| key.kind == KeyKind::Section && !key.path.contains('.'))
                        .map(|key| key.path)
                )
            ),
            None => format!(
                "{} {}",
                if section.is_empty() {
                    "a recipe has".to_owned()
                } else {
                    format!("[{section}] has")
                },
                join(
                    siblings
                        .iter()
                        .map(|path| path.rsplit('.').next().unwrap_or_default())
                )
            ),
        };
        self.problem(place, path, format!("unknown key `{path}`"), &hint)
    }
}

/// The candidate nearest to what was written, if one is near.
fn nearest<'a>(written: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|candidate| {
            (
                strsim::normalized_damerau_levenshtein(written, candidate),
                candidate,
            )
        })
        .filter(|(likeness, _)| *likeness >= 0.6)
        .max_by(|(one, _), (other, _)| one.total_cmp(other))
        .map(|(_, candidate)| candidate)
}

fn join<'a>(names: impl Iterator<Item = &'a str>) -> String {
    names
        .map(|name| format!("`{name}`"))
        .collect::<Vec<_>>()
        .join(", ")
}

fn line_of(text: &str, offset: usize) -> usize {
    text.as_bytes()[..offset.min(text.len())]
        .iter()
        .filter(|byte| **byte == b'\n')
        .count()
        + 1
}

/// The key of the smallest value that holds `span`.
fn innermost<'a>(spans: &'a Spans, span: &Range<usize>) -> &'a str {
    spans
        .iter()
        .filter(|(_, outer)| outer.start <= span.start && span.end <= outer.end)
        .min_by_key(|(_, outer)| outer.len())
        .map_or("", |(path, _)| path.as_str())
}

/// Required keys that other keys make unnecessary.
pub(super) const EXCUSABLE: [&str; 2] = ["cohort.path", "task.labels"];

/// Whether a required key is not needed: files of text replace a cohort, and rows that carry their own
/// targets the labels.
fn excused(table: &toml::Table, path: &str) -> bool {
    let text = ["train", "tuning", "held_out"]
        .iter()
        .any(|name| lookup(table, &format!("text.{name}")).is_some());
    let kind = lookup(table, "task.kind").and_then(toml::Value::as_str);
    match path {
        "cohort.path" => text,
        "task.labels" => text || matches!(kind, Some("tokens" | "causal_lm")),
        _ => false,
    }
}

pub(super) fn lookup<'a>(table: &'a toml::Table, path: &str) -> Option<&'a toml::Value> {
    match path.split_once('.') {
        None => table.get(path),
        Some((section, rest)) => lookup(table.get(section)?.as_table()?, rest),
    }
}

/// The key that a key replaces: a length is given in steps or as a share.
pub(super) fn replaced_by(key: &str) -> Option<&'static str> {
    match key {
        "train.schedule.warmup_steps" => Some("train.schedule.warmup_fraction"),
        "train.schedule.warmup_fraction" => Some("train.schedule.warmup_steps"),
        "train.schedule.decay_steps" => Some("train.schedule.decay_fraction"),
        "train.schedule.decay_fraction" => Some("train.schedule.decay_steps"),
        _ => None,
    }
}

/// Takes a key away, if it is there.
pub(super) fn remove(table: &mut toml::Table, path: &str) {
    match path.split_once('.') {
        None => {
            table.remove(path);
        }
        Some((section, rest)) => {
            if let Some(inner) = table.get_mut(section).and_then(toml::Value::as_table_mut) {
                remove(inner, rest);
            }
        }
    }
}

fn insert(table: &mut toml::Table, segments: &[&str], value: toml::Value) {
    match segments {
        [] => {}
        [last] => {
            table.insert((*last).to_owned(), value);
        }
        [section, rest @ ..] => {
            let entry = table
                .entry((*section).to_owned())
                .or_insert_with(|| toml::Value::Table(toml::Table::new()));
            if !entry.is_table() {
                *entry = toml::Value::Table(toml::Table::new());
            }
            if let Some(inner) = entry.as_table_mut() {
                insert(inner, rest, value);
            }
        }
    }
}

#[cfg(test)]
#[path = "parse_tests.rs"]
mod tests;
