use std::path::Path;

use super::*;

const COMPLETE: &str = "schema = 1\nname = \"x\"\n[model]\nid = \"m\"\n[task]\nkind = \"binary\"\nlabels = \"l\"\n[cohort]\npath = \"c\"\n";

fn problems_with(set: &[&str]) -> Vec<String> {
    let set: Vec<String> = set.iter().map(|text| (*text).to_owned()).collect();
    match Recipe::parse(COMPLETE, Path::new("x.toml"), &set) {
        Ok(_) => Vec::new(),
        Err(error) => error
            .problems()
            .iter()
            .map(|problem| problem.key.clone())
            .collect(),
    }
}

#[test]
fn each_value_out_of_range_is_named_by_its_key() {
    let cases: &[(&str, &str)] = &[
        ("schema=2", "schema"),
        ("name=a/b", "name"),
        ("model.quantization=int4", "model.quantization"),
        (
            "model.double_quantization=false",
            "model.double_quantization",
        ),
        ("task.labels=[\"a\", \"b\"]", "task.labels"),
        ("task.class_weights=[1.0]", "task.class_weights"),
        ("task.class_weights=[-1.0, 1.0]", "task.class_weights"),
        ("sequence.max_tokens=0", "sequence.max_tokens"),
        (
            "sequence.quantile_levels=[0.5, 0.4]",
            "sequence.quantile_levels",
        ),
        ("adapter.r=0", "adapter.r"),
        ("adapter.alpha=0", "adapter.alpha"),
        ("adapter.dropout=1.0", "adapter.dropout"),
        ("adapter.targets=[]", "adapter.targets"),
        ("adapter.rank_pattern.query=0", "adapter.rank_pattern"),
        (
            "adapter.layers_to_transform=[0]",
            "adapter.layers_to_transform",
        ),
        (
            "adapter.layers_pattern=[\"layer\"]",
            "adapter.layers_pattern",
        ),
        (
            "adapter.trained_tokens=[3, \"a\", 3]",
            "adapter.trained_tokens",
        ),
        ("train.lora_plus_ratio=0", "train.lora_plus_ratio"),
        ("train.global_batch=0", "train.global_batch"),
        ("train.micro_batch=0", "train.micro_batch"),
        ("train.epochs=0", "train.epochs"),
        ("train.max_steps=0", "train.max_steps"),
        ("train.learning_rate=0", "train.learning_rate"),
        ("train.learning_rate=nan", "train.learning_rate"),
        ("train.weight_decay=-0.1", "train.weight_decay"),
        ("train.beta_2=1.0", "train.beta_2"),
        ("train.epsilon=0", "train.epsilon"),
        ("train.max_grad_norm=-1", "train.max_grad_norm"),
        ("train.keep_checkpoints=0", "train.keep_checkpoints"),
        (
            "train.schedule.warmup_fraction=1.5",
            "train.schedule.warmup_fraction",
        ),
        (
            "train.schedule.minimum_factor=2",
            "train.schedule.minimum_factor",
        ),
        ("train.schedule.decay_steps=5", "train.schedule.decay_steps"),
        ("train.momentum=0.5", "train.momentum"),
        ("train.ema_decay=1.0", "train.ema_decay"),
        ("train.newton_schulz_steps=0", "train.newton_schulz_steps"),
        ("train.optimizer=schedule_free_adamw", "train.schedule.kind"),
        (
            "train.groups=[{ pattern = \"(\", weight_decay = 0.0 }]",
            "train.groups",
        ),
        ("train.groups=[{ pattern = \"a\" }]", "train.groups"),
        (
            "train.groups=[{ pattern = \"a\", learning_rate = -1.0 }]",
            "train.groups",
        ),
        ("evaluate.every_steps=0", "evaluate.every_steps"),
        ("evaluate.metric=rmse", "evaluate.metric"),
        ("evaluate.resamples=3", "evaluate.resamples"),
        ("energy.watts_per_busy_core=0", "energy.watts_per_busy_core"),
        (
            "energy.grid_intensity_g_per_kwh=-5",
            "energy.grid_intensity_g_per_kwh",
        ),
    ];
    for (assignment, key) in cases {
        assert_eq!(problems_with(&[assignment]), [*key], "{assignment}");
    }
    assert!(problems_with(&[]).is_empty());
    assert_eq!(
        problems_with(&["adapter.r=0", "train.epochs=0"]).len(),
        2,
        "all problems at once"
    );
    assert!(
        problems_with(&["adapter.kind=none", "adapter.r=0"]).is_empty(),
        "an adapter that is not used is not checked"
    );
    assert_eq!(
        problems_with(&["task.kind=regression", "task.class_weights=balanced"]),
        ["task.class_weights"]
    );
    assert_eq!(problems_with(&["task.kind=multilabel"]), ["task.labels"]);
}
