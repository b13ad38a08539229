//! The format of NumPy's `.npy` files, as `numpy.lib.format` documents it (versions 1.0 to 3.0): a
//! magic string, the length of a header, the header as a literal of a Python dictionary, the data.

use std::path::Path;

use half::f16;

use super::{Gather, bad_value, omics_names_file, problem, read_bytes};
use crate::error::RecordsError;

const MAGIC: &[u8] = b"\x93NUMPY";

pub(super) fn read(path: &Path, gather: &mut Gather<'_>) -> Result<(), RecordsError> {
    let bytes = read_bytes(path)?;
    let values = parse(&bytes).map_err(|(what, hint)| problem(path, what, hint))?;
    let names = match omics_names_file(path) {
        Some(file) => read_names(path, &file, values.len())?,
        None => {
            let positions: Vec<String> = (0..values.len()).map(|at| at.to_string()).collect();
            // Nothing tells which feature is which, so that nothing may be left out or moved.
            if !gather.wants_exactly(&positions) {
                return Err(problem(
                    path,
                    format!(
                        "its {} features have no names to find those asked for by",
                        values.len()
                    ),
                    "put `features.txt` beside it, with one name a line",
                ));
            }
            positions
        }
    };
    for (position, (name, value)) in names.iter().zip(values).enumerate() {
        if let Some(place) = gather.place(name)? {
            gather
                .set(place, value)
                .map_err(|what| bad_value(path, position, "0", what))?;
        }
    }
    Ok(())
}

fn read_names(path: &Path, file: &Path, count: usize) -> Result<Vec<String>, RecordsError> {
    let text = String::from_utf8(read_bytes(file)?)
        .map_err(|_| problem(file, "it is not UTF-8", "write it again in UTF-8"))?;
    let names: Vec<String> = text
        .trim_start_matches('\u{feff}')
        .trim_end()
        .lines()
        .map(|line| line.trim().to_string())
        .collect();
    if names.len() != count {
        return Err(problem(
            path,
            format!(
                "it has {count} values, and {} beside it {} names",
                file.file_name().unwrap_or_default().display(),
                names.len()
            ),
            "write one name a line, in the order of the values",
        ));
    }
    Ok(names)
}

