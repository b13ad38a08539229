//! The recipe's keys as a JSON Schema, so that editors complete and check them.

use serde_json::{Map, Value, json};

use super::parse::EXCUSABLE;
use super::{Key, KeyKind, Recipe, keys};

/// A value that no key accepts: what the reader says of it names what it does accept.
const NOTHING: &str = "\u{0}";

/// A JSON Schema (draft 2020-12) of recipes: every key with its type, its default, its documentation,
/// and its choices where there are some.
///
/// Types and documentation come from the recipe's declaration; choices and the keys of small tables
/// from the reader itself, by what it answers to a value that is none. So the schema cannot say
/// anything else than the reader does.
pub fn json_schema() -> Value {
    let keys = keys();
    let defaults = defaults(&keys);
    let mut root = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Calor recipe",
        "description": "A complete run of `calor train`.",
        "type": "object",
        "properties": {},
        "additionalProperties": false,
    });
    for key in &keys {
        let mut schema = of_key(key);
        let default = lookup(&defaults, key.path);
        if let Some(default) = default
            && key.kind != KeyKind::Section
            && !key.required
            && !default.is_null()
        {
            schema["default"] = default.clone();
        }
        place(&mut root, key.path, schema);
    }
    require(&mut root, &keys);
    root
}

fn of_key(key: &Key) -> Value {
    let mut schema = match key.kind {
        KeyKind::Text => json!({"type": "string"}),
        KeyKind::TextOrList => json!({"type": ["string", "array"]}),
        KeyKind::TextOrInteger => json!({"type": ["string", "integer"]}),
        KeyKind::Integer => json!({"type": "integer"}),
        KeyKind::Number => json!({"type": "number"}),
        KeyKind::Boolean => json!({"type": "boolean"}),
        KeyKind::List => json!({"type": "array"}),
        KeyKind::Map => of_map(key.path),
        KeyKind::Section => {
            json!({"type": "object", "properties": {}, "additionalProperties": false})
        }
    };
    let nothing = toml::Value::String(NOTHING.to_owned());
    match key.kind {
        KeyKind::Text => {
            let choices = answered(key.path, nothing, "unknown variant");
            if !choices.is_empty() {
                schema["enum"] = json!(choices);
            }
        }
        KeyKind::List => {
            let one = toml::Value::Array(vec![table([(NOTHING, 1.into())])]);
            let fields = answered(key.path, one, "unknown field");
            if !fields.is_empty() {
                schema["items"] = object(&fields);
            }
        }
        _ => {}
    }
    schema["description"] = json!(key.doc.trim());
    schema
}

/// A table whose keys are not listed with the recipe's: its fields, or those of each of its kinds.
fn of_map(path: &str) -> Value {
    let fields = answered(path, table([(NOTHING, 1.into())]), "unknown field");
    if !fields.is_empty() {
        return object(&fields);
    }
    let nothing = toml::Value::String(NOTHING.to_owned());
    let kinds = answered(path, table([("kind", nothing)]), "unknown variant");
    if kinds.is_empty() {
        return json!({"type": "object"});
    }
    let mut all = vec!["kind".to_owned()];
    for kind in &kinds {
        let wrong = table([
            ("kind", toml::Value::String(kind.clone())),
            (NOTHING, 1.into()),
        ]);
        for field in answered(path, wrong, "unknown field") {
            if !all.contains(&field) {
                all.push(field);
            }
        }
    }
    let mut schema = object(&all);
    schema["properties"]["kind"] = json!({"type": "string", "enum": kinds});
    schema
}

fn object(fields: &[String]) -> Value {
    let properties: Map<String, Value> = fields
        .iter()
        .map(|field| (field.clone(), json!({})))
        .collect();
    json!({"type": "object", "properties": properties, "additionalProperties": false})
}

