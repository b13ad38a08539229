//! What a JPEG says of itself before it is decoded: decoders fill a truncated one up with grey, and
//! allocate whatever size the header names.

/// The frame of a JPEG whose markers run to the end of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::item) struct JpegFrame {
    pub height: usize,
    pub width: usize,
    pub bits: u8,
    /// A JFIF or Adobe segment, which settles what the components mean.
    pub says_colour: bool,
}

/// Walks the markers (ITU-T T.81, B.1.1 and B.2) from start to end of image; bytes after the end
/// are nobody's. `None`: no JPEG, or one that breaks off.
pub(in crate::item) fn jpeg_frame(bytes: &[u8]) -> Option<JpegFrame> {
    if !bytes.starts_with(&[0xFF, 0xD8]) {
        return None;
    }
    let mut frame: Option<JpegFrame> = None;
    let mut says_colour = false;
    let mut at = 2;
    loop {
        // Between segments anything but 0xFF is skipped, as decoders do.
        while *bytes.get(at)? != 0xFF {
            at += 1;
        }
        while *bytes.get(at)? == 0xFF {
            at += 1;
        }
        let marker = bytes[at];
        at += 1;
        match marker {
            0xD9 => {
                return frame.map(|frame| JpegFrame {
                    says_colour,
                    ..frame
                });
            }
            // A stuffed zero, and markers without a segment.
            0x00 | 0x01 | 0xD0..=0xD8 => continue,
            _ => {}
        }
        let length = usize::from(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]));
        let segment = bytes.get(at + 2..at + length)?;
        at += length;
        match marker {
            // Frames of every coding process; C4, C8 and CC are tables.
            0xC0..=0xCF if !matches!(marker, 0xC4 | 0xC8 | 0xCC) => {
                let [bits, height_high, height_low, width_high, width_low, ..] = *segment else {
                    return None;
                };
                frame.get_or_insert(JpegFrame {
                    height: usize::from(u16::from_be_bytes([height_high, height_low])),
                    width: usize::from(u16::from_be_bytes([width_high, width_low])),
                    bits,
                    says_colour: false,
                });
            }
            0xE0 if segment.starts_with(b"JFIF\0") => says_colour = true,
            0xEE if segment.starts_with(b"Adobe") => says_colour = true,
            // Entropy-coded bytes follow a scan header; a 0xFF in them is followed by 0 or a
            // restart marker, which the loop passes over.
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: [u8; 29] = [
        0xFF, 0xD8, // start
        0xFF, 0xC0, 0, 11, 8, 0, 3, 0, 5, 1, 1, 0x11, 0, // frame of 3 × 5
        0xFF, 0xDA, 0, 2, // scan
        0x12, 0xFF, 0x00, 0xFF, 0xD0, 0x34, // coded bytes, a stuffed zero, a restart
        0xFF, 0xFF, // fill
        0xD9, 0x00, // end, and one byte more
    ];

    #[test]
    fn a_frame_is_read_and_every_truncation_noticed() {
        let frame = jpeg_frame(&SMALL).unwrap();
        assert_eq!((frame.height, frame.width, frame.bits), (3, 5, 8));
        assert!(!frame.says_colour);
        for length in 0..SMALL.len() - 1 {
            assert_eq!(jpeg_frame(&SMALL[..length]), None, "{length} bytes");
        }
        assert!(jpeg_frame(&SMALL[..SMALL.len() - 1]).is_some());
    }
}
