//! Tables and numbers for people, JSON for programs.

use std::io::{self, Write};

use serde::Serialize;

/// Whether a column is read as words or compared as numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

/// A table of aligned columns, without lines: it can be cut and pasted.
#[derive(Clone, Debug, Default)]
pub struct Table {
    heads: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column heads; empty heads give a table without a head line.
    pub fn new(heads: &[(&str, Align)]) -> Table {
        let heads = heads
            .iter()
            .map(|(name, align)| ((*name).to_owned(), *align))
            .collect();
        Table {
            heads,
            rows: Vec::new(),
        }
    }

    /// Adds a row; missing cells are empty.
    pub fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) -> &mut Table {
        let mut cells: Vec<String> = cells.into_iter().map(Into::into).collect();
        cells.resize(self.heads.len(), String::new());
        self.rows.push(cells);
        self
    }

    /// Whether it has no rows.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The table as text, each line starting with two spaces.
    pub fn render(&self) -> String {
        let mut widths: Vec<usize> = self
            .heads
            .iter()
            .map(|(name, _)| name.chars().count())
            .collect();
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let heads: Vec<String> = self.heads.iter().map(|(name, _)| name.clone()).collect();
        let headed = heads.iter().any(|name| !name.is_empty());
        let mut text = String::new();
        for row in headed.then_some(&heads).into_iter().chain(&self.rows) {
            let mut line = String::from(" ");
            for ((cell, width), (_, align)) in row.iter().zip(&widths).zip(&self.heads) {
                let fill = " ".repeat(width - cell.chars().count());
                line.push(' ');
                match align {
                    Align::Left => line.extend([cell.as_str(), &fill]),
                    Align::Right => line.extend([fill.as_str(), cell]),
                }
                line.push(' ');
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// Writes text to stdout. A reader that went away (`calor … | head`) is no error.
pub fn print(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// Writes one JSON document to stdout, indented.
pub fn print_json(value: &impl Serialize) -> io::Result<()> {
    let mut text = serde_json::to_string_pretty(value).map_err(io::Error::other)?;
    text.push('\n');
    print(&text)
}

/// A count with thousands apart: `1,234,567`.
pub fn count(value: impl TryInto<u64>) -> String {
    let digits = value.try_into().ok().unwrap_or(u64::MAX).to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A size in bytes in the unit that suits it: `87.4 MiB`.
pub fn bytes(value: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut scaled = value as f64;
    let mut unit = 0;
    while scaled >= 1024.0 && unit + 1 < UNITS.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{value} B")
    } else {
        format!("{scaled:.1} {}", UNITS[unit])
    }
}

/// Four significant digits, plain for middling magnitudes: `0.08312`, `1,532`, `3.10e-7`; whole
/// numbers as such.
pub fn number(value: f64) -> String {
    let magnitude = value.abs();
    if !value.is_finite() {
        return value.to_string();
    }
    if magnitude < 1e15 && (magnitude >= 1000.0 || magnitude.fract() == 0.0) {
        let whole = count(magnitude.round() as u64);
        return if value < 0.0 {
            format!("-{whole}")
        } else {
            whole
        };
    }
    if !(1e-4..1e15).contains(&magnitude) {
        return format!("{value:.2e}");
    }
    let decimals = (3 - magnitude.log10().floor() as i32).max(0) as usize;
    format!("{value:.decimals$}")
}

/// A span of time: `850 ms`, `12.4 s`, `3 min 20 s`, `2 h 05 min`.
pub fn seconds(value: f64) -> String {
    if !value.is_finite() || value < 0.0 {
        return "unknown".to_owned();
    }
    let whole = value.round() as u64;
    if value < 1.0 {
        format!("{:.0} ms", value * 1e3)
    } else if whole < 60 {
        format!("{value:.1} s")
    } else if whole < 3600 {
        format!("{} min {:02} s", whole / 60, whole % 60)
    } else {
        format!("{} h {:02} min", whole / 3600, whole % 3600 / 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&[("metric", Align::Left), ("value", Align::Right)]);
        table.row(["AUROC", "0.871"]).row(["é", "12.0"]);
        assert_eq!(
            table.render(),
            "  metric  value\n  AUROC   0.871\n  é        12.0\n"
        );
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(count(0u64), "0");
        assert_eq!(count(999u64), "999");
        assert_eq!(count(1_234_567u64), "1,234,567");
        assert_eq!(bytes(512), "512 B");
        assert_eq!(bytes(91_600_000), "87.4 MiB");
        assert_eq!(number(0.083_123), "0.08312");
        assert_eq!(number(1531.7), "1,532");
        assert_eq!(number(0.0), "0");
        assert_eq!(number(-2.0), "-2");
        assert_eq!(number(-2.25), "-2.250");
        assert_eq!(number(3.1e-7), "3.10e-7");
        assert_eq!(seconds(0.85), "850 ms");
        assert_eq!(seconds(200.0), "3 min 20 s");
        assert_eq!(seconds(7500.0), "2 h 05 min");
    }
}
