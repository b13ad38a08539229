use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::RecordsError;
use crate::item::Modality;

/// What a synthetic patient is known by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SynthModality {
    /// Age and sex: birth and static rows.
    Register,
    /// A visit note, `text_value`.
    Notes,
    /// Two analytes at six times, `numeric_value`.
    Labs,
    /// A grey PNG, `image_path`.
    Image,
    /// A WFDB record of one lead, `waveform_path`.
    Waveform,
    /// A CSV vector of gene expression, `omics_path`.
    Omics,
    /// A PCM wav, `audio_path`.
    Speech,
}

impl SynthModality {
    pub const ALL: [SynthModality; 7] = [
        SynthModality::Register,
        SynthModality::Notes,
        SynthModality::Labs,
        SynthModality::Image,
        SynthModality::Waveform,
        SynthModality::Omics,
        SynthModality::Speech,
    ];

    pub fn name(self) -> &'static str {
        match self {
            SynthModality::Register => "register",
            SynthModality::Notes => "notes",
            SynthModality::Labs => "labs",
            SynthModality::Image => "image",
            SynthModality::Waveform => "waveform",
            SynthModality::Omics => "omics",
            SynthModality::Speech => "speech",
        }
    }

    pub fn from_name(name: &str) -> Option<SynthModality> {
        SynthModality::ALL
            .into_iter()
            .find(|modality| modality.name() == name)
    }

    /// What kind of item it is written as; `None` for rows without a file.
    pub fn item(self) -> Option<Modality> {
        match self {
            SynthModality::Image => Some(Modality::Image),
            SynthModality::Waveform => Some(Modality::Waveform),
            SynthModality::Omics => Some(Modality::Omics),
            SynthModality::Speech => Some(Modality::Speech),
            SynthModality::Register | SynthModality::Notes | SynthModality::Labs => None,
        }
    }
}

impl fmt::Display for SynthModality {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(self.name())
    }
}

/// A synthetic cohort. The same options give the same bytes; with other `patients`, the patients
/// that both cohorts have are the same.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SynthOptions {
    pub patients: u64,
    pub seed: u64,
    /// Those that are made; the others' parts of the risk are left out of it.
    pub modalities: Vec<SynthModality>,
    /// Share of patients without a modality.
    pub missing: BTreeMap<SynthModality, f64>,
    /// How much that share depends on the site, 0 to 1: at 1 the first site misses nothing and the
    /// last one twice the share.
    pub missing_by_site: f64,
    /// Shift of the log-odds, and of creatinine in standard deviations, that the sites differ by
    /// (as a standard deviation over sites).
    pub site_effect: f64,
    /// Share of women's outcomes that are not recorded.
    pub group_bias: f64,
    /// Share of labels turned around, whoever's.
    pub label_noise: f64,
    /// Share of patients with the outcome, before bias and noise.
    pub prevalence: f64,
    /// Log-odds that image and omics carry only together: what they add where both the image's side
    /// and the omics' switch are 1.
    pub interaction: f64,
}

impl Default for SynthOptions {
    fn default() -> Self {
        SynthOptions {
            patients: 4_000,
            seed: 0,
            modalities: SynthModality::ALL.to_vec(),
            missing: BTreeMap::new(),
            missing_by_site: 0.0,
            site_effect: 0.0,
            group_bias: 0.0,
            label_noise: 0.0,
            prevalence: 0.3,
            interaction: 1.6,
        }
    }
}

impl SynthOptions {
    /// # Errors
    /// The option that cannot be, and what it may be.
    pub fn check(&self) -> Result<(), RecordsError> {
        let fail = |option: &'static str, problem: String| {
            Err(RecordsError::SynthOption { option, problem })
        };
        if self.patients == 0 || self.patients > u64::from(u32::MAX) {
            return fail("patients", format!("must be between 1 and {}", u32::MAX));
        }
        if self.modalities.is_empty() {
            return fail("modalities", "must name at least one".to_string());
        }
        for (position, modality) in self.modalities.iter().enumerate() {
            if self.modalities[..position].contains(modality) {
                return fail("modalities", format!("names {modality} twice"));
            }
        }
        for (option, value, low, high) in [
            ("missing_by_site", self.missing_by_site, 0.0, 1.0),
            ("site_effect", self.site_effect, 0.0, 3.0),
            ("group_bias", self.group_bias, 0.0, 0.95),
            ("label_noise", self.label_noise, 0.0, 0.45),
            ("prevalence", self.prevalence, 0.001, 0.999),
            ("interaction", self.interaction, 0.0, 3.0),
        ] {
            if !(low..=high).contains(&value) {
                return fail(option, format!("must be between {low} and {high}"));
            }
        }
        for (modality, &share) in &self.missing {
            if !self.modalities.contains(modality) {
                return fail(
                    "missing",
                    format!("names {modality}, which is not among the modalities"),
                );
            }
            let most = 1.0 / (1.0 + self.missing_by_site);
            if !(0.0..=most).contains(&share) {
                return fail(
                    "missing",
                    format!(
                        "of {modality} must be between 0 and {most:.3}, so that no site misses \
                         more than all"
                    ),
                );
            }
        }
        if self.group_bias > 0.0 && !self.modalities.contains(&SynthModality::Register) {
            return fail(
                "group_bias",
                "needs the modality register, where the sex is".to_string(),
            );
        }
        Ok(())
    }

    /// Share of patients without a modality.
    pub fn missing_share(&self, modality: SynthModality) -> f64 {
        self.missing.get(&modality).copied().unwrap_or(0.0)
    }
}

