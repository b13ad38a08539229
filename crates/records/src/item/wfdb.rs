//! Records of the WaveForm DataBase, PhysioNet's format: a header beside one or more signal files.
//!
//! After header(5) and signal(5) of the WFDB Applications Guide, with the values that wfdb-python's
//! `rdrecord(..., smooth_frames=False)` gives. Every packed format is read (8, 16, 24, 32, 61, 80,
//! 160, 212, 310, 311) and the compressed ones (508, 516, 524), signals of several samples a frame
//! at their own rate, records of several segments in fixed or variable layout. What a file lacks of
//! what its header announces, and a checksum that does not hold, are errors.

use std::fs::File;
use std::io::{BufReader, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::waveform::{
    Lead, MAX_SAMPLES, Recording, WaveformOptions, choose, item_error, unreadable, whole_samples,
};
use crate::RecordsError;
use flac::FlacSamples;
use header::{Content, Header, NOWHERE, Segment, Signal};
use samples::{Format, Samples};

mod flac;
mod header;
mod samples;

/// A header is text of a line a signal or segment; more than this is another file.
const MAX_HEADER_BYTES: u64 = 16 << 20;

const HEADER_HINT: &str = "correct the header or get the record again";
const DATA_HINT: &str = "get the record again";
const FORMAT_HINT: &str = "rewrite the record in format 16 (xform, or wfdb.wrsamp)";

/// Reads the record whose header is at `path`: the leads that the options name (all where they
/// name none), no longer than their limit.
pub(super) fn read(path: &Path, options: &WaveformOptions) -> Result<Recording, RecordsError> {
    let header = load(path)?;
    match &header.content {
        Content::Signals(signals) => {
            let names: Vec<&str> = signals.iter().map(|signal| signal.name.as_str()).collect();
            let wanted = choose(path, &names, options)?;
            let limit = whole_samples(options.max_seconds, header.frame_rate_hz);
            let (values, frames) = read_signals(path, &header, signals, &wanted, limit)?;
            let leads = wanted.iter().zip(values).map(|(&index, values)| Lead {
                rate_hz: header.frame_rate_hz * signals[index].samples_per_frame as f64,
                values,
            });
            Ok(Recording {
                leads: leads.collect(),
                kept_s: frames.min(limit) as f64 / header.frame_rate_hz,
                length_s: frames as f64 / header.frame_rate_hz,
            })
        }
        Content::Segments(segments) => read_segments(path, &header, segments, options),
    }
}

fn load(path: &Path) -> Result<Header, RecordsError> {
    let length = std::fs::metadata(path)
        .map_err(|source| unreadable(path, &source))?
        .len();
    if length > MAX_HEADER_BYTES {
        return Err(item_error(path, "too large for a WFDB header", HEADER_HINT));
    }
    let bytes = std::fs::read(path).map_err(|source| unreadable(path, &source))?;
    header::parse(&String::from_utf8_lossy(&bytes))
        .map_err(|problem| item_error(path, problem, HEADER_HINT))
}

/// A file or header that a header names, which has to lie beside it.
fn beside(header_path: &Path, name: &str) -> Result<PathBuf, RecordsError> {
    if name.is_empty() || name.starts_with('.') || name.contains(['/', '\\', ':']) {
        return Err(item_error(
            header_path,
            "the header names a file that does not lie beside it",
            HEADER_HINT,
        ));
    }
    Ok(header_path.with_file_name(name))
}

/// One signal file with the signals in it.
struct Group<'a> {
    path: PathBuf,
    format: u32,
    offset: u64,
    members: Vec<Member<'a>>,
}

struct Member<'a> {
    signal: &'a Signal,
    /// Its place among the leads that are wanted, if it is one of them.
    slot: Option<usize>,
}

