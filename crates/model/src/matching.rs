//! PEFT's rules for which modules an adapter touches (peft 0.21.2).

use std::collections::BTreeSet;

use fancy_regex::Regex;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::architecture::{ModuleSpec, Role, TaskClass};
use crate::error::ModelError;
use crate::lora::{LoraOptions, Targets};
use crate::names::OUTPUT_LAYER;

/// What Transformers calls the token embedding.
pub(crate) const TOKEN_EMBEDDINGS: [&str; 5] = [
    "embed_tokens",
    "word_embeddings",
    "tok_embeddings",
    "embed_in",
    "wte",
];

/// Names or a regular expression, as `exclude_modules` takes them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Patterns {
    /// Matches a whole path, or the end of one after a dot.
    List(Vec<String>),
    /// Matches the whole path.
    Regex(String),
}

/// A map that keeps the order it was written in: the first matching pattern counts.
#[derive(Debug, Clone, PartialEq)]
pub struct Patterned<T>(pub Vec<(String, T)>);

impl<T> Default for Patterned<T> {
    fn default() -> Self {
        Patterned(Vec::new())
    }
}

impl<T: Copy> Patterned<T> {
    /// The value of the first pattern that matches `(.*\.)?(pattern)$` on the path.
    pub(crate) fn resolve(&self, path: &str) -> Result<Option<T>, ModelError> {
        for (pattern, value) in &self.0 {
            let regex = compile(&format!(r"\A(.*\.)?({pattern})\z"), pattern)?;
            if is_match(&regex, path, pattern)? {
                return Ok(Some(*value));
            }
        }
        Ok(None)
    }
}

impl<T: Serialize> Serialize for Patterned<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(key, value)| (key, value)))
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Patterned<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
            type Value = Patterned<T>;

            fn expecting(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
                formatter.write_str("a table of pattern = value")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Patterned(entries))
            }
        }
        deserializer.deserialize_map(Entries(std::marker::PhantomData))
    }
}

/// The linear modules that get a low-rank pair, in the model's order.
///
/// `modules` are all modules with parameters of the class, as [`TaskClass::modules`] lists them.
pub(crate) fn targeted<'a>(
    options: &LoraOptions,
    class: TaskClass,
    modules: &'a [ModuleSpec],
) -> Result<Vec<&'a ModuleSpec>, ModelError> {
    let list = match options.targets {
        Targets::AllLinear => all_linear(class, modules),
        _ => Vec::new(),
    };
    let selector = Selector::new(options, &list)?;
    let mut chosen = Vec::new();
    for module in modules {
        if selector.selects(&module.path)? {
            if !module.is_linear() && !token_embedding(module) {
                return Err(unfit(
                    &module.path,
                    "is neither a linear layer nor the token embedding",
                ));
            }
            chosen.push(module);
        }
    }
    for container in containers(modules) {
        if selector.selects(&container)? {
            return Err(unfit(&container, "holds other modules"));
        }
    }
    if chosen.is_empty() {
        return Err(ModelError::Target {
            module: options.targets.to_string(),
            message: "matches no module; the linear modules are called, for example, ".to_owned()
                + &modules
                    .iter()
                    .filter(|module| module.is_linear())
                    .take(7)
                    .map(|module| module.path.as_str())
                    .collect::<Vec<_>>()
                    .join(", "),
        });
    }
    Ok(chosen)
}

/// Whether a module, or one that holds it, is named by `modules_to_save`.
///
/// PEFT compares ends of paths without asking for a dot: `norm` names `input_layernorm` too.
pub(crate) fn saved(modules_to_save: &[String], path: &str) -> bool {
    path.match_indices('.')
        .map(|(end, _)| &path[..end])
        .chain(std::iter::once(path))
        .any(|part| modules_to_save.iter().any(|name| part.ends_with(name)))
}

/// The shortest list of path ends that selects `chosen` and nothing else among `all`.
pub(crate) fn minimal_suffixes(chosen: &BTreeSet<&str>, all: &[ModuleSpec]) -> Vec<String> {
    let others: Vec<String> = all
        .iter()
        .map(|module| module.path.clone())
        .filter(|path| !chosen.contains(path.as_str()))
        .chain(containers(all))
        .collect();
    let mut suffixes: Vec<String> = Vec::new();
    for path in chosen {
        if suffixes.iter().any(|suffix| ends_with(path, suffix)) {
            continue;
        }
        let shortest = path
            .rmatch_indices('.')
            .map(|(dot, _)| &path[dot + 1..])
            .find(|suffix| !others.iter().any(|other| ends_with(other, suffix)))
            .unwrap_or(path);
        suffixes.retain(|suffix| !ends_with(suffix, shortest));
        suffixes.push(shortest.to_owned());
    }
    suffixes.sort();
    suffixes
}

enum Rule<'a> {
    List(&'a [String]),
    Regex(Regex, &'a str),
}

/// Expressions, each with what a person wrote.
type Compiled<'a> = Vec<(Regex, &'a str)>;

/// PEFT's `check_target_module_exists`, its patterns compiled once.
struct Selector<'a> {
    rule: Rule<'a>,
    exclude: Option<Rule<'a>>,
    saved: Compiled<'a>,
    layers: Option<(&'a [usize], Compiled<'a>)>,
}