/// A set of modalities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Modalities(u8);

impl Modalities {
    /// Number of sets there are.
    pub(super) const SETS: usize = 1 << SynthModality::ALL.len();
    pub(super) const NONE: Modalities = Modalities(0);

    pub(super) fn of(modalities: &[SynthModality]) -> Modalities {
        modalities
            .iter()
            .fold(Modalities::NONE, |set, &modality| set.with(modality))
    }

    /// Every set within this one, the empty set and this one included.
    pub(super) fn subsets(self) -> impl Iterator<Item = Modalities> {
        (0..Self::SETS as u8)
            .filter(move |bits| bits & !self.0 == 0)
            .map(Modalities)
    }

    pub(super) fn iter(self) -> impl Iterator<Item = SynthModality> {
        SynthModality::ALL
            .into_iter()
            .filter(move |&modality| self.contains(modality))
    }

    pub(super) fn contains(self, modality: SynthModality) -> bool {
        self.0 & (1 << modality as u8) != 0
    }

    pub(super) fn with(self, modality: SynthModality) -> Modalities {
        Modalities(self.0 | 1 << modality as u8)
    }

    pub(super) fn without(self, other: Modalities) -> Modalities {
        Modalities(self.0 & !other.0)
    }

    pub(super) fn and(self, other: Modalities) -> Modalities {
        Modalities(self.0 & other.0)
    }

    pub(super) fn or(self, other: Modalities) -> Modalities {
        Modalities(self.0 | other.0)
    }

    pub(super) fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// Its number among all sets.
    pub(super) fn index(self) -> usize {
        usize::from(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_is_named() {
        let wrong = |change: fn(&mut SynthOptions)| {
            let mut options = SynthOptions::default();
            change(&mut options);
            options.check().unwrap_err().to_string()
        };
        assert!(SynthOptions::default().check().is_ok());
        assert!(wrong(|options| options.patients = 0).contains("patients"));
        assert!(wrong(|options| options.modalities.clear()).contains("modalities"));
        assert!(
            wrong(|options| options.modalities.push(SynthModality::Image)).contains("image twice")
        );
        assert!(wrong(|options| options.prevalence = 0.0).contains("prevalence"));
        assert!(wrong(|options| options.label_noise = f64::NAN).contains("label_noise"));
        assert!(
            wrong(|options| {
                options.missing.insert(SynthModality::Image, 0.6);
                options.missing_by_site = 1.0;
            })
            .contains("between 0 and 0.5")
        );
        assert!(
            wrong(|options| {
                options.modalities = vec![SynthModality::Image];
                options.group_bias = 0.1;
            })
            .contains("register")
        );
        assert!(
            wrong(|options| {
                options.modalities = vec![SynthModality::Image];
                options.missing.insert(SynthModality::Speech, 0.1);
            })
            .contains("speech")
        );
    }

    #[test]
    fn options_are_read_from_json_with_names() {
        let json = r#"{"patients": 10, "missing": {"image": 0.25}, "modalities": ["image"]}"#;
        let options: SynthOptions = serde_json::from_str(json).unwrap();
        assert_eq!(options.missing_share(SynthModality::Image), 0.25);
        assert_eq!(options.missing_share(SynthModality::Labs), 0.0);
        assert_eq!(options.prevalence, SynthOptions::default().prevalence);
        assert!(serde_json::from_str::<SynthOptions>(r#"{"patient": 10}"#).is_err());
    }

    #[test]
    fn sets_have_their_subsets() {
        let set = Modalities::of(&[SynthModality::Image, SynthModality::Speech]);
        assert_eq!(set.subsets().count(), 4);
        assert_eq!(set.len(), 2);
        assert!(
            set.subsets()
                .all(|subset| subset.without(set) == Modalities::NONE)
        );
        assert_eq!(
            set.iter().collect::<Vec<_>>(),
            [SynthModality::Image, SynthModality::Speech]
        );
    }
}
