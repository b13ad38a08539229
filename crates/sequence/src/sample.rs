use calor_records::{CodeTable, Patient};

use crate::SequenceError;
use crate::fit::fit;
use crate::options::{Overlength, SequenceOptions};
use crate::render::Renderer;
use crate::statistics::ValueStatistics;
use crate::stream::SOFT_SLOT;
use crate::tokenizer::{PatientTokenizer, WordCache};

/// One patient as a model sees them.
#[derive(Clone, Debug, PartialEq)]
pub struct RenderedSample {
    /// Everything that is visible, before truncation.
    pub text: String,
    /// What is left of it, special tokens included.
    pub tokens: Vec<u32>,
    /// The tokens as text again.
    pub decoded: String,
    /// Tokens without truncation.
    pub full_length: usize,
    pub rows: usize,
    pub dropped_rows: usize,
}

/// Shows how one patient is written, to look at a rendering. Meant for made-up patients: text of
/// real ones does not belong on a screen or in a log.
///
/// # Errors
/// As [`crate::prepare`], for this one sample.
pub fn render_sample(
    patient: &Patient,
    prediction_time_us: i64,
    codes: &CodeTable,
    statistics: &ValueStatistics,
    options: &SequenceOptions,
    tokenizer: &PatientTokenizer,
) -> Result<RenderedSample, SequenceError> {
    options.check()?;
    let rendered = Renderer::new(codes, statistics, options).render(patient, prediction_time_us);
    let fitted = fit(&rendered, tokenizer, options, &mut WordCache::default())?;
    if fitted.tokens.len() > options.max_tokens && options.overlength == Overlength::Error {
        return Err(SequenceError::Overlong {
            samples: 1,
            total: 1,
            longest: fitted.tokens.len() as u64,
            max_tokens: options.max_tokens,
        });
    }
    let units: Vec<_> = rendered.units.iter().collect();
    Ok(RenderedSample {
        text: rendered.compose(rendered.statics.len(), &units, options),
        decoded: tokenizer.decode(&text_tokens(&fitted.tokens))?,
        full_length: fitted.full_length as usize,
        rows: fitted.rows as usize,
        dropped_rows: fitted.dropped_rows as usize,
        tokens: fitted.tokens,
    })
}

/// Without the soft slots, which no text stands for.
fn text_tokens(tokens: &[u32]) -> Vec<u32> {
    let text = tokens.iter().filter(|token| **token != SOFT_SLOT);
    text.copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{DAY_US, event, tokenizer, wordpiece};

    #[test]
    fn shows_the_whole_text_and_what_is_left_of_it() {
        let patient = Patient {
            subject_id: 1,
            events: vec![
                event(None, "SEX//F", None),
                event(Some(0), "old", None),
                event(Some(DAY_US), "weight", Some(70.0)),
                event(Some(9 * DAY_US), "later", None),
            ],
        };
        let show = |overlength| {
            let options = SequenceOptions {
                max_tokens: 13,
                overlength,
                ..Default::default()
            };
            render_sample(
                &patient,
                2 * DAY_US,
                &CodeTable::default(),
                &ValueStatistics::default(),
                &options,
                &tokenizer(&wordpiece(), None),
            )
        };
        let shown = show(Overlength::DropOldestEvents).unwrap();
        assert_eq!(shown.text, "woman. 2 days ago old. 1 day later weight 70.");
        assert_eq!(shown.decoded, "[CLS] woman. 1 day ago weight 70. [SEP]");
        assert_eq!(shown.tokens.len(), 13);
        assert_eq!((shown.rows, shown.dropped_rows), (2, 1));
        assert!(show(Overlength::Error).is_err());
    }
}
