//! `adapter_config.json` as PEFT 0.21.2 reads and writes it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::architecture::{ModuleSpec, Role, TaskClass};
use crate::error::ModelError;
use crate::lora::{LoraOptions, PairInit, Plan, Targets};
use crate::matching::{self, Patterned, Patterns};

const FILE: &str = "adapter_config.json";
/// The version whose fields are written.
const PEFT_VERSION: &str = "0.21.2";
/// What PEFT calls an adapter without targets: only `modules_to_save` is trained.
const NO_TARGETS: &str = "dummy-target-modules";

/// Keys that say where an adapter comes from and change nothing it computes.
const INFORMATION: [&str; 11] = [
    // PEFT itself decides by the module whether a weight is transposed.
    "fan_in_fan_out",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "eva_config",
    "runtime_config",
];

/// Keys that are read.
const READ: [&str; 17] = [
    "peft_type",
    "task_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "use_rslora",
    "bias",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "use_dora",
    "trainable_token_indices",
];

/// A PEFT adapter's configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// The adapter; `None` where only heads were trained.
    pub lora: Option<LoraOptions>,
    /// The checkpoint it was trained on, as its author named it.
    pub base_model_name_or_path: Option<String>,
    pub(crate) class: TaskClass,
    /// All of `modules_to_save`, the class's own head included.
    pub(crate) modules_to_save: Vec<String>,
    pub(crate) path: PathBuf,
}

impl AdapterConfig {
    /// Reads `adapter_config.json` of an adapter folder.
    ///
    /// # Errors
    /// A variant of LoRA that is not built (an initialisation other than PiSSA that changes the frozen
    /// weights, …), or a key nobody knows with a value that is switched on.
    pub fn read(dir: &Path) -> Result<AdapterConfig, ModelError> {
        let path = dir.join(FILE);
        let text = std::fs::read_to_string(&path).map_err(ModelError::io(&path))?;
        let json = |source| ModelError::Json {
            path: path.clone(),
            source,
        };
        let object: Map<String, Value> = serde_json::from_str(&text).map_err(json)?;
        check(&path, &object)?;
        fn take<T: serde::de::DeserializeOwned + Default>(
            object: &Map<String, Value>,
            key: &str,
        ) -> Result<T, serde_json::Error> {
            match object.get(key) {
                None | Some(Value::Null) => Ok(T::default()),
                Some(value) => serde_json::from_value(value.clone()),
            }
        }
        let modules_to_save: Vec<String> = take(&object, "modules_to_save").map_err(json)?;
        let targets: Option<Targets> = take(&object, "target_modules").map_err(json)?;
        let defaults = LoraOptions::default();
        let lora = match targets {
            Some(Targets::Regex(name)) if name == NO_TARGETS => None,
            None => {
                return Err(ModelError::Config {
                    path,
                    message: "`target_modules` is missing".to_owned(),
                });
            }
            Some(targets) => Some(LoraOptions {
                r: take::<Option<usize>>(&object, "r")
                    .map_err(json)?
                    .unwrap_or(defaults.r),
                alpha: take::<Option<f64>>(&object, "lora_alpha")
                    .map_err(json)?
                    .unwrap_or(defaults.alpha),
                dropout: take(&object, "lora_dropout").map_err(json)?,
                targets,
                exclude: take::<Option<Patterns>>(&object, "exclude_modules").map_err(json)?,
                rank_pattern: take(&object, "rank_pattern").map_err(json)?,
                alpha_pattern: take(&object, "alpha_pattern").map_err(json)?,
                modules_to_save: modules_to_save.clone(),
                use_rslora: take(&object, "use_rslora").map_err(json)?,
                layers_to_transform: match object.get("layers_to_transform") {
                    Some(Value::Number(_)) => Some(vec![
                        take::<usize>(&object, "layers_to_transform").map_err(json)?,
                    ]),
                    _ => take(&object, "layers_to_transform").map_err(json)?,
                },
                layers_pattern: match object.get("layers_pattern") {
                    Some(Value::String(pattern)) => vec![pattern.clone()],
                    _ => take(&object, "layers_pattern").map_err(json)?,
                },
                bias: take(&object, "bias").map_err(json)?,
                use_dora: take(&object, "use_dora").map_err(json)?,
                init: init(&object),
                trained_tokens: trained_tokens(&path, &object)?,
            }),
        };
        Ok(AdapterConfig {
            lora,
            base_model_name_or_path: take(&object, "base_model_name_or_path").map_err(json)?,
            class: class(&path, &object)?,
            modules_to_save,
            path,
        })
    }

