//! NIfTI-1 and -2 volumes, plain or gzipped: one slice on the grey levels 0…255.
//!
//! The header's layout is that of `nifti1.h` and `nifti2.h`; which voxel axis runs where in the
//! patient follows nibabel (`sform` before `qform`, else voxels that run to the left, the front and
//! the head). Slices are turned to how radiology shows them, so that volumes stored in different
//! orders look alike; voxels are taken as square.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use flate2::read::MultiGzDecoder;

use header::{BodyAxis, FIRST_HEADER_BYTES, Fields, Form, Header, SECOND_HEADER_BYTES};

use super::image::levels::{chosen_range, full_range, stretch};
use super::image::{
    ImageOptions, ImagePlane, Picture, Planes, check_size, item_error, open, unreadable,
};
use crate::RecordsError;

mod header;

/// Whether a file begins as a NIfTI header does.
pub(super) fn is_header(head: &[u8]) -> bool {
    Form::of(head).is_some()
}

/// Reads one slice.
pub(super) fn read(path: &Path, options: &ImageOptions) -> Result<Picture, RecordsError> {
    let failed = |error: io::Error| match error.kind() {
        // What a truncated file and a damaged gzip stream give.
        io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput => {
            broken(path)
        }
        _ => unreadable(path, &error),
    };
    let mut source = Source::open(path)?;
    let mut head = vec![0; FIRST_HEADER_BYTES];
    source.read_exact(&mut head).map_err(failed)?;
    let form = Form::of(&head).ok_or_else(|| {
        item_error(
            path,
            "is gzipped and holds no NIfTI volume",
            "images other than NIfTI volumes are read unpacked",
        )
    })?;
    if form.is_second {
        head.resize(SECOND_HEADER_BYTES, 0);
        let rest = &mut head[FIRST_HEADER_BYTES..];
        source.read_exact(rest).map_err(failed)?;
    }
    let header = Header::read(path, &head, form)?;
    let cut = header.cut(path, options)?;
    let before = header.start - head.len() as u64 + cut.volume_bytes * options.volume as u64;
    if let Source::Plain(file) = &source {
        let length = file.get_ref().metadata().map_err(failed)?.len();
        if length < header.start + cut.volume_bytes * header.volumes as u64 {
            return Err(broken(path));
        }
    }
    source.skip(before).map_err(failed)?;
    let stored = header.read_slice(&cut, &mut source).map_err(failed)?;
    let mut values = cut.turned(&stored);
    let Some(seen) = full_range(&values) else {
        return Err(item_error(
            path,
            "has no finite value in the slice chosen",
            "choose another slice or volume, or leave it out of the cohort",
        ));
    };
    let range = chosen_range(&values, options).unwrap_or(seen);
    stretch(&mut values, range);
    Ok(Picture {
        height: cut.rows.length,
        width: cut.columns.length,
        planes: Planes::Floats(vec![values]),
    })
}

fn broken(path: &Path) -> RecordsError {
    item_error(
        path,
        "is a truncated or corrupt NIfTI volume",
        "write the file again",
    )
}

/// A file, unpacked on the way where it is gzipped.
enum Source {
    Plain(BufReader<File>),
    Packed(Box<MultiGzDecoder<BufReader<File>>>),
}

impl Source {
    fn open(path: &Path) -> Result<Source, RecordsError> {
        let failed = |error: io::Error| unreadable(path, &error);
        let mut file = BufReader::new(open(path)?);
        let mut magic = [0; 2];
        file.read_exact(&mut magic).map_err(failed)?;
        file.seek(SeekFrom::Start(0)).map_err(failed)?;
        Ok(if magic == [0x1F, 0x8B] {
            Source::Packed(Box::new(MultiGzDecoder::new(file)))
        } else {
            Source::Plain(file)
        })
    }

    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        match self {
            Source::Plain(file) => {
                let bytes = i64::try_from(bytes).map_err(|_| io::ErrorKind::UnexpectedEof)?;
                file.seek_relative(bytes)
            }
            Source::Packed(packed) => {
                io::copy(&mut packed.by_ref().take(bytes), &mut io::sink()).map(|_| ())
            }
        }
    }
}

impl Read for Source {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Source::Plain(file) => file.read(buffer),
            Source::Packed(packed) => packed.read(buffer),
        }
    }
}

