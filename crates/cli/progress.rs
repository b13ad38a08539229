//! How a run looks while it happens: a bar on a terminal, plain lines elsewhere.

use std::io::{self, IsTerminal};
use std::path::Path;
use std::time::{Duration, Instant};

use calor_meter::Quantity;
use calor_train::artifacts::metrics::EvaluationLine;
use calor_train::recipe::Metric;
use calor_train::{Observer, Stage, StepProgress};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::output::{count, number, seconds};

/// A log gets a line a stage, and while steps go on not more often than this.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Tells people on stderr how a run goes.
pub struct Progress {
    /// None where stderr is no terminal.
    bar: Option<ProgressBar>,
    last_line: Option<Instant>,
    stage: Option<Stage>,
    /// Whether the bar shows a count, or only that something goes on.
    counting: bool,
}

/// Before there is anything to count.
const WAITING: &str = "{spinner} {msg}";
const COUNTING: &str = "{msg}  {wide_bar:.dim}  {pos}/{len}";

impl Progress {
    /// Looks whether stderr is a terminal.
    pub fn new() -> Progress {
        let bar = io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(8))
                .with_style(style(WAITING));
            bar.enable_steady_tick(Duration::from_millis(250));
            bar
        });
        Progress {
            bar,
            last_line: None,
            stage: None,
            counting: false,
        }
    }

    /// Takes the bar away, so that what follows stands on lines of its own.
    pub fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{line}")),
            None => eprintln!("{line}"),
        }
    }

    /// Whether a log is due another line.
    fn due(&mut self) -> bool {
        let due = self
            .last_line
            .is_none_or(|last| last.elapsed() >= LINE_EVERY);
        if due {
            self.last_line = Some(Instant::now());
        }
        due
    }

    fn counted(&mut self, what: &str, done: u64, total: u64) {
        if !self.show(what, done, total) && done < total && self.due() {
            eprintln!("{what}: {} of {}", count(done), count(total));
        }
    }

    /// Sets the bar, if there is one.
    fn show(&mut self, what: &str, done: u64, total: u64) -> bool {
        let Some(bar) = &self.bar else {
            return false;
        };
        bar.set_length(total);
        bar.set_position(done);
        bar.set_message(what.to_owned());
        if !self.counting {
            self.counting = true;
            bar.set_style(style(COUNTING));
        }
        true
    }
}

/// The templates are constants: one that is wrong shows at the first look.
fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

impl Observer for Progress {
    fn trial(&mut self, number: usize, trials: usize, set: &[String], until: Option<u64>) {
        // Each trial goes through the stages anew.
        self.stage = None;
        let until = until.map_or_else(String::new, |step| format!(" to step {}", count(step)));
        self.say(&format!(
            "Trial {} of {}{until}: {}",
            count(number as u64),
            count(trials as u64),
            set.join(", ")
        ));
    }

    fn stage(&mut self, stage: Stage) {
        if self.stage == Some(stage) {
            return;
        }
        self.stage = Some(stage);
        self.last_line = Some(Instant::now());
        let name = match stage {
            Stage::Synthesize => "Making the synthetic cohort",
            Stage::Open => "Opening cohort and checkpoint",
            Stage::Prepare => "Preparing sequences",
            Stage::Load => "Loading weights",
            Stage::Idle => "Watching the machine at rest",
            Stage::Preflight => "Trying a step, an evaluation and a checkpoint",
            Stage::Train => "Training",
            Stage::Evaluate => "Evaluating",
            Stage::Report => "Computing metrics and intervals",
        };
        match &self.bar {
            Some(bar) => {
                self.counting = false;
                bar.set_style(style(WAITING));
                bar.set_message(name.to_owned());
            }
            // Evaluations come between steps: their result is the line.
            None if stage != Stage::Evaluate => eprintln!("{name}"),
            None => {}
        }
    }

    fn preparing(&mut self, progress: calor_sequence::Progress) {
        let what = match progress.phase {
            calor_sequence::Phase::Statistics => "Counting values",
            calor_sequence::Phase::Sequences => "Preparing sequences",
        };
        self.counted(what, progress.rows, progress.total_rows);
    }

    fn resumed(&mut self, checkpoint: &Path, step: u64) {
        self.say(&format!(
            "Going on after step {} from {}",
            count(step),
            checkpoint.display()
        ));
    }

    fn step(&mut self, progress: &StepProgress) {
        let mut parts = vec![format!("loss {}", number(progress.loss))];
        if let Some(rate) = progress.tokens_per_s {
            parts.push(format!("{} tokens/s", number(rate)));
        }
        if let Some(watts) = watts(&progress.watts) {
            parts.push(watts);
        }
        if let Some(remaining) = progress
            .remaining_s
            .filter(|_| progress.step < progress.total_steps)
        {
            parts.push(format!("{} left", seconds(remaining)));
        }
        let parts = parts.join("  ");
        if self.show(&parts, progress.step, progress.total_steps) {
            return;
        }
        if progress.step <= 1 || progress.step == progress.total_steps || self.due() {
            eprintln!(
                "step {}/{}  epoch {:.2}  {parts}",
                count(progress.step),
                count(progress.total_steps),
                progress.epoch
            );
        }
    }

    fn scoring(&mut self, done: usize, total: usize) {
        self.counted("Evaluating", done as u64, total as u64);
    }

    fn evaluated(&mut self, evaluation: &EvaluationLine, watched: Metric) {
        let value = |name: &str| evaluation.metrics.get(name).copied().flatten();
        let shown = |name: &str, value: Option<f64>| {
            format!(
                "{name} {}",
                value.map_or_else(|| "undefined".to_owned(), |value| format!("{value:.4}"))
            )
        };
        let mut parts = vec![shown(watched.title(), value(watched.name()))];
        if watched != Metric::Loss {
            parts.push(shown("loss", value(Metric::Loss.name())));
        }
        let best = if evaluation.best {
            "  (best so far)"
        } else {
            ""
        };
        self.say(&format!(
            "step {}  tuning: {}{best}",
            count(evaluation.step),
            parts.join("  ")
        ));
    }

    fn checkpoint(&mut self, path: &Path) {
        // The bar tells enough; a log wants to know what a requeued job goes on from.
        if self.bar.is_none() {
            eprintln!("checkpoint {}", path.display());
        }
    }

    fn warning(&mut self, message: &str) {
        self.say(&format!("warning: {message}"));
    }
}

/// Power as a person reads it; what is not measured is called what it is.
fn watts(watts: &Quantity) -> Option<String> {
    let kind = if watts.is_modelled() {
        " (modelled)"
    } else {
        ""
    };
    watts.value().map(|value| format!("{value:.0} W{kind}"))
}
