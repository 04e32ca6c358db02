//! `product`: matrix products of two masked tensors per attention head; one element dealt per *output*.
//!
//! `(m_a - l_a)(m_b - l_b) = m_a m_b - m_a l_b - l_a m_b + l_a l_b` (Beaver's identity with the masks as the triple).

mod few;

use std::ops::Range;

use super::grid::Grid;
use super::{Deal, Dealt, Masked, Take};
use crate::Error;
use crate::backend::Backend;
use crate::gemm::{matmul, matmul_bt};
use crate::ring::mask;
use crate::wipe::Wiped;
use zeroize::Zeroizing;

/// Which of attention's two products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// `Q K^T`: `R x H dh` and `T x G dh` to scores.
    Scores,
    /// `P V`: scores and `T x G dh` to `R x H dh`.
    Attend,
}

/// A batched product over heads in one ring.
#[derive(Clone, Debug)]
pub struct HeadProduct {
    /// Which product.
    pub side: Side,
    /// Rows `R` of queries and outputs, and keys and values `T`.
    pub grid: Grid,
    /// Heads `H` of queries and scores.
    pub heads: usize,
    /// Heads `G` of keys and values; head `h` reads head `h / (H / G)`.
    pub kv_heads: usize,
    /// Columns a head `dh`.
    pub dim: usize,
    /// Ring of both inputs and the output.
    pub k: u32,
}

impl HeadProduct {
    /// Output elements.
    pub fn out_len(&self) -> usize {
        match self.side {
            Side::Scores => self.heads * self.grid.len(),
            Side::Attend => self.grid.rows * self.heads * self.dim,
        }
    }

    /// Multiply-accumulates of a product.
    pub(crate) fn macs(&self) -> usize {
        self.heads * self.grid.len() * self.dim
    }

    /// What is dealt.
    pub fn dealt(&self) -> Vec<Dealt> {
        vec![(self.out_len(), self.k)]
    }

    /// Columns of head `h` of `heads`.
    fn head(&self, x: &[u64], h: usize, heads: usize) -> Vec<u64> {
        let mut head = Vec::with_capacity(x.len() / heads);
        for row in x.chunks_exact(heads * self.dim) {
            head.extend_from_slice(&row[h * self.dim..][..self.dim]);
        }
        head
    }

    /// Sum of products in words, of some heads: their scores, or their columns of every row. What a [`Backend`] computes.
    pub(crate) fn sum(&self, heads: Range<usize>, pairs: &[(&[u64], &[u64])]) -> Vec<u64> {
        let mut sum = vec![0u64; self.out_len() / self.heads * heads.len()];
        for (a, b) in pairs {
            if self.grid.rows < few::FEW {
                few::add(self, heads.clone(), a, b, &mut sum);
            } else {
                let product = Zeroizing::new(self.product(heads.clone(), a, b));
                sum.iter_mut().zip(product.iter()).for_each(|(s, p)| *s = s.wrapping_add(*p));
            }
        }
        sum.iter_mut().for_each(|s| *s &= mask(self.k));
        sum
    }

    fn product(&self, heads: Range<usize>, a: &[u64], b: &[u64]) -> Vec<u64> {
        let (r, t, d) = (self.grid.rows, self.grid.keys, self.dim);
        let (first, width, len) = (heads.start, heads.len() * d, self.out_len() / self.heads * heads.len());
        let mut out = Vec::with_capacity(len);
        if self.side == Side::Attend {
            out.resize(len, 0);
        }
        let mut o = Wiped::new(vec![0; r * if self.side == Side::Scores { t } else { d }]);
        let mut kv = (usize::MAX, Wiped::new(Vec::new()));
        for h in heads {
            let g = h / (self.heads / self.kv_heads);
            if kv.0 != g {
                kv = (g, Wiped::new(self.head(b, g, self.kv_heads)));
            }
            match self.side {
                Side::Scores => {
                    let head = Wiped::new(self.head(a, h, self.heads));
                    matmul_bt(&head, &kv.1, r, d, t, self.k, &mut o);
                    self.grid.pack(&o, &mut out);
                }
                Side::Attend => {
                    let p = Wiped::new(self.grid.dense(&a[h * self.grid.len()..][..self.grid.len()]));
                    matmul(&p, &kv.1, r, t, d, self.k, &mut o);
                    for (o, out) in o.chunks_exact(d).zip(out.chunks_exact_mut(width)) {
                        out[(h - first) * d..][..d].copy_from_slice(o);
                    }
                }
            }
        }
        out
    }

    /// Meaning in the clear, in units.
    pub fn plain(&self, a: &[f64], b: &[f64]) -> Vec<f64> {
        let (d, w, v) = (self.dim, self.heads * self.dim, self.kv_heads * self.dim);
        let mut out = vec![0.0; self.out_len()];
        let mut score = 0;
        for h in 0..self.heads {
            let g = h / (self.heads / self.kv_heads);
            for i in 0..self.grid.rows {
                for j in 0..self.grid.row_len(i) {
                    let (row, column) = (i * w + h * d, j * v + g * d);
                    match self.side {
                        Side::Scores => out[score] = (0..d).map(|c| a[row + c] * b[column + c]).sum(),
                        Side::Attend => (0..d).for_each(|c| out[row + c] += a[score] * b[column + c]),
                    }
                    score += 1;
                }
            }
        }
        out
    }

