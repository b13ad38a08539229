use std::borrow::Cow;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest, Sha256};
use tokenizers::Tokenizer;

use crate::SequenceError;

/// Words a cache holds at most: the vocabulary of codes, numbers and common words of notes.
const CACHED_WORDS: usize = 65_536;

/// The tokenizer of a checkpoint with what surrounds a sequence: `[CLS] … [SEP]`, `<s> … </s>`,
/// a beginning-of-text token, or nothing, as the checkpoint was pretrained.
pub struct PatientTokenizer {
    path: PathBuf,
    tokenizer: Tokenizer,
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    pad_id: u32,
    eos_id: Option<u32>,
    joining: Joining,
    digest: [u8; 32],
}

/// How the tokens of a text follow from the tokens of its words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Joining {
    /// A word is encoded with the space before it (byte-level BPE).
    Spaced,
    /// A word is encoded by itself (WordPiece, SentencePiece).
    Bare,
    /// Words do not determine the text: it is encoded as a whole.
    Whole,
}

/// Tokens of words seen before. One per thread; it changes speed, never a token.
#[derive(Default)]
pub(crate) struct WordCache {
    /// At the beginning of a text.
    first: HashMap<Box<str>, Word>,
    /// After a space.
    rest: HashMap<Box<str>, Word>,
}

#[derive(Clone)]
enum Word {
    Tokens(Box<[u32]>),
    /// Its tokens depend on its neighbours.
    Entangled,
}

