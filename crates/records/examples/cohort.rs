//! Validates a cohort and says what is in it, as JSON: `cargo run --release --example cohort DIR`.

use std::path::Path;
use std::process::ExitCode;

use calor_records::{Cohort, InspectOptions, inspect, validate};

fn main() -> ExitCode {
    let Some(path) = std::env::args_os().nth(1) else {
        eprintln!("usage: cohort DIR");
        return ExitCode::from(2);
    };
    let path = Path::new(&path);
    let report = validate(path);
    let broken: Vec<_> = report.broken().collect();
    let inspection =
        Cohort::open(path).and_then(|cohort| inspect(&cohort, &InspectOptions::default()));
    let inspection = match inspection {
        Ok(inspection) => serde_json::json!(inspection),
        Err(error) => serde_json::json!({ "error": error.to_string() }),
    };
    let output = serde_json::json!({
        "valid": report.valid,
        "broken": broken,
        "inspection": inspection,
    });
    println!("{output:#}");
    if report.valid {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
