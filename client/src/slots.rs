//! Where a sequence's tokens lie at the parties: which positions are tokens, what comes next, in which programs.
//!
//! A program's rows are padded in front, so that its last token lies next to what follows. The tokens of a sequence are
//! therefore consecutive, but for padding in front of each turn of several tokens; the keys of all that lies before it
//! are moved up by as much (see `tacet_protocol::plan`), which only such a turn can do.
//!
//! Padding takes positions from the answer. It is given up where it would take more than half of what the model leaves after
//! the text: rows are then of the largest padded length that is full, and the parties learn the exact number of tokens.

use tacet_protocol::query::{LENGTHS, padded};

/// Most rows of one program.
const MOST: usize = LENGTHS[LENGTHS.len() - 1];

/// One program: `tokens` tokens as the last of `rows` rows after `past` positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub past: usize,
    pub rows: usize,
    pub tokens: usize,
    /// Positions by which the keys of past ones move up.
    pub moves: i64,
}

/// The positions of a sequence.
#[derive(Clone, Debug)]
pub(crate) struct Slots {
    /// Whether each is a token.
    real: Vec<bool>,
    /// Position less number of every token, as keys have it.
    base: i64,
    /// Whether the model knows positions by differences. Otherwise each token carries its own number.
    rotates: bool,
    longest: usize,
}

impl Slots {
    pub fn new(longest: usize, rotates: bool) -> Slots {
        Slots { real: Vec::new(), base: 0, rotates, longest }
    }

    /// Positions.
    pub fn len(&self) -> usize {
        self.real.len()
    }

    /// Programs that keep the first `keep` tokens, forget the rest, and add `more`; none where the sequence has no room.
    pub fn parts(&self, keep: usize, more: usize) -> Option<Vec<Part>> {
        let mut at = self.clone();
        let mut tokens = self.real.iter().enumerate().filter(|(_, r)| **r);
        let end = keep.checked_sub(1).map_or(Some(0), |last| tokens.nth(last).map(|(i, _)| i + 1))?;
        at.real.truncate(end);
        let (mut parts, mut left) = (Vec::new(), more);
        while left > 0 {
            let part = at.part(keep + more - left, left)?;
            at.apply(&part);
            parts.push(part);
            left -= part.tokens;
        }
        Some(parts)
    }

    /// The next program of `left` tokens, of which the first is number `at`.
    fn part(&self, at: usize, left: usize) -> Option<Part> {
        let past = self.len();
        let (free, most) = (self.longest - past, left.min(MOST));
        let part = |rows: usize| {
            let tokens = rows.min(left);
            let base = (past + rows - tokens) as i64 - at as i64;
            let moves = if self.rotates && past > 0 { base - self.base } else { 0 };
            Part { past, rows, tokens, moves }
        };
        // A single row moves nothing, and a sequence does not begin with one.
        let one = Some(part(1)).filter(|p| past > 0 && free > 0 && p.moves == 0);
        if left == 1 && one.is_some() {
            return one;
        }
        let some = padded(most).filter(|rows| *rows <= free);
        let full = LENGTHS.iter().rev().find(|l| **l <= most && **l <= free);
        let small = some.filter(|rows| (rows - most) * 2 <= free.saturating_sub(left));
        small.or(full.copied()).map(part).or(one).or(some.map(part))
    }

