//! Typed access to the columns of a batch, whatever the encoding.

use std::collections::HashSet;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float32Type, Int32Type, Int64Type, TimestampMicrosecondType};
use arrow_array::{
    Array, ArrayRef, Float32Array, Int32Array, Int64Array, LargeStringArray, RecordBatch,
    StringArray, TimestampMicrosecondArray,
};
use arrow_schema::DataType;

use crate::numbers::{numbers, whole_numbers};

/// Shares one allocation among equal strings.
#[derive(Default)]
pub(crate) struct Interner {
    strings: HashSet<Arc<str>>,
}

impl Interner {
    pub(crate) fn intern(&mut self, string: &str) -> Arc<str> {
        if let Some(shared) = self.strings.get(string) {
            return shared.clone();
        }
        let shared: Arc<str> = string.into();
        self.strings.insert(shared.clone());
        shared
    }
}

pub(crate) fn int64(batch: &RecordBatch, name: &str) -> Option<Int64Array> {
    Some(
        batch
            .column_by_name(name)?
            .as_primitive_opt::<Int64Type>()?
            .clone(),
    )
}

pub(crate) fn int32(batch: &RecordBatch, name: &str) -> Option<Int32Array> {
    Some(
        batch
            .column_by_name(name)?
            .as_primitive_opt::<Int32Type>()?
            .clone(),
    )
}

pub(crate) fn float32(batch: &RecordBatch, name: &str) -> Option<Float32Array> {
    Some(
        batch
            .column_by_name(name)?
            .as_primitive_opt::<Float32Type>()?
            .clone(),
    )
}

pub(crate) fn timestamps(batch: &RecordBatch, name: &str) -> Option<TimestampMicrosecondArray> {
    Some(
        batch
            .column_by_name(name)?
            .as_primitive_opt::<TimestampMicrosecondType>()?
            .clone(),
    )
}

/// A string column of one batch.
pub(crate) enum Strings {
    /// The column is missing, or has no type because all of it is null.
    Missing,
    Plain(StringArray),
    Large(LargeStringArray),
    Dictionary {
        keys: Int32Array,
        values: StringArray,
    },
}

impl Strings {
    pub(crate) fn of(batch: &RecordBatch, name: &str) -> Strings {
        let Some(column) = batch.column_by_name(name) else {
            return Strings::Missing;
        };
        match column.data_type() {
            DataType::Utf8 => Strings::Plain(column.as_string::<i32>().clone()),
            DataType::LargeUtf8 => Strings::Large(column.as_string::<i64>().clone()),
            DataType::Dictionary(_, _) => match column.as_dictionary_opt::<Int32Type>() {
                Some(dictionary) => match dictionary.values().as_string_opt::<i32>() {
                    Some(values) => Strings::Dictionary {
                        keys: dictionary.keys().clone(),
                        values: values.clone(),
                    },
                    None => Strings::Missing,
                },
                None => Strings::Missing,
            },
            DataType::Null => Strings::Missing,
            // Numbers as identifiers of a site: their decimal form, `2.0` where pandas made floats of
            // whole numbers with gaps.
            _ => {
                let whole = || -> Option<StringArray> {
                    let decimal = |number: Option<i128>| number.map(|number| number.to_string());
                    Some(whole_numbers(column)?.into_iter().map(decimal).collect())
                };
                let any = || -> Option<StringArray> {
                    let decimal = |value: f64| (!value.is_nan()).then(|| format!("{value:?}"));
                    Some(numbers(column)?.into_iter().map(decimal).collect())
                };
                whole()
                    .or_else(any)
                    .map_or(Strings::Missing, Strings::Plain)
            }
        }
    }

    pub(crate) fn get(&self, row: usize) -> Option<&str> {
        match self {
            Strings::Missing => None,
            Strings::Plain(strings) => strings.is_valid(row).then(|| strings.value(row)),
            Strings::Large(strings) => strings.is_valid(row).then(|| strings.value(row)),
            Strings::Dictionary { keys, values } => {
                if keys.is_null(row) {
                    return None;
                }
                let key = keys.value(row) as usize;
                values.is_valid(key).then(|| values.value(key))
            }
        }
    }
}

/// A string column of few distinct values: each value is looked up once in a dictionary, not once
/// a row, and equal strings share one allocation over all batches.
pub(crate) struct SharedStrings {
    interner: Interner,
    /// The dictionary that `resolved` belongs to; batches of one row group come with the same one.
    dictionary: Option<StringArray>,
    resolved: Vec<Option<Arc<str>>>,
    current: Strings,
}

impl Default for SharedStrings {
    fn default() -> Self {
        SharedStrings {
            interner: Interner::default(),
            dictionary: None,
            resolved: Vec::new(),
            current: Strings::Missing,
        }
    }
}

impl SharedStrings {
    pub(crate) fn load(&mut self, batch: &RecordBatch, name: &str) {
        self.current = Strings::of(batch, name);
        if let Strings::Dictionary { values, .. } = &self.current {
            let same = self.dictionary.as_ref().is_some_and(|known| {
                known.len() == values.len()
                    && known.value_data().as_ptr() == values.value_data().as_ptr()
                    && known.value_offsets().as_ptr() == values.value_offsets().as_ptr()
            });
            if !same {
                self.resolved.clear();
                self.resolved.resize(values.len(), None);
                // Holding on to it keeps the pointers above from being reused for other strings.
                self.dictionary = Some(values.clone());
            }
        }
    }

    pub(crate) fn get(&mut self, row: usize) -> Option<Arc<str>> {
        if let Strings::Dictionary { keys, values } = &self.current {
            if keys.is_null(row) {
                return None;
            }
            let key = keys.value(row) as usize;
            if values.is_null(key) {
                return None;
            }
            if self.resolved[key].is_none() {
                self.resolved[key] = Some(self.interner.intern(values.value(key)));
            }
            return self.resolved[key].clone();
        }
        let string = self.current.get(row)?;
        Some(self.interner.intern(string))
    }
}

/// The strings of one row of a list column.
pub(crate) fn string_list(column: &ArrayRef, row: usize) -> Vec<String> {
    let Some(lists) = column.as_list_opt::<i32>() else {
        return Vec::new();
    };
    if lists.is_null(row) {
        return Vec::new();
    }
    match lists.value(row).as_string_opt::<i32>() {
        Some(strings) => strings.iter().flatten().map(str::to_string).collect(),
        None => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use arrow_array::{Float64Array, Int16Array};

    use super::*;

    #[test]
    fn numbers_stand_for_sites_by_their_decimal_form() {
        let columns: [(ArrayRef, &str); 2] = [
            (Arc::new(Int16Array::from(vec![Some(2), None])), "2"),
            (Arc::new(Float64Array::from(vec![Some(2.0), None])), "2.0"),
        ];
        for (column, expected) in columns {
            let batch = RecordBatch::try_from_iter([("site", column)]).unwrap();
            let strings = Strings::of(&batch, "site");
            assert_eq!((strings.get(0), strings.get(1)), (Some(expected), None));
        }
    }
}
