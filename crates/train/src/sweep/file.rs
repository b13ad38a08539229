//! What a sweep tries: `sweep.toml`.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::recipe::Metric;
use crate::seed::derive;

/// A sweep as its file says it.
///
/// ```toml
/// method = "random"                     # or "grid": every combination of lists
/// trials = 20
///
/// [parameters]
/// "train.learning_rate" = { log_uniform = [1e-5, 1e-3] }
/// "adapter.r" = [4, 8, 16]
///
/// [asha]                                # stops bad trials early
/// min_steps = 50
/// max_steps = 450
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SweepFile {
    /// How values are combined.
    #[serde(default)]
    pub method: Method,
    /// Trials of a random search.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trials: Option<usize>,
    /// Seed of what is drawn in a random search. Trials are the recipe's own otherwise, its
    /// `train.seed` included.
    #[serde(default)]
    pub seed: u64,
    /// What decides, on `tuning` patients. Without it, the recipe's `evaluate.metric`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metric: Option<Metric>,
    /// Early stopping of bad trials.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asha: Option<Asha>,
    /// What is tried of each key.
    pub parameters: toml::Table,
}

/// How values are combined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Every combination of the lists.
    #[default]
    Grid,
    /// Every trial draws a value of each key.
    Random,
}

/// Asynchronous successive halving (Li et al. 2020): a trial goes on beyond a rung when it is among
/// the best of every `reduction_factor` that have reached it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Asha {
    /// Optimizer steps to the first rung; each further one is `reduction_factor` times as far.
    pub min_steps: u64,
    /// Optimizer steps of a whole trial: its `train.max_steps`.
    pub max_steps: u64,
    /// Of so many trials at a rung, one goes on.
    #[serde(default = "three")]
    pub reduction_factor: u64,
}

fn three() -> u64 {
    3
}

impl Asha {
    /// Steps at each rung, the last of which ends the trial.
    pub fn rungs(&self) -> Vec<u64> {
        let mut rungs = Vec::new();
        let mut steps = self.min_steps;
        while steps < self.max_steps {
            rungs.push(steps);
            steps = steps.saturating_mul(self.reduction_factor);
        }
        rungs.push(self.max_steps);
        rungs
    }
}

/// What a key may be.
enum Domain {
    Choice(Vec<toml::Value>),
    Uniform(f64, f64),
    LogUniform(f64, f64),
    Integers(i64, i64),
}

impl SweepFile {
    /// Reads a sweep's file.
    ///
    /// # Errors
    /// A file that cannot be read or is wrong, with the line.
    pub fn load(path: &Path) -> Result<SweepFile, TrainError> {
        let text = std::fs::read_to_string(path).map_err(TrainError::io("read", path))?;
        let wrong = |problem: String| TrainError::Sweep {
            path: path.to_owned(),
            problem,
        };
        let file: SweepFile =
            toml::from_str(&text).map_err(|error| wrong(error.to_string().trim().to_owned()))?;
        file.check().map_err(wrong)?;
        Ok(file)
    }

    fn check(&self) -> Result<(), String> {
        if self.parameters.is_empty() {
            return Err("`parameters` names no key: there is nothing to try".to_owned());
        }
        for (key, value) in &self.parameters {
            let domain = domain(value).map_err(|problem| format!("`{key}` {problem}"))?;
            if self.method == Method::Grid && !matches!(domain, Domain::Choice(_)) {
                return Err(format!(
                    "`{key}` is a range, and a grid needs a list; give one, or set `method = \"random\"`"
                ));
            }
            let decided = match key.as_str() {
                "evaluate.metric" => Some("`metric`"),
                "train.max_steps" if self.asha.is_some() => Some("`asha.max_steps`"),
                _ => None,
            };
            if let Some(decided) = decided {
                return Err(format!("`{key}` is decided by {decided}; take it out"));
            }
        }
        match (self.method, self.trials) {
            (Method::Random, None | Some(0)) => {
                return Err("a random search needs `trials`, how many to draw".to_owned());
            }
            (Method::Grid, Some(_)) => {
                return Err(
                    "`trials` is given, and a grid tries every combination; take it out".to_owned(),
                );
            }
            _ => {}
        }
        if let Some(asha) = self.asha {
            if asha.min_steps == 0 || asha.min_steps > asha.max_steps {
                return Err(format!(
                    "`asha.min_steps` is {}; it is from 1 to `asha.max_steps`, {}",
                    asha.min_steps, asha.max_steps
                ));
            }
            if asha.reduction_factor < 2 {
                return Err(
                    "`asha.reduction_factor` is below 2: every trial would go on".to_owned(),
                );
            }
        }
        Ok(())
    }