impl PatientTokenizer {
    /// Reads `tokenizer.json` of a checkpoint folder, and `tokenizer_config.json` and
    /// `special_tokens_map.json` where they are.
    ///
    /// Truncation and padding stored in the file are switched off, and the text of a special token
    /// inside a note is encoded as the plain characters it consists of.
    ///
    /// # Errors
    /// A file that is missing, is not JSON or is not a tokenizer.
    pub fn open(folder: &Path) -> Result<PatientTokenizer, SequenceError> {
        let path = folder.join("tokenizer.json");
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(SequenceError::TokenizerMissing { path });
            }
            Err(error) => return Err(SequenceError::io(&path, error)),
        };
        let mut hash = Sha256::new();
        let mut json = Vec::new();
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(&bytes);
        for name in ["tokenizer_config.json", "special_tokens_map.json"] {
            let path = folder.join(name);
            match std::fs::read(&path) {
                Ok(bytes) => {
                    hash.update((bytes.len() as u64).to_le_bytes());
                    hash.update(&bytes);
                    json.push(
                        serde_json::from_slice(&bytes)
                            .map_err(|source| SequenceError::Json { path, source })?,
                    );
                }
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    hash.update(u64::MAX.to_le_bytes());
                    json.push(Value::Null);
                }
                Err(error) => return Err(SequenceError::io(&path, error)),
            }
        }
        PatientTokenizer::build(&path, &bytes, &json[0], &json[1], hash.finalize().into())
    }

    fn build(
        path: &Path,
        bytes: &[u8],
        config: &Value,
        special_tokens: &Value,
        digest: [u8; 32],
    ) -> Result<PatientTokenizer, SequenceError> {
        let invalid = |reason: String| SequenceError::TokenizerInvalid {
            path: path.to_path_buf(),
            reason,
        };
        let mut tokenizer =
            Tokenizer::from_bytes(bytes).map_err(|error| invalid(error.to_string()))?;
        let stored_pad = tokenizer.get_padding().map(|padding| padding.pad_id);
        tokenizer
            .with_truncation(None)
            .map_err(|error| invalid(error.to_string()))?;
        tokenizer.with_padding(None);
        tokenizer.set_encode_special_tokens(true);

        let special = |name: &str| -> Option<u32> {
            [config, special_tokens]
                .into_iter()
                .find_map(|source| token_content(&source[name]))
                .and_then(|content| tokenizer.token_to_id(content))
        };
        let (mut prefix, mut suffix) = framing(&tokenizer).map_err(invalid)?;
        if prefix.is_empty() && suffix.is_empty() {
            // An encoder whose tokenizer.json lacks a post-processor: the class in Transformers
            // adds these two itself.
            if let (Some(cls), Some(sep)) = (special("cls_token"), special("sep_token")) {
                prefix.push(cls);
                suffix.push(sep);
            }
        }
        for (flag, token, tokens, at_start) in [
            ("add_bos_token", "bos_token", &mut prefix, true),
            ("add_eos_token", "eos_token", &mut suffix, false),
        ] {
            let (Some(wanted), Some(id)) = (config[flag].as_bool(), special(token)) else {
                continue;
            };
            let there = tokens.contains(&id);
            if wanted && !there {
                tokens.insert(if at_start { 0 } else { tokens.len() }, id);
            } else if !wanted && there {
                tokens.retain(|&other| other != id);
            }
        }
        let pad_id = special("pad_token")
            .or(stored_pad)
            .or_else(|| special("eos_token"))
            .or_else(|| suffix.last().copied())
            .unwrap_or(0);

        let eos_id = special("eos_token");
        let highest = tokenizer.get_vocab(true).into_values().max();
        if highest.is_none_or(|id| id > i32::MAX as u32) {
            return Err(invalid("its vocabulary is empty or too large".to_string()));
        }
        let mut built = PatientTokenizer {
            path: path.to_path_buf(),
            tokenizer,
            prefix,
            suffix,
            pad_id,
            eos_id,
            joining: Joining::Whole,
            digest,
        };
        built.joining = built.find_joining()?;
        Ok(built)
    }

    /// The file the tokenizer came from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Tokens before every sequence.
    pub fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    /// Tokens after every sequence.
    pub fn suffix(&self) -> &[u32] {
        &self.suffix
    }

    /// The token that fills up rows. Any token would do, since padding is never attended to: a
    /// tokenizer without a padding token gives its end-of-text token.
    pub fn pad_id(&self) -> u32 {
        self.pad_id
    }

    /// The token that ends a text, where `tokenizer_config.json` names one.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos_id
    }

    /// The tokenizer that takes special tokens written in a text for what they are, for texts that
    /// a chat template has written.
    pub(crate) fn with_special_tokens(&self) -> Tokenizer {
        let mut tokenizer = self.tokenizer.clone();
        tokenizer.set_encode_special_tokens(false);
        tokenizer
    }

    /// Text of some tokens without the special ones: what a person reads.
    ///
    /// # Errors
    /// A token outside the vocabulary.
    pub fn decode_text(&self, tokens: &[u32]) -> Result<String, SequenceError> {
        self.tokenizer
            .decode(tokens, true)
            .map_err(|error| SequenceError::Tokenize {
                reason: error.to_string(),
            })
    }

    /// Number of tokens, added ones included. A checkpoint's embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// The number of a token, by its text as the vocabulary spells it.
    pub fn token(&self, text: &str) -> Option<u32> {
        self.tokenizer.token_to_id(text)
    }

    /// SHA-256 over the tokenizer's files.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// Tokens of a text with the special tokens around it.
    ///
    /// # Errors
    /// The tokenizer cannot encode the text (a character outside the vocabulary of a model
    /// without an unknown token).
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, SequenceError> {
        let body = self.encode_whole(text)?;
        Ok([&self.prefix[..], &body[..], &self.suffix[..]].concat())
    }

    /// Text of some tokens, special ones included.
    ///
    /// # Errors
    /// A token outside the vocabulary.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, SequenceError> {
        self.tokenizer
            .decode(tokens, false)
            .map_err(|error| SequenceError::Tokenize {
                reason: error.to_string(),
            })
    }

    /// Appends the tokens of a text, whose words are separated by single spaces, without special
    /// tokens. Word by word from the cache where that gives the same tokens as the whole text.
    pub(crate) fn encode_cached(
        &self,
        text: &str,
        at_start: bool,
        cache: &mut WordCache,
        tokens: &mut Vec<u32>,
    ) -> Result<(), SequenceError> {
        let before = tokens.len();
        if self.joining != Joining::Whole {
            let mut entangled = false;
            for (position, word) in text.split(' ').enumerate() {
                let first = at_start && position == 0;
                match &*self.word(word, first, cache)? {
                    Word::Tokens(ids) => tokens.extend_from_slice(ids),
                    Word::Entangled => {
                        entangled = true;
                        break;
                    }
                }
            }
            if !entangled {
                return Ok(());
            }
            tokens.truncate(before);
        }
        tokens.extend(self.encode_whole(text)?);
        Ok(())
    }

    /// A word's tokens: borrowed from the cache, or owned when that is full.
    fn word<'c>(
        &self,
        word: &str,
        first: bool,
        cache: &'c mut WordCache,
    ) -> Result<Cow<'c, Word>, SequenceError> {
        let words = if first {
            &mut cache.first
        } else {
            &mut cache.rest
        };
        if !words.contains_key(word) {
            let found = self.look_up(word, first)?;
            if words.len() >= CACHED_WORDS {
                return Ok(Cow::Owned(found));
            }
            words.insert(word.into(), found);
        }
        Ok(Cow::Borrowed(&words[word]))
    }

    /// Encodes a word by itself and checks, between neighbours, that it may be.
    fn look_up(&self, word: &str, first: bool) -> Result<Word, SequenceError> {
        let alone = self.encode_piece(word, first)?;
        let contexts: &[(&str, &str)] = if first {
            &[("", "b"), ("", "1.5")]
        } else {
            &[("a", "b"), ("a.", "1"), ("7,", "(b)")]
        };
        for (left, right) in contexts {
            let mut text = String::new();
            let mut pieces = Vec::new();
            for (position, piece) in [*left, word, *right]
                .into_iter()
                .skip(usize::from(first))
                .enumerate()
            {
                if position > 0 {
                    text.push(' ');
                }
                text.push_str(piece);
                pieces.extend(self.encode_piece(piece, position == 0)?);
            }
            if self.encode_whole(&text)? != pieces {
                return Ok(Word::Entangled);
            }
        }
        Ok(Word::Tokens(alone.into()))
    }

    /// A word by itself, as it stands in a text.
    pub(crate) fn encode_piece(&self, word: &str, first: bool) -> Result<Vec<u32>, SequenceError> {
        if first || self.joining == Joining::Bare {
            self.encode_whole(word)
        } else {
            self.encode_whole(&format!(" {word}"))
        }
    }

    /// A text without special tokens.
    pub(crate) fn encode_whole(&self, text: &str) -> Result<Vec<u32>, SequenceError> {
        encode(&self.tokenizer, text, false).map_err(|reason| SequenceError::Tokenize { reason })
    }

    /// Tries both ways of putting words together on ordinary text.
    fn find_joining(&mut self) -> Result<Joining, SequenceError> {
        let text = "67 year old man. 2 years ago creatinine very high 1.42, (b) weight 80.";
        let whole = self.encode_whole(text)?;
        for joining in [Joining::Spaced, Joining::Bare] {
            self.joining = joining;
            let mut pieces = Vec::new();
            for (position, word) in text.split(' ').enumerate() {
                pieces.extend(self.encode_piece(word, position == 0)?);
            }
            if pieces == whole {
                return Ok(joining);
            }
        }
        Ok(Joining::Whole)
    }
}

