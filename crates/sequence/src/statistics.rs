//! What training patients say about the values of a code.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use calor_records::Patient;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::histogram::Histogram;
use crate::options::SequenceOptions;

/// Quantiles of every numeric code over the training patients' rows visible at their prediction
/// times. A run keeps them beside its adapter: other patients are rendered with the same ones.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ValueStatistics {
    /// The levels of `CodeStatistics::cuts`.
    pub levels: Vec<f64>,
    pub codes: BTreeMap<String, CodeStatistics>,
    /// Where training patients' rows come from; the number of a site is its place here.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sites: Vec<String>,
}

/// Values of one code.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CodeStatistics {
    /// Values the quantiles come from.
    pub count: u64,
    /// One value for each level.
    pub cuts: Vec<f32>,
    /// Third minus first quartile.
    pub interquartile_range: f32,
    #[serde(default)]
    pub median: f32,
}

impl CodeStatistics {
    /// Which of the `cuts.len() + 1` intervals a value falls into. A value equal to a cut belongs
    /// to the side of the middle, so that a code with one value only is never "low" or "high".
    pub fn interval_of(&self, levels: &[f64], value: f32) -> usize {
        let mut interval = 0;
        for (cut, level) in self.cuts.iter().zip(levels) {
            let above = if *level < 0.5 {
                value >= *cut
            } else {
                value > *cut
            };
            interval += usize::from(above);
        }
        interval
    }
}

impl ValueStatistics {
    /// SHA-256 of the exact contents.
    pub fn digest(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        for level in &self.levels {
            hash.update(level.to_le_bytes());
        }
        for (code, statistics) in &self.codes {
            hash.update((code.len() as u64).to_le_bytes());
            hash.update(code.as_bytes());
            hash.update(statistics.count.to_le_bytes());
            for cut in &statistics.cuts {
                hash.update(cut.to_le_bytes());
            }
            hash.update(statistics.interquartile_range.to_le_bytes());
            hash.update(statistics.median.to_le_bytes());
        }
        for site in &self.sites {
            hash.update((site.len() as u64).to_le_bytes());
            hash.update(site.as_bytes());
        }
        hash.finalize().into()
    }
}

/// Counts of some patients' values; parts are merged in any order with the same result.
#[derive(Default)]
pub(crate) struct StatisticsBuilder {
    codes: HashMap<Arc<str>, Histogram>,
    sites: BTreeSet<Arc<str>>,
}

impl StatisticsBuilder {
    /// Counts what is visible at the latest of the patient's prediction times.
    pub(crate) fn add(
        &mut self,
        patient: &Patient,
        latest_prediction_us: i64,
        options: &SequenceOptions,
    ) {
        let visible = patient.events_until(latest_prediction_us);
        for event in visible.iter().filter(|event| options.sees(event)) {
            if let Some(site) = &event.site
                && !self.sites.contains(site)
            {
                self.sites.insert(site.clone());
            }
            let Some(value) = event.numeric_value else {
                continue;
            };
            match self.codes.get_mut(&event.code) {
                Some(histogram) => histogram.add(value),
                None if options.excludes(&event.code) => {}
                None => {
                    let mut histogram = Histogram::default();
                    histogram.add(value);
                    self.codes.insert(event.code.clone(), histogram);
                }
            }
        }
    }

    pub(crate) fn merge(&mut self, other: StatisticsBuilder) {
        for (code, histogram) in other.codes {
            self.codes.entry(code).or_default().merge(histogram);
        }
        self.sites.extend(other.sites);
    }

    pub(crate) fn finish(self, options: &SequenceOptions) -> ValueStatistics {
        let codes = self
            .codes
            .into_iter()
            .filter(|(_, histogram)| histogram.total() >= options.quantile_minimum)
            .map(|(code, histogram)| {
                let quantile = |level| histogram.quantile(level).expect("there are values");
                let statistics = CodeStatistics {
                    count: histogram.total(),
                    cuts: options
                        .quantile_levels
                        .iter()
                        .map(|&l| quantile(l))
                        .collect(),
                    interquartile_range: quantile(0.75) - quantile(0.25),
                    median: quantile(0.5),
                };
                (code.to_string(), statistics)
            })
            .collect();
        ValueStatistics {
            levels: options.quantile_levels.clone(),
            codes,
            sites: self.sites.iter().map(|site| site.to_string()).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use calor_records::Event;

    use super::*;

    fn patient(values: impl IntoIterator<Item = (i64, f32)>) -> Patient {
        Patient {
            subject_id: 1,
            events: values
                .into_iter()
                .map(|(time, value)| Event {
                    time_us: Some(time),
                    code: "weight".into(),
                    numeric_value: Some(value),
                    text_value: None,
                    site: None,
                    items: None,
                })
                .collect(),
        }
    }

    #[test]
    fn only_visible_values_count() {
        let options = SequenceOptions::default();
        let mut builder = StatisticsBuilder::default();
        builder.add(&patient((0..200).map(|i| (i, i as f32))), 99, &options);
        let statistics = builder.finish(&options);
        let weight = &statistics.codes["weight"];
        assert_eq!(weight.count, 100);
        assert_eq!(weight.cuts, [4.0, 24.0, 74.0, 94.0]);
        assert_eq!(weight.interquartile_range, 50.0);
    }

    #[test]
    fn a_rare_code_has_no_statistics() {
        let options = SequenceOptions::default();
        let mut builder = StatisticsBuilder::default();
        builder.add(&patient((0..19).map(|i| (i, i as f32))), 99, &options);
        assert!(builder.finish(&options).codes.is_empty());
    }

    #[test]
    fn excluded_codes_are_not_counted() {
        let options = SequenceOptions {
            exclude_codes: vec!["wei*".into()],
            ..Default::default()
        };
        let mut builder = StatisticsBuilder::default();
        builder.add(&patient((0..50).map(|i| (i, i as f32))), 99, &options);
        assert!(builder.finish(&options).codes.is_empty());
    }

    #[test]
    fn ties_belong_to_the_middle() {
        let levels = [0.05, 0.25, 0.75, 0.95];
        let constant = CodeStatistics {
            count: 50,
            cuts: vec![1.0; 4],
            interquartile_range: 0.0,
            median: 1.0,
        };
        assert_eq!(constant.interval_of(&levels, 1.0), 2);
        assert_eq!(constant.interval_of(&levels, 0.9), 0);
        assert_eq!(constant.interval_of(&levels, 1.1), 4);
        let spread = CodeStatistics {
            count: 100,
            cuts: vec![1.0, 2.0, 3.0, 4.0],
            interquartile_range: 1.0,
            median: 2.5,
        };
        let intervals: Vec<usize> = [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5]
            .iter()
            .map(|&value| spread.interval_of(&levels, value))
            .collect();
        assert_eq!(intervals, [0, 1, 1, 2, 2, 2, 3, 3, 4]);
    }

    #[test]
    fn a_json_round_trip_keeps_the_digest() {
        let options = SequenceOptions::default();
        let mut builder = StatisticsBuilder::default();
        builder.add(
            &patient((0..999).map(|i| (i, (i as f32).sin() * 1e3))),
            9_999,
            &options,
        );
        let statistics = builder.finish(&options);
        let json = serde_json::to_string(&statistics).unwrap();
        let back: ValueStatistics = serde_json::from_str(&json).unwrap();
        assert_eq!(back, statistics);
        assert_eq!(back.digest(), statistics.digest());
    }
}
