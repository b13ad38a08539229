//! Header files of WFDB records (`.hea`), as header(5) of the WFDB Applications Guide has them:
//! <https://physionet.org/physiotools/wag/header-5.htm>.

/// What a header says. Fields that nothing here needs (times of day, counters, resolutions) are
/// skipped.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Header {
    pub frame_rate_hz: f64,
    /// `None` where the header does not say how long the record is.
    pub frames: Option<u64>,
    pub content: Content,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Content {
    Signals(Vec<Signal>),
    /// A record of several others, one after the other.
    Segments(Vec<Segment>),
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Signal {
    /// The file, in the header's folder; `~` for a signal that is nowhere.
    pub file: String,
    pub format: u32,
    pub samples_per_frame: u64,
    /// Frames by which this signal's samples lie late in the file.
    pub skew: u64,
    /// Bytes (in compressed formats: samples) before the first sample.
    pub offset: u64,
    /// Steps of the converter a physical unit.
    pub gain: f64,
    /// The converter's output at physical 0.
    pub baseline: f64,
    /// The value that differences (format 8) start from.
    pub initial: i64,
    /// The sum of all samples, of which the lower 16 bits count.
    pub checksum: Option<i64>,
    pub name: String,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Segment {
    /// The record, in the same folder; `~` for a time without any.
    pub name: String,
    pub frames: u64,
}

/// The name of a file or record that does not exist on purpose.
pub(super) const NOWHERE: &str = "~";

const DEFAULT_RATE_HZ: f64 = 250.0;
const DEFAULT_GAIN: f64 = 200.0;
/// Beyond these a sampling frequency and a number of samples a frame are mistakes.
const MAX_RATE_HZ: f64 = 1e7;
const MAX_SAMPLES_PER_FRAME: u64 = 1 << 16;

/// Reads a header; the error says which line is wrong, counted from 1.
pub(super) fn parse(text: &str) -> Result<Header, String> {
    let mut lines = text
        .lines()
        .enumerate()
        .map(|(index, line)| (index + 1, line.trim()))
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    let (number, line) = lines.next().ok_or("the header is empty")?;
    let record = record_line(line).ok_or(format!("line {number} is not a record line"))?;
    if !(record.frame_rate_hz > 0.0 && record.frame_rate_hz <= MAX_RATE_HZ) {
        return Err(format!(
            "line {number} gives a sampling frequency out of range"
        ));
    }

    let mut rows = Vec::new();
    let wanted = record.segments.unwrap_or(record.signals);
    // Lines after the last one announced are not part of the record.
    for _ in 0..wanted {
        let Some(row) = lines.next() else {
            return Err(format!(
                "{wanted} lines are announced and {} follow",
                rows.len()
            ));
        };
        rows.push(row);
    }
    let content = if record.segments.is_some() {
        Content::Segments(
            rows.into_iter()
                .map(|(number, line)| {
                    segment_line(line).ok_or(format!("line {number} is not a segment line"))
                })
                .collect::<Result<_, _>>()?,
        )
    } else {
        Content::Signals(
            rows.into_iter()
                .enumerate()
                .map(|(index, (number, line))| {
                    signal_line(line, index).ok_or(format!("line {number} is not a signal line"))
                })
                .collect::<Result<_, _>>()?,
        )
    };
    Ok(Header {
        frame_rate_hz: record.frame_rate_hz,
        frames: record.frames,
        content,
    })
}

struct RecordLine {
    segments: Option<u64>,
    signals: u64,
    frame_rate_hz: f64,
    frames: Option<u64>,
}

/// `name[/segments] signals [frequency[/counter[(base)]] [frames [time [date]]]]`
fn record_line(line: &str) -> Option<RecordLine> {
    let mut words = line.split_whitespace();
    let name = words.next()?;
    let segments = match name.split_once('/') {
        Some((_, count)) => Some(count.parse().ok()?),
        None => None,
    };
    let signals = words.next()?.parse().ok()?;
    let frame_rate_hz = match words.next() {
        Some(word) => number(word.split(['/', '(']).next()?)?,
        None => DEFAULT_RATE_HZ,
    };
    let frames = match words.next() {
        Some(word) => Some(word.parse().ok()?).filter(|&frames| frames > 0),
        None => None,
    };
    Some(RecordLine {
        segments,
        signals,
        frame_rate_hz,
        frames,
    })
}

/// `name frames`
fn segment_line(line: &str) -> Option<Segment> {
    let mut words = line.split_whitespace();
    Some(Segment {
        name: words.next()?.to_string(),
        frames: words.next()?.parse().ok()?,
    })
}

/// `file format[xN][:skew][+offset] [gain[(baseline)][/units] [resolution [zero [initial [checksum
/// [block [description]]]]]]]`
fn signal_line(line: &str, index: usize) -> Option<Signal> {
    let (file, rest) = word(line)?;
    let (layout, mut rest) = word(rest)?;
    let mut signal = Signal {
        file: file.to_string(),
        format: 0,
        samples_per_frame: 1,
        skew: 0,
        offset: 0,
        gain: DEFAULT_GAIN,
        baseline: 0.0,
        initial: 0,
        checksum: None,
        name: String::new(),
    };
    set_layout(&mut signal, layout)?;

    let mut baseline = None;
    if let Some((first, after)) = word(rest)
        && let Some((gain, given)) = gain_and_baseline(first)
    {
        signal.gain = if gain == 0.0 { DEFAULT_GAIN } else { gain };
        baseline = given;
        rest = after;
    }
    // Any of these may be left out from the right; the first word that is not a whole number
    // begins the description.
    let mut numbers = [None; 5];
    for slot in &mut numbers {
        let Some((value, after)) =
            word(rest).and_then(|(first, after)| Some((first.parse::<i64>().ok()?, after)))
        else {
            break;
        };
        *slot = Some(value);
        rest = after;
    }
    let [_resolution, zero, initial, checksum, _block] = numbers;
    signal.baseline = baseline.unwrap_or(zero.unwrap_or(0) as f64);
    signal.initial = initial.unwrap_or(0);
    signal.checksum = checksum;
    signal.name = match rest.trim() {
        "" => format!("signal {index}"),
        name => name.to_string(),
    };
    Some(signal)
}

/// `format[xN][:skew][+offset]`
fn set_layout(signal: &mut Signal, text: &str) -> Option<()> {
    let (format, mut rest) = digits(text)?;
    signal.format = format.try_into().ok()?;
    while let Some(mark) = rest.chars().next() {
        let (value, after) = digits(&rest[mark.len_utf8()..])?;
        match mark {
            'x' => signal.samples_per_frame = value.max(1),
            ':' => signal.skew = value,
            '+' => signal.offset = value,
            _ => return None,
        }
        rest = after;
    }
    (signal.samples_per_frame <= MAX_SAMPLES_PER_FRAME).then_some(())
}

/// `gain[(baseline)][/units]`
fn gain_and_baseline(text: &str) -> Option<(f64, Option<f64>)> {
    let value = text.split('/').next()?;
    match value.split_once('(') {
        Some((gain, baseline)) => {
            let baseline: i64 = baseline.trim_end_matches(')').parse().ok()?;
            Some((number(gain)?, Some(baseline as f64)))
        }
        None => Some((number(value)?, None)),
    }
}

/// The first word and what follows it.
fn word(text: &str) -> Option<(&str, &str)> {
    let text = text.trim_start();
    let end = text.find(char::is_whitespace).unwrap_or(text.len());
    (end > 0).then(|| text.split_at(end))
}

/// The whole number that the text begins with, and the rest.
fn digits(text: &str) -> Option<(u64, &str)> {
    let end = text
        .find(|character: char| !character.is_ascii_digit())
        .unwrap_or(text.len());
    Some((text[..end].parse().ok()?, &text[end..]))
}

/// A finite decimal number; no words such as `inf`.
fn number(text: &str) -> Option<f64> {
    let plain = text
        .chars()
        .all(|character| character.is_ascii_digit() || "+-.eE".contains(character));
    text.parse()
        .ok()
        .filter(|value: &f64| plain && value.is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signals(text: &str) -> Vec<Signal> {
        match parse(text).unwrap().content {
            Content::Signals(signals) => signals,
            Content::Segments(_) => panic!("segments"),
        }
    }

    #[test]
    fn a_complete_header() {
        let text = "# made for this test\nrec 2 360/360(0) 650000 12:00:00 01/02/2003\n\
                    a.dat 212 200 11 1024 995 -22131 0 MLII\n\n\
                    b.dat 16x4:3+24 2000.5(-12)/mmHg 16 0 -489 -8337 0 lead V 5 \n# 69 M\n";
        let header = parse(text).unwrap();
        assert_eq!(header.frame_rate_hz, 360.0);
        assert_eq!(header.frames, Some(650000));
        assert_eq!(
            signals(text),
            [
                Signal {
                    file: "a.dat".into(),
                    format: 212,
                    samples_per_frame: 1,
                    skew: 0,
                    offset: 0,
                    gain: 200.0,
                    baseline: 1024.0,
                    initial: 995,
                    checksum: Some(-22131),
                    name: "MLII".into(),
                },
                Signal {
                    file: "b.dat".into(),
                    format: 16,
                    samples_per_frame: 4,
                    skew: 3,
                    offset: 24,
                    gain: 2000.5,
                    baseline: -12.0,
                    initial: -489,
                    checksum: Some(-8337),
                    name: "lead V 5".into(),
                },
            ]
        );
    }

    #[test]
    fn what_may_be_left_out() {
        let header = parse("rec 1\na.dat 16\n").unwrap();
        assert_eq!(header.frame_rate_hz, 250.0);
        assert_eq!(header.frames, None);
        assert_eq!(parse("rec 1 100 0\na.dat 16\n").unwrap().frames, None);
        let signal = &signals("rec 1\na.dat 16\n")[0];
        assert_eq!((signal.gain, signal.baseline), (200.0, 0.0));
        assert_eq!((signal.checksum, signal.name.as_str()), (None, "signal 0"));
        let signal = &signals("rec 1\na.dat 16 0/mV 12 7\n")[0];
        assert_eq!((signal.gain, signal.baseline), (200.0, 7.0));
        assert_eq!(signals("rec 1\na.dat 16 V5\n")[0].name, "V5");
        assert_eq!(signals("rec 1\na.dat 16 100 inf\n")[0].name, "inf");
    }

    #[test]
    fn segments_of_a_record() {
        let header = parse("rec/3 4 125 5750\nlayout 0\n~ 3750\nrec_1 2000\n").unwrap();
        let Content::Segments(segments) = header.content else {
            panic!("signals");
        };
        assert_eq!(segments.len(), 3);
        assert_eq!(
            segments[1],
            Segment {
                name: "~".into(),
                frames: 3750
            }
        );
    }

    #[test]
    fn a_broken_line_is_named() {
        for (text, problem) in [
            ("", "empty"),
            ("# only a comment", "empty"),
            ("rec", "line 1 is not a record line"),
            ("rec two", "line 1 is not a record line"),
            ("rec/x 2", "line 1 is not a record line"),
            ("rec 1 0\na.dat 16", "sampling frequency"),
            ("rec 1 -5\na.dat 16", "sampling frequency"),
            ("rec 1 1e99\na.dat 16", "sampling frequency"),
            ("rec 1 nan\na.dat 16", "line 1 is not a record line"),
            (
                "rec 2 360 10\na.dat 16",
                "2 lines are announced and 1 follow",
            ),
            ("rec 1 360 10\na.dat", "line 2 is not a signal line"),
            ("rec 1 360 10\na.dat x16", "line 2 is not a signal line"),
            ("rec 1 360 10\na.dat 16x", "line 2 is not a signal line"),
            ("rec 1 360 10\na.dat 16?3", "line 2 is not a signal line"),
            ("rec/1 1 360 10\nseg", "line 2 is not a segment line"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(problem), "{text:?}: {error}");
        }
    }
}
