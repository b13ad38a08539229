//! A patient's rows: register, note, laboratory values, and one row for each item.

use std::sync::Arc;

use crate::item::{ItemPath, Modality};
use crate::metadata::CodeEntry;
use crate::patient::{BIRTH_CODE, Event, Patient};
use crate::time::MICROSECONDS_PER_DAY;

use super::model::{Draw, Latent, SITES};
use super::options::SynthModality;
use super::random::{Draws, Stream};
use super::text;

/// Code and description of each kind of row.
const CODES: [(&str, &str); 12] = [
    ("CONTACT//VISIT", "visit to the clinic"),
    ("GENDER//F", "female"),
    ("GENDER//M", "male"),
    ("REGISTER//AGE_YEARS", "age in years"),
    ("NOTE//VISIT", "visit note"),
    ("LAB//CREATININE_UMOL_L", "creatinine"),
    ("LAB//CRP_MG_L", "C-reactive protein"),
    ("ITEM//IMAGE", "image"),
    ("ITEM//WAVEFORM", "lead II"),
    ("ITEM//OMICS", "gene expression"),
    ("ITEM//SPEECH", "voice recording"),
    (BIRTH_CODE, "birth"),
];

/// Positions in [`CODES`].
const VISIT: usize = 0;
const FEMALE: usize = 1;
const MALE: usize = 2;
const AGE: usize = 3;
const NOTE: usize = 4;
const CREATININE: usize = 5;
const CRP: usize = 6;
const FIRST_ITEM: usize = 7;
const BIRTH: usize = 11;

const DAYS_PER_YEAR: f64 = 365.25;
const AGE_YEARS: f64 = 60.0;
const AGE_BY_FACTOR_YEARS: f64 = 10.0;

const LAB_VALUES: usize = 6;
/// Days before the prediction of the oldest value, and between two.
const LAB_SPAN_DAYS: f64 = 300.0;
const LAB_STEP_DAYS: f64 = 56.0;
const CREATININE_UMOL_L: f64 = 80.0;
const CREATININE_BY_FACTOR: f64 = 12.0;
/// Standard deviation of one value; of the mean of six it is 0.03 of the factor's.
const CREATININE_NOISE: f64 = 1.0;
const CRP_MG_L: f64 = 20.0;
const CRP_BY_FACTOR: f64 = 8.0;
const CRP_NOISE: f64 = 0.4;

/// Makes rows; codes and sites are allocated once.
pub(super) struct Rows {
    seed: u64,
    codes: Vec<Arc<str>>,
    sites: Vec<Arc<str>>,
}

impl Rows {
    pub(super) fn new(seed: u64) -> Rows {
        Rows {
            seed,
            codes: CODES.iter().map(|(code, _)| Arc::from(*code)).collect(),
            sites: SITES.map(Arc::from).to_vec(),
        }
    }

    /// `metadata/codes.parquet`.
    pub(super) fn code_entries() -> Vec<(&'static str, CodeEntry)> {
        CODES
            .iter()
            .map(|(code, description)| {
                let entry = CodeEntry {
                    description: Some((*description).into()),
                    parent_codes: Vec::new(),
                };
                (*code, entry)
            })
            .collect()
    }

    /// All rows of a patient, who has these items. `site_shift` is that of creatinine, in standard
    /// deviations.
    pub(super) fn patient(&self, draw: &Draw, site_shift: f64, items: Vec<ItemPath>) -> Patient {
        let mut draws = Draws::of(self.seed, draw.subject_id, Stream::Times);
        // The first one dated the prediction.
        draws.next();
        let mut before = |low_days: f64, high_days: f64| {
            let days = draws.uniform(low_days, high_days);
            Some(draw.prediction_time_us - (days * MICROSECONDS_PER_DAY as f64) as i64)
        };
        let mut events = Vec::with_capacity(24);
        // Every patient has this one, so that those with nothing else are in the cohort, too.
        events.push(self.event(before(0.5, 5.0), VISIT, draw));
        let note_us = before(5.0, 60.0);
        let item_us: [Option<i64>; 4] = std::array::from_fn(|_| before(5.0, 90.0));

        if draw.observed.contains(SynthModality::Register) {
            self.push_register(&mut events, draw);
        }
        if draw.observed.contains(SynthModality::Notes) {
            let mut event = self.event(note_us, NOTE, draw);
            event.text_value = Some(text::note(self.seed, draw).into());
            events.push(event);
        }
        if draw.observed.contains(SynthModality::Labs) {
            self.push_labs(&mut events, draw, site_shift);
        }
        for item in items {
            let position = match item.modality {
                Modality::Image => 0,
                Modality::Waveform => 1,
                Modality::Omics => 2,
                Modality::Speech => 3,
                // Made of rows, and never given.
                Modality::Series => continue,
            };
            let mut event = self.event(item_us[position], FIRST_ITEM + position, draw);
            event.items = Some(Box::new([item]));
            events.push(event);
        }
        // Rows without time come first; `None` is less than any time.
        events.sort_by_key(|event| event.time_us);
        Patient {
            subject_id: draw.subject_id,
            events,
        }
    }

