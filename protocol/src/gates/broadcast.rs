//! Row-wise products: the variance of a row and the product of a row with one masked scalar of its own.

use super::{Deal, Dealt, Halves, Masked, Take, from};
use crate::Error;
use crate::ring::mask;
use crate::vector::{self, Kernel};

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

/// `x[t][c] * r[c / dim][t]`.
///
/// Where `x` is in a ring of fewer bits, `k_x`, its words are what they are in the wider one as in [`super::rescale`]: with
/// `m' = x + 2^(k_x - 2) + l` mod `2^k_x`, `u = 1 - msb(m')` and `b = msb(l)`, it is `m' - 2^(k_x - 2) - l_1 - l_2 + 2^k_x (carry + u b)`.
/// Multiplied by `r = n - j` for its masked value `n` and its mask `j`, that is a public combination of the halves of both masks and of what is dealt:
/// `l j` in the wide ring, and `carry`, `b` and `b j` in one that is narrower by `k_x` bits.
#[derive(Clone, Debug)]
pub struct Broadcast {
    /// Rows `T` of `x`.
    pub rows: usize,
    /// Columns of `x`.
    pub cols: usize,
    /// Columns that share one scalar; `r` has `cols / dim` groups of `rows`.
    pub dim: usize,
    /// Ring of `x`; if it is narrower than the output's, `|x| < 2^(k_x - 2)`.
    pub k_x: u32,
    /// Ring of the output; the scalars are in a ring at least as wide.
    pub k: u32,
}

impl Broadcast {
    /// Bits of the ring in which is dealt what a wrap around the input's is multiplied by, if it is narrower.
    fn k_bit(&self) -> Option<u32> {
        (self.k_x < self.k).then(|| self.k - self.k_x)
    }

    fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// What is dealt.
    pub fn dealt(&self) -> Vec<Dealt> {
        let wraps = self.k_bit().into_iter().flat_map(|k| [(self.len(), k); 3]);
        [(self.len(), self.k)].into_iter().chain(wraps).collect()
    }

    fn scalar(&self, i: usize) -> usize {
        (i % self.cols) / self.dim * self.rows + i / self.cols
    }

    /// Dealer.
    pub fn deal(&self, d: &mut Deal, lx: Halves, lr: &[u64]) -> Result<(), Error> {
        let product = |(i, l): (usize, &u64)| l.wrapping_mul(lr[self.scalar(i)]);
        d.share(self.k, lx.sum.iter().enumerate().map(product).collect())?;
        let Some(k) = self.k_bit() else { return Ok(()) };
        lx.deal_bits(d, (self.rows, self.cols), (0, self.cols), (self.k_x, k))?;
        let top = |(i, l): (usize, &u64)| (l >> (self.k_x - 1)).wrapping_neg() & lr[self.scalar(i)];
        d.share(k, lx.sum.iter().enumerate().map(top).collect())
    }

    /// Meaning in the clear, in units.
    pub fn plain(&self, x: &[f64], r: &[f64]) -> Vec<f64> {
        x.iter().enumerate().map(|(i, v)| v * r[self.scalar(i)]).collect()
    }

    /// Evaluator: share of the products.
    pub fn eval(&self, t: &mut Take, x: &Masked, r: &Masked) -> Result<Vec<u64>, Error> {
        let half = t.half(self.len(), self.k)?;
        let wraps = self.k_bit().map(|k| t.halves(&[(self.len(), k); 3])).transpose()?;
        let leads = t.leads();
        let mut g = vec![0; self.len()];
        t.divide(
            self.rows,
            [&mut g],
            |row| [row * self.cols],
            |rows, [g]| {
                let all = rows.start * self.cols..rows.end * self.cols;
                half.from(all.start).read(g);
                let mut wraps = wraps.as_ref().map(|halves| from(halves, all.start));
                let [m, l] = [&x.m, &x.l].map(|x| x[all.clone()].chunks_exact(self.dim));
                for (i, ((m, l), y)) in m.zip(l).zip(g.chunks_exact_mut(self.dim)).enumerate() {
                    let j = self.scalar(all.start + i * self.dim);
                    let own = if leads { r.m[j].wrapping_sub(r.l[j]) } else { r.l[j].wrapping_neg() };
                    let of = Scalar { own, r: r.m[j], keep: mask(self.k) };
                    match wraps.as_deref_mut() {
                        Some([carry, top, product]) => {
                            let wraps = [carry.next(self.dim), top.next(self.dim), product.next(self.dim)];
                            vector::run(Lifted { of, k_x: self.k_x, m, l, wraps, y });
                        }
                        _ => vector::run(Products { of, m, l, y }),
                    }
                }
            },
        );
        Ok(g)
    }
}

