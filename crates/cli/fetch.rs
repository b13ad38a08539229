//! `calor fetch`: a checkpoint into the hub cache.

use calor_model::{Checkpoint, Tower};

use crate::failure::{Exit, Failure};
use crate::hub::{Hub, Purpose};
use crate::output;

/// What to fetch.
#[derive(clap::Args)]
#[command(
    after_help = "Environment: HF_ENDPOINT (another hub), HF_HUB_CACHE or HF_HOME (where the cache is), HF_TOKEN or \
                  HF_TOKEN_PATH (for private and gated models), HF_HUB_OFFLINE=1 (look into the cache only)."
)]
pub struct Arguments {
    /// Model id of the hub, for example `sentence-transformers/all-MiniLM-L6-v2`
    #[arg(value_name = "MODEL_ID")]
    id: String,
    /// Branch, tag or commit
    #[arg(long, default_value = "main")]
    revision: String,
    /// The encoder of a modality (ViT, CLIP, SigLIP, Whisper), which needs no tokenizer.json
    #[arg(long)]
    tower: bool,
    /// Prints the commit, the folder and the files as JSON
    #[arg(long)]
    json: bool,
}

/// Fetches, checks that what came is a checkpoint of a supported model, and prints its folder.
pub fn run(arguments: &Arguments) -> Result<Exit, Failure> {
    let purpose = match arguments.tower {
        true => Purpose::Tower,
        false => Purpose::LanguageModel,
    };
    let snapshot = Hub::from_env().fetch(&arguments.id, &arguments.revision, purpose)?;
    let total: u64 = snapshot.files.iter().map(|file| file.bytes).sum();
    eprintln!(
        "{} at commit {}: {} files, {}.",
        snapshot.id,
        snapshot.commit,
        snapshot.files.len(),
        output::bytes(total)
    );
    let opened = match purpose {
        Purpose::Tower => Tower::open(&snapshot.path).map(drop),
        Purpose::LanguageModel => Checkpoint::open(&snapshot.path).map(drop),
    };
    if arguments.json {
        output::print_json(&snapshot)?;
    } else {
        output::print(&format!("{}\n", snapshot.path.display()))?;
    }
    match opened {
        Ok(()) => Ok(Exit::Done),
        Err(error) => {
            Err(Failure::from(error)
                .hint("the files were fetched, but Calor cannot train this model"))
        }
    }
}
