//! Changes a recipe's text where it stands, so that its comments and its order stay.

use std::ops::Range;
use std::path::Path;

use toml::de::{DeTable, DeValue};

use super::parse::{Reader, replaced_by};
use super::{Place, Recipe, RecipeError};

impl Recipe {
    /// The recipe's text with `--set` assignments written into it; `path` is what errors call it.
    ///
    /// # Errors
    /// What [`Recipe::parse`] finds wrong, and a key that cannot be written where it belongs.
    pub fn edit(text: &str, path: &Path, set: &[String]) -> Result<String, RecipeError> {
        let wanted = Recipe::parse(text, path, set)?;
        let reader = Reader::new(path);
        let mut edited = text.to_owned();
        let mut table = toml::Table::new();
        for assignment in set {
            let (segments, value) = reader
                .assign(&mut table, assignment)
                .map_err(|problems| RecipeError::Problems { problems })?;
            let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
            edited = with_value(&edited, &segments, &value);
        }
        match Recipe::parse(&edited, path, &[]) {
            Ok(found) if found == wanted => Ok(edited),
            _ => Err(RecipeError::Problems {
                problems: vec![reader.problem(
                    Place::File(path.to_owned(), None),
                    "",
                    "the assignments cannot be written into this text".to_owned(),
                    "write them by hand",
                )],
            }),
        }
    }
}

/// Text in which a key has a value: changed where it is, else added to its table, else with a table
/// of its own at the end.
fn with_value(text: &str, segments: &[&str], value: &toml::Value) -> String {
    let document = DeTable::parse(text).expect("the text was read before");
    let root = document.get_ref();
    if let Some((_, old)) = find(root, segments) {
        return spliced(text, old, &value.to_string());
    }
    let last = segments.len() - 1;
    if let Some(other) = replaced_by(&segments.join("."))
        && let Some((name, old)) = find(root, &other.split('.').collect::<Vec<_>>())
    {
        let entry = entry(&segments[last..], value);
        return spliced(text, name.start..old.end, &entry);
    }
    for depth in (1..=last).rev() {
        let (parent, rest) = segments.split_at(depth);
        let Some((_, span)) = find(root, parent) else {
            continue;
        };
        if text[span.clone()].starts_with('{') {
            let inside = text[span.start + 1..span.end - 1].trim_end();
            let comma = match inside.trim() {
                "" => "",
                _ => ",",
            };
            let entry = entry(rest, value);
            return spliced(text, span, &format!("{{{inside}{comma} {entry} }}"));
        }
    }
    for depth in (0..=last).rev() {
        let (parent, rest) = segments.split_at(depth);
        if let Some(line_end) = end_of_table(text, root, parent) {
            let entry = entry(rest, value);
            // Keys above the first table can only be added where there are some.
            if depth > 0 || rest.len() == 1 {
                return spliced(text, line_end..line_end, &format!("\n{entry}"));
            }
        }
    }
    let entry = entry(&segments[1..], value);
    format!("{}\n\n[{}]\n{entry}\n", text.trim_end(), key(segments[0]))
}

/// Where a key and its value stand.
fn find(root: &DeTable<'_>, segments: &[&str]) -> Option<(Range<usize>, Range<usize>)> {
    let (first, rest) = segments.split_first()?;
    let (name, value) = root
        .iter()
        .find(|(name, _)| name.get_ref().as_ref() == *first)?;
    match (value.get_ref(), rest) {
        (_, []) => Some((name.span(), value.span())),
        (DeValue::Table(inner), rest) => find(inner, rest),
        _ => None,
    }
}

