//! Modality items: the files that rows of a cohort point to, decoded to plain numbers.
//!
//! One file a kind of source. Decoding is a pure function of the file's bytes and the options, so
//! that what it gives can be cached under a hash of both.

mod dicom;
mod image;
mod log_mel;
mod nifti;
mod omics;
mod resample;
mod speech;
mod waveform;
mod wfdb;

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use image::{
    ImageFilter, ImageOptions, ImagePlane, ImagePosition, ImageResize, ImageWindow, decode_image,
};
pub use omics::{
    FeatureSet, OmicsGroups, OmicsOptions, OmicsVector, decode_omics, omics_features,
    omics_names_file, read_omics,
};
pub use speech::{SpeechOptions, decode_speech};
pub use waveform::{WaveformOptions, decode_waveform};

/// What an item is, and with it which column of MEDS points to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Modality {
    /// A picture, `image_path`.
    Image,
    /// A dense signal, `waveform_path`.
    Waveform,
    /// Numeric rows of the record itself, as an irregular time series: no file.
    Series,
    /// A vector a patient, `omics_path`.
    Omics,
    /// A recording of speech, `audio_path`.
    Speech,
}

impl Modality {
    pub const ALL: [Modality; 5] = [
        Modality::Image,
        Modality::Waveform,
        Modality::Series,
        Modality::Omics,
        Modality::Speech,
    ];

    /// The name in recipes and reports.
    pub fn name(self) -> &'static str {
        match self {
            Modality::Image => "image",
            Modality::Waveform => "waveform",
            Modality::Series => "series",
            Modality::Omics => "omics",
            Modality::Speech => "speech",
        }
    }

    /// The column of MEDS whose paths point to such items.
    pub fn column(self) -> Option<&'static str> {
        match self {
            Modality::Image => Some("image_path"),
            Modality::Waveform => Some("waveform_path"),
            Modality::Series => None,
            Modality::Omics => Some("omics_path"),
            Modality::Speech => Some("audio_path"),
        }
    }
}

/// A file that a row of a cohort points to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ItemPath {
    pub modality: Modality,
    /// Relative to the cohort's folder, as the row has it, and never outside of it.
    pub path: Arc<str>,
}

impl ItemPath {
    /// Where the file is, given the cohort's folder.
    pub fn resolve(&self, cohort: &Path) -> PathBuf {
        cohort.join(&*self.path)
    }
}

/// The modalities that have files, with the columns that hold their paths.
pub(crate) fn path_columns() -> impl Iterator<Item = (Modality, &'static str)> {
    Modality::ALL
        .into_iter()
        .filter_map(|modality| modality.column().map(|column| (modality, column)))
}

/// What is wrong with the text of a path, before any file is looked for. Read as it is written:
/// `a/../b` stays inside whatever `a` may link to.
pub(crate) fn path_problem(path: &str) -> Option<&'static str> {
    let mut depth = 0_usize;
    for component in Path::new(path).components() {
        match component {
            Component::Prefix(_) | Component::RootDir => {
                return Some("is an absolute path; write it relative to the cohort's folder");
            }
            Component::ParentDir => match depth.checked_sub(1) {
                Some(above) => depth = above,
                None => {
                    return Some(
                        "leads out of the cohort's folder; put the file inside, or a link to it",
                    );
                }
            },
            Component::Normal(_) => depth += 1,
            Component::CurDir => {}
        }
    }
    None
}

/// A decoded item.
#[derive(Clone, Debug, PartialEq)]
pub struct Decoded {
    /// Image `[channels, height, width]`, waveform `[leads, samples]`, omics `[features]`,
    /// speech `[mel_bins, frames]`.
    pub shape: Vec<usize>,
    /// Row-major. NaN where a value is missing (waveform, omics); never elsewhere.
    pub values: Vec<f32>,
    /// Seconds that a length limit cut off; 0 where nothing was.
    pub cut_s: f64,
    /// Hash of the channels' names in their order (omics); 0 where they have none.
    pub layout: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_stays_inside_the_cohort() {
        for inside in [
            "a.png",
            "a/b.png",
            "./a.png",
            "a/../b.png",
            "a/b/../../c",
            "..a/b..",
            "å/傷.wav",
        ] {
            assert_eq!(path_problem(inside), None, "{inside}");
        }
        for outside in [
            "../a.png",
            "..",
            "a/../../b.png",
            "./../a",
            "a/b/../../../c",
        ] {
            assert!(
                path_problem(outside).is_some_and(|problem| problem.contains("out of")),
                "{outside}"
            );
        }
        for absolute in ["/a.png", "//a", "/"] {
            assert!(
                path_problem(absolute).is_some_and(|problem| problem.contains("absolute")),
                "{absolute}"
            );
        }
    }

    #[test]
    fn every_modality_with_files_has_a_column_of_its_own() {
        let columns: Vec<&str> = path_columns().map(|(_, column)| column).collect();
        assert_eq!(
            columns,
            ["image_path", "waveform_path", "omics_path", "audio_path"]
        );
    }

    #[test]
    fn a_path_is_found_under_its_cohort() {
        let item = ItemPath {
            modality: Modality::Image,
            path: "images/1.png".into(),
        };
        assert_eq!(
            item.resolve(Path::new("cohorts/a")),
            Path::new("cohorts/a/images/1.png")
        );
    }
}
