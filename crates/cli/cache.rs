//! Where prepared sequences are kept between runs.

use std::env;
use std::fs;
use std::path::PathBuf;

use crate::failure::Failure;

/// `CALOR_CACHE`, else `calor` in the user's cache folder. Sequences are patients' data: the
/// folder is made readable for its owner alone.
pub fn folder() -> Result<PathBuf, Failure> {
    let variable = |name: &str| {
        env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let folder = variable("CALOR_CACHE")
        .or_else(|| variable("XDG_CACHE_HOME").map(|cache| cache.join("calor")))
        .or_else(|| variable("HOME").map(|home| home.join(".cache").join("calor")))
        .ok_or_else(|| {
            Failure::failed("there is no folder for prepared sequences")
                .hint("set CALOR_CACHE to one")
        })?;
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(&folder).map_err(|error| {
        Failure::failed(format!(
            "cannot make the folder for prepared sequences, {}: {error}",
            folder.display()
        ))
        .hint("set CALOR_CACHE to a folder that can be written")
    })?;
    Ok(folder)
}