/// What the reader names as accepted when a key has a value that is not: the names in backticks after
/// "expected", if it complains in the given way.
fn answered(path: &str, value: toml::Value, complaint: &str) -> Vec<String> {
    let whole = path
        .rsplit('.')
        .fold(value, |inner, segment| table([(segment, inner)]));
    let Err(error) = whole.try_into::<Recipe>() else {
        return Vec::new();
    };
    let message = error.message().to_owned();
    let Some((wrong, expected)) = message.split_once("expected") else {
        return Vec::new();
    };
    if !wrong.contains(complaint) || !wrong.contains(NOTHING) {
        return Vec::new();
    }
    let names = expected.split('`').skip(1).step_by(2);
    names.map(str::to_owned).collect()
}

fn table<const N: usize>(entries: [(&str, toml::Value); N]) -> toml::Value {
    let entries = entries.map(|(key, value)| (key.to_owned(), value));
    toml::Value::Table(entries.into_iter().collect())
}

/// A recipe of defaults alone, with every optional section there.
fn defaults(keys: &[Key]) -> Value {
    let mut whole = toml::Table::new();
    for key in keys.iter().filter(|key| key.kind == KeyKind::Section) {
        let mut table = &mut whole;
        for segment in key.path.split('.') {
            table = table
                .entry(segment)
                .or_insert_with(|| toml::Value::Table(toml::Table::new()))
                .as_table_mut()
                .expect("sections are in sections");
        }
    }
    let recipe: Recipe = toml::Value::Table(whole)
        .try_into()
        .expect("sections need no key");
    serde_json::to_value(recipe).expect("a recipe is plain data")
}

fn lookup<'a>(value: &'a Value, path: &str) -> Option<&'a Value> {
    path.split('.')
        .try_fold(value, |value, segment| value.get(segment))
}

/// Puts a key's schema below those of its sections.
fn place(root: &mut Value, path: &str, schema: Value) {
    let (sections, name) = path.rsplit_once('.').unwrap_or(("", path));
    let mut parent = root;
    for section in sections.split('.').filter(|section| !section.is_empty()) {
        parent = &mut parent["properties"][section];
    }
    parent["properties"][name] = schema;
}