    /// The text PEFT would write for this adapter: its keys sorted, every field there.
    ///
    /// `plan` is what the adapter holds and `modules` all modules of its class: the targets and
    /// patterns written select exactly that, also where the options' own words would not.
    pub(crate) fn write(&self, plan: &Plan, modules: &[ModuleSpec]) -> Result<String, ModelError> {
        let defaults = LoraOptions::default();
        let lora = self.lora.as_ref().unwrap_or(&defaults);
        let lora = LoraOptions {
            modules_to_save: self.modules_to_save.clone(),
            ..lora.clone()
        };
        let targets = if self.lora.is_none() {
            json!(NO_TARGETS)
        } else {
            targets(&lora, self.class, plan, modules)?
        };
        let (ranks, alphas) = patterns(&lora, plan)?;
        let layers = lora
            .layers_to_transform
            .as_ref()
            .filter(|_| targets.is_array() && matches!(lora.targets, Targets::List(_)));
        let saved = &self.modules_to_save;
        let fields = json!({
            "alora_invocation_tokens": null,
            "alpha_pattern": alphas,
            "arrow_config": null,
            "auto_mapping": null,
            "base_model_name_or_path": self.base_model_name_or_path,
            "bias": lora.bias,
            "corda_config": null,
            "ensure_weight_tying": false,
            "eva_config": null,
            "exclude_modules": lora.exclude,
            "fan_in_fan_out": fan_in_fan_out(plan, modules),
            "inference_mode": true,
            "init_lora_weights": true,
            "kasa_config": null,
            "layer_replication": null,
            "layers_pattern": layers.and(Some(&lora.layers_pattern)).filter(|p| !p.is_empty()),
            "layers_to_transform": layers,
            "loftq_config": {},
            "lora_alpha": number(lora.alpha),
            "lora_bias": false,
            "lora_dropout": lora.dropout,
            "lora_ga_config": null,
            "megatron_config": null,
            "megatron_core": "megatron.core",
            "modules_to_save": (!saved.is_empty()).then_some(saved),
            "monteclora_config": null,
            "peft_type": "LORA",
            "peft_version": PEFT_VERSION,
            "qalora_group_size": 16,
            "r": lora.r,
            "rank_pattern": ranks,
            "revision": null,
            "target_modules": targets,
            "target_parameters": null,
            "task_type": self.class.peft_task_type(),
            "trainable_token_indices":
                (!lora.trained_tokens.is_empty()).then_some(&lora.trained_tokens),
            "use_bdlora": null,
            "use_dora": lora.use_dora,
            "use_qalora": false,
            "use_rslora": lora.use_rslora,
            "velora_config": null,
        });
        let text = serde_json::to_string_pretty(&fields).map_err(|source| ModelError::Json {
            path: self.path.clone(),
            source,
        })?;
        Ok(ascii(&text))
    }
}

/// PEFT corrects this field for every module it adapts, so that the last one decides it.
fn fan_in_fan_out(plan: &Plan, modules: &[ModuleSpec]) -> bool {
    modules
        .iter()
        .rfind(|module| plan.contains_key(&module.path))
        .is_some_and(|module| module.role == Role::LinearTransposed)
}

/// Refuses what is switched on and not built.
fn check(path: &Path, object: &Map<String, Value>) -> Result<(), ModelError> {
    let unsupported = |key: &str, supported: &str| ModelError::Unsupported {
        path: path.to_owned(),
        key: key.to_owned(),
        value: object.get(key).unwrap_or(&Value::Null).to_string(),
        supported: supported.to_owned(),
    };
    if object.get("peft_type").and_then(Value::as_str) != Some("LORA") {
        return Err(unsupported("peft_type", "LORA adapters are built"));
    }
    match object.get("bias").map(Value::as_str) {
        None | Some(Some("none" | "all" | "lora_only")) => {}
        Some(_) => {
            return Err(unsupported(
                "bias",
                "\"none\", \"all\" and \"lora_only\" are built",
            ));
        }
    }
    // These draw A and B; the others also change the frozen weights, which are not in the file.
    let harmless = ["gaussian", "orthogonal", "eva"];
    match object.get("init_lora_weights") {
        None | Some(Value::Null | Value::Bool(_)) => {}
        Some(Value::String(kind))
            if harmless.contains(&kind.as_str()) || kind.starts_with("pissa") =>
        {
            // Which vectors a random start found is not in the file.
            if kind.starts_with("pissa") && kind != "pissa" {
                return Err(unsupported(
                    "init_lora_weights",
                    "convert the adapter with PEFT's path_initial_model_for_weight_conversion; \
                     \"pissa\" alone is found again",
                ));
            }
        }
        Some(_) => {
            return Err(unsupported(
                "init_lora_weights",
                "convert the adapter with PEFT's path_initial_model_for_weight_conversion",
            ));
        }
    }
    for (key, value) in object {
        let known = INFORMATION.contains(&key.as_str()) || READ.contains(&key.as_str());
        let off = match value {
            Value::Null => true,
            Value::Bool(on) => !on,
            Value::Array(values) => values.is_empty(),
            Value::Object(values) => values.is_empty(),
            _ => false,
        };
        if !known && !off {
            return Err(unsupported(key, "LoRA, rsLoRA, DoRA and PiSSA are built"));
        }
    }
    Ok(())
}

