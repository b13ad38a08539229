use std::collections::BTreeMap;
use std::path::PathBuf;

use super::super::model::Latent;
use super::*;
use crate::{Cohort, LabelKind, Labels, SurvivalLabels, validate};

fn options(patients: u64) -> SynthOptions {
    SynthOptions {
        patients,
        ..SynthOptions::default()
    }
}

fn written(options: &SynthOptions) -> (tempfile::TempDir, SynthReport) {
    let folder = tempfile::tempdir().unwrap();
    let report = synthesize(folder.path(), options, &|_| {}).unwrap();
    (folder, report)
}

/// Every file under a folder with its bytes.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(folder).unwrap().to_path_buf();
                files.insert(name, std::fs::read(&path).unwrap());
            }
        }
    }
    files
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_another_one_others() {
    let (first, _) = written(&options(30));
    let (second, _) = written(&options(30));
    let (other, _) = written(&SynthOptions {
        seed: 1,
        ..options(30)
    });
    let (first, second, other) = (
        files(first.path()),
        files(second.path()),
        files(other.path()),
    );
    assert_eq!(first.len(), 30 * 5 + 4 + 4 + 1);
    assert!(first == second);
    for (path, bytes) in &first {
        let same_for_all = [
            "metadata/codes.parquet",
            "metadata/dataset.json",
            "metadata/pathways.gmt",
        ];
        if !same_for_all.iter().any(|name| path == Path::new(name)) {
            assert_ne!(Some(bytes), other.get(path), "{}", path.display());
        }
    }
}

#[test]
fn the_first_patients_are_the_same_in_a_cohort_of_any_size() {
    // The first shard is full in the larger cohort alone.
    let (small, _) = written(&options(40));
    let (large, _) = written(&options(510));
    let (of_small, of_large) = (files(small.path()), files(large.path()));
    let mut items = 0;
    for (path, bytes) in of_small
        .iter()
        .filter(|(path, _)| path.starts_with("items"))
    {
        assert_eq!(Some(bytes), of_large.get(path), "{}", path.display());
        items += 1;
    }
    assert_eq!(items, 40 * 5);
    let (cohort, larger) = (
        Cohort::open(small.path()).unwrap(),
        Cohort::open(large.path()).unwrap(),
    );
    assert_eq!(larger.shards().len(), 2);
    let labels = |folder: &Path| Labels::read(&folder.join("labels/outcome")).unwrap();
    let (labels, of_larger) = (labels(small.path()), labels(large.path()));
    for subject_id in 1..=40 {
        assert_eq!(
            cohort.read_subject(subject_id).unwrap().unwrap(),
            larger.read_subject(subject_id).unwrap().unwrap()
        );
        assert_eq!(
            labels.of_subject(subject_id),
            of_larger.of_subject(subject_id)
        );
        assert_eq!(
            cohort.splits().split_of(subject_id),
            larger.splits().split_of(subject_id)
        );
    }
}

#[test]
fn what_is_written_reads_back_as_drawn() {
    let options = SynthOptions {
        missing: [(SynthModality::Image, 0.3), (SynthModality::Register, 0.2)].into(),
        site_effect: 0.4,
        ..options(700)
    };
    let (folder, report) = written(&options);
    let found = validate(folder.path());
    assert!(
        found.valid && found.warnings == 0,
        "{:?}",
        found.broken().collect::<Vec<_>>()
    );
    let cohort = Cohort::open(folder.path()).unwrap();
    assert_eq!(cohort.subject_count(), 700);
    assert_eq!(cohort.row_count(), report.rows);
    assert_eq!(cohort.sites(), Some("site"));
    assert_eq!(
        cohort.dataset().additional_value_modality_columns,
        ["image_path", "waveform_path", "omics_path", "audio_path"]
    );
    let labels = Labels::read(&folder.path().join("labels/outcome")).unwrap();
    assert_eq!(labels.kind(), LabelKind::Boolean);
    let survival = SurvivalLabels::read(&folder.path().join("survival/outcome")).unwrap();
    assert_eq!((labels.rows().len(), survival.rows().len()), (700, 700));

    let model = Model::new(&options);
    let mut images = 0;
    for subject_id in 1..=700 {
        let draw = model.draw(subject_id);
        let patient = cohort.read_subject(subject_id).unwrap().unwrap();
        let items: Vec<&ItemPath> = patient
            .events
            .iter()
            .filter_map(|event| event.items.as_deref())
            .flatten()
            .collect();
        for item in &items {
            assert!(item.resolve(folder.path()).is_file());
        }
        let has_image = items.iter().any(|item| item.modality == Modality::Image);
        assert_eq!(has_image, draw.observed.contains(SynthModality::Image));
        images += usize::from(has_image);
        assert_eq!(items.len(), 3 + usize::from(has_image));
        assert_eq!(
            patient.birth_us().is_some(),
            draw.observed.contains(SynthModality::Register)
        );
        assert!(
            patient.events.iter().all(|event| {
                event.site.as_deref() == Some(super::super::model::SITES[draw.site])
            })
        );
        let label = &labels.of_subject(subject_id)[0];
        assert_eq!(label.value, LabelValue::Boolean(draw.recorded));
        assert_eq!(label.prediction_time_us, draw.prediction_time_us);
        let survival = survival.of_subject(subject_id)[0];
        assert_eq!(survival.event, i32::from(draw.event));
        assert_eq!(survival.duration_days, draw.duration_days as f32);
        assert_eq!(cohort.splits().split_of(subject_id), Some(draw.split));
    }
    // Counts of the report are those of the files; the share is off by less than 4 standard errors.
    let missing = report.missing[&SynthModality::Image];
    assert!((missing - (1.0 - images as f64 / 700.0)).abs() < 1e-12);
    assert!((missing - 0.3).abs() < 0.07, "{missing}");
    assert_eq!(report.missing[&SynthModality::Labs], 0.0);
    assert!(
        (report.outcome_share - 0.3).abs() < 0.07,
        "{}",
        report.outcome_share
    );
    let positive = labels
        .rows()
        .iter()
        .filter(|row| row.value == LabelValue::Boolean(true))
        .count();
    assert!((report.label_share - positive as f64 / 700.0).abs() < 1e-12);
    assert_eq!(report.splits.values().sum::<u64>(), 700);
    assert_eq!(report.held_out.patients, report.splits[&Split::HeldOut]);
    assert_eq!(
        report.held_out.patients,
        cohort.splits().count(Split::HeldOut) as u64
    );
}

