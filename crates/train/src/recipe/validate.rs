//! Values that have the right type and still make no sense.

mod optimizer;
mod text;

use calor_meter::MeterError;
use calor_model::EncoderSpec;
use calor_records::Modality;
use calor_sequence::SequenceError;

use super::modality::TEXT;
use super::{
    AdapterKind, ClassWeighting, ClassWeights, Metric, OmicsGrouping, Place, Problem,
    QuantizationChoice, Recipe, RecomputeChoice, RecomputeName, SCHEMA, TargetChoice, TaskKind,
    TokenChoice,
};

/// All problems of the recipe's values; `place` says where a key was given.
pub(super) fn problems(recipe: &Recipe, place: &dyn Fn(&str) -> Place) -> Vec<Problem> {
    let mut found = Found {
        place,
        problems: Vec::new(),
    };
    header(recipe, &mut found);
    model(recipe, &mut found);
    task(recipe, &mut found);
    text::rules(recipe, &mut found);
    sequence(recipe, &mut found);
    modality(recipe, &mut found);
    adapter(recipe, &mut found);
    train(recipe, &mut found);
    evaluate(recipe, &mut found);
    energy(recipe, &mut found);
    found.problems
}

struct Found<'a> {
    place: &'a dyn Fn(&str) -> Place,
    problems: Vec<Problem>,
}

impl Found<'_> {
    fn unless(
        &mut self,
        right: bool,
        key: &str,
        message: impl std::fmt::Display,
        hint: impl Into<String>,
    ) {
        if !right {
            let message = format!("`{key}` {message}");
            self.problems.push(Problem {
                place: (self.place)(key),
                key: key.to_owned(),
                message,
                hint: hint.into(),
            });
        }
    }

    fn positive(&mut self, key: &str, value: f64) {
        self.unless(
            value.is_finite() && value > 0.0,
            key,
            format_args!("is {value}, not above 0"),
            "",
        );
    }

    fn not_negative(&mut self, key: &str, value: f64) {
        self.unless(
            value.is_finite() && value >= 0.0,
            key,
            format_args!("is {value}, below 0 or no number"),
            "",
        );
    }

    fn at_least_one(&mut self, key: &str, value: u64) {
        self.unless(value >= 1, key, "is 0", "it is at least 1");
    }
}

fn header(recipe: &Recipe, found: &mut Found) {
    found.unless(
        recipe.schema == SCHEMA,
        "schema",
        format_args!("is {}", recipe.schema),
        format!("this version reads schema {SCHEMA}"),
    );
    let name = recipe.name.as_str();
    found.unless(
        !name.trim().is_empty(),
        "name",
        "is empty",
        "the run's report and folder carry it",
    );
    let plain = !name.contains(['/', '\\', '\0']) && name != "." && name != "..";
    found.unless(
        plain,
        "name",
        "cannot be the name of a folder",
        "leave out `/` and `\\`",
    );
    found.unless(
        !recipe.model.id.trim().is_empty(),
        "model.id",
        "is empty",
        "give a hub id such as `sentence-transformers/all-MiniLM-L6-v2` or a folder",
    );
    found.unless(
        !recipe.cohort.path.as_os_str().is_empty() || recipe.text.is_used(),
        "cohort.path",
        "is empty",
        "give the folder that holds `data/` and `metadata/`, or files of text in `[text]`",
    );
    found.unless(
        recipe.cohort.path.as_os_str().is_empty() || !recipe.text.is_used(),
        "cohort.path",
        "is given together with files of text",
        "keep one of `[cohort]` and `[text]`",
    );
    if let Some(options) = &recipe.cohort.synth
        && let Err(error) = options.check()
    {
        found.unless(
            false,
            "cohort.synth",
            format_args!("does not work out: {error}"),
            "",
        );
    }
}

