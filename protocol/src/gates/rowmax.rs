//! Coarse row maximum of attention scores by shared histograms, without a comparison tree.
//!
//! The dealer deals, per score, an XOR-shared one-hot of its mask's level; rotating it by the public level gives a shared
//! one-hot of the score's own level (or the one above: the borrow of the low bits). Its suffix XOR is a thermometer.
//! Whether any score of a row reaches a level is tested by [`TESTS`] parities over public subsets of the row: a level
//! that none reaches gives zero in every test. The subsets are the columns of a BCH code of distance 5, so a level that
//! up to four scores reach is never missed, nor one that the whole row reaches; any other is missed with probability about
//! 2^-TESTS over the inputs, which lowers the bound by one step, and the consumer leaves one step of headroom. The work and traffic depend on shapes only.

use super::bits::{Segment, rotate};
use super::grid::Grid;
use super::{Deal, Dealt, Masked, Take};
use crate::Error;
use crate::ring::mask;
use crate::vector::{self, Kernel};

/// Parities per level.
pub const TESTS: usize = 20;

/// Longest row: the order of the code's field less one.
pub const LONGEST: usize = 1022;

/// Histogram parities of scores.
#[derive(Clone, Debug)]
pub struct RowMax {
    /// The scores of each head; rows of at most [`LONGEST`].
    pub grid: Grid,
    /// Per head, log2 of the number of levels over the whole ring; at least 6.
    pub level_bits: Vec<u32>,
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
    /// Words of a head's levels.
    pub fn words(&self, h: usize) -> usize {
        1 << (self.level_bits[h] - 6)
    }

    /// Of each key, the tests whose subset it is in, a bit each.
    pub fn subsets(&self) -> Vec<u32> {
        subsets(self.grid.keys)
    }

    /// The layout of the output seen as groups of rows: per head `tokens * TESTS / members` groups.
    pub fn segments(&self, members: usize) -> Vec<Segment> {
        (0..self.level_bits.len())
            .map(|h| Segment { rows: self.grid.rows * TESTS / members, words: self.words(h) })
            .collect()
    }

    /// One row of levels per (head, row).
    pub fn rows(&self) -> Vec<Segment> {
        (0..self.level_bits.len()).map(|h| Segment { rows: self.grid.rows, words: self.words(h) }).collect()
    }

    /// Output words: per head `rows x TESTS x words`.
    pub fn out_len(&self) -> usize {
        (0..self.level_bits.len()).map(|h| self.grid.rows * TESTS * self.words(h)).sum()
    }

    /// What is dealt.
    pub fn dealt(&self) -> Vec<Dealt> {
        (0..self.level_bits.len()).map(|h| (self.grid.len() * self.words(h), 64)).collect()
    }

    /// Dealer: one-hot at minus the mask's level, so that a rotation by the public level lands on the score's own.
    pub fn deal(&self, d: &mut Deal, lam: &[u64]) -> Result<(), Error> {
        for (h, l) in lam.chunks_exact(self.grid.len()).enumerate() {
            let (n, w) = (1usize << self.level_bits[h], self.words(h));
            let mut one_hot = d.bits(l.len() * w)?;
            for l in l {
                let level = (n - (l >> (self.k - self.level_bits[h])) as usize) % n;
                let to = one_hot.room(d, w);
                to.fill(0);
                to[level / 64] = 1 << (level % 64);
            }
            one_hot.end(d);
        }
        Ok(())
    }

