use super::*;

fn options(resamples: usize) -> EvaluateOptions {
    EvaluateOptions {
        bootstrap: BootstrapOptions {
            resamples,
            ..BootstrapOptions::default()
        },
        class_names: Vec::new(),
    }
}

#[test]
fn every_metric_has_a_direction_and_a_definition() {
    for kind in [
        TaskKind::Binary,
        TaskKind::Multiclass,
        TaskKind::Multilabel,
        TaskKind::Regression,
    ] {
        for name in metric_names(kind) {
            assert!(higher_is_better(name).is_some(), "{name}");
            assert!(!definition(kind, name).is_empty(), "{name}");
        }
    }
    assert_eq!(higher_is_better("auroch"), None);
}

#[test]
fn one_class_leaves_what_can_be_said() {
    let predictions = Predictions::Binary {
        probabilities: &[0.1, 0.2, 0.3],
        targets: &[false; 3],
    };
    let metrics = evaluate(&predictions, &[1, 2, 3], &options(50)).unwrap();
    for name in ["auroc", "auprc", "macro_f1"] {
        let score = metrics.score(name).unwrap();
        assert!(
            score.reason().unwrap().contains("only one class"),
            "{name} {score:?}"
        );
    }
    for name in ["brier", "ece", "log_loss", "accuracy"] {
        assert!(metrics.score(name).unwrap().bounds().is_some(), "{name}");
    }
    assert!(!serde_json::to_string(&metrics).unwrap().contains("null"));
}

#[test]
fn the_report_survives_json() {
    let predictions = Predictions::Multilabel {
        labels: 2,
        probabilities: &[0.1, 0.9, 0.8, 0.3, 0.4, 0.6],
        targets: &[false, true, true, false, true, false],
    };
    let metrics = evaluate(&predictions, &[1, 2, 3], &options(20)).unwrap();
    let json = serde_json::to_string(&metrics).unwrap();
    let back: Metrics = serde_json::from_str(&json).unwrap();
    assert_eq!(back, metrics);
}

#[test]
fn a_class_that_does_not_occur_makes_the_mean_undefined_and_names_it() {
    let predictions = Predictions::Multiclass {
        classes: 3,
        probabilities: &[0.6, 0.3, 0.1, 0.2, 0.7, 0.1, 0.3, 0.6, 0.1],
        targets: &[0, 1, 0],
    };
    let mut options = options(0);
    options.class_names = ["remission", "relapse", "death"].map(str::to_owned).into();
    let metrics = evaluate(&predictions, &[1, 2, 3], &options).unwrap();
    let reason = metrics.score("auroc").unwrap().reason().unwrap();
    assert_eq!(reason, "death: only one class occurs: no case is positive");
    assert_eq!(metrics.classes[0].auroc.value(), Some(1.0));
    assert_eq!(metrics.classes[0].positives, 2);
    assert!(metrics.classes[2].auroc.value().is_none());
    assert!((metrics.score("accuracy").unwrap().value().unwrap() - 2.0 / 3.0).abs() < 1e-15);
}

#[test]
fn a_label_of_one_class_is_left_out_of_the_mean_with_a_note() {
    let predictions = Predictions::Multilabel {
        labels: 2,
        probabilities: &[0.1, 0.2, 0.8, 0.3, 0.4, 0.1],
        targets: &[false, false, true, false, true, false],
    };
    let metrics = evaluate(&predictions, &[1, 2, 3], &options(0)).unwrap();
    let Some(Score::Defined { value, note, .. }) = metrics.score("auroc") else {
        panic!("{metrics:?}");
    };
    assert_eq!(*value, 1.0);
    assert_eq!(
        note.as_deref(),
        Some("the mean leaves out label 1 (only one class occurs)")
    );
    let Some(Score::Defined { note, .. }) = metrics.score("macro_f1") else {
        panic!("{metrics:?}");
    };
    assert!(
        note.as_deref()
            .unwrap()
            .contains("neither occurs nor is predicted")
    );
    let Some(Score::Defined { note: None, .. }) = metrics.score("auroc_micro") else {
        panic!("{metrics:?}");
    };
}

#[test]
fn broken_input_is_refused_with_its_place() {
    let patients = [1, 2];
    let of = |predictions: Predictions<'_>| {
        evaluate(&predictions, &patients, &options(0))
            .unwrap_err()
            .to_string()
    };
    let binary = |probabilities, targets| Predictions::Binary {
        probabilities,
        targets,
    };
    assert!(of(binary(&[], &[])).contains("the split is empty"));
    assert!(of(binary(&[0.1, f64::NAN], &[true, false])).contains("row 1"));
    assert!(of(binary(&[0.1, -3.0], &[true, false])).contains("sigmoid"));
    assert!(of(binary(&[0.1], &[true])).contains("the list of patients has 2 entries"));
    let table = |probabilities, targets| Predictions::Multiclass {
        classes: 2,
        probabilities,
        targets,
    };
    assert!(of(table(&[0.1, 0.9, 0.5, 0.6], &[0, 1])).contains("row 1 do not sum to 1"));
    assert!(of(table(&[0.1, 0.9, 0.5, 0.5], &[0, 2])).contains("row 1 is not among the 2"));
    let nan = of(table(&[0.1, 0.9, 0.5, f64::NAN], &[0, 1]));
    assert!(nan.contains("row 1, column 1"), "{nan}");
    let one_class = Predictions::Multiclass {
        classes: 1,
        probabilities: &[1.0, 1.0],
        targets: &[0, 0],
    };
    assert!(of(one_class).contains("at least 2"));
    let labels = Predictions::Multilabel {
        labels: 2,
        probabilities: &[0.5; 4],
        targets: &[true; 3],
    };
    assert!(of(labels).contains("the table of targets has 3"));
    let names = EvaluateOptions {
        class_names: vec!["alone".to_owned()],
        ..options(0)
    };
    let predictions = table(&[0.1, 0.9, 0.5, 0.5], &[0, 1]);
    assert!(evaluate(&predictions, &patients, &names).is_err());
}

#[test]
fn f32_rounding_is_cut_off_and_more_is_not() {
    let predictions = Predictions::Binary {
        probabilities: &[1.000_000_1, -0.000_000_1],
        targets: &[true, false],
    };
    let metrics = evaluate(&predictions, &[1, 2], &options(0)).unwrap();
    assert_eq!(metrics.score("brier").unwrap().value(), Some(0.0));
}

#[test]
fn resamples_of_a_binary_task_are_the_same_on_any_number_of_threads() {
    let rows = 500;
    let probabilities: Vec<f64> = (0..rows).map(|i| (i * 7919 % 997) as f64 / 997.0).collect();
    let targets: Vec<bool> = (0..rows).map(|i| i * 31 % 7 < 3).collect();
    let patients: Vec<i64> = (0..rows as i64).map(|i| i / 2).collect();
    let predictions = Predictions::Binary {
        probabilities: &probabilities,
        targets: &targets,
    };
    let on = |threads: usize| {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap()
            .install(|| evaluate(&predictions, &patients, &options(100)).unwrap())
    };
    let metrics = on(1);
    assert_eq!(metrics, on(4));
    for (name, score) in &metrics.scores {
        let (low, high) = score.bounds().unwrap();
        let value = score.value().unwrap();
        assert!(low < high, "{name}");
        // ECE is biased upwards in resamples; the others lie inside their interval here.
        assert!(
            name == "ece" || (low <= value && value <= high),
            "{name} {score:?}"
        );
    }
}
