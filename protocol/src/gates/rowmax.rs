//! Coarse row maximum of attention scores by shared histograms, without a comparison tree.
//!
//! The dealer deals, per score, an XOR-shared one-hot of its mask's level; rotating it by the public level gives a shared
//! one-hot of the score's own level (or the one above: the borrow of the low bits). Its suffix XOR is a thermometer.
//! Whether any score of a row reaches a level is tested by [`TESTS`] parities over public subsets of the row: a level
//! that none reaches gives zero in every test. The subsets are the columns of a BCH code of distance 5, so a level that
//! up to four scores reach is never missed, nor one that the whole row reaches; any other is missed with probability about
//! 2^-TESTS over the inputs, which lowers the bound by one step, and the consumer leaves one step of headroom. The work and
//! traffic depend on shapes only.
//!
//! Where the planner knows that a row's maximum lies in a part of the levels, only these are tested and counted; of others
//! there are one-hots alone, since masks rotate over all. So padded keys may be lowered into levels that cost little.

use serde::{Deserialize, Serialize};

use super::bits::{Segment, rotated};
use super::grid::Grid;
use super::{Deal, Dealt, Masked, Take};
use crate::Error;
use crate::ring::mask;
use crate::vector::{self, Kernel};

/// Parities per level.
pub const TESTS: usize = 20;

/// Longest row: the order of the code's field less one.
pub const LONGEST: usize = 1022;

/// A head's levels, of which a word of a one-hot holds 64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Levels {
    /// log2 of their number over the whole ring, at least 6.
    pub bits: u32,
    /// The first word of those that a row's maximum may be in, and how many words these are. No score lies above them; what
    /// lies below is less than the maximum of any row that counts.
    pub first: u32,
    pub words: u32,
}

impl Levels {
    /// All of a ring.
    pub fn all(bits: u32) -> Levels {
        Levels { bits, first: 0, words: 1 << (bits - 6) }
    }

    /// Words of all levels.
    pub fn of_ring(&self) -> usize {
        1 << (self.bits - 6)
    }

    /// Levels below those that a row's maximum may be in.
    pub fn below(&self) -> u64 {
        64 * u64::from(self.first)
    }
}

/// Histogram parities of scores.
#[derive(Clone, Debug)]
pub struct RowMax {
    /// The scores of each head; rows of at most [`LONGEST`].
    pub grid: Grid,
    /// Of each head.
    pub levels: Vec<Levels>,
    /// Ring of the scores.
    pub k: u32,
}

/// Which of the [`TESTS`] subsets column `j` belongs to: `(a, a^3)` for `a = g^j` in GF(2^10), `g` a root of `x^10 + x^3 + 1`.
///
/// Powers rather than counting: the columns of a whole row add to `(g^T - 1) / (g - 1)`, which is not zero.
fn subsets(tokens: usize) -> Vec<u32> {
    let step = |a: u32| (a << 1) ^ (0x409 * (a >> 9 & 1));
    let powers: Vec<u32> = std::iter::successors(Some(1), |a| Some(step(*a) & 1023)).take(1023).collect();
    (0..tokens).map(|j| powers[j] | powers[3 * j % 1023] << 10).collect()
}

/// Suffix XOR over bits: bit `j` becomes the XOR of bits `j` and above.
fn thermometer(x: &mut [u64]) {
    let mut carry = 0u64;
    for w in x.iter_mut().rev() {
        let mut v = *w;
        for s in [1, 2, 4, 8, 16, 32] {
            v ^= v >> s;
        }
        *w = v ^ carry;
        carry = (*w & 1).wrapping_neg();
    }
}

impl RowMax {
    /// Words of the levels that a head's maximum may be in.
    pub fn words(&self, h: usize) -> usize {
        self.levels[h].words as usize
    }

    /// Of each key, the tests whose subset it is in, a bit each.
    pub fn subsets(&self) -> Vec<u32> {
        subsets(self.grid.keys)
    }

    /// The layout of the output seen as groups of rows: per head `tokens * TESTS / members` groups.
    pub fn segments(&self, members: usize) -> Vec<Segment> {
        (0..self.levels.len())
            .map(|h| Segment { rows: self.grid.rows * TESTS / members, words: self.words(h) })
            .collect()
    }

    /// One row of levels per (head, row).
    pub fn rows(&self) -> Vec<Segment> {
        (0..self.levels.len()).map(|h| Segment { rows: self.grid.rows, words: self.words(h) }).collect()
    }

    /// Output words: per head `rows x TESTS x words`.
    pub fn out_len(&self) -> usize {
        (0..self.levels.len()).map(|h| self.grid.rows * TESTS * self.words(h)).sum()
    }

    /// What is dealt.
    pub fn dealt(&self) -> Vec<Dealt> {
        self.levels.iter().map(|levels| (self.grid.len() * levels.of_ring(), 64)).collect()
    }

