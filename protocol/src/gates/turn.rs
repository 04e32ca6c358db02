//! `turn`: masked keys moved by a number of positions that only the client knows: each pair `(x0, x1)` of a head to
//! `(c x0 - s x1, s x0 + c x1)`, where the client shares the cosine and the sine of every frequency.
//!
//! Two products a value whose masks are the triple, as in [`super::product`]: the dealer deals the combination of the masks
//! that the output needs, one element an output, and learns neither turn nor keys, of which it holds masks alone. Exact in
//! the ring. Cosines and sines are opened under fresh masks like any input, so that no party learns how far keys moved, nor
//! whether they did. Layout as in [`super::rotate`]: value `i` of a head turns with value `i + dim / 2`.

use zeroize::Zeroizing;

use super::{Deal, Dealt, Masked, Take};
use crate::Error;
use crate::ring::mask;

/// Turns `rows x heads dim` by one angle a frequency: `dim / 2` cosines, then `dim / 2` sines, at `2^-f`.
#[derive(Clone, Debug)]
pub struct Turn {
    /// Rows.
    pub rows: usize,
    /// Values in a head.
    pub dim: usize,
    /// Values in a row.
    pub cols: usize,
    /// Radians a position, `dim / 2` values.
    pub frequencies: Vec<f64>,
    /// Fraction bits of cosines and sines.
    pub f: i32,
    /// Ring of keys, cosines, sines and outputs.
    pub k: u32,
}

impl Turn {
    /// What is dealt.
    pub fn dealt(&self) -> Vec<Dealt> {
        vec![(self.rows * self.cols, self.k)]
    }

    /// Cosines and sines of a move by `positions`, in units.
    pub fn by(&self, positions: i64) -> impl Iterator<Item = i64> {
        let unit = libm::exp2(f64::from(self.f));
        let angle = move |w: &f64| libm::sincos(positions as f64 * w);
        let cos = self.frequencies.iter().map(move |w| libm::round(angle(w).1 * unit) as i64);
        cos.chain(self.frequencies.iter().map(move |w| libm::round(angle(w).0 * unit) as i64))
    }

    /// `out` is given the index of each pair's first value, and of its frequency.
    fn pairs(&self, mut out: impl FnMut(usize, usize)) {
        let half = self.dim / 2;
        for head in (0..self.rows * self.cols).step_by(self.dim) {
            (0..half).for_each(|i| out(head + i, i));
        }
    }

    /// Dealer.
    pub fn deal(&self, d: &mut Deal, lx: &[u64], lt: &[u64]) -> Result<(), Error> {
        let half = self.dim / 2;
        let mut p = vec![0u64; lx.len()];
        self.pairs(|at, i| {
            let ([x0, x1], [c, s]) = ([lx[at], lx[at + half]], [lt[i], lt[i + half]]);
            p[at] = c.wrapping_mul(x0).wrapping_sub(s.wrapping_mul(x1)) & mask(self.k);
            p[at + half] = s.wrapping_mul(x0).wrapping_add(c.wrapping_mul(x1)) & mask(self.k);
        });
        d.share(self.k, p)
    }

    /// Evaluator: share of the turned keys, at the keys' scale times `2^-f`.
    pub fn eval(&self, t: &mut Take, x: &Masked, turn: &Masked) -> Result<Vec<u64>, Error> {
        let mut y = t.next(self.rows * self.cols, self.k)?;
        let (half, leads) = (self.dim / 2, t.leads());
        let own: Zeroizing<Vec<u64>> = Zeroizing::new(
            turn.m.iter().zip(&turn.l).map(|(m, l)| (if leads { *m } else { 0 }).wrapping_sub(*l)).collect(),
        );
        // Less the dealt product of both masks, a share of the product of value `at` and cosine or sine `i`.
        let times = |at: usize, i: usize| x.m[at].wrapping_mul(own[i]).wrapping_sub(x.l[at].wrapping_mul(turn.m[i]));
        self.pairs(|at, i| {
            let (y0, y1) = (times(at, i).wrapping_sub(times(at + half, i + half)), times(at, i + half));
            y[at] = y[at].wrapping_add(y0) & mask(self.k);
            y[at + half] = y[at + half].wrapping_add(y1).wrapping_add(times(at + half, i)) & mask(self.k);
        });
        Ok(y)
    }

    /// Meaning in the clear, in units.
    pub fn plain(&self, x: &[f64], turn: &[f64]) -> Vec<f64> {
        let half = self.dim / 2;
        let mut y = vec![0.0; x.len()];
        self.pairs(|at, i| {
            y[at] = turn[i] * x[at] - turn[i + half] * x[at + half];
            y[at + half] = turn[i + half] * x[at] + turn[i] * x[at + half];
        });
        y
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{World, add};
    use super::*;

    fn turn() -> Turn {
        Turn { rows: 3, dim: 4, cols: 8, frequencies: vec![1.0, 0.01], f: 15, k: 36 }
    }

    #[test]
    fn turns_are_exact_in_the_ring() {
        let (mut w, g) = (World::new(), turn());
        let x: Vec<i64> = (0..24).map(|_| w.word() as i64 >> 46).collect();
        for positions in [0, 5, -3] {
            let t: Vec<i64> = g.by(positions).collect();
            let words = |v: &[i64]| v.iter().map(|v| *v as u64 & mask(36)).collect::<Vec<u64>>();
            let ((lx, ex), (lt, et)) = (w.mask(&words(&x), 36), w.mask(&words(&t), 36));
            let s = w.run(&g.dealt(), |d| g.deal(d, &lx, &lt), |take, i| g.eval(take, &ex[i], &et[i]));
            let real = |v: &[i64]| v.iter().map(|v| *v as f64).collect::<Vec<f64>>();
            let want: Vec<i64> = g.plain(&real(&x), &real(&t)).iter().map(|v| *v as i64).collect();
            assert_eq!(add(&s, 36), want);
        }
    }

    #[test]
    fn a_move_and_its_inverse_cancel_and_none_is_the_identity() {
        let g = turn();
        let x: Vec<f64> = (0..24).map(|i| f64::from(i * i) - 100.0).collect();
        let by = |p: i64, x: &[f64]| -> Vec<f64> {
            let t: Vec<f64> = g.by(p).map(|v| v as f64 / 32768.0).collect();
            g.plain(x, &t)
        };
        assert_eq!(by(0, &x), x);
        let back = by(-7, &by(7, &x));
        assert!(x.iter().zip(&back).all(|(a, b)| (a - b).abs() < 0.05));
        assert!(x.iter().zip(by(7, &x)).any(|(a, b)| (a - b).abs() > 10.0));
    }
}
