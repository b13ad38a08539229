//! `calor cohort synth`: a synthetic multimodal cohort with a known optimum.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Instant;

use calor_records::{Split, SynthModality, SynthOptions, SynthReport, synthesize};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::failure::{Exit, Failure};
use crate::output::{self, Align, Table, bytes, count, seconds};

/// What to make, and where.
#[derive(clap::Args)]
#[command(
    after_help = "The folder's generating_model.json says what the outcome follows from; truth/ has each patient's \
                  factors and probabilities. The same options give the same bytes, and the first patients are the \
                  same in a cohort of any size."
)]
pub struct Arguments {
    /// Folder to write, empty or not there yet
    #[arg(value_name = "OUT")]
    out: PathBuf,
    /// Patients
    #[arg(long, value_name = "N", default_value_t = 4_000)]
    patients: u64,
    /// Seed of everything that is drawn
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Modalities to make: register, notes, labs, image, waveform, omics, speech [default: all]
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', value_parser = modality)]
    modalities: Vec<SynthModality>,
    /// Share of patients without a modality, such as image=0.3,speech=0.1
    #[arg(long, value_name = "NAME=SHARE,…", value_delimiter = ',', value_parser = share)]
    missing: Vec<(SynthModality, f64)>,
    /// How much that share depends on the site, from 0 to 1
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    missing_by_site: f64,
    /// By how much sites differ in log-odds and, in standard deviations, in creatinine
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    site_effect: f64,
    /// Share of women's outcomes that no label records
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    group_bias: f64,
    /// Share of labels turned around
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    label_noise: f64,
    /// Share of patients with the outcome, before bias and noise
    #[arg(long, value_name = "P", default_value_t = 0.3)]
    prevalence: f64,
    /// What image and omics add only together, in log-odds
    #[arg(long, value_name = "X", default_value_t = 1.6)]
    interaction: f64,
    /// Prints JSON
    #[arg(long)]
    json: bool,
}

impl Arguments {
    fn options(&self) -> Result<SynthOptions, Failure> {
        let mut missing = BTreeMap::new();
        for &(modality, share) in &self.missing {
            if missing.insert(modality, share).is_some() {
                return Err(Failure::usage(format!("--missing names {modality} twice")));
            }
        }
        let options = SynthOptions {
            patients: self.patients,
            seed: self.seed,
            modalities: if self.modalities.is_empty() {
                SynthModality::ALL.to_vec()
            } else {
                self.modalities.clone()
            },
            missing,
            missing_by_site: self.missing_by_site,
            site_effect: self.site_effect,
            group_bias: self.group_bias,
            label_noise: self.label_noise,
            prevalence: self.prevalence,
            interaction: self.interaction,
        };
        options
            .check()
            .map_err(|error| Failure::usage(error.to_string()))?;
        Ok(options)
    }
}

/// Writes the cohort and shows its optimum.
pub fn run(arguments: &Arguments) -> Result<Exit, Failure> {
    let options = arguments.options()?;
    let bar = std::io::stderr()
        .is_terminal()
        .then(|| bar(options.patients));
    let start = Instant::now();
    let report = synthesize(&arguments.out, &options, &|written| {
        if let Some(bar) = &bar {
            bar.set_position(written);
        }
    });
    if let Some(bar) = &bar {
        bar.finish_and_clear();
    }
    let report = report?;
    if arguments.json {
        output::print_json(&report)?;
    } else {
        output::print(&format!(
            "{}  {} patients in {}\n{}",
            arguments.out.display(),
            count(options.patients),
            seconds(start.elapsed().as_secs_f64()),
            show(&report)
        ))?;
    }
    Ok(Exit::Done)
}

