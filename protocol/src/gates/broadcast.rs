//! Row-wise products: the variance of a row and the product of a row with one masked scalar of its own.

use super::{Deal, Dealt, Masked, Take};
use crate::Error;
use crate::ring::mask;

/// `n sum x^2 - (sum x)^2 = n ||x - mean||^2` of each row, or `sum x^2` if not `centre`; one element dealt per row.
///
/// Quadratic in `x = m - l`, so only the quadratic term in `l` has to be dealt; the cross terms are local.
#[derive(Clone, Debug)]
pub struct Variance {
    /// Rows.
    pub rows: usize,
    /// Columns `n`.
    pub cols: usize,
    /// Take the mean out.
    pub centre: bool,
    /// Ring of input and output.
    pub k: u32,
}

fn quad(centre: bool, a: &[u64], b: &[u64]) -> u64 {
    let (mut s, mut sa, mut sb) = (0u64, 0u64, 0u64);
    for (&x, &y) in a.iter().zip(b) {
        s = s.wrapping_add(x.wrapping_mul(y));
        sa = sa.wrapping_add(x);
        sb = sb.wrapping_add(y);
    }
    if centre { (a.len() as u64).wrapping_mul(s).wrapping_sub(sa.wrapping_mul(sb)) } else { s }
}

impl Variance {
    /// What is dealt.
    pub fn dealt(&self) -> Vec<Dealt> {
        vec![(self.rows, self.k)]
    }

    /// Dealer.
    pub fn deal(&self, d: &mut Deal, lam: &[u64]) -> Result<(), Error> {
        d.share(self.k, lam.chunks_exact(self.cols).map(|l| quad(self.centre, l, l)).collect())
    }

    /// Meaning in the clear, in units.
    pub fn plain(&self, x: &[f64]) -> Vec<f64> {
        let term = |row: &[f64]| {
            if !self.centre {
                return row.iter().map(|v| v * v).sum::<f64>();
            }
            let mean = row.iter().sum::<f64>() / self.cols as f64;
            self.cols as f64 * row.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>()
        };
        x.chunks_exact(self.cols).map(term).collect()
    }

    /// Evaluator: share of the variance term of each row.
    pub fn eval(&self, t: &mut Take, x: &Masked) -> Result<Vec<u64>, Error> {
        let mut q = t.next(self.rows, self.k)?;
        for ((q, m), l) in q.iter_mut().zip(x.m.chunks_exact(self.cols)).zip(x.l.chunks_exact(self.cols)) {
            *q = q.wrapping_sub(quad(self.centre, m, l).wrapping_mul(2));
            if t.leads() {
                *q = q.wrapping_add(quad(self.centre, m, m));
            }
            *q &= mask(self.k);
        }
        Ok(q)
    }
}

/// `x[t][c] * r[c / dim][t]`, with `x` first centred and multiplied by `cols` if `centre`.
#[derive(Clone, Debug)]
pub struct Broadcast {
    /// Rows `T` of `x`.
    pub rows: usize,
    /// Columns of `x`.
    pub cols: usize,
    /// Columns that share one scalar; `r` has `cols / dim` groups of `rows`.
    pub dim: usize,
    /// Use `cols * x - sum(x)` in place of `x`.
    pub centre: bool,
    /// Ring of the output; both inputs are in a ring at least as wide.
    pub k: u32,
}

impl Broadcast {
    /// What is dealt.
    pub fn dealt(&self) -> Vec<Dealt> {
        vec![(self.rows * self.cols, self.k)]
    }

    fn centred(&self, x: &[u64]) -> Vec<u64> {
        if !self.centre {
            return x.to_vec();
        }
        x.chunks_exact(self.cols)
            .flat_map(|r| {
                let s = r.iter().fold(0u64, |a, b| a.wrapping_add(*b));
                r.iter().map(move |v| v.wrapping_mul(self.cols as u64).wrapping_sub(s))
            })
            .collect()
    }

