//! `[text]`: files of text instead of a cohort.

use std::path::PathBuf;

use calor_records::Split;
use calor_sequence::TextFiles;
use serde::{Deserialize, Serialize};

use super::section::section;
use super::{Key, KeyKind};

section! {
    /// `[text]`: files of text instead of a cohort. A file whose name ends in `.jsonl` holds an object a
    /// line: `messages`, or `prompt` and `response`, or `text` (causal_lm); `tokens` and `tags` (tokens);
    /// `text` and `label` (binary, multiclass). Any other file holds a word and its tag a line and an
    /// empty line after each sentence (tokens).
    TextSection at "text." {
        /// The rows to train on.
        #[serde(skip_serializing_if = "Option::is_none")]
        train: Option<PathBuf> = None => Text;
        /// The rows that decide on the best model.
        #[serde(skip_serializing_if = "Option::is_none")]
        tuning: Option<PathBuf> = None => Text;
        /// The rows that nothing is decided on.
        #[serde(skip_serializing_if = "Option::is_none")]
        held_out: Option<PathBuf> = None => Text;
        /// `causal_lm`: `auto` writes conversations as the checkpoint's chat template does, and prompt and response as they are where it has none; `none` always writes them as they are.
        chat_template: ChatTemplateChoice = ChatTemplateChoice::Auto => Text;
        /// The day that a chat template is told when it asks for today, so that a run can be repeated.
        date: String = "2024-07-26".to_owned() => Text;
    }
}

/// Whether the checkpoint's chat template is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChatTemplateChoice {
    /// Where there is one.
    Auto,
    /// Never.
    None,
}

impl TextSection {
    /// The files by split.
    pub fn files(&self) -> TextFiles {
        let files = [
            (Split::Train, &self.train),
            (Split::Tuning, &self.tuning),
            (Split::HeldOut, &self.held_out),
        ];
        let given = files
            .into_iter()
            .filter_map(|(split, path)| Some((split, path.clone()?)));
        TextFiles {
            files: given.collect(),
        }
    }

    /// Whether the recipe reads files of text.
    pub fn is_used(&self) -> bool {
        !self.files().files.is_empty()
    }

    pub(super) fn is_default(&self) -> bool {
        *self == TextSection::default()
    }

    /// Makes the paths independent of the folder that the command was started in.
    pub(super) fn resolve(&mut self) {
        for path in [&mut self.train, &mut self.tuning, &mut self.held_out] {
            if let Some(path) = path
                && let Ok(absolute) = std::path::absolute(&*path)
            {
                *path = absolute;
            }
        }
    }
}
