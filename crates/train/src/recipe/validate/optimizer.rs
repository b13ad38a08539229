//! Values of the optimizer and of the schedule that make no sense.

use super::Found;
use crate::recipe::{OptimizerKind, Recipe, ScheduleKind};

pub(super) fn optimizer(recipe: &Recipe, found: &mut Found) {
    let train = &recipe.train;
    for (key, value) in [
        ("train.momentum", train.momentum),
        ("train.ema_decay", train.ema_decay),
    ] {
        if let Some(value) = value {
            found.unless(
                (0.0..1.0).contains(&value),
                key,
                format_args!("is {value}"),
                "it is at least 0 and below 1",
            );
        }
    }
    let has_momentum = matches!(train.optimizer, OptimizerKind::Sgd | OptimizerKind::Muon);
    for (key, given) in [
        ("train.momentum", train.momentum.is_some()),
        ("train.nesterov", train.nesterov.is_some()),
    ] {
        found.unless(
            has_momentum || !given,
            key,
            "is given, and only `sgd` and `muon` have a momentum",
            "leave it out, or set `train.optimizer`",
        );
    }
    found.unless(
        !(train.optimizer == OptimizerKind::Sgd
            && train.nesterov == Some(true)
            && train.momentum == Some(0.0)),
        "train.nesterov",
        "is given without a momentum",
        "set `train.momentum` above 0",
    );
    found.at_least_one(
        "train.newton_schulz_steps",
        train.newton_schulz_steps as u64,
    );
    if train.optimizer == OptimizerKind::ScheduleFreeAdamW {
        found.unless(
            train.schedule.kind == ScheduleKind::Constant,
            "train.schedule.kind",
            format_args!(
                "is `{}`, and `schedule_free_adamw` averages in place of a decaying learning rate",
                train.schedule.kind.name()
            ),
            "set it to \"constant\"; a warm-up may stay",
        );
        found.unless(
            train.beta_1 > 0.0,
            "train.beta_1",
            "is 0, with which `schedule_free_adamw` has no average",
            "0.9 is usual",
        );
        found.unless(
            train.ema_decay.is_none(),
            "train.ema_decay",
            "is given, and `schedule_free_adamw` keeps an average of its own",
            "leave it out",
        );
    }
    for group in &train.groups {
        let key = "train.groups";
        let pattern = &group.pattern;
        if let Err(error) = regex::Regex::new(pattern) {
            found.unless(
                false,
                key,
                format_args!("has `{pattern}`, which is no regular expression: {error}"),
                "",
            );
        }
        found.unless(
            group.learning_rate.is_some() || group.weight_decay.is_some(),
            key,
            format_args!("has `{pattern}` with nothing to change"),
            "give `learning_rate`, `weight_decay` or both",
        );
        for (name, value) in [
            ("learning_rate", group.learning_rate),
            ("weight_decay", group.weight_decay),
        ] {
            if let Some(value) = value {
                found.unless(
                    value.is_finite() && value >= 0.0,
                    key,
                    format_args!("gives `{pattern}` a {name} of {value}"),
                    "it is at least 0",
                );
            }
        }
    }
}

pub(super) fn schedule(recipe: &Recipe, found: &mut Found) {
    let schedule = &recipe.train.schedule;
    let shares = [
        (
            "warmup",
            schedule.warmup_fraction,
            schedule.warmup_steps.is_some(),
        ),
        (
            "decay",
            schedule.decay_fraction,
            schedule.decay_steps.is_some(),
        ),
    ];
    for (part, fraction, has_steps) in shares {
        let Some(fraction) = fraction else { continue };
        found.unless(
            (0.0..=1.0).contains(&fraction),
            &format!("train.schedule.{part}_fraction"),
            format_args!("is {fraction}"),
            "it is a share of all steps: 0 to 1",
        );
        found.unless(
            !has_steps,
            &format!("train.schedule.{part}_steps"),
            format_args!("is given together with `train.schedule.{part}_fraction`"),
            "keep one of them",
        );
    }
    for (key, given) in [
        ("train.schedule.decay_steps", schedule.decay_steps.is_some()),
        (
            "train.schedule.decay_fraction",
            schedule.decay_fraction.is_some(),
        ),
    ] {
        found.unless(
            !given || schedule.kind == ScheduleKind::Wsd,
            key,
            format_args!(
                "is given, and a `{}` schedule has no decay of its own length",
                schedule.kind.name()
            ),
            "leave it out, or set `train.schedule.kind` to \"wsd\"",
        );
    }
    found.unless(
        (0.0..=1.0).contains(&schedule.minimum_factor),
        "train.schedule.minimum_factor",
        format_args!("is {}", schedule.minimum_factor),
        "it is a share of the peak learning rate: 0 to 1",
    );
}
