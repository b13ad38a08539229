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

#[cfg(test)]
mod tests {
    use calor_records::Modality;

    use super::*;
    use crate::labels::{TargetKind, Targets, TaskLabels};
    use crate::options::NumberStyle;
    use crate::prepare::prepare;
    use crate::prepared::Prepared;
    use crate::stream::StreamOptions;
    use crate::testing::{ByteLevelKind, DAY_US, byte_level, event, note, tokenizer, write_cohort};

    fn patient() -> Patient {
        Patient {
            subject_id: 0,
            events: vec![
                note(None, "NOTE//a", "without time"),
                event(Some(0), "weight", Some(70.0)),
                event(Some(DAY_US), "old", None),
                event(Some(2 * DAY_US), "same time", None),
                note(Some(2 * DAY_US), "NOTE//a", "high"),
                note(Some(2 * DAY_US), "NOTE//b", " low "),
                note(Some(3 * DAY_US), "NOTE//a", " "),
                note(Some(4 * DAY_US), "OTHER", "secret"),
            ],
        }
    }

    fn prepared(loss: LossOn, max_tokens: usize) -> (Prepared, PatientTokenizer) {
        let folder = tempfile::tempdir().unwrap();
        let patients = vec![patient(), patient(), patient(), patient()];
        let (cohort, _) = write_cohort(folder.path(), &patients, 1, &[1]);
        let options = SequenceOptions {
            max_tokens,
            overlength: Overlength::DropOldestEvents,
            numbers: NumberStyle::Value,
            quantile_minimum: 1,
            streams: vec![StreamOptions {
                tokens: 2,
                ..StreamOptions::new(Modality::Series)
            }],
            ..SequenceOptions::default()
        };
        let notes = Notes {
            codes: vec!["NOTE//*".to_owned()],
            loss,
        };
        let samples = (0..4).flat_map(|subject_id| {
            let patient = Patient {
                subject_id,
                ..patient()
            };
            notes.samples(&patient, &options)
        });
        let labels = TaskLabels::notes(notes.clone(), samples.collect()).unwrap();
        assert_eq!((labels.len(), labels.kind()), (4, TargetKind::Tokens));
        let config = serde_json::json!({"eos_token": "</s>"});
        let tokenizer = tokenizer(&byte_level(ByteLevelKind::SmolLm2), Some(config));
        let cache = folder.path().join("cache");
        let prepared = prepare(
            &cohort,
            &labels,
            &tokenizer,
            &options,
            None,
            &cache,
            &|_| {},
        );
        (prepared.unwrap(), tokenizer)
    }

    /// The text of the learned tokens of the first sample, and of the others, soft slots left out.
    fn texts(prepared: &Prepared, tokenizer: &PatientTokenizer) -> (String, String) {
        let sample = prepared.sample(0);
        let Targets::Tokens(targets) = sample.targets else {
            panic!("tokens have targets");
        };
        assert_eq!(targets.len(), sample.tokens.len());
        let (mut learned, mut given) = (Vec::new(), Vec::new());
        for (token, target) in sample.tokens.iter().zip(targets) {
            match (*token, target) {
                (SOFT_SLOT, target) => assert_eq!(target, NO_TARGET, "a soft slot is a target"),
                (token, NO_TARGET) => given.push(token),
                (token, target) => {
                    assert_eq!(token as i32, target);
                    learned.push(token);
                }
            }
        }
        let text = |tokens: &[u32]| tokenizer.decode(tokens).unwrap();
        (text(&learned), text(&given))
    }

    #[test]
    fn a_note_is_learned_after_what_came_before_it() {
        let (prepared, tokenizer) = prepared(LossOn::Response, 256);
        assert_eq!(prepared.len(), 4);
        let sample = prepared.sample(0);
        assert_eq!(sample.prediction_time_us, 2 * DAY_US - 1);
        let slots = sample.tokens.iter().filter(|token| **token == SOFT_SLOT);
        assert_eq!(slots.count(), 2);
        let (learned, given) = texts(&prepared, &tokenizer);
        let end = tokenizer
            .eos_id()
            .map_or(String::new(), |eos| tokenizer.decode(&[eos]).unwrap());
        assert_eq!(learned, format!("\nhigh\nlow{end}"));
        assert!(
            given.contains("weight 70") && given.contains("old"),
            "{given}"
        );
        assert!(
            !given.contains("same time") && !given.contains("secret"),
            "{given}"
        );
    }

    #[test]
    fn the_whole_text_is_learned_where_it_is_asked_for_but_never_a_soft_token() {
        let (prepared, tokenizer) = prepared(LossOn::All, 256);
        let (learned, given) = texts(&prepared, &tokenizer);
        assert!(learned.contains("weight 70") && learned.contains("high\nlow"));
        assert_eq!(given, "");
    }

    #[test]
    fn a_note_that_is_too_long_leaves_a_quarter_to_the_patient() {
        let (prepared, _) = prepared(LossOn::Response, 24);
        let sample = prepared.sample(0);
        assert!(sample.tokens.len() <= 24);
        assert!(sample.targets.supervised_count() <= 18);
        assert!(prepared.report().truncated_samples > 0);
    }
}
