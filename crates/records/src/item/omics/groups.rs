use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{problem, read_bytes};
use crate::error::RecordsError;

/// What ends a gene's name within a feature's: `TP53_rnaseq`, `TP53|7157`, `cnv:TP53`, `rna//TP53`.
const SEPARATORS: [char; 4] = ['_', '|', ':', '/'];

/// How features are grouped; an encoder makes one token of each group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "by", rename_all = "snake_case", deny_unknown_fields)]
pub enum OmicsGroups {
    /// Named sets, which may overlap: pathways.
    Sets { sets: Vec<FeatureSet> },
    /// Features whose names begin alike, up to the first separator.
    Prefix { separator: String },
    /// So many features at a time, in their order.
    Chunks { size: NonZeroUsize },
}

/// A pathway or the like.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FeatureSet {
    pub name: String,
    /// Names of features, or of the genes that features belong to.
    pub features: Vec<String>,
}

impl OmicsGroups {
    /// Reads the pathways of a GMT file (Gene Matrix Transposed, Broad Institute): one a line,
    /// separated by tabs its name, a description and its genes. A weight behind a gene and a
    /// comma, as Enrichr writes it, is passed over.
    ///
    /// # Errors
    /// Names the line (from 1) that has no genes, and a file without any line.
    pub fn from_gmt(path: &Path) -> Result<OmicsGroups, RecordsError> {
        const HINT: &str = "write a name, a description and genes, separated by tabs, in each line";
        let text = String::from_utf8(read_bytes(path)?)
            .map_err(|_| problem(path, "it is not UTF-8", "write it again in UTF-8"))?;
        let mut sets = Vec::new();
        for (number, line) in text.trim_start_matches('\u{feff}').lines().enumerate() {
            if line.trim().is_empty() {
                continue;
            }
            let mut cells = line.split('\t').map(str::trim);
            let name = cells.next().unwrap_or_default();
            let features: Vec<String> = cells
                .skip(1)
                .map(|gene| gene.split(',').next().unwrap_or_default())
                .filter(|gene| !gene.is_empty())
                .map(str::to_string)
                .collect();
            if name.is_empty() || features.is_empty() {
                return Err(problem(
                    path,
                    format!("line {} is no pathway with genes", number + 1),
                    HINT,
                ));
            }
            sets.push(FeatureSet {
                name: name.to_string(),
                features,
            });
        }
        if sets.is_empty() {
            return Err(problem(path, "it has no pathways", HINT));
        }
        Ok(OmicsGroups::Sets { sets })
    }

    /// Groups features whose names begin alike, up to the first `separator`: with `//`,
    /// `rna//TP53` and `rna//KRAS` go together, apart from `cnv//TP53`.
    pub fn by_prefix(separator: &str) -> OmicsGroups {
        OmicsGroups::Prefix {
            separator: separator.to_string(),
        }
    }

    /// Groups so many features at a time, in their order; the last group may be smaller.
    pub fn chunks(size: NonZeroUsize) -> OmicsGroups {
        OmicsGroups::Chunks { size }
    }

    /// The positions of each group's features, ascending. No group is empty and every feature is
    /// in at least one. See [`OmicsGroups::named`].
    pub fn group(&self, features: &[String]) -> Vec<Vec<usize>> {
        self.named(features)
            .into_iter()
            .map(|(_, members)| members)
            .collect()
    }

    /// As [`OmicsGroups::group`], with the name of each group.
    ///
    /// A set has the features that are called as one of its members, or have it as a part between
    /// `_`, `|`, `:` and `/`; sets that none belongs to are left out. The features of no set follow
    /// in their order, in groups no larger than the largest set.
    pub fn named(&self, features: &[String]) -> Vec<(String, Vec<usize>)> {
        match self {
            OmicsGroups::Sets { sets } => in_sets(sets, features),
            OmicsGroups::Prefix { separator } => with_prefix(separator, features),
            OmicsGroups::Chunks { size } => {
                let all: Vec<usize> = (0..features.len()).collect();
                chunked("chunk", &all, size.get())
            }
        }
    }
}

fn in_sets(sets: &[FeatureSet], features: &[String]) -> Vec<(String, Vec<usize>)> {
    let mut sets_of: HashMap<&str, Vec<usize>> = HashMap::new();
    for (number, set) in sets.iter().enumerate() {
        for member in &set.features {
            sets_of.entry(member).or_default().push(number);
        }
    }
    let mut groups: Vec<(String, Vec<usize>)> = sets
        .iter()
        .map(|set| (set.name.clone(), Vec::new()))
        .collect();
    let mut rest = Vec::new();
    for (position, feature) in features.iter().enumerate() {
        // The whole name first: there are genes with a separator in theirs.
        let found = sets_of
            .get(feature.as_str())
            .or_else(|| feature.split(SEPARATORS).find_map(|part| sets_of.get(part)));
        for &number in found.into_iter().flatten() {
            let members = &mut groups[number].1;
            // A set may list a member twice.
            if members.last() != Some(&position) {
                members.push(position);
            }
        }
        if found.is_none() {
            rest.push(position);
        }
    }
    groups.retain(|(_, members)| !members.is_empty());
    let largest = groups.iter().map(|(_, members)| members.len()).max();
    let size = largest.unwrap_or(rest.len()).max(1);
    groups.extend(chunked("other", &rest, size));
    groups
}

