use std::path::Path;

use csv::StringRecord;

use super::{Gather, bad_value, long_columns, problem, read_bytes};
use crate::error::RecordsError;

/// Cells that mean a missing value: those of `pandas.read_csv` (documentation of `na_values`,
/// pandas 2.3).
const MISSING: [&str; 19] = [
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN",
    "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
];

/// Which cells are names and which are values.
#[derive(Debug, PartialEq, Eq)]
enum Layout {
    /// A header of names and one row of values.
    Wide,
    /// A row a feature.
    Long {
        name: usize,
        value: usize,
        header: bool,
    },
}

pub(super) fn read(path: &Path, gather: &mut Gather<'_>) -> Result<(), RecordsError> {
    let bytes = read_bytes(path)?;
    let mut reader = csv::ReaderBuilder::new()
        .has_headers(false)
        .flexible(true)
        .trim(csv::Trim::All)
        .delimiter(delimiter(&bytes))
        .from_reader(bytes.as_slice());
    let mut records = reader.records();
    let mut next = || {
        records
            .next()
            .transpose()
            .map_err(|error| refuse(path, error))
    };
    let (Some(head), Some(first)) = (next()?, next()?) else {
        return Err(problem(
            path,
            "it has fewer than two lines",
            "write a line of names and a line of values",
        ));
    };
    let second = next()?;
    match layout(&head, &first, second.is_some()) {
        Layout::Wide => {
            if second.is_some() {
                return Err(problem(
                    path,
                    format!("it has {} columns and more than one row", head.len()),
                    "give each patient a file of their own, with one row or with a row a feature",
                ));
            }
            read_wide(path, &head, &first, gather)
        }
        Layout::Long {
            name,
            value,
            header,
        } => {
            let mut row = 0;
            let mut read_row = |record: &StringRecord| -> Result<(), RecordsError> {
                read_feature(path, record, (row, head.len()), (name, value), gather)?;
                row += 1;
                Ok(())
            };
            if !header {
                read_row(&head)?;
            }
            read_row(&first)?;
            let mut record = second;
            while let Some(feature) = record {
                read_row(&feature)?;
                record = next()?;
            }
            Ok(())
        }
    }
}

fn layout(head: &StringRecord, first: &StringRecord, more: bool) -> Layout {
    if let Some((name, value)) = long_columns(head.iter()) {
        return Layout::Long {
            name,
            value,
            header: true,
        };
    }
    // Two lines of two cells may be either: a name is not a number.
    if head.len() == 2 && first.len() == 2 && (more || number(&first[0]).is_err()) {
        return Layout::Long {
            name: 0,
            value: 1,
            // pandas heads a series without a name with an empty cell and a 0.
            header: head[0].is_empty() || number(&head[1]).is_err(),
        };
    }
    Layout::Wide
}

fn read_wide(
    path: &Path,
    names: &StringRecord,
    values: &StringRecord,
    gather: &mut Gather<'_>,
) -> Result<(), RecordsError> {
    if names.len() != values.len() {
        return Err(problem(
            path,
            format!(
                "it names {} columns and has {} values",
                names.len(),
                values.len()
            ),
            "write a value, or nothing between two separators, for each name",
        ));
    }
    for (column, (name, value)) in names.iter().zip(values).enumerate() {
        // The names of rows, which pandas and R write in front: they may be identifiers.
        if column == 0 && name.is_empty() {
            continue;
        }
        if let Some(place) = gather.place(name)? {
            number(value)
                .and_then(|value| gather.set(place, value))
                .map_err(|what| bad_value(path, 0, &format!("`{name}`"), what))?;
        }
    }
    Ok(())
}

