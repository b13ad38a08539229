use std::fs;
use std::sync::Arc;

use arrow_array::{ArrayRef, Float32Array, Int64Array, StringArray, TimestampMicrosecondArray};
use parquet::arrow::ArrowWriter;
use proptest::prelude::*;

use super::*;

fn problem(error: RecordsError) -> String {
    match error {
        RecordsError::Item { problem, .. } => problem,
        other => panic!("{other}"),
    }
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/wfdb")
        .join(name)
}

/// Reads a text table with the options; the rows are 10 a second unless a time column says else.
fn text(content: &str, options: WaveformOptions) -> Result<Decoded, RecordsError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table.csv");
    fs::write(&path, content).unwrap();
    decode_waveform(&path, &options)
}

fn at_10_hz() -> WaveformOptions {
    WaveformOptions {
        rate_hz: 10.0,
        source_rate_hz: Some(10.0),
        ..WaveformOptions::default()
    }
}

fn timed() -> WaveformOptions {
    WaveformOptions {
        rate_hz: 10.0,
        time_column: Some("time".into()),
        ..WaveformOptions::default()
    }
}

fn leads(names: &[&str]) -> Option<Vec<String>> {
    Some(names.iter().map(|name| name.to_string()).collect())
}

fn parquet(columns: Vec<(&str, ArrayRef)>) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table.parquet");
    let batch = arrow_array::RecordBatch::try_from_iter_with_nullable(
        columns
            .into_iter()
            .map(|(name, column)| (name, column, true)),
    )
    .unwrap();
    let file = fs::File::create(&path).unwrap();
    let mut writer = ArrowWriter::try_new(file, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    (folder, path)
}

/// Values with NaN spelled out, so that they can be compared.
fn spelled(values: &[f32]) -> Vec<String> {
    values.iter().map(|value| value.to_string()).collect()
}

#[test]
fn a_record_is_named_with_or_without_its_ending() {
    let options = WaveformOptions::default();
    let with = decode_waveform(&fixture("format16.hea"), &options).unwrap();
    let without = decode_waveform(&fixture("format16"), &options).unwrap();
    // 301 samples at 360 Hz are 209.03 at 250 Hz.
    assert_eq!(with.shape, [2, 210]);
    assert_eq!(with.cut_s, 0.0);
    assert_eq!(spelled(&with.values), spelled(&without.values));
    // Ten missing samples of the first lead, one (bridged) of the second.
    let missing = |lead: usize| {
        with.values[lead * 210..][..210]
            .iter()
            .filter(|v| v.is_nan())
            .count()
    };
    assert!((5..=8).contains(&missing(0)), "{}", missing(0));
    assert_eq!(missing(1), 0);
}

#[test]
fn leads_of_several_rates_come_out_at_one() {
    let options = WaveformOptions {
        rate_hz: 500.0,
        ..WaveformOptions::default()
    };
    let decoded = decode_waveform(&fixture("rates"), &options).unwrap();
    assert_eq!(decoded.shape, [3, 240]);
    assert!(decoded.values.iter().all(|value| value.is_finite()));
}

#[test]
fn a_limit_cuts_the_end_and_says_how_much() {
    let options = WaveformOptions {
        max_seconds: 0.25,
        ..WaveformOptions::default()
    };
    let decoded = decode_waveform(&fixture("format16"), &options).unwrap();
    assert_eq!(decoded.shape, [2, 63]);
    assert!(
        (decoded.cut_s - (301.0 / 360.0 - 0.25)).abs() < 1e-9,
        "{}",
        decoded.cut_s
    );
    let rows: String = (0..50).map(|row| format!("{}\n", row % 7)).collect();
    let decoded = text(
        &format!("x\n{rows}"),
        WaveformOptions {
            max_seconds: 3.0,
            ..at_10_hz()
        },
    )
    .unwrap();
    assert_eq!(decoded.shape, [1, 30]);
    assert!((decoded.cut_s - 2.0).abs() < 1e-9);
    assert_eq!(decoded.values[8], 1.0);
}

#[test]
fn text_of_every_separator() {
    for separator in [",", ";", "\t", "|"] {
        let content = [
            "\u{feff}a",
            "\"b, c\"",
            "d\n1",
            "2",
            "3\n4",
            "",
            "6\r\n7",
            "NaN",
            "9\n",
        ]
        .join(separator);
        let decoded = text(&content, at_10_hz()).unwrap();
        assert_eq!(decoded.shape, [3, 3], "{separator:?}");
        let expected = ["1", "4", "7", "2", "NaN", "NaN", "3", "6", "9"];
        assert_eq!(spelled(&decoded.values), expected, "{separator:?}");
        let chosen = text(
            &content,
            WaveformOptions {
                leads: leads(&["d", "a"]),
                ..at_10_hz()
            },
        )
        .unwrap();
        assert_eq!(spelled(&chosen.values), ["3", "6", "9", "1", "4", "7"]);
    }
}

#[test]
fn a_single_column_needs_no_separator() {
    assert_eq!(text("x\n1\n2\n3\n", at_10_hz()).unwrap().shape, [1, 3]);
}

