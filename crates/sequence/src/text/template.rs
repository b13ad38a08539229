//! Chat templates of checkpoints: Jinja as Transformers runs it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use minijinja::value::{Kwargs, Rest};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, Value as Jinja};
use serde_json::{Map, Value};

use crate::SequenceError;
use crate::text::python;

/// Stands before the words of a template that refuses its input.
const REFUSED: &str = "the template says: ";
/// What errors call a template.
const NAME: &str = "chat_template";
const SPECIAL_TOKENS: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// How a checkpoint writes a conversation.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    path: PathBuf,
    special_tokens: Map<String, Value>,
    date: String,
}

impl ChatTemplate {
    /// The template of a checkpoint folder: `chat_template.jinja`, or `chat_template` in
    /// `tokenizer_config.json` (of several, the one called `default`). `None` where it has none.
    ///
    /// `date`, `2024-07-26` say, is what `strftime_now` tells a template: a fixed day, so that what
    /// is written today can be written again.
    ///
    /// # Errors
    /// A file that is not what it should be, a template with a mistake in it, a date that is none.
    pub fn open(folder: &Path, date: &str) -> Result<Option<ChatTemplate>, SequenceError> {
        let config = folder.join("tokenizer_config.json");
        let fields = read_json(&config)?;
        let own = folder.join("chat_template.jinja");
        let (source, path) = match std::fs::read_to_string(&own) {
            Ok(source) => (source, own),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let source = match &fields["chat_template"] {
                    Value::String(source) => source.clone(),
                    Value::Array(templates) => {
                        let named = templates.iter().find(|entry| entry["name"] == "default");
                        match named.and_then(|entry| entry["template"].as_str()) {
                            Some(source) => source.to_owned(),
                            None => return Ok(None),
                        }
                    }
                    _ => return Ok(None),
                };
                (source, config)
            }
            Err(error) => return Err(SequenceError::io(&own, error)),
        };
        let mut special_tokens = Map::new();
        for tokens in [read_json(&folder.join("special_tokens_map.json"))?, fields] {
            for name in SPECIAL_TOKENS {
                let content = tokens[name].as_str().or(tokens[name]["content"].as_str());
                if let Some(content) = content {
                    special_tokens.insert(name.to_owned(), content.into());
                }
            }
        }
        ChatTemplate::build(source, path, special_tokens, date).map(Some)
    }

    fn build(
        source: String,
        path: PathBuf,
        special_tokens: Map<String, Value>,
        date: &str,
    ) -> Result<ChatTemplate, SequenceError> {
        let wrong = |problem: String| SequenceError::Template {
            path: path.clone(),
            problem,
        };
        let day = python::Day::parse(date)
            .ok_or_else(|| wrong(format!("`{date}` is no day; write it as 2024-07-26")))?;
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_formatter(python::print);
        environment.set_unknown_method_callback(python::method);
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", |message: String| {
            Err::<Jinja, _>(Error::new(
                ErrorKind::InvalidOperation,
                format!("{REFUSED}{message}"),
            ))
        });
        environment.add_function("strftime_now", move |format: String| day.strftime(&format));
        let source = without_generation(&source);
        if let Err(error) = Environment::empty().template_from_named_str(NAME, &source) {
            return Err(wrong(format!("is not a template that can be run: {error}")));
        }
        Ok(ChatTemplate {
            environment,
            source,
            path,
            special_tokens,
            date: date.to_owned(),
        })
    }

    /// The text of a conversation. `messages` are objects with a `role` and a `content`; with
    /// `add_generation_prompt` it ends where the assistant's next turn begins.
    ///
    /// # Errors
    /// What the template refuses, in its words, or the line where it failed; never a message's text.
    pub fn render(
        &self,
        messages: &[Value],
        add_generation_prompt: bool,
    ) -> Result<String, String> {
        let special_tokens = self.special_tokens.iter();
        let mut context: BTreeMap<&str, Jinja> = special_tokens
            .map(|(name, token)| (name.as_str(), python::value(token)))
            .collect();
        context.extend([
            ("messages", messages.iter().map(python::value).collect()),
            ("tools", Jinja::from(())),
            ("documents", Jinja::from(())),
            ("add_generation_prompt", add_generation_prompt.into()),
        ]);
        self.environment
            .render_named_str(NAME, &self.source, context)
            .map_err(|error| {
                let path = self.path.display();
                let refusal = error
                    .detail()
                    .and_then(|detail| detail.strip_prefix(REFUSED));
                match (refusal, error.line()) {
                    (Some(refusal), _) => format!("{path}: {REFUSED}{refusal}"),
                    // Other details may quote a value.
                    (None, Some(line)) => format!("{path} fails in line {line}: {}", error.kind()),
                    (None, None) => format!("{path} fails: {}", error.kind()),
                }
            })
    }

    /// Everything that shapes what is rendered, for the key of a cache.
    pub(crate) fn key(&self) -> String {
        let tokens = Value::Object(self.special_tokens.clone());
        format!("{}\n{tokens}\n{}", self.date, self.source)
    }
}

