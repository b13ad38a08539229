//! `calor generate`: text from a checkpoint and from a run.

use std::fs;

use serde_json::{Value, json};

use crate::support::{Workplace, language_model};

fn model() -> String {
    language_model().to_str().expect("a path").to_owned()
}

#[test]
fn a_prompt_is_continued_and_repeated_by_its_seed() {
    let workplace = Workplace::empty();
    let model = model();
    let generate = |more: &[&str]| {
        let arguments = ["generate", &model, "--prompt", "Is fever a symptom?"];
        let arguments = arguments.iter().chain(more);
        workplace.run(arguments.chain(&["--max-new-tokens", "12"]))
    };
    let greedy = generate(&[]).done();
    assert!(greedy.stderr.contains("tokens/s"), "{}", greedy.stderr);
    assert_eq!(greedy.stdout, generate(&[]).done().stdout);
    let drawn = |seed: &str| {
        generate(&["--temperature", "2", "--top-k", "40", "--seed", seed])
            .done()
            .stdout
    };
    assert_eq!(drawn("1"), drawn("1"));
    assert_ne!(drawn("1"), drawn("2"));
    let shown = generate(&["--json", "--system", "One word."]).done().json();
    assert!(shown["prompt_tokens"].as_u64().expect("a number") > 20);
    assert!(shown["ended"].is_boolean());
}

#[test]
fn a_file_gives_a_line_a_prompt_and_its_mistakes_are_named() {
    let workplace = Workplace::empty();
    let file = workplace.path("prompts.jsonl");
    let rows = [
        json!({"prompt": "fever?"}),
        json!({"messages": [
            {"role": "user", "content": "fever?"},
            {"role": "assistant", "content": "is not read"},
        ]}),
        json!({"prompt": "And thirst, at 38 degrees?"}),
    ];
    let text: Vec<String> = rows.iter().map(Value::to_string).collect();
    fs::write(&file, text.join("\n")).expect("prompts");
    let model = model();
    let generate = |more: &[&str]| {
        let arguments = ["generate", &model, "--file", "prompts.jsonl"];
        workplace.run(arguments.iter().chain(more))
    };
    let found = generate(&["--max-new-tokens", "5", "--batch", "2"]).done();
    let found: Vec<Value> = found
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    assert_eq!(found.len(), 3);
    // The same request in both forms.
    assert_eq!(found[0], found[1]);
    assert!(found.iter().all(|line| line["response"].is_string()));

    fs::write(&file, format!("{}\n{{\"secret\": 1}}", text[0])).expect("prompts");
    let wrong = generate(&[]).with_status(2).stderr;
    assert!(
        wrong.contains("prompts.jsonl, line 2: the row has neither") && !wrong.contains("secret"),
        "{wrong}"
    );
    let wrong = generate(&["--top-p", "0"]).with_status(2).stderr;
    assert!(wrong.contains("top-p is 0"), "{wrong}");
}

#[test]
fn a_run_of_another_task_does_not_generate() {
    let workplace = Workplace::new();
    workplace
        .run([
            "train",
            "recipe.toml",
            "--out",
            "run",
            "--set",
            "train.max_steps=2",
        ])
        .done();
    let refused = workplace
        .run(["generate", "run", "--prompt", "x"])
        .with_status(2)
        .stderr;
    assert!(
        refused.contains("only a language model continues a text"),
        "{refused}"
    );
}
