//! From the values of a grey image to the grey levels 0…255.

use super::ImageOptions;

/// The values shown as black and white where the options name them; `None` where they do not.
pub(in crate::item) fn chosen_range(values: &[f32], options: &ImageOptions) -> Option<(f64, f64)> {
    match (options.window, options.percentiles) {
        (Some(window), _) => Some((
            window.centre - window.width / 2.0,
            window.centre + window.width / 2.0,
        )),
        (None, Some(percentiles)) => percentile_range(values, percentiles),
        (None, None) => None,
    }
}

/// Percentiles of the finite values, interpolated between neighbours as `numpy.percentile` does.
fn percentile_range(values: &[f32], percentiles: [f64; 2]) -> Option<(f64, f64)> {
    let mut finite: Vec<f32> = values
        .iter()
        .copied()
        .filter(|value| value.is_finite())
        .collect();
    let last = finite.len().checked_sub(1)?;
    let mut at = |percent: f64| {
        let position = percent / 100.0 * last as f64;
        let below = (position.floor() as usize).min(last);
        let (_, &mut low, above) = finite.select_nth_unstable_by(below, f32::total_cmp);
        let high = above.iter().copied().min_by(f32::total_cmp).unwrap_or(low);
        f64::from(low) + (position - below as f64) * (f64::from(high) - f64::from(low))
    };
    Some((at(percentiles[0]), at(percentiles[1])))
}

/// The smallest and the largest of the finite values.
pub(in crate::item) fn full_range(values: &[f32]) -> Option<(f64, f64)> {
    let finite = values.iter().filter(|value| value.is_finite());
    let (low, high) = finite.fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), &value| {
        (low.min(value), high.max(value))
    });
    (low <= high).then_some((f64::from(low), f64::from(high)))
}

/// Brings a range of values to the grey levels 0…255, cutting off what lies outside. NaN becomes
/// black, and so does everything where the range is a single value or less.
pub(in crate::item) fn stretch(values: &mut [f32], (low, high): (f64, f64)) {
    let span = high - low;
    for value in values {
        let level = if span > 0.0 {
            (f64::from(*value) - low) / span * 255.0
        } else {
            0.0
        };
        *value = if level.is_nan() {
            0.0
        } else {
            level.clamp(0.0, 255.0) as f32
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::item::image::ImageWindow;

    #[test]
    fn percentiles_are_numpys() {
        // numpy.percentile([5, 1, 4, 2, 3], [10, 75]), NaN left out
        let values = [5.0, f32::NAN, 1.0, 4.0, 2.0, 3.0];
        let options = ImageOptions {
            percentiles: Some([10.0, 75.0]),
            ..ImageOptions::default()
        };
        let (low, high) = chosen_range(&values, &options).unwrap();
        assert!(
            (low - 1.4).abs() < 1e-6 && (high - 4.0).abs() < 1e-6,
            "{low} {high}"
        );
        assert_eq!(chosen_range(&[f32::NAN], &options), None);
        let options = ImageOptions {
            window: Some(ImageWindow {
                centre: 40.0,
                width: 400.0,
            }),
            ..options
        };
        assert_eq!(chosen_range(&values, &options), Some((-160.0, 240.0)));
        assert_eq!(full_range(&values), Some((1.0, 5.0)));
        assert_eq!(full_range(&[f32::NAN, f32::INFINITY]), None);
    }

    #[test]
    fn a_range_is_stretched_and_cut_off() {
        let mut values = [-1.0, 0.0, 1.0, 4.0, 9.0, f32::NAN, f32::INFINITY];
        stretch(&mut values, (0.0, 4.0));
        assert_eq!(values, [0.0, 0.0, 63.75, 255.0, 255.0, 0.0, 255.0]);
        let mut constant = [7.0; 3];
        stretch(&mut constant, (7.0, 7.0));
        assert_eq!(constant, [0.0; 3]);
    }
}