fn with_prefix(separator: &str, features: &[String]) -> Vec<(String, Vec<usize>)> {
    let mut groups: Vec<(String, Vec<usize>)> = Vec::new();
    let mut numbers: HashMap<&str, usize> = HashMap::new();
    for (position, feature) in features.iter().enumerate() {
        let prefix = feature
            .split_once(separator)
            .map_or(feature.as_str(), |(prefix, _)| prefix);
        let number = *numbers.entry(prefix).or_insert_with(|| {
            groups.push((prefix.to_string(), Vec::new()));
            groups.len() - 1
        });
        groups[number].1.push(position);
    }
    groups
}

fn chunked(name: &str, positions: &[usize], size: usize) -> Vec<(String, Vec<usize>)> {
    positions
        .chunks(size)
        .enumerate()
        .map(|(number, members)| (format!("{name} {}", number + 1), members.to_vec()))
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| name.to_string()).collect()
    }

    fn gmt(content: &str) -> Result<OmicsGroups, RecordsError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pathways.gmt");
        std::fs::write(&path, content).unwrap();
        OmicsGroups::from_gmt(&path)
    }

    #[test]
    fn pathways_are_read_and_found_in_names() {
        let groups = gmt(
            "APOPTOSIS\thttps://example.org\tTP53\tBAX,1.0\tTP53\r\nEMPTY\tna\tXIST\n\n\
             CYCLE\t\tTP53\tCDK2\tA_B\t\n",
        )
        .unwrap();
        let features = names(&[
            "CDK2_rnaseq",
            "TP53_cnv",
            "KRAS_cnv",
            "BAX|581",
            "rna//TP53",
            "A_B",
            "tp53",
            "NRAS",
        ]);
        let expected = [
            ("APOPTOSIS", vec![1, 3, 4]),
            ("CYCLE", vec![0, 1, 4, 5]),
            ("other 1", vec![2, 6, 7]),
        ];
        let found = groups.named(&features);
        assert_eq!(found.len(), expected.len());
        for ((name, members), (expected_name, expected_members)) in found.iter().zip(&expected) {
            assert_eq!((name.as_str(), members), (*expected_name, expected_members));
        }
        let json = serde_json::to_string(&groups).unwrap();
        assert_eq!(serde_json::from_str::<OmicsGroups>(&json).unwrap(), groups);
        // Of features that are in no set, nothing is lost either.
        assert_eq!(groups.group(&names(&["a", "b"])), [[0, 1]]);
    }

    #[test]
    fn a_line_without_genes_is_named() {
        for content in ["A\tb\tc\nB\tc\n", "A\tb\tc\nB\n", "A\tb\tc\n\tx\ty\n"] {
            let error = gmt(content).unwrap_err().to_string();
            assert!(
                error.contains("pathways.gmt") && error.contains("line 2"),
                "{error}"
            );
        }
        assert!(gmt("\n").unwrap_err().to_string().contains("no pathways"));
    }

    #[test]
    fn prefixes_and_chunks_are_as_they_say() {
        let features = names(&["rna//A", "cnv//A", "rna//B", "age", "cnv//C//x"]);
        let groups = OmicsGroups::by_prefix("//");
        let found = groups.named(&features);
        let found: Vec<(&str, &[usize])> = found
            .iter()
            .map(|(name, members)| (name.as_str(), members.as_slice()))
            .collect();
        assert_eq!(
            found,
            [("rna", &[0, 2][..]), ("cnv", &[1, 4]), ("age", &[3])]
        );
        let chunks = OmicsGroups::chunks(NonZeroUsize::new(2).unwrap());
        assert_eq!(chunks.group(&features), [vec![0, 1], vec![2, 3], vec![4]]);
        let json = serde_json::to_string(&chunks).unwrap();
        assert_eq!(json, r#"{"by":"chunks","size":2}"#);
        assert!(serde_json::from_str::<OmicsGroups>(r#"{"by":"chunks","size":0}"#).is_err());
    }

    proptest! {
        /// Whatever the names and the sets: every feature is in a group, no group is empty, and
        /// members are ascending.
        #[test]
        fn nothing_is_lost(
            features in prop::collection::vec("[A-C]{1,2}(_[xy])?", 0..40),
            sets in prop::collection::vec(prop::collection::vec("[A-C]{1,2}", 1..6), 0..5),
            size in 1usize..9,
        ) {
            let sets = sets
                .into_iter()
                .map(|features| FeatureSet { name: "set".into(), features })
                .collect();
            for groups in [
                OmicsGroups::Sets { sets },
                OmicsGroups::by_prefix("_"),
                OmicsGroups::chunks(NonZeroUsize::new(size).unwrap()),
            ] {
                let found = groups.group(&features);
                let mut seen = vec![false; features.len()];
                for members in &found {
                    prop_assert!(!members.is_empty());
                    prop_assert!(members.windows(2).all(|pair| pair[0] < pair[1]));
                    members.iter().for_each(|&position| seen[position] = true);
                }
                prop_assert!(seen.iter().all(|seen| *seen));
            }
        }
    }
}
