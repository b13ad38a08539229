use calor_records::{Label, SurvivalLabel, write_labels, write_survival};

use super::*;

fn labels(rows: Vec<(i64, i64, LabelValue)>) -> Labels {
    let folder = tempfile::tempdir().unwrap();
    let rows: Vec<Label> = rows
        .into_iter()
        .map(|(subject_id, prediction_time_us, value)| Label {
            subject_id,
            prediction_time_us,
            value,
        })
        .collect();
    write_labels(&folder.path().join("0.parquet"), &rows).unwrap();
    Labels::read(folder.path()).unwrap()
}

fn boolean(rows: &[(i64, i64, bool)]) -> Labels {
    labels(
        rows.iter()
            .map(|&(subject, time, value)| (subject, time, LabelValue::Boolean(value)))
            .collect(),
    )
}

#[test]
fn binary_labels_are_classes_0_and_1() {
    let task = TaskLabels::binary("t", &boolean(&[(2, 5, true), (1, 7, false), (1, 6, true)]));
    let task = task.unwrap();
    assert_eq!(task.keys(), [(1, 6), (1, 7), (2, 5)]);
    assert_eq!(task.classes(), ["false", "true"]);
    let targets: Vec<Targets> = (0..3).map(|sample| task.targets(sample)).collect();
    assert_eq!(
        targets,
        [Targets::Class(1), Targets::Class(0), Targets::Class(1)]
    );
    assert_eq!(task.of_subject(1), 0..2);
    assert_eq!(task.of_subject(0), 0..0);
    assert_eq!(task.of_subject(3), 3..3);
}

#[test]
fn classes_are_in_order_or_as_given() {
    let numbers = labels(vec![
        (1, 0, LabelValue::Integer(10)),
        (2, 0, LabelValue::Integer(-1)),
        (3, 0, LabelValue::Integer(2)),
    ]);
    let task = TaskLabels::multiclass("t", &numbers, None).unwrap();
    assert_eq!(task.classes(), ["-1", "2", "10"]);
    assert_eq!(task.targets(0), Targets::Class(2));

    let names = labels(vec![
        (1, 0, LabelValue::Categorical("b".into())),
        (2, 0, LabelValue::Categorical("a".into())),
    ]);
    let trained = ["b".to_string(), "a".to_string()];
    let task = TaskLabels::multiclass("t", &names, Some(&trained)).unwrap();
    assert_eq!(task.targets(0), Targets::Class(0));
    let error = TaskLabels::multiclass("t", &names, Some(&trained[..1])).unwrap_err();
    assert!(error.to_string().contains("not one of the 1"), "{error}");
}

#[test]
fn several_tasks_share_samples_and_may_miss_labels() {
    let first = boolean(&[(1, 0, true), (2, 0, false)]);
    let second = boolean(&[(2, 0, true), (3, 0, true)]);
    let task = TaskLabels::multilabel(&[("a", &first), ("b", &second)]).unwrap();
    assert_eq!(task.keys(), [(1, 0), (2, 0), (3, 0)]);
    assert_eq!(task.classes(), ["a", "b"]);
    assert_eq!(task.targets(1), Targets::Multilabel(vec![0.0, 1.0]));
    let Targets::Multilabel(values) = task.targets(0) else {
        panic!("not a multilabel target");
    };
    assert!(values[0] == 1.0 && values[1].is_nan());
    assert_eq!(task.targets(0).supervised_count(), 1);
    assert_eq!(task.targets(1).supervised_count(), 2);
}

#[test]
fn numbers_and_survival_times() {
    let numbers = labels(vec![(1, 0, LabelValue::Float(1.5))]);
    let task = TaskLabels::regression("t", &numbers).unwrap();
    assert_eq!(task.targets(0), Targets::Real(1.5));

    let folder = tempfile::tempdir().unwrap();
    let row = SurvivalLabel {
        subject_id: 4,
        prediction_time_us: 9,
        duration_days: 365.5,
        event: 2,
    };
    write_survival(&folder.path().join("0.parquet"), &[row]).unwrap();
    let survival = SurvivalLabels::read(folder.path()).unwrap();
    let task = TaskLabels::survival("t", &survival).unwrap();
    assert_eq!(
        task.targets(0),
        Targets::Survival {
            duration_days: 365.5,
            event: 2
        }
    );
}

#[test]
fn samples_to_predict_for_have_no_target() {
    let task = TaskLabels::unlabelled("t", vec![(2, 1), (1, 1), (2, 1)]).unwrap();
    assert_eq!(task.keys(), [(1, 1), (2, 1)]);
    assert_eq!(task.targets(1), Targets::None);
    assert_eq!(task.targets(1).supervised_count(), 0);
    assert!(TaskLabels::unlabelled("t", Vec::new()).is_err());
}

#[test]
fn labels_of_another_kind_and_repeated_ones_are_errors() {
    let numbers = labels(vec![(1, 0, LabelValue::Float(1.5))]);
    let error = TaskLabels::binary("t", &numbers).unwrap_err().to_string();
    assert!(error.contains("`t` are float_value"), "{error}");
    assert!(error.contains("binary task needs boolean_value"), "{error}");
    let twice = boolean(&[(1, 5, true), (1, 6, true), (1, 6, false)]);
    let error = TaskLabels::binary("t", &twice).unwrap_err().to_string();
    assert!(error.contains("label row 2"), "{error}");
    assert!(TaskLabels::multilabel(&[("t", &twice)]).is_err());
}
