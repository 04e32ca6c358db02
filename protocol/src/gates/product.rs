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
    use super::super::testing::{World, add, masked};
    use super::*;
    use crate::ring::signed;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn both_sides_are_exact_in_every_ring(
            (t, h, d, k) in (1usize..7, 1usize..4, 1usize..6, 1u32..=64),
            seed in any::<u64>(),
        ) {
            let mut w = World::seeded(seed);
            let [q, key] = [(); 2].map(|()| masked(&w.edges(k, t * h * d), k, false));
            let p = masked(&w.edges(k, h * t * t), k, false);
            // One element of a sum over `n`.
            let sum = |n: usize, f: &dyn Fn(usize) -> u64| {
                signed((0..n).fold(0u64, |s, c| s.wrapping_add(f(c))), k)
            };
            let g = HeadProduct { side: Side::Scores, tokens: t, heads: h, dim: d, k };
            let s = w.run(&g.dealt(), |x| g.deal(x, &q.1, &key.1), |x, i| g.eval(x, &q.2[i], &key.2[i]));
            for (at, got) in add(&s, k).into_iter().enumerate() {
                let (head, i, j) = (at / (t * t), at / t % t, at % t);
                let of = |row: usize, c: usize| row * h * d + head * d + c;
                prop_assert_eq!(got, sum(d, &|c| q.0[of(i, c)].wrapping_mul(key.0[of(j, c)])));
            }
            let g = HeadProduct { side: Side::Attend, ..g };
            let s = w.run(&g.dealt(), |x| g.deal(x, &p.1, &q.1), |x, i| g.eval(x, &p.2[i], &q.2[i]));
            for (at, got) in add(&s, k).into_iter().enumerate() {
                let (i, head) = (at / (h * d), at % (h * d) / d);
                let weight = |c: usize| p.0[head * t * t + i * t + c];
                prop_assert_eq!(got, sum(t, &|c| weight(c).wrapping_mul(q.0[c * h * d + at % (h * d)])));
            }
        }
    }
}
