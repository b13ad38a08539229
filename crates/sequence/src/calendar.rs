//! Ages and intervals, from microseconds since 1970-01-01.

use crate::options::TimeResolution;

const DAY_US: i64 = 86_400_000_000;

/// Whole days since 1970-01-01, rounded towards the past.
pub(crate) fn day_of(time_us: i64) -> i64 {
    time_us.div_euclid(DAY_US)
}

/// Year, month (1–12) and day of the month in the proleptic Gregorian calendar.
fn civil(day: i64) -> (i64, i64, i64) {
    // Years are counted from 1 March so that the leap day comes last; an era is the 400 years, of
    // 146,097 days, after which the calendar repeats. 719,468 days separate 0000-03-01 from 1970.
    let shifted = day + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    let year = era * 400 + year_of_era + i64::from(month <= 2);
    (year, month, day_of_month)
}

/// Age at a time, in completed units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Age {
    Years(i64),
    Months(i64),
    Days(i64),
}

impl Age {
    /// `None` before birth.
    pub(crate) fn at(time_us: i64, birth_us: i64) -> Option<Age> {
        let (day, birth_day) = (day_of(time_us), day_of(birth_us));
        if day < birth_day {
            return None;
        }
        let (year, month, date) = civil(day);
        let (birth_year, birth_month, birth_date) = civil(birth_day);
        let months = (year - birth_year) * 12 + month - birth_month - i64::from(date < birth_date);
        Some(if months >= 24 {
            Age::Years(months / 12)
        } else if months >= 2 {
            Age::Months(months)
        } else {
            Age::Days(day - birth_day)
        })
    }

    pub(crate) fn phrase(self) -> String {
        match self {
            Age::Years(years) => format!("{years} year old"),
            Age::Months(months) => format!("{months} month old"),
            Age::Days(days) => format!("{days} day old"),
        }
    }

    pub(crate) fn is_adult(self) -> bool {
        matches!(self, Age::Years(years) if years >= 18)
    }
}

/// A length of time in the largest unit that keeps it within about a tenth: `3 days`, `6 weeks`,
/// `14 months`, `5 years`. `None` when it is nothing at this resolution.
pub(crate) fn length_phrase(
    from_us: i64,
    to_us: i64,
    resolution: TimeResolution,
) -> Option<String> {
    let step = resolution.microseconds();
    let steps = to_us.div_euclid(step) - from_us.div_euclid(step);
    if steps <= 0 {
        return None;
    }
    let days = match resolution {
        TimeResolution::Day => steps,
        TimeResolution::Hour => {
            if steps < 48 {
                return Some(counted(steps, "hour"));
            }
            (steps + 12) / 24
        }
        TimeResolution::Minute => {
            if steps < 120 {
                return Some(counted(steps, "minute"));
            }
            let hours = (steps + 30) / 60;
            if hours < 48 {
                return Some(counted(hours, "hour"));
            }
            (hours + 12) / 24
        }
    };
    // 30.4375 and 365.25 days: the mean month and year of the Julian calendar.
    Some(match days {
        ..=13 => counted(days, "day"),
        14..=59 => counted((days + 3) / 7, "week"),
        60..=729 => counted((days as f64 / 30.4375).round() as i64, "month"),
        _ => counted((days as f64 / 365.25).round() as i64, "year"),
    })
}

fn counted(count: i64, unit: &str) -> String {
    format!("{count} {unit}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn us(day: i64) -> i64 {
        day * DAY_US
    }

    #[test]
    fn civil_dates() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(-1), (1969, 12, 31));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(11_017), (2000, 3, 1));
        assert_eq!(civil(-25_509), (1900, 2, 28));
        assert_eq!(civil(-25_508), (1900, 3, 1));
        assert_eq!(civil(20_780), (2026, 11, 23));
    }

    #[test]
    fn consecutive_days_have_consecutive_dates() {
        let mut before = civil(-200_000);
        for day in -199_999..200_000 {
            let now = civil(day);
            let next_day = now == (before.0, before.1, before.2 + 1);
            let next_month = now == (before.0, before.1 + 1, 1) && before.2 >= 28;
            let next_year = now == (before.0 + 1, 1, 1) && (before.1, before.2) == (12, 31);
            assert!(next_day || next_month || next_year, "{before:?} {now:?}");
            before = now;
        }
    }

    #[test]
    fn a_birthday_adds_a_year_on_the_day() {
        let birth = us(11_016); // 2000-02-29
        assert_eq!(Age::at(us(18_320), birth), Some(Age::Years(19))); // 2020-02-28
        assert_eq!(Age::at(us(18_321), birth), Some(Age::Years(20))); // 2020-02-29
        assert_eq!(Age::at(us(18_321) - 1, birth), Some(Age::Years(19)));
        assert_eq!(Age::at(birth, birth), Some(Age::Days(0)));
        assert_eq!(Age::at(birth - DAY_US, birth), None);
        assert_eq!(Age::at(us(11_016 + 59), birth), Some(Age::Days(59)));
        assert_eq!(Age::at(us(11_016 + 60), birth), Some(Age::Months(2)));
        assert_eq!(Age::at(us(11_016 + 700), birth), Some(Age::Months(23)));
    }

    #[test]
    fn phrases_use_the_largest_sensible_unit() {
        let phrase = |days| length_phrase(0, us(days), TimeResolution::Day);
        assert_eq!(phrase(0), None);
        assert_eq!(phrase(1).unwrap(), "1 day");
        assert_eq!(phrase(13).unwrap(), "13 days");
        assert_eq!(phrase(14).unwrap(), "2 weeks");
        assert_eq!(phrase(59).unwrap(), "8 weeks");
        assert_eq!(phrase(60).unwrap(), "2 months");
        assert_eq!(phrase(729).unwrap(), "24 months");
        assert_eq!(phrase(731).unwrap(), "2 years");
        assert_eq!(phrase(3_653).unwrap(), "10 years");
    }

    #[test]
    fn resolution_decides_what_is_the_same_time() {
        let late = DAY_US - 1;
        assert_eq!(length_phrase(0, late, TimeResolution::Day), None);
        // One microsecond over midnight is the next day.
        assert_eq!(
            length_phrase(late, DAY_US, TimeResolution::Day).unwrap(),
            "1 day"
        );
        assert_eq!(
            length_phrase(0, late, TimeResolution::Hour).unwrap(),
            "23 hours"
        );
        assert_eq!(
            length_phrase(0, 60_000_000, TimeResolution::Minute).unwrap(),
            "1 minute"
        );
        assert_eq!(
            length_phrase(0, 3 * DAY_US, TimeResolution::Minute).unwrap(),
            "3 days"
        );
    }
}