    /// How many trials there are.
    pub fn trials(&self) -> usize {
        match self.method {
            Method::Random => self.trials.unwrap_or(0),
            Method::Grid => self
                .parameters
                .values()
                .map(|value| value.as_array().map_or(1, Vec::len))
                .product(),
        }
    }

    /// What a trial sets, as `--set` takes it. Trials count from 0; of a grid the last key changes
    /// first.
    pub fn assignments(&self, trial: usize) -> Vec<String> {
        let mut remaining = trial;
        let mut chosen: Vec<String> = Vec::new();
        for (position, (key, value)) in self.parameters.iter().enumerate().rev() {
            let domain = domain(value).expect("the file was checked");
            let value = match (self.method, &domain) {
                (Method::Grid, Domain::Choice(values)) => {
                    let value = values[remaining % values.len()].clone();
                    remaining /= values.len();
                    value
                }
                _ => {
                    let places = [trial as u64, position as u64];
                    domain.draw(derive(self.seed, "sweep", &places))
                }
            };
            chosen.push(format!("{key}={value}"));
        }
        chosen.reverse();
        chosen
    }
}

fn domain(value: &toml::Value) -> Result<Domain, String> {
    const HELP: &str = "is neither a list of values nor one of `{ uniform = [low, high] }`, `{ log_uniform = [low, high] }`, `{ integers = [low, high] }`";
    match value {
        toml::Value::Array(values) if values.is_empty() => Err("is an empty list".to_owned()),
        toml::Value::Array(values) => Ok(Domain::Choice(values.clone())),
        toml::Value::Table(table) => {
            let mut entries = table.iter();
            let (Some((kind, ends)), None) = (entries.next(), entries.next()) else {
                return Err(HELP.to_owned());
            };
            let ends = ends.as_array().filter(|ends| ends.len() == 2);
            let Some([low, high]) = ends.map(Vec::as_slice) else {
                return Err(HELP.to_owned());
            };
            let number = |value: &toml::Value| {
                value
                    .as_float()
                    .or_else(|| value.as_integer().map(|value| value as f64))
                    .filter(|value| value.is_finite())
            };
            let found = match (kind.as_str(), number(low), number(high)) {
                ("uniform", Some(low), Some(high)) => Domain::Uniform(low, high),
                ("log_uniform", Some(low), Some(high)) if low > 0.0 => {
                    Domain::LogUniform(low, high)
                }
                ("log_uniform", Some(_), Some(_)) => {
                    return Err("begins at or below 0, where there is no logarithm".to_owned());
                }
                ("integers", ..) => match (low.as_integer(), high.as_integer()) {
                    (Some(low), Some(high)) => Domain::Integers(low, high),
                    _ => return Err(HELP.to_owned()),
                },
                _ => return Err(HELP.to_owned()),
            };
            match (number(low), number(high)) {
                (Some(low), Some(high)) if low < high => Ok(found),
                _ => Err("ends where it begins or before".to_owned()),
            }
        }
        _ => Err(HELP.to_owned()),
    }
}

