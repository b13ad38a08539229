use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::{DAYS_PER_YEAR, Missingness};
use crate::cohort::{Chunk, Cohort};
use crate::error::RecordsError;
use crate::item::Modality;
use crate::patient::{BIRTH_CODE, Patient};
use crate::time::MICROSECONDS_PER_DAY;

/// Counts of one code, site or modality.
#[derive(Clone, Copy, Default)]
pub(super) struct Counts {
    pub(super) events: u64,
    pub(super) patients: u64,
    pub(super) with_number: u64,
    pub(super) with_text: u64,
    /// Number of the patient (within the chunk, from 1) counted last.
    pub(super) last_patient: u64,
}

impl Counts {
    fn add(&mut self, patient: u64) {
        self.events += 1;
        if self.last_patient != patient {
            self.last_patient = patient;
            self.patients += 1;
        }
    }

    pub(super) fn merge(&mut self, other: &Counts) {
        self.events += other.events;
        self.patients += other.patients;
        self.with_number += other.with_number;
        self.with_text += other.with_text;
    }
}

#[derive(Default)]
pub(super) struct Tally {
    pub(super) codes: HashMap<Arc<str>, Counts>,
    pub(super) sites: HashMap<Option<Arc<str>>, Counts>,
    /// Items of each modality.
    pub(super) items: BTreeMap<Modality, Counts>,
    pub(super) events_per_patient: Vec<u32>,
    pub(super) span_years: Vec<f64>,
    pub(super) first_time: Option<i64>,
    pub(super) last_time: Option<i64>,
    pub(super) missingness: Missingness,
}

impl Tally {
    pub(super) fn merge(mut self, other: Tally) -> Tally {
        if self.events_per_patient.len() < other.events_per_patient.len() {
            return other.merge(self);
        }
        for (code, counts) in other.codes {
            self.codes.entry(code).or_default().merge(&counts);
        }
        for (site, counts) in other.sites {
            self.sites.entry(site).or_default().merge(&counts);
        }
        for (modality, counts) in other.items {
            self.items.entry(modality).or_default().merge(&counts);
        }
        self.events_per_patient.extend(other.events_per_patient);
        self.span_years.extend(other.span_years);
        self.first_time = [self.first_time, other.first_time]
            .into_iter()
            .flatten()
            .min();
        self.last_time = self.last_time.max(other.last_time);
        let (mine, theirs) = (&mut self.missingness, other.missingness);
        mine.events_without_time += theirs.events_without_time;
        mine.events_without_number += theirs.events_without_number;
        mine.events_without_text += theirs.events_without_text;
        mine.events_without_number_and_text += theirs.events_without_number_and_text;
        mine.events_without_site += theirs.events_without_site;
        mine.patients_without_birth += theirs.patients_without_birth;
        mine.patients_without_timed_events += theirs.patients_without_timed_events;
        self
    }

    fn count(&mut self, patient: &Patient, number: u64, counts: &mut CountsByPointer) {
        let mut first = None;
        let mut last = None;
        let mut has_birth = false;
        let missing = &mut self.missingness;
        for event in &patient.events {
            match event.time_us {
                None => missing.events_without_time += 1,
                Some(_) if &*event.code == BIRTH_CODE => has_birth = true,
                Some(time) => {
                    first = first.or(Some(time));
                    last = Some(time);
                }
            }
            let (number_missing, text_missing) =
                (event.numeric_value.is_none(), event.text_value.is_none());
            missing.events_without_number += u64::from(number_missing);
            missing.events_without_text += u64::from(text_missing);
            missing.events_without_number_and_text += u64::from(number_missing && text_missing);
            missing.events_without_site += u64::from(event.site.is_none());
            let code = counts.code(&event.code);
            code.add(number);
            code.with_number += u64::from(!number_missing);
            code.with_text += u64::from(!text_missing);
            counts.site(event.site.as_ref()).add(number);
            for item in event.items.as_deref().unwrap_or_default() {
                self.items.entry(item.modality).or_default().add(number);
            }
        }
        missing.patients_without_birth += u64::from(!has_birth);
        missing.patients_without_timed_events += u64::from(first.is_none() && !has_birth);
        self.events_per_patient
            .push(u32::try_from(patient.events.len()).unwrap_or(u32::MAX));
        if let (Some(first), Some(last)) = (first, last) {
            let days = last.abs_diff(first) as f64 / MICROSECONDS_PER_DAY as f64;
            self.span_years.push(days / DAYS_PER_YEAR);
            self.first_time = Some(self.first_time.map_or(first, |time| time.min(first)));
            self.last_time = self.last_time.max(Some(last));
        }
    }
}

/// Counts under the address of the shared string: a reader hands out one allocation for each
/// distinct string, which is held here and so keeps its address.
#[derive(Default)]
struct CountsByPointer {
    codes: HashMap<usize, (Arc<str>, Counts)>,
    sites: HashMap<usize, (Option<Arc<str>>, Counts)>,
}

impl CountsByPointer {
    fn code(&mut self, code: &Arc<str>) -> &mut Counts {
        let address = code.as_ptr() as usize;
        let (_, counts) = self
            .codes
            .entry(address)
            .or_insert_with(|| (code.clone(), Counts::default()));
        counts
    }

    fn site(&mut self, site: Option<&Arc<str>>) -> &mut Counts {
        let address = site.map_or(0, |site| site.as_ptr() as usize);
        let (_, counts) = self
            .sites
            .entry(address)
            .or_insert_with(|| (site.cloned(), Counts::default()));
        counts
    }
}

pub(super) fn count_chunk(cohort: &Cohort, chunk: &Chunk) -> Result<Tally, RecordsError> {
    let mut tally = Tally::default();
    let mut counts = CountsByPointer::default();
    for (position, patient) in cohort.read_chunk(chunk, &|_| true)?.enumerate() {
        tally.count(&patient?, position as u64 + 1, &mut counts);
    }
    for (code, counted) in counts.codes.into_values() {
        tally.codes.entry(code).or_default().merge(&counted);
    }
    for (site, counted) in counts.sites.into_values() {
        tally.sites.entry(site).or_default().merge(&counted);
    }
    Ok(tally)
}