/// What a recipe has to give, unless it extends one that gives it.
fn require(root: &mut Value, keys: &[Key]) {
    let mut then = json!({});
    let always = |key: &&Key| key.required && !EXCUSABLE.contains(&key.path);
    for key in keys.iter().filter(always) {
        let mut parent = &mut then;
        let mut segments = key.path.split('.').peekable();
        while let Some(segment) = segments.next() {
            let required = parent["required"].as_array().cloned().unwrap_or_default();
            if !required.iter().any(|known| known == segment) {
                parent["required"] = [required, vec![json!(segment)]].concat().into();
            }
            if segments.peek().is_some() {
                parent = &mut parent["properties"][segment];
            }
        }
    }
    root["if"] = json!({"not": {"required": ["extends"]}});
    root["then"] = then;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_choices_defaults_and_documentation_are_the_readers() {
        let schema = json_schema();
        let at = |path: &str| {
            path.split('.')
                .fold(&schema, |schema, segment| &schema["properties"][segment])
        };
        assert_eq!(
            at("train.schedule.kind")["enum"],
            json!(["constant", "linear", "cosine", "wsd"])
        );
        assert_eq!(at("train.schedule.kind")["default"], "cosine");
        assert_eq!(at("train.learning_rate")["type"], "number");
        assert_eq!(at("train.learning_rate")["default"], 2e-4);
        assert_eq!(at("modality.image.tokens")["default"], 4);
        assert_eq!(at("adapter.targets")["type"], json!(["string", "array"]));
        assert_eq!(at("model.revision").get("default"), None);
        let groups = &at("train.groups")["items"]["properties"];
        assert_eq!(groups.as_object().unwrap().len(), 3, "{groups}");
        let encoder = &at("modality.image.encoder")["properties"];
        let kinds = encoder["kind"]["enum"].as_array().unwrap();
        assert!(
            kinds.contains(&json!("patches")) && kinds.len() >= 5,
            "{kinds:?}"
        );
        assert!(encoder.get("patch").is_some(), "{encoder}");
        assert_eq!(
            schema["then"]["properties"]["model"]["required"],
            json!(["id"])
        );
        for key in keys() {
            let description = at(key.path)["description"].as_str().unwrap();
            assert!(description.ends_with('.'), "{}", key.path);
        }
    }

    /// What of a document a schema of these few words does not allow.
    fn complaint(schema: &Value, value: &Value, path: &str) -> Option<String> {
        let kind = match value {
            Value::String(_) => "string",
            Value::Bool(_) => "boolean",
            Value::Array(_) => "array",
            Value::Object(_) => "object",
            Value::Number(number) if number.is_i64() => "integer",
            Value::Number(_) => "number",
            Value::Null => "null",
        };
        let fits = |wanted: &Value| wanted == kind || (wanted == "number" && kind == "integer");
        let right = match &schema["type"] {
            Value::Array(kinds) => kinds.iter().any(fits),
            Value::Null => true,
            wanted => fits(wanted),
        };
        if !right {
            return Some(format!("{path} is a {kind}"));
        }
        if let Some(choices) = schema["enum"].as_array()
            && !choices.contains(value)
        {
            return Some(format!("{path} is {value}"));
        }
        if let Some(required) = schema["required"].as_array() {
            let missing = required
                .iter()
                .find(|name| value.get(name.as_str().unwrap()).is_none());
            if let Some(name) = missing {
                return Some(format!("{path} has no {name}"));
            }
        }
        if let Some(then) = schema.get("then")
            && value.get("extends").is_none()
            && let Some(found) = complaint(then, value, path)
        {
            return Some(found);
        }
        let below = |name: &str, value: &Value| {
            let path = format!("{path}.{name}");
            match schema["properties"].get(name) {
                Some(schema) => complaint(schema, value, &path),
                None if schema["additionalProperties"] == false => {
                    Some(format!("{path} is not known"))
                }
                None => None,
            }
        };
        match value {
            Value::Object(entries) => entries.iter().find_map(|(name, value)| below(name, value)),
            Value::Array(items) => items
                .iter()
                .find_map(|item| complaint(&schema["items"], item, path)),
            _ => None,
        }
    }

    #[test]
    fn every_recipe_of_the_project_is_valid_and_a_mistake_is_not() {
        let schema = json_schema();
        let check = |text: &str| {
            let table: toml::Table = text.parse().unwrap();
            complaint(&schema, &serde_json::to_value(table).unwrap(), "")
        };
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../recipes");
        let mut seen = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path
                .extension()
                .is_some_and(|extension| extension == "toml")
            {
                let text = std::fs::read_to_string(&path).unwrap();
                assert_eq!(check(&text), None, "{}", path.display());
                // So is what a run writes.
                let whole = Recipe::load(&path, &[]).unwrap().to_toml("x");
                assert_eq!(check(&whole), None, "{} resolved", path.display());
                seen += 1;
            }
        }
        assert!(seen >= 8);
        let sound = "schema = 1\nname = \"x\"\n[model]\nid = \"m\"\n[task]\nkind = \"binary\"\nlabels = \"l\"\n[cohort]\npath = \"c\"\n[train]\nepochs = 1\n";
        assert_eq!(check(sound), None);
        assert_eq!(check("extends = \"base.toml\"\n"), None);
        for (from, to) in [
            ("epochs", "epoch"),
            ("epochs = 1", "epochs = \"1\""),
            ("binary", "binry"),
            ("id = \"m\"\n", ""),
            ("epochs = 1", "groups = [{ patern = \"x\" }]"),
            ("epochs = 1", "schedule = { kind = \"step\" }"),
        ] {
            assert!(check(&sound.replace(from, to)).is_some(), "{to}");
        }
    }
}