impl<'a> Selector<'a> {
    fn new(options: &'a LoraOptions, all_linear: &'a [String]) -> Result<Self, ModelError> {
        let full = |pattern: &'a str| -> Result<Rule<'a>, ModelError> {
            Ok(Rule::Regex(
                compile(&format!(r"\A(?:{pattern})\z"), pattern)?,
                pattern,
            ))
        };
        Ok(Selector {
            rule: match &options.targets {
                Targets::AllLinear => Rule::List(all_linear),
                Targets::List(names) => Rule::List(names),
                Targets::Regex(pattern) => full(pattern)?,
            },
            exclude: match &options.exclude {
                None => None,
                Some(Patterns::List(names)) => Some(Rule::List(names)),
                Some(Patterns::Regex(pattern)) => Some(full(pattern)?),
            },
            saved: options
                .modules_to_save
                .iter()
                .map(|name| {
                    let regex = compile(&format!(r"\A(^|.*\.){name}($|\..*)"), name)?;
                    Ok((regex, name.as_str()))
                })
                .collect::<Result<_, ModelError>>()?,
            layers: match &options.layers_to_transform {
                Some(layers) if !layers.is_empty() => {
                    Some((layers, layer_patterns(&options.layers_pattern)?))
                }
                _ => None,
            },
        })
    }

    fn selects(&self, path: &str) -> Result<bool, ModelError> {
        if let Some(exclude) = &self.exclude
            && exclude.matches(path)?
        {
            return Ok(false);
        }
        for (regex, name) in &self.saved {
            if is_match(regex, path, name)? {
                return Ok(false);
            }
        }
        if !self.rule.matches(path)? {
            return Ok(false);
        }
        match &self.layers {
            None => Ok(true),
            Some((layers, patterns)) => {
                Ok(layer_of(patterns, path)?.is_some_and(|layer| layers.contains(&layer)))
            }
        }
    }
}

/// Expressions whose first group is a layer's number.
fn layer_patterns(names: &[String]) -> Result<Compiled<'_>, ModelError> {
    if names.is_empty() {
        let any = r"\A.*?\.[^.]*\.(\d+)\.";
        return Ok(vec![(compile(any, any)?, any)]);
    }
    names
        .iter()
        .map(|name| {
            let regex = format!(r"\A(?:^|.*?\.)(?:{name})\.(\d+)\.");
            Ok((compile(&regex, name)?, name.as_str()))
        })
        .collect()
}

fn layer_of(patterns: &[(Regex, &str)], path: &str) -> Result<Option<usize>, ModelError> {
    for (regex, name) in patterns {
        let captures = regex.captures(path).map_err(|source| ModelError::Pattern {
            pattern: (*name).to_owned(),
            source: Box::new(source),
        })?;
        if let Some(captures) = captures {
            return Ok(captures
                .get(1)
                .and_then(|number| number.as_str().parse().ok()));
        }
    }
    Ok(None)
}

impl Rule<'_> {
    fn matches(&self, path: &str) -> Result<bool, ModelError> {
        match self {
            Rule::Regex(regex, pattern) => is_match(regex, path, pattern),
            Rule::List(names) => Ok(names.iter().any(|name| ends_with(path, name))),
        }
    }
}

/// Whether a module embeds tokens: of all embeddings the one that can carry a pair.
fn token_embedding(module: &ModuleSpec) -> bool {
    module.role == Role::Embedding
        && TOKEN_EMBEDDINGS
            .iter()
            .any(|name| ends_with(&module.path, name))
}

/// Every linear module but the output layer of the class.
fn all_linear(class: TaskClass, modules: &[ModuleSpec]) -> Vec<String> {
    let output = |path: &str| match class {
        TaskClass::Backbone => false,
        TaskClass::CausalLm => path == OUTPUT_LAYER,
        TaskClass::SequenceClassifier | TaskClass::TokenClassifier => {
            path == "score" || path == "classifier"
        }
    };
    modules
        .iter()
        .filter(|module| module.is_linear() && !output(&module.path))
        .map(|module| module.path.clone())
        .collect()
}

/// Paths of modules that hold others.
fn containers(modules: &[ModuleSpec]) -> BTreeSet<String> {
    modules
        .iter()
        .flat_map(|module| {
            module
                .path
                .match_indices('.')
                .map(|(dot, _)| module.path[..dot].to_owned())
        })
        .collect()
}

fn ends_with(path: &str, name: &str) -> bool {
    path == name
        || path
            .strip_suffix(name)
            .is_some_and(|stem| stem.ends_with('.'))
}

fn compile(regex: &str, pattern: &str) -> Result<Regex, ModelError> {
    Regex::new(regex).map_err(|source| ModelError::Pattern {
        pattern: pattern.to_owned(),
        source: Box::new(source),
    })
}

fn is_match(regex: &Regex, path: &str, pattern: &str) -> Result<bool, ModelError> {
    regex.is_match(path).map_err(|source| ModelError::Pattern {
        pattern: pattern.to_owned(),
        source: Box::new(source),
    })
}

fn unfit(module: &str, reason: &str) -> ModelError {
    ModelError::Target {
        module: module.to_owned(),
        message: format!(
            "{reason}; anything else than linear layers and the token embedding can be trained in \
             full through `modules_to_save`"
        ),
    }
}
