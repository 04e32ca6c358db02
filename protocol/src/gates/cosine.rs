//! Cosine series: `sum_j a_j cos(2 pi j x / 2^p)` per channel, the even part of GELU and SiLU.
//!
//! `cos(t (m - l)) = cos(t m) cos(t l) + sin(t m) sin(t l)`: two dealt elements a harmonic. Public factors are integer
//! products with a table from `libm`, equal on every machine.

use std::sync::{Arc, LazyLock};

use super::{Deal, Dealt, Masked, Take};
use crate::Error;
use crate::ring::mask;

/// Bits of an angle, and of a cosine, in the table that both sides read.
const PHASE: u32 = 16;
const UNIT: u32 = 20;

/// A series per column of a `rows x coef.len()` masked tensor.
#[derive(Clone, Debug)]
pub struct Cosine {
    /// Rows.
    pub rows: usize,
    /// Per column, the coefficients `a_0, a_1, ..`.
    pub coef: Arc<Vec<Vec<f64>>>,
    /// The period is `2^period` units.
    pub period: u32,
    /// Scale of the result is `2^f_out`.
    pub f_out: u32,
    /// Bits of the dealt factor.
    pub f_deal: u32,
    /// Ring of the result.
    pub k_out: u32,
}

/// `2^UNIT cos(2 pi i / 2^PHASE)`.
static TABLE: LazyLock<Vec<i32>> = LazyLock::new(|| {
    let (n, unit) = (1 << PHASE, f64::from(1 << UNIT));
    (0..n).map(|i| libm::round(libm::cos(i as f64 * std::f64::consts::TAU / n as f64) * unit) as i32).collect()
});

impl Cosine {
    fn harmonics(&self) -> usize {
        self.coef.iter().map(|c| c.len() - 1).sum()
    }

    /// What is dealt.
    pub fn dealt(&self) -> Vec<Dealt> {
        vec![(self.rows * self.harmonics() * 2, self.k_out)]
    }

    /// Table positions of `cos` and `sin` of harmonic `j`.
    fn phase(&self, x: u64, j: u64) -> (usize, usize) {
        let i = ((x & mask(self.period)).wrapping_mul(j) & mask(self.period)) >> (self.period - PHASE);
        (i as usize, (i as usize + 3 * (1 << PHASE) / 4) & ((1 << PHASE) - 1))
    }

    /// Dealer.
    pub fn deal(&self, d: &mut Deal, lam: &[u64]) -> Result<(), Error> {
        let drop = UNIT - self.f_deal;
        let tab: Vec<u64> = TABLE.iter().map(|v| ((v + (1 << drop >> 1)) >> drop) as i64 as u64).collect();
        let mut v = Vec::with_capacity(self.rows * self.harmonics() * 2);
        for row in lam.chunks_exact(self.coef.len()) {
            for (&l, c) in row.iter().zip(self.coef.iter()) {
                for j in 1..c.len() as u64 {
                    let (a, b) = self.phase(l, j);
                    v.extend([tab[a], tab[b]]);
                }
            }
        }
        d.share(self.k_out, v)
    }

    /// Meaning in the clear, in units.
    pub fn plain(&self, x: &[f64]) -> Vec<f64> {
        let angle = std::f64::consts::TAU / 2f64.powi(self.period as i32);
        let value = |(i, x): (usize, &f64)| {
            let c = &self.coef[i % self.coef.len()];
            let sum: f64 = c.iter().enumerate().map(|(j, a)| a * libm::cos(angle * j as f64 * x)).sum();
            sum * 2f64.powi(self.f_out as i32)
        };
        x.iter().enumerate().map(value).collect()
    }

    /// Evaluator: share of the series.
    pub fn eval(&self, t: &mut Take, x: &Masked) -> Result<Vec<u64>, Error> {
        let dealt = t.next(self.rows * self.harmonics() * 2, self.k_out)?;
        let tab = &TABLE;
        let f_pub = self.f_out - self.f_deal;
        // Coefficients at 2^20; with the table's unit a product drops to f_pub.
        let int: Vec<Vec<i64>> =
            self.coef.iter().map(|c| c.iter().map(|a| libm::round(a * 1048576.0) as i64).collect()).collect();
        let drop = 20 + UNIT - f_pub;
        let factor = |a: i64, i: usize| ((a * tab[i] as i64 + (1 << (drop - 1))) >> drop) as u64;
        let mut pairs = dealt.chunks_exact(2);
        let mut out = Vec::with_capacity(x.m.len());
        for row in x.m.chunks_exact(self.coef.len()) {
            for ((&m, c), a) in row.iter().zip(&int).zip(self.coef.iter()) {
                let mut y = if t.leads() { libm::round(a[0] * 2f64.powi(self.f_out as i32)) as i64 as u64 } else { 0 };
                for (j, p) in (1..c.len()).zip(&mut pairs) {
                    let (i, k) = self.phase(m, j as u64);
                    y = y
                        .wrapping_add(factor(c[j], i).wrapping_mul(p[0]))
                        .wrapping_add(factor(c[j], k).wrapping_mul(p[1]));
                }
                out.push(y & mask(self.k_out));
            }
        }
        Ok(out)
    }
}