fn model(recipe: &Recipe, found: &mut Found) {
    let model = &recipe.model;
    found.unless(
        model.double_quantization || model.quantization == QuantizationChoice::Nf4,
        "model.double_quantization",
        "is false, and nothing has scales that it would quantise",
        "leave it out, or set `model.quantization` to \"nf4\"",
    );
}

fn modality(recipe: &Recipe, found: &mut Found) {
    let section = &recipe.modality;
    found.unless(
        (0.0..1.0).contains(&section.dropout),
        "modality.dropout",
        format_args!("is {}", section.dropout),
        "it is a chance from 0 to below 1",
    );
    let names: Vec<&str> = Modality::ALL.map(Modality::name).into();
    for excluded in &section.exclude {
        let known = excluded == TEXT || names.contains(&excluded.as_str());
        found.unless(
            known,
            "modality.exclude",
            format_args!("names `{excluded}`, which is no modality"),
            format!("there are `{TEXT}`, `{}`", names.join("`, `")),
        );
    }
    let decoding = [
        (
            "modality.image.decode",
            section
                .image
                .as_ref()
                .and_then(|image| image.decode.problem().map(str::to_owned)),
        ),
        (
            "modality.waveform.decode",
            section
                .waveform
                .as_ref()
                .and_then(|waveform| waveform.decode.problem()),
        ),
        (
            "modality.speech.decode",
            section
                .speech
                .as_ref()
                .and_then(|speech| speech.decode.problem()),
        ),
    ];
    if let Some(omics) = &section.omics {
        found.unless(
            omics.clip >= 0.0 && omics.clip.is_finite(),
            "modality.omics.clip",
            format_args!("is {}", omics.clip),
            "give a number of standard deviations, or 0 to cut none",
        );
        let given =
            matches!(&omics.encoder, EncoderSpec::Omics(options) if !options.groups.is_empty());
        found.unless(
            !(given && omics.groups.is_some()),
            "modality.omics.groups",
            "is there beside `modality.omics.encoder.groups`",
            "remove one of the two",
        );
        if let Some(OmicsGrouping::Prefix { separator }) = &omics.groups {
            found.unless(
                !separator.is_empty(),
                "modality.omics.groups.separator",
                "is empty",
                "give what ends the beginning of a feature's name, `_` say",
            );
        }
    }
    for (key, problem) in decoding {
        if let Some(problem) = problem {
            found.unless(false, key, format_args!("does not work out: {problem}"), "");
        }
    }
    if let Err(error) = section.sequence(&recipe.sequence).check() {
        let (key, message) = match error {
            SequenceError::Modality { modality, problem } => {
                (format!("modality.{modality}"), problem)
            }
            // Everything else is the section `sequence`'s own.
            SequenceError::Option {
                key: "text",
                problem,
            } => ("modality.exclude".to_owned(), problem),
            _ => return,
        };
        found.unless(false, &key, format_args!(": {message}"), "");
    }
}

fn task(recipe: &Recipe, found: &mut Found) {
    let task = &recipe.task;
    let names = task.labels.names();
    let key = "task.labels";
    if recipe.text.is_used() || task.kind.per_token() {
        found.unless(
            names.is_empty(),
            key,
            "is given, but every row carries its own",
            "leave it out",
        );
        return class_weights(recipe, found);
    }
    found.unless(
        !names.is_empty() && names.iter().all(|name| !name.trim().is_empty()),
        key,
        "names no label set",
        "give a folder under `labels/` of the cohort",
    );
    if task.kind == TaskKind::Multilabel {
        found.unless(
            names.len() >= 2,
            key,
            "holds one label set",
            "`multilabel` needs at least two; for one, `task.kind = \"binary\"`",
        );
    } else {
        found.unless(
            names.len() <= 1,
            key,
            format_args!("holds {} label sets", names.len()),
            "several need `task.kind = \"multilabel\"`",
        );
    }
    for (index, name) in names.iter().enumerate() {
        found.unless(
            !names[..index].contains(name),
            key,
            format_args!("names `{name}` twice"),
            "",
        );
    }
    class_weights(recipe, found);
}