/// The object in a file, or null where there is no file.
fn read_json(path: &Path) -> Result<Value, SequenceError> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|source| SequenceError::Json {
            path: path.to_path_buf(),
            source,
        }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Value::Null),
        Err(error) => Err(SequenceError::io(path, error)),
    }
}

/// `{% generation %}` marks assistants' words for Transformers; they are found without it here, so
/// the block always runs.
fn without_generation(source: &str) -> String {
    let mut found = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(end) = rest[start..].find("%}").map(|end| start + end) else {
            break;
        };
        let inside = &rest[start + 2..end];
        let word = inside.trim_matches(['-', '+', ' ', '\t', '\n']);
        found.push_str(&rest[..start + 2]);
        match word {
            "generation" => found.push_str(&inside.replace(word, "if true")),
            "endgeneration" => found.push_str(&inside.replace(word, "endif")),
            _ => found.push_str(inside),
        }
        found.push_str("%}");
        rest = &rest[end + 2..];
    }
    found + rest
}

/// Transformers' filter: Python's `json.dumps` without escapes.
fn tojson(
    _: &State,
    value: Jinja,
    arguments: Rest<Jinja>,
    options: Kwargs,
) -> Result<String, Error> {
    let indent = match arguments.first() {
        Some(first) => Some(first.clone()),
        None => options.get::<Option<Jinja>>("indent")?,
    };
    let width = match indent {
        Some(indent) if !indent.is_none() => Some(usize::try_from(indent)?),
        _ => None,
    };
    // These change nothing that a conversation holds.
    for name in ["ensure_ascii", "separators", "sort_keys"] {
        let _: Option<Jinja> = options.get(name)?;
    }
    options.assert_all_used()?;
    let value = serde_json::to_value(&value)
        .map_err(|_| Error::new(ErrorKind::InvalidOperation, "a value is no JSON"))?;
    let mut text = String::new();
    python::write_json(&value, width, 0, &mut text);
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(source: &str, messages: Value) -> Result<String, String> {
        let tokens = json!({"eos_token": "</s>"}).as_object().unwrap().clone();
        let path = PathBuf::from("chat_template.jinja");
        ChatTemplate::build(source.to_owned(), path, tokens, "2024-07-05")
            .map_err(|error| error.to_string())?
            .render(messages.as_array().unwrap(), false)
    }

    #[test]
    fn python_words_and_blocks_work_as_in_transformers() {
        let source = "{% for m in messages %}\n  {% if m['role'].startswith('s') %}\n{% continue %}\n  {% endif %}\n{{ m.content.strip() }}|{{ true }}{{ none }}{{ m | tojson }}\n{% endfor %}\n{{ strftime_now('%d %b %Y') }}";
        let messages = json!([
            {"role": "system", "content": "x"},
            {"role": "user", "content": " <é> "},
        ]);
        assert_eq!(
            render(source, messages).unwrap(),
            "<é>|TrueNone{\"role\": \"user\", \"content\": \" <é> \"}\n05 Jul 2024"
        );
    }

    #[test]
    fn a_refusal_is_told_and_a_text_is_not() {
        let refused = render("{{ raise_exception('roles must alternate') }}", json!([]));
        assert!(
            refused
                .unwrap_err()
                .contains("the template says: roles must alternate")
        );
        let source = "\n{{ messages[0].content.secrets() }}";
        let error = render(source, json!([{"role": "user", "content": "private"}])).unwrap_err();
        assert!(
            error.contains("line 2") && !error.contains("private"),
            "{error}"
        );
        assert!(render("{% if %}", json!([])).is_err());
    }

    #[test]
    fn a_block_for_masks_is_a_block() {
        let source =
            "{%- generation -%} {{ messages[0].content }}{{ eos_token }}{% endgeneration %}";
        assert_eq!(
            render(source, json!([{"role": "assistant", "content": "a"}])).unwrap(),
            "a</s>"
        );
    }

    #[test]
    fn a_day_that_is_none_is_refused() {
        let built = ChatTemplate::build(String::new(), PathBuf::new(), Map::new(), "yesterday");
        assert!(
            built
                .unwrap_err()
                .to_string()
                .contains("`yesterday` is no day")
        );
    }
}
