use std::collections::BTreeMap;

use super::{Distribution, SurvivalSplitSummary, SurvivalSummary, TaskSplitSummary, TaskSummary};
use crate::cohort::Cohort;
use crate::labels::{LabelValue, Labels, SurvivalLabels};
use crate::patient::Split;

/// The three splits and, if any label falls there, the place of subjects in none.
fn split_places(any_without: bool) -> Vec<Option<Split>> {
    let mut places = Split::ALL.map(Some).to_vec();
    if any_without {
        places.push(None);
    }
    places
}

pub(super) fn summarise_labels(cohort: &Cohort, task: String, labels: &Labels) -> TaskSummary {
    let rows = labels.rows();
    let split_of = |subject| cohort.splits().split_of(subject);
    let any_without = rows
        .iter()
        .any(|label| split_of(label.subject_id).is_none());
    let by_split = split_places(any_without)
        .into_iter()
        .map(|split| {
            let members: Vec<_> = rows
                .iter()
                .filter(|label| split_of(label.subject_id) == split)
                .collect();
            let mut values = BTreeMap::new();
            let mut reals = Vec::new();
            for label in &members {
                let name = match &label.value {
                    LabelValue::Boolean(value) => value.to_string(),
                    LabelValue::Integer(value) => value.to_string(),
                    LabelValue::Categorical(value) => value.to_string(),
                    LabelValue::Float(value) => {
                        reals.push(f64::from(*value));
                        continue;
                    }
                };
                *values.entry(name).or_insert(0) += 1;
            }
            TaskSplitSummary {
                split,
                labels: members.len() as u64,
                patients: distinct(members.iter().map(|label| label.subject_id)),
                values,
                distribution: Distribution::of(&mut reals),
            }
        })
        .collect();
    TaskSummary {
        task,
        kind: labels.kind(),
        labels: rows.len() as u64,
        patients: distinct(rows.iter().map(|label| label.subject_id)),
        without_data: strangers(cohort, rows.iter().map(|label| label.subject_id)),
        by_split,
    }
}

pub(super) fn summarise_survival(
    cohort: &Cohort,
    task: String,
    labels: &SurvivalLabels,
) -> SurvivalSummary {
    let rows = labels.rows();
    let split_of = |subject| cohort.splits().split_of(subject);
    let any_without = rows
        .iter()
        .any(|label| split_of(label.subject_id).is_none());
    let by_split = split_places(any_without)
        .into_iter()
        .map(|split| {
            let mut events = BTreeMap::new();
            let mut durations = Vec::new();
            for label in rows
                .iter()
                .filter(|label| split_of(label.subject_id) == split)
            {
                *events.entry(label.event).or_insert(0) += 1;
                durations.push(f64::from(label.duration_days));
            }
            SurvivalSplitSummary {
                split,
                labels: durations.len() as u64,
                events,
                duration_days: Distribution::of(&mut durations),
            }
        })
        .collect();
    SurvivalSummary {
        task,
        labels: rows.len() as u64,
        patients: distinct(rows.iter().map(|label| label.subject_id)),
        without_data: strangers(cohort, rows.iter().map(|label| label.subject_id)),
        by_split,
    }
}

/// Number of different subjects, given in ascending order.
fn distinct(subjects: impl Iterator<Item = i64>) -> u64 {
    let mut count = 0;
    let mut last = None;
    for subject in subjects {
        count += u64::from(last != Some(subject));
        last = Some(subject);
    }
    count
}

fn strangers(cohort: &Cohort, subjects: impl Iterator<Item = i64>) -> u64 {
    subjects
        .filter(|&subject| !cohort.contains(subject))
        .count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subjects_in_order_are_counted_once() {
        assert_eq!(distinct([1, 1, 2, 5, 5].into_iter()), 3);
        assert_eq!(distinct(std::iter::empty()), 0);
    }
}
