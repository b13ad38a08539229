//! What chat templates expect of Python: how values are printed, methods of text and mappings,
//! `json.dumps` and `strftime`.

use std::sync::Arc;

use minijinja::value::{Enumerator, Object, ObjectRepr, ValueKind, from_args};
use minijinja::{Error, ErrorKind, Output, State, Value as Jinja, escape_formatter};
use serde_json::Value;

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];

/// A mapping that keeps the order of its keys, as Python's do.
#[derive(Debug)]
struct Ordered(Vec<(String, Jinja)>);

impl Object for Ordered {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Map
    }

    fn get_value(self: &Arc<Self>, key: &Jinja) -> Option<Jinja> {
        let key = key.as_str()?;
        let found = self.0.iter().find(|(name, _)| name == key);
        found.map(|(_, value)| value.clone())
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        let keys = self.0.iter().map(|(name, _)| Jinja::from(name.as_str()));
        Enumerator::Values(keys.collect())
    }
}

/// JSON as a template sees it.
pub(super) fn value(json: &Value) -> Jinja {
    match json {
        Value::Array(values) => values.iter().map(value).collect(),
        Value::Object(entries) => {
            let entries = entries.iter();
            let entries = entries.map(|(key, found)| (key.clone(), value(found)));
            Jinja::from_object(Ordered(entries.collect()))
        }
        plain => Jinja::from_serialize(plain),
    }
}

/// Prints as Python does: `None`, `True` and `False`.
pub(super) fn print(output: &mut Output, state: &State, value: &Jinja) -> Result<(), Error> {
    match value.kind() {
        ValueKind::None => output.write_str("None")?,
        ValueKind::Bool if value.is_true() => output.write_str("True")?,
        ValueKind::Bool => output.write_str("False")?,
        _ => return escape_formatter(output, state, value),
    }
    Ok(())
}

