use std::fs;

use proptest::prelude::*;
use serde::Deserialize;

use super::super::waveform::decode_waveform;
use super::*;

#[derive(Deserialize)]
struct Reference {
    records: Vec<Record>,
}

/// What wfdb-python reads, leads at their own rates.
#[derive(Deserialize)]
struct Record {
    name: String,
    signals: Vec<ReferenceSignal>,
}

#[derive(Deserialize)]
struct ReferenceSignal {
    name: Option<String>,
    rate_hz: f64,
    values: Vec<Option<f64>>,
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn references() -> Vec<Record> {
    let text = fs::read_to_string(fixtures().join("wfdb.json")).unwrap();
    serde_json::from_str::<Reference>(&text).unwrap().records
}

/// Options that change nothing.
fn raw() -> WaveformOptions {
    WaveformOptions {
        max_seconds: 3600.0,
        ..WaveformOptions::default()
    }
}

fn problem(error: RecordsError) -> String {
    match error {
        RecordsError::Item { problem, .. } => problem,
        other => panic!("{other}"),
    }
}

/// A copy of a fixture's files that may be damaged.
fn copy(names: &[&str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in names {
        fs::copy(fixtures().join("wfdb").join(name), folder.path().join(name)).unwrap();
    }
    folder
}

#[test]
fn every_format_and_layout_reads_as_in_wfdb_python() {
    let records = references();
    assert_eq!(records.len(), 18);
    for record in records {
        let path = fixtures().join("wfdb").join(format!("{}.hea", record.name));
        let recording = read(&path, &raw()).unwrap();
        assert_eq!(
            recording.leads.len(),
            record.signals.len(),
            "{}",
            record.name
        );
        for (lead, expected) in recording.leads.iter().zip(&record.signals) {
            let name = format!("{}, {:?}", record.name, expected.name);
            assert_eq!(lead.rate_hz, expected.rate_hz, "{name}");
            let seconds = expected.values.len() as f64 / expected.rate_hz;
            assert!((recording.kept_s - seconds).abs() < 1e-9, "{name}");
            assert!((recording.length_s - seconds).abs() < 1e-9, "{name}");
            // A lead that is nowhere has no values, and is missing once it is resampled.
            if !lead.values.is_empty() {
                assert_eq!(lead.values.len(), expected.values.len(), "{name}");
            }
            for (index, expected) in expected.values.iter().enumerate() {
                let found = lead.values.get(index).copied().unwrap_or(f64::NAN);
                match expected {
                    // The file has nine digits.
                    Some(expected) => {
                        let error = (found - expected).abs();
                        assert!(error <= 1e-8 * expected.abs(), "{name}, {index}: {found}");
                    }
                    None => assert!(found.is_nan(), "{name}, {index}: {found}"),
                }
            }
        }
    }
}

#[test]
fn leads_are_chosen_by_name_and_in_order() {
    let options = WaveformOptions {
        leads: Some(vec!["V5".into(), "MLII".into()]),
        ..raw()
    };
    let path = fixtures().join("wfdb/format16.hea");
    let (turned, plain) = (read(&path, &options).unwrap(), read(&path, &raw()).unwrap());
    assert_eq!(turned.leads[0].values[..50], plain.leads[1].values[..50]);
    assert_eq!(turned.leads[1].values[..50], plain.leads[0].values[..50]);
    let options = WaveformOptions {
        leads: Some(vec!["V6".into()]),
        ..raw()
    };
    let found = problem(read(&path, &options).err().unwrap());
    assert_eq!(found, "there is no lead `V6`, only `MLII`, `V5`");
}

#[test]
fn a_limit_cuts_and_says_so() {
    let whole = read(&fixtures().join("wfdb/rates.hea"), &raw()).unwrap();
    let options = WaveformOptions {
        max_seconds: 0.1,
        ..raw()
    };
    for name in [
        "rates",
        "variable",
        "fixed",
        "skewed",
        "unmeasured",
        "format516",
    ] {
        let path = fixtures().join("wfdb").join(format!("{name}.hea"));
        let (cut, whole) = (read(&path, &options).unwrap(), read(&path, &raw()).unwrap());
        assert!((cut.kept_s - 0.1).abs() < 1e-9, "{name}");
        assert_eq!(cut.length_s, whole.length_s, "{name}");
        for (cut, whole) in cut.leads.iter().zip(&whole.leads) {
            let samples = (0.1 * whole.rate_hz).round() as usize;
            assert!(
                cut.values.len() == samples || cut.values.is_empty(),
                "{name}"
            );
            for (cut, whole) in cut.values.iter().zip(&whole.values) {
                assert!(cut == whole || cut.is_nan() && whole.is_nan(), "{name}");
            }
        }
    }
    assert_eq!(whole.leads[0].values.len(), 480);
}

#[test]
fn a_changed_sample_breaks_the_checksum() {
    for format in ["16", "212", "8", "24", "310"] {
        let (header, data) = (format!("format{format}.hea"), format!("format{format}.dat"));
        let folder = copy(&[&header, &data]);
        let path = folder.path().join(&data);
        let mut bytes = fs::read(&path).unwrap();
        bytes[30] ^= 0x02;
        fs::write(&path, bytes).unwrap();
        // Also where the damage lies behind the limit.
        let options = WaveformOptions {
            max_seconds: 0.01,
            ..raw()
        };
        let error = read(&folder.path().join(&header), &options).err().unwrap();
        assert!(error.to_string().contains(&data), "{error}");
        assert!(problem(error).contains("checksum of `"), "{format}");
    }
}

#[test]
fn a_truncated_file_is_named() {
    for (name, by) in [
        ("format16", 1),
        ("format212", 2),
        ("format311", 4),
        ("format80", 300),
    ] {
        let (header, data) = (format!("{name}.hea"), format!("{name}.dat"));
        let folder = copy(&[&header, &data]);
        let path = folder.path().join(&data);
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() - by]).unwrap();
        let error = read(&folder.path().join(&header), &raw()).err().unwrap();
        assert!(error.to_string().contains(&data), "{error}");
        assert!(problem(error).contains("of the 301 frames"), "{name}");
    }
    let folder = copy(&["format516.hea", "format516.dat"]);
    let path = folder.path().join("format516.dat");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let error = read(&folder.path().join("format516.hea"), &raw())
        .err()
        .unwrap();
    assert!(error.to_string().contains("format516.dat"), "{error}");
}

