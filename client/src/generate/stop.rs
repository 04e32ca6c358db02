//! Stop strings: found wherever they lie across tokens, never shown.

use super::{GenerateError, parameter};

/// Most stop strings of a request, and most bytes of one.
const MOST: usize = 64;
const LONGEST: usize = 4096;

/// Watches a stream of text for stop strings. Text that may still turn into one is held back.
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
}

impl StopMatcher {
    /// # Errors
    /// An empty, overlong or superfluous stop string.
    pub fn new(stops: Vec<String>) -> Result<StopMatcher, GenerateError> {
        if stops.len() > MOST || stops.iter().any(|s| s.len() > LONGEST) {
            return Err(parameter("stop", format!("at most {MOST} strings of at most {LONGEST} bytes each")));
        }
        if stops.iter().any(String::is_empty) {
            return Err(parameter("stop", "an empty string would stop at once"));
        }
        Ok(StopMatcher { stops, held: String::new() })
    }

    /// Takes more text; returns what is safe to show, and the stop string that ended it, if one did.
    ///
    /// The earliest occurrence counts; of two that begin together, the one listed first.
    pub fn push(&mut self, text: &str) -> (String, Option<&str>) {
        self.held.push_str(text);
        let found = self.stops.iter().filter_map(|s| Some((self.held.find(s.as_str())?, s)));
        if let Some((at, stop)) = found.min_by_key(|(at, _)| *at) {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), Some(stop));
        }
        let keep = self.stops.iter().map(|s| overlap(&self.held, s)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), None)
    }

    /// The end of the text: whatever was held back did not become a stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Length of the longest end of `text` that begins `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len() - 1);
    (1..=longest).rev().find(|&n| text.as_bytes()[text.len() - n..] == stop.as_bytes()[..n]).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], parts: &[&str]) -> (Vec<String>, Option<String>) {
        let mut m = StopMatcher::new(stops.iter().map(|s| s.to_string()).collect()).unwrap();
        let mut out = Vec::new();
        for p in parts {
            let (text, stop) = m.push(p);
            out.push(text);
            if let Some(s) = stop {
                return (out, Some(s.to_string()));
            }
        }
        out.push(m.finish());
        (out, None)
    }

    #[test]
    fn holds_back_only_what_may_become_a_stop() {
        assert_eq!(run(&["END"], &["a E", "N", "D b"]), (vec!["a ".into(), "".into(), "".into()], Some("END".into())));
        assert_eq!(run(&["END"], &["a E", "NX"]).0, ["a ", "ENX", ""]);
        assert_eq!(run(&["aab"], &["aa", "ab"]), (vec!["".into(), "a".into()], Some("aab".into())));
        assert_eq!(run(&["\n\n"], &["x\n", "y\n"]).0, ["x", "\ny", "\n"]);
        assert_eq!(run(&["é!"], &["caf", "é", "?"]).0, ["caf", "", "é?", ""]);
        assert_eq!(run(&[], &["a", "b"]).0, ["a", "b", ""]);
    }

    #[test]
    fn the_earliest_stop_wins() {
        assert_eq!(run(&["c", "b"], &["abc"]), (vec!["a".into()], Some("b".into())));
        assert_eq!(run(&["bc", "b"], &["abc"]).1, Some("bc".into()));
    }

    #[test]
    fn bad_stops_are_refused() {
        for bad in [vec![String::new()], vec!["x".repeat(LONGEST + 1)], vec!["x".into(); MOST + 1]] {
            assert!(matches!(StopMatcher::new(bad), Err(GenerateError::Parameter { name: "stop", .. })));
        }
    }

    #[test]
    fn shown_text_is_the_same_however_it_is_cut() {
        let text = "ababacabéabab\u{1F600}xyabacaz";
        for stop in ["abac", "acaz", "\u{1F600}x", "nothing", "z"] {
            let whole = text.split(stop).next().unwrap();
            for step in 1..7 {
                let chars: Vec<char> = text.chars().collect();
                let parts: Vec<String> = chars.chunks(step).map(|c| c.iter().collect()).collect();
                let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
                let (out, _) = run(&[stop], &parts);
                assert_eq!(out.concat(), whole, "{stop} {step}");
            }
        }
    }
}
