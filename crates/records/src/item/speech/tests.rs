use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;

use super::*;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

#[derive(Deserialize)]
struct Reference {
    signals: BTreeMap<String, Vec<i16>>,
    cases: Vec<Case>,
    mp3: Mp3,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    frames: Vec<(usize, Vec<f32>)>,
}

/// What another decoder (mpg123) and Transformers make of the MP3.
#[derive(Deserialize)]
struct Mp3 {
    samples: usize,
    frames: Vec<(usize, Vec<f32>)>,
}

fn reference() -> Reference {
    serde_json::from_str(&fs::read_to_string(fixture("mel.json")).unwrap()).unwrap()
}

fn chirp() -> Vec<i16> {
    reference().signals.remove("chirp").unwrap()
}

fn unpadded() -> SpeechOptions {
    SpeechOptions {
        pad_to_max: false,
        ..SpeechOptions::default()
    }
}

fn problem(error: RecordsError) -> String {
    match error {
        RecordsError::Item { problem, .. } => problem,
        other => panic!("{other}"),
    }
}

/// A RIFF file of interleaved samples of so many bits (PCM; 32: float).
fn wav(samples: &[f64], channels: u16, rate_hz: u32, bits: u16) -> Vec<u8> {
    let mut data = Vec::new();
    for sample in samples {
        match bits {
            8 => data.push((sample * 128.0 + 128.0).round().clamp(0.0, 255.0) as u8),
            16 => data.extend(((sample * 32768.0).round() as i16).to_le_bytes()),
            24 => data.extend(&((sample * 8388608.0).round() as i32).to_le_bytes()[..3]),
            _ => data.extend((*sample as f32).to_le_bytes()),
        }
    }
    let format: u16 = if bits == 32 { 3 } else { 1 };
    let mut file = Vec::new();
    file.extend(b"RIFF");
    file.extend((36 + data.len() as u32).to_le_bytes());
    file.extend(b"WAVEfmt ");
    file.extend(16u32.to_le_bytes());
    file.extend(format.to_le_bytes());
    file.extend(channels.to_le_bytes());
    file.extend(rate_hz.to_le_bytes());
    file.extend((rate_hz * u32::from(channels * bits / 8)).to_le_bytes());
    file.extend((channels * bits / 8).to_le_bytes());
    file.extend(bits.to_le_bytes());
    file.extend(b"data");
    file.extend((data.len() as u32).to_le_bytes());
    file.extend(data);
    file
}

fn decode(bytes: &[u8], name: &str, options: &SpeechOptions) -> Result<Decoded, RecordsError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    fs::write(&path, bytes).unwrap();
    decode_speech(&path, options)
}

fn chirp_wav(bits: u16) -> Vec<u8> {
    let samples: Vec<f64> = chirp().iter().map(|&s| f64::from(s) / 32768.0).collect();
    wav(&samples, 1, 16000, bits)
}

fn tone(hz: f64, seconds: f64, rate_hz: u32) -> Vec<f64> {
    (0..(seconds * f64::from(rate_hz)) as usize)
        .map(|index| 0.5 * (std::f64::consts::TAU * hz * index as f64 / f64::from(rate_hz)).sin())
        .collect()
}

/// Largest difference over the reference's frames, in steps of a decade / 4.
fn worst(found: &Decoded, frames: &[(usize, Vec<f32>)]) -> f32 {
    let mut worst: f32 = 0.0;
    for (frame, expected) in frames {
        for (bin, expected) in expected.iter().enumerate() {
            let value = found.values[bin * found.shape[1] + frame];
            worst = worst.max((value - expected).abs());
        }
    }
    worst
}

#[test]
fn a_wav_file_gives_whispers_features() {
    let reference = reference();
    let case = |name: &str| {
        reference
            .cases
            .iter()
            .find(|case| case.name == name)
            .unwrap()
    };
    let found = decode(&chirp_wav(16), "a.wav", &unpadded()).unwrap();
    assert_eq!(found.shape, [80, 40]);
    assert!(worst(&found, &case("a chirp").frames) < 2e-6);
    let padded = decode(&chirp_wav(16), "a.wav", &SpeechOptions::default()).unwrap();
    assert_eq!(padded.shape, [80, 3000]);
    assert_eq!(padded.cut_s, 0.0);
    assert!(worst(&padded, &case("a chirp in 30 s").frames) < 2e-6);
}

