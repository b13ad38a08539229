//! `calor cohort`: what is in a cohort, and whether it is MEDS.

use std::fmt::Write;
use std::path::PathBuf;

use calor_records::{
    Cohort, Distribution, InspectOptions, Inspection, Severity, Split, TaskSplitSummary,
    ValidationReport, inspect, validate,
};

use crate::failure::{Exit, Failure};
use crate::output::{self, Align, Table, bytes, count, number};
use crate::synth;

/// What to do with a cohort.
#[derive(clap::Subcommand)]
pub enum Verb {
    /// Writes a synthetic cohort of every modality, and the best AUROC that any model can reach on it
    Synth(synth::Arguments),
    /// Shows patients, events, codes, sites, time spans, labels by split and what is missing
    Inspect(Inspect),
    /// Checks each rule of MEDS, naming rule, file and row
    #[command(after_help = "Exit status 1 if a rule is broken. Advice (warnings) does not count.")]
    Validate(Validate),
}

/// The cohort to look into.
#[derive(clap::Args)]
pub struct Inspect {
    /// Folder of the cohort, with `data/` and `metadata/` in it
    #[arg(value_name = "DIR")]
    cohort: PathBuf,
    /// How many of the most frequent codes are listed
    #[arg(long, value_name = "N", default_value_t = 10)]
    codes: usize,
    /// Prints JSON
    #[arg(long)]
    json: bool,
}

/// The cohort to check.
#[derive(clap::Args)]
pub struct Validate {
    /// Folder of the cohort, with `data/` and `metadata/` in it
    #[arg(value_name = "DIR")]
    cohort: PathBuf,
    /// Prints every rule, kept or broken, as JSON
    #[arg(long)]
    json: bool,
}

/// Runs one of them.
pub fn run(verb: &Verb) -> Result<Exit, Failure> {
    match verb {
        Verb::Synth(arguments) => synth::run(arguments),
        Verb::Inspect(arguments) => {
            let cohort = Cohort::open(&arguments.cohort)?;
            let inspection = inspect(
                &cohort,
                &InspectOptions {
                    top_codes: arguments.codes,
                },
            )?;
            if arguments.json {
                output::print_json(&inspection)?;
            } else {
                output::print(&show_inspection(&inspection))?;
            }
            Ok(Exit::Done)
        }
        Verb::Validate(arguments) => {
            let report = validate(&arguments.cohort);
            if arguments.json {
                output::print_json(&report)?;
            } else {
                output::print(&show_validation(&report))?;
            }
            Ok(if report.valid {
                Exit::Done
            } else {
                Exit::Failed
            })
        }
    }
}

