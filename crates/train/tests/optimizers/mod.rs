//! Every optimizer, average and schedule in whole runs: stopped and resumed, evaluated, told apart.

use calor_records::Split;
use calor_train::StopFlag;

use crate::common::{Home, Kind, adapter_bytes, finish, losses, repeatable};
use crate::{assert_same, stop_after, use_options};

/// What is set for each, and a name for its folder.
const CASES: [(&str, &[&str]); 6] = [
    // Of this rank every factor has at least the 4,096 elements that are kept in eight bits.
    (
        "eight_bits",
        &["train.optimizer=adamw_8bit", "adapter.r=256"],
    ),
    (
        "schedule_free",
        &[
            "train.optimizer=schedule_free_adamw",
            "train.schedule.kind=constant",
        ],
    ),
    ("muon", &["train.optimizer=muon"]),
    ("sgd", &["train.optimizer=sgd", "train.learning_rate=0.03"]),
    ("ema", &["train.ema_decay=0.9"]),
    (
        "groups",
        &[
            "train.groups=[{ pattern = \"lora_B\", learning_rate = 2e-2 }, { pattern = \"classifier\", weight_decay = 0.0 }]",
            "train.schedule.kind=wsd",
            "train.schedule.minimum_factor=0.1",
        ],
    ),
];

#[test]
fn a_stopped_run_goes_on_bit_for_bit_with_each() {
    for (name, set) in CASES {
        let home = Home::new(Kind::Bert);
        let whole = finish(&home.options("whole", set));
        let losses = losses(&home.path("whole"));
        let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
        assert!(
            mean(&losses[12..]) < mean(&losses[..4]),
            "{name} does not learn: {losses:?}"
        );

        // Step 5 has an evaluation due, which the stop puts off; step 11 is of the second epoch.
        for step in [5, 11] {
            stop_after(&home, set, step);
        }
        finish(&home.resume("parts", set));
        assert_same(&home.path("whole"), &home.path("parts"));

        // What was saved is what was evaluated.
        let options = use_options(&home, "whole", None);
        let again =
            calor_train::evaluate(&options, Some(Split::HeldOut), &mut (), &StopFlag::new());
        let again = again.unwrap().unwrap();
        assert_eq!(again.evaluation, whole.evaluation["held_out"], "{name}");
    }
}

#[test]
fn an_average_changes_what_is_evaluated_and_not_the_training() {
    let home = Home::new(Kind::Bert);
    finish(&home.options("plain", &[]));
    finish(&home.options("averaged", &["train.ema_decay=0.9"]));
    let lines = |run: &str, event: &str| {
        let mut lines = repeatable(&home.path(run));
        lines.retain(|line| line["event"] == event);
        lines
    };
    assert_eq!(lines("plain", "step"), lines("averaged", "step"));
    assert_ne!(
        lines("plain", "evaluation"),
        lines("averaged", "evaluation")
    );
    assert_ne!(
        adapter_bytes(&home.path("plain")),
        adapter_bytes(&home.path("averaged"))
    );
}

#[test]
fn a_group_without_a_tensor_is_told_before_anything_is_trained() {
    let home = Home::new(Kind::Bert);
    let set = ["train.groups=[{ pattern = \"lora_E\", weight_decay = 0.0 }]"];
    for error in [
        calor_train::check(&home.options("run", &set), &mut ()).unwrap_err(),
        calor_train::train(&home.options("run", &set), &mut (), &StopFlag::new()).unwrap_err(),
    ] {
        assert!(error.is_usage());
        let text = error.to_string();
        assert!(
            text.contains("`lora_E` matches no trained tensor"),
            "{text}"
        );
    }
    assert!(!home.path("run/metrics.jsonl").exists());
}
