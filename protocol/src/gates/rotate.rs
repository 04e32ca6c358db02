//! `rotate`: rotary positions inside a rescale: each pair `(x0, x1)` of a head to `(c x0 - s x1, s x0 + c x1)`.
//!
//! The turn of a row's position is public, so this is [`super::rescale`] with two inputs: either evaluator combines its own
//! halves of a pair's masks, and the dealer deals their carry and `msb(l)` of each input, which serve both outputs. Exact
//! to 5 ulp for `|x| < 2^(k-2)`. Layout: value `i` of a head turns with value `i + dim / 2` (Su et al., 2021).

use std::sync::Arc;

use super::rescale;
use super::{Deal, Dealt, Halves, Masked, Take, scaled};
use crate::Error;
use crate::ring::mask;

/// Rotates `heads x dim` columns, from column `first`, of a `rows x stride` masked tensor.
#[derive(Clone, Debug)]
pub struct Rotate {
    /// Rows of input and output.
    pub rows: usize,
    /// Position of the first row.
    pub position: usize,
    /// Columns of the input.
    pub stride: usize,
    /// First input column read.
    pub first: usize,
    /// Values in a head.
    pub dim: usize,
    /// Radians a position, `dim / 2` values.
    pub frequencies: Vec<f64>,
    /// Scale of every input column, `heads x dim`, each times `2^power`.
    pub scale: Arc<Vec<f64>>,
    /// See [`Self::scale`].
    pub power: i32,
    /// Ring of the input; `|x| < 2^(k_in - 2)`.
    pub k_in: u32,
    /// Ring of the output.
    pub k_out: u32,
}

/// Bits of the largest multiplier: few, for the power of two in what wraps.
const BITS: i32 = 20;

/// Multipliers of one pair: of its first value in both outputs, and of its second.
struct Turn {
    cos: [i64; 2],
    sin: [i64; 2],
}

impl Rotate {
    /// Common binary exponent of the multipliers.
    pub fn shift(&self) -> u32 {
        let top = self.scale.iter().fold(1e-30f64, |m, s| m.max(s.abs()));
        (BITS - libm::ceil(libm::log2(top)) as i32 - self.power).clamp(0, 100) as u32
    }

    fn heads(&self) -> usize {
        self.scale.len() / self.dim
    }

    /// Output elements.
    pub fn out_len(&self) -> usize {
        self.rows * self.scale.len()
    }

    fn k_bit(&self) -> u32 {
        self.k_out.saturating_sub(self.k_in.saturating_sub(self.shift())).max(1)
    }

    /// What is dealt.
    pub fn dealt(&self) -> Vec<Dealt> {
        vec![(self.out_len(), self.k_bit()); 2]
    }

    /// Calls `f` for every pair with its turn, the input index and the output index of its first value.
    fn pairs(&self, mut f: impl FnMut(&Turn, usize, usize)) {
        let (half, unit) = (self.dim / 2, libm::exp2(f64::from(self.shift() as i32 + self.power)));
        for row in 0..self.rows {
            let turns: Vec<(f64, f64)> =
                self.frequencies.iter().map(|w| libm::sincos((self.position + row) as f64 * w)).collect();
            for h in 0..self.heads() {
                for (i, (sin, cos)) in turns.iter().enumerate() {
                    let column = h * self.dim + i;
                    let times = |v: f64| [0, half].map(|o| libm::round(self.scale[column + o] * unit * v) as i64);
                    f(
                        &Turn { cos: times(*cos), sin: times(*sin) },
                        row * self.stride + self.first + column,
                        row * self.scale.len() + column,
                    );
                }
            }
        }
    }

    /// Multipliers of every pair, row by row and head by head: of its first value in both outputs, then of its second, which
    /// is subtracted from the first output.
    pub fn multipliers(&self) -> Vec<[i64; 4]> {
        let mut all = Vec::with_capacity(self.out_len() / 2);
        self.pairs(|t, _, _| all.push([t.cos[0], t.sin[0], t.sin[1], t.cos[1]]));
        all
    }

