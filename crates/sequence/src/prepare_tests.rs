use std::cell::RefCell;
use std::collections::BTreeSet;

use calor_records::{Labels, Patient};
use proptest::prelude::*;

use super::*;
use crate::labels::Targets;
use crate::testing::{DAY_US, any_patient, event, note, tokenizer, wordpiece, write_cohort};

fn options(max_tokens: usize) -> SequenceOptions {
    SequenceOptions {
        max_tokens,
        overlength: Overlength::DropOldestEvents,
        quantile_minimum: 2,
        ..Default::default()
    }
}

/// Subject `i` has values around `i`, one a day from day 0.
fn patients(count: i64, rows: i64) -> Vec<Patient> {
    (0..count)
        .map(|subject| Patient {
            subject_id: subject,
            events: (0..rows)
                .map(|day| event(Some(day * DAY_US), "weight", Some((subject + day) as f32)))
                .collect(),
        })
        .collect()
}

struct Setting {
    folder: tempfile::TempDir,
    cohort: Cohort,
    labels: Labels,
    tokenizer: PatientTokenizer,
}

impl Setting {
    fn new(patients: &[Patient], shards: usize, days: &[i64]) -> Setting {
        let folder = tempfile::tempdir().unwrap();
        let (cohort, labels) = write_cohort(folder.path(), patients, shards, days);
        Setting {
            folder,
            cohort,
            labels,
            tokenizer: tokenizer(&wordpiece(), None),
        }
    }

    fn cache(&self) -> std::path::PathBuf {
        self.folder.path().join("cache")
    }

    fn task(&self) -> TaskLabels {
        TaskLabels::binary("task", &self.labels).unwrap()
    }

    fn prepare(&self, options: &SequenceOptions) -> Result<Prepared, SequenceError> {
        prepare(
            &self.cohort,
            &self.task(),
            &self.tokenizer,
            options,
            None,
            &self.cache(),
            &|_| {},
        )
    }
}

fn samples(prepared: &Prepared) -> Vec<crate::Sample<'_>> {
    (0..prepared.len())
        .map(|sample| prepared.sample(sample))
        .collect()
}

#[test]
fn samples_come_with_their_text_target_and_split() {
    let setting = Setting::new(&patients(8, 3), 2, &[0, 1]);
    let prepared = setting.prepare(&options(64)).unwrap();
    assert_eq!(prepared.len(), 16);
    let sample = prepared.sample(5);
    assert_eq!((sample.subject_id, sample.prediction_time_us), (2, DAY_US));
    assert_eq!(sample.split, Some(Split::Tuning));
    assert_eq!(sample.targets, Targets::Class(0));
    assert_eq!(prepared.sample(6).targets, Targets::Class(1));
    // Training values 0, 1, 1, 2 and 4, 5, 5, 6: the quartiles are 1 and 5.
    assert_eq!(
        setting.tokenizer.decode(sample.tokens).unwrap(),
        "[CLS] patient. 1 day ago weight normal 2. 1 day later weight normal 3. [SEP]"
    );
    let train = prepared.split(Split::Train);
    assert_eq!(train.samples(), [0, 1, 2, 3, 8, 9, 10, 11]);
    assert_eq!(prepared.class_counts(&train), [5, 3]);
    assert_eq!(prepared.all().len(), 16);
    assert_eq!(prepared.classes(), ["false", "true"]);
}

#[test]
fn quantiles_see_training_patients_up_to_their_prediction_only() {
    let patients = patients(40, 6);
    let setting = Setting::new(&patients, 3, &[0, 2]);
    let prepared = setting.prepare(&options(256)).unwrap();
    let expected: BTreeSet<u32> = (0..40u32)
        .filter(|subject| subject % 4 < 2)
        .flat_map(|subject| subject..=subject + 2)
        .collect();
    let weight = &prepared.statistics().codes["weight"];
    // 20 training patients with 3 visible values each.
    assert_eq!(weight.count, 60);
    assert!(
        weight
            .cuts
            .iter()
            .all(|&cut| expected.contains(&(cut as u32)))
    );
    assert_eq!(prepared.report().codes_with_quantiles, 1);
}

#[test]
fn a_second_time_the_cache_is_taken_as_it_is() {
    let setting = Setting::new(&patients(8, 4), 2, &[3]);
    let first = setting.prepare(&options(64)).unwrap();
    assert!(!first.cache_hit());
    let second = setting.prepare(&options(64)).unwrap();
    assert!(second.cache_hit());
    assert_eq!(first.report(), second.report());
    assert_eq!(first.statistics(), second.statistics());
    assert_eq!(samples(&first), samples(&second));
    assert_eq!(std::fs::read_dir(setting.cache()).unwrap().count(), 1);
}