fn class_weights(recipe: &Recipe, found: &mut Found) {
    let task = &recipe.task;
    let names = task.labels.names();
    let key = "task.class_weights";
    match &task.class_weights {
        ClassWeights::Named(ClassWeighting::None) => {}
        _ if matches!(task.kind, TaskKind::Regression | TaskKind::CausalLm) => found.unless(
            false,
            key,
            format_args!("is given, but a {} task has no classes", task.kind.name()),
            "leave it out",
        ),
        ClassWeights::Named(ClassWeighting::Balanced) => {}
        ClassWeights::Values(values) => {
            found.unless(
                values
                    .iter()
                    .all(|value| value.is_finite() && *value >= 0.0),
                key,
                "holds a weight below 0",
                "",
            );
            found.unless(
                values.iter().any(|value| *value > 0.0),
                key,
                "holds no weight above 0",
                "",
            );
            let needed = match task.kind {
                TaskKind::Binary => Some((2, "a weight for the label `false` and one for `true`")),
                TaskKind::Multilabel => {
                    Some((names.len(), "one weight a label set, for its `true`"))
                }
                _ => None,
            };
            if let Some((count, what)) = needed {
                found.unless(
                    values.len() == count,
                    key,
                    format_args!("holds {} weights instead of {count}", values.len()),
                    format!("give {what}"),
                );
            }
        }
    }
}

fn sequence(recipe: &Recipe, found: &mut Found) {
    if let Err(SequenceError::Option { key, problem }) = recipe.sequence.check() {
        found.unless(false, &format!("sequence.{key}"), problem, "");
    }
}

fn adapter(recipe: &Recipe, found: &mut Found) {
    let adapter = &recipe.adapter;
    if adapter.kind == AdapterKind::None {
        return;
    }
    found.at_least_one("adapter.r", adapter.r as u64);
    found.positive("adapter.alpha", adapter.alpha);
    found.unless(
        (0.0..1.0).contains(&adapter.dropout),
        "adapter.dropout",
        format_args!("is {}", adapter.dropout),
        "it is a share: at least 0 and below 1",
    );
    let named = match &adapter.targets {
        TargetChoice::One(pattern) => !pattern.is_empty(),
        TargetChoice::Many(names) => !names.is_empty(),
    };
    found.unless(
        named,
        "adapter.targets",
        "names no module",
        "`all-linear` adapts every linear module; `adapter.kind = \"none\"` trains the head alone",
    );
    if let Some(layers) = &adapter.layers_to_transform {
        found.unless(
            !layers.is_empty(),
            "adapter.layers_to_transform",
            "names no layer",
            "leave it out to adapt all layers",
        );
        found.unless(
            matches!(adapter.targets, TargetChoice::Many(_)),
            "adapter.layers_to_transform",
            "is given, and `adapter.targets` is no list",
            "name the modules as a list, or the layers in the regular expression",
        );
    }
    found.unless(
        adapter.layers_pattern.is_empty() || adapter.layers_to_transform.is_some(),
        "adapter.layers_pattern",
        "is given without `adapter.layers_to_transform`",
        "",
    );
    for (index, token) in adapter.trained_tokens.iter().enumerate() {
        found.unless(
            !adapter.trained_tokens[..index].contains(token),
            "adapter.trained_tokens",
            match token {
                TokenChoice::Number(number) => format!("names the token {number} twice"),
                TokenChoice::Text(text) => format!("names the token `{text}` twice"),
            },
            "",
        );
    }
    for (pattern, rank) in &adapter.rank_pattern {
        found.unless(
            *rank >= 1,
            "adapter.rank_pattern",
            format_args!("gives `{pattern}` the rank 0"),
            "use `adapter.exclude` to leave a module out",
        );
    }
    for (pattern, alpha) in &adapter.alpha_pattern {
        found.unless(
            alpha.is_finite() && *alpha > 0.0,
            "adapter.alpha_pattern",
            format_args!("gives `{pattern}` an alpha of {alpha}"),
            "",
        );
    }
}