#[test]
fn images_and_signals_are_where_the_rows_say() {
    let (folder, _) = written(&options(3));
    let cohort = Cohort::open(folder.path()).unwrap();
    let model = Model::new(&options(3));
    let patient = cohort.read_subject(2).unwrap().unwrap();
    let draw = model.draw(2);
    let bytes = |modality: Modality| {
        let items = patient
            .events
            .iter()
            .filter_map(|event| event.items.as_deref())
            .flatten();
        let item = items
            .clone()
            .find(|item| item.modality == modality)
            .unwrap();
        let path = item.resolve(folder.path());
        (std::fs::read(&path).unwrap(), path)
    };
    let (png, _) = bytes(Modality::Image);
    let read = image::load_from_memory(&png).unwrap().to_luma8();
    assert_eq!(read.dimensions(), (32, 32));
    assert_eq!(read.into_raw(), images::pixels(0, &draw));
    let (header, path) = bytes(Modality::Waveform);
    assert!(
        String::from_utf8(header)
            .unwrap()
            .starts_with("000000002 1 100 400\n")
    );
    let signal = std::fs::read(path.with_extension("dat")).unwrap();
    assert_eq!(signal, waveforms::dat(&waveforms::samples(0, &draw)));
    let (wav, _) = bytes(Modality::Speech);
    assert_eq!(wav.len(), 44 + 2 * 8_000);
    let (csv, _) = bytes(Modality::Omics);
    assert_eq!(csv.split(|byte| *byte == b'\n').count(), 3);
}

#[test]
fn the_model_is_described_and_the_truth_is_beside_the_cohort() {
    let (folder, report) = written(&options(60));
    let text = std::fs::read_to_string(folder.path().join(MODEL_FILE)).unwrap();
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    let model = Model::new(&options(60));
    assert_eq!(value["intercept"].as_f64(), Some(model.intercept));
    assert_eq!(value["terms"].as_array().unwrap().len(), model.terms.len());
    assert_eq!(
        value["report"]["optimum"]["everything"].as_f64(),
        Some(report.optimum.everything)
    );
    let described: SynthOptions =
        serde_json::from_value(value["report"]["options"].clone()).unwrap();
    assert_eq!(described, options(60));

    use crate::table::{Decode, Table};
    let table = Table::open(&folder.path().join("truth/00000.parquet")).unwrap();
    let columns = [("switch", Decode::Plain), ("subject_id", Decode::Plain)];
    let batch = table
        .batches(&columns, None, 100, 0)
        .unwrap()
        .next()
        .unwrap()
        .unwrap();
    assert_eq!(batch.num_rows(), 60);
    let switches = crate::values::float32(&batch, "switch").unwrap();
    for row in 0..60 {
        let drawn = model.draw(row as i64 + 1).value(Latent::Switch);
        assert_eq!(f64::from(switches.value(row)), drawn);
    }
}

#[test]
fn only_what_is_asked_for_is_written() {
    let (folder, report) = written(&SynthOptions {
        modalities: vec![SynthModality::Waveform, SynthModality::Notes],
        ..options(20)
    });
    let names: Vec<PathBuf> = files(folder.path()).into_keys().collect();
    assert_eq!(
        names
            .iter()
            .filter(|name| name.starts_with("items"))
            .count(),
        40
    );
    assert!(names.iter().all(|name| !name.ends_with("pathways.gmt")));
    assert_eq!(report.item_files, 40);
    assert_eq!(report.optimum.modalities.len(), 2);
    assert!(validate(folder.path()).valid);
}

#[test]
fn a_folder_with_something_in_it_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("thesis.txt"), "mine").unwrap();
    let error = synthesize(folder.path(), &options(5), &|_| {}).unwrap_err();
    assert!(
        error.to_string().contains("something in the folder"),
        "{error}"
    );
    assert_eq!(files(folder.path()).len(), 1);
    let wrong = SynthOptions {
        prevalence: 2.0,
        ..options(5)
    };
    let error = synthesize(&folder.path().join("new"), &wrong, &|_| {}).unwrap_err();
    assert!(
        error.to_string().contains("`prevalence` must be between"),
        "{error}"
    );
    assert!(!folder.path().join("new").exists());
}