impl Header {
    /// The slice that the options name.
    fn cut(&self, path: &Path, options: &ImageOptions) -> Result<Cut, RecordsError> {
        let [normal, rows, columns] = match options.plane {
            ImagePlane::Axial => [2, 1, 0],
            ImagePlane::Coronal => [1, 2, 0],
            ImagePlane::Sagittal => [0, 2, 1],
        }
        .map(|direction: usize| self.body[direction]);
        let shown = |direction: BodyAxis| Shown {
            axis: direction.axis,
            length: self.shape[direction.axis],
            // Pictures run to the patient's left, back and feet.
            is_reversed: direction.is_along,
        };
        let (rows, columns) = (shown(rows), shown(columns));
        check_size(path, rows.length, columns.length, options)?;
        // What is read at once.
        check_size(path, self.shape[0], self.shape[1], options)?;
        let slices = self.shape[normal.axis];
        let index = options.slice.among(slices).ok_or_else(|| {
            item_error(
                path,
                format!("has {slices} slices in this plane, and `slice` is beyond them"),
                "choose another slice, from 0",
            )
        })?;
        if options.volume >= self.volumes {
            return Err(item_error(
                path,
                format!("has {} volumes, and `volume` is beyond them", self.volumes),
                "choose another volume, from 0",
            ));
        }
        let volume_bytes = self
            .shape
            .iter()
            .try_fold(self.voxel.bytes() as u64, |all, &some| {
                all.checked_mul(some as u64)
            })
            .filter(|bytes| {
                let all = bytes.checked_mul(self.volumes as u64);
                all.is_some_and(|all| all < 1 << 60)
            })
            .ok_or_else(|| broken(path))?;
        Ok(Cut {
            normal: normal.axis,
            index: if normal.is_along {
                index
            } else {
                slices - 1 - index
            },
            rows,
            columns,
            volume_bytes,
        })
    }

    /// The values of a slice as they are stored: of its two axes the first runs faster.
    fn read_slice(&self, cut: &Cut, source: &mut Source) -> io::Result<Vec<f32>> {
        let [first, second, third] = self.shape;
        let size = self.voxel.bytes();
        let line = first * size;
        let mut values = Vec::new();
        let mut buffer = Vec::new();
        let mut read =
            |source: &mut Source, bytes: usize, from: usize, step: usize| {
                buffer.resize(bytes, 0);
                source.read_exact(&mut buffer)?;
                let fields = Fields {
                    bytes: &buffer,
                    is_big_endian: self.form.is_big_endian,
                };
                values.extend((from..bytes).step_by(step).map(|at| {
                    (self.voxel.value(&fields, at) * self.slope + self.intercept) as f32
                }));
                io::Result::Ok(())
            };
        match cut.normal {
            2 => {
                source.skip((cut.index * second) as u64 * line as u64)?;
                read(source, second * line, 0, size)?;
            }
            1 => {
                for _ in 0..third {
                    source.skip((cut.index * line) as u64)?;
                    read(source, line, 0, size)?;
                    source.skip(((second - 1 - cut.index) * line) as u64)?;
                }
            }
            _ => {
                for _ in 0..third {
                    read(source, second * line, cut.index * size, line)?;
                }
            }
        }
        Ok(values)
    }
}

/// A slice through a volume, and how it is shown.
struct Cut {
    /// The voxel axis across the slice, and where on it the slice lies.
    normal: usize,
    index: usize,
    rows: Shown,
    columns: Shown,
    volume_bytes: u64,
}

/// An axis of the picture.
struct Shown {
    axis: usize,
    length: usize,
    is_reversed: bool,
}

impl Shown {
    /// The stored position of a picture's row or column.
    fn stored(&self, at: usize) -> usize {
        if self.is_reversed {
            self.length - 1 - at
        } else {
            at
        }
    }
}

impl Cut {
    /// `[rows, columns]` of the picture from the slice as it is stored.
    fn turned(&self, stored: &[f32]) -> Vec<f32> {
        // Of the two axes the lower one runs faster.
        let (row_step, column_step) = if self.columns.axis < self.rows.axis {
            (self.columns.length, 1)
        } else {
            (1, self.rows.length)
        };
        let mut values = Vec::with_capacity(stored.len());
        for row in 0..self.rows.length {
            let start = self.rows.stored(row) * row_step;
            values.extend(
                (0..self.columns.length)
                    .map(|column| stored[start + self.columns.stored(column) * column_step]),
            );
        }
        values
    }
}

#[cfg(test)]
mod tests;
