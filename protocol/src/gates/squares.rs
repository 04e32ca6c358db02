//! `squares`: sums of squares of a masked value's columns, scaled down on the way so that they fit a ring of their own.
//!
//! [`super::rescale`] writes `y = round(x / 2^s)` as `p - A + w u b` with `p` and `u` public, `A = round(l / 2^s)` and
//! `b = msb(l)` the dealer's, and `w = 2^(k_in - s)`. With `u^2 = u` and `b^2 = b` its square is
//! `p^2 + A^2 + w^2 u b - 2 p A + 2 p w u b - 2 w u A b`: linear in `A`, `b` and `A b`, three dealt elements a column, and
//! `sum A^2`, one a sum. A value whose square needs more than 64 bits is squared without a round for a rescale.
//!
//! Who sees what: nothing but `m` and shares of functions of `l`, as in every gate.

use super::{Deal, Dealt, Masked, Take, from};
use crate::Error;
use crate::ring::mask;

/// `sum round(x / 2^shift)^2` of each group of `dim` columns of a masked tensor of `rows`.
#[derive(Clone, Debug)]
pub struct Squares {
    /// Rows.
    pub rows: usize,
    /// Columns of a group.
    pub dim: usize,
    /// Of each column, at most `k_in - 2`.
    pub shift: Vec<u32>,
    /// Ring of the input; `|x| < 2^(k_in - 2)`. A scaled value is exact to one unit.
    pub k_in: u32,
    /// Ring of the sums.
    pub k_out: u32,
}

fn round(v: u64, shift: u32) -> u64 {
    (v + (1 << shift >> 1)) >> shift
}

impl Squares {
    /// Sums.
    pub fn out_len(&self) -> usize {
        self.rows * self.shift.len() / self.dim
    }

    /// Bits of `b` and `A b` that matter: what multiplies them is a multiple of `w`.
    fn k_bit(&self) -> u32 {
        let w = self.k_in - self.shift.iter().copied().max().unwrap_or(0);
        self.k_out.saturating_sub(w).max(1)
    }

    /// What is dealt.
    pub fn dealt(&self) -> Vec<Dealt> {
        let n = self.out_len() * self.dim;
        vec![(self.out_len(), self.k_out), (n, self.k_out), (n, self.k_bit()), (n, self.k_bit())]
    }

