use calor_records::ItemPath;

use super::*;
use crate::statistics::CodeStatistics;
use crate::testing::{DAY_US, event};

fn statistics() -> ValueStatistics {
    let code = |median, interquartile_range| CodeStatistics {
        count: 100,
        cuts: vec![0.0; 4],
        interquartile_range,
        median,
    };
    ValueStatistics {
        levels: vec![0.05, 0.25, 0.75, 0.95],
        codes: [
            ("LAB//creatinine".to_string(), code(1.0, 2.698)),
            ("LAB//potassium".to_string(), code(4.0, 0.0)),
            ("weight".to_string(), code(70.0, 1.349)),
        ]
        .into(),
        sites: Vec::new(),
    }
}

fn image(day: Option<i64>, path: &str) -> Event {
    Event {
        items: Some(Box::new([ItemPath {
            modality: Modality::Image,
            path: path.into(),
        }])),
        ..event(day.map(|day| day * DAY_US), "IMAGE", None)
    }
}

fn options(streams: Vec<StreamOptions>) -> SequenceOptions {
    SequenceOptions {
        streams,
        ..Default::default()
    }
}

fn patient(events: Vec<Event>) -> Patient {
    Patient {
        subject_id: 1,
        events,
    }
}

#[test]
fn the_latest_visible_items_are_kept_in_time_order_and_the_others_counted() {
    let options = options(vec![StreamOptions {
        max_items: 2,
        ..StreamOptions::new(Modality::Image)
    }]);
    let patient = patient(vec![
        image(None, "static.png"),
        image(Some(1), "first.png"),
        image(Some(2), "second.png"),
        image(Some(3), "third.png"),
        image(Some(9), "too late.png"),
    ]);
    let statistics = statistics();
    let found = Collector::new(&statistics, &options).collect(&patient, 3 * DAY_US);
    let paths: Vec<_> = found.items.iter().map(|item| &item.content).collect();
    let file = |path: &str| DraftContent::File(path.into());
    assert_eq!(paths, [&file("second.png"), &file("third.png")]);
    assert_eq!(found.dropped, 2);
    assert_eq!(found.slots(&options.streams), 8);
}

#[test]
fn a_stream_without_items_has_one_that_is_missing() {
    let options = options(vec![
        StreamOptions::new(Modality::Image),
        StreamOptions::new(Modality::Series),
        StreamOptions::new(Modality::Omics),
    ]);
    let statistics = statistics();
    let found = Collector::new(&statistics, &options).collect(&patient(vec![]), 0);
    assert_eq!(found.items.len(), 3);
    for (stream, item) in found.items.iter().enumerate() {
        assert_eq!(item.stream, stream);
        assert_eq!(item.content, DraftContent::Missing);
    }
    assert_eq!(found.slots(&options.streams), 12);
}

#[test]
fn a_series_is_standardised_and_dated_from_the_prediction() {
    let options = options(vec![StreamOptions {
        codes: vec!["LAB//*".into(), "weight".into()],
        max_values: 4,
        ..StreamOptions::new(Modality::Series)
    }]);
    let statistics = statistics();
    let patient = patient(vec![
        event(None, "weight", Some(70.0)),
        event(Some(0), "weight", Some(99.0)),
        event(Some(DAY_US), "weight", Some(72.0)),
        event(Some(2 * DAY_US), "unknown", Some(1.0)),
        event(Some(2 * DAY_US), "weight", Some(f32::NAN)),
        event(Some(2 * DAY_US), "weight", Some(1e9)),
        event(Some(3 * DAY_US), "LAB//creatinine", Some(-1.0)),
        event(Some(4 * DAY_US), "LAB//potassium", Some(5.5)),
        event(Some(5 * DAY_US), "weight", Some(70.0)),
    ]);
    let found = Collector::new(&statistics, &options).collect(&patient, 4 * DAY_US);
    let DraftContent::Series(values) = &found.items[0].content else {
        panic!("no series");
    };
    let expected = [(3.0, 2, 2.0), (2.0, 2, 10.0), (1.0, 0, -1.0), (0.0, 1, 1.5)];
    assert_eq!(values.len(), expected.len());
    for (value, (time_days, variable, score)) in values.iter().zip(expected) {
        assert_eq!((value.time_days, value.variable), (time_days, variable));
        assert!((value.value - score).abs() < 1e-5, "{value:?}");
    }
    assert_eq!(found.items[0].time_us, Some(4 * DAY_US));
}

#[test]
fn what_an_excluded_site_says_is_not_seen() {
    let options = SequenceOptions {
        exclude_sites: vec!["clinic".into()],
        ..options(vec![StreamOptions {
            max_items: 5,
            ..StreamOptions::new(Modality::Image)
        }])
    };
    let from = |site: &str, path: &str| Event {
        site: Some(site.into()),
        ..image(Some(0), path)
    };
    let statistics = statistics();
    let patient = patient(vec![from("clinic", "a"), from("register", "b")]);
    let found = Collector::new(&statistics, &options).collect(&patient, 0);
    assert_eq!(found.items.len(), 1);
    assert_eq!(found.items[0].content, DraftContent::File("b".into()));
    assert_eq!(found.items[0].site.as_deref(), Some("register"));
}

#[test]
fn streams_that_make_no_sense_are_named() {
    let mut none = StreamOptions::new(Modality::Speech);
    none.tokens = 0;
    let problem = options(vec![none]).check().unwrap_err().to_string();
    assert!(
        problem.contains("speech") && problem.contains("tokens"),
        "{problem}"
    );
    let image = StreamOptions::new(Modality::Image);
    assert!(options(vec![image.clone(), image]).check().is_err());
    let blank = SequenceOptions {
        text: false,
        ..Default::default()
    };
    assert!(blank.check().is_err());
}
