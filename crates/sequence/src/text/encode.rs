//! A row of text to tokens, and which of them are learned.

use serde_json::{Value, json};
use tokenizers::Tokenizer;

use crate::SequenceError;
use crate::labels::NO_TARGET;
use crate::options::{Overlength, SequenceOptions};
use crate::text::LossOn;
use crate::text::rows::Row;
use crate::text::template::ChatTemplate;
use crate::tokenizer::PatientTokenizer;

/// How conversations, prompts and responses become the tokens of a language model.
pub struct DialogueEncoder<'a> {
    tokenizer: &'a PatientTokenizer,
    /// As the tokenizer, but for the special tokens that a template writes.
    templated: Tokenizer,
    template: Option<&'a ChatTemplate>,
}

/// Tokens of a row, and the target of each: [`NO_TARGET`] where there is none.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Encoded {
    pub tokens: Vec<u32>,
    pub targets: Vec<i32>,
    /// Tokens without truncation.
    pub full_length: usize,
}

impl<'a> DialogueEncoder<'a> {
    /// Without a template, a prompt is what it is.
    pub fn new(
        tokenizer: &'a PatientTokenizer,
        template: Option<&'a ChatTemplate>,
    ) -> DialogueEncoder<'a> {
        DialogueEncoder {
            tokenizer,
            templated: tokenizer.with_special_tokens(),
            template,
        }
    }

    /// The tokens of a conversation up to where the assistant's answer begins.
    ///
    /// # Errors
    /// What is wrong with it, in words that do not quote it: no template, or what it refuses.
    pub fn conversation(&self, messages: &[Value]) -> Result<Vec<u32>, String> {
        self.templated(&self.template()?.render(messages, true)?)
    }

    /// The tokens of a prompt: the user's turn of a conversation, after the `system`'s words where
    /// there are any, or, without a template, the text itself.
    ///
    /// # Errors
    /// As [`DialogueEncoder::conversation`]; a `system` without a template.
    pub fn prompt(&self, prompt: &str, system: Option<&str>) -> Result<Vec<u32>, String> {
        if self.template.is_none() && system.is_none() {
            return Ok([self.tokenizer.prefix(), &self.plain(prompt)?].concat());
        }
        let system = system.map(|system| json!({"role": "system", "content": system}));
        let user = json!({"role": "user", "content": prompt});
        let messages: Vec<Value> = system.into_iter().chain([user]).collect();
        self.conversation(&messages)
    }

    /// The tokens of what a row of a file asks for: its `messages`, but for an assistant's at their
    /// end, or its `prompt`.
    ///
    /// # Errors
    /// As [`DialogueEncoder::prompt`]; a row that asks for nothing.
    pub fn request(&self, row: &Value, system: Option<&str>) -> Result<Vec<u32>, String> {
        if let Some(messages) = row["messages"].as_array() {
            let asked = match messages.split_last() {
                Some((last, before)) if last["role"] == "assistant" => before,
                _ => messages,
            };
            let system = system.map(|system| json!({"role": "system", "content": system}));
            let messages: Vec<Value> = system.into_iter().chain(asked.iter().cloned()).collect();
            return self.conversation(&messages);
        }
        match row["prompt"].as_str() {
            Some(prompt) => self.prompt(prompt, system),
            None => Err("has neither `messages` nor `prompt`".to_owned()),
        }
    }

    /// A whole row with its targets.
    pub(crate) fn row(&self, row: &Row, loss: LossOn) -> Result<Encoded, String> {
        let (tokens, targets) = match row {
            Row::Messages(messages) => self.messages(messages, loss)?,
            Row::Pair { prompt, response } if self.template.is_some() => {
                let messages = [
                    json!({"role": "user", "content": prompt}),
                    json!({"role": "assistant", "content": response}),
                ];
                self.messages(&messages, loss)?
            }
            Row::Pair { prompt, response } => self.pair(prompt, response, loss)?,
            Row::Text(text) => self.pair("", text, LossOn::All)?,
            Row::Labelled { .. } | Row::Tagged { .. } => {
                unreachable!("rows are read for their task")
            }
        };
        let mut encoded = Encoded {
            full_length: tokens.len(),
            tokens,
            targets,
        };
        encoded.drop_first_target();
        Ok(encoded)
    }

    /// The assistants' turns are what a conversation gains by each of them: the text up to a turn,
    /// rendered by itself with the generation prompt, has to begin the whole text, token by token.
    fn messages(&self, messages: &[Value], loss: LossOn) -> Result<(Vec<u32>, Vec<i32>), String> {
        let template = self.template()?;
        let tokens = self.templated(&template.render(messages, false)?)?;
        if loss == LossOn::All {
            let targets = tokens.iter().map(|&token| token as i32).collect();
            return Ok((tokens, targets));
        }
        let mut targets = vec![NO_TARGET; tokens.len()];
        let mut found = false;
        for (turn, message) in messages.iter().enumerate() {
            if message["role"] != "assistant" {
                continue;
            }
            let before = self.templated(&template.render(&messages[..turn], true)?)?;
            let after = match turn + 1 == messages.len() {
                true => tokens.clone(),
                false => self.templated(&template.render(&messages[..=turn], false)?)?,
            };
            if !after.starts_with(&before) || !tokens.starts_with(&after) {
                return Err(format!(
                    "cannot be split into turns: what the chat template writes up to message {} \
                     is not how it begins the whole conversation. Either the template rewrites \
                     earlier turns, or the answer begins with characters that the tokenizer joins \
                     with what stands before it; set `text.loss = \"all\"`, or change the row",
                    turn + 1
                ));
            }
            for place in before.len()..after.len() {
                targets[place] = tokens[place] as i32;
            }
            found = true;
        }
        match found {
            true => Ok((tokens, targets)),
            false => Err("has no message of the role `assistant`".to_owned()),
        }
    }

    /// Without template: beginning-of-text token, prompt, response, end-of-text token.
    fn pair(
        &self,
        prompt: &str,
        response: &str,
        loss: LossOn,
    ) -> Result<(Vec<u32>, Vec<i32>), String> {
        let prefix = self.tokenizer.prefix();
        let before = self.plain(prompt)?;
        let joined = self.plain(&format!("{prompt}{response}"))?;
        // Where the two grow together at the seam, each is encoded by itself, as it will be when
        // the model is asked.
        let body = match joined.starts_with(&before) {
            true => joined,
            false => [&before[..], &self.plain(response)?].concat(),
        };
        let mut tokens = [prefix, &body].concat();
        match (self.tokenizer.eos_id(), self.tokenizer.suffix()) {
            (Some(eos), _) => tokens.push(eos),
            (None, suffix) => tokens.extend_from_slice(suffix),
        }
        let start = match loss {
            LossOn::All => 0,
            LossOn::Response => prefix.len() + before.len(),
        };
        let targets = (0..tokens.len())
            .map(|place| match place >= start {
                true => tokens[place] as i32,
                false => NO_TARGET,
            })
            .collect();
        Ok((tokens, targets))
    }

    fn template(&self) -> Result<&ChatTemplate, String> {
        self.template.ok_or_else(|| {
            "holds messages, and the checkpoint has no chat template (or `text.chat_template` is \
             \"none\"): give `prompt` and `response`"
                .to_owned()
        })
    }

    fn plain(&self, text: &str) -> Result<Vec<u32>, String> {
        self.tokenizer
            .encode_whole(text)
            .map_err(|error| error.to_string())
    }

    fn templated(&self, text: &str) -> Result<Vec<u32>, String> {
        self.templated
            .encode_fast(text, false)
            .map(|encoding| encoding.get_ids().to_vec())
            // The message of a tokenizer may quote the text.
            .map_err(|_| "cannot be encoded by the tokenizer".to_owned())
    }
}

