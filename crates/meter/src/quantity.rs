//! A number with where it comes from, or the reason why there is none.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// A number of the run report. The unit is in the name of the field that holds it.
///
/// In JSON: `{"status": "measured", "value": 12.5, "source": "…"}`, `{"status": "modelled", …,
/// "inputs": {…}}` or `{"status": "unavailable", "reason": "…"}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum Quantity {
    /// Read from a counter or a clock, or computed from such readings alone.
    Measured { value: f64, source: String },
    /// Computed from a stated assumption; `inputs` holds every number that went in.
    Modelled {
        value: f64,
        source: String,
        inputs: BTreeMap<String, f64>,
    },
    /// Not known, and why.
    Unavailable { reason: String },
}

impl Quantity {
    /// A measured number. One that is not finite becomes unavailable: JSON has no NaN, and a
    /// reader would take `null` for zero.
    pub fn measured(value: f64, source: impl Into<String>) -> Quantity {
        let source = source.into();
        if value.is_finite() {
            Quantity::Measured { value, source }
        } else {
            Quantity::unavailable(format!("not a finite number ({source})"))
        }
    }

    /// A number that rests on an assumption, with the assumption's inputs by name (unit in the
    /// name). One that is not finite becomes unavailable.
    pub fn modelled(
        value: f64,
        source: impl Into<String>,
        inputs: impl IntoIterator<Item = (&'static str, f64)>,
    ) -> Quantity {
        let source = source.into();
        if !value.is_finite() {
            return Quantity::unavailable(format!("not a finite number ({source})"));
        }
        let inputs = inputs
            .into_iter()
            .map(|(name, input)| (name.to_owned(), input))
            .collect();
        Quantity::Modelled {
            value,
            source,
            inputs,
        }
    }

    /// No number, and why.
    pub fn unavailable(reason: impl Into<String>) -> Quantity {
        Quantity::Unavailable {
            reason: reason.into(),
        }
    }

    /// The number, if there is one.
    pub fn value(&self) -> Option<f64> {
        match self {
            Quantity::Measured { value, .. } | Quantity::Modelled { value, .. } => Some(*value),
            Quantity::Unavailable { .. } => None,
        }
    }

    /// Where the number comes from, or why there is none.
    pub fn source(&self) -> &str {
        match self {
            Quantity::Measured { source, .. } | Quantity::Modelled { source, .. } => source,
            Quantity::Unavailable { reason } => reason,
        }
    }

    /// Whether the number rests on an assumption.
    pub fn is_modelled(&self) -> bool {
        matches!(self, Quantity::Modelled { .. })
    }

    /// `measured`, `modelled` or `unavailable`, for a table.
    pub fn status(&self) -> &'static str {
        match self {
            Quantity::Measured { .. } => "measured",
            Quantity::Modelled { .. } => "modelled",
            Quantity::Unavailable { .. } => "unavailable",
        }
    }

    /// The same kind of quantity with `change` applied to its value and `how` added to its source.
    pub fn map(&self, how: &str, change: impl FnOnce(f64) -> f64) -> Quantity {
        let Some(value) = self.value() else {
            return self.clone();
        };
        let value = change(value);
        if !value.is_finite() {
            return Quantity::unavailable(format!("not a finite number ({how})"));
        }
        let mut changed = self.clone();
        if let Quantity::Measured { value: v, source }
        | Quantity::Modelled {
            value: v, source, ..
        } = &mut changed
        {
            *v = value;
            if !how.is_empty() {
                *source = format!("{source}; {how}");
            }
        }
        changed
    }

    /// This quantity divided by a count: unavailable when the count is zero.
    pub fn per(&self, count: u64, unit: &str) -> Quantity {
        if count == 0 && self.value().is_some() {
            return Quantity::unavailable(format!("no {unit} were counted"));
        }
        self.map(&format!("divided by {count} {unit}"), |v| v / count as f64)
    }