fn train(recipe: &Recipe, found: &mut Found) {
    let train = &recipe.train;
    found.at_least_one("train.global_batch", train.global_batch as u64);
    found.at_least_one("train.micro_batch", train.micro_batch as u64);
    found.at_least_one("train.epochs", train.epochs);
    if let Some(steps) = train.max_steps {
        found.at_least_one("train.max_steps", steps);
    }
    found.positive("train.learning_rate", train.learning_rate);
    if let Some(ratio) = train.lora_plus_ratio {
        found.positive("train.lora_plus_ratio", ratio);
        found.unless(
            recipe.adapter.kind == AdapterKind::Lora,
            "train.lora_plus_ratio",
            "is given, and `adapter.kind` is `none`",
            "leave it out",
        );
    }
    found.positive(
        "train.lora_plus_embedding_learning_rate",
        train.lora_plus_embedding_learning_rate,
    );
    for (key, rate) in [
        ("train.head_learning_rate", train.head_learning_rate),
        ("train.encoder_learning_rate", train.encoder_learning_rate),
        (
            "train.projector_learning_rate",
            train.projector_learning_rate,
        ),
    ] {
        if let Some(rate) = rate {
            found.positive(key, rate);
        }
    }
    found.not_negative("train.weight_decay", train.weight_decay);
    for (key, value) in [
        ("train.beta_1", train.beta_1),
        ("train.beta_2", train.beta_2),
    ] {
        found.unless(
            (0.0..1.0).contains(&value),
            key,
            format_args!("is {value}"),
            "it is at least 0 and below 1",
        );
    }
    found.positive("train.epsilon", train.epsilon);
    found.not_negative("train.max_grad_norm", train.max_grad_norm);
    if let RecomputeChoice::Every(blocks) = train.recompute {
        found.at_least_one("train.recompute", blocks as u64);
    }
    let none = train.recompute == RecomputeChoice::Named(RecomputeName::None);
    found.unless(
        !(train.offload && none),
        "train.offload",
        "is true, and no block is recomputed",
        "only inputs of recomputed blocks can wait on the host: set `train.recompute` to \"all\" or \"auto\"",
    );
    if let Some(steps) = train.checkpoint_every_steps {
        found.at_least_one("train.checkpoint_every_steps", steps);
    }
    found.at_least_one("train.keep_checkpoints", train.keep_checkpoints as u64);
    optimizer::optimizer(recipe, found);
    optimizer::schedule(recipe, found);
}

fn evaluate(recipe: &Recipe, found: &mut Found) {
    let evaluate = &recipe.evaluate;
    found.at_least_one("evaluate.every_steps", evaluate.every_steps);
    if let Some(rows) = evaluate.micro_batch {
        found.at_least_one("evaluate.micro_batch", rows as u64);
    }
    if let Some(metric) = evaluate.metric {
        let choices = Metric::ALL
            .into_iter()
            .filter(|metric| metric.fits(recipe.task.kind));
        let names: Vec<String> = choices
            .map(|choice| format!("`{}`", choice.name()))
            .collect();
        found.unless(
            metric.fits(recipe.task.kind),
            "evaluate.metric",
            format_args!(
                "is `{}`, which a {} task does not have",
                metric.name(),
                recipe.task.kind.name()
            ),
            format!("choose one of {}", names.join(", ")),
        );
    }
    found.unless(
        (100..=100_000).contains(&evaluate.resamples),
        "evaluate.resamples",
        format_args!("is {}", evaluate.resamples),
        "it is 100 to 100000; fewer say nothing about an interval's ends",
    );
}

fn energy(recipe: &Recipe, found: &mut Found) {
    if let Err(MeterError::InvalidOption { key, reason }) = recipe.energy.check() {
        found.unless(false, &format!("energy.{key}"), reason, "");
    }
}

#[cfg(test)]
mod tests;
