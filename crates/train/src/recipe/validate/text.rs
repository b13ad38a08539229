//! Rules of tasks whose rows are texts, and of language models.

use calor_sequence::{Overlength, SequenceError, TextFiles};

use super::Found;
use crate::recipe::{PoolingChoice, Recipe, TaskKind};

pub(super) fn rules(recipe: &Recipe, found: &mut Found) {
    let (task, text) = (&recipe.task, &recipe.text);
    let kind = task.kind.name();
    let cut = matches!(
        recipe.sequence.overlength,
        Overlength::CutEnd | Overlength::CutStart
    );
    if text.is_used() {
        found.unless(
            text.train.is_some(),
            "text.train",
            "is missing",
            "give the file with the rows to train on",
        );
        found.unless(
            !matches!(task.kind, TaskKind::Multilabel | TaskKind::Regression),
            "task.kind",
            format_args!("is `{kind}`, which files of text cannot be learned for"),
            "use `binary`, `multiclass`, `tokens` or `causal_lm`, or a cohort",
        );
        found.unless(
            recipe.modality.streams().is_empty(),
            "modality",
            "is given together with files of text",
            "items belong to the patients of a cohort",
        );
        found.unless(
            task.notes.is_empty(),
            "task.notes",
            "is given together with files of text",
            "notes are those of a cohort",
        );
        if let Err(SequenceError::Option { key, problem }) = TextFiles::check(&recipe.sequence) {
            found.unless(false, &format!("sequence.{key}"), problem, "");
        }
    } else {
        found.unless(
            task.kind != TaskKind::Tokens,
            "text.train",
            "is missing, which a tokens task needs",
            "give a file with words and their tags",
        );
        found.unless(
            task.kind != TaskKind::CausalLm || !task.notes.is_empty(),
            "task.notes",
            "names no code, and there are no files of text",
            "give codes whose text is learned, or `text.train`",
        );
        found.unless(
            !cut,
            "sequence.overlength",
            "cuts texts, and a patient is made of events",
            "use `drop_oldest_events` or `error`",
        );
    }
    found.unless(
        task.notes.is_empty() || task.kind == TaskKind::CausalLm,
        "task.notes",
        format_args!("is given for a {kind} task"),
        "a `causal_lm` task learns notes",
    );
    if task.kind.per_token() {
        found.unless(
            task.pooling == PoolingChoice::Auto,
            "task.pooling",
            format_args!("is given, but a {kind} task reads every token"),
            "leave it out",
        );
        found.unless(
            task.hidden == 0,
            "task.hidden",
            format_args!("is given, but the head of a {kind} task has no hidden layer"),
            "leave it out",
        );
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn keys(recipe: &str, set: &[&str]) -> Vec<String> {
        let set: Vec<String> = set.iter().map(|text| (*text).to_owned()).collect();
        match Recipe::parse(recipe, Path::new("x.toml"), &set) {
            Ok(_) => Vec::new(),
            Err(error) => {
                let problems = error.problems().iter();
                problems.map(|problem| problem.key.clone()).collect()
            }
        }
    }

    #[test]
    fn rows_of_text_and_language_models_have_rules_of_their_own() {
        const HEAD: &str = "schema = 1\nname = \"x\"\n[model]\nid = \"m\"\n";
        let text = format!("{HEAD}[task]\nkind = \"tokens\"\n[text]\ntrain = \"t.tsv\"\n");
        let cohort =
            format!("{HEAD}[task]\nkind = \"binary\"\nlabels = \"l\"\n[cohort]\npath = \"c\"\n");
        let problems = |set: &[&str]| keys(&text, set);
        let with_cohort = |set: &[&str]| keys(&cohort, set);
        assert!(problems(&[]).is_empty());
        assert!(problems(&["task.kind=causal_lm", "sequence.overlength=cut_end"]).is_empty());
        let cases: &[(&[&str], &str)] = &[
            (&["cohort.path=c"], "cohort.path"),
            (&["task.labels=l"], "task.labels"),
            (&["task.kind=regression"], "task.kind"),
            (&["task.pooling=last"], "task.pooling"),
            (&["task.hidden=8"], "task.hidden"),
            (&["task.notes=[\"N\"]", "task.kind=causal_lm"], "task.notes"),
            (
                &["sequence.overlength=drop_oldest_events"],
                "sequence.overlength",
            ),
            (
                &["task.kind=causal_lm", "task.class_weights=balanced"],
                "task.class_weights",
            ),
            (&["evaluate.metric=auroc"], "evaluate.metric"),
        ];
        for (set, key) in cases {
            assert_eq!(problems(set), [*key], "{set:?}");
        }
        assert_eq!(
            with_cohort(&["task.kind=causal_lm", "task.labels="]),
            ["task.notes"]
        );
        assert_eq!(
            with_cohort(&["sequence.overlength=cut_end"]),
            ["sequence.overlength"]
        );
        assert_eq!(with_cohort(&["task.notes=[\"N\"]"]), ["task.notes"]);
    }
}