#[test]
fn whatever_shapes_a_sequence_changes_the_hash() {
    let setting = Setting::new(&patients(8, 4), 2, &[3]);
    let mut hashes = BTreeSet::new();
    let mut add = |prepared: Prepared| assert!(hashes.insert(prepared.report().hash.clone()));
    let base = setting.prepare(&options(64)).unwrap();
    let statistics = base.statistics().clone();
    add(base);
    add(setting.prepare(&options(63)).unwrap());
    let with = |labels: &TaskLabels, tokenizer: &PatientTokenizer, statistics| {
        let options = options(64);
        prepare(
            &Cohort::open(setting.folder.path()).unwrap(),
            labels,
            tokenizer,
            &options,
            statistics,
            &setting.cache(),
            &|_| {},
        )
        .unwrap()
    };
    let task = setting.task();
    add(with(&task, &setting.tokenizer, Some(&statistics)));
    let other = tokenizer(&wordpiece(), Some(serde_json::json!({})));
    add(with(&task, &other, None));
    let keys = task.keys().to_vec();
    add(with(
        &TaskLabels::unlabelled("task", keys).unwrap(),
        &setting.tokenizer,
        None,
    ));
    // A description that changes, in metadata that is as long as before.
    let codes = setting.folder.path().join("metadata/codes.parquet");
    let before = std::fs::read(&codes).unwrap();
    let described = calor_records::CodeEntry {
        description: Some("mass".into()),
        ..Default::default()
    };
    calor_records::write_codes(setting.folder.path(), [("weight", &described)]).unwrap();
    add(with(&task, &setting.tokenizer, None));
    std::fs::write(&codes, before).unwrap();
    assert!(with(&task, &setting.tokenizer, None).cache_hit());
    // A shard written again.
    let mut changed = patients(4, 4);
    changed[0].events.pop();
    calor_records::write_shard(
        &setting.folder.path().join("data/0.parquet"),
        &changed,
        calor_records::ShardOptions::default(),
    )
    .unwrap();
    add(with(&task, &setting.tokenizer, None));
}

#[test]
fn a_damaged_cache_is_written_anew() {
    let setting = Setting::new(&patients(8, 4), 2, &[3]);
    let path = setting.prepare(&options(64)).unwrap().path().to_path_buf();
    let whole = std::fs::read(&path).unwrap();
    for damage in [&whole[..whole.len() / 2], b"something else"] {
        std::fs::write(&path, damage).unwrap();
        let prepared = setting.prepare(&options(64)).unwrap();
        assert!(!prepared.cache_hit());
        assert!(prepared.rebuilt_because().is_some());
        drop(prepared);
        assert_eq!(std::fs::read(&path).unwrap(), whole);
    }
    let mut flipped = whole.clone();
    flipped[4096] ^= 1;
    std::fs::write(&path, flipped).unwrap();
    let prepared = setting.prepare(&options(64)).unwrap();
    assert_eq!(prepared.rebuilt_because(), Some("its contents are damaged"));
}

#[test]
fn losses_are_counted() {
    let setting = Setting::new(&patients(4, 30), 1, &[29]);
    let prepared = setting.prepare(&options(64)).unwrap();
    let report = prepared.report();
    assert_eq!((report.samples, report.patients, report.rows), (4, 4, 120));
    assert_eq!(
        (report.truncated_samples, report.truncated_patients),
        (4, 4)
    );
    assert!(report.dropped_rows > 40 && report.dropped_rows < 120);
    let tokens: usize = samples(&prepared)
        .iter()
        .map(|sample| sample.tokens.len())
        .sum();
    assert_eq!(report.tokens, tokens as u64);
    let full = setting.prepare(&options(10_000)).unwrap();
    assert_eq!(full.report().truncated_samples, 0);
    assert_eq!(report.dropped_tokens, full.report().tokens - report.tokens);
    assert_eq!(report.full_length_max, full.report().length_max);
}

#[test]
fn too_long_is_an_error_where_nothing_may_be_dropped() {
    let setting = Setting::new(&patients(4, 30), 1, &[0, 29]);
    let strict = SequenceOptions {
        overlength: Overlength::Error,
        ..options(64)
    };
    let error = setting.prepare(&strict).err().unwrap().to_string();
    assert!(error.contains("4 of 8 samples are longer"), "{error}");
    // Nothing is left behind by a preparation that failed.
    assert_eq!(std::fs::read_dir(setting.cache()).unwrap().count(), 0);
}

