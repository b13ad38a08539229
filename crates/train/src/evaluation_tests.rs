use super::*;
use crate::objective::TargetScale;

pub(crate) fn scored(
    kind: TaskKind,
    classes: &[&str],
    outputs: &[f64],
    width: usize,
    targets: Vec<Targets>,
) -> Scored {
    let task = TaskFile {
        format: crate::data::TASK_FORMAT,
        kind,
        labels: vec!["task".to_owned()],
        classes: classes.iter().map(|name| (*name).to_owned()).collect(),
        scale: None,
        sequence: SequenceOptions::default(),
        statistics: Default::default(),
        scalings: Vec::new(),
    };
    let count = targets.len() as i64;
    Scored {
        task,
        subject_ids: (1..=count).collect(),
        prediction_times_us: (1..=count).map(|time| time * 1_000_000).collect(),
        targets,
        outputs: outputs.to_vec(),
        width,
        tags: Vec::new(),
    }
}

#[test]
fn the_loss_is_that_of_training() {
    let binary = scored(
        TaskKind::Binary,
        &["false", "true"],
        &[0.3, -1.2],
        1,
        vec![Targets::Class(1), Targets::Class(0)],
    );
    let expected = ((1.0 + (-0.3f64).exp()).ln() + (1.0 + (-1.2f64).exp()).ln()) / 2.0;
    assert!((binary.loss().unwrap() - expected).abs() < 1e-12);
    let extreme = scored(
        TaskKind::Binary,
        &["false", "true"],
        &[-1000.0],
        1,
        vec![Targets::Class(1)],
    );
    assert_eq!(extreme.loss(), Some(1000.0));
    let classes = scored(
        TaskKind::Multiclass,
        &["a", "b"],
        &[1.0, 1.0],
        2,
        vec![Targets::Class(0)],
    );
    assert!((classes.loss().unwrap() - 2f64.ln()).abs() < 1e-12);
    assert!(
        classes
            .probabilities()
            .iter()
            .all(|share| (share - 0.5).abs() < 1e-12)
    );
    let mut real = scored(
        TaskKind::Regression,
        &[],
        &[7.0],
        1,
        vec![Targets::Real(3.0)],
    );
    real.task.scale = Some(TargetScale {
        mean: 1.0,
        deviation: 2.0,
    });
    assert_eq!(real.loss(), Some(4.0));
    let unlabelled = scored(
        TaskKind::Binary,
        &["false", "true"],
        &[0.0],
        1,
        vec![Targets::None],
    );
    assert_eq!(unlabelled.loss(), None);
    assert!(unlabelled.evaluation(100, 0).unwrap().is_none());
}

#[test]
fn a_label_that_is_not_known_is_left_out_of_its_metrics() {
    let nan = f32::NAN;
    let targets = [[1.0, 0.0], [0.0, nan], [1.0, 1.0], [0.0, 0.0]]
        .map(|labels| Targets::Multilabel(labels.to_vec()));
    let outputs = [2.0, -1.0, -2.0, 5.0, 1.0, 1.0, -1.0, 0.0];
    let scored = scored(
        TaskKind::Multilabel,
        &["first", "second"],
        &outputs,
        2,
        targets.to_vec(),
    );
    let evaluation = scored.evaluation(100, 0).unwrap().unwrap();
    assert_eq!(evaluation.samples_with_unknown_label, 1);
    assert_eq!(evaluation.metrics.rows, 3);
    let rows: Vec<usize> = evaluation
        .labels
        .iter()
        .map(|label| label.metrics.as_ref().unwrap().rows)
        .collect();
    assert_eq!(rows, [4, 3]);
    assert_eq!(
        evaluation.labels[0]
            .metrics
            .as_ref()
            .unwrap()
            .score("auroc")
            .unwrap()
            .value(),
        Some(1.0)
    );
}

#[test]
fn a_language_model_weighs_tokens_and_not_rows() {
    let targets = |count: usize| {
        let learned = (0..count as i32).collect::<Vec<_>>();
        Targets::Tokens([vec![NO_TARGET], learned].concat())
    };
    let scored = scored(
        TaskKind::CausalLm,
        &[],
        &[6.0, 1.0],
        1,
        vec![targets(2), targets(2)],
    );
    assert_eq!(scored.loss(), Some(1.75));
    let evaluation = scored.evaluation(100, 0).unwrap().unwrap();
    let value = |name: &str| evaluation.metrics.score(name).unwrap().value().unwrap();
    assert_eq!(value("loss"), 1.75);
    assert!((value("perplexity") - 1.75f64.exp()).abs() < 1e-12);
    assert!(evaluation.curves.is_empty() && evaluation.entities.is_empty());
    let quick = scored.quick_metrics().unwrap();
    assert_eq!(quick["loss"], Some(1.75));
}

#[test]
fn tags_become_entities() {
    let mut scored = scored(
        TaskKind::Tokens,
        &["B-X", "I-X", "O"],
        &[0.5, 0.25],
        1,
        vec![
            Targets::Tokens(vec![NO_TARGET, 0, NO_TARGET, 1, 2]),
            Targets::Tokens(vec![NO_TARGET, 0]),
        ],
    );
    scored.tags = vec![vec![0, 1, 0], vec![2]];
    let evaluation = scored.evaluation(100, 0).unwrap().unwrap();
    let value = |name: &str| evaluation.metrics.score(name).unwrap().value().unwrap();
    // One of two is found, and one of two found is right.
    assert_eq!(
        (value("precision"), value("recall"), value("f1")),
        (0.5, 0.5, 0.5)
    );
    assert_eq!(value("accuracy"), 0.5);
    assert_eq!(scored.loss(), Some(0.75 / 4.0));
    assert_eq!(evaluation.entities.len(), 1);
    assert_eq!(evaluation.entities[0].name, "X");
}
