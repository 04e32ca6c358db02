//! The elementwise product of two masked tensors; one element dealt per output (Beaver's identity with the masks as the
//! triple, as in [`super::product`]).

use super::{Deal, Dealt, Masked, Take};
use crate::Error;
use crate::ring::mask;

/// `x_i y_i` mod `2^k`; both inputs are in this ring.
#[derive(Clone, Debug)]
pub struct Hadamard {
    /// Elements.
    pub len: usize,
    /// Ring.
    pub k: u32,
}

impl Hadamard {
    /// What is dealt.
    pub fn dealt(&self) -> Vec<Dealt> {
        vec![(self.len, self.k)]
    }

    /// Dealer.
    pub fn deal(&self, d: &mut Deal, lx: &[u64], ly: &[u64]) -> Result<(), Error> {
        d.share(self.k, lx.iter().zip(ly).map(|(x, y)| x.wrapping_mul(*y)).collect())
    }

    /// Evaluator: share of the products.
    pub fn eval(&self, t: &mut Take, x: &Masked, y: &Masked) -> Result<Vec<u64>, Error> {
        let (half, leads) = (t.half(self.len, self.k)?, t.leads());
        let mut g = vec![0; self.len];
        t.divide(
            self.len,
            [&mut g],
            |i| [i],
            |all, [g]| {
                half.from(all.start).read(g);
                let (leads, keep) = (leads, mask(self.k));
                for (i, g) in all.zip(g) {
                    let own = if leads { y.m[i].wrapping_sub(y.l[i]) } else { y.l[i].wrapping_neg() };
                    *g = g.wrapping_add(x.m[i].wrapping_mul(own)).wrapping_sub(x.l[i].wrapping_mul(y.m[i])) & keep;
                }
            },
        );
        Ok(g)
    }

    /// Meaning in the clear, in units.
    pub fn plain(&self, x: &[f64], y: &[f64]) -> Vec<f64> {
        x.iter().zip(y).map(|(x, y)| x * y).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{World, add};
    use super::*;
    use crate::ring::signed;

    #[test]
    fn products_are_exact_in_the_ring() {
        let mut w = World::new();
        for k in [24, 32, 57, 64] {
            let g = Hadamard { len: 40, k };
            let mut x: Vec<u64> = (0..40).map(|_| w.word() & mask(k)).collect();
            x[..3].copy_from_slice(&[0, mask(k), 1 << (k - 1)]);
            let y: Vec<u64> = (0..40).map(|_| w.word() & mask(k)).collect();
            let ((lx, ex), (ly, ey)) = (w.mask(&x, k), w.mask(&y, k));
            let s = w.run(&g.dealt(), |d| g.deal(d, &lx, &ly), |t, i| g.eval(t, &ex[i], &ey[i]));
            let want: Vec<i64> = x.iter().zip(&y).map(|(x, y)| signed(x.wrapping_mul(*y) & mask(k), k)).collect();
            assert_eq!(add(&s, k), want);
        }
    }
}
