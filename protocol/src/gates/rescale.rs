//! `rescale`: `y = round(c x)` for a public real `c`, per column, into another ring.
//!
//! With `x' = x + 2^(k-2) >= 0` and `m' = x' + l` mod 2^k, the sum wrapped iff `msb(l) = 1` and `msb(m') = 0`, because
//! `x' < 2^(k-1)`. So `y = R(c m') - R(c 2^(k-2)) - R(c l) + wrap R(c 2^k)`, exact to 1.5 ulp for `|x| < 2^(k-2)`.
//! Dealt: `R(c l)` and the bit `msb(l)`; the bit's ring is as narrow as the power of two in `R(c 2^k)` allows.

use super::{Deal, Dealt, Masked, Take, scaled};
use crate::Error;
use crate::ring::mask;

/// Rescales columns `first .. first + mult.len()` of a `rows x stride` masked tensor.
#[derive(Clone, Debug)]
pub struct Rescale {
    /// Rows of input and output.
    pub rows: usize,
    /// Columns of the input.
    pub stride: usize,
    /// First input column read.
    pub first: usize,
    /// Per output column: the scale is `mult / 2^shift`.
    pub mult: Vec<i64>,
    /// Common binary exponent of the scales.
    pub shift: u32,
    /// Ring of the input; `|x| < 2^(k_in - 2)`.
    pub k_in: u32,
    /// Ring of the output.
    pub k_out: u32,
    /// Per column, added to the result; empty for none.
    pub bias: Vec<i64>,
}

impl Rescale {
    fn wrap(&self, c: usize) -> u64 {
        // 2^k_in does not fit the unsigned argument of `scaled` for k_in = 64, hence the i128 here.
        let p = (self.mult[c] as i128) << self.k_in;
        let r = if self.shift == 0 { p } else { (p + (1i128 << (self.shift - 1))) >> self.shift };
        r as u64 & mask(self.k_out)
    }

    /// Bits of the ring in which `msb(l)` is dealt.
    fn k_bit(&self) -> u32 {
        let z = (0..self.mult.len()).map(|c| self.wrap(c).trailing_zeros().min(self.k_out)).min().unwrap_or(0);
        (self.k_out - z).max(1)
    }

    /// Output elements.
    pub fn len(&self) -> usize {
        self.rows * self.mult.len()
    }

    /// Whether there is nothing to rescale.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What is dealt.
    pub fn dealt(&self) -> Vec<Dealt> {
        vec![(self.len(), self.k_out), (self.len(), self.k_bit())]
    }

    /// Dealer: `lam` is the whole input's mask.
    pub fn deal(&self, d: &mut Deal, lam: &[u64]) -> Result<(), Error> {
        let (mut a, mut b) = (Vec::with_capacity(self.len()), Vec::with_capacity(self.len()));
        for row in lam.chunks_exact(self.stride) {
            for (&l, &mu) in row[self.first..].iter().zip(&self.mult) {
                a.push(scaled(l, mu, self.shift));
                b.push(l >> (self.k_in - 1));
            }
        }
        d.share(self.k_out, a)?;
        d.share(self.k_bit(), b)
    }

    /// Meaning in the clear, in units.
    pub fn plain(&self, x: &[f64]) -> Vec<f64> {
        let scale = 2f64.powi(-(self.shift as i32));
        let row = |row: &[f64]| -> Vec<f64> {
            let column = |(c, x): (usize, &f64)| {
                x * (self.mult[c] as f64 * scale) + self.bias.get(c).copied().unwrap_or(0) as f64
            };
            row[self.first..][..self.mult.len()].iter().enumerate().map(column).collect()
        };
        x.chunks_exact(self.stride).flat_map(row).collect()
    }

    /// Evaluator: share of the rescaled columns.
    pub fn eval(&self, t: &mut Take, x: &Masked) -> Result<Vec<u64>, Error> {
        let a = t.next(self.len(), self.k_out)?;
        let b = t.next(self.len(), self.k_bit())?;
        let (mk_in, mk) = (mask(self.k_in), mask(self.k_out));
        let quarter = 1u64 << (self.k_in - 2);
        let n = self.mult.len();
        let consts: Vec<(u64, u64)> = (0..n)
            .map(|c| {
                let bias = self.bias.get(c).copied().unwrap_or(0) as u64;
                (self.wrap(c), bias.wrapping_sub(scaled(quarter, self.mult[c], self.shift)))
            })
            .collect();
        let leads = t.leads();
        let mut y = Vec::with_capacity(self.len());
        for (row, (a, b)) in x.m.chunks_exact(self.stride).zip(a.chunks_exact(n).zip(b.chunks_exact(n))) {
            for (c, &m) in row[self.first..self.first + n].iter().enumerate() {
                let m = m.wrapping_add(quarter) & mk_in;
                let u = 1 - (m >> (self.k_in - 1));
                let mut v = (u * b[c]).wrapping_mul(consts[c].0).wrapping_sub(a[c]);
                if leads {
                    v = v.wrapping_add(scaled(m, self.mult[c], self.shift)).wrapping_add(consts[c].1);
                }
                y.push(v & mk);
            }
        }
        Ok(y)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{World, add};
    use super::*;

    #[test]
    fn within_one_and_a_half_ulp_up_to_the_range_edge() {
        let mut w = World::new();
        for (k_in, k_out, mult, shift) in [
            (32, 32, 1, 12),
            (32, 58, 12345, 20),
            (58, 32, -(1 << 22), 60),
            (40, 51, 1, 10),
            (31, 24, 77777, 30),
            (30, 40, 1, 0),
        ] {
            let edge = (1i64 << (k_in - 2)) - 1;
            let mut x: Vec<i64> = vec![0, 1, -1, edge, -edge];
            x.extend((0..500).map(|_| w.word() as i64 >> (64 - k_in + 2)));
            let words: Vec<u64> = x.iter().map(|v| *v as u64 & mask(k_in)).collect();
            let g = Rescale { rows: x.len(), stride: 1, first: 0, mult: vec![mult], shift, k_in, k_out, bias: vec![7] };
            let (lam, e) = w.mask(&words, k_in);
            let s = w.run(&g.dealt(), |d| g.deal(d, &lam), |t, i| g.eval(t, &e[i]));
            for (x, y) in x.iter().zip(add(&s, k_out)) {
                let want = *x as f64 * mult as f64 / 2f64.powi(shift as i32) + 7.0;
                if want.abs() < 2f64.powi(k_out as i32 - 1) {
                    assert!((y as f64 - want).abs() <= 1.51 + want.abs() * 1e-15, "{k_in}->{k_out}: {y} for {want}");
                }
            }
        }
    }
}