#[test]
fn columns_that_are_not_chosen_may_hold_anything() {
    let content = "timestamp,activity\n2003-05-07 12:00:00,0\n2003-05-07 12:01:00,143\n";
    let options = WaveformOptions {
        rate_hz: 1.0 / 60.0,
        source_rate_hz: Some(1.0 / 60.0),
        max_seconds: 86400.0,
        leads: leads(&["activity"]),
        ..WaveformOptions::default()
    };
    let decoded = text(content, options.clone()).unwrap();
    assert_eq!(
        (decoded.shape, decoded.values),
        (vec![1, 2], vec![0.0, 143.0])
    );
    let error = text(
        content,
        WaveformOptions {
            leads: None,
            ..options
        },
    )
    .unwrap_err();
    // The value itself is not told.
    assert_eq!(
        problem(error),
        "column `timestamp` holds something other than a number in row 0"
    );
}

#[test]
fn rows_stand_where_their_times_say() {
    let content = "time,x\n5.0,1\n5.1,2\n5.2,3\n5.6,7\n5.7,8\n";
    let decoded = text(content, timed()).unwrap();
    assert_eq!(
        spelled(&decoded.values),
        ["1", "2", "3", "NaN", "NaN", "NaN", "7", "8"]
    );
    let cut = text(
        content,
        WaveformOptions {
            max_seconds: 0.3,
            ..timed()
        },
    )
    .unwrap();
    assert_eq!(spelled(&cut.values), ["1", "2", "3"]);
    assert!((cut.cut_s - 0.5).abs() < 1e-6, "{}", cut.cut_s);
}

#[test]
fn times_rounded_to_milliseconds_give_the_true_rate() {
    let rows: String = (0..3600)
        .map(|row| format!("{:.3},{}\n", row as f64 / 360.0, row % 11))
        .collect();
    let decoded = text(
        &format!("time,x\n{rows}"),
        WaveformOptions {
            rate_hz: 360.0,
            ..timed()
        },
    )
    .unwrap();
    assert_eq!(decoded.shape, [1, 3600]);
    assert!(decoded.values.iter().all(|value| value.is_finite()));
}

#[test]
fn times_that_make_no_signal_are_refused() {
    for (rows, expected) in [
        ("1,1\n1,2\n", "row 1 is no later"),
        ("2,1\n1,2\n", "row 1 is no later"),
        ("1,1\n,2\n", "no time in row 1"),
        ("1,1\n", "one row"),
        (
            "0,1\n1,2\n1.1,3\n3,5\n3.1,5\n3.2,1\n5,2\n8,3\n",
            "not evenly spaced",
        ),
    ] {
        let found = problem(text(&format!("time,x\n{rows}"), timed()).unwrap_err());
        assert!(found.contains(expected), "{rows:?}: {found}");
    }
    let options = WaveformOptions {
        source_rate_hz: Some(1.0),
        ..timed()
    };
    let found = problem(text("time,x\n0,1\n0.1,2\n", options).unwrap_err());
    assert!(found.contains("same sample"), "{found}");
}

#[test]
fn tables_that_are_no_signal_are_refused() {
    for (content, options, expected) in [
        ("", at_10_hz(), "empty"),
        ("x\n", at_10_hz(), "no rows"),
        ("1,2\n3,4\n", at_10_hz(), "names of columns"),
        ("x,y\n1,2\n3\n", at_10_hz(), "line 3 has 1 fields"),
        (
            "x\n1\nlots\n",
            at_10_hz(),
            "column `x` holds something other",
        ),
        (
            "x\n1\ninf\n",
            at_10_hz(),
            "column `x` holds something other",
        ),
        ("x\n1\n1\n1\n", at_10_hz(), "constant"),
        ("x\n0\n0\n", at_10_hz(), "constant"),
        ("x,y\nNA,\nnull,n/a\n", at_10_hz(), "no value"),
        (
            "x\n1\n2\n",
            WaveformOptions::default(),
            "how many rows a second",
        ),
        ("x\n1\n2\n", timed(), "no column `time`"),
        ("time\n1\n2\n", timed(), "no column beside"),
        (
            "x\n1\n2\n",
            WaveformOptions {
                leads: leads(&["y"]),
                ..at_10_hz()
            },
            "there is no lead `y`, only `x`",
        ),
        (
            "x\n1\n2\n",
            WaveformOptions {
                rate_hz: 1e5,
                max_seconds: 1.0,
                ..at_10_hz()
            },
            "differ by more than 1000",
        ),
        ("x\n1e39\n2\n", at_10_hz(), "too large for 32 bits"),
    ] {
        let found = problem(text(content, options).unwrap_err());
        assert!(found.contains(expected), "{content:?}: {found}");
    }
}

#[test]
fn a_flat_lead_beside_a_live_one_stays() {
    let decoded = text("x,y\n1,0\n2,0\n", at_10_hz()).unwrap();
    assert_eq!(decoded.values, [1.0, 2.0, 0.0, 0.0]);
}