    /// Dealer.
    pub fn deal(&self, d: &mut Deal, la: &[u64], lb: &[u64], backend: &dyn Backend) -> Result<(), Error> {
        d.share(self.k, backend.product(self, &[(la, lb)])?)
    }

    /// Evaluator: share of the product.
    pub fn eval(&self, t: &mut Take, a: &Masked, b: &Masked, backend: &dyn Backend) -> Result<Vec<u64>, Error> {
        let mk = mask(self.k);
        // E1 adds m_a m_b to one of the others, -m_a l_b and -l_a m_b: two products instead of three. What is made for them is
        // made of the shorter side, which beside many keys is a single row.
        let (short, long) = if a.m.len() < b.m.len() { (a, b) } else { (b, a) };
        let own = if t.leads() { 1 } else { 0u64 };
        let kept = short.m.iter().zip(&short.l).map(|(m, l)| (own * m).wrapping_sub(*l) & mk);
        let kept = Zeroizing::new(kept.collect::<Vec<u64>>());
        let negative: Vec<u64> = short.m.iter().map(|m| m.wrapping_neg() & mk).collect();
        let pairs: [(&[u64], &[u64]); 2] = if a.m.len() < b.m.len() {
            [(&kept, &long.m), (&negative, &long.l)]
        } else {
            [(&long.m, &kept), (&long.l, &negative)]
        };
        let sum = Zeroizing::new(backend.product(self, &pairs)?);
        let half = t.half(self.out_len(), self.k)?;
        let mut g = vec![0; self.out_len()];
        t.divide(
            g.len(),
            [&mut g],
            |i| [i],
            |all, [g]| {
                half.from(all.start).read(g);
                // A word of its own, of which it is known that writing changes nothing.
                let keep = mk;
                g.iter_mut().zip(&sum[all]).for_each(|(g, s)| *g = g.wrapping_add(*s) & keep);
            },
        );
        Ok(g)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{World, add, masked};
    use super::*;
    use crate::backend::Cpu;
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
            let g = HeadProduct { side: Side::Scores, grid: Grid::square(t), heads: h, kv_heads: h, dim: d, k };
            let s = w.run(&g.dealt(), |x| g.deal(x, &q.1, &key.1, &Cpu), |x, i| g.eval(x, &q.2[i], &key.2[i], &Cpu));
            for (at, got) in add(&s, k).into_iter().enumerate() {
                let (head, i, j) = (at / (t * t), at / t % t, at % t);
                let of = |row: usize, c: usize| row * h * d + head * d + c;
                prop_assert_eq!(got, sum(d, &|c| q.0[of(i, c)].wrapping_mul(key.0[of(j, c)])));
            }
            let g = HeadProduct { side: Side::Attend, ..g };
            let s = w.run(&g.dealt(), |x| g.deal(x, &p.1, &q.1, &Cpu), |x, i| g.eval(x, &p.2[i], &q.2[i], &Cpu));
            for (at, got) in add(&s, k).into_iter().enumerate() {
                let (i, head) = (at / (h * d), at % (h * d) / d);
                let weight = |c: usize| p.0[head * t * t + i * t + c];
                prop_assert_eq!(got, sum(t, &|c| weight(c).wrapping_mul(q.0[c * h * d + at % (h * d)])));
            }
        }
    }

    #[test]
    fn grouped_and_causal_heads_are_their_meaning_in_the_clear() {
        let mut w = World::new();
        let (heads, dim) = (4, 3);
        for (grid, kv_heads) in [(Grid::square(5), 4), (Grid::causal(0, 4), 2), (Grid::causal(6, 1), 1)] {
            for k in [28, 40, 64] {
                for side in [Side::Scores, Side::Attend] {
                    let g = HeadProduct { side, grid, heads, kv_heads, dim, k };
                    let n = if side == Side::Scores { grid.rows * heads * dim } else { heads * grid.len() };
                    // Small enough that the meaning in f64 is exact; the masks cover the whole ring.
                    let mut small = |n: usize| -> Vec<i64> { (0..n).map(|_| w.word() as i64 >> 52).collect() };
                    let (a, b) = (small(n), small(grid.keys * kv_heads * dim));
                    let words = |v: &[i64]| v.iter().map(|v| *v as u64 & mask(k)).collect::<Vec<_>>();
                    let reals = |v: &[i64]| v.iter().map(|v| *v as f64).collect::<Vec<_>>();
                    let ((la, ea), (lb, eb)) = (w.mask(&words(&a), k), w.mask(&words(&b), k));
                    let s = w.run(&g.dealt(), |x| g.deal(x, &la, &lb, &Cpu), |x, i| g.eval(x, &ea[i], &eb[i], &Cpu));
                    let got: Vec<f64> = add(&s, k).into_iter().map(|v| v as f64).collect();
                    assert_eq!(got, g.plain(&reals(&a), &reals(&b)));
                }
            }
        }
    }
}