    /// Meaning in the clear: "this parity is zero", for every (head, row, test, level).
    pub fn plain(&self, s: &[f64]) -> Vec<u64> {
        let sets = subsets(self.grid.keys);
        let mut out = Vec::with_capacity(self.out_len());
        for (h, s) in s.chunks_exact(self.grid.len()).enumerate() {
            let (n, w) = (1usize << self.level_bits[h], self.words(h));
            for (_, row) in self.grid.split(s) {
                let at = out.len();
                out.resize(at + TESTS * w, 0);
                for (s, set) in row.iter().zip(&sets) {
                    let level = (s / 2f64.powi((self.k - self.level_bits[h]) as i32)).floor() + n as f64 / 2.0;
                    let level = (level.max(0.0) as usize).min(n - 1);
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

    /// Evaluator: XOR share of "this parity is zero", for every (head, row, test, level).
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
        first.extend((0..self.level_bits.len()).scan(0, |at, h| {
            *at += rows * TESTS * self.words(h);
            Some(*at)
        }));
        let starts: Vec<(usize, usize)> = self.grid.starts().collect();
        let mut out = vec![0; self.out_len()];
        let at = |row: usize| {
            let words = self.level_bits.get(row / rows).map_or(0, |_| self.words(row / rows));
            [first[row / rows] + row % rows * TESTS * words]
        };
        t.divide(self.level_bits.len() * rows, [&mut out], at, |all, [mut rest]| {
            for (h, one_hot) in halves.iter().enumerate().take(all.end.div_ceil(rows)).skip(all.start / rows) {
                let (half, keep, drop) = (half, mask(self.k), self.k - self.level_bits[h]);
                let own = all.start.max(h * rows) - h * rows..all.end.min((h + 1) * rows) - h * rows;
                let w = self.words(h);
                let mut one_hot = one_hot.from(starts[own.start].1 * w);
                let mut rotated = vec![0; self.grid.keys * w];
                for &(row, start) in &starts[own] {
                    let m = &s.m[h * n + start..][..self.grid.row_len(row)];
                    let dealt = one_hot.next(m.len() * w);
                    for ((m, one), to) in m.iter().zip(dealt.chunks_exact(w)).zip(rotated.chunks_exact_mut(w)) {
                        let level = (m.wrapping_add(half) & keep) >> drop;
                        rotate(one, level as usize, to);
                    }
                    let acc;
                    (acc, rest) = rest.split_at_mut(TESTS * w);
                    vector::run(Parities { words: w, sets: &sets, rotated: &rotated[..m.len() * w], acc });
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
            1 => self.of::<1>(),
            2 => self.of::<2>(),
            w if w % 8 == 0 => self.of::<8>(),
            _ => self.of::<4>(),
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
            level_bits in prop::collection::vec(6u32..=9, 1..3),
            seed in any::<u64>(),
        ) {
            let mut w = World::seeded(seed);
            let grid = if causal { Grid::causal(past, rows) } else { Grid::square(rows) };
            let g = RowMax { grid, level_bits, k };
            let mut x = w.edges(k, g.level_bits.len() * grid.len());
            for (i, [x, ..]) in x.iter_mut().enumerate() {
                // The planner leaves four levels at either end.
                let room = (1i64 << (k - 1)) - (4 << (k - g.level_bits[i / grid.len()]));
                *x = signed(*x, k).clamp(-room, room - 1) as u64 & mask(k);
            }
            let (x, lam, e) = masked(&x, k, false);
            let s = w.run(&g.dealt(), |d| g.deal(d, &lam), |t, i| g.eval(t, &e[i]));
            let bits: Vec<u64> = s[0].iter().zip(&s[1]).map(|(a, b)| a ^ b).collect();
            let mut at = 0;
            for (h, &nb) in g.level_bits.iter().enumerate() {
                let words = 1 << (nb - 6);
                for (r, row) in grid.split(&x[h * grid.len()..][..grid.len()]) {
                    let mut zero = vec![!0u64; words];
                    for test in bits[at..at + TESTS * words].chunks_exact(words) {
                        zero.iter_mut().zip(test).for_each(|(z, t)| *z &= t);
                    }
                    at += TESTS * words;
                    let count = zero.iter().map(|z| z.count_zeros() as i64).sum::<i64>();
                    let max = row.iter().map(|v| signed(*v, k)).max().unwrap();
                    let bound = count * (1 << (k - nb)) - (1 << (k - 1));
                    // Equal to the maximum's level, or the one above where the low bits borrow.
                    prop_assert!(bound > max && bound - max <= 2 << (k - nb), "head {} row {}: {} for {}", h, r, bound, max);
                }
            }
        }
    }
}