impl Domain {
    /// The value at a place of the unit interval, given by 64 random bits.
    fn draw(&self, bits: u64) -> toml::Value {
        let place = (bits >> 11) as f64 / (1u64 << 53) as f64;
        // Four digits: enough to tell trials apart, and few enough to type.
        let short = |value: f64| {
            let value = format!("{value:.3e}").parse().unwrap_or(value);
            toml::Value::Float(value)
        };
        match *self {
            Domain::Choice(ref values) => {
                values[((place * values.len() as f64) as usize).min(values.len() - 1)].clone()
            }
            Domain::Uniform(low, high) => short(low + (high - low) * place),
            Domain::LogUniform(low, high) => short(low * (high / low).powf(place)),
            Domain::Integers(low, high) => {
                let count = (high - low) as f64 + 1.0;
                toml::Value::Integer((low + (place * count) as i64).min(high))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<SweepFile, String> {
        let file: SweepFile = toml::from_str(text).map_err(|error| error.to_string())?;
        file.check()?;
        Ok(file)
    }

    #[test]
    fn a_grid_is_every_combination_once() {
        let file = read("[parameters]\n\"adapter.r\" = [4, 8]\n\"train.optimizer\" = [\"sgd\", \"muon\", \"adamw\"]\n").unwrap();
        let trials: Vec<Vec<String>> = (0..file.trials())
            .map(|trial| file.assignments(trial))
            .collect();
        assert_eq!(trials.len(), 6);
        assert_eq!(trials[0], ["adapter.r=4", "train.optimizer=\"sgd\""]);
        assert_eq!(trials[1], ["adapter.r=4", "train.optimizer=\"muon\""]);
        assert_eq!(trials[5], ["adapter.r=8", "train.optimizer=\"adamw\""]);
    }

    #[test]
    fn a_random_search_fills_its_ranges_and_follows_its_seed() {
        let text = "method = \"random\"\ntrials = 200\n[parameters]\nrate = { log_uniform = [1e-5, 1e-3] }\ndropout = { uniform = [0.0, 0.5] }\nr = { integers = [2, 5] }\nkind = [\"a\", \"b\"]\n";
        let file = read(text).unwrap();
        let number =
            |assignment: &str| -> f64 { assignment.split_once('=').unwrap().1.parse().unwrap() };
        let trials: Vec<Vec<String>> = (0..200).map(|trial| file.assignments(trial)).collect();
        let below = trials
            .iter()
            .filter(|trial| number(&trial[0]) < 1e-4)
            .count();
        assert!((70..130).contains(&below), "half of the decades: {below}");
        for trial in &trials {
            assert!((1e-5..=1e-3).contains(&number(&trial[0])), "{trial:?}");
            assert!((0.0..=0.5).contains(&number(&trial[1])), "{trial:?}");
        }
        for value in 2..=5 {
            assert!(trials.iter().any(|trial| trial[2] == format!("r={value}")));
        }
        assert!(trials.iter().all(|trial| trial[2].len() == 3));
        assert_eq!(
            trials,
            (0..200)
                .map(|trial| file.assignments(trial))
                .collect::<Vec<_>>()
        );
        let other = read(&text.replace("trials", "seed = 1\ntrials")).unwrap();
        assert_ne!(other.assignments(0), trials[0]);
    }

    #[test]
    fn rungs_end_at_the_whole_trial() {
        let rungs = |min_steps, max_steps| {
            Asha {
                min_steps,
                max_steps,
                reduction_factor: 3,
            }
            .rungs()
        };
        assert_eq!(rungs(5, 45), [5, 15, 45]);
        assert_eq!(rungs(5, 50), [5, 15, 45, 50]);
        assert_eq!(rungs(8, 8), [8]);
    }

    #[test]
    fn what_makes_no_sense_is_told() {
        for (text, says) in [
            ("[parameters]\n", "nothing to try"),
            ("[parameters]\na = []\n", "empty list"),
            ("[parameters]\na = 3\n", "neither a list"),
            (
                "[parameters]\na = { uniform = [0, 1] }\n",
                "a grid needs a list",
            ),
            (
                "method = \"random\"\n[parameters]\na = [1]\n",
                "needs `trials`",
            ),
            ("trials = 3\n[parameters]\na = [1]\n", "every combination"),
            (
                "method = \"random\"\ntrials = 1\n[parameters]\na = { log_uniform = [0, 1] }\n",
                "no logarithm",
            ),
            (
                "method = \"random\"\ntrials = 1\n[parameters]\na = { uniform = [1, 1] }\n",
                "ends where it begins",
            ),
            (
                "[parameters]\n\"evaluate.metric\" = [\"auroc\"]\n",
                "decided by `metric`",
            ),
            (
                "[parameters]\na = [1]\n[asha]\nmin_steps = 5\nmax_steps = 4\n",
                "from 1 to",
            ),
            (
                "[parameters]\na = [1]\n[asha]\nmin_steps = 1\nmax_steps = 4\nreduction_factor = 1\n",
                "below 2",
            ),
            (
                "methd = \"grid\"\n[parameters]\na = [1]\n",
                "unknown field `methd`",
            ),
        ] {
            let found = read(text).unwrap_err();
            assert!(found.contains(says), "{text}: {found}");
        }
    }
}