impl Group<'_> {
    fn samples_per_frame(&self) -> u64 {
        self.members
            .iter()
            .map(|member| member.signal.samples_per_frame)
            .fold(0, u64::saturating_add)
    }

    /// Opens the file at its first sample. Also says how many whole frames it holds from there.
    fn open(&self) -> Result<(Source, u64), RecordsError> {
        let mut file = File::open(&self.path).map_err(|source| unreadable(&self.path, &source))?;
        if let Some(bits) = flac::bits(self.format) {
            let samples_per_frame = self.members[0].signal.samples_per_frame;
            if self
                .members
                .iter()
                .any(|member| member.signal.samples_per_frame != samples_per_frame)
            {
                return Err(item_error(
                    &self.path,
                    "signals of one compressed file differ in their samples a frame",
                    HEADER_HINT,
                ));
            }
            let (source, samples) = FlacSamples::open(
                file,
                bits,
                self.members.len(),
                samples_per_frame as usize,
                self.offset,
            )
            .map_err(|problem| item_error(&self.path, problem, DATA_HINT))?;
            return Ok((Source::Flac(Box::new(source)), samples / samples_per_frame));
        }
        let Some(format) = Format::from_code(self.format) else {
            return Err(item_error(
                &self.path,
                format!("signal format {} is not read here", self.format),
                FORMAT_HINT,
            ));
        };
        let bytes = file
            .metadata()
            .map_err(|source| unreadable(&self.path, &source))?
            .len()
            .saturating_sub(self.offset);
        file.seek(SeekFrom::Start(self.offset))
            .map_err(|source| unreadable(&self.path, &source))?;
        let reader = BufReader::with_capacity(1 << 16, file);
        let frames = format.samples_in(bytes) / self.samples_per_frame();
        Ok((Source::Packed(Samples::new(reader, format)), frames))
    }

    /// The sample that stands for none.
    fn missing(&self) -> Option<i32> {
        match flac::bits(self.format) {
            Some(bits) => Some(-(1 << (bits - 1))),
            None => Format::from_code(self.format).and_then(Format::missing),
        }
    }
}

enum Source {
    Packed(Samples<BufReader<File>>),
    Flac(Box<FlacSamples>),
}

/// The values of the signals `wanted` (indices), in physical units and at their own rates, of at
/// most `limit` frames; and how many frames the record has.
fn read_signals(
    header_path: &Path,
    header: &Header,
    signals: &[Signal],
    wanted: &[usize],
    limit: u64,
) -> Result<(Vec<Vec<f64>>, u64), RecordsError> {
    let mut groups = Vec::new();
    for group in group_by_file(header_path, signals, wanted)? {
        if group.members.iter().any(|member| member.slot.is_some()) {
            let (source, available) = group.open()?;
            groups.push((group, source, available));
        }
    }
    let frames = match header.frames {
        Some(frames) => frames,
        // Without a length, the record is as long as its shortest file.
        None => groups
            .iter()
            .map(|(.., available)| *available)
            .min()
            .unwrap_or(0),
    };
    if let Some((group, _, available)) = groups.iter().find(|(.., available)| *available < frames) {
        return Err(item_error(
            &group.path,
            format!("the file holds {available} of the {frames} frames that its header announces"),
            DATA_HINT,
        ));
    }
    let kept = frames.min(limit);
    let samples = wanted
        .iter()
        .map(|&index| kept.saturating_mul(signals[index].samples_per_frame))
        .fold(0, u64::saturating_add);
    if samples > MAX_SAMPLES {
        return Err(item_error(
            header_path,
            format!("more than {MAX_SAMPLES} samples lie within `max_seconds`"),
            "lower `max_seconds` or name fewer `leads`",
        ));
    }

    let mut values = vec![Vec::new(); wanted.len()];
    for (group, source, _) in groups {
        group.read(source, frames, kept, header.frames.is_some(), &mut values)?;
    }
    Ok((values, frames))
}