/// What is wrong, and what to do about it.
type Refusal = (String, &'static str);

fn refuse<T>(what: impl Into<String>, hint: &'static str) -> Result<T, Refusal> {
    Err((what.into(), hint))
}

fn parse(bytes: &[u8]) -> Result<Vec<f32>, Refusal> {
    const AGAIN: &str = "write it again with numpy.save";
    let Some(rest) = bytes.strip_prefix(MAGIC) else {
        return refuse("it is not a NumPy file", AGAIN);
    };
    let header = match rest {
        [1, _, low, high, rest @ ..] => {
            let length = usize::from(u16::from_le_bytes([*low, *high]));
            rest.split_at_checked(length)
        }
        [2 | 3, _, a, b, c, d, rest @ ..] => {
            let length = u32::from_le_bytes([*a, *b, *c, *d]);
            usize::try_from(length)
                .ok()
                .and_then(|length| rest.split_at_checked(length))
        }
        [version, ..] if !(1..=3).contains(version) => {
            return refuse(format!("it is a NumPy file of version {version}"), AGAIN);
        }
        _ => None,
    };
    let Some((header, data)) = header else {
        return refuse("it breaks off in its header", AGAIN);
    };
    let Some(header) = std::str::from_utf8(header).ok().and_then(Header::parse) else {
        return refuse("its header is no description of an array", AGAIN);
    };
    let [count] = header.shape[..] else {
        return refuse(
            format!(
                "its shape is {:?} and must be one-dimensional",
                header.shape
            ),
            "save it as array.ravel(), one patient a file",
        );
    };
    let Some((size, decode)) = decoder(&header.kind) else {
        return refuse(
            format!("its values are of type `{}`", header.kind),
            "save it as array.astype('float32')",
        );
    };
    match count
        .checked_mul(size)
        .and_then(|length| data.get(..length))
    {
        Some(data) => Ok(data.chunks_exact(size).map(decode).collect()),
        None => refuse(
            format!("it breaks off: {count} values of {size} bytes are not in it"),
            AGAIN,
        ),
    }
}

/// A value from its bytes.
type Decode = fn(&[u8]) -> f32;

/// The bytes of a value of a type, and how it is made of them.
fn decoder(kind: &str) -> Option<(usize, Decode)> {
    macro_rules! decode {
        ($type:ty, $from:ident, $value:ident => $number:expr) => {{
            let decode: Decode = |bytes| {
                let mut value = [0; size_of::<$type>()];
                value.copy_from_slice(bytes);
                let $value = <$type>::$from(value);
                $number
            };
            Some((size_of::<$type>(), decode))
        }};
    }
    macro_rules! in_order {
        ($order:expr, $type:ty, $value:ident => $number:expr) => {
            match $order {
                '>' => decode!($type, from_be_bytes, $value => $number),
                // `|` stands before types of one byte.
                '<' | '|' => decode!($type, from_le_bytes, $value => $number),
                _ => None,
            }
        };
    }
    let mut characters = kind.chars();
    let order = characters.next()?;
    match characters.as_str() {
        "f2" => in_order!(order, f16, half => half.to_f32()),
        "f4" => in_order!(order, f32, single => single),
        "f8" => in_order!(order, f64, double => double as f32),
        "i1" => in_order!(order, i8, integer => f32::from(integer)),
        "i2" => in_order!(order, i16, integer => f32::from(integer)),
        "i4" => in_order!(order, i32, integer => integer as f32),
        "i8" => in_order!(order, i64, integer => integer as f32),
        // A truth value is a byte of 0 or 1.
        "u1" | "b1" => in_order!(order, u8, integer => f32::from(integer)),
        "u2" => in_order!(order, u16, integer => f32::from(integer)),
        "u4" => in_order!(order, u32, integer => integer as f32),
        "u8" => in_order!(order, u64, integer => integer as f32),
        _ => None,
    }
}

/// What the header says of the array. In one dimension C and Fortran order are the same.
#[derive(Debug, PartialEq, Eq)]
struct Header {
    /// Byte order, kind and size: `<f4`.
    kind: String,
    shape: Vec<usize>,
}

impl Header {
    /// Of `{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }`.
    fn parse(text: &str) -> Option<Header> {
        let mut literal = Literal(text);
        let (mut kind, mut shape, mut order) = (None, None, None);
        literal.take("{")?;
        while literal.take("}").is_none() {
            let key = literal.string()?;
            literal.take(":")?;
            match key {
                "descr" => kind = Some(literal.string()?.to_string()),
                "shape" => shape = Some(literal.tuple()?),
                "fortran_order" => {
                    order = Some(literal.take("False").or_else(|| literal.take("True"))?);
                }
                _ => return None,
            }
            if literal.take(",").is_none() {
                literal.take("}")?;
                break;
            }
        }
        order?;
        literal.0.trim().is_empty().then_some(())?;
        Some(Header {
            kind: kind?,
            shape: shape?,
        })
    }
}

/// What is left to read of a Python literal.
struct Literal<'a>(&'a str);

impl<'a> Literal<'a> {
    fn take(&mut self, token: &str) -> Option<()> {
        self.0 = self.0.trim_start().strip_prefix(token)?;
        Some(())
    }

