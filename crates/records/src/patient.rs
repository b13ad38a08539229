use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::item::ItemPath;

/// The code MEDS reserves for a subject's birth.
pub const BIRTH_CODE: &str = "MEDS_BIRTH";
/// The code MEDS reserves for a subject's death.
pub const DEATH_CODE: &str = "MEDS_DEATH";

/// One subject with all their rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Patient {
    pub subject_id: i64,
    /// Static events (no time) first, then in time order; events of one time keep the file's order.
    pub events: Vec<Event>,
}

impl Patient {
    /// Events visible at `prediction_time_us`: static ones and those up to and including that time.
    pub fn events_until(&self, prediction_time_us: i64) -> &[Event] {
        let visible = self
            .events
            .partition_point(|event| event.time_us.is_none_or(|time| time <= prediction_time_us));
        &self.events[..visible]
    }

    /// Time of birth in microseconds since 1970-01-01, from the first timed `MEDS_BIRTH` event.
    pub fn birth_us(&self) -> Option<i64> {
        self.events
            .iter()
            .filter(|event| &*event.code == BIRTH_CODE)
            .find_map(|event| event.time_us)
    }
}

/// One row of a cohort.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Microseconds since 1970-01-01 (no time zone); `None` for a static event.
    pub time_us: Option<i64>,
    /// Shared by all events of one reader that carry the same code.
    pub code: Arc<str>,
    /// `None` when the value is null, not a number, or the column is missing.
    pub numeric_value: Option<f32>,
    pub text_value: Option<Arc<str>>,
    /// Where the row comes from (sector, clinic, register); shared like `code`.
    pub site: Option<Arc<str>>,
    /// The files that the row's path columns point to, at most one of each modality and in the
    /// order of [`Modality::ALL`](crate::Modality::ALL); never an empty slice.
    pub items: Option<Box<[ItemPath]>>,
}

/// Which part of an experiment a subject belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    Train,
    Tuning,
    HeldOut,
}

impl Split {
    pub const ALL: [Split; 3] = [Split::Train, Split::Tuning, Split::HeldOut];

    /// The name MEDS gives the split.
    pub fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Tuning => "tuning",
            Split::HeldOut => "held_out",
        }
    }

    pub fn from_name(name: &str) -> Option<Split> {
        Split::ALL.into_iter().find(|split| split.name() == name)
    }
}

impl std::fmt::Display for Split {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(time_us: Option<i64>, code: &str) -> Event {
        Event {
            time_us,
            code: code.into(),
            numeric_value: None,
            text_value: None,
            site: None,
            items: None,
        }
    }

    #[test]
    fn the_prediction_time_itself_is_visible_and_nothing_later() {
        let patient = Patient {
            subject_id: 1,
            events: vec![
                event(None, "sex"),
                event(Some(-5), BIRTH_CODE),
                event(Some(10), "a"),
                event(Some(10), "b"),
                event(Some(11), "c"),
            ],
        };
        assert_eq!(patient.events_until(10).len(), 4);
        assert_eq!(patient.events_until(9).len(), 2);
        assert_eq!(patient.events_until(-6).len(), 1);
        assert_eq!(patient.birth_us(), Some(-5));
    }

    #[test]
    fn split_names_go_both_ways() {
        for split in Split::ALL {
            assert_eq!(Split::from_name(split.name()), Some(split));
            let json = serde_json::to_string(&split).unwrap();
            assert_eq!(json, format!("\"{split}\""));
        }
        assert_eq!(Split::from_name("test"), None);
    }
}
