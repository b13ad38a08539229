//! Rows of text files: JSON lines, and words with their tags one a line.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::SequenceError;

/// How rows are told apart in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// An object a line.
    JsonLines,
    /// A word and its tag a line, the word first and the tag last, separated by white space; an
    /// empty line after each sentence (CoNLL).
    Conll,
}

/// A row as it stands in a file.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct RawRow {
    /// Its first line, from 1.
    pub line: usize,
    pub text: String,
}

/// What a row says.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Row {
    /// Objects with `role` and `content`.
    Messages(Vec<Value>),
    Pair {
        prompt: String,
        response: String,
    },
    Text(String),
    Labelled {
        text: String,
        label: String,
    },
    Tagged {
        words: Vec<String>,
        tags: Vec<String>,
    },
}

/// What rows have to say for a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    Language,
    Class,
    Tags,
}

impl Format {
    /// By the name of the file.
    pub fn of(path: &Path) -> Format {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("jsonl" | "json" | "ndjson") => Format::JsonLines,
            _ => Format::Conll,
        }
    }
}

/// The rows of a file, one after the other.
pub(crate) struct Rows {
    path: PathBuf,
    format: Format,
    lines: std::io::Lines<BufReader<File>>,
    line: usize,
}

impl Rows {
    pub fn open(path: &Path, format: Format) -> Result<Rows, SequenceError> {
        let file = File::open(path).map_err(|error| SequenceError::io(path, error))?;
        Ok(Rows {
            path: path.to_path_buf(),
            format,
            lines: BufReader::with_capacity(1 << 18, file).lines(),
            line: 0,
        })
    }

    /// At most so many rows; none at the end.
    pub fn some(&mut self, most: usize) -> Result<Vec<RawRow>, SequenceError> {
        let mut rows = Vec::new();
        let mut sentence: Option<RawRow> = None;
        while rows.len() < most {
            let Some(line) = self.lines.next() else {
                rows.extend(sentence.take());
                break;
            };
            self.line += 1;
            let mut text = line.map_err(|error| match error.kind() {
                std::io::ErrorKind::InvalidData => SequenceError::Row {
                    path: self.path.clone(),
                    line: self.line,
                    problem: "is not UTF-8".to_owned(),
                },
                _ => SequenceError::io(&self.path, error),
            })?;
            if self.line == 1
                && let Some(rest) = text.strip_prefix('\u{feff}')
            {
                text = rest.to_owned();
            }
            let empty = text.trim().is_empty();
            match (self.format, &mut sentence) {
                (Format::JsonLines, _) if empty => {}
                (Format::JsonLines, _) => rows.push(RawRow {
                    line: self.line,
                    text,
                }),
                (Format::Conll, sentence) if empty || text.starts_with("-DOCSTART-") => {
                    rows.extend(sentence.take());
                }
                (Format::Conll, Some(sentence)) => {
                    sentence.text.push('\n');
                    sentence.text.push_str(&text);
                }
                (Format::Conll, none) => {
                    *none = Some(RawRow {
                        line: self.line,
                        text,
                    });
                }
            }
        }
        Ok(rows)
    }
}

impl RawRow {
    /// Reads the row; a problem is told without its words.
    pub fn parse(&self, format: Format, wanted: Wanted) -> Result<Row, String> {
        if format == Format::Conll {
            return self.words();
        }
        let row: Map<String, Value> = match serde_json::from_str(&self.text) {
            Ok(Value::Object(row)) => row,
            Ok(_) => return Err("is no JSON object".to_owned()),
            Err(error) => return Err(format!("is no JSON (column {})", error.column())),
        };
        match wanted {
            Wanted::Language => language(&row),
            Wanted::Class => Ok(Row::Labelled {
                text: text(&row, "text")?,
                label: match row.get("label") {
                    Some(Value::String(label)) => label.clone(),
                    Some(label @ (Value::Bool(_) | Value::Number(_))) => label.to_string(),
                    _ => return Err("has no `label`: a text, a number, true or false".to_owned()),
                },
            }),
            Wanted::Tags => {
                let words = texts(&row, "tokens")?;
                let tags = texts(&row, "tags")?;
                if words.len() != tags.len() {
                    return Err(format!(
                        "has {} `tokens` and {} `tags`",
                        words.len(),
                        tags.len()
                    ));
                }
                if words.is_empty() {
                    return Err("has no `tokens`".to_owned());
                }
                Ok(Row::Tagged { words, tags })
            }
        }
    }

