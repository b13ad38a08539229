//! Numbers, names and times as people read them.

use std::time::{Duration, UNIX_EPOCH};

use calor_meter::Quantity;

use crate::recipe::Metric;

pub(super) fn split_name(name: &str) -> &str {
    match name {
        "held_out" => "held-out",
        "train" => "training",
        other => other,
    }
}

/// A metric's name as people write it.
pub(super) fn title(metric: &str) -> String {
    match Metric::ALL.into_iter().find(|known| known.name() == metric) {
        Some(known) => known.title().to_owned(),
        None => match metric {
            "auroc_micro" => "AUROC, micro".to_owned(),
            "auprc_micro" => "AUPRC, micro".to_owned(),
            "micro_f1" => "Micro F1".to_owned(),
            other => other.to_owned(),
        },
    }
}

pub(super) fn number(value: Option<f64>, decimals: usize) -> String {
    value.map_or("–".to_owned(), |value| format!("{value:.decimals$}"))
}

pub(super) fn quantity(quantity: &Quantity) -> String {
    quantity.value().map_or("–".to_owned(), significant)
}

/// Three significant digits, thousands grouped.
pub(super) fn significant(value: f64) -> String {
    let magnitude = value.abs();
    if !value.is_finite() {
        "–".to_owned()
    } else if magnitude >= 1000.0 {
        let whole = grouped(magnitude.round() as u64);
        if value < 0.0 {
            format!("−{whole}")
        } else {
            whole
        }
    } else if value == 0.0 {
        "0".to_owned()
    } else if magnitude < 1e-4 {
        format!("{value:.2e}")
    } else {
        let decimals = (2 - magnitude.log10().floor() as i32).max(0) as usize;
        format!("{value:.decimals$}")
    }
}

/// A whole number with thin spaces between thousands.
pub(super) fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    text
}

/// A time as `2026-11-23 14:05`, by the civil calendar (Hinnant's days-to-date algorithm).
pub(super) fn utc(unix_s: u64) -> String {
    let seconds = UNIX_EPOCH + Duration::from_secs(unix_s);
    let total = seconds
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    let (days, rest) = (total / 86_400, total % 86_400);
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let of_era = shifted % 146_097;
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_index = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_index + 2) / 5 + 1;
    let month = if month_index < 10 {
        month_index + 3
    } else {
        month_index - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02} {:02}:{:02}",
        rest / 3600,
        rest % 3600 / 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_grouped() {
        assert_eq!(grouped(1_234_567), "1\u{202f}234\u{202f}567");
        assert_eq!(grouped(12), "12");
        assert_eq!(significant(1234.6), "1\u{202f}235");
        assert_eq!(significant(0.012_345), "0.0123");
        assert_eq!(significant(12.345), "12.3");
        assert_eq!(significant(-3.0), "-3.00");
        assert_eq!(significant(f64::NAN), "–");
        assert_eq!(significant(3.2e-6), "3.20e-6");
    }

    #[test]
    fn times_are_of_the_civil_calendar() {
        assert_eq!(utc(0), "1970-01-01 00:00");
        assert_eq!(utc(951_827_696), "2000-02-29 12:34");
        assert_eq!(utc(1_795_442_700), "2026-11-23 14:05");
    }
}