/// What the pairs started from, where the frozen weights lack it.
fn init(object: &Map<String, Value>) -> PairInit {
    match object.get("init_lora_weights").and_then(Value::as_str) {
        Some("pissa") => PairInit::Pissa,
        _ => PairInit::Default,
    }
}

/// `trainable_token_indices`: a list for the token embedding, or one by its name.
fn trained_tokens(path: &Path, object: &Map<String, Value>) -> Result<Vec<u32>, ModelError> {
    let unsupported = |value: &Value| ModelError::Unsupported {
        path: path.to_owned(),
        key: "trainable_token_indices".to_owned(),
        value: value.to_string(),
        supported: "tokens of the token embedding are built".to_owned(),
    };
    let list = match object.get("trainable_token_indices") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(by_module)) => {
            let mut modules = by_module.iter();
            match (modules.next(), modules.next()) {
                (None, _) => return Ok(Vec::new()),
                (Some((module, tokens)), None)
                    if matching::TOKEN_EMBEDDINGS
                        .iter()
                        .any(|name| module.ends_with(name)) =>
                {
                    tokens
                }
                _ => return Err(unsupported(&Value::Object(by_module.clone()))),
            }
        }
        Some(list) => list,
    };
    serde_json::from_value(list.clone()).map_err(|_| unsupported(list))
}

fn class(path: &Path, object: &Map<String, Value>) -> Result<TaskClass, ModelError> {
    let task = object.get("task_type").and_then(Value::as_str);
    let base_class = object
        .get("auto_mapping")
        .and_then(|mapping| mapping.get("base_model_class"))
        .and_then(Value::as_str);
    match (task, base_class) {
        (Some("CAUSAL_LM"), _) => Ok(TaskClass::CausalLm),
        (Some("SEQ_CLS"), _) => Ok(TaskClass::SequenceClassifier),
        (Some("TOKEN_CLS"), _) => Ok(TaskClass::TokenClassifier),
        (Some("FEATURE_EXTRACTION"), _) => Ok(TaskClass::Backbone),
        (None, Some(class)) if class.ends_with("ForCausalLM") => Ok(TaskClass::CausalLm),
        (None, Some(class)) if class.ends_with("ForSequenceClassification") => {
            Ok(TaskClass::SequenceClassifier)
        }
        (None, Some(class)) if class.ends_with("ForTokenClassification") => {
            Ok(TaskClass::TokenClassifier)
        }
        (None, Some(class)) if class.ends_with("Model") && !class.contains("For") => {
            Ok(TaskClass::Backbone)
        }
        _ => Err(ModelError::Unsupported {
            path: path.to_owned(),
            key: "task_type".to_owned(),
            value: object.get("task_type").unwrap_or(&Value::Null).to_string(),
            supported: "CAUSAL_LM, SEQ_CLS, TOKEN_CLS and FEATURE_EXTRACTION are built".to_owned(),
        }),
    }
}

/// `target_modules` that select exactly the modules of `plan`.
fn targets(
    lora: &LoraOptions,
    class: TaskClass,
    plan: &Plan,
    modules: &[ModuleSpec],
) -> Result<Value, ModelError> {
    let exact = |targets: Targets| -> bool {
        let options = LoraOptions {
            targets,
            ..lora.clone()
        };
        matching::targeted(&options, class, modules).is_ok_and(|chosen| {
            chosen.len() == plan.len()
                && chosen.iter().all(|module| plan.contains_key(&module.path))
        })
    };
    match &lora.targets {
        Targets::List(names) if exact(lora.targets.clone()) => {
            let mut names = names.clone();
            names.sort();
            names.dedup();
            return Ok(json!(names));
        }
        Targets::Regex(pattern) if exact(lora.targets.clone()) => return Ok(json!(pattern)),
        _ => {}
    }
    let chosen = plan.keys().map(String::as_str).collect();
    let names = matching::minimal_suffixes(&chosen, modules);
    if lora.layers_to_transform.is_none() && exact(Targets::List(names.clone())) {
        return Ok(json!(names));
    }
    Ok(json!(plan.keys().collect::<Vec<_>>()))
}

