//! The header of a volume: voxels, their scaling and where their axes run in the patient.

use std::path::Path;

use super::broken;
use crate::RecordsError;
use crate::item::image::item_error;

/// Length of a NIfTI-1 header, which is also the number it begins with.
pub(super) const FIRST_HEADER_BYTES: usize = 348;
/// The same of NIfTI-2.
pub(super) const SECOND_HEADER_BYTES: usize = 540;

/// Which of the header's forms a file has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Form {
    pub is_second: bool,
    pub is_big_endian: bool,
    /// Whether the voxels stand in a file of their own.
    pub is_pair: bool,
}

impl Form {
    pub fn of(head: &[u8]) -> Option<Form> {
        let size = *head.first_chunk::<4>()?;
        for is_big_endian in [false, true] {
            let size = if is_big_endian {
                u32::from_be_bytes(size)
            } else {
                u32::from_le_bytes(size)
            };
            let (is_second, magic) = match size as usize {
                FIRST_HEADER_BYTES => (false, head.get(344..348)?),
                SECOND_HEADER_BYTES => (true, head.get(4..8)?),
                _ => continue,
            };
            let is_pair = match magic {
                b"n+1\0" | b"n+2\0" => false,
                b"ni1\0" | b"ni2\0" => true,
                _ => return None,
            };
            return Some(Form {
                is_second,
                is_big_endian,
                is_pair,
            });
        }
        None
    }
}

/// How a voxel is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Voxel {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    U64,
    I64,
    F32,
    F64,
}

impl Voxel {
    /// By the header's `datatype`.
    fn of(code: i64) -> Option<Voxel> {
        Some(match code {
            2 => Voxel::U8,
            4 => Voxel::I16,
            8 => Voxel::I32,
            16 => Voxel::F32,
            64 => Voxel::F64,
            256 => Voxel::I8,
            512 => Voxel::U16,
            768 => Voxel::U32,
            1024 => Voxel::I64,
            1280 => Voxel::U64,
            _ => return None,
        })
    }

    pub fn bytes(self) -> usize {
        match self {
            Voxel::U8 | Voxel::I8 => 1,
            Voxel::U16 | Voxel::I16 => 2,
            Voxel::U32 | Voxel::I32 | Voxel::F32 => 4,
            Voxel::U64 | Voxel::I64 | Voxel::F64 => 8,
        }
    }

    pub fn value(self, fields: &Fields, at: usize) -> f64 {
        match self {
            Voxel::U8 => f64::from(fields.bytes[at]),
            Voxel::I8 => f64::from(fields.bytes[at] as i8),
            Voxel::U16 => f64::from(u16::from_le_bytes(fields.array(at))),
            Voxel::I16 => f64::from(i16::from_le_bytes(fields.array(at))),
            Voxel::U32 => f64::from(u32::from_le_bytes(fields.array(at))),
            Voxel::I32 => f64::from(i32::from_le_bytes(fields.array(at))),
            Voxel::U64 => u64::from_le_bytes(fields.array(at)) as f64,
            Voxel::I64 => i64::from_le_bytes(fields.array(at)) as f64,
            Voxel::F32 => f64::from(f32::from_le_bytes(fields.array(at))),
            Voxel::F64 => f64::from_le_bytes(fields.array(at)),
        }
    }
}

/// Numbers in either byte order.
pub(super) struct Fields<'a> {
    pub bytes: &'a [u8],
    pub is_big_endian: bool,
}

impl Fields<'_> {
    /// The bytes of a number, the lowest first.
    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        std::array::from_fn(|place| {
            let place = if self.is_big_endian {
                N - 1 - place
            } else {
                place
            };
            self.bytes[at + place]
        })
    }
}

/// What the header says.
pub(super) struct Header {
    pub form: Form,
    pub voxel: Voxel,
    /// Voxels along each axis, the first running fastest.
    pub shape: [usize; 3],
    pub volumes: usize,
    /// Where the voxels begin.
    pub start: u64,
    pub slope: f64,
    pub intercept: f64,
    pub body: [BodyAxis; 3],
}

