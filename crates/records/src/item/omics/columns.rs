use std::path::Path;

use arrow_array::ArrayRef;
use arrow_schema::DataType;

use super::{Gather, bad_value, long_columns, problem};
use crate::error::RecordsError;
use crate::numbers::numbers;
use crate::table::{Decode, Table, type_name};
use crate::values::Strings;

const BATCH_ROWS: usize = 8192;

pub(super) fn read(path: &Path, gather: &mut Gather<'_>) -> Result<(), RecordsError> {
    let table = Table::open_in_memory(path)?;
    let fields = table.fields();
    let long = long_columns(fields.iter().map(|field| field.name().as_str())).or_else(|| {
        let two = fields.len() == 2
            && *fields[0].data_type() == DataType::Utf8
            && is_number(fields[1].data_type());
        two.then_some((0, 1))
    });
    match long {
        Some((name, value)) => read_long(&table, name, value, gather),
        None => read_wide(&table, gather),
    }
}

/// One row, a column a feature.
fn read_wide(table: &Table, gather: &mut Gather<'_>) -> Result<(), RecordsError> {
    let path = table.path();
    if table.rows() != 1 {
        return Err(problem(
            path,
            format!("it has {} rows", table.rows()),
            "give each patient a file of their own, with one row, or with the columns `feature` \
             and `value`",
        ));
    }
    let mut columns = Vec::new();
    let mut places = Vec::new();
    for (position, field) in table.fields().iter().enumerate() {
        // Where pandas keeps the names of rows.
        if field.name().starts_with("__index_level_") {
            continue;
        }
        if let Some(place) = gather.place(field.name())? {
            check_number(table, field.name(), field.data_type())?;
            columns.push(position);
            places.push(place);
        }
    }
    for ((values, &column), &place) in table.row(&columns)?.iter().zip(&columns).zip(&places) {
        let name = table.fields()[column].name();
        for value in float32(table, name, values)? {
            gather
                .set(place, value)
                .map_err(|what| bad_value(path, 0, &format!("`{name}`"), what))?;
        }
    }
    Ok(())
}

/// A row a feature.
fn read_long(
    table: &Table,
    name: usize,
    value: usize,
    gather: &mut Gather<'_>,
) -> Result<(), RecordsError> {
    let path = table.path();
    let (name, value) = (&table.fields()[name], &table.fields()[value]);
    let is_name = matches!(name.data_type(), DataType::Utf8) || name.data_type().is_integer();
    if !is_name {
        return Err(RecordsError::ColumnType {
            path: path.to_path_buf(),
            column: name.name().clone(),
            expected: "string",
            found: type_name(name.data_type()),
        });
    }
    check_number(table, value.name(), value.data_type())?;
    let columns = [
        (name.name().as_str(), Decode::Plain),
        (value.name().as_str(), Decode::Plain),
    ];
    let mut row = 0;
    for batch in table.batches(&columns, None, BATCH_ROWS, 0)? {
        let batch = batch?;
        let names = Strings::of(&batch, name.name());
        let Some(column) = batch.column_by_name(value.name()) else {
            continue;
        };
        let values = float32(table, value.name(), column)?;
        for (position, value) in values.into_iter().enumerate() {
            let Some(feature) = names.get(position) else {
                return Err(RecordsError::NullValue {
                    path: path.to_path_buf(),
                    column: name.name().clone(),
                    row: row as u64,
                });
            };
            if let Some(place) = gather.place(feature)? {
                gather
                    .set(place, value)
                    .map_err(|what| bad_value(path, row, "of values", what))?;
            }
            row += 1;
        }
    }
    Ok(())
}

fn is_number(data_type: &DataType) -> bool {
    data_type.is_numeric() || matches!(data_type, DataType::Boolean | DataType::Null)
}

fn check_number(table: &Table, name: &str, data_type: &DataType) -> Result<(), RecordsError> {
    if is_number(data_type) {
        Ok(())
    } else {
        Err(not_a_number(table, name, data_type))
    }
}

fn not_a_number(table: &Table, name: &str, data_type: &DataType) -> RecordsError {
    RecordsError::ColumnType {
        path: table.path().to_path_buf(),
        column: name.to_string(),
        expected: "a number",
        found: type_name(data_type),
    }
}

/// NaN where null.
fn float32(table: &Table, name: &str, column: &ArrayRef) -> Result<Vec<f32>, RecordsError> {
    let values = numbers(column).ok_or_else(|| not_a_number(table, name, column.data_type()))?;
    Ok(values.into_iter().map(|value| value as f32).collect())
}

/// Small Parquet files for the tests.
#[cfg(test)]
pub(super) mod testing {
    use std::fs::File;
    use std::sync::Arc;

    use arrow_array::{Float32Array, RecordBatch, StringArray};
    use arrow_schema::{Field, Schema};
    use parquet::arrow::ArrowWriter;

    use super::*;