#[test]
fn files_that_are_not_there_or_elsewhere_are_refused() {
    let folder = copy(&["format16.hea"]);
    let error = read(&folder.path().join("format16.hea"), &raw())
        .err()
        .unwrap();
    assert!(error.to_string().contains("format16.dat"), "{error}");
    assert!(problem(error).contains("no such file"));
    for name in ["../format16.dat", "/etc/passwd", "a\\b", ".", ".."] {
        let header = folder.path().join("elsewhere.hea");
        fs::write(&header, format!("elsewhere 1 360 10\n{name} 16 200\n")).unwrap();
        let found = problem(read(&header, &raw()).err().unwrap());
        assert!(found.contains("does not lie beside it"), "{name}: {found}");
    }
}

#[test]
fn headers_that_cannot_be_followed_are_refused() {
    let folder = copy(&["format16.hea", "format16.dat", "piece_1.hea", "piece_1.dat"]);
    for (text, expected) in [
        ("x 1 360 10\nformat16.dat 7 200\n", "signal format 7"),
        (
            "x 2 360 10\nformat16.dat 16\nformat16.dat 80\n",
            "two formats",
        ),
        (
            "x 1 360 1000000000000\nformat16.dat 16\n",
            "of the 1000000000000 frames",
        ),
        ("x 1 360 10\nformat16.dat 16+100000\n", "holds 0 of the 10"),
        ("x 1 360 1\nformat16.dat 508\n", "FLAC"),
        ("x/2 2 360 20\n~ 10\n~ 10\n", "no segment"),
        ("x/2 2 360 90\npiece_1 90\n~ 10\n", "length is not the one"),
        ("x/2 2 100 200\npiece_1 100\n~ 10\n", "rates are not those"),
        ("x/2 2 360 200\nx 100\n~ 10\n", "has segments itself"),
        (
            "x/2 2 360 200\npiece_1 100\n~ 1000000000000\n",
            "within `max_seconds`",
        ),
        ("x/2 2 360 200\npiece_9 100\n~ 10\n", "no such file"),
    ] {
        let header = folder.path().join("x.hea");
        fs::write(&header, text).unwrap();
        let options = WaveformOptions {
            max_seconds: 1e12,
            ..raw()
        };
        let found = problem(read(&header, &options).err().unwrap());
        assert!(found.contains(expected), "{text}: {found}");
    }
}