/// The methods of `str` and `dict` that templates call.
pub(super) fn method(
    _: &State,
    value: &Jinja,
    name: &str,
    arguments: &[Jinja],
) -> Result<Jinja, Error> {
    match (value.kind(), value.as_str()) {
        (ValueKind::String, Some(text)) => of_text(text, name, arguments),
        (ValueKind::Map, _) => of_mapping(value, name, arguments),
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}

fn of_text(text: &str, name: &str, arguments: &[Jinja]) -> Result<Jinja, Error> {
    let characters = |from: fn(&str, &dyn Fn(char) -> bool) -> String| {
        let (set,): (Option<&str>,) = from_args(arguments)?;
        let within = |letter: char| match set {
            Some(set) => set.contains(letter),
            None => letter.is_whitespace(),
        };
        Ok(Jinja::from(from(text, &within)))
    };
    match name {
        "strip" => characters(|text, within| text.trim_matches(within).to_owned()),
        "lstrip" => characters(|text, within| text.trim_start_matches(within).to_owned()),
        "rstrip" => characters(|text, within| text.trim_end_matches(within).to_owned()),
        "startswith" => {
            let (start,): (&str,) = from_args(arguments)?;
            Ok(text.starts_with(start).into())
        }
        "endswith" => {
            let (end,): (&str,) = from_args(arguments)?;
            Ok(text.ends_with(end).into())
        }
        "split" => {
            let (separator, most): (Option<&str>, Option<usize>) = from_args(arguments)?;
            let parts: Vec<&str> = match (separator, most) {
                (None, _) => text.split_whitespace().collect(),
                (Some(separator), None) => text.split(separator).collect(),
                (Some(separator), Some(most)) => text.splitn(most + 1, separator).collect(),
            };
            Ok(parts.into_iter().map(Jinja::from).collect())
        }
        "replace" => {
            let (from, to, most): (&str, &str, Option<usize>) = from_args(arguments)?;
            Ok(match most {
                Some(most) => text.replacen(from, to, most),
                None => text.replace(from, to),
            }
            .into())
        }
        "upper" => Ok(text.to_uppercase().into()),
        "lower" => Ok(text.to_lowercase().into()),
        "capitalize" => Ok(capitalized(text).into()),
        "title" => {
            let words = text.split_inclusive(|letter: char| !letter.is_alphabetic());
            Ok(words.map(capitalized).collect::<String>().into())
        }
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}

fn capitalized(text: &str) -> String {
    let mut letters = text.chars();
    let first = letters.next().map(char::to_uppercase);
    first
        .into_iter()
        .flatten()
        .chain(letters.flat_map(char::to_lowercase))
        .collect()
}

fn of_mapping(value: &Jinja, name: &str, arguments: &[Jinja]) -> Result<Jinja, Error> {
    let entries = || -> Result<Vec<(Jinja, Jinja)>, Error> {
        value
            .try_iter()?
            .map(|key| Ok((key.clone(), value.get_item(&key)?)))
            .collect()
    };
    match name {
        "items" => Ok(entries()?
            .into_iter()
            .map(|(key, value)| Jinja::from(vec![key, value]))
            .collect()),
        "keys" => Ok(entries()?.into_iter().map(|(key, _)| key).collect()),
        "values" => Ok(entries()?.into_iter().map(|(_, value)| value).collect()),
        "get" => {
            let (key, default): (Jinja, Option<Jinja>) = from_args(arguments)?;
            let found = value.get_item(&key)?;
            Ok(match found.is_undefined() {
                true => default.unwrap_or_else(|| Jinja::from(())),
                false => found,
            })
        }
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}

/// As `json.dumps(…, ensure_ascii=False, indent=width)` writes it.
pub(super) fn write_json(value: &Value, width: Option<usize>, depth: usize, text: &mut String) {
    let break_line = |depth: usize, text: &mut String| {
        if let Some(width) = width {
            text.push('\n');
            text.extend(std::iter::repeat_n(' ', width * depth));
        }
    };
    let separator = if width.is_some() { "," } else { ", " };
    match value {
        Value::Array(values) if !values.is_empty() => {
            text.push('[');
            for (position, value) in values.iter().enumerate() {
                text.push_str(if position > 0 { separator } else { "" });
                break_line(depth + 1, text);
                write_json(value, width, depth + 1, text);
            }
            break_line(depth, text);
            text.push(']');
        }
        Value::Object(entries) if !entries.is_empty() => {
            text.push('{');
            for (position, (key, value)) in entries.iter().enumerate() {
                text.push_str(if position > 0 { separator } else { "" });
                break_line(depth + 1, text);
                text.push_str(&Value::from(key.as_str()).to_string());
                text.push_str(": ");
                write_json(value, width, depth + 1, text);
            }
            break_line(depth, text);
            text.push('}');
        }
        other => text.push_str(&other.to_string()),
    }
}

/// A day of the calendar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Day {
    year: usize,
    /// From 1.
    month: usize,
    day: usize,
}

impl Day {
    /// Of `2024-07-26`.
    pub fn parse(text: &str) -> Option<Day> {
        let mut numbers = text.split('-').map(|part| part.parse::<usize>().ok());
        let (year, month, day) = (numbers.next()??, numbers.next()??, numbers.next()??);
        let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let days = match month {
            2 if leap => 29,
            2 => 28,
            4 | 6 | 9 | 11 => 30,
            1..=12 => 31,
            _ => return None,
        };
        let right = numbers.next().is_none() && (1..=9999).contains(&year);
        (right && (1..=days).contains(&day)).then_some(Day { year, month, day })
    }

    /// Sunday is 0 (Sakamoto's method).
    fn weekday(self) -> usize {
        const OFFSETS: [usize; 12] = [0, 3, 2, 5, 0, 3, 5, 1, 4, 6, 2, 4];
        let year = self.year - usize::from(self.month < 3);
        (year + year / 4 - year / 100 + year / 400 + OFFSETS[self.month - 1] + self.day) % 7
    }

    /// Python's directives of a day; those of a time are midnight's.
    pub fn strftime(self, format: &str) -> String {
        let Day { year, month, day } = self;
        let (month_name, weekday) = (MONTHS[month - 1], WEEKDAYS[self.weekday()]);
        let mut text = String::new();
        let mut letters = format.chars();
        while let Some(letter) = letters.next() {
            if letter != '%' {
                text.push(letter);
                continue;
            }
            match letters.next() {
                Some('d') => text.push_str(&format!("{day:02}")),
                Some('-') => {
                    let number = match letters.next() {
                        Some('m') => month,
                        Some('d') => day,
                        _ => 0,
                    };
                    text.push_str(&number.to_string());
                }
                Some('b') => text.push_str(&month_name[..3]),
                Some('B') => text.push_str(month_name),
                Some('a') => text.push_str(&weekday[..3]),
                Some('A') => text.push_str(weekday),
                Some('m') => text.push_str(&format!("{month:02}")),
                Some('y') => text.push_str(&format!("{:02}", year % 100)),
                Some('Y') => text.push_str(&format!("{year:04}")),
                Some('H' | 'M' | 'S') => text.push_str("00"),
                Some(other) => text.push(other),
                None => text.push('%'),
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn days_are_told_as_strftime_tells_them() {
        let day = Day::parse("2024-07-26").unwrap();
        assert_eq!(day.strftime("%A, %d %B %Y %%"), "Friday, 26 July 2024 %");
        let leap = Day::parse("2000-02-29").unwrap();
        assert_eq!(leap.strftime("%a %-d.%-m.%y %H:%M"), "Tue 29.2.00 00:00");
        for wrong in ["2023-02-29", "2024-13-01", "2024-1", "x", "2024-01-01-1"] {
            assert_eq!(Day::parse(wrong), None, "{wrong}");
        }
    }

    /// Expected: `json.dumps(value, ensure_ascii=False)`, and with `indent=2`.
    #[test]
    fn json_is_written_as_python_writes_it() {
        let value = json!({"a": [1, 2.5, "é<"], "b": {}, "c": null});
        let mut text = String::new();
        write_json(&value, None, 0, &mut text);
        assert_eq!(text, "{\"a\": [1, 2.5, \"é<\"], \"b\": {}, \"c\": null}");
        text.clear();
        write_json(&value, Some(2), 0, &mut text);
        assert_eq!(
            text,
            "{\n  \"a\": [\n    1,\n    2.5,\n    \"é<\"\n  ],\n  \"b\": {},\n  \"c\": null\n}"
        );
    }
}
