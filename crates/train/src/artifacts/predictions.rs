//! `predictions.parquet`: a row for each patient at each prediction time.
//!
//! Columns: `subject_id` int64, `prediction_time` timestamp[us], then by task
//! - binary: `probability` (of `true`) float64, `label` boolean;
//! - multiclass: `predicted` string, `probability` (of it), `probability_<class>`, `label` string;
//! - multilabel: `probability_<label>`, `label_<label>` boolean, for each label;
//! - regression: `prediction` float64, `label` float32;
//! - tokens: `predicted` and `label`, lists of strings, one a word;
//! - causal_lm: `tokens` int64 that were to be predicted, `loss` float64, their mean.
//!
//! Of files of text, `subject_id` is the row's number in its file, from 0, and the time means nothing.
//!
//! A label that is not known is null.

use std::path::Path;
use std::sync::Arc;

use arrow_array::builder::{ListBuilder, StringBuilder};
use arrow_array::{
    ArrayRef, BooleanArray, Float32Array, Float64Array, Int64Array, RecordBatch, StringArray,
    TimestampMicrosecondArray,
};
use arrow_schema::{DataType, Field, Schema, TimeUnit};
use calor_evaluate::class_label;
use calor_sequence::{NO_TARGET, Targets};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;

use crate::TrainError;
use crate::evaluation::Scored;
use crate::files::write_whole;
use crate::recipe::TaskKind;

/// Writes the scores; the file appears whole or not at all.
pub fn write(path: &Path, scored: &Scored) -> Result<(), TrainError> {
    let failed = |problem: String| TrainError::Corrupt {
        path: path.to_owned(),
        problem: format!("cannot be written as Parquet: {problem}"),
    };
    let batch = batch(scored).map_err(failed)?;
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .build();
    let mut bytes = Vec::new();
    let written = (|| {
        let mut writer = ArrowWriter::try_new(&mut bytes, batch.schema(), Some(properties))?;
        writer.write(&batch)?;
        writer.close()
    })();
    written.map_err(|error| failed(error.to_string()))?;
    write_whole(path, &bytes)
}

fn batch(scored: &Scored) -> Result<RecordBatch, String> {
    let time = DataType::Timestamp(TimeUnit::Microsecond, None);
    let mut fields = vec![
        Field::new("subject_id", DataType::Int64, false),
        Field::new("prediction_time", time, false),
    ];
    let mut columns: Vec<ArrayRef> = vec![
        Arc::new(Int64Array::from(scored.subject_ids.clone())),
        Arc::new(TimestampMicrosecondArray::from(
            scored.prediction_times_us.clone(),
        )),
    ];
    let mut add = |name: String, kind: DataType, nullable: bool, column: ArrayRef| {
        fields.push(Field::new(name, kind, nullable));
        columns.push(column);
    };
    let probabilities = scored.probabilities();
    let column_of = |column: usize| -> ArrayRef {
        Arc::new(Float64Array::from_iter_values(
            probabilities
                .iter()
                .skip(column)
                .step_by(scored.width)
                .copied(),
        ))
    };
    let classes = &scored.task.classes;
    match scored.task.kind {
        TaskKind::Binary => {
            add("probability".into(), DataType::Float64, false, column_of(0));
            let labels = scored.targets.iter().map(|target| match target {
                Targets::Class(class) => Some(*class == 1),
                _ => None,
            });
            add(
                "label".into(),
                DataType::Boolean,
                true,
                Arc::new(labels.collect::<BooleanArray>()),
            );
        }
        TaskKind::Multiclass => {
            let predicted: Vec<usize> = probabilities
                .chunks(scored.width)
                .map(class_label)
                .collect();
            let names =
                StringArray::from_iter_values(predicted.iter().map(|class| &classes[*class]));
            add("predicted".into(), DataType::Utf8, false, Arc::new(names));
            let highest = predicted
                .iter()
                .enumerate()
                .map(|(row, class)| probabilities[row * scored.width + class]);
            add(
                "probability".into(),
                DataType::Float64,
                false,
                Arc::new(Float64Array::from_iter_values(highest)),
            );
            for (column, class) in classes.iter().enumerate() {
                add(
                    format!("probability_{class}"),
                    DataType::Float64,
                    false,
                    column_of(column),
                );
            }
            let labels = scored.targets.iter().map(|target| match target {
                Targets::Class(class) => classes.get(*class as usize),
                _ => None,
            });
            add(
                "label".into(),
                DataType::Utf8,
                true,
                Arc::new(labels.collect::<StringArray>()),
            );
        }
        TaskKind::Multilabel => {
            for (column, name) in classes.iter().enumerate() {
                add(
                    format!("probability_{name}"),
                    DataType::Float64,
                    false,
                    column_of(column),
                );
                let labels = scored.targets.iter().map(|target| match target {
                    Targets::Multilabel(labels) if !labels[column].is_nan() => {
                        Some(labels[column] > 0.5)
                    }
                    _ => None,
                });
                add(
                    format!("label_{name}"),
                    DataType::Boolean,
                    true,
                    Arc::new(labels.collect::<BooleanArray>()),
                );
            }
        }
        TaskKind::Regression => {
            add("prediction".into(), DataType::Float64, false, column_of(0));
            let labels = scored.targets.iter().map(|target| match target {
                Targets::Real(value) => Some(*value),
                _ => None,
            });
            add(
                "label".into(),
                DataType::Float32,
                true,
                Arc::new(labels.collect::<Float32Array>()),
            );
        }
        TaskKind::Tokens => {
            let names = |row: &[usize]| -> Vec<&str> {
                row.iter().map(|class| classes[*class].as_str()).collect()
            };
            let predicted = lists(scored.tags.iter().map(|row| names(row)));
            let labels = lists(scored.targets.iter().map(|target| match target {
                Targets::Tokens(targets) => {
                    let learned = targets.iter().filter(|target| **target != NO_TARGET);
                    names(&learned.map(|target| *target as usize).collect::<Vec<_>>())
                }
                _ => Vec::new(),
            }));
            for (name, column) in [("predicted", predicted), ("label", labels)] {
                add(name.into(), column.data_type().clone(), false, column);
            }
        }
        TaskKind::CausalLm => {
            let counts: Vec<i64> = scored
                .targets
                .iter()
                .map(|target| target.supervised_count() as i64)
                .collect();
            let losses = scored.outputs.iter().zip(&counts);
            let means = losses.map(|(loss, count)| loss / (*count).max(1) as f64);
            let means: ArrayRef = Arc::new(Float64Array::from_iter_values(means));
            let counts: ArrayRef = Arc::new(Int64Array::from(counts));
            add("tokens".into(), DataType::Int64, false, counts);
            add("loss".into(), DataType::Float64, false, means);
        }
    }
    RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).map_err(|error| error.to_string())
}

