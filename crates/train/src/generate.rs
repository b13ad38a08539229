//! Text from a language model: prompts in, continuations out.

use std::collections::BTreeSet;
use std::path::Path;

use calor_model::{
    Checkpoint, FrozenWeights, HeadOptions, KeyValueCache, Model, ModelOptions, Quantization,
};
use calor_sequence::{ChatTemplate, DialogueEncoder, PatientTokenizer};
use serde::Serialize;
use serde_json::Value;

use crate::TrainError;
use crate::device::DeviceSpec;
use crate::files::read_json;
use crate::observer::StopFlag;
use crate::recipe::{ChatTemplateChoice, Dtype, TextSection};
use crate::seed::derive;
use crate::session::{float_dtype, open_device};

/// What text is generated with.
#[derive(Clone, Debug)]
pub struct GeneratorSource<'a> {
    /// The folder of a checkpoint.
    pub checkpoint: &'a Path,
    /// The folder of an adapter on it.
    pub adapter: Option<&'a Path>,
    /// Type of the weights.
    pub dtype: Dtype,
    /// Bits of the backbone's linear layers; of a run, as in its training.
    pub quantization: Option<Quantization>,
    /// How prompts are written; of a run, as in its training.
    pub text: TextSection,
    /// Where to compute.
    pub device: DeviceSpec,
}

/// How a token is chosen among those that can follow.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Tokens of a continuation at most.
    pub max_new_tokens: usize,
    /// Divides the logits before the softmax; 0 always takes the most probable token.
    pub temperature: f64,
    /// Draws among so many of the most probable tokens; 0 among all.
    pub top_k: usize,
    /// Draws among the most probable tokens that together reach this probability; 1 among all.
    pub top_p: f64,
    /// Divides the positive logits of tokens that the text already has, its prompt included, and
    /// multiplies the negative ones (Keskar et al. 2019); 1 for none.
    pub repetition_penalty: f64,
    /// No run of so many tokens comes twice in a text, its prompt included; 0 for no such rule.
    pub no_repeat_ngram: usize,
    /// Fixes what is drawn: a token follows from the seed, its prompt's number and its place.
    pub seed: u64,
}

/// A language model that continues prompts.
pub struct Generator {
    model: Model,
    tokenizer: PatientTokenizer,
    template: Option<ChatTemplate>,
    stop_tokens: Vec<u32>,
}

/// A continuation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Generated {
    /// Its text without special tokens.
    pub text: String,
    /// Its tokens; the one that ended it is left out.
    pub tokens: Vec<u32>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Whether it ended by itself, and not because it was long enough.
    pub ended: bool,
}

impl Sampling {
    /// The most probable token every time.
    pub fn greedy(max_new_tokens: usize) -> Sampling {
        Sampling {
            max_new_tokens,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            repetition_penalty: 1.0,
            no_repeat_ngram: 0,
            seed: 0,
        }
    }

    /// What is wrong with the numbers, in words.
    pub fn problem(&self) -> Option<String> {
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return Some(format!(
                "the temperature is {}; it is at least 0",
                self.temperature
            ));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Some(format!(
                "top-p is {}; it is above 0 and at most 1",
                self.top_p
            ));
        }
        if !(self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0) {
            return Some(format!(
                "the repetition penalty is {}; it is above 0, and 1 is none",
                self.repetition_penalty
            ));
        }
        (self.max_new_tokens == 0).then(|| "0 new tokens are no continuation".to_owned())
    }

    fn reads_the_text(&self) -> bool {
        self.repetition_penalty != 1.0 || self.no_repeat_ngram > 0
    }

    /// Makes less probable, or impossible, what would repeat `text`.
    fn discourage(&self, logits: &mut [f32], text: &[u32]) {
        if self.repetition_penalty != 1.0 {
            let penalty = self.repetition_penalty as f32;
            let seen: BTreeSet<u32> = text.iter().copied().collect();
            for token in seen {
                let logit = &mut logits[token as usize];
                *logit = if *logit > 0.0 {
                    *logit / penalty
                } else {
                    *logit * penalty
                };
            }
        }
        if let Some(before) = self.no_repeat_ngram.checked_sub(1) {
            let Some(last) = text.len().checked_sub(before).map(|start| &text[start..]) else {
                return;
            };
            for run in text.windows(self.no_repeat_ngram) {
                if run[..before] == *last {
                    logits[run[before] as usize] = f32::NEG_INFINITY;
                }
            }
        }
    }

    /// Chooses a token. `drawn` is uniform over all 64-bit numbers.
    fn choose(&self, logits: &[f32], drawn: u64) -> usize {
        if self.temperature == 0.0 {
            return most_probable(logits);
        }
        let mut order: Vec<usize> = (0..logits.len()).collect();
        // Among equals the first counts, so that the choice is the same everywhere.
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
        if self.top_k > 0 {
            order.truncate(self.top_k);
        }
        let highest = f64::from(logits[order[0]]);
        let mut weights: Vec<f64> = order
            .iter()
            .map(|token| ((f64::from(logits[*token]) - highest) / self.temperature).exp())
            .collect();
        if self.top_p < 1.0 {
            let wanted = self.top_p * weights.iter().sum::<f64>();
            let mut reached = 0.0;
            let enough = weights.iter().position(|weight| {
                reached += weight;
                reached >= wanted
            });
            weights.truncate(enough.map_or(weights.len(), |last| last + 1));
        }
        let sum: f64 = weights.iter().sum();
        let mut left = drawn as f64 / 2f64.powi(64) * sum;
        for (token, weight) in order.iter().zip(&weights) {
            left -= weight;
            if left < 0.0 {
                return *token;
            }
        }
        // Rounding may leave a rest behind the last.
        order[weights.len() - 1]
    }
}