fn show_inspection(found: &Inspection) -> String {
    let mut text = format!("{}\n", found.path.display());
    let mut push = |title: &str, table: &Table| {
        if !table.is_empty() {
            // Writing to a String cannot fail.
            let _ = write!(text, "\n{title}\n{}", table.render());
        }
    };

    let mut overview = Table::new(&[("", Align::Left), ("", Align::Left)]);
    let version = found
        .meds_version
        .as_ref()
        .map_or_else(|| "MEDS".to_owned(), |version| format!("MEDS {version}"));
    let name = found
        .dataset_name
        .clone()
        .unwrap_or_else(|| "unnamed".to_owned());
    let release = found
        .dataset_version
        .as_ref()
        .map_or_else(String::new, |version| format!(" {version}"));
    overview.row([
        "data set".to_owned(),
        format!("{name}{release} ({version})"),
    ]);
    overview.row([
        "files".to_owned(),
        format!(
            "{} ({})",
            count(found.data_files as u64),
            bytes(found.data_bytes)
        ),
    ]);
    overview.row(["patients".to_owned(), count(found.patients)]);
    overview.row([
        "events".to_owned(),
        format!(
            "{}, {} of them static",
            count(found.events),
            count(found.static_events)
        ),
    ]);
    if let Some(distribution) = &found.events_per_patient {
        overview.row(["events a patient".to_owned(), spread(distribution)]);
    }
    if let (Some(first), Some(last)) = (&found.first_time, &found.last_time) {
        overview.row(["time".to_owned(), format!("{first} to {last}")]);
    }
    if let Some(distribution) = &found.span_years {
        overview.row(["years a patient".to_owned(), spread(distribution)]);
    }
    overview.row([
        "codes".to_owned(),
        format!(
            "{}, {} of them described",
            count(found.codes.distinct),
            count(found.codes.described)
        ),
    ]);
    push("Overview", &overview);

    let mut splits = Table::new(&[("split", Align::Left), ("patients", Align::Right)]);
    for split in &found.splits {
        splits.row([
            split.split.clone().unwrap_or_else(|| "(none)".to_owned()),
            count(split.patients),
        ]);
    }
    push("Splits", &splits);

    let column = found.site_column.as_deref().unwrap_or("site");
    let mut sites = Table::new(&[
        (column, Align::Left),
        ("events", Align::Right),
        ("patients", Align::Right),
    ]);
    for site in &found.sites {
        sites.row([
            site.site.clone().unwrap_or_else(|| "(none)".to_owned()),
            count(site.events),
            count(site.patients),
        ]);
    }
    push("Sites", &sites);

    let mut items = Table::new(&[
        ("items", Align::Left),
        ("column", Align::Left),
        ("files", Align::Right),
        ("patients", Align::Right),
        ("share of patients", Align::Right),
    ]);
    for item in &found.items {
        items.row([
            item.modality.name().to_owned(),
            item.column.to_owned(),
            count(item.items),
            count(item.patients),
            share(item.patients, found.patients),
        ]);
    }
    push("Items", &items);

    let mut labels = Table::new(&[
        ("task", Align::Left),
        ("split", Align::Left),
        ("labels", Align::Right),
        ("patients", Align::Right),
        ("values", Align::Left),
    ]);
    for task in &found.labels {
        for split in task.by_split.iter().filter(|split| split.labels > 0) {
            labels.row([
                task.task.clone(),
                split_name(split.split),
                count(split.labels),
                count(split.patients),
                values_of(split),
            ]);
        }
        if task.without_data > 0 {
            labels.row([
                task.task.clone(),
                "(no data)".to_owned(),
                count(task.without_data),
            ]);
        }
    }
    push("Labels", &labels);

    let mut survival = Table::new(&[
        ("task", Align::Left),
        ("split", Align::Left),
        ("labels", Align::Right),
        ("events", Align::Left),
        ("days followed", Align::Left),
    ]);
    for task in &found.survival {
        for split in task.by_split.iter().filter(|split| split.labels > 0) {
            let named = |event: &i32| {
                if *event == 0 {
                    "censored".to_owned()
                } else {
                    format!("cause {event}")
                }
            };
            let events: Vec<String> = split
                .events
                .iter()
                .map(|(event, n)| format!("{} {}", named(event), count(*n)))
                .collect();
            survival.row([
                task.task.clone(),
                split_name(split.split),
                count(split.labels),
                events.join(", "),
                split
                    .duration_days
                    .as_ref()
                    .map_or_else(String::new, spread),
            ]);
        }
    }
    push("Survival", &survival);

    let mut codes = Table::new(&[
        ("most frequent codes", Align::Left),
        ("description", Align::Left),
        ("events", Align::Right),
        ("patients", Align::Right),
        ("with number", Align::Right),
        ("with text", Align::Right),
    ]);
    for code in &found.codes.top {
        codes.row([
            code.code.clone(),
            code.description.clone().unwrap_or_default(),
            count(code.events),
            count(code.patients),
            share(code.with_number, code.events),
            share(code.with_text, code.events),
        ]);
    }
    push("Codes", &codes);

    let mut columns = Table::new(&[
        ("further column", Align::Left),
        ("type", Align::Left),
        ("files", Align::Right),
    ]);
    for column in &found.extra_columns {
        columns.row([
            column.name.clone(),
            column.types.join(" or "),
            count(column.files),
        ]);
    }
    push("Columns", &columns);

    let missing = &found.missingness;
    let mut missingness = Table::new(&[
        ("missing", Align::Left),
        ("count", Align::Right),
        ("share", Align::Right),
    ]);
    for (what, of, total) in [
        (
            "events without a time (static)",
            missing.events_without_time,
            found.events,
        ),
        (
            "events without a number",
            missing.events_without_number,
            found.events,
        ),
        (
            "events without text",
            missing.events_without_text,
            found.events,
        ),
        (
            "events without number and text",
            missing.events_without_number_and_text,
            found.events,
        ),
        (
            "events without a site",
            missing.events_without_site,
            found.events,
        ),
        (
            "events whose code has no description",
            missing.events_without_description,
            found.events,
        ),
        (
            "patients without a birth",
            missing.patients_without_birth,
            found.patients,
        ),
        (
            "patients without an event in time",
            missing.patients_without_timed_events,
            found.patients,
        ),
        (
            "patients in no split",
            missing.patients_without_split,
            found.patients,
        ),
    ] {
        missingness.row([what.to_owned(), count(of), share(of, total)]);
    }
    push("Missingness", &missingness);
    text
}