    fn string(&mut self) -> Option<&'a str> {
        let text = self.0.trim_start();
        let quote = text
            .chars()
            .next()
            .filter(|quote| matches!(quote, '\'' | '"'))?;
        let (string, rest) = text[1..].split_once(quote)?;
        self.0 = rest;
        Some(string)
    }

    fn tuple(&mut self) -> Option<Vec<usize>> {
        let mut sizes = Vec::new();
        self.take("(")?;
        while self.take(")").is_none() {
            let text = self.0.trim_start();
            let digits = text.bytes().take_while(u8::is_ascii_digit).count();
            sizes.push(text[..digits].parse().ok()?);
            // Python 2 ended long integers with an L.
            self.0 = text[digits..].strip_prefix('L').unwrap_or(&text[digits..]);
            if self.take(",").is_none() {
                self.take(")")?;
                break;
            }
        }
        Some(sizes)
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::item::omics::{OmicsOptions, omics_features, read_omics};

    /// A file as `numpy.save` lays it out: the header padded to a multiple of 64 bytes.
    fn npy(kind: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        let mut header =
            format!("{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}");
        while !(MAGIC.len() + 4 + header.len() + 1).is_multiple_of(64) {
            header.push(' ');
        }
        header.push('\n');
        let mut bytes = MAGIC.to_vec();
        bytes.extend([1, 0]);
        bytes.extend((header.len() as u16).to_le_bytes());
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    }

    fn floats(values: &[f32]) -> Vec<u8> {
        let data: Vec<u8> = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        npy("<f4", &format!("({},)", values.len()), &data)
    }

    fn file(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.npy");
        std::fs::write(&path, bytes).unwrap();
        (folder, path)
    }

    #[test]
    fn numpy_s_own_bytes_are_read() {
        // numpy 2.4: numpy.save(path, numpy.array([1.5, -2.0, numpy.nan]))
        let mut bytes = b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, \
            'shape': (3,), }"
            .to_vec();
        bytes.resize(127, b' ');
        bytes.push(b'\n');
        for value in [1.5f64, -2.0, f64::NAN] {
            bytes.extend(value.to_le_bytes());
        }
        let values = parse(&bytes).unwrap();
        assert_eq!(values[..2], [1.5, -2.0]);
        assert!(values[2].is_nan() && values.len() == 3);
    }

    #[test]
    fn every_type_and_byte_order_is_read() {
        fn case<const N: usize>(kind: &str, little: [u8; N], big: [u8; N], expected: f32) {
            assert_eq!(
                parse(&npy(&format!("<{kind}"), "(1,)", &little)),
                Ok(vec![expected]),
                "{kind}"
            );
            assert_eq!(
                parse(&npy(&format!(">{kind}"), "(1,)", &big)),
                Ok(vec![expected]),
                "{kind}"
            );
        }
        let half = f16::from_f32(-1.5);
        case("f2", half.to_le_bytes(), half.to_be_bytes(), -1.5);
        case("f4", 0.1f32.to_le_bytes(), 0.1f32.to_be_bytes(), 0.1);
        case("f8", 0.1f64.to_le_bytes(), 0.1f64.to_be_bytes(), 0.1);
        case(
            "i2",
            (-300i16).to_le_bytes(),
            (-300i16).to_be_bytes(),
            -300.0,
        );
        case(
            "i4",
            (-70_000i32).to_le_bytes(),
            (-70_000i32).to_be_bytes(),
            -70_000.0,
        );
        case(
            "i8",
            (1i64 << 40).to_le_bytes(),
            (1i64 << 40).to_be_bytes(),
            (1u64 << 40) as f32,
        );
        case(
            "u2",
            60_000u16.to_le_bytes(),
            60_000u16.to_be_bytes(),
            60_000.0,
        );
        case(
            "u4",
            3_000_000_000u32.to_le_bytes(),
            3_000_000_000u32.to_be_bytes(),
            3e9,
        );
        case(
            "u8",
            u64::MAX.to_le_bytes(),
            u64::MAX.to_be_bytes(),
            u64::MAX as f32,
        );
        assert_eq!(parse(&npy("|i1", "(2,)", &[255, 1])), Ok(vec![-1.0, 1.0]));
        assert_eq!(parse(&npy("|u1", "(2,)", &[255, 1])), Ok(vec![255.0, 1.0]));
        assert_eq!(parse(&npy("|b1", "(2,)", &[0, 1])), Ok(vec![0.0, 1.0]));
    }

    #[test]
    fn headers_of_other_versions_and_writers_are_read() {
        let header = "{\"shape\": ( 2L ,), \"descr\":\"<f4\",\"fortran_order\":True}";
        let mut bytes = MAGIC.to_vec();
        bytes.extend([3, 0]);
        bytes.extend((header.len() as u32).to_le_bytes());
        bytes.extend(header.as_bytes());
        bytes.extend([0; 8]);
        assert_eq!(parse(&bytes), Ok(vec![0.0, 0.0]));
    }

    #[test]
    fn what_is_no_vector_is_refused() {
        let refused = |bytes: &[u8]| parse(bytes).unwrap_err().0;
        let whole = floats(&[1.0, 2.0]);
        assert!(refused(b"PK\x03\x04").contains("not a NumPy file"));
        assert!(refused(&npy("<f4", "(3, 4)", &[0; 48])).contains("shape is [3, 4]"));
        assert!(refused(&npy("<f4", "()", &[0; 4])).contains("shape is []"));
        assert!(refused(&npy("<c8", "(1,)", &[0; 8])).contains("`<c8`"));
        assert!(refused(&npy("|O", "(1,)", &[0; 8])).contains("`|O`"));
        assert!(
            refused(&npy("<f4", &format!("({},)", usize::MAX), &[0; 8])).contains("breaks off")
        );
        // Wherever it breaks off.
        for length in 0..whole.len() {
            assert!(!refused(&whole[..length]).is_empty(), "{length}");
        }
        let mut later = whole.clone();
        later[6] = 9;
        assert!(refused(&later).contains("version 9"));
        let records = "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3,), }";
        assert_eq!(Header::parse(records), None);
    }

    #[test]
    fn names_come_from_a_file_beside() {
        let (folder, path) = file(&floats(&[1.0, 2.0, f32::NAN]));
        assert_eq!(omics_features(&path).unwrap(), ["0", "1", "2"]);
        let wanting = |names: &[&str]| OmicsOptions {
            features: Some(names.iter().map(|name| name.to_string()).collect()),
        };
        let positions = read_omics(&path, &wanting(&["0", "1", "2"])).unwrap();
        assert_eq!(positions.values[..2], [1.0, 2.0]);
        for moved in [&["0", "1"][..], &["1", "0", "2"], &["a", "b", "c"]] {
            let error = read_omics(&path, &wanting(moved)).unwrap_err().to_string();
            assert!(error.contains("no names"), "{error}");
        }

        std::fs::write(folder.path().join("features.txt"), "a\nb\nc\n\n").unwrap();
        assert_eq!(omics_features(&path).unwrap(), ["a", "b", "c"]);
        std::fs::write(folder.path().join("a.features.txt"), "c\r\na\r\nb").unwrap();
        assert_eq!(omics_features(&path).unwrap(), ["c", "a", "b"]);
        let found = read_omics(&path, &wanting(&["a", "x"])).unwrap();
        assert_eq!((found.values[0], found.absent, found.ignored), (2.0, 1, 2));
        assert!(found.values[1].is_nan());

        std::fs::write(folder.path().join("a.features.txt"), "c\na\n").unwrap();
        let error = omics_features(&path).unwrap_err().to_string();
        assert!(
            error.contains("3 values") && error.contains("2 names"),
            "{error}"
        );
    }

    #[test]
    fn values_must_be_finite_and_some_must_be_there() {
        let (_folder, path) = file(&floats(&[1.0, f32::INFINITY]));
        let error = omics_features(&path).unwrap_err().to_string();
        assert!(error.contains("row 1"), "{error}");
        let (_folder, path) = file(&floats(&[f32::NAN; 4]));
        let error = omics_features(&path).unwrap_err().to_string();
        assert!(error.contains("all of its 4 values are missing"), "{error}");
        let (_folder, path) = file(&floats(&[]));
        let error = omics_features(&path).unwrap_err().to_string();
        assert!(error.contains("no features"), "{error}");
    }
}