    /// Dealer: one-hot at minus the mask's level, so that a rotation by the public level lands on the score's own.
    pub fn deal(&self, d: &mut Deal, lam: &[u64]) -> Result<(), Error> {
        for (h, l) in lam.chunks_exact(self.grid.len()).enumerate() {
            let (n, w) = (1usize << self.levels[h].bits, self.levels[h].of_ring());
            let mut one_hot = d.bits(l.len() * w)?;
            for l in l {
                let level = (n - (l >> (self.k - self.levels[h].bits)) as usize) % n;
                let to = one_hot.room(d, w);
                to.fill(0);
                to[level / 64] = 1 << (level % 64);
            }
            one_hot.end(d);
        }
        Ok(())
    }

    /// Meaning in the clear: "this parity is zero", for every (head, row, test, level that may be the maximum's).
    pub fn plain(&self, s: &[f64]) -> Vec<u64> {
        let sets = subsets(self.grid.keys);
        let mut out = Vec::with_capacity(self.out_len());
        for (h, s) in s.chunks_exact(self.grid.len()).enumerate() {
            let (levels, w) = (self.levels[h], self.words(h));
            let (n, below) = (1usize << levels.bits, levels.below() as usize);
            for (_, row) in self.grid.split(s) {
                let at = out.len();
                out.resize(at + TESTS * w, 0);
                for (s, set) in row.iter().zip(&sets) {
                    let level = (s / 2f64.powi((self.k - levels.bits) as i32)).floor() + n as f64 / 2.0;
                    let Some(level) = (level.max(0.0) as usize).min(n - 1).checked_sub(below) else { continue };
                    let level = level.min(64 * w - 1);
                    for (i, acc) in out[at..].chunks_exact_mut(w).enumerate() {
                        acc[level / 64] ^= u64::from(set >> i & 1) << (level % 64);
                    }
                }
                for acc in out[at..].chunks_exact_mut(w) {
                    thermometer(acc);
                    acc.iter_mut().for_each(|v| *v = !*v);
                }
            }
        }
        out
    }

    /// Evaluator: XOR share of "this parity is zero", for every (head, row, test, level that may be the maximum's).
    pub fn eval(&self, t: &mut Take, s: &Masked) -> Result<Vec<u64>, Error> {
        let half = 1u64 << (self.k - 1);
        let sets: Vec<[u64; TESTS]> = subsets(self.grid.keys)
            .iter()
            .map(|set| std::array::from_fn(|i| u64::from(set >> i & 1).wrapping_neg()))
            .collect();
        let (halves, leads) = (t.halves(&self.dealt())?, t.leads());
        let (n, rows) = (self.grid.len(), self.grid.rows);
        // Of each head, the first of its words.
        let mut first = vec![0];
        first.extend((0..self.levels.len()).scan(0, |at, h| {
            *at += rows * TESTS * self.words(h);
            Some(*at)
        }));
        let starts: Vec<(usize, usize)> = self.grid.starts().collect();
        let mut out = vec![0; self.out_len()];
        let at = |row: usize| {
            let words = self.levels.get(row / rows).map_or(0, |levels| levels.words as usize);
            [first[row / rows] + row % rows * TESTS * words]
        };
        t.divide(self.levels.len() * rows, [&mut out], at, |all, [mut rest]| {
            for (h, one_hot) in halves.iter().enumerate().take(all.end.div_ceil(rows)).skip(all.start / rows) {
                let levels = self.levels[h];
                let (half, keep, drop) = (half, mask(self.k), self.k - levels.bits);
                let own = all.start.max(h * rows) - h * rows..all.end.min((h + 1) * rows) - h * rows;
                let (w, all, first) = (self.words(h), levels.of_ring(), levels.first as usize);
                let mut one_hot = one_hot.from(starts[own.start].1 * all);
                let mut turned = vec![0; self.grid.keys * w];
                for &(row, start) in &starts[own] {
                    let m = &s.m[h * n + start..][..self.grid.row_len(row)];
                    let dealt = one_hot.next(m.len() * all);
                    for ((m, one), to) in m.iter().zip(dealt.chunks_exact(all)).zip(turned.chunks_exact_mut(w)) {
                        let level = (m.wrapping_add(half) & keep) >> drop;
                        rotated(one, level as usize, first, to);
                    }
                    let acc;
                    (acc, rest) = rest.split_at_mut(TESTS * w);
                    vector::run(Parities { words: w, sets: &sets, rotated: &turned[..m.len() * w], acc });
                    for acc in acc.chunks_exact_mut(w) {
                        thermometer(acc);
                        if leads {
                            acc.iter_mut().for_each(|v| *v = !*v);
                        }
                    }
                }
            }
        });
        Ok(out)
    }
}

/// Adds each score's one-hot to the tests whose subset it is in.
struct Parities<'a> {
    words: usize,
    sets: &'a [[u64; TESTS]],
    rotated: &'a [u64],
    acc: &'a mut [u64],
}