/// The end of the last line of a table that has a header of its own (of the keys above all headers for
/// an empty path), tables within it aside.
fn end_of_table(text: &str, root: &DeTable<'_>, path: &[&str]) -> Option<usize> {
    let mut table = root;
    for segment in path {
        let (_, value) = table
            .iter()
            .find(|(name, _)| name.get_ref().as_ref() == *segment)?;
        table = match value.get_ref() {
            DeValue::Table(inner) => inner,
            _ => return None,
        };
    }
    let header = format!("[{}]", path.join("."));
    let mut start = 0;
    let header_line = text.split_inclusive('\n').find_map(|line| {
        let here = start;
        start += line.len();
        let plain = line.split('#').next().unwrap_or_default().trim();
        (plain == header).then_some(here)
    });
    let own = |value: &DeValue<'_>, span: Range<usize>| match value {
        DeValue::Table(_) => text[span].starts_with('{'),
        // An array of tables has headers of its own.
        DeValue::Array(_) => !text[span].starts_with("[["),
        _ => true,
    };
    let last = table
        .iter()
        .filter(|(_, value)| own(value.get_ref(), value.span()))
        .map(|(_, value)| value.span().end)
        .max();
    let within = match path.is_empty() {
        true => last?,
        false => last.max(header_line)?,
    };
    header_line.or(path.is_empty().then_some(0))?;
    Some(within + text[within..].find('\n').unwrap_or(text.len() - within))
}

/// `key = value`, dotted where there is more than one segment.
fn entry(segments: &[&str], value: &toml::Value) -> String {
    let path: Vec<String> = segments.iter().map(|segment| key(segment)).collect();
    format!("{} = {value}", path.join("."))
}

/// A key as TOML writes it: in quotes unless it is plain.
fn key(segment: &str) -> String {
    let plain = |character: char| character.is_ascii_alphanumeric() || "_-".contains(character);
    match !segment.is_empty() && segment.chars().all(plain) {
        true => segment.to_owned(),
        false => toml::Value::String(segment.to_owned()).to_string(),
    }
}

fn spliced(text: &str, span: Range<usize>, new: &str) -> String {
    format!("{}{new}{}", &text[..span.start], &text[span.end..])
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# calor train x.toml\nschema = 1\nname   = \"x\"  # the name\n\n[model]\nid = \"m\"\n\n[task]\nkind = \"binary\"\nlabels = \"l\"\n\n[cohort]\npath = \"c\" # where\n\n[train]\n# how fast\nlearning_rate = 1e-3\nschedule = { kind = \"cosine\", warmup_fraction = 0.1 }\n\n[evaluate]\nevery_steps = 5\n";

    fn edited(set: &[&str]) -> Result<String, String> {
        let set: Vec<String> = set.iter().map(|text| (*text).to_owned()).collect();
        Recipe::edit(TEXT, Path::new("x.toml"), &set).map_err(|error| error.to_string())
    }

    #[test]
    fn values_change_where_they_stand() {
        let found = edited(&[
            "name=other",
            "cohort.path=data/mine",
            "train.learning_rate=2e-4",
        ]);
        let expected = TEXT
            .replace("\"x\"  #", "\"other\"  #")
            .replace("\"c\" #", "\"data/mine\" #")
            .replace("1e-3", "0.0002");
        assert_eq!(found.unwrap(), expected);
    }

    #[test]
    fn new_keys_go_to_their_table() {
        let found = edited(&["train.epochs=2", "train.schedule.minimum_factor=0.1"]).unwrap();
        let expected = TEXT.replace(
            "warmup_fraction = 0.1 }\n",
            "warmup_fraction = 0.1, minimum_factor = 0.1 }\nepochs = 2\n",
        );
        assert_eq!(found, expected);
        let found = edited(&["adapter.r=4", "adapter.rank_pattern.a.b=2"]).unwrap();
        let expected = format!("{TEXT}\n[adapter]\nr = 4\nrank_pattern.\"a.b\" = 2\n");
        assert_eq!(found, expected);
    }

    #[test]
    fn a_length_in_steps_replaces_one_as_a_share() {
        let found = edited(&["train.schedule.warmup_steps=7"]).unwrap();
        assert_eq!(
            found,
            TEXT.replace("warmup_fraction = 0.1", "warmup_steps = 7")
        );
    }

    #[test]
    fn what_is_wrong_is_said_as_for_set() {
        let found = edited(&["train.epoch=2"]).unwrap_err();
        assert!(found.contains("did you mean `train.epochs`?"), "{found}");
    }
}