/// `rank_pattern` and `alpha_pattern`. PEFT sorts them when it writes, so where their order
/// decides, every module is named on its own.
fn patterns(lora: &LoraOptions, plan: &Plan) -> Result<(Value, Value), ModelError> {
    let mut ranks = lora.rank_pattern.clone();
    let mut alphas = lora.alpha_pattern.clone();
    ranks.0.sort_by(|a, b| a.0.cmp(&b.0));
    alphas.0.sort_by(|a, b| a.0.cmp(&b.0));
    let mut exact = true;
    for (path, pair) in plan {
        exact &= ranks.resolve(path)?.unwrap_or(lora.r) == pair.rank;
        exact &= alphas.resolve(path)?.unwrap_or(lora.alpha) == pair.alpha;
    }
    if !exact {
        let escaped = |path: &String| path.replace('.', r"\.");
        ranks = Patterned(
            plan.iter()
                .filter(|(_, pair)| pair.rank != lora.r)
                .map(|(path, pair)| (escaped(path), pair.rank))
                .collect(),
        );
        alphas = Patterned(
            plan.iter()
                .filter(|(_, pair)| pair.alpha != lora.alpha)
                .map(|(path, pair)| (escaped(path), pair.alpha))
                .collect(),
        );
    }
    let object = |entries: BTreeMap<&String, Value>| json!(entries);
    Ok((
        object(ranks.0.iter().map(|(k, v)| (k, json!(v))).collect()),
        object(alphas.0.iter().map(|(k, v)| (k, number(*v))).collect()),
    ))
}

/// A whole number without a decimal point, as PEFT's integer fields have it.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 9e15 {
        json!(value as i64)
    } else {
        json!(value)
    }
}

/// Everything beyond ASCII as `\uXXXX`, as Python's `json` writes it.
fn ascii(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_ascii() {
            escaped.push(character);
        } else {
            let mut units = [0u16; 2];
            for unit in character.encode_utf16(&mut units) {
                escaped.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(changes: Value) -> Result<AdapterConfig, ModelError> {
        let mut object = json!({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8,
            "target_modules": ["q_proj"], "bias": "none", "init_lora_weights": true,
        });
        for (key, value) in changes.as_object().unwrap() {
            object[key] = value.clone();
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE), object.to_string()).unwrap();
        AdapterConfig::read(dir.path())
    }

    #[test]
    fn variants_that_are_not_built_are_refused_by_name() {
        let cases = [
            ("use_qalora", json!(true)),
            ("bias", json!("some")),
            ("init_lora_weights", json!("olora")),
            ("init_lora_weights", json!("pissa_niter_4")),
            ("task_type", json!("QUESTION_ANS")),
            ("peft_type", json!("IA3")),
            ("trainable_token_indices", json!({"lm_head": [1]})),
            ("a_field_of_the_future", json!({"x": 1})),
        ];
        for (key, value) in cases {
            let error = read(json!({ key: value })).unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
        read(json!({"a_field_of_the_future": null, "use_dora": false})).unwrap();
    }

    #[test]
    fn variants_that_are_built_are_read() {
        let config = read(json!({
            "use_dora": true, "bias": "lora_only", "init_lora_weights": "pissa",
            "trainable_token_indices": {"embed_tokens": [7, 3]},
        }))
        .unwrap();
        let lora = config.lora.unwrap();
        assert!(lora.use_dora);
        assert_eq!(lora.bias, crate::BiasMode::LoraOnly);
        assert_eq!(lora.init, PairInit::Pissa);
        assert_eq!(lora.trained_tokens, [7, 3]);
    }

    #[test]
    fn a_class_is_found_without_a_task_type() {
        let config = read(json!({
            "task_type": null,
            "auto_mapping": {"base_model_class": "BertModel", "parent_library": "x"},
        }))
        .unwrap();
        assert_eq!(config.class, TaskClass::Backbone);
    }

    #[test]
    fn text_is_escaped_as_python_does() {
        assert_eq!(ascii("å😀a"), "\\u00e5\\ud83d\\ude00a");
    }
}