#[test]
fn labels_without_data_are_left_out_and_counted() {
    let setting = Setting::new(&patients(4, 3), 1, &[1]);
    let run = |keys| {
        prepare(
            &setting.cohort,
            &TaskLabels::unlabelled("t", keys).unwrap(),
            &setting.tokenizer,
            &options(64),
            Some(&ValueStatistics {
                levels: options(64).quantile_levels,
                ..Default::default()
            }),
            &setting.cache(),
            &|_| {},
        )
    };
    let prepared = run(vec![(-3, 0), (1, -5), (2, DAY_US), (99, 0)]).unwrap();
    assert_eq!(prepared.len(), 2);
    assert_eq!(prepared.report().samples_without_data, 2);
    assert_eq!(prepared.report().samples_without_rows, 1);
    assert_eq!(prepared.sample(1).subject_id, 2);
    assert_eq!(prepared.sample(1).targets, Targets::None);
    let error = run(vec![(99, 0)]).err().unwrap().to_string();
    assert!(error.contains("none of them is in the cohort"), "{error}");
}

#[test]
fn quantiles_need_training_patients_and_the_same_levels() {
    let setting = Setting::new(&patients(4, 3), 1, &[1]);
    let run = |statistics: Option<&ValueStatistics>, options: &SequenceOptions| {
        prepare(
            &setting.cohort,
            // Subject 3 is held out.
            &TaskLabels::unlabelled("t", vec![(3, DAY_US)]).unwrap(),
            &setting.tokenizer,
            options,
            statistics,
            &setting.cache(),
            &|_| {},
        )
    };
    let error = run(None, &options(64)).err().unwrap().to_string();
    assert!(error.contains("subject_splits.parquet"), "{error}");
    let error = run(Some(&ValueStatistics::default()), &options(64))
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("quantile_levels"), "{error}");
    let values = SequenceOptions {
        numbers: NumberStyle::Value,
        ..options(64)
    };
    assert_eq!(run(None, &values).unwrap().len(), 1);
}

#[test]
fn progress_ends_with_all_rows_of_both_phases() {
    let setting = Setting::new(&patients(8, 4), 2, &[3]);
    let seen = RefCell::new(Vec::new());
    prepare(
        &setting.cohort,
        &setting.task(),
        &setting.tokenizer,
        &options(64),
        None,
        &setting.cache(),
        &|progress| {
            seen.borrow_mut()
                .push((progress.phase, progress.rows, progress.total_rows))
        },
    )
    .unwrap();
    let seen = seen.into_inner();
    assert!(seen.contains(&(Phase::Statistics, 32, 32)));
    assert_eq!(seen.last(), Some(&(Phase::Sequences, 32, 32)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn tokens_depend_neither_on_threads_nor_on_shards_nor_on_the_future(
        patients in prop::collection::vec(any_patient(), 4..20),
        max_tokens in 48usize..200,
        day in 1_000i64..10_000,
        latest: bool,
    ) {
        let options = SequenceOptions {
            repeat: if latest { Repeat::Latest } else { Repeat::All },
            ..options(max_tokens)
        };
        // A row without meaning, so that every patient has at least one.
        let seen: Vec<Patient> = patients
            .iter()
            .map(|patient| {
                let mut patient = patient.clone();
                patient.events.insert(0, event(None, "seen", None));
                patient
            })
            .collect();
        let with = |patients: &[Patient], threads: usize, shards: usize| {
            let setting = Setting::new(patients, shards, &[day, day + 1_000]);
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let prepared = pool.install(|| setting.prepare(&options)).unwrap();
            let tokens: Vec<(i64, i64, Vec<u32>)> = samples(&prepared)
                .iter()
                .map(|sample| (sample.subject_id, sample.prediction_time_us, sample.tokens.to_vec()))
                .collect();
            let report = PrepareReport { hash: String::new(), ..prepared.report().clone() };
            (tokens, report, prepared.statistics().clone())
        };
        let expected = with(&seen, 1, 1);
        prop_assert_eq!(&with(&seen, 4, 1), &expected);
        prop_assert_eq!(&with(&seen, 3, 4), &expected);

        let mut future = seen.clone();
        for patient in &mut future {
            let last = (day + 1_000) * DAY_US;
            patient.events.retain(|event| event.time_us.is_none_or(|time| time <= last));
            patient.events.push(event(Some(last + 1), "weight", Some(1e9)));
            patient.events.push(note(Some(last + 2), "note", "secret"));
        }
        prop_assert_eq!(&with(&future, 2, 2), &expected);
    }
}