    pub(in super::super) fn write(path: &Path, columns: Vec<(&str, ArrayRef)>) {
        let fields: Vec<Field> = columns
            .iter()
            .map(|(name, column)| Field::new(*name, column.data_type().clone(), true))
            .collect();
        let schema = Arc::new(Schema::new(fields));
        let columns = columns.into_iter().map(|(_, column)| column).collect();
        let batch = RecordBatch::try_new(schema.clone(), columns).unwrap();
        let mut writer = ArrowWriter::try_new(File::create(path).unwrap(), schema, None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
    }

    pub(in super::super) fn floats(values: &[f32]) -> ArrayRef {
        Arc::new(Float32Array::from(values.to_vec()))
    }

    pub(in super::super) fn texts(values: &[&str]) -> ArrayRef {
        Arc::new(StringArray::from(values.to_vec()))
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::Arc;

    use arrow_array::{BooleanArray, Float64Array, Int64Array, NullArray, StringArray};

    use super::*;
    use crate::item::omics::{OmicsOptions, omics_features, read_omics};

    fn file(columns: Vec<(&str, ArrayRef)>) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.parquet");
        testing::write(&path, columns);
        (folder, path)
    }

    fn message(columns: Vec<(&str, ArrayRef)>) -> String {
        let (_folder, path) = file(columns);
        let error = omics_features(&path).unwrap_err().to_string();
        assert!(error.contains("a.parquet"), "{error}");
        error
    }

    fn doubles(values: Vec<Option<f64>>) -> ArrayRef {
        Arc::new(Float64Array::from(values))
    }

    fn texts(values: Vec<Option<&str>>) -> ArrayRef {
        Arc::new(StringArray::from(values))
    }

    #[test]
    fn one_row_of_any_numbers_is_a_vector() {
        let (_folder, path) = file(vec![
            ("TP53", doubles(vec![Some(0.5)])),
            ("mutated", Arc::new(BooleanArray::from(vec![true]))),
            ("count", Arc::new(Int64Array::from(vec![-3]))),
            ("absent", doubles(vec![None])),
            ("nothing", Arc::new(NullArray::new(1))),
            ("__index_level_0__", texts(vec![Some("patient 7")])),
        ]);
        assert_eq!(
            omics_features(&path).unwrap(),
            ["TP53", "mutated", "count", "absent", "nothing"]
        );
        let values = read_omics(&path, &OmicsOptions::default()).unwrap().values;
        assert_eq!(values[..3], [0.5, 1.0, -3.0]);
        assert!(values[3].is_nan() && values[4].is_nan());
        let options = OmicsOptions {
            features: Some(["count", "x", "TP53"].map(String::from).to_vec()),
        };
        let found = read_omics(&path, &options).unwrap();
        assert_eq!((found.values[0], found.values[2]), (-3.0, 0.5));
        assert!(found.values[1].is_nan());
        assert_eq!((found.absent, found.ignored), (1, 3));
    }

    #[test]
    fn a_row_a_feature_is_a_vector() {
        let names = || texts(vec![Some("TP53"), Some("KRAS"), Some("MYC")]);
        let values = || doubles(vec![Some(0.5), None, Some(2.0)]);
        let identifiers: ArrayRef = Arc::new(Int64Array::from(vec![7157, 3845, 4609]));
        for (columns, expected) in [
            (vec![("gene", names()), ("P7", values())], "TP53"),
            (
                vec![("p", values()), ("value", values()), ("feature", names())],
                "TP53",
            ),
            (vec![("Feature", identifiers), ("Value", values())], "7157"),
        ] {
            let (_folder, path) = file(columns);
            assert_eq!(omics_features(&path).unwrap()[0], expected);
            let values = read_omics(&path, &OmicsOptions::default()).unwrap().values;
            assert_eq!((values.len(), values[0], values[2]), (3, 0.5, 2.0));
            assert!(values[1].is_nan());
        }
    }

    #[test]
    fn what_is_no_vector_is_refused() {
        let two = || doubles(vec![Some(1.0), Some(2.0)]);
        assert!(message(vec![("A", two()), ("B", two())]).contains("it has 2 rows"));
        let text = texts(vec![Some("x")]);
        let error = message(vec![("A", doubles(vec![Some(1.0)])), ("id", text)]);
        assert!(
            error.contains("`id` is string and must be a number"),
            "{error}"
        );
        let infinite = message(vec![("A", doubles(vec![Some(1e300)]))]);
        assert!(infinite.contains("column `A` is infinite"), "{infinite}");
        let names = texts(vec![Some("A"), None]);
        let error = message(vec![("feature", names), ("value", two())]);
        assert!(error.contains("row 1: `feature` is null"), "{error}");
        let names = texts(vec![Some("A"), Some("A")]);
        assert!(message(vec![("feature", names), ("value", two())]).contains("same name"));
        let names = texts(vec![Some("A"), Some("B")]);
        let missing = doubles(vec![None, Some(f64::NAN)]);
        let error = message(vec![("feature", names), ("value", missing)]);
        assert!(error.contains("all of its 2 values are missing"), "{error}");
    }

    #[test]
    fn a_damaged_file_is_named() {
        let (_folder, path) = file(vec![("A", doubles(vec![Some(1.0)]))]);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 3]).unwrap();
        let error = omics_features(&path).unwrap_err().to_string();
        assert!(
            error.contains("a.parquet") && error.contains("truncated"),
            "{error}"
        );
    }
}