    fn push_register(&self, events: &mut Vec<Event>, draw: &Draw) {
        let sex = if draw.is_female() { FEMALE } else { MALE };
        events.push(self.event(None, sex, draw));
        let years = AGE_YEARS + AGE_BY_FACTOR_YEARS * draw.value(Latent::Age);
        let mut age = self.event(None, AGE, draw);
        age.numeric_value = Some((years * 10.0).round() as f32 / 10.0);
        events.push(age);
        let birth_us =
            draw.prediction_time_us - (years * DAYS_PER_YEAR * MICROSECONDS_PER_DAY as f64) as i64;
        events.push(self.event(Some(birth_us), BIRTH, draw));
    }

    fn push_labs(&self, events: &mut Vec<Event>, draw: &Draw, site_shift: f64) {
        let mut draws = Draws::of(self.seed, draw.subject_id, Stream::Labs);
        for value in 0..LAB_VALUES {
            let days = LAB_SPAN_DAYS - LAB_STEP_DAYS * value as f64 + draws.uniform(-5.0, 5.0);
            let time_us = draw.prediction_time_us - (days * MICROSECONDS_PER_DAY as f64) as i64;
            let mut creatinine = self.event(Some(time_us), CREATININE, draw);
            let level = draw.value(Latent::Creatinine) + site_shift;
            creatinine.numeric_value = Some(rounded(
                CREATININE_UMOL_L + CREATININE_BY_FACTOR * level + CREATININE_NOISE * draws.noise(),
            ));
            events.push(creatinine);
            // From -1 to 1 over the six values.
            let progress = 2.0 * value as f64 / (LAB_VALUES - 1) as f64 - 1.0;
            let mut crp = self.event(Some(time_us), CRP, draw);
            crp.numeric_value = Some(rounded(
                CRP_MG_L
                    + CRP_BY_FACTOR * draw.value(Latent::CrpTrend) * progress
                    + CRP_NOISE * draws.noise(),
            ));
            events.push(crp);
        }
    }

    fn event(&self, time_us: Option<i64>, code: usize, draw: &Draw) -> Event {
        Event {
            time_us,
            code: self.codes[code].clone(),
            numeric_value: None,
            text_value: None,
            site: Some(self.sites[draw.site].clone()),
            items: None,
        }
    }
}

/// To a tenth, as a laboratory reports it.
fn rounded(value: f64) -> f32 {
    ((value * 10.0).round() / 10.0) as f32
}

#[cfg(test)]
mod tests {
    use super::super::model::Model;
    use super::super::options::SynthOptions;
    use super::super::testing::correlation;
    use super::*;

    fn numbers(patient: &Patient, code: usize) -> Vec<f64> {
        let rows = patient
            .events
            .iter()
            .filter(|event| &*event.code == CODES[code].0);
        rows.map(|event| f64::from(event.numeric_value.unwrap()))
            .collect()
    }

    #[test]
    fn register_and_labs_can_be_read_back() {
        let model = Model::new(&SynthOptions {
            site_effect: 0.5,
            ..SynthOptions::default()
        });
        let rows = Rows::new(0);
        let mut found: [Vec<f64>; 3] = Default::default();
        let mut drawn: [Vec<f64>; 3] = Default::default();
        for subject_id in 0..500 {
            let draw = model.draw(subject_id);
            let shift = model.site_shift(draw.site);
            let patient = rows.patient(&draw, shift, Vec::new());
            let sex = if draw.is_female() {
                "GENDER//F"
            } else {
                "GENDER//M"
            };
            assert!(patient.events.iter().any(|event| &*event.code == sex));
            let birth_us = patient.birth_us().unwrap();
            found[0].push((draw.prediction_time_us - birth_us) as f64);
            drawn[0].push(draw.value(Latent::Age));
            found[1].push(numbers(&patient, CREATININE).iter().sum());
            drawn[1].push(draw.value(Latent::Creatinine) + shift);
            let crp = numbers(&patient, CRP);
            found[2].push(crp[3..].iter().sum::<f64>() - crp[..3].iter().sum::<f64>());
            drawn[2].push(draw.value(Latent::CrpTrend));
        }
        for (found, drawn) in found.iter().zip(&drawn) {
            assert!(correlation(found, drawn) > 0.995);
        }
    }

    #[test]
    fn rows_are_sorted_and_none_is_later_than_the_prediction() {
        let model = Model::new(&SynthOptions::default());
        let rows = Rows::new(0);
        for subject_id in 0..50 {
            let draw = model.draw(subject_id);
            let item = ItemPath {
                modality: Modality::Omics,
                path: "a.csv".into(),
            };
            let patient = rows.patient(&draw, 0.0, vec![item]);
            assert!(patient.events.is_sorted_by_key(|event| event.time_us));
            assert_eq!(
                patient.events_until(draw.prediction_time_us).len(),
                patient.events.len()
            );
            assert_eq!(patient.events.len(), 1 + 3 + 1 + 12 + 1);
            let of_item = patient
                .events
                .iter()
                .find(|event| event.items.is_some())
                .unwrap();
            assert_eq!(&*of_item.code, "ITEM//OMICS");
        }
    }

    #[test]
    fn a_patient_of_whom_all_is_missing_has_the_visit() {
        let options = SynthOptions {
            missing: SynthModality::ALL.map(|modality| (modality, 1.0)).into(),
            ..SynthOptions::default()
        };
        options.check().unwrap();
        let draw = Model::new(&options).draw(1);
        let patient = Rows::new(0).patient(&draw, 0.0, Vec::new());
        assert_eq!(patient.events.len(), 1);
        assert_eq!(&*patient.events[0].code, "CONTACT//VISIT");
    }
}
