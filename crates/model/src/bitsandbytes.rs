//! Linear layers that bitsandbytes has quantised: what `quantization_config` says of them, and their
//! tensors.
//!
//! In 4 bits `X.weight` holds the codes, `X.weight.absmax` the scales of its blocks,
//! `X.weight.quant_map` the values of the codes, `X.weight.nested_absmax` and
//! `X.weight.nested_quant_map` what the scales are quantised with if they are, and
//! `X.weight.quant_state.bitsandbytes__nf4` a JSON object with the rest. In 8 bits `X.weight` is
//! `[out, in]` and `X.SCB` the largest magnitude of each row.

use calor_kernels::{BlockScales, HostWeight, NF4, Quantization};
use serde_json::{Map, Value};

use crate::error::ModelError;
use crate::keys::Keys;
use crate::stored::Stored;

impl Keys<'_> {
    /// How the checkpoint's linear layers are stored; `None` where they are plain floats.
    pub fn quantization(&self) -> Result<Option<Quantization>, ModelError> {
        const KEY: &str = "quantization_config";
        const SUPPORTED: &str = "of bitsandbytes, load_in_8bit and load_in_4bit with \
             bnb_4bit_quant_type nf4 are read; otherwise use the checkpoint's f32, f16 or bf16 version";
        let object = match self.get(KEY) {
            None => return Ok(None),
            Some(Value::Object(object)) => Keys::new(self.path, object),
            Some(_) => return Err(self.wrong(KEY, "an object")),
        };
        let by_bitsandbytes = matches!(object.text("quant_method")?, None | Some("bitsandbytes"));
        let flag = |key: &str| Ok::<bool, ModelError>(object.flag(key)?.unwrap_or(false));
        match (flag("load_in_4bit")?, flag("load_in_8bit")?) {
            // Transformers' default is fp4.
            (true, false)
                if by_bitsandbytes && object.text("bnb_4bit_quant_type")? == Some("nf4") =>
            {
                Ok(Some(Quantization::Nf4 {
                    double: flag("bnb_4bit_use_double_quant")?,
                }))
            }
            (false, true) if by_bitsandbytes => Ok(Some(Quantization::Int8)),
            _ => Err(self.unsupported(KEY, SUPPORTED)),
        }
    }
}

/// Whether the weight of a linear module is stored quantised.
pub(crate) fn is_quantized(stored: &Stored, module: &str) -> bool {
    Tensors::of(module).kind(stored).is_some()
}

/// Checks the tensors of a module whose weight `[out, in]` is stored quantised, and returns their
/// names; none where it is not. No more than the JSON object is read.
///
/// # Errors
/// A tensor that is missing or of another type or length, another format than NF4.
pub(crate) fn check(
    stored: &Stored,
    module: &str,
    shape: [usize; 2],
) -> Result<Option<Vec<String>>, ModelError> {
    let tensors = Tensors::of(module);
    match tensors.kind(stored) {
        None => Ok(None),
        Some(StoredKind::Int8) => tensors.check_int8(stored, shape).map(Some),
        Some(StoredKind::Nf4) => {
            let state = tensors.state(stored)?;
            if state.shape != shape {
                let message = format!(
                    "`shape` is {:?}, the configuration asks for {shape:?}",
                    state.shape
                );
                return Err(stored.wrong(&tensors.nf4_state, message));
            }
            tensors.check_nf4(stored, &state).map(Some)
        }
        Some(StoredKind::Fp4) => Err(stored.wrong(
            &tensors.fp4_state,
            "is of the format fp4; nf4 and 8 bits are read",
        )),
    }
}

/// Reads a weight that is stored quantised and has been checked, and its shape `[out, in]`; none
/// where it is not.
pub(crate) fn read(
    stored: &Stored,
    module: &str,
) -> Result<Option<(HostWeight, [usize; 2])>, ModelError> {
    let tensors = Tensors::of(module);
    match tensors.kind(stored) {
        Some(StoredKind::Int8) => {
            let codes = stored.bytes(&tensors.weight)?;
            let shape = stored.shape(&tensors.weight).unwrap_or_default();
            let host = HostWeight::Int8 {
                codes: codes.into_iter().map(|byte| byte as i8).collect(),
                absmax: tensors.scales(stored, &tensors.row_scales)?,
            };
            Ok(Some((host, [shape[0], shape[1]])))
        }
        Some(StoredKind::Nf4) => {
            let state = tensors.state(stored)?;
            let map = stored.floats(&tensors.map)?;
            // As bitsandbytes computes them, to the last bit or two.
            let same = map.iter().zip(NF4).all(|(a, b)| (a - b).abs() < 1e-6);
            if !same {
                return Err(stored.wrong(&tensors.map, "has other values than NF4's sixteen"));
            }
            let absmax = match state.double {
                None => BlockScales::Plain(tensors.scales(stored, &tensors.absmax)?),
                Some((block, offset)) => BlockScales::Double {
                    codes: stored.bytes(&tensors.absmax)?,
                    block,
                    map: tensors.scales(stored, &tensors.double_map)?,
                    absmax: tensors.scales(stored, &tensors.double_absmax)?,
                    offset,
                },
            };
            let host = HostWeight::Nf4 {
                codes: stored.bytes(&tensors.weight)?,
                block: state.block,
                absmax,
            };
            Ok(Some((host, state.shape)))
        }
        Some(StoredKind::Fp4) | None => Ok(None),
    }
}

#[derive(Clone, Copy, PartialEq)]
enum StoredKind {
    Int8,
    Nf4,
    Fp4,
}