fn read_feature(
    path: &Path,
    record: &StringRecord,
    (row, columns): (usize, usize),
    (name, value): (usize, usize),
    gather: &mut Gather<'_>,
) -> Result<(), RecordsError> {
    if record.len() != columns {
        return Err(problem(
            path,
            format!(
                "row {row} has {} columns and its first line {columns}",
                record.len()
            ),
            "write the same columns in every row",
        ));
    }
    if let Some(place) = gather.place(&record[name])? {
        // The column by its number: tables of many samples head it with a patient's identifier.
        number(&record[value])
            .and_then(|value| gather.set(place, value))
            .map_err(|what| bad_value(path, row, &format!("{value} (from 0)"), what))?;
    }
    Ok(())
}

/// A cell as a number, NaN where missing.
fn number(cell: &str) -> Result<f32, &'static str> {
    match cell.parse::<f32>() {
        Ok(number) => Ok(number),
        Err(_) if MISSING.contains(&cell) => Ok(f32::NAN),
        Err(_) => Err("is not a number"),
    }
}

/// What separates the cells: of comma, tab and semicolon, the one most frequent in the first line.
fn delimiter(bytes: &[u8]) -> u8 {
    let line = bytes
        .split(|&byte| byte == b'\n')
        .next()
        .unwrap_or_default();
    let count = |separator: u8| line.iter().filter(|&&byte| byte == separator).count();
    let mut best = b',';
    for separator in [b'\t', b';'] {
        if count(separator) > count(best) {
            best = separator;
        }
    }
    best
}

fn refuse(path: &Path, error: csv::Error) -> RecordsError {
    let record = error.position().map_or(0, csv::Position::record);
    match error.into_kind() {
        csv::ErrorKind::Io(source) => RecordsError::io(path, source),
        csv::ErrorKind::Utf8 { .. } => problem(
            path,
            format!("its line {} is not UTF-8", record + 1),
            "write it again in UTF-8",
        ),
        _ => problem(
            path,
            format!("its line {} cannot be cut into cells", record + 1),
            "write it as CSV (RFC 4180)",
        ),
    }
}

#[cfg(test)]
mod tests {
    use crate::item::omics::{OmicsOptions, omics_features, read_omics};