/// The first of the largest.
fn most_probable(logits: &[f32]) -> usize {
    let mut best = 0;
    for (token, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = token;
        }
    }
    best
}

impl Generator {
    /// Loads the model.
    ///
    /// # Errors
    /// A checkpoint, adapter, tokenizer or template that cannot be used; an adapter of another task;
    /// a model that reads modality items.
    pub fn open(source: &GeneratorSource<'_>) -> Result<Generator, TrainError> {
        let device = open_device(source.device, source.dtype)?;
        let checkpoint = Checkpoint::open(source.checkpoint)?;
        let frozen = FrozenWeights {
            dtype: float_dtype(source.dtype),
            quantization: source.quantization,
        };
        let model = match source.adapter {
            Some(adapter) => Model::load_with_adapter(&checkpoint, adapter, frozen, &device)?,
            None => {
                let options = ModelOptions {
                    head: HeadOptions::CausalLm,
                    dtype: frozen.dtype,
                    quantization: frozen.quantization,
                    ..ModelOptions::default()
                };
                Model::load(&checkpoint, &options, &device)?
            }
        };
        let does_not_generate = |problem: &str| TrainError::Task {
            task: "causal_lm",
            problem: problem.to_owned(),
        };
        if model.options().head != HeadOptions::CausalLm {
            return Err(does_not_generate(
                "the adapter is one of another task, and only a language model continues a text",
            ));
        }
        if model.options().fusion.is_some() {
            return Err(does_not_generate(
                "the model reads modality items, which a prompt does not have",
            ));
        }
        let template = match source.text.chat_template {
            ChatTemplateChoice::Auto => ChatTemplate::open(source.checkpoint, &source.text.date)?,
            ChatTemplateChoice::None => None,
        };
        let tokenizer = PatientTokenizer::open(source.checkpoint)?;
        let mut stop_tokens = stop_tokens(source.checkpoint)?;
        stop_tokens.extend(tokenizer.eos_id());
        Ok(Generator {
            model: model.for_inference(),
            tokenizer,
            template,
            stop_tokens,
        })
    }

    /// What writes prompts as tokens.
    pub fn encoder(&self) -> DialogueEncoder<'_> {
        DialogueEncoder::new(&self.tokenizer, self.template.as_ref())
    }

    /// Continues some prompts together; `first` is the number of the first, for what is drawn. None
    /// when `stop` was set before the end.
    ///
    /// # Errors
    /// A prompt without tokens or one that leaves no room for a continuation; a device that fails.
    pub fn generate(
        &self,
        prompts: &[Vec<u32>],
        first: usize,
        sampling: &Sampling,
        stop: &StopFlag,
    ) -> Result<Option<Vec<Generated>>, TrainError> {
        let problem = |problem: String| TrainError::Task {
            task: "causal_lm",
            problem,
        };
        if let Some(found) = sampling.problem() {
            return Err(problem(found));
        }
        let most = self.model.config().max_positions();
        for (number, prompt) in prompts.iter().enumerate() {
            let number = first + number + 1;
            if prompt.is_empty() {
                return Err(problem(format!("prompt {number} is empty")));
            }
            if prompt.len() >= most {
                return Err(problem(format!(
                    "prompt {number} has {} tokens, and the model has {most} positions",
                    prompt.len()
                )));
            }
        }
        let mut found: Vec<Generated> = prompts
            .iter()
            .map(|prompt| Generated {
                text: String::new(),
                tokens: Vec::new(),
                prompt_tokens: prompt.len(),
                ended: false,
            })
            .collect();
        let room = |one: &Generated| {
            one.tokens.len() < sampling.max_new_tokens.min(most - one.prompt_tokens)
        };
        let mut cache = KeyValueCache::new();
        let mut next: Vec<Vec<u32>> = prompts.to_vec();
        while found.iter().any(|one| !one.ended && room(one)) {
            if stop.is_set() {
                return Ok(None);
            }
            let logits = self.model.extend(&mut cache, &next);
            let [_, vocab] = logits.dims();
            let failed = |error: String| TrainError::Execution {
                doing: "generating",
                problem: error,
            };
            let data = logits
                .try_into_data()
                .map_err(|error| failed(error.to_string()))?
                .convert::<f32>();
            let mut logits: Vec<f32> = data
                .try_to_vec()
                .map_err(|error| failed(format!("{error:?}")))?;
            next.clear();
            let rows = found.iter_mut().zip(logits.chunks_mut(vocab));
            for (number, (one, logits)) in rows.enumerate() {
                if one.ended || !room(one) {
                    // Nobody reads it; the others go on.
                    next.push(vec![self.tokenizer.pad_id()]);
                    continue;
                }
                let place = [(first + number) as u64, one.tokens.len() as u64];
                let drawn = derive(sampling.seed, "generated token", &place);
                if sampling.reads_the_text() {
                    let text = [prompts[number].as_slice(), &one.tokens].concat();
                    sampling.discourage(logits, &text);
                }
                let token = sampling.choose(logits, drawn) as u32;
                next.push(vec![token]);
                match self.stop_tokens.contains(&token) {
                    true => one.ended = true,
                    false => one.tokens.push(token),
                }
            }
        }
        for one in &mut found {
            one.text = self.tokenizer.decode_text(&one.tokens)?;
        }
        Ok(Some(found))
    }
}