/// The voxel axis that runs along an axis of the patient: to the right, the front, the head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BodyAxis {
    pub axis: usize,
    /// Whether it runs that way, or the other.
    pub is_along: bool,
}

impl Header {
    pub fn read(path: &Path, head: &[u8], form: Form) -> Result<Header, RecordsError> {
        if form.is_pair {
            return Err(item_error(
                path,
                "is the header of a pair of files",
                "join header and image in one .nii",
            ));
        }
        let fields = Fields {
            bytes: head,
            is_big_endian: form.is_big_endian,
        };
        let second = form.is_second;
        // The positions in the two layouts, and the types there.
        let float = |first: usize, later: usize| {
            let voxel = if second { Voxel::F64 } else { Voxel::F32 };
            voxel.value(&fields, if second { later } else { first })
        };
        let integer = |first: usize, later: usize| {
            let voxel = if second { Voxel::I32 } else { Voxel::I16 };
            voxel.value(&fields, if second { later } else { first }) as i64
        };
        let length = |place: usize| {
            if second {
                i64::from_le_bytes(fields.array(16 + 8 * place))
            } else {
                i64::from(i16::from_le_bytes(fields.array(40 + 2 * place)))
            }
        };
        let spacing = |place: usize| float(76 + 4 * place, 104 + 8 * place);

        let axes = length(0);
        let mut lengths = [1; 7];
        for (place, kept) in (1..=axes.clamp(0, 7) as usize).zip(&mut lengths) {
            *kept = usize::try_from(length(place)).unwrap_or(0);
        }
        let volumes = lengths[3..]
            .iter()
            .try_fold(1usize, |all, &some| all.checked_mul(some));
        let (true, Some(volumes @ 1..)) = ((1..=7).contains(&axes), volumes) else {
            return Err(broken(path));
        };

        let code = i64::from(i16::from_le_bytes(fields.array(if second {
            12
        } else {
            70
        })));
        let voxel = Voxel::of(code).ok_or_else(|| {
            item_error(
                path,
                format!("has voxels of NIfTI type {code}"),
                "convert them to integers or floats of up to 64 bits",
            )
        })?;

        // No voxel begins inside the header or its four bytes of extension; 0 means right after.
        let first = head.len() as u64 + 4;
        let start = if second {
            u64::try_from(i64::from_le_bytes(fields.array(168))).unwrap_or(0)
        } else {
            Voxel::F32.value(&fields, 108) as u64
        };
        let start = if start == 0 { first } else { start };
        if start < first || start > 1 << 40 {
            return Err(broken(path));
        }

        let (slope, intercept) = (float(112, 176), float(116, 184));
        let (slope, intercept) = if slope == 0.0 || !slope.is_finite() {
            (1.0, 0.0)
        } else if intercept.is_finite() {
            (slope, intercept)
        } else {
            return Err(item_error(
                path,
                "has a scl_inter that is not finite",
                "write 0 there",
            ));
        };

        let columns = if integer(254, 348) > 0 {
            let row = |place: usize| {
                [0, 1, 2].map(|at| float(280 + 16 * place + 4 * at, 400 + 32 * place + 8 * at))
            };
            transposed([row(0), row(1), row(2)])
        } else if integer(252, 344) > 0 {
            let quaternion = [float(256, 352), float(260, 360), float(264, 368)];
            let flip = if spacing(0) < 0.0 { -1.0 } else { 1.0 };
            rotation(quaternion, [spacing(1), spacing(2), flip * spacing(3)])
        } else {
            [[0.0; 3]; 3]
        };
        Ok(Header {
            form,
            voxel,
            shape: [lengths[0], lengths[1], lengths[2]],
            volumes,
            start,
            slope,
            intercept,
            body: body_axes(columns),
        })
    }
}

