//! The two pieces of Python that chat templates call: `json.dumps` and `strftime`.

use std::fmt::Write as _;
use std::io::{Result, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// Python's default separators: `", "` and `": "`.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> Result<()> {
        self.begin_array_value(w, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, w: &mut W) -> Result<()> {
        w.write_all(b": ")
    }
}

/// `json.dumps(value, ensure_ascii=False, indent=indent)`; not escaped for HTML, unlike Jinja's own filter.
pub(super) fn dumps(value: &impl Serialize, indent: Option<usize>) -> serde_json::Result<String> {
    let mut out = Vec::new();
    match indent {
        None => value.serialize(&mut Serializer::with_formatter(&mut out, Spaced))?,
        Some(n) => {
            let spaces = " ".repeat(n.min(16));
            value.serialize(&mut Serializer::with_formatter(
                &mut out,
                PrettyFormatter::with_indent(spaces.as_bytes()),
            ))?;
        }
    }
    Ok(String::from_utf8_lossy(&out).into_owned())
}

const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// Year, month (1 to 12), day, and seconds into the day, in UTC.
pub(crate) fn civil(time: SystemTime) -> (i64, usize, u64, u64) {
    let s = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, second) = (s / 86_400, s % 86_400);
    // Howard Hinnant's civil_from_days, for days since 1970.
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1_460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = (yoe + era * 400) as i64 + i64::from(month <= 2);
    (year, month as usize, day, second)
}

/// `strftime` in UTC and English, for the directives that templates use; others are copied as they are.
pub(super) fn strftime(time: SystemTime, format: &str) -> String {
    let (year, month, day, second) = civil(time);
    let days = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()) / 86_400;
    let weekday = DAYS[(days as usize + 4) % 7];
    let hour = second / 3600;
    let hour12 = (hour + 11) % 12 + 1;
    let mut out = String::new();
    let mut chars = format.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        // glibc's flag for "no padding".
        let bare = chars.next_if_eq(&'-').is_some();
        let two = |n: u64| if bare { n.to_string() } else { format!("{n:02}") };
        match chars.next() {
            Some('Y') => out.push_str(&year.to_string()),
            Some('y') => out.push_str(&two(year as u64 % 100)),
            Some('m') => out.push_str(&two(month as u64)),
            Some('d') => out.push_str(&two(day)),
            Some('e') => _ = write!(out, "{day:2}"),
            Some('B') => out.push_str(MONTHS[month - 1]),
            Some('b' | 'h') => out.push_str(&MONTHS[month - 1][..3]),
            Some('A') => out.push_str(weekday),
            Some('a') => out.push_str(&weekday[..3]),
            Some('H') => out.push_str(&two(hour)),
            Some('I') => out.push_str(&two(hour12)),
            Some('M') => out.push_str(&two(second / 60 % 60)),
            Some('S') => out.push_str(&two(second % 60)),
            Some('p') => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('F') => _ = write!(out, "{year}-{month:02}-{day:02}"),
            Some('T') => _ = write!(out, "{hour:02}:{:02}:{:02}", second / 60 % 60, second % 60),
            Some('Z') => out.push_str("UTC"),
            Some('z') => out.push_str("+0000"),
            Some('%') => out.push('%'),
            Some(c) => {
                out.push('%');
                out.push(c);
            }
            None => out.push('%'),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn dates_equal_pythons() {
        let at = |s| UNIX_EPOCH + Duration::from_secs(s);
        assert_eq!(strftime(at(0), "%A %d %B %Y %H:%M:%S %p"), "Thursday 01 January 1970 00:00:00 AM");
        // datetime.fromtimestamp(1709210096, UTC)
        assert_eq!(
            strftime(at(1_709_210_096), "%a %-d %b %y, %I:%M %p %F %T %Z%z"),
            "Thu 29 Feb 24, 12:34 PM 2024-02-29 12:34:56 UTC+0000"
        );
        assert_eq!(strftime(at(1_735_603_200), "%e %m %h %% %q %"), "31 12 Dec % %q %");
        assert_eq!(strftime(UNIX_EPOCH - Duration::from_secs(5), "%Y"), "1970");
    }

    #[test]
    fn json_equals_pythons() {
        let v = serde_json::json!({"a": [1, 2.5, null, true], "b": {"c": "<é&'\n"}, "d": [], "e": {}});
        assert_eq!(dumps(&v, None).unwrap(), r#"{"a": [1, 2.5, null, true], "b": {"c": "<é&'\n"}, "d": [], "e": {}}"#);
        assert_eq!(dumps(&serde_json::json!({"a": [1]}), Some(2)).unwrap(), "{\n  \"a\": [\n    1\n  ]\n}");
    }
}