    fn file(content: &str) -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.csv");
        std::fs::write(&path, content).unwrap();
        (folder, path)
    }

    fn read_all(content: &str) -> (Vec<String>, Vec<f32>) {
        let (_folder, path) = file(content);
        let vector = read_omics(&path, &OmicsOptions::default())
            .unwrap_or_else(|error| panic!("{error} in {content:?}"));
        (omics_features(&path).unwrap(), vector.values)
    }

    fn message(content: &str) -> String {
        let (_folder, path) = file(content);
        let error = read_omics(&path, &OmicsOptions::default()).unwrap_err();
        assert!(error.to_string().contains("a.csv"), "{error}");
        error.to_string()
    }

    #[test]
    fn every_layout_gives_the_same_vector() {
        for content in [
            "TP53,BRCA1,KRAS\n0.5,-1,2e3\n",
            "\u{feff}TP53,BRCA1,KRAS\r\n0.5,-1,2e3",
            "TP53\tBRCA1\tKRAS\n0.5\t-1\t2e3\n",
            "TP53; BRCA1; KRAS\n0.5; -1; 2e3\n",
            // As pandas and R write a frame of one row, whose name may be an identifier.
            ",TP53,BRCA1,KRAS\npatient 7,0.5,-1,2e3\n",
            "\"\",\"TP53\",\"BRCA1\",\"KRAS\"\n\"1\",0.5,-1,2e3\n",
            "gene,P7\nTP53,0.5\nBRCA1,-1\nKRAS,2e3\n",
            // A series of pandas, and a table without a header.
            ",0\nTP53,0.5\nBRCA1,-1\nKRAS,2e3\n",
            "TP53,0.5\nBRCA1,-1\nKRAS,2e3\n",
            "n,Feature,p,Value\n0,TP53,x,0.5\n1,BRCA1,y,-1\n2,KRAS,z,2e3\n",
        ] {
            let (names, values) = read_all(content);
            assert_eq!(names, ["TP53", "BRCA1", "KRAS"], "{content:?}");
            assert_eq!(values, [0.5, -1.0, 2000.0], "{content:?}");
        }
    }

    #[test]
    fn two_lines_of_two_cells_are_told_apart() {
        assert_eq!(read_all("A,B\n1,2\n").0, ["A", "B"]);
        assert_eq!(read_all("A,B\n,2\n").0, ["A", "B"]);
        assert_eq!(read_all("A,1\nB,2\n").0, ["A", "B"]);
        assert_eq!(read_all("feature,value\n7157,2\n").0, ["7157"]);
        assert_eq!(read_all("gene,count\nTP53,2\n").0, ["TP53"]);
        assert_eq!(read_all(",TP53\n0,2\n").0, ["TP53"]);
    }

    #[test]
    fn missing_cells_are_nan() {
        let (_, values) = read_all("A,B,C,D,E\n,NA,nan,<NA>,1\n");
        assert!(values[..4].iter().all(|value| value.is_nan()));
        assert_eq!(values[4], 1.0);
        assert!(read_all("A,\nB,3\nC,NULL\n").1[2].is_nan());
    }

    #[test]
    fn what_is_no_number_is_named_by_row_and_column() {
        assert!(message("A,B\n1,x7y\n").contains("row 0, column `B` is not a number"));
        let long = message("gene,P7\nA,1\nB,x7y\n");
        assert!(
            long.contains("row 1, column 1 (from 0) is not a number"),
            "{long}"
        );
        assert!(!long.contains("x7y") && !long.contains("P7"), "{long}");
        assert!(message("A,1\nB,2\nC,x\n").contains("row 2"));
        assert!(message("A,B,C\n1,inf,2\n").contains("column `B` is infinite"));
        assert!(message("A,B,C\n1,1e39,2\n").contains("column `B` is infinite"));
    }

    #[test]
    fn a_wrong_shape_is_told() {
        assert!(message("").contains("fewer than two lines"));
        assert!(message("A,B\n").contains("fewer than two lines"));
        assert!(message("A,B,C\n1,2,3\n4,5,6\n").contains("3 columns and more than one row"));
        assert!(message("A,B,C\n1,2\n").contains("names 3 columns and has 2 values"));
        assert!(message("gene,x\nA,1\nB,2,3\n").contains("row 1 has 3 columns"));
        assert!(message("A,B,A\n1,2,3\n").contains("same name"));
        assert!(message("gene,x\nA,1\nA,2\n").contains("same name"));
        assert!(message("A,B,C\nNA,,nan\n").contains("all of its 3 values are missing"));
    }

    #[test]
    fn text_in_another_encoding_is_refused() {
        let (_folder, path) = file("");
        std::fs::write(&path, b"A,B\n1,\xe6\n").unwrap();
        let error = read_omics(&path, &OmicsOptions::default()).unwrap_err();
        assert!(error.to_string().contains("UTF-8"), "{error}");
    }

    #[test]
    fn what_is_not_asked_for_need_not_be_a_number() {
        let (_folder, path) = file("id,TP53,BRCA1\npatient 7,0.5,2\n");
        let options = OmicsOptions {
            features: Some(vec!["BRCA1".into(), "TP53".into()]),
        };
        let found = read_omics(&path, &options).unwrap();
        assert_eq!(found.values, [2.0, 0.5]);
        assert_eq!((found.absent, found.ignored), (0, 1));
        let all = "BRCA1,TP53\n2,0.5\n";
        let (_folder, path) = file(all);
        let own = read_omics(&path, &OmicsOptions::default()).unwrap();
        assert_eq!(found.layout, own.layout, "the same names in the same order");
        let (_folder, path) = file("TP53,BRCA1\n0.5,2\n");
        let other = read_omics(&path, &OmicsOptions::default()).unwrap();
        assert_ne!(found.layout, other.layout, "another order");
    }
}