    /// Dealer: of the whole input's masks.
    pub fn deal(&self, d: &mut Deal, lam: Halves) -> Result<(), Error> {
        let columns = (self.first, self.scale.len());
        lam.deal_bits(d, (self.rows, self.stride), columns, (self.k_in, self.k_bit()))
    }

    /// Evaluator: share of the rotated columns.
    pub fn eval(&self, t: &mut Take, x: &Masked) -> Result<Vec<u64>, Error> {
        let carry = t.next(self.out_len(), self.k_bit())?;
        let top = t.next(self.out_len(), self.k_bit())?;
        let (half, shift, leads) = (self.dim / 2, self.shift(), t.leads());
        let (mk_in, mk, quarter) = (mask(self.k_in), mask(self.k_out), 1u64 << (self.k_in - 2));
        let mut y = vec![0; self.out_len()];
        self.pairs(|t, at, out| {
            // A share of each input times each of its multipliers.
            let scaled = |at: usize, out: usize, mult: i64| {
                let m = x.m[at].wrapping_add(quarter) & mk_in;
                let wraps = (1 - (m >> (self.k_in - 1))).wrapping_mul(top[out]).wrapping_add(carry[out]);
                let wrapped = wraps.wrapping_mul(rescale::wrap(mult, shift, self.k_in, self.k_out));
                let own = wrapped.wrapping_sub(scaled(x.l[at], mult, shift));
                if !leads {
                    return own;
                }
                own.wrapping_add(scaled(m, mult, shift)).wrapping_sub(scaled(quarter, mult, shift))
            };
            let first = |mult: i64| scaled(at, out, mult);
            let second = |mult: i64| scaled(at + half, out + half, mult);
            y[out] = first(t.cos[0]).wrapping_sub(second(t.sin[1])) & mk;
            y[out + half] = first(t.sin[0]).wrapping_add(second(t.cos[1])) & mk;
        });
        Ok(y)
    }

    /// Meaning in the clear, in units.
    pub fn plain(&self, x: &[f64]) -> Vec<f64> {
        let (half, unit) = (self.dim / 2, libm::exp2(-f64::from(self.shift())));
        let mut y = vec![0.0; self.out_len()];
        self.pairs(|t, at, out| {
            let (x0, x1) = (unit * x[at], unit * x[at + half]);
            y[out] = t.cos[0] as f64 * x0 - t.sin[1] as f64 * x1;
            y[out + half] = t.sin[0] as f64 * x0 + t.cos[1] as f64 * x1;
        });
        y
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{World, add};
    use super::*;
    use crate::ring::signed;

    #[test]
    fn within_five_ulp_up_to_the_range_edge() {
        let mut w = World::new();
        for (k_in, k_out, scale) in [(32, 28, 0.01), (54, 28, 1e-9), (30, 40, 3.0)] {
            let (rows, dim) = (5, 4);
            let g = Rotate {
                rows,
                position: 7,
                stride: 10,
                first: 2,
                dim,
                frequencies: vec![1.0, 0.01],
                scale: Arc::new([1.0, 0.5, 0.7, 0.3, 1.0, 0.9, 0.8, 0.2].map(|s| s * scale * 8.0).to_vec()),
                power: -3,
                k_in,
                k_out,
            };
            let edge = (1i64 << (k_in - 2)) - 1;
            let mut x: Vec<i64> = (0..50).map(|_| w.word() as i64 >> (66 - k_in)).collect();
            x[2..8].copy_from_slice(&[edge, -edge, 0, 1, -edge, -edge]);
            let words: Vec<u64> = x.iter().map(|v| *v as u64 & mask(k_in)).collect();
            let (lam, e) = w.mask(&words, k_in);
            let s = w.run(&g.dealt(), |d| g.deal(d, Halves { sum: &lam, first: &e[0].l }), |t, i| g.eval(t, &e[i]));
            let want = g.plain(&x.iter().map(|v| *v as f64).collect::<Vec<_>>());
            for (got, want) in add(&s, k_out).into_iter().zip(want) {
                let difference = signed((got - want.round() as i64) as u64 & mask(k_out), k_out);
                assert!(difference.abs() <= 5, "{k_in} -> {k_out}: {got} for {want}");
            }
        }
    }
}