impl Kernel for Parities<'_> {
    #[inline(always)]
    fn run(self) {
        match self.words {
            w if w % 8 == 0 => self.of::<8>(),
            w if w % 4 == 0 => self.of::<4>(),
            w if w % 2 == 0 => self.of::<2>(),
            _ => self.of::<1>(),
        }
    }
}

impl Parities<'_> {
    /// `W` words of a test at a time; they stay in registers for a whole row.
    #[inline(always)]
    fn of<const W: usize>(self) {
        for part in 0..self.words / W {
            let mut acc = [[0; W]; TESTS];
            for (sets, r) in self.sets.iter().zip(self.rotated.chunks_exact(self.words)) {
                let r: [u64; W] = std::array::from_fn(|j| r[part * W + j]);
                for (acc, set) in acc.iter_mut().zip(sets) {
                    for (a, r) in acc.iter_mut().zip(r) {
                        *a ^= r & set;
                    }
                }
            }
            for (to, acc) in self.acc.chunks_exact_mut(self.words).zip(acc) {
                to[part * W..][..W].copy_from_slice(&acc);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{World, masked};
    use super::*;
    use crate::ring::signed;
    use proptest::prelude::*;

    #[test]
    fn no_four_columns_and_no_whole_row_add_to_zero() {
        let c = subsets(LONGEST);
        let mut sums: std::collections::HashSet<u32> = c.iter().copied().collect();
        // Distinct sums of at most two columns: no four, three or two columns add to zero.
        sums.extend((0..LONGEST).flat_map(|i| (0..i).map(move |j| (i, j))).map(|(i, j)| c[i] ^ c[j]));
        assert_eq!(sums.len(), LONGEST + LONGEST * (LONGEST - 1) / 2);
        assert!(!sums.contains(&0));
        let mut row = 0;
        assert!(c.iter().all(|v| {
            row ^= v;
            row != 0
        }));
    }

    proptest! {
        #[test]
        fn level_counts_bound_the_maximum_by_at_most_two_steps(
            (rows, past, causal, k) in (1usize..14, 0usize..8, any::<bool>(), 12u32..=40),
            levels in prop::collection::vec((6u32..=9, 0.0f64..1.0, 0.0f64..1.0), 1..3),
            seed in any::<u64>(),
        ) {
            let mut w = World::seeded(seed);
            let grid = if causal { Grid::causal(past, rows) } else { Grid::square(rows) };
            let part = |(bits, words, first): (u32, f64, f64)| {
                let of_ring = 1 << (bits - 6);
                let words = 1 + (words * f64::from(of_ring)) as u32;
                Levels { bits, words, first: (first * f64::from(of_ring - words + 1)) as u32 }
            };
            let g = RowMax { grid, levels: levels.into_iter().map(part).collect(), k };
            let mut x = w.edges(k, g.levels.len() * grid.len());
            let at: Vec<(usize, usize)> = grid.starts().collect();
            for (i, [x, ..]) in x.iter_mut().enumerate() {
                // The planner leaves four levels at either end of those that a maximum may be in; one key of each row is there,
                // others may be below.
                let levels = g.levels[i / grid.len()];
                let level = |l: u64| ((l as i64) << (k - levels.bits)) - (1 << (k - 1));
                let [least, most] = [level(levels.below() + 4), level(levels.below() + 64 * u64::from(levels.words) - 4)];
                let own = at.iter().any(|(_, start)| *start == i % grid.len());
                let least = if own { least } else { level(4) };
                *x = signed(*x, k).clamp(least, most - 1) as u64 & mask(k);
            }
            let (x, lam, e) = masked(&x, k, false);
            let s = w.run(&g.dealt(), |d| g.deal(d, &lam), |t, i| g.eval(t, &e[i]));
            let bits: Vec<u64> = s[0].iter().zip(&s[1]).map(|(a, b)| a ^ b).collect();
            let mut at = 0;
            for (h, levels) in g.levels.iter().enumerate() {
                let (nb, words) = (levels.bits, g.words(h));
                for (r, row) in grid.split(&x[h * grid.len()..][..grid.len()]) {
                    let mut zero = vec![!0u64; words];
                    for test in bits[at..at + TESTS * words].chunks_exact(words) {
                        zero.iter_mut().zip(test).for_each(|(z, t)| *z &= t);
                    }
                    at += TESTS * words;
                    let count = zero.iter().map(|z| z.count_zeros() as i64).sum::<i64>();
                    let max = row.iter().map(|v| signed(*v, k)).max().unwrap();
                    let bound = (count + levels.below() as i64) * (1 << (k - nb)) - (1 << (k - 1));
                    // Equal to the maximum's level, or the one above where the low bits borrow.
                    prop_assert!(bound > max && bound - max <= 2 << (k - nb), "head {} row {}: {} for {}", h, r, bound, max);
                }
            }
        }
    }
}