fn transposed(rows: [[f64; 3]; 3]) -> [[f64; 3]; 3] {
    [0, 1, 2].map(|column| rows.map(|row| row[column]))
}

/// The directions of the voxel axes from the header's quaternion, of which it leaves the real part
/// out (`nifti1.h`, method 2), times the spacings.
fn rotation([b, c, d]: [f64; 3], spacings: [f64; 3]) -> [[f64; 3]; 3] {
    let a = (1.0 - b * b - c * c - d * d).max(0.0).sqrt();
    let columns = [
        [
            a * a + b * b - c * c - d * d,
            2.0 * (b * c + a * d),
            2.0 * (b * d - a * c),
        ],
        [
            2.0 * (b * c - a * d),
            a * a + c * c - b * b - d * d,
            2.0 * (c * d + a * b),
        ],
        [
            2.0 * (b * d + a * c),
            2.0 * (c * d - a * b),
            a * a + d * d - b * b - c * c,
        ],
    ];
    std::array::from_fn(|axis| columns[axis].map(|part| part * spacings[axis]))
}

/// The voxel axis nearest to each axis of the patient, from the directions of the voxel axes.
/// Without usable directions nibabel's default: left, front, head.
fn body_axes(directions: [[f64; 3]; 3]) -> [BodyAxis; 3] {
    const ORDERS: [[usize; 3]; 6] = [
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    ];
    let lengths = directions.map(|axis| axis.iter().map(|part| part * part).sum::<f64>().sqrt());
    if lengths
        .iter()
        .any(|&length| !length.is_finite() || length == 0.0)
    {
        return std::array::from_fn(|axis| BodyAxis {
            axis,
            is_along: axis > 0,
        });
    }
    let share = |axis: usize, body: usize| directions[axis][body] / lengths[axis];
    let mut best = ORDERS[0];
    let mut most = -1.0;
    for order in ORDERS {
        let sum: f64 = (0..3).map(|body| share(order[body], body).abs()).sum();
        if sum > most {
            (best, most) = (order, sum);
        }
    }
    std::array::from_fn(|body| BodyAxis {
        axis: best[body],
        is_along: share(best[body], body) > 0.0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn axis(axis: usize, is_along: bool) -> BodyAxis {
        BodyAxis { axis, is_along }
    }

    #[test]
    fn directions_name_the_axes_of_the_body() {
        // Oblique, and stored as right to left, feet to head, back to front.
        let directions = [[-0.9, 0.1, 0.2], [0.2, 0.3, 2.0], [0.1, 3.0, -0.4]];
        assert_eq!(
            body_axes(directions),
            [axis(0, false), axis(2, true), axis(1, true)]
        );
        assert_eq!(
            body_axes([[0.0; 3]; 3]),
            [axis(0, false), axis(1, true), axis(2, true)]
        );
    }

    #[test]
    fn a_quaternion_is_a_rotation() {
        // A quarter turn about the third axis, and a flipped third axis.
        let half = 0.5f64.sqrt();
        let directions = rotation([0.0, 0.0, half], [2.0, 3.0, -4.0]);
        let expected = [[0.0, 2.0, 0.0], [-3.0, 0.0, 0.0], [0.0, 0.0, -4.0]];
        for (direction, expected) in directions.iter().flatten().zip(expected.iter().flatten()) {
            assert!((direction - expected).abs() < 1e-12, "{directions:?}");
        }
        assert_eq!(
            body_axes(directions),
            [axis(1, false), axis(0, true), axis(2, false)]
        );
    }

    #[test]
    fn numbers_are_read_in_either_order() {
        let bytes = [0, 0x12, 0x34, 0];
        for (is_big_endian, expected) in [(false, 0x3412), (true, 0x1234)] {
            let fields = Fields {
                bytes: &bytes,
                is_big_endian,
            };
            assert_eq!(Voxel::U16.value(&fields, 1), f64::from(expected));
        }
    }
}
