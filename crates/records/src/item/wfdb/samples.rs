//! Samples in the formats of WFDB signal files, as signal(5) of the WFDB Applications Guide has
//! them: <https://physionet.org/physiotools/wag/signal-5.htm>.

use std::io::{self, Read};

/// How samples are packed into bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// Differences of 8 bits.
    Differences8,
    /// 16 bits, least significant byte first.
    Little16,
    /// 16 bits, most significant byte first (format 61).
    Big16,
    /// 16 bits, offset binary (format 160).
    Offset16,
    Little24,
    Little32,
    /// 8 bits, offset binary (format 80).
    Offset8,
    /// Two of 12 bits in three bytes (format 212).
    Pairs12,
    /// Three of 10 bits in four bytes, each pair's lowest bit unused (format 310).
    Triplets10,
    /// Three of 10 bits in four bytes, the two highest bits unused (format 311).
    Packed10,
}

impl Format {
    pub(super) fn from_code(code: u32) -> Option<Format> {
        Some(match code {
            8 => Format::Differences8,
            16 => Format::Little16,
            24 => Format::Little24,
            32 => Format::Little32,
            61 => Format::Big16,
            80 => Format::Offset8,
            160 => Format::Offset16,
            212 => Format::Pairs12,
            310 => Format::Triplets10,
            311 => Format::Packed10,
            _ => return None,
        })
    }

    /// The sample that stands for no sample: the lowest one there is.
    pub(super) fn missing(self) -> Option<i32> {
        match self {
            Format::Differences8 => None,
            Format::Offset8 => Some(-(1 << 7)),
            Format::Triplets10 | Format::Packed10 => Some(-(1 << 9)),
            Format::Pairs12 => Some(-(1 << 11)),
            Format::Little16 | Format::Big16 | Format::Offset16 => Some(-(1 << 15)),
            Format::Little24 => Some(-(1 << 23)),
            Format::Little32 => Some(i32::MIN),
        }
    }

    /// Bytes of a group that can be unpacked by itself.
    fn group_bytes(self) -> usize {
        match self {
            Format::Differences8 | Format::Offset8 => 1,
            Format::Little16 | Format::Big16 | Format::Offset16 => 2,
            Format::Little24 | Format::Pairs12 => 3,
            Format::Little32 | Format::Triplets10 | Format::Packed10 => 4,
        }
    }

    /// How many samples so many bytes hold.
    pub(super) fn samples_in(self, bytes: u64) -> u64 {
        let group = self.group_bytes() as u64;
        let whole = [0; 4];
        let samples_a_group = self.unpack(&whole[..self.group_bytes()]).1 as u64;
        let rest = self.unpack(&whole[..(bytes % group) as usize]).1 as u64;
        (bytes / group) * samples_a_group + rest
    }

    /// The samples of a group, and how many there are: fewer where the file ends within it.
    fn unpack(self, bytes: &[u8]) -> ([i32; 3], usize) {
        let byte = |index: usize| i32::from(bytes[index]);
        match (self, bytes.len()) {
            (Format::Differences8, 1) => ([i32::from(bytes[0] as i8), 0, 0], 1),
            (Format::Offset8, 1) => ([byte(0) - 128, 0, 0], 1),
            (Format::Little16, 2) => ([sign_extended(byte(0) | byte(1) << 8, 16), 0, 0], 1),
            (Format::Big16, 2) => ([sign_extended(byte(1) | byte(0) << 8, 16), 0, 0], 1),
            (Format::Offset16, 2) => ([(byte(0) | byte(1) << 8) - 32768, 0, 0], 1),
            (Format::Little24, 3) => {
                let value = byte(0) | byte(1) << 8 | byte(2) << 16;
                ([sign_extended(value, 24), 0, 0], 1)
            }
            (Format::Little32, 4) => {
                let value = byte(0) | byte(1) << 8 | byte(2) << 16 | byte(3) << 24;
                ([value, 0, 0], 1)
            }
            (Format::Pairs12, length @ 2..=3) => {
                let first = sign_extended(byte(0) | (byte(1) & 0x0f) << 8, 12);
                match length {
                    2 => ([first, 0, 0], 1),
                    _ => {
                        let second = sign_extended(byte(2) | (byte(1) & 0xf0) << 4, 12);
                        ([first, second, 0], 2)
                    }
                }
            }
            (Format::Triplets10, length @ 2..=4) => {
                let first = sign_extended(byte(0) >> 1 | (byte(1) & 0x07) << 7, 10);
                match length {
                    2 | 3 => ([first, 0, 0], 1),
                    _ => {
                        let second = sign_extended(byte(2) >> 1 | (byte(3) & 0x07) << 7, 10);
                        let third = sign_extended(byte(1) >> 3 | (byte(3) & 0xf8) << 2, 10);
                        ([first, second, third], 3)
                    }
                }
            }
            (Format::Packed10, length @ 2..=4) => {
                let first = sign_extended(byte(0) | (byte(1) & 0x03) << 8, 10);
                if length == 2 {
                    return ([first, 0, 0], 1);
                }
                let second = sign_extended(byte(1) >> 2 | (byte(2) & 0x0f) << 6, 10);
                if length == 3 {
                    return ([first, second, 0], 2);
                }
                let third = sign_extended(byte(2) >> 4 | (byte(3) & 0x3f) << 4, 10);
                ([first, second, third], 3)
            }
            _ => ([0; 3], 0),
        }
    }
}