/// A text with the special tokens around it, for a classifier.
pub(crate) fn whole_text(
    text: &str,
    tokenizer: &PatientTokenizer,
) -> Result<Encoded, SequenceError> {
    let tokens = tokenizer.encode(text)?;
    Ok(Encoded {
        full_length: tokens.len(),
        targets: Vec::new(),
        tokens,
    })
}

/// Words with special tokens around them. Each word's class stands at its first token, as in
/// Transformers' examples; a word that the tokenizer leaves nothing of has none.
pub(crate) fn tagged_words(
    words: &[String],
    classes: &[i32],
    tokenizer: &PatientTokenizer,
) -> Result<Encoded, SequenceError> {
    let mut tokens = tokenizer.prefix().to_vec();
    let mut targets = vec![NO_TARGET; tokens.len()];
    for (position, (word, class)) in words.iter().zip(classes).enumerate() {
        let start = tokens.len();
        tokens.extend(tokenizer.encode_piece(word, position == 0)?);
        targets.resize(tokens.len(), NO_TARGET);
        if let Some(first) = targets.get_mut(start) {
            *first = *class;
        }
    }
    tokens.extend_from_slice(tokenizer.suffix());
    targets.resize(tokens.len(), NO_TARGET);
    Ok(Encoded {
        full_length: tokens.len(),
        tokens,
        targets,
    })
}

impl Encoded {
    /// Keeps at most `max_tokens` tokens, those of `keep_start` at the start and of `keep_end` at
    /// the end always. Where an overlong row is an error, it stays as it is.
    pub fn cut(&mut self, options: &SequenceOptions, keep_start: usize, keep_end: usize) {
        let length = self.tokens.len();
        let range = match options.overlength {
            _ if length <= options.max_tokens => return,
            Overlength::CutEnd => options.max_tokens.saturating_sub(keep_end)..length - keep_end,
            Overlength::CutStart => {
                let end = (keep_start + length).saturating_sub(options.max_tokens);
                keep_start..end.max(keep_start)
            }
            Overlength::Error | Overlength::DropOldestEvents => return,
        };
        self.tokens.drain(range.clone());
        if !self.targets.is_empty() {
            self.targets.drain(range);
        }
    }

    /// Nothing comes before the first token, so nothing predicts it.
    pub fn drop_first_target(&mut self) {
        if let Some(first) = self.targets.first_mut() {
            *first = NO_TARGET;
        }
    }

    /// Whether some token is learned.
    pub fn has_targets(&self) -> bool {
        self.targets.iter().any(|target| *target != NO_TARGET)
    }
}

#[cfg(test)]
#[path = "encode_tests.rs"]
mod tests;
