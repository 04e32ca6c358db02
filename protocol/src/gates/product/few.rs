//! Products of a few rows with all keys or values, read once, in their order, where they lie.
//!
//! A step of a decoder is bound by reading what is kept of earlier positions. Tiles ([`crate::gemm`]) read a head at a
//! time, of which they want a copy; with a few rows that takes several times as long as the product. All heads of one
//! position follow each other, so here a position is read once for all heads and rows. Which words are read and written
//! when depends on the shape alone.

use std::ops::Range;

use super::{HeadProduct, Side};
use crate::vector::{self, Kernel};

/// Rows that are few: more are faster by tiles, copies included.
pub(super) const FEW: usize = 4;
/// Words that are added up side by side.
const LANES: usize = 8;

/// Adds `a b` to `sum`, for some heads, as [`HeadProduct::sum`] lays it out; bits above the ring do not matter.
pub(super) fn add(g: &HeadProduct, heads: Range<usize>, a: &[u64], b: &[u64], sum: &mut [u64]) {
    match g.side {
        Side::Scores => vector::run(Scores { g, heads, a, b, sum }),
        Side::Attend => vector::run(Attend { g, heads, a, b, sum }),
    }
}

struct Scores<'a> {
    g: &'a HeadProduct,
    heads: Range<usize>,
    a: &'a [u64],
    b: &'a [u64],
    sum: &'a mut [u64],
}

impl Kernel for Scores<'_> {
    #[inline(always)]
    fn run(self) {
        let Scores { g, heads, a, b, sum } = self;
        let (d, grid, share) = (g.dim, g.grid, g.heads / g.kv_heads);
        for (j, key) in b.chunks_exact(g.kv_heads * d).enumerate() {
            let mut at = j;
            for h in heads.clone() {
                let key = &key[h / share * d..][..d];
                for i in 0..grid.rows {
                    if j < grid.row_len(i) {
                        let s = dot(&a[(i * g.heads + h) * d..][..d], key);
                        sum[at] = sum[at].wrapping_add(s);
                    }
                    at += grid.row_len(i);
                }
            }
        }
    }
}

#[inline(always)]
fn dot(a: &[u64], b: &[u64]) -> u64 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sums = [0u64; LANES];
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            sums[i] = sums[i].wrapping_add(a[i].wrapping_mul(b[i]));
        }
    }
    let rest = a_rest.iter().zip(b_rest).fold(0u64, |s, (a, b)| s.wrapping_add(a.wrapping_mul(*b)));
    sums.iter().fold(rest, |s, x| s.wrapping_add(*x))
}

struct Attend<'a> {
    g: &'a HeadProduct,
    heads: Range<usize>,
    a: &'a [u64],
    b: &'a [u64],
    sum: &'a mut [u64],
}

impl Kernel for Attend<'_> {
    #[inline(always)]
    fn run(self) {
        let Attend { g, heads, a, b, sum } = self;
        let (d, grid, share) = (g.dim, g.grid, g.heads / g.kv_heads);
        let columns = heads.len() * d;
        for (j, values) in b.chunks_exact(g.kv_heads * d).enumerate() {
            let mut at = heads.start * grid.len() + j;
            for h in heads.clone() {
                let values = &values[h / share * d..][..d];
                for i in 0..grid.rows {
                    if j < grid.row_len(i) {
                        accumulate(a[at], values, &mut sum[i * columns + (h - heads.start) * d..][..d]);
                    }
                    at += grid.row_len(i);
                }
            }
        }
    }
}

#[inline(always)]
fn accumulate(weight: u64, values: &[u64], sum: &mut [u64]) {
    const WIDE: usize = 4 * LANES;
    let ((values, v_rest), (sums, rest)) = (values.as_chunks::<WIDE>(), sum.as_chunks_mut::<WIDE>());
    for (s, v) in sums.iter_mut().zip(values) {
        for i in 0..WIDE {
            s[i] = s[i].wrapping_add(weight.wrapping_mul(v[i]));
        }
    }
    rest.iter_mut().zip(v_rest).for_each(|(s, v)| *s = s.wrapping_add(weight.wrapping_mul(*v)));
}

#[cfg(test)]
mod tests {
    use super::super::super::grid::Grid;
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn equals_the_product_by_tiles(
            (past, rows, causal) in (0usize..11, 1usize..6, any::<bool>()),
            (kv_heads, share, dim) in (1usize..4, 1usize..4, 1usize..20),
            (k, seed) in (1u32..=64, any::<u64>()),
        ) {
            let grid = if causal { Grid::causal(past, rows) } else { Grid::square(rows) };
            let heads = kv_heads * share;
            let mut word = seed;
            let mut words = |n: usize| -> Vec<u64> {
                (0..n).map(|_| { word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1); word }).collect()
            };
            for side in [Side::Scores, Side::Attend] {
                let g = HeadProduct { side, grid, heads, kv_heads, dim, k };
                let a = words(if side == Side::Scores { rows * heads * dim } else { heads * grid.len() });
                let b = words(grid.keys * kv_heads * dim);
                for range in [0..heads, 1..heads, 0..1, heads - 1..heads] {
                    let mut want = g.product(range.clone(), &a, &b);
                    let mut got: Vec<u64> = words(want.len());
                    let before = got.clone();
                    add(&g, range, &a, &b, &mut got);
                    want.iter_mut().zip(&before).for_each(|(w, b)| *w = w.wrapping_add(*b));
                    let differs = want.iter().zip(&got).any(|(w, g)| w.wrapping_sub(*g) << (64 - k) != 0);
                    prop_assert!(!differs, "{:?}", g);
                }
            }
        }
    }
}
