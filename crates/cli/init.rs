//! `calor init`: a recipe of the project as the beginning of one's own.

use std::io::{self, BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};

use calor_train::recipe::Recipe;

use crate::check;
use crate::device::DeviceArgument;
use crate::failure::{Exit, Failure};
use crate::output::{self, Align, Table};

/// A recipe that the binary carries.
struct BuiltIn {
    name: &'static str,
    text: &'static str,
}

macro_rules! built_in {
    ($($name:literal),+ $(,)?) => {
        /// Every file of `recipes/`, which a test holds this list to.
        const BUILT_IN: &[BuiltIn] = &[$(BuiltIn {
            name: $name,
            text: include_str!(concat!("../../recipes/", $name, ".toml")),
        }),+];
    };
}

built_in!(
    "quickstart",
    "nafld-death",
    "physionet2012-mortality",
    "tcga-survival",
    "depresjon",
    "chest-xray",
    "spoken-digits",
    "multimodal-synthetic",
    "bc5cdr-entities",
    "mts-dialog-section",
    "mts-dialog-note",
);

/// Which recipe, and what becomes of it.
#[derive(clap::Args)]
#[command(
    after_help = "The copy keeps the comments, which say where its data and checkpoint come from. Where the cohort is \
                  there already, the copy is checked as by `calor check`."
)]
pub struct Arguments {
    /// A recipe that the binary carries, see --list; asked for on a terminal
    #[arg(value_name = "RECIPE")]
    recipe: Option<String>,
    /// Shows the recipes there are
    #[arg(long)]
    list: bool,
    /// Where to write it [default: RECIPE.toml]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Sets a key of the copy, for example `--set cohort.path=data/mine`; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    #[command(flatten)]
    device: DeviceArgument,
    /// Prints the list as JSON
    #[arg(long, requires = "list")]
    json: bool,
}

/// Copies, edits, checks.
pub fn run(arguments: &Arguments) -> Result<Exit, Failure> {
    if arguments.list {
        return list(arguments.json);
    }
    let chosen = match &arguments.recipe {
        Some(name) => named(name)?,
        None if io::stdin().is_terminal() && io::stderr().is_terminal() => pick()?,
        None => {
            return Err(Failure::usage("no recipe is named").hint(format!(
                "name one, for example `calor init quickstart`; there are {}",
                names()
            )));
        }
    };
    let path = arguments
        .out
        .clone()
        .unwrap_or_else(|| PathBuf::from(format!("{}.toml", chosen.name)));
    if path.exists() {
        let problem = format!("{} is there already", path.display());
        return Err(Failure::usage(problem).hint("remove it or give another --out"));
    }
    let text = Recipe::edit(chosen.text, &path, &arguments.set)?;
    let text = with_command(&text, &path.display().to_string());
    std::fs::write(&path, text)
        .map_err(|error| Failure::failed(format!("cannot write {}: {error}", path.display())))?;
    eprintln!("{} is written.", path.display());

    let recipe = Recipe::load(&path, &[])?;
    let text = &recipe.text;
    let files = [&text.train, &text.tuning, &text.held_out];
    let needed: Vec<&Path> = match text.is_used() {
        true => files.into_iter().flatten().map(PathBuf::as_path).collect(),
        false => vec![&recipe.cohort.path],
    };
    if let Some(missing) = needed.into_iter().find(|path| !path.exists()) {
        let about = match recipe.cohort.synth {
            Some(_) => "Its cohort is made when it is first checked or trained.".to_owned(),
            None => format!(
                "Its data is not there yet: {}\nThe comments at its top say where it comes from; \
                 an editor or --set names another.",
                missing.display()
            ),
        };
        eprintln!(
            "Its keys are right. {about}\nThen: calor check {}",
            path.display()
        );
        return Ok(Exit::Done);
    }
    check::recipe(&path, &arguments.device)
}

fn list(json: bool) -> Result<Exit, Failure> {
    if json {
        let list: Vec<_> = BUILT_IN
            .iter()
            .map(|recipe| serde_json::json!({"name": recipe.name, "about": about(recipe.text)}))
            .collect();
        output::print_json(&list)?;
    } else {
        let mut table = Table::new(&[("recipe", Align::Left), ("", Align::Left)]);
        for recipe in BUILT_IN {
            table.row([recipe.name.to_owned(), about(recipe.text)]);
        }
        output::print(&table.render())?;
    }
    Ok(Exit::Done)
}

fn named(name: &str) -> Result<&'static BuiltIn, Failure> {
    let bare = name.strip_suffix(".toml").unwrap_or(name);
    let bare = bare.strip_prefix("recipes/").unwrap_or(bare);
    BUILT_IN
        .iter()
        .find(|recipe| recipe.name == bare)
        .ok_or_else(|| {
            Failure::usage(format!("there is no recipe `{name}`"))
                .hint(format!("there are {}", names()))
        })
}

/// Asks for one on the terminal.
fn pick() -> Result<&'static BuiltIn, Failure> {
    for (number, recipe) in BUILT_IN.iter().enumerate() {
        eprintln!(
            "{:>3}  {:<26}{}",
            number + 1,
            recipe.name,
            about(recipe.text)
        );
    }
    let mut lines = io::stdin().lock().lines();
    loop {
        eprint!("Which one (number or name)? ");
        io::stderr().flush()?;
        let Some(line) = lines.next().transpose()? else {
            return Err(Failure::usage("no recipe is named"));
        };
        let line = line.trim();
        let by_number = line
            .parse::<usize>()
            .ok()
            .and_then(|number| BUILT_IN.get(number.checked_sub(1)?));
        match by_number.map_or_else(|| named(line), Ok) {
            Ok(recipe) => return Ok(recipe),
            Err(failure) => eprintln!("{failure}"),
        }
    }
}

fn names() -> String {
    let names: Vec<String> = BUILT_IN
        .iter()
        .map(|recipe| format!("`{}`", recipe.name))
        .collect();
    names.join(", ")
}

/// The first sentence of the comments below the command.
fn about(text: &str) -> String {
    let words = text
        .lines()
        .skip(1)
        .take_while(|line| line.starts_with('#'))
        .map(|line| line.trim_start_matches('#').trim())
        .collect::<Vec<_>>()
        .join(" ");
    let words = words.trim();
    match words.split_once(". ") {
        Some((first, _)) => format!("{first}."),
        None => words.to_owned(),
    }
}

/// The text with the command that runs the copy in its first line.
fn with_command(text: &str, path: &str) -> String {
    let rest = text.split_once('\n').map_or("", |(_, rest)| rest);
    format!("# calor train {path}\n{rest}")
}
