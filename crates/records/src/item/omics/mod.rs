//! Omics: a vector a patient, its features known by name.
//!
//! Read from NumPy (`.npy`), text (`.csv`, `.tsv`, `.txt`) and Parquet. What the features are
//! grouped into is in [`OmicsGroups`].

mod columns;
mod groups;
mod npy;
mod text;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Decoded;
use crate::error::RecordsError;

pub use groups::{FeatureSet, OmicsGroups};

/// No patient's vector comes near this; a larger file is something else.
const LARGEST_BYTES: u64 = 512 << 20;

/// How a file of omics is read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OmicsOptions {
    /// The features wanted, by name and in this order. One that a file lacks is missing there, one
    /// that is not named here is passed over. Without it, all features in the file's own order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub features: Option<Vec<String>>,
}

/// A vector, and how its features met those asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct OmicsVector {
    /// `[features]`; NaN where missing.
    pub values: Vec<f32>,
    /// Features asked for that the file does not have; their values are missing.
    pub absent: usize,
    /// Features of the file that were not asked for.
    pub ignored: usize,
    /// Hash of the features' names in their order; never 0.
    pub layout: u64,
}

/// Decodes a file to `[features]`, in the order of `options.features` or, without them, of the
/// file. NaN stands for a missing value. See [`read_omics`] for what is read.
///
/// # Errors
/// As [`read_omics`].
pub fn decode_omics(path: &Path, options: &OmicsOptions) -> Result<Decoded, RecordsError> {
    let vector = read_omics(path, options)?;
    Ok(Decoded {
        shape: vec![vector.values.len()],
        values: vector.values,
        cut_s: 0.0,
        layout: vector.layout,
    })
}

/// Reads a file, by the ending of its name:
/// - `.npy`: one dimension of numbers. Names are in a file beside it ([`omics_names_file`]), one a
///   line; without one the features are called `0`, `1`, …
/// - `.csv`, `.tsv`, `.txt` (separated by commas, tabs or semicolons): a header of names and one
///   row of values, a first column without a name being passed over; or a row a feature, with two
///   columns, or with any if two are called `feature` and `value`.
/// - `.parquet`: one row; or a row a feature, as above.
///
/// Missing is: NaN, null, an empty cell, and the words pandas takes for it (`NA`, `null`, …).
///
/// # Errors
/// Names the file, and the row (from 0, the header aside) or the column of what is not a finite
/// number; a shape that is not one vector; features named twice; a vector without a value.
pub fn read_omics(path: &Path, options: &OmicsOptions) -> Result<OmicsVector, RecordsError> {
    let mut gather = Gather::new(path, options.features.as_deref())?;
    read(path, &mut gather)?;
    gather.finish()
}

/// The names of a file's features, in its order.
///
/// # Errors
/// As [`read_omics`] with default options.
pub fn omics_features(path: &Path) -> Result<Vec<String>, RecordsError> {
    let mut gather = Gather::new(path, None)?;
    read(path, &mut gather)?;
    let names = std::mem::take(&mut gather.names);
    check_unique(path, &names)?;
    gather.finish()?;
    Ok(names)
}

/// The file with the names of an `.npy` file's features, where there is one: for `a/b.npy`,
/// `a/b.features.txt`, otherwise `a/features.txt`. It decides what is decoded as much as the
/// file itself.
pub fn omics_names_file(path: &Path) -> Option<PathBuf> {
    if ending(path) != "npy" {
        return None;
    }
    [
        path.with_extension("features.txt"),
        path.with_file_name("features.txt"),
    ]
    .into_iter()
    .find(|names| names.is_file())
}