    /// The positions after `part`.
    pub fn apply(&mut self, part: &Part) {
        self.real.truncate(part.past);
        self.real.extend((0..part.rows).map(|i| i >= part.rows - part.tokens));
        self.base = if part.past > 0 { self.base + part.moves } else { (part.rows - part.tokens) as i64 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fed(s: &mut Slots, keep: usize, more: usize) -> Option<Vec<Part>> {
        let parts = s.parts(keep, more)?;
        parts.iter().for_each(|p| s.apply(p));
        Some(parts)
    }

    fn count(s: &Slots) -> usize {
        s.real.iter().filter(|r| **r).count()
    }

    fn rows(parts: Option<Vec<Part>>) -> Vec<usize> {
        parts.unwrap().iter().map(|p| p.rows).collect()
    }

    #[test]
    fn a_chat_is_fed_in_padded_turns_and_single_steps() {
        let mut s = Slots::new(512, true);
        assert_eq!(fed(&mut s, 0, 5).unwrap(), [Part { past: 0, rows: 8, tokens: 5, moves: 0 }]);
        assert_eq!(fed(&mut s, 5, 1).unwrap(), [Part { past: 8, rows: 1, tokens: 1, moves: 0 }]);
        // Five tokens in eight rows: three of padding, over which everything before moves.
        assert_eq!(fed(&mut s, 6, 5).unwrap(), [Part { past: 9, rows: 8, tokens: 5, moves: 3 }]);
        assert_eq!((s.len(), count(&s)), (17, 11));
        // Back into the last turn: nothing moves, so that one token is one row.
        assert_eq!(fed(&mut s, 8, 1).unwrap(), [Part { past: 14, rows: 1, tokens: 1, moves: 0 }]);
        // Back before it, where keys stand three too far: only several rows can follow, even for one token.
        assert_eq!(fed(&mut s, 6, 1).unwrap(), [Part { past: 9, rows: 8, tokens: 1, moves: 4 }]);
        assert_eq!(fed(&mut s, 4, 8).unwrap(), [Part { past: 7, rows: 8, tokens: 8, moves: -7 }]);
        let mut learned = Slots::new(512, false);
        fed(&mut learned, 0, 5);
        fed(&mut learned, 5, 5);
        assert_eq!(fed(&mut learned, 3, 1).unwrap(), [Part { past: 6, rows: 1, tokens: 1, moves: 0 }]);
    }

    #[test]
    fn padding_is_given_up_where_positions_run_out() {
        assert_eq!(rows(Slots::new(512, true).parts(0, 300)), [384]);
        assert_eq!(rows(Slots::new(512, true).parts(0, 400)), [384, 16]);
        assert_eq!(rows(Slots::new(512, true).parts(0, 403)), [384, 24]);
        assert_eq!(rows(Slots::new(1022, true).parts(0, 700)), [512, 192]);
        assert_eq!(rows(Slots::new(512, true).parts(0, 512)), [512]);
        assert!(Slots::new(512, true).parts(0, 513).is_none());
        let mut s = Slots::new(64, true);
        assert_eq!(rows(fed(&mut s, 0, 40)), [48]);
        // Padding has taken the room; another sequence has it.
        assert!(s.parts(40, 22).is_none());
        let mut s = Slots::new(64, true);
        assert_eq!(rows(fed(&mut s, 0, 62)), [48, 8, 1, 1, 1, 1, 1, 1]);
        assert_eq!(rows(fed(&mut s, 62, 2)), [1, 1]);
        assert!(s.parts(64, 1).is_none() && s.parts(60, 5).is_none());
        assert_eq!(rows(s.parts(60, 4)), [1; 4]);
    }

    #[test]
    fn every_text_that_the_model_takes_fits_a_new_sequence() {
        for longest in [8, 50, 64, 512, 700, 1022] {
            for n in 1..=longest {
                let parts = Slots::new(longest, true).parts(0, n).unwrap_or_else(|| panic!("{n} of {longest}"));
                assert_eq!(parts.iter().map(|p| p.tokens).sum::<usize>(), n);
            }
            assert!(Slots::new(longest, true).parts(0, longest + 1).is_none());
        }
    }

    #[test]
    fn tokens_stay_consecutive_and_within_the_longest_sequence() {
        let mut seed = 1u64;
        let mut below = |n: usize| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) as usize % n
        };
        for round in 0..400 {
            let longest = [64, 200, 512, 1022][round % 4];
            let mut s = Slots::new(longest, round % 3 > 0);
            let (mut tokens, mut turns) = (0, 0);
            while turns < 30 {
                turns += 1;
                let keep = if below(3) == 0 { below(tokens + 1) } else { tokens };
                let most = [1, 9, 60][below(3)];
                let more = 1 + below(most);
                let Some(parts) = s.parts(if tokens == 0 { 0 } else { keep.max(1) }, more) else { break };
                tokens = if tokens == 0 { 0 } else { keep.max(1) };
                for p in parts {
                    let (before, began) = (s.base, s.len() > 0);
                    assert!(p.rows == 1 && p.tokens == 1 && p.moves == 0 || LENGTHS.contains(&p.rows));
                    assert!(p.past <= s.len() && (p.past > 0 || !began) && p.past + p.rows <= longest);
                    s.apply(&p);
                    tokens += p.tokens;
                    assert_eq!(count(&s), tokens);
                    if s.rotates && began {
                        // The last token kept, moved, lies next to the first new one.
                        let last = (tokens - p.tokens - 1) as i64 + before + p.moves;
                        assert_eq!(last + 1, (p.past + p.rows - p.tokens) as i64);
                    }
                }
            }
        }
    }
}