fn show_validation(report: &ValidationReport) -> String {
    let mut text = String::new();
    for rule in report.broken() {
        let word = match rule.severity {
            Severity::Error => "broken",
            Severity::Warning => "advice",
        };
        let _ = writeln!(text, "{word}  {}: {}", rule.rule.name(), rule.statement);
        for finding in &rule.findings {
            let file = finding
                .file
                .as_ref()
                .map_or_else(String::new, |file| file.display().to_string());
            let row = finding
                .row
                .map_or_else(String::new, |row| format!(", row {row}"));
            let place = if file.is_empty() {
                String::new()
            } else {
                format!("{file}{row}: ")
            };
            let _ = writeln!(text, "        {place}{}", finding.message);
        }
        let hidden = rule.count - rule.findings.len() as u64;
        if hidden > 0 {
            let _ = writeln!(text, "        … and {} more", count(hidden));
        }
    }
    if !text.is_empty() {
        text.push('\n');
    }
    let errors = report
        .rules
        .iter()
        .filter(|rule| rule.severity == Severity::Error);
    let (rules, broken) = errors.fold((0, 0), |(all, broken), rule| {
        (all + 1, broken + usize::from(rule.count > 0))
    });
    let verdict = if report.valid {
        format!("is MEDS: all {rules} rules are kept")
    } else {
        format!(
            "is not MEDS: {broken} of {rules} rules are broken, {} findings",
            count(report.errors)
        )
    };
    let advice = if report.warnings > 0 {
        format!(", {} pieces of advice", count(report.warnings))
    } else {
        String::new()
    };
    let _ = writeln!(
        text,
        "{} ({} files, {} rows, {} patients) {verdict}{advice}.",
        report.path.display(),
        count(report.data_files as u64),
        count(report.rows),
        count(report.subjects)
    );
    text
}

fn spread(of: &Distribution) -> String {
    format!(
        "median {} (quartiles {} and {}, from {} to {})",
        number(of.median),
        number(of.lower_quartile),
        number(of.upper_quartile),
        number(of.minimum),
        number(of.maximum)
    )
}

fn values_of(split: &TaskSplitSummary) -> String {
    if let Some(distribution) = &split.distribution {
        return spread(distribution);
    }
    let values: Vec<String> = split
        .values
        .iter()
        .map(|(value, n)| format!("{value} {} ({})", count(*n), share(*n, split.labels)))
        .collect();
    values.join(", ")
}

fn split_name(split: Option<Split>) -> String {
    split.map_or_else(|| "(none)".to_owned(), |split| split.name().to_owned())
}

fn share(part: u64, whole: u64) -> String {
    if whole == 0 {
        String::new()
    } else {
        format!("{:.1}%", 100.0 * part as f64 / whole as f64)
    }
}