fn read(path: &Path, gather: &mut Gather<'_>) -> Result<(), RecordsError> {
    let bytes = std::fs::metadata(path)
        .map_err(|source| RecordsError::io(path, source))?
        .len();
    if bytes > LARGEST_BYTES {
        return Err(problem(
            path,
            format!(
                "{} MiB are more than any vector of features needs",
                bytes >> 20
            ),
            "give each patient a file of their own",
        ));
    }
    match ending(path).as_str() {
        "npy" => npy::read(path, gather),
        "csv" | "tsv" | "txt" => text::read(path, gather),
        "parquet" => columns::read(path, gather),
        _ => Err(problem(
            path,
            "a vector of features is not read from files of this name",
            "write it as .npy, .csv, .tsv or .parquet",
        )),
    }
}

fn ending(path: &Path) -> String {
    path.extension()
        .map(|ending| ending.to_string_lossy().to_lowercase())
        .unwrap_or_default()
}

fn read_bytes(path: &Path) -> Result<Vec<u8>, RecordsError> {
    std::fs::read(path).map_err(|source| RecordsError::io(path, source))
}

fn problem(path: &Path, problem: impl Into<String>, hint: &'static str) -> RecordsError {
    RecordsError::Item {
        path: path.to_path_buf(),
        problem: problem.into(),
        hint,
    }
}

/// The two columns, of names and of values, of a table that has a row a feature.
fn long_columns<'n>(names: impl Iterator<Item = &'n str>) -> Option<(usize, usize)> {
    let (mut name, mut value) = (None, None);
    for (position, column) in names.enumerate() {
        if column.eq_ignore_ascii_case("feature") {
            name = name.or(Some(position));
        } else if column.eq_ignore_ascii_case("value") {
            value = value.or(Some(position));
        }
    }
    name.zip(value)
}

/// Puts the values of one file in their places, as they come.
struct Gather<'a> {
    path: &'a Path,
    /// The place of each feature asked for; `None` when the file's order is kept.
    places: Option<HashMap<&'a str, usize>>,
    /// Whether the file has the feature of each place.
    found: Vec<bool>,
    values: Vec<f32>,
    /// The file's names, when its order is kept.
    names: Vec<String>,
    ignored: usize,
    /// Of the features asked for; otherwise made of `names` in the end.
    layout: Option<u64>,
}

impl<'a> Gather<'a> {
    fn new(path: &'a Path, wanted: Option<&'a [String]>) -> Result<Gather<'a>, RecordsError> {
        let count = wanted.map_or(0, <[String]>::len);
        let places: Option<HashMap<&str, usize>> = wanted.map(|names| {
            let numbered = names.iter().enumerate();
            numbered
                .map(|(place, name)| (name.as_str(), place))
                .collect()
        });
        if places.as_ref().is_some_and(|places| places.len() < count) {
            return Err(problem(
                path,
                "the list of features asked for has a name twice",
                "list each of `features` once",
            ));
        }
        Ok(Gather {
            path,
            places,
            found: vec![false; count],
            values: vec![f32::NAN; count],
            names: Vec::new(),
            ignored: 0,
            layout: wanted.map(layout),
        })
    }

    /// Whether exactly these features, in this order, are asked for.
    fn wants_exactly(&self, names: &[String]) -> bool {
        match &self.places {
            None => true,
            Some(places) => {
                places.len() == names.len()
                    && names
                        .iter()
                        .enumerate()
                        .all(|(place, name)| places.get(name.as_str()) == Some(&place))
            }
        }
    }

    /// The place of the file's next feature; `None` for one that was not asked for.
    fn place(&mut self, name: &str) -> Result<Option<usize>, RecordsError> {
        let Some(places) = &self.places else {
            self.names.push(name.to_string());
            self.values.push(f32::NAN);
            return Ok(Some(self.values.len() - 1));
        };
        match places.get(name) {
            None => {
                self.ignored += 1;
                Ok(None)
            }
            Some(&place) if self.found[place] => Err(named_twice(self.path)),
            Some(&place) => {
                self.found[place] = true;
                Ok(Some(place))
            }
        }
    }

    /// Sets the value of a place; says what is wrong with it.
    fn set(&mut self, place: usize, value: f32) -> Result<(), &'static str> {
        if value.is_infinite() {
            return Err("is infinite in 32 bits");
        }
        self.values[place] = value;
        Ok(())
    }

    fn finish(self) -> Result<OmicsVector, RecordsError> {
        check_unique(self.path, &self.names)?;
        if self.values.is_empty() {
            return Err(problem(
                self.path,
                "there are no features in it",
                "write at least one",
            ));
        }
        let absent = self.found.iter().filter(|found| !**found).count();
        if absent == self.values.len() {
            return Err(problem(
                self.path,
                format!("it has none of the {absent} features asked for"),
                "compare the names in `features` with those of the file",
            ));
        }
        if self.values.iter().all(|value| value.is_nan()) {
            return Err(problem(
                self.path,
                format!("all of its {} values are missing", self.values.len()),
                "leave the path of this row empty, so that the item counts as missing",
            ));
        }
        Ok(OmicsVector {
            layout: self.layout.unwrap_or_else(|| layout(&self.names)),
            values: self.values,
            absent,
            ignored: self.ignored,
        })
    }
}