    /// The sum of labelled parts. One missing part makes the sum unavailable (a part of a total
    /// is not the total); one modelled part makes it modelled.
    pub fn sum<'a>(parts: impl IntoIterator<Item = (&'a str, &'a Quantity)>) -> Quantity {
        let mut total = 0.0;
        let mut sources: Vec<&str> = Vec::new();
        let mut missing: Vec<String> = Vec::new();
        let mut modelled = false;
        let mut all_inputs = BTreeMap::new();
        for (label, part) in parts {
            match part {
                Quantity::Measured { value, source } => {
                    total += value;
                    sources.push(source);
                }
                Quantity::Modelled {
                    value,
                    source,
                    inputs,
                } => {
                    total += value;
                    sources.push(source);
                    modelled = true;
                    all_inputs.extend(inputs.clone());
                }
                Quantity::Unavailable { reason } => missing.push(format!("{label}: {reason}")),
            }
        }
        if !missing.is_empty() {
            return Quantity::unavailable(missing.join("; "));
        }
        if sources.is_empty() {
            return Quantity::unavailable("nothing was metered");
        }
        let source = sources.join(" + ");
        if modelled {
            Quantity::Modelled {
                value: total,
                source,
                inputs: all_inputs,
            }
        } else {
            Quantity::measured(total, source)
        }
    }
}

impl fmt::Display for Quantity {
    /// The value with three decimals (or the formatter's precision), marked when it is modelled.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let precision = formatter.precision().unwrap_or(3);
        match self {
            Quantity::Measured { value, .. } => write!(formatter, "{value:.precision$}"),
            Quantity::Modelled { value, .. } => {
                write!(formatter, "{value:.precision$} (modelled)")
            }
            Quantity::Unavailable { .. } => write!(formatter, "unavailable"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_part_makes_the_sum_unavailable() {
        let host = Quantity::measured(3.0, "RAPL");
        let device = Quantity::unavailable("no driver");
        let sum = Quantity::sum([("host", &host), ("device", &device)]);
        assert_eq!(sum, Quantity::unavailable("device: no driver"));
    }

    #[test]
    fn a_modelled_part_makes_the_sum_modelled_and_keeps_its_inputs() {
        let host = Quantity::modelled(2.0, "model", [("watts_per_busy_core", 10.0)]);
        let device = Quantity::measured(3.0, "NVML");
        let sum = Quantity::sum([("host", &host), ("device", &device)]);
        assert_eq!(sum.value(), Some(5.0));
        assert!(sum.is_modelled());
        assert_eq!(sum.source(), "model + NVML");
        let Quantity::Modelled { inputs, .. } = sum else {
            unreachable!()
        };
        assert_eq!(inputs["watts_per_busy_core"], 10.0);
    }

    #[test]
    fn dividing_by_nothing_is_unavailable() {
        let energy = Quantity::measured(3.0, "NVML");
        assert_eq!(
            energy.per(0, "tokens"),
            Quantity::unavailable("no tokens were counted")
        );
        assert_eq!(energy.per(2, "tokens").value(), Some(1.5));
        assert_eq!(
            Quantity::sum([]),
            Quantity::unavailable("nothing was metered")
        );
    }

    #[test]
    fn what_is_not_finite_is_never_a_number() {
        assert!(Quantity::measured(f64::NAN, "clock").value().is_none());
        assert!(
            Quantity::modelled(f64::INFINITY, "model", [])
                .value()
                .is_none()
        );
        assert!(
            Quantity::measured(1.0, "clock")
                .map("", |v| v / 0.0)
                .value()
                .is_none()
        );
    }

    #[test]
    fn json_names_the_status() {
        let json = serde_json::to_value(Quantity::measured(1.5, "clock")).unwrap();
        assert_eq!(
            json,
            serde_json::json!({"status": "measured", "value": 1.5, "source": "clock"})
        );
        let back: Quantity = serde_json::from_value(json).unwrap();
        assert_eq!(back.value(), Some(1.5));
    }
}