/// What the JSON object says.
struct State {
    /// `[out, in]`
    shape: [usize; 2],
    block: usize,
    /// Scales a block of scales, and their mean.
    double: Option<(usize, f32)>,
}

/// Names of the tensors of a module.
struct Tensors {
    weight: String,
    absmax: String,
    map: String,
    double_absmax: String,
    double_map: String,
    nf4_state: String,
    fp4_state: String,
    row_scales: String,
    row_format: String,
}

impl Tensors {
    fn of(module: &str) -> Tensors {
        let weight = format!("{module}.weight");
        Tensors {
            absmax: format!("{weight}.absmax"),
            map: format!("{weight}.quant_map"),
            double_absmax: format!("{weight}.nested_absmax"),
            double_map: format!("{weight}.nested_quant_map"),
            nf4_state: format!("{weight}.quant_state.bitsandbytes__nf4"),
            fp4_state: format!("{weight}.quant_state.bitsandbytes__fp4"),
            row_scales: format!("{module}.SCB"),
            row_format: format!("{module}.weight_format"),
            weight,
        }
    }

    fn kind(&self, stored: &Stored) -> Option<StoredKind> {
        if stored.has(&self.nf4_state) {
            Some(StoredKind::Nf4)
        } else if stored.has(&self.fp4_state) {
            Some(StoredKind::Fp4)
        } else {
            stored.has(&self.row_scales).then_some(StoredKind::Int8)
        }
    }

    fn check_int8(&self, stored: &Stored, shape: [usize; 2]) -> Result<Vec<String>, ModelError> {
        stored.expect(&self.weight, "I8", &shape)?;
        stored.expect(&self.row_scales, "F32", &shape[..1])?;
        let mut names = vec![self.weight.clone(), self.row_scales.clone()];
        if stored.has(&self.row_format) {
            if stored
                .bytes(&self.row_format)?
                .iter()
                .any(|&byte| byte != 0)
            {
                let message = "is not 0: the codes do not lie row by row";
                return Err(stored.wrong(&self.row_format, message));
            }
            names.push(self.row_format.clone());
        }
        Ok(names)
    }

    fn check_nf4(&self, stored: &Stored, state: &State) -> Result<Vec<String>, ModelError> {
        let shape = state.shape;
        let elements = shape[0] * shape[1];
        let blocks = elements.div_ceil(state.block);
        // The type that the bytes are stored as says nothing.
        let found = stored.byte_length(&self.weight)?;
        if found != elements.div_ceil(2) {
            return Err(stored.wrong(
                &self.weight,
                format!(
                    "has {found} bytes, {shape:?} in 4 bits needs {}",
                    elements.div_ceil(2)
                ),
            ));
        }
        stored.expect(&self.map, "F32", &[16])?;
        let mut names = vec![
            self.weight.clone(),
            self.absmax.clone(),
            self.map.clone(),
            self.nf4_state.clone(),
        ];
        match state.double {
            None => stored.expect(&self.absmax, "F32", &[blocks])?,
            Some((block, _)) => {
                stored.expect(&self.absmax, "U8", &[blocks])?;
                stored.expect(&self.double_absmax, "F32", &[blocks.div_ceil(block)])?;
                stored.expect(&self.double_map, "F32", &[256])?;
                names.extend([self.double_absmax.clone(), self.double_map.clone()]);
            }
        }
        Ok(names)
    }

    fn state(&self, stored: &Stored) -> Result<State, ModelError> {
        let wrong = |message: String| stored.wrong(&self.nf4_state, message);
        let object: Map<String, Value> = serde_json::from_slice(&stored.bytes(&self.nf4_state)?)
            .map_err(|error| wrong(format!("is not a JSON object: {error}")))?;
        let size = |key: &str| object.get(key).and_then(Value::as_u64);
        let shape: Option<Vec<usize>> =
            object
                .get("shape")
                .and_then(Value::as_array)
                .and_then(|lengths| {
                    lengths
                        .iter()
                        .map(|length| length.as_u64().map(|n| n as usize))
                        .collect()
                });
        let Some(&[outputs, inputs]) = shape.as_deref() else {
            return Err(wrong("`shape` is not [out, in]".to_owned()));
        };
        let block = match size("blocksize") {
            Some(block @ 32..=4096) if block.is_power_of_two() => block as usize,
            _ => {
                return Err(wrong(
                    "`blocksize` is no power of two from 32 to 4096".to_owned(),
                ));
            }
        };
        let double = match (size("nested_blocksize"), object.get("nested_offset")) {
            (None, None) => None,
            (Some(block @ 32..=4096), Some(offset)) if block % 4 == 0 => {
                let offset = offset.as_f64().filter(|offset| offset.is_finite());
                let offset =
                    offset.ok_or_else(|| wrong("`nested_offset` is no number".to_owned()))?;
                Some((block as usize, offset as f32))
            }
            _ => {
                return Err(wrong(
                    "`nested_blocksize` (32 to 4096) and `nested_offset` do not fit".to_owned(),
                ));
            }
        };
        Ok(State {
            shape: [outputs, inputs],
            block,
            double,
        })
    }

    fn scales(&self, stored: &Stored, name: &str) -> Result<Vec<f32>, ModelError> {
        let scales = stored.floats(name)?;
        if scales.iter().all(|scale| scale.is_finite()) {
            Ok(scales)
        } else {
            Err(stored.wrong(name, "holds numbers that are not finite"))
        }
    }
}
