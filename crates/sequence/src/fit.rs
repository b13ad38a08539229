//! Text of a patient to tokens, within a length.

use crate::SequenceError;
use crate::options::{Overlength, SequenceOptions};
use crate::render::{Rendered, Unit};
use crate::stream::SOFT_SLOT;
use crate::tokenizer::{PatientTokenizer, WordCache};

/// Tokens of one sample, soft slots before the text, and what did not fit.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Fitted {
    pub tokens: Vec<u32>,
    /// What is to be said of each token; empty where a sample has one target.
    pub targets: Vec<i32>,
    /// Tokens without any truncation.
    pub full_length: u32,
    /// Rows visible at the prediction time, birth and sex not counted.
    pub rows: u32,
    pub dropped_rows: u32,
    /// Of those, rows that are too long even alone.
    pub oversized_rows: u32,
}

/// Encodes a patient in at most `max_tokens` tokens, special tokens included.
///
/// Units are dropped whole, the oldest first. A unit that does not fit even alone with the header
/// is dropped by itself, so that one long note does not take everything older with it. Static rows
/// stay; if they alone are too long, the last of them go. With [`Overlength::Error`] nothing is
/// dropped and the result may be longer than `max_tokens`.
pub(crate) fn fit(
    rendered: &Rendered,
    tokenizer: &PatientTokenizer,
    options: &SequenceOptions,
    cache: &mut WordCache,
) -> Result<Fitted, SequenceError> {
    let all: Vec<&Unit> = rendered.units.iter().collect();
    let statics = rendered.statics.len();
    let mut encoder = Encoder {
        tokenizer,
        cache,
        slots: rendered.items.slots(&options.streams),
        scratch: Vec::new(),
    };
    let tokens = encoder.framed(&rendered.compose(statics, &all, options))?;
    let rows = count_rows(&all) + statics as u32;
    let mut fitted = Fitted {
        full_length: tokens.len() as u32,
        rows,
        tokens,
        ..Fitted::default()
    };
    if fitted.tokens.len() <= options.max_tokens || options.overlength == Overlength::Error {
        return Ok(fitted);
    }

    let frame = tokenizer.prefix().len() + tokenizer.suffix().len() + encoder.slots;
    let (statics, header) = encoder.fit_header(rendered, options.max_tokens, frame)?;
    let room = options.max_tokens - frame - header;

    let mut kept = Vec::with_capacity(all.len());
    for unit in &all {
        let alone = rendered.unit_text(unit, None, None, options);
        if encoder.length(&alone, false)? <= room {
            kept.push(*unit);
        } else {
            fitted.oversized_rows += unit.rows;
        }
    }
    let mut start = encoder.first_that_fits(rendered, &kept, room, options)?;
    // Lengths of pieces add up for every tokenizer that works word by word; for one that does not
    // they are an estimate, and the whole text decides.
    fitted.tokens = loop {
        let tokens = encoder.framed(&rendered.compose(statics, &kept[start..], options))?;
        if tokens.len() <= options.max_tokens {
            break tokens;
        }
        if start == kept.len() {
            return Err(SequenceError::HeaderTooLong {
                needed: tokens.len(),
                max_tokens: options.max_tokens,
            });
        }
        start += 1;
    };
    fitted.dropped_rows = rows - count_rows(&kept[start..]) - statics as u32;
    Ok(fitted)
}

fn count_rows(units: &[&Unit]) -> u32 {
    units.iter().map(|unit| unit.rows).sum()
}

struct Encoder<'a> {
    tokenizer: &'a PatientTokenizer,
    cache: &'a mut WordCache,
    /// Soft tokens, which stand between the tokenizer's prefix and the text.
    slots: usize,
    scratch: Vec<u32>,
}

impl Encoder<'_> {
    fn framed(&mut self, text: &str) -> Result<Vec<u32>, SequenceError> {
        let mut tokens = self.tokenizer.prefix().to_vec();
        tokens.resize(tokens.len() + self.slots, SOFT_SLOT);
        self.tokenizer
            .encode_cached(text, true, self.cache, &mut tokens)?;
        tokens.extend_from_slice(self.tokenizer.suffix());
        Ok(tokens)
    }

    fn length(&mut self, text: &str, at_start: bool) -> Result<usize, SequenceError> {
        self.scratch.clear();
        self.tokenizer
            .encode_cached(text, at_start, self.cache, &mut self.scratch)?;
        Ok(self.scratch.len())
    }

    /// How many static rows fit beside age and sex, and the length of the header with them.
    fn fit_header(
        &mut self,
        rendered: &Rendered,
        max_tokens: usize,
        frame: usize,
    ) -> Result<(usize, usize), SequenceError> {
        for statics in (0..=rendered.statics.len()).rev() {
            let length = self.length(&rendered.header_text(statics), true)?;
            if frame + length <= max_tokens {
                return Ok((statics, length));
            }
            if statics == 0 {
                return Err(SequenceError::HeaderTooLong {
                    needed: frame + length,
                    max_tokens,
                });
            }
        }
        unreachable!("the range ends at no static rows")
    }

    /// The smallest number of units that must go from the front so that the others fit.
    fn first_that_fits(
        &mut self,
        rendered: &Rendered,
        units: &[&Unit],
        room: usize,
        options: &SequenceOptions,
    ) -> Result<usize, SequenceError> {
        let mut first = units.len();
        // Tokens of everything behind `start`, each unit written as the successor of another one.
        let mut behind = 0;
        for start in (0..units.len()).rev() {
            if behind > room {
                break;
            }
            let before = start.checked_sub(1).map(|before| units[before]);
            let after = units.get(start + 1).copied();
            let opening = rendered.unit_text(units[start], None, after, options);
            if self.length(&opening, false)? + behind <= room {
                first = start;
            }
            let following = rendered.unit_text(units[start], before, after, options);
            behind += self.length(&following, false)?;
        }
        Ok(first)
    }
}

#[cfg(test)]
#[path = "fit_tests.rs"]
mod tests;
