//! Times as MEDS has them: microseconds since 1970-01-01 00:00, without a time zone.

pub const MICROSECONDS_PER_SECOND: i64 = 1_000_000;
pub const MICROSECONDS_PER_DAY: i64 = 86_400 * MICROSECONDS_PER_SECOND;

/// The time in ISO 8601, e.g. `2001-02-03T04:05:06`, with a fraction only where there is one.
pub fn format_time_us(time_us: i64) -> String {
    let days = time_us.div_euclid(MICROSECONDS_PER_DAY);
    let within = time_us.rem_euclid(MICROSECONDS_PER_DAY);
    let (year, month, day) = civil_date(days);
    let seconds = within / MICROSECONDS_PER_SECOND;
    let fraction = within % MICROSECONDS_PER_SECOND;
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let mut text = format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}");
    if fraction != 0 {
        text.push_str(&format!(".{fraction:06}"));
    }
    text
}

/// Year, month and day of a day counted from 1970-01-01, in the proleptic Gregorian calendar.
fn civil_date(days: i64) -> (i64, i64, i64) {
    // Days are counted from 0000-03-01 so that a leap day ends its year; 400 years are 146,097
    // days.
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    let year = era * 400 + year_of_era + i64::from(month <= 2);
    (year, month, day)
}

/// Whether a text is a date or a time of ISO 8601 in its extended form, as Python's `isoformat`
/// writes it.
pub(crate) fn is_iso_8601(text: &str) -> bool {
    let bytes = text.as_bytes();
    let digits = |from: usize, count: usize| -> Option<u32> {
        let part = bytes.get(from..from + count)?;
        part.iter().all(u8::is_ascii_digit).then(|| {
            part.iter()
                .fold(0, |sum, digit| sum * 10 + u32::from(digit - b'0'))
        })
    };
    let date = (|| {
        let (year, month, day) = (digits(0, 4)?, digits(5, 2)?, digits(8, 2)?);
        let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let last = match month {
            2 => 28 + u32::from(leap),
            4 | 6 | 9 | 11 => 30,
            1..=12 => 31,
            _ => return None,
        };
        (bytes[4] == b'-' && bytes[7] == b'-' && (1..=last).contains(&day)).then_some(())
    })();
    if date.is_none() {
        return false;
    }
    if bytes.len() == 10 {
        return true;
    }
    if !matches!(bytes[10], b'T' | b' ') {
        return false;
    }
    let mut at = 13;
    if digits(11, 2).is_none_or(|hour| hour >= 24) {
        return false;
    }
    for _ in 0..2 {
        if bytes.get(at) != Some(&b':') {
            break;
        }
        if digits(at + 1, 2).is_none_or(|part| part >= 60) {
            return false;
        }
        at += 3;
    }
    if bytes.get(at) == Some(&b'.') {
        let count = bytes[at + 1..]
            .iter()
            .take_while(|byte| byte.is_ascii_digit())
            .count();
        if count == 0 {
            return false;
        }
        at += 1 + count;
    }
    match bytes.get(at) {
        None => true,
        Some(b'Z') => bytes.len() == at + 1,
        Some(b'+' | b'-') => {
            digits(at + 1, 2).is_some_and(|hour| hour < 24)
                && bytes.get(at + 3) == Some(&b':')
                && digits(at + 4, 2).is_some_and(|minute| minute < 60)
                && bytes.len() == at + 6
        }
        Some(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_formatted_as_other_tools_do() {
        // Checked against Python's datetime.
        for (time_us, text) in [
            (0, "1970-01-01T00:00:00"),
            (-1, "1969-12-31T23:59:59.999999"),
            (951_782_400_000_000, "2000-02-29T00:00:00"),
            (1_709_251_199_000_000, "2024-02-29T23:59:59"),
            (-2_203_891_200_000_000, "1900-03-01T00:00:00"),
            (4_107_542_400_000_000, "2100-03-01T00:00:00"),
            (1_234_567_890_123_456, "2009-02-13T23:31:30.123456"),
        ] {
            assert_eq!(format_time_us(time_us), text);
        }
    }

    #[test]
    fn iso_times_are_told_from_others() {
        for good in [
            "2024-02-29",
            "2024-02-28T12:30",
            "2024-02-28 12:30:01",
            "2024-02-28T12:30:01.123456+00:00",
            "2024-02-28T12:30:01Z",
        ] {
            assert!(is_iso_8601(good), "{good}");
        }
        for bad in [
            "",
            "yesterday",
            "2023-02-29",
            "2024-13-01",
            "2024-01-01T25:00",
            "2024-01-01T10:61",
            "2024-01-01T10:00:00.",
            "2024-01-01T10:00+5",
            "28/02/2024",
            "2024-01-01T10:00é",
        ] {
            assert!(!is_iso_8601(bad), "{bad}");
        }
    }
}