/// Tokens that end a text, by `generation_config.json` or `config.json`.
fn stop_tokens(checkpoint: &Path) -> Result<Vec<u32>, TrainError> {
    for name in ["generation_config.json", "config.json"] {
        let path = checkpoint.join(name);
        if !path.exists() {
            continue;
        }
        let config: Value = read_json(&path)?;
        let number = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let found: Vec<u32> = match &config["eos_token_id"] {
            Value::Array(tokens) => tokens.iter().filter_map(number).collect(),
            token => number(token).into_iter().collect(),
        };
        if !found.is_empty() {
            return Ok(found);
        }
    }
    Ok(Vec::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(temperature: f64, top_k: usize, top_p: f64) -> Sampling {
        Sampling {
            temperature,
            top_k,
            top_p,
            ..Sampling::greedy(8)
        }
    }

    /// Shares of 20,000 evenly spread draws.
    fn shares(sampling: Sampling, logits: &[f32]) -> Vec<f64> {
        let draws = 20_000u64;
        let mut counts = vec![0.0; logits.len()];
        for draw in 0..draws {
            let drawn = draw * (u64::MAX / draws) + u64::MAX / draws / 2;
            counts[sampling.choose(logits, drawn)] += 1.0 / draws as f64;
        }
        counts
    }

    #[test]
    fn tokens_are_drawn_as_often_as_they_are_probable() {
        let logits = [0.0, 2f32.ln(), 5f32.ln(), f32::NEG_INFINITY];
        let near = |found: &[f64], expected: [f64; 4]| {
            for (found, expected) in found.iter().zip(expected) {
                assert!((found - expected).abs() < 1e-3, "{found} {expected}");
            }
        };
        near(
            &shares(sampling(1.0, 0, 1.0), &logits),
            [0.125, 0.25, 0.625, 0.0],
        );
        // Half the temperature squares the odds.
        near(
            &shares(sampling(0.5, 0, 1.0), &logits),
            [1.0 / 30.0, 4.0 / 30.0, 25.0 / 30.0, 0.0],
        );
        near(
            &shares(sampling(1.0, 2, 1.0), &logits),
            [0.0, 2.0 / 7.0, 5.0 / 7.0, 0.0],
        );
        // 0.625 falls short of 0.7, so the second is needed as well.
        near(
            &shares(sampling(1.0, 0, 0.7), &logits),
            [0.0, 2.0 / 7.0, 5.0 / 7.0, 0.0],
        );
        near(
            &shares(sampling(1.0, 0, 0.6), &logits),
            [0.0, 0.0, 1.0, 0.0],
        );
        assert_eq!(sampling(0.0, 0, 1.0).choose(&[1.0, 3.0, 3.0], 7), 1);
    }

    #[test]
    fn repeating_is_discouraged() {
        let penalised = Sampling {
            repetition_penalty: 2.0,
            ..Sampling::greedy(8)
        };
        let mut logits = [4.0, -1.0, 3.0, 1.0];
        penalised.discourage(&mut logits, &[0, 1, 0]);
        assert_eq!(logits, [2.0, -2.0, 3.0, 1.0]);

        let no_pairs = Sampling {
            no_repeat_ngram: 2,
            ..Sampling::greedy(8)
        };
        let mut logits = [4.0, 3.0, 2.0];
        // 1 was followed by 0 and by 2.
        no_pairs.discourage(&mut logits, &[1, 0, 1, 2, 1]);
        assert_eq!(logits, [f32::NEG_INFINITY, 3.0, f32::NEG_INFINITY]);
        let mut logits = [4.0, 3.0];
        no_pairs.discourage(&mut logits, &[]);
        assert_eq!(logits, [4.0, 3.0]);
    }

    #[test]
    fn numbers_that_make_no_sense_are_refused() {
        for wrong in [
            sampling(-1.0, 0, 1.0),
            sampling(f64::NAN, 0, 1.0),
            sampling(1.0, 0, 0.0),
            sampling(1.0, 0, 1.5),
            Sampling::greedy(0),
            Sampling {
                repetition_penalty: 0.0,
                ..Sampling::greedy(8)
            },
        ] {
            assert!(wrong.problem().is_some(), "{wrong:?}");
        }
        assert!(sampling(0.7, 50, 0.9).problem().is_none());
    }
}
