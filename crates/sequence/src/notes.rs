//! Notes of a cohort as what a language model learns: each after what was known of the patient
//! before it.

use calor_records::{Event, Patient};
use serde::{Deserialize, Serialize};

use crate::SequenceError;
use crate::fit::{Fitted, fit};
use crate::labels::NO_TARGET;
use crate::options::{Overlength, SequenceOptions};
use crate::render::Rendered;
use crate::stream::{SOFT_SLOT, matches_any};
use crate::text::LossOn;
use crate::tokenizer::{PatientTokenizer, WordCache};

/// Share of a sequence that is the patient's even where a note is longer than the rest.
const PATIENT_SHARE: usize = 4;

/// Which notes are learned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notes {
    /// Codes of the notes; an entry ending in `*` stands for every code that begins so.
    pub codes: Vec<String>,
    /// What is learned: the note, or the patient's text before it as well.
    pub loss: LossOn,
}

impl Notes {
    /// A patient's samples: subject and prediction time, the microsecond before a note, so that
    /// neither the note nor anything else of its time is seen. A note without time is none.
    pub fn samples(&self, patient: &Patient, options: &SequenceOptions) -> Vec<(i64, i64)> {
        let mut samples: Vec<(i64, i64)> = patient
            .events
            .iter()
            .filter(|event| self.takes(event, options))
            .filter_map(|event| event.time_us?.checked_sub(1))
            .map(|time_us| (patient.subject_id, time_us))
            .collect();
        samples.dedup();
        samples
    }

    fn takes(&self, event: &Event, options: &SequenceOptions) -> bool {
        let text = event.text_value.as_deref().unwrap_or_default();
        !text.trim().is_empty() && matches_any(&self.codes, &event.code) && options.sees(event)
    }

    /// The text of the notes right after a prediction time.
    fn text(
        &self,
        patient: &Patient,
        prediction_time_us: i64,
        options: &SequenceOptions,
    ) -> String {
        let written = patient
            .events
            .iter()
            .filter(|event| event.time_us == prediction_time_us.checked_add(1))
            .filter(|event| self.takes(event, options))
            .filter_map(|event| event.text_value.as_deref());
        let texts: Vec<&str> = written.map(str::trim).collect();
        texts.join("\n")
    }

    /// The patient, the note on a line of its own and the end-of-text token. Where both together are
    /// too long, the patient's oldest events are dropped, and the end of a note that leaves less
    /// than a quarter of the sequence to the patient.
    ///
    /// Soft tokens are never learned.
    pub(crate) fn fit(
        &self,
        patient: &Patient,
        prediction_time_us: i64,
        rendered: &Rendered,
        tokenizer: &PatientTokenizer,
        options: &SequenceOptions,
        cache: &mut WordCache,
    ) -> Result<Fitted, SequenceError> {
        let note = self.text(patient, prediction_time_us, options);
        let mut note = tokenizer.encode_whole(&format!("\n{note}"))?;
        note.extend(tokenizer.eos_id());
        let note_length = note.len();
        if options.overlength == Overlength::DropOldestEvents {
            note.truncate(options.max_tokens - options.max_tokens / PATIENT_SHARE);
        }
        let before = SequenceOptions {
            max_tokens: options.max_tokens.saturating_sub(note.len()).max(1),
            ..options.clone()
        };
        let mut fitted = fit(rendered, tokenizer, &before, cache)?;
        // What the tokenizer puts after a text comes after the note.
        let suffix = tokenizer.suffix().len();
        fitted.tokens.truncate(fitted.tokens.len() - suffix);
        let start = fitted.tokens.len();
        fitted.full_length = fitted.full_length - suffix as u32 + note_length as u32;
        fitted.tokens.extend(note);
        fitted.targets = (0..fitted.tokens.len())
            .map(|place| match fitted.tokens[place] {
                SOFT_SLOT => NO_TARGET,
                _ if place == 0 => NO_TARGET,
                _ if place < start && self.loss == LossOn::Response => NO_TARGET,
                token => token as i32,
            })
            .collect();
        Ok(fitted)
    }
}
