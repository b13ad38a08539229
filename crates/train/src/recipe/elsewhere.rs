//! Keys of the sections whose options belong to other crates.
//!
//! A test holds these lists to what serde reads, key by key.

use super::{Key, KeyKind};

const fn key(path: &'static str, kind: KeyKind, doc: &'static str) -> Key {
    Key {
        path,
        kind,
        required: false,
        doc,
    }
}

/// `[sequence]`, read as [`calor_sequence::SequenceOptions`].
pub(super) const SEQUENCE: &[Key] = &[
    key(
        "sequence.max_tokens",
        KeyKind::Integer,
        "Longest sequence of a patient in tokens, special tokens included, and the length of a packed row.",
    ),
    key(
        "sequence.overlength",
        KeyKind::Text,
        "What happens to a patient with more: `error`, or `drop_oldest_events` (whole events; what was lost is reported). To a row of `[text]`: `error`, `cut_end` or `cut_start`.",
    ),
    key(
        "sequence.packing",
        KeyKind::Boolean,
        "Whether several patients share a row. They never see each other.",
    ),
    key(
        "sequence.numbers",
        KeyKind::Text,
        "How a number is written: `word_and_value`, `word` or `value`.",
    ),
    key(
        "sequence.quantile_levels",
        KeyKind::List,
        "Cut points of the quantile words, between 0 and 1, increasing; empty for no words. Measured on training patients alone.",
    ),
    key(
        "sequence.quantile_words",
        KeyKind::List,
        "One word for each interval between the cut points, one more than there are levels.",
    ),
    key(
        "sequence.quantile_minimum",
        KeyKind::Integer,
        "A code with fewer values than this among training patients gets no quantile word.",
    ),
    key(
        "sequence.intervals",
        KeyKind::Text,
        "How the time between events is written: `between`, `before` (the prediction) or `none`.",
    ),
    key(
        "sequence.time_resolution",
        KeyKind::Text,
        "Rows closer than this stand in one group: `day`, `hour` or `minute`.",
    ),
    key(
        "sequence.repeat",
        KeyKind::Text,
        "Whether a code that comes back is written every time (`all`) or once, at its latest row (`latest`).",
    ),
    key(
        "sequence.sites",
        KeyKind::Boolean,
        "Whether the site (sector, clinic, register) that rows come from is named.",
    ),
    key(
        "sequence.exclude_codes",
        KeyKind::List,
        "Codes that are left out; an entry ending in `*` stands for every code that begins so.",
    ),
    key(
        "sequence.exclude_sites",
        KeyKind::List,
        "Sites (as the column `site` names them) whose rows and items nobody sees, birth and sex included.",
    ),
    key(
        "sequence.text",
        KeyKind::Boolean,
        "Whether rows are written as text; without it a patient is what their modality items say.",
    ),
];

/// `[energy]`, read as [`calor_meter::EnergyOptions`].
pub(super) const ENERGY: &[Key] = &[
    key(
        "energy.idle_window_s",
        KeyKind::Number,
        "Seconds for which the machine is watched at rest before the run, for net energy; 0 leaves the baseline out.",
    ),
    key(
        "energy.watts_per_busy_core",
        KeyKind::Number,
        "Watts charged for each second of processor time where no counter can be read. The report calls the result `modelled`.",
    ),
    key(
        "energy.grid_intensity_g_per_kwh",
        KeyKind::Number,
        "Grams of CO₂ equivalent a kilowatt-hour of the local grid; without it no emissions are given.",
    ),
    key(
        "energy.sample_interval_s",
        KeyKind::Number,
        "Seconds between background readings of the counters.",
    ),
];