#[test]
fn a_record_of_nothing_is_an_error() {
    let folder = copy(&["variable_layout.hea"]);
    let text = "x 1 360 100\n~ 0 200 0 0 0 0 0 RESP\n";
    fs::write(folder.path().join("x.hea"), text).unwrap();
    let error = decode_waveform(&folder.path().join("x"), &raw()).unwrap_err();
    assert!(problem(error).contains("no value"));
}

fn words() -> impl Strategy<Value = String> {
    prop_oneof![
        Just("a.dat".to_string()),
        Just("b.dat".to_string()),
        Just("~".to_string()),
        Just("r/2".to_string()),
        Just("x 0".to_string()),
        (0u32..600).prop_map(|code| code.to_string()),
        prop_oneof![Just(8), Just(16), Just(212), Just(310), Just(516)].prop_flat_map(|code| (
            0u32..9,
            0u32..9,
            0u32..40
        )
            .prop_map(move |(x, skew, plus)| { format!("{code}x{x}:{skew}+{plus}") })),
        any::<f64>().prop_map(|number| number.to_string()),
        any::<i64>().prop_map(|number| format!("{number}({number})/mV")),
        "[ -~]{0,8}",
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever the bytes, there is a waveform or an error, and never an infinite value.
    #[test]
    fn random_records_never_panic(
        lines in prop::collection::vec(prop::collection::vec(words(), 0..8), 0..5),
        a in prop::collection::vec(any::<u8>(), 0..300),
        b in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let text: Vec<String> = lines.iter().map(|words| words.join(" ")).collect();
        fs::write(folder.path().join("r.hea"), text.join("\n")).unwrap();
        fs::write(folder.path().join("a.dat"), a).unwrap();
        fs::write(folder.path().join("b.dat"), b).unwrap();
        if let Ok(decoded) = decode_waveform(&folder.path().join("r"), &raw()) {
            prop_assert_eq!(decoded.shape.iter().product::<usize>(), decoded.values.len());
            prop_assert!(decoded.values.iter().all(|value| !value.is_infinite()));
        }
    }

    /// A sound record with some bytes changed, in header and data.
    #[test]
    fn damaged_records_never_panic(
        code in prop::sample::select(vec!["8", "16", "212", "310", "516", "24"]),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 1..6),
    ) {
        let (header, data) = (format!("format{code}.hea"), format!("format{code}.dat"));
        let folder = copy(&[&header, &data]);
        for (place, byte, in_header) in changes {
            let path = folder.path().join(if in_header { &header } else { &data });
            let mut bytes = fs::read(&path).unwrap();
            let place = place.index(bytes.len());
            bytes[place] = byte;
            fs::write(&path, bytes).unwrap();
        }
        if let Ok(decoded) = decode_waveform(&folder.path().join(&header), &raw()) {
            prop_assert!(decoded.values.iter().all(|value| !value.is_infinite()));
        }
    }
}
