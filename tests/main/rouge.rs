//! `scripts/rouge` against rouge-score, stored by `scripts/references/rouge.py`.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

/// Both divide the same whole numbers, in another order.
#[test]
fn scores_are_those_of_rouge_score() {
    let cases: Vec<Value> =
        serde_json::from_str(include_str!("fixtures/rouge.json")).expect("the fixture");
    assert!(cases.len() > 15);
    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, row: &dyn Fn(&Value) -> Value| {
        let lines: Vec<String> = cases.iter().map(|case| row(case).to_string()).collect();
        let path = folder.path().join(name);
        fs::write(&path, lines.join("\n")).expect("rows");
        path
    };
    let references = write(
        "references.jsonl",
        &|case| json!({"messages": [{"role": "assistant", "content": case["expected"]}]}),
    );
    let generated = write(
        "generated.jsonl",
        &|case| json!({"response": case["found"]}),
    );
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/rouge");
    let output = Command::new("python3")
        .arg(script)
        .args([&references, &generated])
        .args(["--json", "--resamples", "200"])
        .output()
        .expect("Python 3, which the scripts need");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let found: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    for name in ["rouge1", "rouge2", "rougeL"] {
        let mut sum = 0.0;
        for (case, scores) in cases
            .iter()
            .zip(found["scores"].as_array().expect("a list"))
        {
            let (expected, score) = (case[name].as_f64().unwrap(), scores[name].as_f64().unwrap());
            assert!((expected - score).abs() < 1e-12, "{name}: {case} {score}");
            sum += expected;
        }
        let mean = &found[name];
        let value = mean["value"].as_f64().unwrap();
        assert!((value - sum / cases.len() as f64).abs() < 1e-12);
        assert!(mean["low"].as_f64().unwrap() < value && value < mean["high"].as_f64().unwrap());
    }
}