/// FNV-1a over the names and their lengths: whether two files name the same features alike.
fn layout(names: &[String]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for name in names {
        let length = (name.len() as u64).to_le_bytes();
        for byte in length.iter().chain(name.as_bytes()) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    hash.max(1)
}

fn check_unique(path: &Path, names: &[String]) -> Result<(), RecordsError> {
    let mut seen = HashSet::with_capacity(names.len());
    if names.iter().all(|name| seen.insert(name.as_str())) {
        Ok(())
    } else {
        Err(named_twice(path))
    }
}

fn named_twice(path: &Path) -> RecordsError {
    problem(
        path,
        "two of its features have the same name",
        "name each feature once",
    )
}

/// An error about a value: in which row (from 0, the header aside), in which column.
fn bad_value(path: &Path, row: usize, column: &str, what: &str) -> RecordsError {
    problem(
        path,
        format!("row {row}, column {column} {what}"),
        "write a finite number, or nothing where it is missing",
    )
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use super::*;

    fn wanting(names: &[&str]) -> OmicsOptions {
        OmicsOptions {
            features: Some(names.iter().map(|name| name.to_string()).collect()),
        }
    }

    #[test]
    fn features_are_found_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.csv");
        std::fs::write(&path, "TP53,BRCA1,KRAS,MYC\n1,2,,4\n").unwrap();
        let all = decode_omics(&path, &OmicsOptions::default()).unwrap();
        assert_eq!((all.shape, all.cut_s), (vec![4], 0.0));
        assert_eq!((all.values[0], all.values[3]), (1.0, 4.0));

        let options = wanting(&["MYC", "EGFR", "KRAS", "TP53"]);
        let found = read_omics(&path, &options).unwrap();
        assert_eq!((found.values[0], found.values[3]), (4.0, 1.0));
        assert!(found.values[1].is_nan() && found.values[2].is_nan());
        assert_eq!((found.absent, found.ignored), (1, 1));
        assert_eq!(decode_omics(&path, &options).unwrap().shape, [4]);

        let error = read_omics(&path, &wanting(&["EGFR", "NRAS"]))
            .unwrap_err()
            .to_string();
        assert!(error.contains("none of the 2 features"), "{error}");
        let error = read_omics(&path, &wanting(&["KRAS"]))
            .unwrap_err()
            .to_string();
        assert!(error.contains("all of its 1 values are missing"), "{error}");
        let error = read_omics(&path, &wanting(&["MYC", "MYC"]))
            .unwrap_err()
            .to_string();
        assert!(error.contains("a name twice"), "{error}");
        let error = read_omics(&path, &wanting(&[])).unwrap_err().to_string();
        assert!(error.contains("no features"), "{error}");
    }

    #[test]
    fn a_file_that_is_not_there_or_of_another_kind_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.csv");
        let error = omics_features(&path).unwrap_err();
        let RecordsError::Io { source, .. } = &error else {
            panic!("{error}");
        };
        assert_eq!(source.kind(), std::io::ErrorKind::NotFound);
        for name in ["a.h5ad", "a"] {
            let path = folder.path().join(name);
            std::fs::write(&path, "x").unwrap();
            let error = omics_features(&path).unwrap_err().to_string();
            assert!(
                error.contains("not read from files of this name"),
                "{error}"
            );
        }
    }

    #[test]
    fn options_are_read_strictly() {
        assert_eq!(
            serde_json::from_str::<OmicsOptions>("{}").unwrap(),
            OmicsOptions::default()
        );
        let options = wanting(&["a"]);
        let json = serde_json::to_string(&options).unwrap();
        assert_eq!(json, r#"{"features":["a"]}"#);
        assert_eq!(
            serde_json::from_str::<OmicsOptions>(&json).unwrap(),
            options
        );
        assert!(serde_json::from_str::<OmicsOptions>(r#"{"feature":["a"]}"#).is_err());
    }

    /// As many features as there are genes, in all the forms they come in.
    #[test]
    fn every_format_gives_the_same_transcriptome() {
        const FEATURES: usize = 20_000;
        let folder = tempfile::tempdir().unwrap();
        let names: Vec<String> = (0..FEATURES).map(|at| format!("ENSG{at:011}")).collect();
        let expected: Vec<f32> = (0..FEATURES)
            .map(|at| (at as f32 * 0.618_034).fract() * 12.0 - 3.0)
            .collect();

        let mut wide = format!("{}\n", names.join(","));
        let mut long = "gene\ttpm\n".to_string();
        for (name, value) in names.iter().zip(&expected) {
            let _ = write!(wide, "{value},");
            let _ = writeln!(long, "{name}\t{value}");
        }
        wide.pop();
        std::fs::write(folder.path().join("wide.csv"), wide).unwrap();
        std::fs::write(folder.path().join("long.tsv"), long).unwrap();

        let header =
            format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({FEATURES},), }}\n");
        let mut npy = b"\x93NUMPY\x01\x00".to_vec();
        npy.extend((header.len() as u16).to_le_bytes());
        npy.extend(header.as_bytes());
        npy.extend(expected.iter().flat_map(|value| value.to_le_bytes()));
        std::fs::write(folder.path().join("a.npy"), npy).unwrap();
        std::fs::write(folder.path().join("features.txt"), names.join("\n")).unwrap();

        columns::testing::write(
            &folder.path().join("wide.parquet"),
            names
                .iter()
                .zip(&expected)
                .map(|(name, value)| (name.as_str(), columns::testing::floats(&[*value])))
                .collect(),
        );
        let texts: Vec<&str> = names.iter().map(String::as_str).collect();
        columns::testing::write(
            &folder.path().join("long.parquet"),
            vec![
                ("feature", columns::testing::texts(&texts)),
                ("value", columns::testing::floats(&expected)),
            ],
        );

        let mut reversed = names.clone();
        reversed.reverse();
        let options = OmicsOptions {
            features: Some(reversed),
        };
        let mut backwards = expected.clone();
        backwards.reverse();
        for name in [
            "wide.csv",
            "long.tsv",
            "a.npy",
            "wide.parquet",
            "long.parquet",
        ] {
            let path = folder.path().join(name);
            let start = std::time::Instant::now();
            let found = decode_omics(&path, &options).unwrap();
            eprintln!("{name}: {:?}", start.elapsed());
            assert_eq!(found.values, backwards, "{name}");
            assert_eq!(omics_features(&path).unwrap(), names, "{name}");
            let found = decode_omics(&path, &OmicsOptions::default()).unwrap();
            assert_eq!(found.values, expected, "{name}");
        }
    }
}
