//! Row-wise products: the variance of a row and the product of a row with one masked scalar of its own.

use super::{Deal, Dealt, Masked, Take};
use crate::Error;
use crate::ring::mask;
use crate::vector::{self, Kernel};
use crate::wipe::Wiped;

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
        let (half, leads) = (t.half(self.rows * self.cols, self.k)?, t.leads());
        let mut g = vec![0; self.rows * self.cols];
        t.divide(
            self.rows,
            [&mut g],
            |row| [row * self.cols],
            |rows, [g]| {
                let all = rows.start * self.cols..rows.end * self.cols;
                half.from(all.start).read(g);
                let [cm, cl] = [&x.m, &x.l].map(|x| Wiped::new(self.centred(&x[all.clone()])));
                let groups = cm.chunks_exact(self.dim).zip(cl.chunks_exact(self.dim)).zip(g.chunks_exact_mut(self.dim));
                for (i, ((m, l), y)) in groups.enumerate() {
                    let j = self.scalar(all.start + i * self.dim);
                    let own = if leads { r.m[j].wrapping_sub(r.l[j]) } else { r.l[j].wrapping_neg() };
                    vector::run(Products { m, l, own, r: r.m[j], keep: mask(self.k), y });
                }
            },
        );
        Ok(g)
    }
}

/// Adds an evaluator's part of the products with one scalar.
struct Products<'a> {
    m: &'a [u64],
    l: &'a [u64],
    own: u64,
    r: u64,
    keep: u64,
    y: &'a mut [u64],
}

impl Kernel for Products<'_> {
    #[inline(always)]
    fn run(self) {
        let Products { m, l, own, r, keep, y } = self;
        for (y, (m, l)) in y.iter_mut().zip(m.iter().zip(l)) {
            *y = y.wrapping_add(m.wrapping_mul(own)).wrapping_sub(l.wrapping_mul(r)) & keep;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{World, add, masked};
    use super::*;
    use crate::ring::signed;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn variance_is_exact_in_every_ring(
            rows in 1usize..4, cols in 1usize..9, k in 1u32..=64, centre in any::<bool>(), seed in any::<u64>()
        ) {
            let mut w = World::seeded(seed);
            let g = Variance { rows, cols, centre, k };
            let (x, lam, e) = masked(&w.edges(k, rows * cols), k, false);
            let s = w.run(&g.dealt(), |d| g.deal(d, &lam), |t, i| g.eval(t, &e[i]));
            for (r, got) in x.chunks(cols).zip(add(&s, k)) {
                let sq = r.iter().fold(0u64, |a, v| a.wrapping_add(v.wrapping_mul(*v)));
                let sum = r.iter().fold(0u64, |a, v| a.wrapping_add(*v));
                let spread = (cols as u64).wrapping_mul(sq).wrapping_sub(sum.wrapping_mul(sum));
                let want = if centre { spread } else { sq };
                prop_assert_eq!(got, signed(want, k));
            }
        }

        #[test]
        fn broadcast_is_exact_with_and_without_centring(
            (rows, dim, groups, k, centre) in (1usize..4, 1usize..4, 1usize..4, 1u32..=64, any::<bool>()),
            wider in (0u32..20, 0u32..20),
            seed in any::<u64>(),
        ) {
            let (cols, kx, kr) = (dim * groups, (k + wider.0).min(64), (k + wider.1).min(64));
            let mut w = World::seeded(seed);
            let g = Broadcast { rows, cols, dim, centre, k };
            let (x, r) = (w.edges(kx, rows * cols), w.edges(kr, rows * groups));
            let ((x, lx, ex), (r, lr, er)) = (masked(&x, kx, false), masked(&r, kr, false));
            let s = w.run(&g.dealt(), |d| g.deal(d, &lx, &lr), |t, i| g.eval(t, &ex[i], &er[i]));
            for (i, got) in add(&s, k).into_iter().enumerate() {
                let row = &x[i / cols * cols..][..cols];
                let sum = row.iter().fold(0u64, |a, b| a.wrapping_add(*b));
                let v = if centre { x[i].wrapping_mul(cols as u64).wrapping_sub(sum) } else { x[i] };
                let want = v.wrapping_mul(r[(i % cols) / dim * rows + i / cols]);
                prop_assert_eq!(got, signed(want, k));
            }
        }
    }
}
