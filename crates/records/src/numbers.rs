//! Columns of numbers, whatever their type.
//!
//! Arrow's own casts know every pair of types; with what they depend on they are a tenth of a cold
//! build, and only these few are needed.

use arrow_array::cast::AsArray;
use arrow_array::types::*;
use arrow_array::{Array, ArrowPrimitiveType};
use arrow_schema::{DataType, TimeUnit};

/// The values of a column, NaN where null; truth is 1, a point in time is a whole number of its
/// unit. `None` for what is no number.
pub(crate) fn numbers(column: &dyn Array) -> Option<Vec<f64>> {
    Some(match column.data_type() {
        DataType::Null => vec![f64::NAN; column.len()],
        DataType::Boolean => {
            let values = column.as_boolean().iter();
            values
                .map(|value| value.map_or(f64::NAN, |value| f64::from(u8::from(value))))
                .collect()
        }
        DataType::Float16 => of::<Float16Type>(column, f64::from),
        DataType::Float32 => of::<Float32Type>(column, f64::from),
        DataType::Float64 => of::<Float64Type>(column, |value| value),
        DataType::Decimal32(_, scale) => scaled::<Decimal32Type>(column, *scale, f64::from),
        DataType::Decimal64(_, scale) => {
            scaled::<Decimal64Type>(column, *scale, |value| value as f64)
        }
        DataType::Decimal128(_, scale) => {
            scaled::<Decimal128Type>(column, *scale, |value| value as f64)
        }
        _ => whole_numbers(column)?
            .into_iter()
            .map(|value| value.map_or(f64::NAN, |value| value as f64))
            .collect(),
    })
}

/// The values of a column of integers or of points in time. `None` for other types.
pub(crate) fn whole_numbers(column: &dyn Array) -> Option<Vec<Option<i128>>> {
    Some(match column.data_type() {
        DataType::Int8 => whole::<Int8Type>(column),
        DataType::Int16 => whole::<Int16Type>(column),
        DataType::Int32 => whole::<Int32Type>(column),
        DataType::Int64 => whole::<Int64Type>(column),
        DataType::UInt8 => whole::<UInt8Type>(column),
        DataType::UInt16 => whole::<UInt16Type>(column),
        DataType::UInt32 => whole::<UInt32Type>(column),
        DataType::UInt64 => whole::<UInt64Type>(column),
        DataType::Timestamp(TimeUnit::Second, _) => whole::<TimestampSecondType>(column),
        DataType::Timestamp(TimeUnit::Millisecond, _) => whole::<TimestampMillisecondType>(column),
        DataType::Timestamp(TimeUnit::Microsecond, _) => whole::<TimestampMicrosecondType>(column),
        DataType::Timestamp(TimeUnit::Nanosecond, _) => whole::<TimestampNanosecondType>(column),
        _ => return None,
    })
}

fn of<T: ArrowPrimitiveType>(column: &dyn Array, convert: impl Fn(T::Native) -> f64) -> Vec<f64> {
    let values = column.as_primitive::<T>().iter();
    values
        .map(|value| value.map_or(f64::NAN, &convert))
        .collect()
}

fn scaled<T: ArrowPrimitiveType>(
    column: &dyn Array,
    scale: i8,
    convert: impl Fn(T::Native) -> f64,
) -> Vec<f64> {
    let power = 10f64.powi(i32::from(scale));
    of::<T>(column, |value| convert(value) / power)
}

fn whole<T: ArrowPrimitiveType>(column: &dyn Array) -> Vec<Option<i128>>
where
    i128: From<T::Native>,
{
    let values = column.as_primitive::<T>().iter();
    values.map(|value| value.map(i128::from)).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::{
        ArrayRef, BooleanArray, Decimal128Array, Float16Array, Float32Array, Int8Array, NullArray,
        StringArray, TimestampMillisecondArray, UInt64Array,
    };
    use half::f16;

    use super::*;

    #[test]
    fn every_type_of_number_is_read_and_nothing_else() {
        let decimals = Decimal128Array::from(vec![Some(12_345), None, Some(-5)]);
        let columns: [(ArrayRef, [f64; 3]); 7] = [
            (
                Arc::new(Int8Array::from(vec![Some(-7), None, Some(3)])),
                [-7.0, f64::NAN, 3.0],
            ),
            (
                Arc::new(UInt64Array::from(vec![Some(u64::MAX), None, Some(0)])),
                [u64::MAX as f64, f64::NAN, 0.0],
            ),
            (
                Arc::new(Float32Array::from(vec![Some(0.1), None, Some(-2.5)])),
                [0.1f32 as f64, f64::NAN, -2.5],
            ),
            (
                Arc::new(Float16Array::from(vec![
                    Some(f16::from_f32(1.5)),
                    None,
                    Some(f16::ZERO),
                ])),
                [1.5, f64::NAN, 0.0],
            ),
            (
                Arc::new(decimals.with_precision_and_scale(10, 2).unwrap()),
                [123.45, f64::NAN, -0.05],
            ),
            (
                Arc::new(BooleanArray::from(vec![Some(true), None, Some(false)])),
                [1.0, f64::NAN, 0.0],
            ),
            (
                Arc::new(TimestampMillisecondArray::from(vec![
                    Some(1500),
                    None,
                    Some(0),
                ])),
                [1500.0, f64::NAN, 0.0],
            ),
        ];
        for (column, expected) in columns {
            let found = numbers(&column).unwrap();
            for (found, expected) in found.iter().zip(expected) {
                let same = *found == expected || (found.is_nan() && expected.is_nan());
                assert!(same, "{}: {found} is not {expected}", column.data_type());
            }
        }
        assert_eq!(numbers(&NullArray::new(2)).unwrap().len(), 2);
        assert_eq!(numbers(&StringArray::from(vec!["1"])), None);
        assert_eq!(whole_numbers(&Float32Array::from(vec![1.0])), None);
    }
}