/// Least-squares cosine series of an even function on `[-r, r]` with the given period and the fewest harmonics whose
/// error is below `tolerance` (ridge 1e-5, which keeps coefficients and with them rounding noise small).
pub fn fit_even(f: impl Fn(f64) -> f64, r: f64, period: f64, tolerance: f64) -> Option<Vec<f64>> {
    const SAMPLES: usize = 801;
    let max = (r * 2.0) as usize + 12;
    let xs: Vec<f64> = (0..SAMPLES).map(|i| r * i as f64 / (SAMPLES - 1) as f64).collect();
    let ys: Vec<f64> = xs.iter().map(|x| f(*x)).collect();
    let basis: Vec<Vec<f64>> = (0..=max)
        .map(|j| xs.iter().map(|x| libm::cos(std::f64::consts::TAU * j as f64 * x / period)).collect())
        .collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>() / SAMPLES as f64;
    let n = max + 1;
    // Cholesky row by row: the leading blocks serve every smaller number of harmonics.
    let mut l = vec![vec![0.0; n]; n];
    let mut z = vec![0.0; n];
    for i in 0..n {
        for j in 0..=i {
            let mut s = dot(&basis[i], &basis[j]) + if i == j { 1e-10 } else { 0.0 };
            for (a, b) in l[i][..j].iter().zip(&l[j]) {
                s -= a * b;
            }
            l[i][j] = if i == j { libm::sqrt(s.max(1e-300)) } else { s / l[j][j] };
        }
        z[i] = (dot(&basis[i], &ys) - (0..i).map(|k| l[i][k] * z[k]).sum::<f64>()) / l[i][i];
        if i < 4 {
            continue;
        }
        let mut c = z[..=i].to_vec();
        for j in (0..=i).rev() {
            for k in j + 1..=i {
                c[j] -= l[k][j] * c[k];
            }
            c[j] /= l[j][j];
        }
        let err =
            (0..SAMPLES).map(|s| ((0..=i).map(|j| c[j] * basis[j][s]).sum::<f64>() - ys[s]).abs()).fold(0.0, f64::max);
        if err < tolerance {
            return Some(c);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Mutex;

    use super::super::testing::{World, add, masked};
    use super::*;
    use proptest::prelude::*;

    fn half_gelu(x: f64) -> f64 {
        x * libm::erf(x / std::f64::consts::SQRT_2) / 2.0
    }

    proptest! {
        #[test]
        fn gelu_even_part_within_bound_over_its_range(
            range in prop::sample::select(vec![2.0, 4.0, 14.0, 30.0]),
            places in prop::collection::vec(prop_oneof![-1.0..=1.0, Just(1.0), Just(-1.0), Just(0.0)], 1..40),
            seed in any::<u64>(),
        ) {
            // Fits take longer than the gate.
            static FITS: Mutex<BTreeMap<u64, Vec<f64>>> = Mutex::new(BTreeMap::new());
            let period = 2.3 * range;
            let fit = || fit_even(half_gelu, range, period, 2e-3).unwrap();
            let c = FITS.lock().unwrap().entry(range as u64).or_insert_with(fit).clone();
            let ulp = period / 2f64.powi(30);
            let mut w = World::seeded(seed);
            let mut x = w.edges(31, places.len());
            x.iter_mut().zip(&places).for_each(|([x, ..], p)| *x = (p * range / ulp) as i64 as u64 & mask(31));
            let (x, lam, e) = masked(&x, 31, false);
            // One column a value, so that columns of different series stand side by side.
            let coef: Vec<Vec<f64>> = (0..x.len()).map(|i| if i % 3 == 2 { vec![0.25] } else { c.clone() }).collect();
            let g = Cosine { rows: 1, coef: Arc::new(coef), period: 30, f_out: 18, f_deal: 10, k_out: 24 };
            let s = w.run(&g.dealt(), |d| g.deal(d, &lam), |t, i| g.eval(t, &e[i]));
            for (i, (x, y)) in x.iter().zip(add(&s, 24)).enumerate() {
                let x = crate::ring::signed(*x, 31) as f64 * ulp;
                let (got, want) = (y as f64 / 262144.0, if i % 3 == 2 { 0.25 } else { half_gelu(x) });
                prop_assert!((got - want).abs() < 0.012 + 0.001 * range, "range {}: {} for {} at {}", range, got, want, x);
            }
        }
    }
}
