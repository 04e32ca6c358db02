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
    /// `Q K^T`: two `T x H dh` tensors to `H x T x T`.
    Scores,
    /// `P V`: `H x T x T` and `T x H dh` to `T x H dh`.
    Attend,
}

/// A batched product over heads in one ring.
#[derive(Clone, Debug)]
pub struct HeadProduct {
    /// Which product.
    pub side: Side,
    /// Rows `T`.
    pub tokens: usize,
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
            Side::Scores => self.heads * self.tokens * self.tokens,
            Side::Attend => self.tokens * self.heads * self.dim,
        }
    }

    /// What is dealt.
    pub fn dealt(&self) -> Vec<Dealt> {
        vec![(self.out_len(), self.k)]
    }

    fn head(&self, x: &[u64], h: usize) -> Vec<u64> {
        let w = self.heads * self.dim;
        (0..self.tokens).flat_map(|t| x[t * w + h * self.dim..][..self.dim].iter().copied()).collect()
    }

    /// `acc -= a b` (or `+=`), head by head.
    fn product(&self, a: &[u64], b: &[u64]) -> Vec<u64> {
        let (t, d, w) = (self.tokens, self.dim, self.heads * self.dim);
        let mut out = vec![0; self.out_len()];
        match self.side {
            Side::Scores => {
                for h in 0..self.heads {
                    matmul_bt(&self.head(a, h), &self.head(b, h), t, d, t, self.k, &mut out[h * t * t..][..t * t]);
                }
            }
            Side::Attend => {
                let mut o = vec![0; t * d];
                for h in 0..self.heads {
                    matmul(&a[h * t * t..][..t * t], &self.head(b, h), t, t, d, self.k, &mut o);
                    for r in 0..t {
                        out[r * w + h * d..][..d].copy_from_slice(&o[r * d..][..d]);
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
        let (t, h, d) = (5, 2, 3);
        for k in [28, 40, 64] {
            let rand = |w: &mut World, n: usize| -> Vec<u64> { (0..n).map(|_| w.word() & mask(k)).collect() };
            let (q, kk, p) = (rand(&mut w, t * h * d), rand(&mut w, t * h * d), rand(&mut w, h * t * t));
            for (side, a, b) in [(Side::Scores, &q, &kk), (Side::Attend, &p, &q)] {
                let g = HeadProduct { side, tokens: t, heads: h, dim: d, k };
                let ((la, a2), (lb, b2)) = (w.mask(a, k), w.mask(b, k));
                let s = w.run(&g.dealt(), |x| g.deal(x, &la, &lb), |x, i| g.eval(x, &a2[i], &b2[i]));
                let got = add(&s, k);
                for hh in 0..h {
                    for i in 0..t {
                        let n = if side == Side::Scores { t } else { d };
                        for j in 0..n {
                            let mut want = 0u64;
                            if side == Side::Scores {
                                for c in 0..d {
                                    want = want.wrapping_add(
                                        a[i * h * d + hh * d + c].wrapping_mul(b[j * h * d + hh * d + c]),
                                    );
                                }
                                assert_eq!(got[hh * t * t + i * t + j], signed(want & mask(k), k));
                            } else {
                                for c in 0..t {
                                    want = want.wrapping_add(
                                        a[hh * t * t + i * t + c].wrapping_mul(b[c * h * d + hh * d + j]),
                                    );
                                }
                                assert_eq!(got[i * h * d + hh * d + j], signed(want & mask(k), k));
                            }
                        }
                    }
                }
            }
        }
    }
}
