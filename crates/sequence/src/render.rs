//! A patient's visible rows as text.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::Arc;

use calor_records::{BIRTH_CODE, CodeTable, Event, Patient};

use crate::calendar::{Age, length_phrase};
use crate::numbers::format_value;
use crate::options::{Intervals, NumberStyle, Repeat, SequenceOptions};
use crate::statistics::{CodeStatistics, ValueStatistics};
use crate::stream::{Collector, DraftItems};

/// Share of a code's interquartile range by which the latest value must differ from the mean of
/// the earlier ones to count as rising or falling.
const TREND_SHARE: f64 = 0.25;

/// Turns patients into [`Rendered`] text. One per thread: it remembers what codes look like.
pub(crate) struct Renderer<'a> {
    codes: &'a CodeTable,
    statistics: &'a ValueStatistics,
    options: &'a SequenceOptions,
    known: HashMap<Arc<str>, Arc<CodeText<'a>>>,
    collector: Collector<'a>,
}

/// The visible part of a patient at one prediction time, in pieces that can be left out.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Rendered {
    pub prediction_time_us: i64,
    /// Age and sex: `67 year old man`.
    pub header: String,
    /// Rows without time, in the file's order.
    pub statics: Vec<String>,
    /// In time order.
    pub units: Vec<Unit>,
    /// What becomes soft tokens.
    pub items: DraftItems,
}

/// What is kept or dropped as a whole: a row, or the rows of one code in one group.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Unit {
    /// Time of its first row.
    pub time_us: i64,
    /// The day, hour or minute since 1970.
    pub group: i64,
    pub site: Option<Arc<str>>,
    pub body: String,
    pub rows: u32,
}

struct CodeText<'a> {
    /// The description with single spaces.
    phrase: String,
    role: Role,
    statistics: Option<&'a CodeStatistics>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Birth,
    /// The code itself names the sex: `GENDER//F`.
    Sex(Sex),
    /// The text value may name the sex: `GENDER` with `F`.
    SexInText,
    Excluded,
    Event,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sex {
    Female,
    Male,
}

impl<'a> Renderer<'a> {
    pub(crate) fn new(
        codes: &'a CodeTable,
        statistics: &'a ValueStatistics,
        options: &'a SequenceOptions,
    ) -> Self {
        Renderer {
            codes,
            statistics,
            options,
            known: HashMap::new(),
            collector: Collector::new(statistics, options),
        }
    }

    /// Renders what is visible at `prediction_time_us`: rows without time and rows up to and
    /// including that time. Later rows are not looked at.
    pub(crate) fn render(&mut self, patient: &Patient, prediction_time_us: i64) -> Rendered {
        let mut birth_us = None;
        let mut sex = None;
        let mut statics = Vec::new();
        let mut rows: Vec<Row<'_, 'a>> = Vec::new();
        let visible = patient.events_until(prediction_time_us);
        let written = visible
            .iter()
            // A row that points to a file says what it has to say through the file.
            .filter(|event| self.options.text && event.items.is_none())
            .filter(|event| self.options.sees(event));
        for event in written {
            let text = self.code_text(&event.code);
            match text.role {
                Role::Excluded => continue,
                Role::Birth => {
                    birth_us = birth_us.or(event.time_us);
                    continue;
                }
                Role::Sex(named) => {
                    sex.get_or_insert(named);
                    continue;
                }
                Role::SexInText => {
                    if let Some(named) = event.text_value.as_deref().and_then(Sex::parse) {
                        sex.get_or_insert(named);
                        continue;
                    }
                }
                Role::Event => {}
            }
            match event.time_us {
                None => {
                    let mut body = text.phrase.clone();
                    self.push_value(&mut body, &text, event);
                    statics.push(body);
                }
                Some(time_us) => rows.push(Row {
                    time_us,
                    event,
                    text,
                    repeats: None,
                }),
            }
        }
        if self.options.repeat == Repeat::Latest {
            rows = latest(rows, self.options.sites);
        }
        let age = birth_us.and_then(|birth_us| Age::at(prediction_time_us, birth_us));
        Rendered {
            prediction_time_us,
            header: header(age, sex),
            statics,
            units: self.units(&rows),
            items: self.collector.collect(patient, prediction_time_us),
        }
    }

    /// Joins rows of one group that carry the same code, where the first of them stands.
    fn units(&self, rows: &[Row<'_, 'a>]) -> Vec<Unit> {
        let step = self.options.time_resolution.microseconds();
        let mut units: Vec<Unit> = Vec::with_capacity(rows.len());
        // Where in `units` a code of the current group stands, with the value written last.
        let mut open: HashMap<(&str, Option<&str>), (usize, String)> = HashMap::new();
        let mut value = String::new();
        for row in rows {
            let group = row.time_us.div_euclid(step);
            if units.last().is_some_and(|last| last.group != group) {
                open.clear();
            }
            let site = row.event.site.as_ref().filter(|_| self.options.sites);
            value.clear();
            self.push_repeats(&mut value, row);
            self.push_value(&mut value, &row.text, row.event);
            // Notes stay units of their own.
            let key = (&*row.event.code, site.map(|site| &**site));
            if row.event.text_value.is_none() {
                if let Some((position, last)) = open.get_mut(&key) {
                    let unit = &mut units[*position];
                    unit.rows += 1;
                    if *last != value {
                        unit.body.push_str(&value);
                        last.clone_from(&value);
                    }
                    continue;
                }
                open.insert(key, (units.len(), value.clone()));
            }
            units.push(Unit {
                time_us: row.time_us,
                group,
                site: site.cloned(),
                body: format!("{}{value}", row.text.phrase),
                rows: row.repeats.as_ref().map_or(1, |repeats| repeats.count),
            });
        }
        units
    }

