//! `calor schema`: the recipe's keys, for editors.

use crate::failure::{Exit, Failure};
use crate::output;

/// Nothing to say.
#[derive(clap::Args)]
#[command(
    after_help = "Editors with a TOML language server (taplo, Even Better TOML) complete, explain and check a recipe \
                  that names the file in a comment at its top: calor schema > calor.schema.json, then \
                  `#:schema calor.schema.json`."
)]
pub struct Arguments {}

/// Prints the schema.
pub fn run(_: &Arguments) -> Result<Exit, Failure> {
    output::print_json(&calor_train::recipe::json_schema())?;
    Ok(Exit::Done)
}