    fn scalar(&self, i: usize) -> usize {
        (i % self.cols) / self.dim * self.rows + i / self.cols
    }

    /// Dealer.
    pub fn deal(&self, d: &mut Deal, lx: &[u64], lr: &[u64]) -> Result<(), Error> {
        let c = self.centred(lx);
        d.share(self.k, c.iter().enumerate().map(|(i, v)| v.wrapping_mul(lr[self.scalar(i)])).collect())
    }

    /// Meaning in the clear, in units.
    pub fn plain(&self, x: &[f64], r: &[f64]) -> Vec<f64> {
        let term = |(i, v): (usize, &f64)| {
            let row = &x[i / self.cols * self.cols..][..self.cols];
            let v = if self.centre { v * self.cols as f64 - row.iter().sum::<f64>() } else { *v };
            v * r[self.scalar(i)]
        };
        x.iter().enumerate().map(term).collect()
    }

    /// Evaluator: share of the products.
    pub fn eval(&self, t: &mut Take, x: &Masked, r: &Masked) -> Result<Vec<u64>, Error> {
        let mut g = t.next(self.rows * self.cols, self.k)?;
        let (cm, cl) = (self.centred(&x.m), self.centred(&x.l));
        for (i, g) in g.iter_mut().enumerate() {
            let j = self.scalar(i);
            let own = if t.leads() { r.m[j].wrapping_sub(r.l[j]) } else { r.l[j].wrapping_neg() };
            *g = g.wrapping_add(cm[i].wrapping_mul(own)).wrapping_sub(cl[i].wrapping_mul(r.m[j])) & mask(self.k);
        }
        Ok(g)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{World, add};
    use super::*;
    use crate::ring::signed;

    #[test]
    fn variance_is_exact() {
        let mut w = World::new();
        for centre in [true, false] {
            variance_with(&mut w, centre);
        }
    }

    fn variance_with(w: &mut World, centre: bool) {
        let g = Variance { rows: 3, cols: 7, centre, k: 58 };
        let x: Vec<i64> = (0..21).map(|_| w.word() as i64 >> 40).collect();
        let words: Vec<u64> = x.iter().map(|v| *v as u64 & mask(58)).collect();
        let (lam, e) = w.mask(&words, 58);
        let s = w.run(&g.dealt(), |d| g.deal(d, &lam), |t, i| g.eval(t, &e[i]));
        for (r, got) in x.chunks(7).zip(add(&s, 58)) {
            let (sq, s): (i64, i64) = (r.iter().map(|v| v * v).sum(), r.iter().sum());
            assert_eq!(got, if centre { 7 * sq - s * s } else { sq });
        }
    }

    #[test]
    fn broadcast_is_exact_with_and_without_centring() {
        let mut w = World::new();
        for centre in [false, true] {
            let (rows, cols, dim, k) = (4, 6, if centre { 6 } else { 3 }, 51);
            let g = Broadcast { rows, cols, dim, centre, k };
            let x: Vec<u64> = (0..rows * cols).map(|_| w.word() & mask(58)).collect();
            let r: Vec<u64> = (0..rows * cols / dim).map(|_| w.word() & mask(58)).collect();
            let ((lx, ex), (lr, er)) = (w.mask(&x, 58), w.mask(&r, 58));
            let s = w.run(&g.dealt(), |d| g.deal(d, &lx, &lr), |t, i| g.eval(t, &ex[i], &er[i]));
            let got = add(&s, k);
            for i in 0..rows * cols {
                let row = &x[i / cols * cols..][..cols];
                let v = if centre {
                    x[i].wrapping_mul(cols as u64).wrapping_sub(row.iter().fold(0u64, |a, b| a.wrapping_add(*b)))
                } else {
                    x[i]
                };
                let want = v.wrapping_mul(r[(i % cols) / dim * rows + i / cols]);
                assert_eq!(got[i], signed(want & mask(k), k));
            }
        }
    }
}