fn group_by_file<'a>(
    header_path: &Path,
    signals: &'a [Signal],
    wanted: &[usize],
) -> Result<Vec<Group<'a>>, RecordsError> {
    let mut groups: Vec<Group> = Vec::new();
    let mut names: Vec<&str> = Vec::new();
    for (index, signal) in signals.iter().enumerate() {
        // A signal that is nowhere is missing throughout.
        if signal.file == NOWHERE || signal.format == 0 {
            continue;
        }
        let member = Member {
            signal,
            slot: wanted.iter().position(|&want| want == index),
        };
        match names.iter().position(|name| *name == signal.file) {
            Some(known) if groups[known].format == signal.format => {
                groups[known].members.push(member);
            }
            Some(known) => {
                return Err(item_error(
                    &groups[known].path,
                    "the header gives two formats for this file",
                    HEADER_HINT,
                ));
            }
            None => {
                names.push(&signal.file);
                groups.push(Group {
                    path: beside(header_path, &signal.file)?,
                    format: signal.format,
                    offset: signal.offset,
                    members: vec![member],
                });
            }
        }
    }
    Ok(groups)
}

impl Group<'_> {
    /// Puts the first `kept` of `frames` frames of the wanted signals into their places. Checksums
    /// are over all frames, so that the whole file is read where they are to hold.
    fn read(
        &self,
        mut source: Source,
        frames: u64,
        kept: u64,
        checked: bool,
        values: &mut [Vec<f64>],
    ) -> Result<(), RecordsError> {
        let checked = checked
            && self
                .members
                .iter()
                .any(|member| member.signal.checksum.is_some());
        let skew = self.members.iter().map(|member| member.signal.skew).max();
        let end = match checked {
            true => frames,
            false => frames.min(kept.saturating_add(skew.unwrap_or(0))),
        };
        let missing = self.missing();
        let differences = self.format == 8;
        let mut running: Vec<i32> = self
            .members
            .iter()
            .map(|member| member.signal.initial as i32)
            .collect();
        let mut sums = vec![0u16; self.members.len()];
        for frame in 0..end {
            for (number, Member { signal, slot }) in self.members.iter().enumerate() {
                // Signals of a file may be late by different times.
                let used = frame >= signal.skew && frame - signal.skew < kept;
                for _ in 0..signal.samples_per_frame {
                    let mut sample = self.next(&mut source)?;
                    if differences {
                        running[number] = running[number].wrapping_add(sample);
                        sample = running[number];
                    }
                    sums[number] = sums[number].wrapping_add(sample as u16);
                    if used && let Some(slot) = *slot {
                        values[slot].push(match missing == Some(sample) {
                            true => f64::NAN,
                            false => (f64::from(sample) - signal.baseline) / signal.gain,
                        });
                    }
                }
            }
        }
        for (Member { signal, slot }, sum) in self.members.iter().zip(sums) {
            if checked
                && signal
                    .checksum
                    .is_some_and(|checksum| checksum as u16 != sum)
            {
                return Err(item_error(
                    &self.path,
                    format!(
                        "the checksum of `{}` does not hold: samples were changed",
                        signal.name
                    ),
                    DATA_HINT,
                ));
            }
            // Late signals end early.
            if let Some(slot) = *slot {
                values[slot].resize((kept * signal.samples_per_frame) as usize, f64::NAN);
            }
        }
        Ok(())
    }

    fn next(&self, source: &mut Source) -> Result<i32, RecordsError> {
        let sample = match source {
            Source::Packed(samples) => samples
                .next()
                .map_err(|source| unreadable(&self.path, &source))?,
            Source::Flac(samples) => samples
                .next()
                .map_err(|problem| item_error(&self.path, problem, DATA_HINT))?,
        };
        sample.ok_or_else(|| item_error(&self.path, "the file ends too early", DATA_HINT))
    }
}