fn bar(patients: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("Writing patients  {wide_bar:.dim}  {pos}/{len}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    let target = ProgressDrawTarget::stderr_with_hz(8);
    ProgressBar::with_draw_target(Some(patients), target).with_style(style)
}

fn show(report: &SynthReport) -> String {
    let mut text = String::new();
    let mut push = |title: &str, table: &Table| {
        // Writing to a String cannot fail.
        let _ = write!(text, "\n{title}\n{}", table.render());
    };

    let mut cohort = Table::new(&[("", Align::Left), ("", Align::Left)]);
    let splits: Vec<String> = Split::ALL
        .iter()
        .map(|split| {
            let patients = report.splits.get(split).copied().unwrap_or(0);
            format!("{} {split}", count(patients))
        })
        .collect();
    cohort.row(["patients", &splits.join(", ")]);
    cohort.row(["rows", &count(report.rows)]);
    cohort.row([
        "items",
        &format!(
            "{} files, {}",
            count(report.item_files),
            bytes(report.item_bytes)
        ),
    ]);
    cohort.row(["outcome", &percent(report.outcome_share)]);
    cohort.row(["label", &percent(report.label_share)]);
    push("Cohort", &cohort);

    let optimum = &report.optimum;
    let held_out = &report.held_out;
    let heads = [
        ("", Align::Left),
        ("in expectation", Align::Right),
        ("on the held out", Align::Right),
    ];
    let mut best = Table::new(&heads);
    best.row([
        "every modality of everyone".to_owned(),
        auroc(Some(optimum.everything)),
        auroc(held_out.everything),
    ]);
    best.row([
        "what is not missing".to_owned(),
        auroc(Some(optimum.observed)),
        auroc(held_out.observed),
    ]);
    best.row(["the site alone".to_owned(), auroc(Some(optimum.site_alone))]);
    if report.options.group_bias > 0.0 || report.options.label_noise > 0.0 {
        best.row([
            "for the outcome before bias and noise".to_owned(),
            auroc(Some(optimum.outcome)),
        ]);
    }
    push("Best AUROC that any model can reach", &best);

    let mut modalities = Table::new(&[
        ("modality", Align::Left),
        ("missing", Align::Right),
        ("alone", Align::Right),
        ("alone, held out", Align::Right),
        ("all others", Align::Right),
        ("Shapley value", Align::Right),
    ]);
    for (one, found) in optimum.modalities.iter().zip(&held_out.modalities) {
        let missing = report.missing.get(&one.modality).copied();
        modalities.row([
            one.modality.name().to_owned(),
            missing.map_or_else(String::new, percent),
            auroc(Some(one.alone)),
            auroc(found.alone),
            auroc(Some(one.without)),
            auroc(Some(one.shapley)),
        ]);
    }
    push(
        "What each modality is worth (AUROC, exact over all subsets)",
        &modalities,
    );
    let mut sources = Table::new(&[
        ("source", Align::Left),
        ("alone", Align::Right),
        ("all others", Align::Right),
        ("Shapley value", Align::Right),
    ]);
    for source in &optimum.sources {
        sources.row([
            source.source.clone(),
            auroc(Some(source.alone)),
            auroc(Some(source.without)),
            auroc(Some(source.shapley)),
        ]);
    }
    let title = "The same with the text as one, to compare with calor evaluate --ablate modality";
    let _ = write!(text, "\n{title}\n{}", sources.render());
    let _ = writeln!(
        text,
        "\nIn expectation: integrated over the generating model, within {:.4}.\nHeld out: the best \
         scores of {} patients against their labels.",
        optimum.error,
        count(held_out.patients)
    );
    text
}

fn auroc(value: Option<f64>) -> String {
    value.map_or_else(|| "undefined".to_owned(), |value| format!("{value:.4}"))
}

fn percent(share: f64) -> String {
    format!("{:.1}%", 100.0 * share)
}

fn modality(name: &str) -> Result<SynthModality, String> {
    SynthModality::from_name(name).ok_or_else(|| {
        let names = SynthModality::ALL.map(SynthModality::name);
        format!("there is {}", names.join(", "))
    })
}

fn share(text: &str) -> Result<(SynthModality, f64), String> {
    let (name, value) = text
        .split_once('=')
        .ok_or_else(|| "write it as NAME=SHARE".to_owned())?;
    let value = value
        .parse()
        .map_err(|_| "the share is a number from 0 to 1".to_owned())?;
    Ok((modality(name)?, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_and_names_are_read() {
        assert_eq!(share("image=0.25"), Ok((SynthModality::Image, 0.25)));
        assert!(share("image").unwrap_err().contains("NAME=SHARE"));
        assert!(share("image=x").unwrap_err().contains("number"));
        assert!(share("scan=0.1").unwrap_err().contains("waveform"));
    }
}
