//! A metric's value with its interval, or why it has none.

use std::borrow::Cow;
use std::fmt;

use serde::{Deserialize, Serialize};

/// What a metric gives on one (re)sample: a number or the reason why there is none.
pub(crate) type Value = Result<f64, Cow<'static, str>>;

/// A metric of the report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum Score {
    Defined {
        value: f64,
        interval: Interval,
        /// What a reader has to know, such as a class that could not take part.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        note: Option<String>,
    },
    Undefined {
        reason: String,
    },
}

/// A bootstrap interval.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum Interval {
    /// The percentiles of the metric over resamples of the patients.
    Percentile {
        low: f64,
        high: f64,
        /// 0.95 for a 95 % interval.
        level: f64,
        /// Resamples in which the metric had a value.
        resamples: usize,
        /// Resamples in which it had none (such as none with a positive patient), left out.
        undefined_resamples: usize,
    },
    Unavailable {
        reason: String,
    },
}

impl Score {
    pub fn value(&self) -> Option<f64> {
        match self {
            Score::Defined { value, .. } => Some(*value),
            Score::Undefined { .. } => None,
        }
    }

    /// Lower and upper end of the interval, where there is one.
    pub fn bounds(&self) -> Option<(f64, f64)> {
        match self {
            Score::Defined { interval, .. } => interval.bounds(),
            Score::Undefined { .. } => None,
        }
    }

    /// Why there is no value.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Score::Defined { .. } => None,
            Score::Undefined { reason } => Some(reason),
        }
    }
}

impl Interval {
    pub fn bounds(&self) -> Option<(f64, f64)> {
        match self {
            Interval::Percentile { low, high, .. } => Some((*low, *high)),
            Interval::Unavailable { .. } => None,
        }
    }
}

impl fmt::Display for Score {
    /// `0.871 (0.842–0.899)`, `0.871` or `undefined`; three decimals or the formatter's precision.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let precision = formatter.precision().unwrap_or(3);
        let Some(value) = self.value() else {
            return write!(formatter, "undefined");
        };
        write!(formatter, "{value:.precision$}")?;
        match self.bounds() {
            Some((low, high)) => write!(formatter, " ({low:.precision$}–{high:.precision$})"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_score_reads_well_in_a_table() {
        let interval = Interval::Percentile {
            low: 0.8421,
            high: 0.8987,
            level: 0.95,
            resamples: 1000,
            undefined_resamples: 0,
        };
        let score = Score::Defined {
            value: 0.8712,
            interval,
            note: None,
        };
        assert_eq!(score.to_string(), "0.871 (0.842–0.899)");
        assert_eq!(format!("{score:.1}"), "0.9 (0.8–0.9)");
        let undefined = Score::Undefined {
            reason: "one class".to_owned(),
        };
        assert_eq!(undefined.to_string(), "undefined");
        assert_eq!(undefined.value(), None);
        assert_eq!(undefined.reason(), Some("one class"));
    }
}