    /// Every group's shifts and columns, row by row.
    fn groups<'a, T>(&'a self, x: &'a [T]) -> impl Iterator<Item = impl Iterator<Item = (&'a u32, &'a T)>> {
        let shifts = self.shift.chunks_exact(self.dim).cycle();
        shifts.zip(x.chunks_exact(self.dim)).map(|(s, x)| s.iter().zip(x))
    }

    /// Dealer: `lam` is the whole input's mask.
    pub fn deal(&self, d: &mut Deal, lam: &[u64]) -> Result<(), Error> {
        let n = self.out_len() * self.dim;
        let (mut sums, mut a) = (Vec::with_capacity(self.out_len()), Vec::with_capacity(n));
        let (mut b, mut ab) = (Vec::with_capacity(n), Vec::with_capacity(n));
        for group in self.groups(lam) {
            let mut sum = 0u64;
            for (shift, l) in group {
                let (large, bit) = (round(*l, *shift), l >> (self.k_in - 1));
                sum = sum.wrapping_add(large.wrapping_mul(large));
                a.push(large);
                b.push(bit);
                ab.push(large * bit);
            }
            sums.push(sum);
        }
        d.share(self.k_out, sums)?;
        d.share(self.k_out, a)?;
        d.share(self.k_bit(), b)?;
        d.share(self.k_bit(), ab)
    }

    /// Meaning in the clear, in units.
    pub fn plain(&self, x: &[f64]) -> Vec<f64> {
        self.groups(x).map(|g| g.map(|(s, v)| v * v * libm::exp2(-2.0 * f64::from(*s))).sum()).collect()
    }

    /// Evaluator: share of the sums, `rows x groups`.
    pub fn eval(&self, t: &mut Take, x: &Masked) -> Result<Vec<u64>, Error> {
        let (n, dim, groups) = (self.out_len() * self.dim, self.dim, self.shift.len() / self.dim);
        let dealt = [(self.out_len(), self.k_out), (n, self.k_out), (n, self.k_bit()), (n, self.k_bit())];
        let halves = t.halves(&dealt)?;
        let (quarter, leads) = (1u64 << (self.k_in - 2), t.leads());
        let mut sums = vec![0; self.out_len()];
        t.divide(
            self.out_len(),
            [&mut sums],
            |sum| [sum],
            |all, [sums]| {
                halves[0].from(all.start).read(sums);
                let mut halves = from(&halves[1..], all.start * dim);
                for (i, sum) in all.zip(sums) {
                    let mut next = halves.iter_mut().map(|half| half.next(dim));
                    let [a, b, ab]: [&[u64]; 3] = std::array::from_fn(|_| next.next().unwrap_or_default());
                    let words = x.m[i * dim..][..dim].iter().zip(&self.shift[i % groups * dim..][..dim]);
                    for ((m, shift), ((a, b), ab)) in words.zip(a.iter().zip(b).zip(ab)) {
                        let w = 1u64.checked_shl(self.k_in - shift).unwrap_or(0);
                        let m = m.wrapping_add(quarter) & mask(self.k_in);
                        let p = round(m, *shift).wrapping_sub(quarter >> shift);
                        let uw = w * (1 - (m >> (self.k_in - 1)));
                        if leads {
                            *sum = sum.wrapping_add(p.wrapping_mul(p));
                        }
                        let bits = uw.wrapping_mul(w.wrapping_add(p << 1)).wrapping_mul(*b);
                        let cross = (p << 1).wrapping_mul(*a).wrapping_add((uw << 1).wrapping_mul(*ab));
                        *sum = sum.wrapping_add(bits).wrapping_sub(cross);
                    }
                    *sum &= mask(self.k_out);
                }
            },
        );
        Ok(sums)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{World, add, masked};
    use super::*;
    use crate::ring::signed;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]
        #[test]
        fn sums_of_values_within_one_unit_in_every_ring(
            (rows, groups, dim, k_in, k_out) in (1usize..3, 1usize..4, 1usize..4, 4u32..=63, 3u32..=64),
            shifts in prop::collection::vec(0u32..61, 9),
            seed in any::<u64>(),
        ) {
            let cols = groups * dim;
            let mut w = World::seeded(seed);
            let mut x = w.edges(k_in, rows * cols);
            for [x, ..] in &mut x {
                let v = signed(*x, k_in) >> 1;
                *x = (if v == -(1 << (k_in - 2)) { v + 1 } else { v }) as u64 & mask(k_in);
            }
            let (x, lam, e) = masked(&x, k_in, false);
            let shift: Vec<u32> = shifts[..cols].iter().map(|s| s % (k_in - 2)).collect();
            let g = Squares { rows, dim, shift: shift.clone(), k_in, k_out };
            let s = w.run(&g.dealt(), |d| g.deal(d, &lam), |t, i| g.eval(t, &e[i]));
            for (at, got) in add(&s, k_out).into_iter().enumerate() {
                let (row, group) = (at / groups, at % groups);
                // Which of its neighbours a column is rounded to depends on the masks.
                let mut sums = vec![0u64];
                for c in 0..dim {
                    let s = shift[group * dim + c];
                    let v = signed(x[row * cols + group * dim + c], k_in) >> s;
                    let near: &[i64] = if s == 0 { &[0] } else { &[-1, 0, 1, 2] };
                    let square = |n: &i64| (v + n).wrapping_mul(v + n) as u64;
                    sums = sums.iter().flat_map(|sum| near.iter().map(|n| sum.wrapping_add(square(n)))).collect();
                }
                prop_assert!(sums.iter().any(|v| signed(*v, k_out) == got), "{} at {}", got, at);
            }
        }
    }
}