/// One scalar: this evaluator's share of it, its masked word, and the output's ring.
#[derive(Clone, Copy)]
struct Scalar {
    own: u64,
    r: u64,
    keep: u64,
}

/// Adds an evaluator's part of the products with one scalar.
struct Products<'a> {
    of: Scalar,
    m: &'a [u64],
    l: &'a [u64],
    y: &'a mut [u64],
}

impl Kernel for Products<'_> {
    #[inline(always)]
    fn run(self) {
        let Scalar { own, r, keep } = self.of;
        for (y, (m, l)) in self.y.iter_mut().zip(self.m.iter().zip(self.l)) {
            *y = y.wrapping_add(m.wrapping_mul(own)).wrapping_sub(l.wrapping_mul(r)) & keep;
        }
    }
}

/// The same of a narrower ring's words.
struct Lifted<'a> {
    of: Scalar,
    k_x: u32,
    m: &'a [u64],
    l: &'a [u64],
    wraps: [&'a [u64]; 3],
    y: &'a mut [u64],
}

impl Kernel for Lifted<'_> {
    #[inline(always)]
    fn run(self) {
        let Lifted { of: Scalar { own, r, keep }, k_x, m, l, wraps: [carry, top, product], y } = self;
        let quarter = 1u64 << (k_x - 2);
        let dealt = carry.iter().zip(top).zip(product);
        for ((y, (m, l)), ((carry, top), product)) in y.iter_mut().zip(m.iter().zip(l)).zip(dealt) {
            let m = m.wrapping_add(quarter) & mask(k_x);
            // All ones where a mask with a top bit wrapped.
            let wrapped = (m >> (k_x - 1)).wrapping_sub(1);
            let wraps = r.wrapping_mul(carry.wrapping_add(top & wrapped)).wrapping_sub(product & wrapped);
            let public = m.wrapping_sub(quarter).wrapping_mul(own);
            *y = y.wrapping_add(public).wrapping_sub(l.wrapping_mul(r)).wrapping_add(wraps << k_x) & keep;
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
        fn broadcast_is_exact_from_wider_and_narrower_rings(
            (rows, dim, groups, k) in (1usize..4, 1usize..4, 1usize..4, 3u32..=64),
            (k_x, wider) in (0u32..64, 0u32..20),
            seed in any::<u64>(),
        ) {
            let (cols, k_x, k_r) = (dim * groups, 3 + k_x % 62, (k + wider).min(64));
            let mut w = World::seeded(seed);
            let g = Broadcast { rows, cols, dim, k_x, k };
            let (mut x, r) = (w.edges(k_x, rows * cols), w.edges(k_r, rows * groups));
            if k_x < k {
                // Where rings are changed values have to fit a quarter.
                let most = (1i64 << (k_x - 2)) - 1;
                x.iter_mut().for_each(|[x, ..]| *x = signed(*x, k_x).clamp(-most, most) as u64 & mask(k_x));
            }
            let first: Vec<u64> = x.iter().map(|[_, l, _]| *l).collect();
            let ((x, lx, ex), (r, lr, er)) = (masked(&x, k_x, false), masked(&r, k_r, false));
            let halves = Halves { sum: &lx, first: &first };
            let s = w.run(&g.dealt(), |d| g.deal(d, halves, &lr), |t, i| g.eval(t, &ex[i], &er[i]));
            for (i, got) in add(&s, k).into_iter().enumerate() {
                let x = if k_x < k { signed(x[i], k_x) as u64 } else { x[i] };
                prop_assert_eq!(got, signed(x.wrapping_mul(r[(i % cols) / dim * rows + i / cols]), k));
            }
        }
    }
}