#[test]
fn parquet_columns_of_any_number_type() {
    let (_folder, path) = parquet(vec![
        ("note", Arc::new(StringArray::from(vec!["a", "b", "c"]))),
        (
            "x",
            Arc::new(Float32Array::from(vec![Some(0.5), None, Some(2.5)])),
        ),
        ("n", Arc::new(Int64Array::from(vec![1, 2, 3]))),
    ]);
    let options = WaveformOptions {
        leads: leads(&["n", "x"]),
        ..at_10_hz()
    };
    let decoded = decode_waveform(&path, &options).unwrap();
    assert_eq!(decoded.shape, [2, 3]);
    assert_eq!(
        spelled(&decoded.values),
        ["1", "2", "3", "0.5", "NaN", "2.5"]
    );
    let found = problem(decode_waveform(&path, &at_10_hz()).unwrap_err());
    assert_eq!(found, "column `note` is string");
}

#[test]
fn parquet_timestamps_place_rows() {
    let (_folder, path) = parquet(vec![
        (
            "time",
            Arc::new(TimestampMicrosecondArray::from(vec![
                1_700_000_000_000_000,
                1_700_000_000_100_000,
                1_700_000_000_300_000,
                1_700_000_000_400_000,
            ])),
        ),
        ("x", Arc::new(Int64Array::from(vec![1, 2, 4, 5]))),
    ]);
    let decoded = decode_waveform(&path, &timed()).unwrap();
    assert_eq!(spelled(&decoded.values), ["1", "2", "NaN", "4", "5"]);
}

#[test]
fn damaged_parquet_is_an_item_error() {
    let (_folder, path) = parquet(vec![("x", Arc::new(Int64Array::from(vec![1, 2, 4, 5])))]);
    let bytes = fs::read(&path).unwrap();
    for end in [4, 5, bytes.len() / 2, bytes.len() - 1] {
        fs::write(&path, &bytes[..end]).unwrap();
        let found = problem(decode_waveform(&path, &at_10_hz()).unwrap_err());
        assert!(found.contains("Parquet"), "{end}: {found}");
    }
}

#[test]
fn files_of_no_known_kind_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    for (name, content, expected) in [
        ("a.dat", &b"1234"[..], "not a kind of waveform"),
        ("a", b"", "not a kind of waveform"),
        ("a.parquet", b"nothing", "not a Parquet file"),
    ] {
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        let error = decode_waveform(&path, &at_10_hz()).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
        let found = problem(error);
        assert!(found.contains(expected), "{name}: {found}");
    }
    for name in ["missing", "missing.csv", "missing.hea", ""] {
        let found = problem(decode_waveform(&folder.path().join(name), &at_10_hz()).unwrap_err());
        assert!(found.contains("no such file"), "{name}: {found}");
    }
}

#[test]
fn options_that_cannot_be_are_told() {
    let plain = WaveformOptions::default();
    assert_eq!(plain.problem(), None);
    for (options, expected) in [
        (
            WaveformOptions {
                rate_hz: 0.0,
                ..plain.clone()
            },
            "`rate_hz`",
        ),
        (
            WaveformOptions {
                rate_hz: f64::NAN,
                ..plain.clone()
            },
            "`rate_hz`",
        ),
        (
            WaveformOptions {
                max_seconds: -1.0,
                ..plain.clone()
            },
            "`max_seconds`",
        ),
        (
            WaveformOptions {
                max_seconds: 1e12,
                ..plain.clone()
            },
            "more than",
        ),
        (
            WaveformOptions {
                source_rate_hz: Some(0.0),
                ..plain.clone()
            },
            "`source_rate_hz`",
        ),
        (
            WaveformOptions {
                leads: leads(&[]),
                ..plain.clone()
            },
            "at least one",
        ),
        (
            WaveformOptions {
                leads: leads(&["a", "b", "a"]),
                ..plain.clone()
            },
            "`a` twice",
        ),
    ] {
        assert!(options.problem().unwrap().contains(expected), "{options:?}");
        let error = decode_waveform(&fixture("format16"), &options).unwrap_err();
        assert!(problem(error).contains(expected));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn random_tables_never_panic(
        content in prop_oneof![
            "[-0-9.,;eE \"\n\tNa]{0,200}",
            ".{0,100}",
            prop::collection::vec("-?[0-9]{1,3}(\\.[0-9])?,[0-9]{0,2}", 0..30)
                .prop_map(|rows| format!("time,x\n{}\n", rows.join("\n"))),
        ],
        with_time in any::<bool>(),
    ) {
        let options = if with_time { timed() } else { at_10_hz() };
        if let Ok(decoded) = text(&content, options) {
            prop_assert_eq!(decoded.shape.iter().product::<usize>(), decoded.values.len());
            prop_assert!(decoded.values.iter().all(|value| !value.is_infinite()));
        }
    }

    #[test]
    fn random_bytes_never_panic(
        extension in prop::sample::select(vec!["csv", "parquet", "hea", "tsv"]),
        start in prop::sample::select(vec![&b""[..], b"PAR1"]),
        bytes in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(format!("x.{extension}"));
        fs::write(&path, [start, &bytes, start].concat()).unwrap();
        let _ = decode_waveform(&path, &at_10_hz());
    }
}