    fn words(&self) -> Result<Row, String> {
        let (mut words, mut tags) = (Vec::new(), Vec::new());
        for (offset, line) in self.text.lines().enumerate() {
            let mut fields = line.split_whitespace();
            let (Some(word), Some(tag)) = (fields.next(), fields.next_back()) else {
                return Err(format!(
                    "breaks off in line {}: a word and its tag are expected",
                    self.line + offset
                ));
            };
            words.push(word.to_owned());
            tags.push(tag.to_owned());
        }
        Ok(Row::Tagged { words, tags })
    }
}

fn language(row: &Map<String, Value>) -> Result<Row, String> {
    if let Some(messages) = row.get("messages") {
        let messages = messages
            .as_array()
            .filter(|messages| !messages.is_empty())
            .ok_or("has `messages` that are no list, or an empty one")?;
        for (number, message) in messages.iter().enumerate() {
            for key in ["role", "content"] {
                if !message[key].is_string() {
                    return Err(format!("has no text in `{key}` of message {}", number + 1));
                }
            }
        }
        return Ok(Row::Messages(messages.clone()));
    }
    if row.contains_key("prompt") {
        let response = match row.contains_key("completion") {
            true => text(row, "completion")?,
            false => text(row, "response")?,
        };
        return Ok(Row::Pair {
            prompt: text(row, "prompt")?,
            response,
        });
    }
    match row.contains_key("text") {
        true => text(row, "text").map(Row::Text),
        false => Err("has neither `messages` nor `prompt` and `response` nor `text`".to_owned()),
    }
}

fn text(row: &Map<String, Value>, key: &str) -> Result<String, String> {
    match row.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(_) => Err(format!("has something else than text in `{key}`")),
        None => Err(format!("has no `{key}`")),
    }
}

fn texts(row: &Map<String, Value>, key: &str) -> Result<Vec<String>, String> {
    let list = row
        .get(key)
        .and_then(Value::as_array)
        .ok_or_else(|| format!("has no list `{key}`"))?;
    let texts = list.iter().map(|value| value.as_str().map(str::to_owned));
    texts
        .collect::<Option<_>>()
        .ok_or_else(|| format!("has something else than text in `{key}`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(format: Format, text: &str) -> Vec<RawRow> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows");
        std::fs::write(&path, text).unwrap();
        let mut rows = Rows::open(&path, format).unwrap();
        let mut all = Vec::new();
        loop {
            let some = rows.some(2).unwrap();
            if some.is_empty() {
                return all;
            }
            all.extend(some);
        }
    }

    #[test]
    fn sentences_are_told_apart_by_empty_lines() {
        let text = "-DOCSTART- O\n\nA\tB-X\nb c I-X\n\n\nD O\n";
        let found = rows(Format::Conll, text);
        assert_eq!(found.iter().map(|row| row.line).collect::<Vec<_>>(), [3, 7]);
        let Row::Tagged { words, tags } = found[0].parse(Format::Conll, Wanted::Tags).unwrap()
        else {
            panic!("words and tags are expected");
        };
        assert_eq!(
            (words, tags),
            (
                vec!["A".into(), "b".into()],
                vec!["B-X".into(), "I-X".into()]
            )
        );
        let broken = &rows(Format::Conll, "A O\nB\n")[0];
        let problem = broken.parse(Format::Conll, Wanted::Tags).unwrap_err();
        assert!(problem.contains("line 2"), "{problem}");
    }

    #[test]
    fn what_a_row_lacks_is_named_and_what_it_says_is_not() {
        let cases = [
            (r#"{"prompt": "secret"}"#, Wanted::Language, "no `response`"),
            (r#"{"messages": []}"#, Wanted::Language, "`messages`"),
            (
                r#"{"messages": [{"role": "user"}]}"#,
                Wanted::Language,
                "`content` of message 1",
            ),
            (r#"{"x": "secret"}"#, Wanted::Language, "neither"),
            (r#"{"text": "secret"}"#, Wanted::Class, "no `label`"),
            (
                r#"{"tokens": ["secret"], "tags": []}"#,
                Wanted::Tags,
                "1 `tokens` and 0 `tags`",
            ),
            (r#"{"tokens": "secret"}"#, Wanted::Tags, "no list `tokens`"),
            (r#"["secret"]"#, Wanted::Tags, "no JSON object"),
            (r#"{"secret"#, Wanted::Tags, "no JSON (column"),
        ];
        for (text, wanted, expected) in cases {
            let row = &rows(Format::JsonLines, text)[0];
            let problem = row.parse(Format::JsonLines, wanted).unwrap_err();
            assert!(problem.contains(expected), "{problem}");
            assert!(!problem.contains("secret"), "{problem}");
        }
    }
}