/// The lower `bits` of a number, read as two's complement.
fn sign_extended(value: i32, bits: u32) -> i32 {
    let shift = i32::BITS - bits;
    (value << shift) >> shift
}

/// Samples of a packed file, one after the other.
pub(super) struct Samples<R> {
    reader: R,
    format: Format,
    group: [i32; 3],
    held: usize,
    given: usize,
}

impl<R: Read> Samples<R> {
    /// `reader` stands at the first sample and is buffered.
    pub(super) fn new(reader: R, format: Format) -> Self {
        Self {
            reader,
            format,
            group: [0; 3],
            held: 0,
            given: 0,
        }
    }

    /// The next sample; `None` at the end of the file.
    pub(super) fn next(&mut self) -> io::Result<Option<i32>> {
        if self.given == self.held {
            let mut bytes = [0; 4];
            let bytes = &mut bytes[..self.format.group_bytes()];
            let mut filled = 0;
            while filled < bytes.len() {
                match self.reader.read(&mut bytes[filled..]) {
                    Ok(0) => break,
                    Ok(count) => filled += count,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            (self.group, self.held) = self.format.unpack(&bytes[..filled]);
            self.given = 0;
            if self.held == 0 {
                return Ok(None);
            }
        }
        self.given += 1;
        Ok(Some(self.group[self.given - 1]))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CODES: [u32; 10] = [8, 16, 24, 32, 61, 80, 160, 212, 310, 311];

    fn all(code: u32, bytes: &[u8]) -> Vec<i32> {
        let mut samples = Samples::new(bytes, Format::from_code(code).unwrap());
        std::iter::from_fn(|| samples.next().unwrap()).collect()
    }

    #[test]
    fn samples_at_both_ends_of_their_range() {
        for (code, bytes, expected) in [
            (8, &[0x80, 0x7f, 0xff][..], vec![-128, 127, -1]),
            (16, &[0x00, 0x80, 0xff, 0x7f, 0x01], vec![-32768, 32767]),
            (24, &[0, 0, 0x80, 0xff, 0xff, 0x7f], vec![-8388608, 8388607]),
            (32, &[0, 0, 0, 0x80, 1, 0, 0, 0], vec![i32::MIN, 1]),
            (61, &[0x80, 0x00, 0x7f, 0xff], vec![-32768, 32767]),
            (80, &[0, 128, 255], vec![-128, 0, 127]),
            (160, &[0, 0, 0, 0x80, 0xff, 0xff], vec![-32768, 0, 32767]),
            (212, &[0x00, 0x78, 0xff], vec![-2048, 2047]),
            (212, &[0xe3, 0x33, 0xf3, 0x01, 0x00], vec![995, 1011, 1]),
        ] {
            assert_eq!(all(code, bytes), expected, "format {code}");
        }
    }

    #[test]
    fn ten_bits_in_both_packings() {
        // 310: s0 in bits 1–7 and 8–10, s2 in bits 11–15 and 27–31; 311: in order from bit 0.
        let (first, second, third) = (-512, 511, -3);
        let low = |value: i32| (value & 0x3ff) as u32;
        let word = low(first) << 1
            | low(second) << 17
            | (low(third) & 0x1f) << 11
            | (low(third) >> 5) << 27;
        assert_eq!(all(310, &word.to_le_bytes()), [first, second, third]);
        let word = low(first) | low(second) << 10 | low(third) << 20;
        assert_eq!(all(311, &word.to_le_bytes()), [first, second, third]);
        assert_eq!(all(311, &word.to_le_bytes()[..3]), [first, second]);
        assert_eq!(all(311, &word.to_le_bytes()[..2]), [first]);
    }

    proptest! {
        #[test]
        fn bytes_hold_as_many_samples_as_are_counted(
            bytes in prop::collection::vec(any::<u8>(), 0..40),
        ) {
            for code in CODES {
                let format = Format::from_code(code).unwrap();
                let found = all(code, &bytes);
                prop_assert_eq!(found.len() as u64, format.samples_in(bytes.len() as u64));
                if let Some(missing) = format.missing() {
                    prop_assert!(found.iter().all(|&sample| sample >= missing));
                }
            }
        }
    }
}
