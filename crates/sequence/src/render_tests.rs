use proptest::prelude::*;

use super::*;
use crate::options::TimeResolution;
use crate::testing::{DAY_US, any_patient, event, note, write_cohort};

fn statistics() -> ValueStatistics {
    let mut statistics = ValueStatistics {
        levels: vec![0.05, 0.25, 0.75, 0.95],
        ..Default::default()
    };
    for (code, cuts) in [
        ("LAB//creatinine", vec![0.5, 0.7, 1.1, 1.4]),
        ("weight", vec![50.0, 65.0, 90.0, 110.0]),
    ] {
        let known = CodeStatistics {
            count: 100,
            interquartile_range: cuts[2] - cuts[1],
            median: (cuts[1] + cuts[2]) / 2.0,
            cuts,
        };
        statistics.codes.insert(code.to_string(), known);
    }
    statistics
}

fn codes() -> CodeTable {
    let folder = tempfile::tempdir().unwrap();
    let patient = patient(vec![event(None, "smoker", None)]);
    write_cohort(folder.path(), &[patient], 1, &[0])
        .0
        .codes()
        .clone()
}

fn patient(events: Vec<Event>) -> Patient {
    Patient {
        subject_id: 1,
        events,
    }
}

fn day(day: i64) -> Option<i64> {
    Some(day * DAY_US)
}

fn text_of(rendered: &Rendered, options: &SequenceOptions) -> String {
    let units: Vec<&Unit> = rendered.units.iter().collect();
    rendered.compose(rendered.statics.len(), &units, options)
}

fn text(events: Vec<Event>, prediction_day: i64, options: &SequenceOptions) -> String {
    let (codes, statistics) = (codes(), statistics());
    let rendered = Renderer::new(&codes, &statistics, options)
        .render(&patient(events), prediction_day * DAY_US);
    text_of(&rendered, options)
}

/// Born on 1 January 1950; seen in 1970.
fn history() -> Vec<Event> {
    vec![
        event(None, "GENDER//M", None),
        event(None, "smoker", None),
        event(day(-7_305), "MEDS_BIRTH", None),
        event(day(0), "LAB//creatinine", Some(0.9)),
        event(day(0), "weight", Some(92.13)),
        event(day(0), "weight", Some(92.13)),
        event(day(3), "LAB//creatinine", Some(1.2)),
        event(day(90), "DIAGNOSIS//E11.9", None),
        event(day(90), "LAB//creatinine", Some(1.42)),
        event(day(100), "weight", Some(70.0)),
    ]
}

#[test]
fn a_patient_reads_like_a_short_history() {
    let options = SequenceOptions::default();
    assert_eq!(
        text(history(), 99, &options),
        "20 year old man, smoker. 3 months ago creatinine normal 0.9, weight high 92.1. \
         3 days later creatinine high 1.2. 3 months later type 2 diabetes, \
         creatinine very high 1.42."
    );
}

#[test]
fn nothing_after_the_prediction_time_is_written() {
    let options = SequenceOptions::default();
    let until_90 = text(history(), 90, &options);
    assert!(until_90.ends_with("1.42."), "{until_90}");
    let until_89 = text(history(), 89, &options);
    assert!(until_89.ends_with("creatinine high 1.2."), "{until_89}");
    assert_eq!(text(history(), -1, &options), "19 year old man, smoker.");
    assert_eq!(text(history(), -8_000, &options), "man, smoker.");
}

#[test]
fn numbers_intervals_and_sites_are_written_as_asked() {
    let with = |change: fn(&mut SequenceOptions)| {
        let mut options = SequenceOptions::default();
        change(&mut options);
        let mut events = history();
        for event in &mut events[3..] {
            let site = if event.code.starts_with("LAB") {
                "lab_2"
            } else {
                "register"
            };
            event.site = Some(site.into());
        }
        text(events, 99, &options)
    };
    assert_eq!(
        with(|o| {
            o.numbers = NumberStyle::Word;
            o.intervals = Intervals::Before;
        }),
        "20 year old man, smoker. 3 months ago creatinine normal, weight high. \
         3 months ago creatinine high. 9 days ago type 2 diabetes, creatinine very high."
    );
    assert_eq!(
        with(|o| {
            o.numbers = NumberStyle::Value;
            o.intervals = Intervals::None;
            o.exclude_codes = vec!["weight".into(), "DIAGNOSIS//*".into(), "smoker".into()];
        }),
        "20 year old man. creatinine 0.9. creatinine 1.2. creatinine 1.42."
    );
    assert_eq!(
        with(|o| o.sites = true),
        "20 year old man, smoker. 3 months ago lab 2: creatinine normal 0.9, register: weight \
         high 92.1. 3 days later lab 2: creatinine high 1.2. 3 months later register: type 2 \
         diabetes, lab 2: creatinine very high 1.42."
    );
}

