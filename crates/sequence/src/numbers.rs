/// A value in as few characters as three significant digits need; the whole part is never rounded
/// away: `0.00123`, `0.9`, `5.07`, `31.3`, `152`, `12345`, `1.2e9`.
pub(crate) fn format_value(value: f32) -> String {
    let value = f64::from(value);
    let magnitude = value.abs();
    if magnitude == 0.0 {
        return "0".to_string();
    }
    if !(1e-4..1e7).contains(&magnitude) {
        return trim_scientific(&format!("{value:.2e}"));
    }
    // Digits after the point that leave three significant ones.
    let decimals = (2 - magnitude.log10().floor() as i32).max(0) as usize;
    trim_zeros(&format!("{value:.decimals$}")).to_string()
}

fn trim_zeros(decimal: &str) -> &str {
    let trimmed = if decimal.contains('.') {
        decimal.trim_end_matches('0').trim_end_matches('.')
    } else {
        decimal
    };
    // Rounding can leave "-0".
    if trimmed == "-0" { "0" } else { trimmed }
}

fn trim_scientific(scientific: &str) -> String {
    let (mantissa, exponent) = scientific.split_once('e').expect("scientific notation");
    format!("{}e{exponent}", trim_zeros(mantissa))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn three_digits_and_no_more() {
        for (value, text) in [
            (0.0, "0"),
            (-0.0, "0"),
            (0.9, "0.9"),
            (5.074, "5.07"),
            (9.999, "10"),
            (31.27, "31.3"),
            (99.96, "100"),
            (152.0, "152"),
            (152.4, "152"),
            (12_345.6, "12346"),
            (0.001_234, "0.00123"),
            (-7.25, "-7.25"),
            (1.2e9, "1.2e9"),
            (4.56e-7, "4.56e-7"),
            (1.5e-4, "0.00015"),
        ] {
            assert_eq!(format_value(value), text, "{value}");
        }
    }

    proptest! {
        #[test]
        fn the_text_is_within_half_a_percent(value in prop::num::f32::NORMAL) {
            let back: f64 = format_value(value).parse().unwrap();
            let value = f64::from(value);
            prop_assert!((back - value).abs() <= 0.0051 * value.abs(), "{} {}", back, value);
        }
    }
}