#[test]
fn flac_is_lossless_and_widths_hardly_matter() {
    let plain = decode(&chirp_wav(16), "a.wav", &unpadded()).unwrap();
    let flac = decode_speech(&fixture("mel_chirp.flac"), &unpadded()).unwrap();
    assert_eq!(flac, plain);
    // Whatever the name says.
    let renamed = decode(
        &fs::read(fixture("mel_chirp.flac")).unwrap(),
        "a.wav",
        &unpadded(),
    );
    assert_eq!(renamed.unwrap(), plain);
    for bits in [24, 32] {
        assert_eq!(
            decode(&chirp_wav(bits), "a.wav", &unpadded()).unwrap(),
            plain,
            "{bits}"
        );
    }
    // 8 bits hear less: the loudest value still is what it was.
    let coarse = decode(&chirp_wav(8), "a.wav", &unpadded()).unwrap();
    let loudest = |decoded: &Decoded| decoded.values.iter().copied().fold(f32::MIN, f32::max);
    assert!((loudest(&coarse) - loudest(&plain)).abs() < 1e-3);
}

#[test]
fn mp3_is_decoded_as_elsewhere() {
    let reference = reference().mp3;
    let found = decode_speech(&fixture("mel_chirp.mp3"), &unpadded()).unwrap();
    // The encoder's delay and padding are taken off.
    assert_eq!(found.shape, [80, reference.samples / 160]);
    // Decoders may round to 24 bits or so.
    let worst = worst(&found, &reference.frames);
    assert!(worst < 1e-3, "{worst}");
}

#[test]
fn channels_are_mixed_to_their_mean() {
    let left = tone(440.0, 0.5, 16000);
    let mono = decode(&wav(&left, 1, 16000, 32), "a.wav", &unpadded()).unwrap();
    let stereo: Vec<f64> = left.iter().flat_map(|&s| [1.5 * s, 0.5 * s]).collect();
    let mixed = decode(&wav(&stereo, 2, 16000, 32), "a.wav", &unpadded()).unwrap();
    for (mixed, mono) in mixed.values.iter().zip(&mono.values) {
        assert!((mixed - mono).abs() < 1e-4);
    }
    let opposed: Vec<f64> = left.iter().flat_map(|&s| [s, -s]).collect();
    let error = decode(&wav(&opposed, 2, 16000, 32), "a.wav", &unpadded()).unwrap_err();
    assert!(problem(error).contains("silent"));
}

#[test]
fn other_rates_hear_the_same() {
    let expected = decode(
        &wav(&tone(1000.0, 1.0, 16000), 1, 16000, 16),
        "a.wav",
        &unpadded(),
    )
    .unwrap();
    for rate_hz in [8000, 11025, 22050, 44100, 48000] {
        let sound = wav(&tone(1000.0, 1.0, rate_hz), 1, rate_hz, 16);
        let found = decode(&sound, "a.wav", &unpadded()).unwrap();
        assert_eq!(found.shape, expected.shape, "{rate_hz}");
        // The tone's own bins, away from the ends.
        for bin in 23..28 {
            for frame in 20..80 {
                let (found, expected) = (
                    found.values[bin * 100 + frame],
                    expected.values[bin * 100 + frame],
                );
                if expected > 0.5 {
                    assert!(
                        (found - expected).abs() < 0.01,
                        "{rate_hz}: {found} for {expected}"
                    );
                }
            }
        }
    }
}

#[test]
fn what_is_too_long_is_cut() {
    let sound = wav(&tone(300.0, 2.5, 8000), 1, 8000, 16);
    let options = SpeechOptions {
        max_seconds: 2.0,
        ..SpeechOptions::default()
    };
    let found = decode(&sound, "a.wav", &options).unwrap();
    assert_eq!(found.shape, [80, 200]);
    assert!((found.cut_s - 0.5).abs() < 1e-9, "{}", found.cut_s);
    let bins = SpeechOptions {
        mel_bins: 128,
        ..options
    };
    assert_eq!(decode(&sound, "a.wav", &bins).unwrap().shape, [128, 200]);
}

#[test]
fn a_stream_without_a_length_is_read_to_its_end() {
    let mut sound = chirp_wav(16);
    let plain = decode(&sound, "a.wav", &unpadded()).unwrap();
    sound[4..8].fill(0xff);
    sound[40..44].fill(0xff);
    assert_eq!(decode(&sound, "a.wav", &unpadded()).unwrap(), plain);
}