#[test]
fn repeated_codes_can_be_told_once_with_their_direction() {
    let options = SequenceOptions {
        repeat: Repeat::Latest,
        intervals: Intervals::Before,
        ..Default::default()
    };
    assert_eq!(
        text(history(), 99, &options),
        "20 year old man, smoker. 3 months ago weight 2 times high 92.1. 9 days ago type 2 \
         diabetes, creatinine 3 times rising very high 1.42."
    );
    // 70 is less than the mean of the two before by more than a quarter of 25.
    let later = text(history(), 100, &options);
    assert!(
        later.ends_with("now weight 3 times falling normal 70."),
        "{later}"
    );
    let notes = vec![
        note(day(0), "note", "first."),
        event(day(1), "seen", None),
        note(day(2), "note", "second"),
        event(day(3), "seen", None),
    ];
    assert_eq!(
        text(notes, 3, &options),
        "patient. 3 days ago note first. 1 day ago note second. now seen 2 times."
    );
}

#[test]
fn rows_of_one_day_and_code_share_a_description() {
    let hours = |hour: i64| Some(hour * 3_600_000_000);
    let events = vec![
        event(hours(1), "weight", Some(92.0)),
        event(hours(2), "LAB//creatinine", Some(0.9)),
        event(hours(3), "weight", Some(92.0)),
        event(hours(4), "weight", Some(120.0)),
    ];
    let mut options = SequenceOptions::default();
    // Prediction at midnight of the next day.
    assert_eq!(
        text(events.clone(), 1, &options),
        "patient. 1 day ago weight high 92 very high 120, creatinine normal 0.9."
    );
    options.time_resolution = TimeResolution::Hour;
    assert_eq!(
        text(events, 1, &options),
        "patient. 23 hours ago weight high 92. 1 hour later creatinine normal 0.9. 1 hour later \
         weight high 92. 1 hour later weight very high 120."
    );
}

#[test]
fn notes_become_one_line_and_stay_apart() {
    let options = SequenceOptions::default();
    let events = vec![
        note(day(1), "discharge_note", "Doing\n\twell.\u{0}  Home "),
        note(day(1), "discharge_note", "No fever!"),
        note(day(1), "smoking", "current"),
    ];
    assert_eq!(
        text(events, 1, &options),
        "patient. now discharge note Doing well. Home, discharge note No fever! smoking current."
    );
}

#[test]
fn sex_is_found_however_it_is_coded() {
    let options = SequenceOptions::default();
    let header = |events| text(events, 0, &options);
    assert_eq!(header(vec![event(None, "gender//Female", None)]), "woman.");
    assert_eq!(header(vec![note(None, "SEX", "m")]), "man.");
    assert_eq!(
        header(vec![event(None, "SEX//unknown", None)]),
        "patient, SEX unknown."
    );
    assert_eq!(
        header(vec![note(None, "GENDER", "other")]),
        "patient, GENDER other."
    );
    let girl = vec![
        event(day(-4_000), "SEX//F", None),
        event(day(-4_000), "MEDS_BIRTH", None),
    ];
    assert_eq!(header(girl), "10 year old girl.");
    let boy = vec![
        event(None, "SEX//M", None),
        event(day(-300), "MEDS_BIRTH", None),
    ];
    assert_eq!(header(boy), "9 month old boy.");
}

#[test]
fn a_code_without_words_is_still_an_event() {
    let options = SequenceOptions::default();
    let events = vec![
        event(day(0), "__", None),
        event(day(0), "", Some(1.0)),
        event(day(0), "a//b_c", Some(f32::NAN)),
    ];
    assert_eq!(
        text(events, 0, &options),
        "patient. now __, event 1, a b c."
    );
}

proptest! {
    #[test]
    fn units_are_in_time_order_and_nothing_later_is_looked_at(
        patient in any_patient(),
        prediction_day in -10_000i64..11_000,
        latest: bool,
        sites: bool,
    ) {
        let options = SequenceOptions {
            repeat: if latest { Repeat::Latest } else { Repeat::All },
            sites,
            ..Default::default()
        };
        let prediction_time_us = prediction_day * DAY_US;
        let (codes, statistics) = (CodeTable::default(), statistics());
        let mut renderer = Renderer::new(&codes, &statistics, &options);
        let rendered = renderer.render(&patient, prediction_time_us);
        for pair in rendered.units.windows(2) {
            prop_assert!(pair[0].time_us <= pair[1].time_us);
            prop_assert!(pair[0].group <= pair[1].group);
        }
        prop_assert!(rendered.units.iter().all(|unit| unit.time_us <= prediction_time_us));

        // Whatever comes later, the text is the same.
        let mut future = patient.clone();
        future.events.retain(|event| event.time_us.is_none_or(|time| time <= prediction_time_us));
        prop_assert_eq!(&renderer.render(&future, prediction_time_us), &rendered);
        future.events.push(event(Some(prediction_time_us + 1), "MEDS_BIRTH", None));
        future.events.push(event(Some(prediction_time_us + 1), "GENDER//F", None));
        future.events.push(note(Some(prediction_time_us + 1), "weight", "secret"));
        prop_assert_eq!(&renderer.render(&future, prediction_time_us), &rendered);

        // Every visible row is in exactly one unit.
        let rows: u32 = rendered.units.iter().map(|unit| unit.rows).sum();
        let visible = patient.events_until(prediction_time_us).iter();
        let dated = visible.filter(|event| event.time_us.is_some() && &*event.code != "MEDS_BIRTH");
        prop_assert_eq!(rows as usize, dated.count());

        let text = text_of(&rendered, &options);
        prop_assert!(!text.contains("  ") && !text.starts_with(' ') && !text.ends_with(' '));
    }
}