/// Reads a record of several segments. In a variable layout (the first segment has no samples) the
/// leads are those of the layout's header, found in each segment by name.
fn read_segments(
    path: &Path,
    header: &Header,
    segments: &[Segment],
    options: &WaveformOptions,
) -> Result<Recording, RecordsError> {
    let header_of = |segment: &Segment| {
        let path = beside(path, &format!("{}.hea", segment.name))?;
        let header = load(&path)?;
        match &header.content {
            Content::Signals(signals) => {
                let signals = signals.clone();
                Ok((path, header, signals))
            }
            Content::Segments(_) => Err(item_error(
                &path,
                "a segment of a record has segments itself",
                HEADER_HINT,
            )),
        }
    };
    let variable = segments.first().is_some_and(|segment| segment.frames == 0);
    let Some(first) = segments.iter().find(|segment| segment.name != NOWHERE) else {
        return Err(item_error(
            path,
            "the record has no segment with samples",
            HEADER_HINT,
        ));
    };
    let (_, _, layout) = header_of(first)?;
    let names: Vec<&str> = layout.iter().map(|signal| signal.name.as_str()).collect();
    let wanted = choose(path, &names, options)?;
    let limit = whole_samples(options.max_seconds, header.frame_rate_hz);

    let mut values: Vec<Vec<f64>> = vec![Vec::new(); wanted.len()];
    let mut begin = 0u64;
    for segment in segments.iter().skip(usize::from(variable)) {
        let frames = segment.frames.min(limit.saturating_sub(begin));
        begin = begin.saturating_add(segment.frames);
        if frames == 0 {
            continue;
        }
        let added = wanted
            .iter()
            .map(|&index| frames.saturating_mul(layout[index].samples_per_frame))
            .fold(0, u64::saturating_add);
        let held: usize = values.iter().map(Vec::len).sum();
        if added.saturating_add(held as u64) > MAX_SAMPLES {
            return Err(item_error(
                path,
                format!("more than {MAX_SAMPLES} samples lie within `max_seconds`"),
                "lower `max_seconds` or name fewer `leads`",
            ));
        }
        let mut found: Vec<Vec<f64>> = vec![Vec::new(); wanted.len()];
        if segment.name != NOWHERE {
            let (segment_path, segment_header, signals) = header_of(segment)?;
            // For each wanted lead its place in this segment, which may not have it.
            let places: Vec<Option<usize>> = wanted
                .iter()
                .map(|&index| match variable {
                    true => signals
                        .iter()
                        .position(|signal| signal.name == layout[index].name),
                    false => Some(index).filter(|&index| index < signals.len()),
                })
                .collect();
            let fits = places.iter().zip(&wanted).all(|(place, &index)| {
                place.is_none_or(|place| {
                    signals[place].samples_per_frame == layout[index].samples_per_frame
                })
            });
            let rate = segment_header.frame_rate_hz / header.frame_rate_hz;
            if !fits || (rate - 1.0).abs() > 1e-6 {
                return Err(item_error(
                    &segment_path,
                    "the segment's rates are not those of the record",
                    HEADER_HINT,
                ));
            }
            if segment_header
                .frames
                .is_some_and(|found| found != segment.frames)
            {
                return Err(item_error(
                    &segment_path,
                    "the segment's length is not the one that the record gives",
                    HEADER_HINT,
                ));
            }
            let indices: Vec<usize> = places.iter().flatten().copied().collect();
            let (read, _) =
                read_signals(&segment_path, &segment_header, &signals, &indices, frames)?;
            for (slot, values) in places
                .iter()
                .enumerate()
                .filter(|(_, place)| place.is_some())
                .map(|(slot, _)| slot)
                .zip(read)
            {
                found[slot] = values;
            }
        }
        for ((values, mut found), &index) in values.iter_mut().zip(found).zip(&wanted) {
            let samples = frames * layout[index].samples_per_frame;
            found.resize(samples as usize, f64::NAN);
            values.append(&mut found);
        }
    }
    let leads = wanted.iter().zip(values).map(|(&index, values)| Lead {
        rate_hz: header.frame_rate_hz * layout[index].samples_per_frame as f64,
        values,
    });
    Ok(Recording {
        leads: leads.collect(),
        kept_s: begin.min(limit) as f64 / header.frame_rate_hz,
        length_s: begin as f64 / header.frame_rate_hz,
    })
}

#[cfg(test)]
mod tests;
