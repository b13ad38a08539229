//! `calor generate`: text from a language model.

use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use calor_train::recipe::{ChatTemplateChoice, Dtype, TextSection};
use calor_train::{Generated, Generator, GeneratorSource, Sampling, frozen_weights, run_recipe};
use serde::Serialize;
use serde_json::Value;

use crate::device::DeviceArgument;
use crate::failure::{Exit, Failure};
use crate::hub::{Hub, Purpose};
use crate::output;
use crate::signals::stop_on_signals;

/// With which model, from which prompts, and how.
#[derive(clap::Args)]
#[command(
    after_help = "Prompts are written as in the run's training: by the checkpoint's chat template, where it has one. \
                  A line of --file is an object with `prompt` or with `messages`; an assistant's message at the end \
                  of these is left out. --file prints a line of JSON a prompt, in the order of the file."
)]
pub struct Arguments {
    /// Folder of a run, folder of a checkpoint, or a hub id
    #[arg(value_name = "RUN|MODEL")]
    model: String,
    /// Folder of an adapter on the checkpoint; a run has its own
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// What to continue
    #[arg(
        long,
        value_name = "TEXT",
        conflicts_with = "file",
        required_unless_present = "file"
    )]
    prompt: Option<String>,
    /// JSON lines with what to continue
    #[arg(long, value_name = "JSONL")]
    file: Option<PathBuf>,
    /// What the chat template's system turn says
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Tokens of a continuation at most
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_new_tokens: usize,
    /// Divides the logits before the softmax; 0 always takes the most probable token
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f64,
    /// Draws among the most probable tokens that together reach this probability
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f64,
    /// Draws among so many of the most probable tokens; 0 among all
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Divides the positive logits of tokens that the text already has, its prompt included, and
    /// multiplies the negative ones; 1 for none
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    repetition_penalty: f64,
    /// Lets no run of so many tokens come twice in a text, its prompt included; 0 for no such rule
    #[arg(long, value_name = "N", default_value_t = 0)]
    no_repeat_ngram: usize,
    /// Fixes what is drawn
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    seed: u64,
    /// Prompts that are continued together
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..))]
    batch: u64,
    #[command(flatten)]
    device: DeviceArgument,
    /// Prints text, tokens and how each continuation ended as JSON, one a line
    #[arg(long)]
    json: bool,
}

/// Continues the prompts, and prints what comes.
pub fn run(arguments: &Arguments) -> Result<Exit, Failure> {
    let sampling = Sampling {
        max_new_tokens: arguments.max_new_tokens,
        temperature: arguments.temperature,
        top_k: arguments.top_k,
        top_p: arguments.top_p,
        repetition_penalty: arguments.repetition_penalty,
        no_repeat_ngram: arguments.no_repeat_ngram,
        seed: arguments.seed,
    };
    if let Some(problem) = sampling.problem() {
        return Err(Failure::usage(problem));
    }
    let stop = stop_on_signals()?;
    let generator = open(arguments)?;
    let encoder = generator.encoder();
    let system = arguments.system.as_deref();
    let prompts: Vec<Vec<u32>> = match (&arguments.prompt, &arguments.file) {
        (Some(prompt), _) => {
            let tokens = encoder.prompt(prompt, system);
            vec![tokens.map_err(|problem| Failure::usage(format!("the prompt {problem}")))?]
        }
        (None, Some(file)) => read(file, |row| encoder.request(row, system))?,
        (None, None) => Vec::new(),
    };

    let started = Instant::now();
    let (mut tokens, mut first) = (0, 0);
    for some in prompts.chunks(arguments.batch as usize) {
        let Some(found) = generator.generate(some, first, &sampling, &stop)? else {
            return Err(Failure::failed("stopped by a signal before the end"));
        };
        for one in &found {
            tokens += one.tokens.len() + usize::from(one.ended);
            show(arguments, one)?;
        }
        first += some.len();
        if first < prompts.len() {
            eprintln!(
                "{first} of {} prompts, {} tokens/s",
                prompts.len(),
                output::number(tokens as f64 / started.elapsed().as_secs_f64().max(1e-9))
            );
        }
    }
    let elapsed_s = started.elapsed().as_secs_f64();
    eprintln!(
        "{} tokens in {}, {} tokens/s",
        output::count(tokens as u64),
        output::seconds(elapsed_s),
        output::number(tokens as f64 / elapsed_s.max(1e-9))
    );
    Ok(Exit::Done)
}

fn open(arguments: &Arguments) -> Result<Generator, Failure> {
    let path = Path::new(&arguments.model);
    let hub = Hub::from_env();
    let device = arguments.device.spec()?;
    if path.join("recipe.toml").exists() {
        let recipe = run_recipe(path)?;
        let revision = recipe.model.revision.as_deref();
        let checkpoint = hub.resolve(&recipe.model.id, revision, Purpose::LanguageModel)?;
        let own = path.join("adapter");
        let mut text = recipe.text;
        if !recipe.task.notes.is_empty() {
            // Notes were learned after the patient's text as it is.
            text.chat_template = ChatTemplateChoice::None;
        }
        return Ok(Generator::open(&GeneratorSource {
            checkpoint: &checkpoint,
            adapter: Some(arguments.adapter.as_deref().unwrap_or(&own)),
            dtype: recipe.model.dtype,
            quantization: frozen_weights(&recipe.model).quantization,
            text,
            device,
        })?);
    }
    let checkpoint = hub.resolve(&arguments.model, None, Purpose::LanguageModel)?;
    Ok(Generator::open(&GeneratorSource {
        checkpoint: &checkpoint,
        adapter: arguments.adapter.as_deref(),
        dtype: Dtype::F32,
        quantization: None,
        text: TextSection::default(),
        device,
    })?)
}

/// The prompts of a file of JSON lines.
fn read(
    path: &Path,
    encode: impl Fn(&Value) -> Result<Vec<u32>, String>,
) -> Result<Vec<Vec<u32>>, Failure> {
    let file = std::fs::File::open(path)
        .map_err(|error| Failure::usage(format!("cannot read {}: {error}", path.display())))?;
    let mut prompts = Vec::new();
    for (number, line) in std::io::BufReader::new(file).lines().enumerate() {
        let wrong = |problem: String| {
            Failure::usage(format!(
                "{}, line {}: the row {problem}",
                path.display(),
                number + 1
            ))
        };
        let line = line.map_err(|error| wrong(format!("cannot be read: {error}")))?;
        if line.trim().is_empty() {
            continue;
        }
        let row: Value = serde_json::from_str(&line)
            .map_err(|error| wrong(format!("is no JSON (column {})", error.column())))?;
        prompts.push(encode(&row).map_err(wrong)?);
    }
    if prompts.is_empty() {
        return Err(Failure::usage(format!("{} has no rows", path.display())));
    }
    Ok(prompts)
}

#[derive(Serialize)]
struct Line<'a> {
    response: &'a str,
}

fn show(arguments: &Arguments, one: &Generated) -> Result<(), Failure> {
    let text = if arguments.json {
        serde_json::to_string(one)
    } else if arguments.file.is_some() {
        serde_json::to_string(&Line {
            response: &one.text,
        })
    } else {
        Ok(one.text.clone())
    };
    let text = text.map_err(|error| Failure::failed(error.to_string()))?;
    output::print(&format!("{text}\n"))?;
    std::io::stdout().flush()?;
    Ok(())
}
