//! An irregular series as statistics of windows: what a table of features would have of it.

use crate::stream::SeriesValue;

/// Numbers of a variable in a window.
pub const WINDOW_STATISTICS: usize = 6;

/// Statistics of each variable in each of `windows` windows of equal length that end with the
/// prediction and reach back `span_days`; what is older counts in the oldest window.
///
/// Returns `[variables, windows, WINDOW_STATISTICS]`, windows from the oldest: ln(1 + number of
/// values), mean, lowest, highest, latest, and latest minus first. NaN where there are too few values:
/// none, or one for the last. Values are standardised as [`SeriesValue::value`] is, in order of time.
pub fn series_windows(
    series: &[SeriesValue],
    variables: usize,
    windows: usize,
    span_days: f64,
) -> Vec<f32> {
    let mut found = vec![Window::default(); variables * windows];
    let length_days = span_days / windows as f64;
    for value in series {
        let variable = value.variable as usize;
        if variable >= variables {
            continue;
        }
        let ago = (f64::from(value.time_days) / length_days).floor();
        let ago = (ago.max(0.0) as usize).min(windows - 1);
        found[variable * windows + windows - 1 - ago].add(*value);
    }
    found.iter().flat_map(Window::statistics).collect()
}

#[derive(Clone, Copy, Default)]
struct Window {
    count: u32,
    sum: f64,
    lowest: f32,
    highest: f32,
    /// Time before the prediction, and value.
    first: (f32, f32),
    latest: (f32, f32),
}

impl Window {
    fn add(&mut self, found: SeriesValue) {
        let (time, value) = (found.time_days, found.value);
        if self.count == 0 {
            self.lowest = value;
            self.highest = value;
            self.first = (time, value);
            self.latest = (time, value);
        }
        self.count += 1;
        self.sum += f64::from(value);
        self.lowest = self.lowest.min(value);
        self.highest = self.highest.max(value);
        // Of values at one time the last that is given is the latest.
        if time > self.first.0 {
            self.first = (time, value);
        }
        if time <= self.latest.0 {
            self.latest = (time, value);
        }
    }

    fn statistics(&self) -> [f32; WINDOW_STATISTICS] {
        let count = (f64::from(self.count)).ln_1p() as f32;
        if self.count == 0 {
            return [count, f32::NAN, f32::NAN, f32::NAN, f32::NAN, f32::NAN];
        }
        let change = match self.count {
            1 => f32::NAN,
            _ => self.latest.1 - self.first.1,
        };
        let mean = (self.sum / f64::from(self.count)) as f32;
        [
            count,
            mean,
            self.lowest,
            self.highest,
            self.latest.1,
            change,
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(time_days: f32, variable: u32, value: f32) -> SeriesValue {
        SeriesValue {
            time_days,
            variable,
            value,
        }
    }

    /// NaN differs from itself; their text does not.
    fn same(found: &[f32], expected: &[f32]) {
        assert_eq!(format!("{found:?}"), format!("{expected:?}"));
    }

    #[test]
    fn windows_end_with_the_prediction_and_the_oldest_takes_what_is_older() {
        let series = [
            value(9.0, 0, 4.0),
            value(1.5, 0, 1.0),
            value(0.9, 0, -1.0),
            value(0.5, 1, 2.0),
            value(0.0, 0, 3.0),
        ];
        let found = series_windows(&series, 2, 2, 2.0);
        let nothing = [0.0, f32::NAN, f32::NAN, f32::NAN, f32::NAN, f32::NAN];
        same(&found[..6], &[3f32.ln(), 2.5, 1.0, 4.0, 1.0, -3.0]);
        same(&found[6..12], &[3f32.ln(), 1.0, -1.0, 3.0, 3.0, 4.0]);
        same(&found[12..18], &nothing);
        same(&found[18..], &[2f32.ln(), 2.0, 2.0, 2.0, 2.0, f32::NAN]);
    }

    #[test]
    fn nothing_measured_is_counts_of_zero() {
        let found = series_windows(&[], 3, 4, 1.0);
        assert_eq!(found.len(), 3 * 4 * WINDOW_STATISTICS);
        assert!(
            found
                .chunks(WINDOW_STATISTICS)
                .all(|one| one[0] == 0.0 && one[1].is_nan())
        );
        // A variable that training patients did not have says nothing.
        let found = series_windows(&[value(0.1, 7, 1.0)], 3, 1, 1.0);
        assert!(found.chunks(WINDOW_STATISTICS).all(|one| one[0] == 0.0));
    }
}