fn lists<'a>(rows: impl Iterator<Item = Vec<&'a str>>) -> ArrayRef {
    let mut builder = ListBuilder::new(StringBuilder::new());
    for row in rows {
        for text in row {
            builder.values().append_value(text);
        }
        builder.append(true);
    }
    Arc::new(builder.finish())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evaluation::tests::scored;
    use arrow_array::Array;
    use arrow_array::cast::AsArray;
    use arrow_array::types::{Float64Type, Int64Type, TimestampMicrosecondType};
    use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

    fn written(scored: &Scored) -> RecordBatch {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("predictions.parquet");
        write(&path, scored).unwrap();
        let file = std::fs::File::open(path).unwrap();
        ParquetRecordBatchReaderBuilder::try_new(file)
            .unwrap()
            .build()
            .unwrap()
            .next()
            .unwrap()
            .unwrap()
    }

    fn names(batch: &RecordBatch) -> Vec<String> {
        batch
            .schema()
            .fields()
            .iter()
            .map(|field| field.name().clone())
            .collect()
    }

    #[test]
    fn binary_predictions_carry_subject_time_probability_and_label() {
        let batch = written(&scored(
            TaskKind::Binary,
            &["false", "true"],
            &[0.0, 2.0],
            1,
            vec![Targets::Class(0), Targets::None],
        ));
        assert_eq!(
            names(&batch),
            ["subject_id", "prediction_time", "probability", "label"]
        );
        assert_eq!(
            batch.column(0).as_primitive::<Int64Type>().values(),
            &[1, 2]
        );
        assert_eq!(
            batch
                .column(1)
                .as_primitive::<TimestampMicrosecondType>()
                .values(),
            &[1_000_000, 2_000_000]
        );
        assert_eq!(batch.column(2).as_primitive::<Float64Type>().value(0), 0.5);
        assert!(!batch.column(3).as_boolean().value(0) && batch.column(3).is_null(1));
    }

    #[test]
    fn classes_and_labels_have_columns_by_name() {
        let batch = written(&scored(
            TaskKind::Multiclass,
            &["a", "b"],
            &[0.0, 1.0],
            2,
            vec![Targets::Class(0)],
        ));
        assert_eq!(
            names(&batch)[2..],
            [
                "predicted",
                "probability",
                "probability_a",
                "probability_b",
                "label"
            ]
        );
        assert_eq!(batch.column(2).as_string::<i32>().value(0), "b");
        assert_eq!(batch.column(6).as_string::<i32>().value(0), "a");
        let batch = written(&scored(
            TaskKind::Multilabel,
            &["x", "y"],
            &[0.0, 1.0],
            2,
            vec![Targets::Multilabel(vec![1.0, f32::NAN])],
        ));
        assert_eq!(
            names(&batch)[2..],
            ["probability_x", "label_x", "probability_y", "label_y"]
        );
        assert!(batch.column(3).as_boolean().value(0) && batch.column(5).is_null(0));
        let batch = written(&scored(
            TaskKind::Regression,
            &[],
            &[7.5],
            1,
            vec![Targets::Real(3.0)],
        ));
        assert_eq!(names(&batch)[2..], ["prediction", "label"]);
    }

    #[test]
    fn tags_are_lists_and_losses_are_means() {
        let mut tagged = scored(
            TaskKind::Tokens,
            &["B-X", "O"],
            &[0.5],
            1,
            vec![Targets::Tokens(vec![NO_TARGET, 1, NO_TARGET, 0])],
        );
        tagged.tags = vec![vec![1, 1]];
        let batch = written(&tagged);
        assert_eq!(names(&batch)[2..], ["predicted", "label"]);
        let words = |column: usize| -> Vec<String> {
            let row = batch.column(column).as_list::<i32>().value(0);
            let texts = row.as_string::<i32>().iter();
            texts.flatten().map(str::to_owned).collect()
        };
        assert_eq!(
            (words(2), words(3)),
            (vec!["O".into(), "O".into()], vec!["O".into(), "B-X".into()])
        );
        let batch = written(&scored(
            TaskKind::CausalLm,
            &[],
            &[3.0],
            1,
            vec![Targets::Tokens(vec![NO_TARGET, 7, 9])],
        ));
        assert_eq!(names(&batch)[2..], ["tokens", "loss"]);
        assert_eq!(batch.column(3).as_primitive::<Float64Type>().value(0), 1.5);
    }
}