    /// Appends ` word value text`, each where it is there.
    fn push_value(&self, body: &mut String, text: &CodeText<'_>, event: &Event) {
        if let Some(value) = event.numeric_value.filter(|value| value.is_finite()) {
            let style = self.options.numbers;
            let word = text
                .statistics
                .filter(|_| style != NumberStyle::Value && !self.statistics.levels.is_empty())
                .and_then(|statistics| {
                    let interval = statistics.interval_of(&self.statistics.levels, value);
                    self.options.quantile_words.get(interval)
                });
            if let Some(word) = word {
                push_words(body, word);
            }
            if word.is_none() || style != NumberStyle::Word {
                body.push(' ');
                body.push_str(&format_value(value));
            }
        }
        if let Some(note) = &event.text_value {
            push_words(body, note);
        }
    }

    /// Appends ` 14 times rising` for a row that stands for several.
    fn push_repeats(&self, body: &mut String, row: &Row<'_, 'a>) {
        let Some(repeats) = row.repeats.as_ref().filter(|repeats| repeats.count > 1) else {
            return;
        };
        write!(body, " {} times", repeats.count).expect("a string takes all text");
        let spread = row
            .text
            .statistics
            .map_or(0.0, |statistics| f64::from(statistics.interquartile_range));
        let latest = row.event.numeric_value.filter(|value| value.is_finite());
        if let (Some(latest), true) = (latest, repeats.earlier_values > 0 && spread > 0.0) {
            let mean = repeats.earlier_sum / f64::from(repeats.earlier_values);
            let difference = f64::from(latest) - mean;
            if difference > TREND_SHARE * spread {
                body.push_str(" rising");
            } else if difference < -TREND_SHARE * spread {
                body.push_str(" falling");
            }
        }
    }

    fn code_text(&mut self, code: &Arc<str>) -> Arc<CodeText<'a>> {
        if let Some(text) = self.known.get(code) {
            return text.clone();
        }
        let readable = code.replace("//", " ").replace('_', " ");
        // A description or code of nothing but blanks says nothing: the next one is taken.
        let phrase = [self.codes.description(code).unwrap_or(""), &readable, code]
            .into_iter()
            .map(|candidate| {
                let mut words = String::new();
                push_words(&mut words, candidate);
                words.trim_start().to_string()
            })
            .find(|words| !words.is_empty())
            .unwrap_or_else(|| "event".to_string());
        let text = Arc::new(CodeText {
            phrase,
            role: if self.options.excludes(code) || self.only_in_series(code) {
                Role::Excluded
            } else {
                Role::of(code)
            },
            statistics: self.statistics.codes.get(&**code),
        });
        self.known.insert(code.clone(), text.clone());
        text
    }

    /// Whether the rows of a code are values of a series that is not written as text as well.
    fn only_in_series(&self, code: &str) -> bool {
        self.collector.has_variable(code)
            && self
                .options
                .streams
                .iter()
                .any(|stream| stream.modality == calor_records::Modality::Series && !stream.in_text)
    }
}

impl Role {
    fn of(code: &str) -> Role {
        if code == BIRTH_CODE {
            return Role::Birth;
        }
        let (family, value) = code.split_once("//").unwrap_or((code, ""));
        if !family.eq_ignore_ascii_case("gender") && !family.eq_ignore_ascii_case("sex") {
            return Role::Event;
        }
        match (value, Sex::parse(value)) {
            ("", _) => Role::SexInText,
            (_, Some(sex)) => Role::Sex(sex),
            (_, None) => Role::Event,
        }
    }
}

impl Sex {
    fn parse(name: &str) -> Option<Sex> {
        match name.trim().to_ascii_lowercase().as_str() {
            "f" | "female" | "woman" => Some(Sex::Female),
            "m" | "male" | "man" => Some(Sex::Male),
            _ => None,
        }
    }
}

/// A visible dated row.
struct Row<'p, 'a> {
    time_us: i64,
    event: &'p Event,
    text: Arc<CodeText<'a>>,
    /// With `repeat = "latest"`: what the earlier rows of the code were.
    repeats: Option<Repeats>,
}

#[derive(Default)]
struct Repeats {
    count: u32,
    earlier_values: u32,
    earlier_sum: f64,
    latest_value: Option<f32>,
}

