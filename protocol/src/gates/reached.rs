//! The number of levels that a row reaches, in one round from bits that say of each level whether tests failed to see it:
//! the AND of a few bits, its injection into a ring and the sum of a row, in one.
//!
//! With the masked bits of a group opened as `c`, the AND is 1 only for `c = !l`, so the dealer deals the one-hot of `!l`
//! over all `2^members` values of `c` and the evaluators add up the entries at `c`. A round less than [`super::bits::And`]
//! followed by [`super::bits::CountClear`], for more dealt bytes: worth it where rows are few, as in a single decode step.

use super::bits::Segment;
use super::{Deal, Dealt, Masked, Take};
use crate::Error;
use crate::ring::mask;

/// Number of positions of each row at which not all of `members` bits are set.
#[derive(Clone, Debug)]
pub struct Reached {
    /// Layout of the input: per segment, `rows x members x words`.
    pub segments: Vec<Segment>,
    /// Bits that are combined.
    pub members: usize,
    /// Ring of the count.
    pub k: u32,
}

impl Reached {
    fn positions(&self) -> usize {
        self.segments.iter().map(|s| s.rows * s.words * 64).sum()
    }

    /// What is dealt.
    pub fn dealt(&self) -> Vec<Dealt> {
        vec![(self.positions() << self.members, self.k)]
    }

    fn rows(&self) -> usize {
        self.segments.iter().map(|s| s.rows).sum()
    }

    /// The members' bits of every position, row by row; `f` takes the row's number and the bits.
    fn each(&self, x: &[u64], mut f: impl FnMut(usize, usize)) {
        let (mut at, mut row) = (0, 0);
        for s in &self.segments {
            for _ in 0..s.rows {
                for position in 0..s.words * 64 {
                    let bit = |i: usize| (x[at + i * s.words + position / 64] >> (position % 64) & 1) as usize;
                    f(row, (0..self.members).fold(0, |c, i| c | bit(i) << i));
                }
                at += self.members * s.words;
                row += 1;
            }
        }
    }

    /// Dealer.
    pub fn deal(&self, d: &mut Deal, lam: &[u64]) -> Result<(), Error> {
        let n = 1 << self.members;
        let mut t = d.tensor(self.positions() << self.members, self.k)?;
        self.each(lam, |_, l| {
            let one_hot = t.room(d, n);
            one_hot.fill(0);
            one_hot[n - 1 - l] = 1;
        });
        t.end(d);
        Ok(())
    }

    /// Evaluator: one share per row.
    pub fn eval(&self, t: &mut Take, x: &Masked) -> Result<Vec<u64>, Error> {
        let mut one_hot = t.half(self.positions() << self.members, self.k)?;
        let mut out = vec![0u64; self.rows()];
        let (mut position, leads) = (0, u64::from(t.leads()));
        self.each(&x.m, |row, c| {
            out[row] = out[row].wrapping_add(leads).wrapping_sub(one_hot.pick(position, 1 << self.members, c));
            position += 1;
        });
        out.iter_mut().for_each(|v| *v &= mask(self.k));
        Ok(out)
    }

    /// Meaning in the clear, in units.
    pub fn plain(&self, x: &[u64]) -> Vec<f64> {
        let mut out = vec![0.0; self.rows()];
        let all = (1 << self.members) - 1;
        self.each(x, |row, c| out[row] += if c == all { 0.0 } else { 1.0 });
        out
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{World, add};
    use super::*;

    #[test]
    fn counts_are_exact() {
        let mut w = World::new();
        for members in [1, 2, 5] {
            let segments = vec![Segment { rows: 3, words: 2 }, Segment { rows: 2, words: 4 }];
            let n: usize = segments.iter().map(|s| s.rows * s.words * members).sum();
            let x: Vec<u64> = (0..n).map(|_| w.word() | w.word()).collect();
            let g = Reached { segments, members, k: 12 };
            let (lam, e) = w.mask_bits(&x);
            let s = w.run(&g.dealt(), |d| g.deal(d, &lam), |t, i| g.eval(t, &e[i]));
            let got: Vec<f64> = add(&s, 12).into_iter().map(|v| v as f64).collect();
            assert_eq!(got, g.plain(&x));
            assert!(got.iter().all(|v| *v > 0.0));
        }
    }
}
