//! `product`: matrix products of two masked tensors per attention head; one element dealt per *output*.
//!
//! `(m_a - l_a)(m_b - l_b) = m_a m_b - m_a l_b - l_a m_b + l_a l_b` (Beaver's identity with the masks as the triple).

use super::{Deal, Dealt, Masked, Take};
use crate::Error;
use crate::gemm::{matmul, matmul_bt};
use crate::ring::mask;

/// Which of attention's two products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// `Q K^T`: `R x H dh` and `T x H dh` to `H x R x T`.
    Scores,
    /// `P V`: `H x R x T` and `T x H dh` to `R x H dh`.
    Attend,
}

/// A batched product over heads in one ring.
#[derive(Clone, Debug)]
pub struct HeadProduct {
    /// Which product.
    pub side: Side,
    /// Rows `R` of queries and outputs.
    pub rows: usize,
    /// Keys and values `T`.
    pub keys: usize,
    /// Heads `H`.
    pub heads: usize,
    /// Columns a head `dh`.
    pub dim: usize,
    /// Ring of both inputs and the output.
    pub k: u32,
}

impl HeadProduct {
    /// Output elements.
    pub fn out_len(&self) -> usize {
        match self.side {
            Side::Scores => self.heads * self.rows * self.keys,
            Side::Attend => self.rows * self.heads * self.dim,
        }
    }

    /// What is dealt.
    pub fn dealt(&self) -> Vec<Dealt> {
        vec![(self.out_len(), self.k)]
    }

    /// Columns of head `h`.
    fn head(&self, x: &[u64], h: usize) -> Vec<u64> {
        x.chunks_exact(self.heads * self.dim).flat_map(|row| row[h * self.dim..][..self.dim].iter().copied()).collect()
    }

    fn product(&self, a: &[u64], b: &[u64]) -> Vec<u64> {
        let (r, t, d, w) = (self.rows, self.keys, self.dim, self.heads * self.dim);
        let mut out = vec![0; self.out_len()];
        match self.side {
            Side::Scores => {
                for h in 0..self.heads {
                    matmul_bt(&self.head(a, h), &self.head(b, h), r, d, t, self.k, &mut out[h * r * t..][..r * t]);
                }
            }
            Side::Attend => {
                let mut o = vec![0; r * d];
                for h in 0..self.heads {
                    matmul(&a[h * r * t..][..r * t], &self.head(b, h), r, t, d, self.k, &mut o);
                    for (o, out) in o.chunks_exact(d).zip(out.chunks_exact_mut(w)) {
                        out[h * d..][..d].copy_from_slice(o);
                    }
                }
            }
        }
        out
    }

    /// Meaning in the clear, in units.
    pub fn plain(&self, a: &[f64], b: &[f64]) -> Vec<f64> {
        let (r, t, d, w) = (self.rows, self.keys, self.dim, self.heads * self.dim);
        let mut out = vec![0.0; self.out_len()];
        for h in 0..self.heads {
            for i in 0..r {
                for j in 0..t {
                    let (row, column) = (i * w + h * d, j * w + h * d);
                    let score = h * r * t + i * t + j;
                    match self.side {
                        Side::Scores => out[score] = (0..d).map(|c| a[row + c] * b[column + c]).sum(),
                        Side::Attend => (0..d).for_each(|c| out[row + c] += a[score] * b[column + c]),
                    }
                }
            }
        }
        out
    }

    /// Dealer.
    pub fn deal(&self, d: &mut Deal, la: &[u64], lb: &[u64]) -> Result<(), Error> {
        d.share(self.k, self.product(la, lb))
    }

    /// Evaluator: share of the product.
    pub fn eval(&self, t: &mut Take, a: &Masked, b: &Masked) -> Result<Vec<u64>, Error> {
        let mut g = t.next(self.out_len(), self.k)?;
        let mk = mask(self.k);
        // E1 computes m_a (m_b - l_b), E2 computes -m_a l_b: one product instead of two.
        let rhs: Vec<u64> = if t.leads() {
            b.m.iter().zip(&b.l).map(|(m, l)| m.wrapping_sub(*l) & mk).collect()
        } else {
            b.l.iter().map(|l| l.wrapping_neg() & mk).collect()
        };
        let p = self.product(&a.m, &rhs);
        let q = self.product(&a.l, &b.m);
        for ((g, p), q) in g.iter_mut().zip(p).zip(q) {
            *g = g.wrapping_add(p).wrapping_sub(q) & mk;
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
    fn both_sides_are_exact_in_the_ring() {
        let mut w = World::new();
        let (r, t, h, d) = (4, 5, 2, 3);
        for k in [28, 40, 64] {
            let rand = |w: &mut World, n: usize| -> Vec<u64> { (0..n).map(|_| w.word() & mask(k)).collect() };
            let (q, kv, p) = (rand(&mut w, r * h * d), rand(&mut w, t * h * d), rand(&mut w, h * r * t));
            for (side, a, b) in [(Side::Scores, &q, &kv), (Side::Attend, &p, &kv)] {
                let g = HeadProduct { side, rows: r, keys: t, heads: h, dim: d, k };
                let ((la, a2), (lb, b2)) = (w.mask(a, k), w.mask(b, k));
                let s = w.run(&g.dealt(), |x| g.deal(x, &la, &lb), |x, i| g.eval(x, &a2[i], &b2[i]));
                for (at, got) in add(&s, k).into_iter().enumerate() {
                    let mut want = 0u64;
                    match side {
                        Side::Scores => {
                            let (hh, i, j) = (at / (r * t), at / t % r, at % t);
                            for c in 0..d {
                                let term = a[i * h * d + hh * d + c].wrapping_mul(b[j * h * d + hh * d + c]);
                                want = want.wrapping_add(term);
                            }
                        }
                        Side::Attend => {
                            let (i, hh, c) = (at / (h * d), at / d % h, at % d);
                            for j in 0..t {
                                let term = a[hh * r * t + i * t + j].wrapping_mul(b[j * h * d + hh * d + c]);
                                want = want.wrapping_add(term);
                            }
                        }
                    }
                    assert_eq!(got, signed(want & mask(k), k));
                }
            }
        }
    }

    #[test]
    fn the_meaning_in_the_clear_is_the_same_product() {
        let mut w = World::new();
        for side in [Side::Scores, Side::Attend] {
            let g = HeadProduct { side, rows: 3, keys: 4, heads: 2, dim: 5, k: 64 };
            let n = if side == Side::Scores { 30 } else { 24 };
            let mut small = |n: usize| -> Vec<i64> { (0..n).map(|_| w.word() as i64 >> 44).collect() };
            let (a, b) = (small(n), small(40));
            let words = |v: &[i64]| v.iter().map(|v| *v as u64).collect::<Vec<_>>();
            let reals = |v: &[i64]| v.iter().map(|v| *v as f64).collect::<Vec<_>>();
            let exact: Vec<f64> = g.product(&words(&a), &words(&b)).iter().map(|v| *v as i64 as f64).collect();
            assert_eq!(g.plain(&reals(&a), &reals(&b)), exact);
        }
    }
}