#[test]
fn recordings_that_say_nothing_are_refused() {
    for (sound, expected) in [
        (wav(&[0.0; 1600], 1, 16000, 16), "silent"),
        (wav(&[0.25; 1600], 1, 16000, 16), "silent"),
        (wav(&[0.0; 1600], 1, 16000, 8), "silent"),
        (wav(&[], 1, 16000, 16), "silent"),
        (
            wav(&tone(440.0, 0.005, 16000), 1, 16000, 16),
            "shorter than one frame",
        ),
        (wav(&[f64::NAN; 1600], 1, 16000, 32), "no numbers"),
        (wav(&[0.5, f64::INFINITY], 1, 16000, 32), "no numbers"),
    ] {
        let found = problem(decode(&sound, "a.wav", &unpadded()).unwrap_err());
        assert!(found.contains(expected), "{found}");
    }
}

#[test]
fn damaged_recordings_are_refused() {
    let sound = chirp_wav(16);
    let flac = fs::read(fixture("mel_chirp.flac")).unwrap();
    let mp3 = fs::read(fixture("mel_chirp.mp3")).unwrap();
    for (name, bytes) in [
        ("half.wav", &sound[..sound.len() / 2]),
        ("short.wav", &sound[..sound.len() - 2]),
        ("head.wav", &sound[..20]),
        ("half.flac", &flac[..flac.len() / 2]),
        ("head.flac", &flac[..30]),
        ("half.mp3", &mp3[..mp3.len() / 2]),
        ("empty.wav", &[]),
        ("text.mp3", b"not a recording"),
    ] {
        let error = decode(bytes, name, &unpadded()).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
        problem(error);
    }
    let mut changed = flac.clone();
    let middle = changed.len() / 2;
    changed[middle] ^= 0x10;
    let error = decode(&changed, "changed.flac", &unpadded()).unwrap_err();
    problem(error);
    let missing = decode_speech(Path::new("nowhere.wav"), &unpadded()).unwrap_err();
    assert!(problem(missing).contains("no such file"));
}

#[test]
fn options_that_cannot_be_are_told() {
    let plain = SpeechOptions::default();
    assert_eq!(plain.problem(), None);
    for (options, expected) in [
        (
            SpeechOptions {
                rate_hz: 0,
                ..plain.clone()
            },
            "`rate_hz`",
        ),
        (
            SpeechOptions {
                mel_bins: 0,
                ..plain.clone()
            },
            "`mel_bins`",
        ),
        (
            SpeechOptions {
                mel_bins: 10_000,
                ..plain.clone()
            },
            "`mel_bins`",
        ),
        (
            SpeechOptions {
                max_seconds: 0.0,
                ..plain.clone()
            },
            "`max_seconds`",
        ),
        (
            SpeechOptions {
                max_seconds: f64::NAN,
                ..plain.clone()
            },
            "`max_seconds`",
        ),
    ] {
        assert!(options.problem().unwrap().contains(expected), "{options:?}");
        let error = decode_speech(&fixture("mel_chirp.flac"), &options).unwrap_err();
        assert!(problem(error).contains(expected));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn random_bytes_never_panic(
        start in prop::sample::select(vec![&b""[..], b"RIFF\xff\x00\x00\x00WAVEfmt ", b"fLaC\x00\x00\x00\x22", b"ID3\x04", b"\xff\xfb\x90\x00"]),
        bytes in prop::collection::vec(any::<u8>(), 0..600),
    ) {
        let _ = decode(&[start, &bytes].concat(), "a.wav", &unpadded());
    }

    #[test]
    fn changed_recordings_never_panic(
        kind in 0..3usize,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut bytes = match kind {
            0 => chirp_wav(16),
            1 => fs::read(fixture("mel_chirp.flac")).unwrap(),
            _ => fs::read(fixture("mel_chirp.mp3")).unwrap(),
        };
        for (place, byte) in changes {
            let place = place.index(bytes.len().min(2000));
            bytes[place] = byte;
        }
        if let Ok(decoded) = decode(&bytes, "a.wav", &unpadded()) {
            prop_assert!(decoded.values.iter().all(|value| value.is_finite()));
        }
    }
}
