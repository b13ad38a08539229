//! Runs folded into their checkpoints through the binary.

use std::fs;

use crate::support::Workplace;

#[test]
fn a_run_is_folded_into_its_checkpoint() {
    let workplace = Workplace::new();
    let pooled = ["--set", "task.pooling=cls", "--set", "train.epochs=1"];
    let train = ["train", "recipe.toml", "--out", "run"];
    workplace.run(train.iter().chain(&pooled)).done();
    let ended = workplace.run(["merge", "run", "--out", "merged"]).done();
    assert!(
        ended.stdout.contains("Largest difference of logits"),
        "{}",
        ended.stdout
    );
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        assert!(workplace.path("merged").join(file).is_file(), "{file}");
    }
    let config = fs::read_to_string(workplace.path("merged").join("config.json")).expect("a file");
    assert!(config.contains("BertForSequenceClassification"), "{config}");

    let again = workplace
        .run(["merge", "run", "--out", "merged"])
        .with_status(1);
    assert!(
        again.stderr.contains("is there already"),
        "{}",
        again.stderr
    );
    let wrong = workplace
        .run(["merge", "run", "--out", "other", "--weights", "1,2"])
        .with_status(2);
    assert!(wrong.stderr.contains("--weights"), "{}", wrong.stderr);

    // An adapter of an encoder with a classifier: nothing else serves it as it is.
    let portable = [
        "merge",
        "run",
        "--out",
        "adapter",
        "--adapter-only",
        "--portable",
    ];
    let ended = workplace.run(portable).with_status(1);
    for line in ["vLLM: ", "mistral.rs: ", "modules_to_save", "To do: "] {
        assert!(
            ended.stdout.contains(line),
            "{line} is not in\n{}",
            ended.stdout
        );
    }
    let checked = ["check", "recipe.toml", "--portable"];
    let ended = workplace.run(checked.iter().chain(&pooled)).with_status(1);
    assert!(ended.stdout.contains("modules_to_save"), "{}", ended.stdout);
}

#[test]
fn a_head_over_the_mean_goes_along_beside_the_checkpoint() {
    let workplace = Workplace::new();
    let train = [
        "train",
        "recipe.toml",
        "--out",
        "run",
        "--set",
        "train.epochs=1",
    ];
    workplace.run(train).done();
    let merge = [
        "merge", "run", "--out", "merged", "--dtype", "bf16", "--json",
    ];
    let merged = workplace.run(merge).done().json();
    assert_eq!(merged["agreement"]["compared"], "hidden states");
    assert!(
        merged["notes"][0]
            .as_str()
            .is_some_and(|note| note.contains("calor.safetensors"))
    );
    assert!(workplace.path("merged").join("calor.safetensors").is_file());
}
