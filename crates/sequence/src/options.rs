use serde::{Deserialize, Serialize};

use calor_records::Event;

use crate::SequenceError;
use crate::stream::{self, StreamOptions, matches_any};

/// The table `[sequence]` of a recipe: how a patient becomes a sequence.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SequenceOptions {
    /// Longest sequence in tokens, special tokens included; with packing also the length of a row.
    pub max_tokens: usize,
    /// What happens to a patient whose sequence is longer than `max_tokens`.
    pub overlength: Overlength,
    /// Several patients in one row (they never see each other), instead of one a row.
    pub packing: bool,
    /// How a numeric value is written.
    pub numbers: NumberStyle,
    /// Cut points of the quantile words, as levels between 0 and 1, increasing. Empty: no words.
    pub quantile_levels: Vec<f64>,
    /// One word for each interval between the cut points, one more than there are levels.
    pub quantile_words: Vec<String>,
    /// A code with fewer values than this among training patients gets no quantile word: a
    /// quantile of a handful of values is noise, and could give a single patient away.
    pub quantile_minimum: u64,
    /// How the time between events is written.
    pub intervals: Intervals,
    /// Rows closer than this stand in one group under one interval phrase.
    pub time_resolution: TimeResolution,
    /// Whether a code that comes back is written every time.
    pub repeat: Repeat,
    /// Name the site (sector, clinic, register) that rows come from.
    pub sites: bool,
    /// Codes that are left out; an entry ending in `*` stands for every code that begins so.
    pub exclude_codes: Vec<String>,
    /// Sites (as the column `site` names them) whose rows and items nobody sees, birth and sex
    /// included.
    pub exclude_sites: Vec<String>,
    /// Whether rows are written as text. Without it a patient is what their modality items say.
    pub text: bool,
    /// Modalities that become soft tokens, before the text and in this order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub streams: Vec<StreamOptions>,
}

/// What happens to a sequence longer than `max_tokens`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Overlength {
    /// Stop and say how many samples are too long.
    Error,
    /// Drop whole events, the oldest first; age, sex and other static rows stay as long as there
    /// is room for them.
    DropOldestEvents,
    /// Texts: leave out what does not fit at the end, as Transformers does.
    CutEnd,
    /// Texts: leave out what does not fit at the start, behind a beginning-of-text token.
    CutStart,
}

/// How a numeric value is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NumberStyle {
    /// `creatinine high 1.42`
    WordAndValue,
    /// `creatinine high`; the value where the code has no quantiles
    Word,
    /// `creatinine 1.42`
    Value,
}

/// How the time between events is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Intervals {
    /// The gap since the group before (`3 months later`); the first group that is kept says how
    /// long before the prediction it was (`2 years ago`).
    Between,
    /// The time before the prediction, at every group (`2 years ago`).
    Before,
    /// No interval phrases.
    None,
}

/// The finest difference in time that is told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimeResolution {
    /// One group a calendar day: registers, laboratories, claims.
    Day,
    /// One group a clock hour: intensive care.
    Hour,
    Minute,
}

/// Whether a code that comes back is written every time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Repeat {
    /// Every row.
    All,
    /// Each code once, at the time of its latest row, with the number of rows and where the latest
    /// value lies from the mean of the earlier ones: `creatinine 14 times rising high 1.42`. Notes
    /// (`text_value`) are all kept. Much shorter where laboratory values repeat by the hundred.
    Latest,
}

impl Default for SequenceOptions {
    fn default() -> Self {
        SequenceOptions {
            max_tokens: 256,
            overlength: Overlength::Error,
            packing: true,
            numbers: NumberStyle::WordAndValue,
            quantile_levels: vec![0.05, 0.25, 0.75, 0.95],
            quantile_words: ["very low", "low", "normal", "high", "very high"]
                .map(String::from)
                .to_vec(),
            quantile_minimum: 20,
            intervals: Intervals::Between,
            time_resolution: TimeResolution::Day,
            repeat: Repeat::All,
            sites: false,
            exclude_codes: Vec::new(),
            exclude_sites: Vec::new(),
            text: true,
            streams: Vec::new(),
        }
    }
}

