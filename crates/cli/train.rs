//! `calor train`: a recipe, from the cohort to the report.

use std::path::{Path, PathBuf};

use calor_train::recipe::Recipe;
use calor_train::{RunOptions, TrainOutcome};

use crate::cache;
use crate::device::DeviceArgument;
use crate::failure::{Exit, Failure};
use crate::hub::{Hub, Purpose};
use crate::output;
use crate::progress::Progress;
use crate::results;
use crate::signals::stop_on_signals;
use crate::sweep::{self, SweepArguments};

/// A recipe, with what is changed of it on the command line.
#[derive(clap::Args)]
pub struct RecipeArguments {
    /// The recipe, TOML
    #[arg(value_name = "RECIPE")]
    recipe: PathBuf,
    /// Sets a key of the recipe, for example `--set train.epochs=1`; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

/// What to train, where, and where to put it.
#[derive(clap::Args)]
#[command(
    after_help = "SIGTERM, SIGUSR1 and Ctrl-C finish the step, write a checkpoint and exit with status 3; --resume goes \
                  on from it. Prepared sequences are kept in CALOR_CACHE (default: ~/.cache/calor)."
)]
pub struct Arguments {
    #[command(flatten)]
    recipe: RecipeArguments,
    #[command(flatten)]
    device: DeviceArgument,
    /// Folder of the run [default: runs/NAME, the name of the recipe; of a sweep runs/NAME-sweep]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Goes on with what the folder holds; starts anew where it holds nothing
    #[arg(long)]
    resume: bool,
    /// Trains many variants of the recipe, as this file says, and evaluates the best
    #[arg(long, value_name = "FILE")]
    sweep: Option<PathBuf>,
    /// Prints the report as JSON
    #[arg(long)]
    json: bool,
}

impl RecipeArguments {
    /// A recipe as it stands.
    pub fn of(path: &Path) -> RecipeArguments {
        RecipeArguments {
            recipe: path.to_owned(),
            set: Vec::new(),
        }
    }

    /// Reads the recipe and finds its checkpoint and the pretrained encoders of its modalities,
    /// fetching them where that is needed.
    pub fn load(&self) -> Result<(Recipe, PathBuf), Failure> {
        self.load_with(&[])
    }

    /// As [`RecipeArguments::load`], with assignments after those of the command line.
    pub fn load_with(&self, set: &[String]) -> Result<(Recipe, PathBuf), Failure> {
        let mut recipe = Recipe::load(&self.recipe, &[&self.set, set].concat())?;
        let hub = Hub::from_env();
        let revision = recipe.model.revision.as_deref();
        let checkpoint = hub.resolve(&recipe.model.id, revision, Purpose::LanguageModel)?;
        for folder in recipe.modality.towers() {
            let named = folder.to_string_lossy().into_owned();
            let found = hub.resolve(&named, None, Purpose::Tower)?;
            *folder = std::path::absolute(found)?;
        }
        recipe.modality.take_preprocessing()?;
        Ok((recipe, checkpoint))
    }
}

/// Trains, and prints the result.
pub fn run(arguments: &Arguments) -> Result<Exit, Failure> {
    let device = arguments.device.spec()?;
    // Signals count from here on: a long preparation is not to be cut off without a word.
    let stop = stop_on_signals()?;
    if let Some(file) = &arguments.sweep {
        let sweep = SweepArguments {
            file,
            recipe: &arguments.recipe,
            out: arguments.out.as_deref(),
            device,
            resume: arguments.resume,
            json: arguments.json,
        };
        return sweep::run(&sweep, &stop);
    }
    let (recipe, checkpoint) = arguments.recipe.load()?;
    let out = arguments
        .out
        .clone()
        .unwrap_or_else(|| PathBuf::from("runs").join(&recipe.name));
    let options = RunOptions {
        recipe,
        checkpoint,
        out,
        cache: cache::folder()?,
        device,
        resume: arguments.resume,
    };
    let mut progress = Progress::new();
    let outcome = calor_train::train(&options, &mut progress, &stop);
    progress.finish();
    match outcome? {
        TrainOutcome::Finished(report) => {
            if arguments.json {
                output::print_json(&report)?;
            } else {
                output::print(&results::show_run(&options.out, &report))?;
            }
            Ok(Exit::Done)
        }
        TrainOutcome::Stopped { step, checkpoint } => {
            eprintln!(
                "Stopped after step {}. Checkpoint: {}",
                output::count(step),
                checkpoint.display()
            );
            eprintln!(
                "To go on: calor train {} --out {} --resume",
                options.out.join("recipe.toml").display(),
                options.out.display()
            );
            Ok(Exit::Stopped)
        }
    }
}