/// Keeps the latest row of each code (and site), with what came before it; notes are all kept.
fn latest<'p, 'a>(rows: Vec<Row<'p, 'a>>, by_site: bool) -> Vec<Row<'p, 'a>> {
    let mut streams: HashMap<(&str, Option<&str>), (usize, Repeats)> = HashMap::new();
    for (position, row) in rows.iter().enumerate() {
        if row.event.text_value.is_some() {
            continue;
        }
        let site = row.event.site.as_deref().filter(|_| by_site);
        let (last, repeats) = streams.entry((&row.event.code, site)).or_default();
        *last = position;
        repeats.count += 1;
        if let Some(before) = repeats.latest_value.take() {
            repeats.earlier_values += 1;
            repeats.earlier_sum += f64::from(before);
        }
        repeats.latest_value = row.event.numeric_value.filter(|value| value.is_finite());
    }
    let mut ends: HashMap<usize, Repeats> = streams.into_values().collect();
    rows.into_iter()
        .enumerate()
        .filter_map(|(position, mut row)| {
            row.repeats = ends.remove(&position);
            (row.repeats.is_some() || row.event.text_value.is_some()).then_some(row)
        })
        .collect()
}

fn header(age: Option<Age>, sex: Option<Sex>) -> String {
    let adult = age.is_none_or(Age::is_adult);
    let noun = match (sex, adult) {
        (Some(Sex::Female), true) => "woman",
        (Some(Sex::Female), false) => "girl",
        (Some(Sex::Male), true) => "man",
        (Some(Sex::Male), false) => "boy",
        (None, _) => "patient",
    };
    match age {
        Some(age) => format!("{} {noun}", age.phrase()),
        None => noun.to_string(),
    }
}

/// Appends each word of `text` after a space; control characters count as spaces.
fn push_words(body: &mut String, text: &str) {
    let words = text
        .split(|c: char| c.is_whitespace() || c.is_control())
        .filter(|word| !word.is_empty());
    for word in words {
        body.push(' ');
        body.push_str(word);
    }
}

impl Rendered {
    /// The header with the first `statics` static rows: `67 year old man, race white.`
    pub(crate) fn header_text(&self, statics: usize) -> String {
        let mut text = self.header.clone();
        for fact in &self.statics[..statics] {
            end_with(&mut text, ',');
            text.push(' ');
            text.push_str(fact);
        }
        end_with(&mut text, '.');
        text
    }

    /// A unit with the phrases before it and the mark behind it, given the units around it.
    pub(crate) fn unit_text(
        &self,
        unit: &Unit,
        before: Option<&Unit>,
        after: Option<&Unit>,
        options: &SequenceOptions,
    ) -> String {
        let mut text = String::new();
        let mut push = |phrase: &str| {
            if !text.is_empty() {
                text.push(' ');
            }
            text.push_str(phrase);
        };
        let opens_group = before.is_none_or(|before| before.group != unit.group);
        if opens_group && let Some(phrase) = self.interval(unit, before, options) {
            push(&phrase);
        }
        if let Some(site) = &unit.site {
            let same = before.is_some_and(|before| before.site.as_ref() == Some(site));
            if opens_group || !same {
                let mut words = String::new();
                push_words(&mut words, &site.replace('_', " "));
                words.push(':');
                push(words.trim_start());
            }
        }
        push(&unit.body);
        let closes_group = after.is_none_or(|after| after.group != unit.group);
        end_with(&mut text, if closes_group { '.' } else { ',' });
        text
    }

    fn interval(
        &self,
        unit: &Unit,
        before: Option<&Unit>,
        options: &SequenceOptions,
    ) -> Option<String> {
        let resolution = options.time_resolution;
        let ago = || match length_phrase(unit.time_us, self.prediction_time_us, resolution) {
            Some(length) => format!("{length} ago"),
            None => "now".to_string(),
        };
        match (options.intervals, before) {
            (Intervals::None, _) => None,
            (Intervals::Before, _) | (Intervals::Between, None) => Some(ago()),
            (Intervals::Between, Some(before)) => {
                length_phrase(before.time_us, unit.time_us, resolution)
                    .map(|length| format!("{length} later"))
            }
        }
    }

    /// The text of the header and of some of the units, separated by single spaces.
    pub(crate) fn compose(
        &self,
        statics: usize,
        units: &[&Unit],
        options: &SequenceOptions,
    ) -> String {
        let mut text = self.header_text(statics);
        for (position, unit) in units.iter().enumerate() {
            let before = position.checked_sub(1).map(|before| units[before]);
            let after = units.get(position + 1).copied();
            text.push(' ');
            text.push_str(&self.unit_text(unit, before, after, options));
        }
        text
    }
}

/// Closes a phrase, unless it closes itself.
fn end_with(text: &mut String, mark: char) {
    if !text.ends_with(['.', ',', ';', ':', '!', '?']) {
        text.push(mark);
    }
}

#[cfg(test)]
#[path = "render_tests.rs"]
mod tests;