impl SequenceOptions {
    /// # Errors
    /// An option that contradicts itself or another one, by name.
    pub fn check(&self) -> Result<(), SequenceError> {
        let fail = |key, problem: &str| {
            Err(SequenceError::Option {
                key,
                problem: problem.to_string(),
            })
        };
        if self.max_tokens == 0 || self.max_tokens > 1 << 24 {
            return fail("max_tokens", "must be between 1 and 16777216");
        }
        let levels = &self.quantile_levels;
        if levels.iter().any(|level| !(0.0 < *level && *level < 1.0)) {
            return fail("quantile_levels", "must lie between 0 and 1, both excluded");
        }
        if levels.windows(2).any(|pair| pair[0] >= pair[1]) {
            return fail("quantile_levels", "must increase");
        }
        if !levels.is_empty() && self.quantile_words.len() != levels.len() + 1 {
            return Err(SequenceError::Option {
                key: "quantile_words",
                problem: format!(
                    "has {} words, and {} levels need {}",
                    self.quantile_words.len(),
                    levels.len(),
                    levels.len() + 1
                ),
            });
        }
        if levels.is_empty() && self.numbers == NumberStyle::Word {
            return fail("numbers", "is \"word\", which needs quantile_levels");
        }
        if self.quantile_minimum == 0 {
            return fail("quantile_minimum", "must be at least 1");
        }
        if !self.text && self.streams.is_empty() {
            return fail(
                "text",
                "is false and there is no modality either: nothing would be left of a patient",
            );
        }
        stream::check(&self.streams)
    }

    /// The options that change a token, in a fixed order, for the key of the cache: packing
    /// happens later and is left out.
    pub(crate) fn cache_key_json(&self) -> String {
        let rendering = SequenceOptions {
            packing: false,
            ..self.clone()
        };
        serde_json::to_string(&rendering).expect("options are plain data")
    }

    pub(crate) fn excludes(&self, code: &str) -> bool {
        matches_any(&self.exclude_codes, code)
    }

    /// Whether a row's site is one that is looked at.
    pub(crate) fn sees(&self, event: &Event) -> bool {
        self.exclude_sites.is_empty()
            || event
                .site
                .as_deref()
                .is_none_or(|site| !self.exclude_sites.iter().any(|excluded| excluded == site))
    }
}

impl TimeResolution {
    pub(crate) fn microseconds(self) -> i64 {
        match self {
            TimeResolution::Day => 86_400_000_000,
            TimeResolution::Hour => 3_600_000_000,
            TimeResolution::Minute => 60_000_000,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_consistent_and_survive_a_round_trip() {
        let options = SequenceOptions::default();
        options.check().unwrap();
        let json = serde_json::to_string(&options).unwrap();
        assert_eq!(
            serde_json::from_str::<SequenceOptions>(&json).unwrap(),
            options
        );
        let some: SequenceOptions =
            serde_json::from_str(r#"{"max_tokens": 64, "overlength": "drop_oldest_events"}"#)
                .unwrap();
        assert_eq!(some.max_tokens, 64);
        assert_eq!(some.overlength, Overlength::DropOldestEvents);
        assert!(serde_json::from_str::<SequenceOptions>(r#"{"max_token": 64}"#).is_err());
    }

    #[test]
    fn contradictions_are_named() {
        let broken = |change: fn(&mut SequenceOptions)| {
            let mut options = SequenceOptions::default();
            change(&mut options);
            options.check().unwrap_err().to_string()
        };
        assert!(broken(|o| o.max_tokens = 0).contains("max_tokens"));
        assert!(broken(|o| o.quantile_levels[1] = 0.99).contains("increase"));
        assert!(broken(|o| o.quantile_levels[0] = 0.0).contains("between 0 and 1"));
        assert!(broken(|o| o.quantile_words.truncate(2)).contains("2 words, and 4 levels need 5"));
        assert!(broken(|o| o.quantile_minimum = 0).contains("quantile_minimum"));
        assert!(
            broken(|o| {
                o.quantile_levels.clear();
                o.numbers = NumberStyle::Word;
            })
            .contains("needs quantile_levels")
        );
    }

    #[test]
    fn packing_does_not_shape_the_cache_and_everything_else_does() {
        let options = SequenceOptions::default();
        let mut unpacked = options.clone();
        unpacked.packing = false;
        assert_eq!(options.cache_key_json(), unpacked.cache_key_json());
        let mut shorter = options.clone();
        shorter.max_tokens -= 1;
        assert_ne!(options.cache_key_json(), shorter.cache_key_json());
    }

    #[test]
    fn codes_are_excluded_by_name_and_by_prefix() {
        let options = SequenceOptions {
            exclude_codes: vec!["HOSPITAL//*".into(), "noise".into()],
            ..Default::default()
        };
        assert!(options.excludes("HOSPITAL//ADMISSION"));
        assert!(options.excludes("noise"));
        assert!(!options.excludes("noisette"));
    }
}