fn encode(tokenizer: &Tokenizer, text: &str, special: bool) -> Result<Vec<u32>, String> {
    tokenizer
        .encode_fast(text, special)
        .map(|encoding| encoding.get_ids().to_vec())
        // The message of a tokenizer may quote the text, which is a patient's.
        .map_err(|_| {
            "a character is outside its vocabulary and it has no unknown token".to_string()
        })
}

/// What the post-processor puts before and after a text.
fn framing(tokenizer: &Tokenizer) -> Result<(Vec<u32>, Vec<u32>), String> {
    for probe in ["a", "1", "the"] {
        let plain = encode(tokenizer, probe, false)?;
        let framed = encode(tokenizer, probe, true)?;
        if plain.is_empty() {
            continue;
        }
        return match framed
            .windows(plain.len())
            .position(|window| window == plain)
        {
            Some(start) => Ok((
                framed[..start].to_vec(),
                framed[start + plain.len()..].to_vec(),
            )),
            None => Err("its post-processor changes the tokens of the text".to_string()),
        };
    }
    Err("it gives no tokens for plain words".to_string())
}

/// A special token in a configuration file: a string, or an object with the string as `content`.
fn token_content(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}

#[cfg(test)]
#[path = "tokenizer_tests.rs"]
mod tests;
