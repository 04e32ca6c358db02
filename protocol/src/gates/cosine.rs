//! Cosine series: `sum_j a_j cos(2 pi j q x / 2^p)` per channel, the even part of GELU and SiLU about zero.
//!
//! `cos(t (m - l)) = cos(t m) cos(t l) + sin(t m) sin(t l)`: two dealt elements a harmonic. Both factors carry the root of
//! the coefficient, which makes the roundings of both together least. Factors are IEEE products of tables from `libm`, equal
//! on every machine; harmonics follow from the first by the addition theorem.
//!
//! [`LANES`] columns stand side by side and have as many harmonics as the longest series among them needs, so a planner
//! that sorts channels by the length of their series deals least.

use std::sync::{Arc, LazyLock};

use super::{Deal, Dealt, Masked, Take, rounded};
use crate::Error;
use crate::ring::mask;
use crate::vector::{self, Kernel};

/// Columns that share a number of harmonics.
pub const LANES: usize = 16;

/// Bits of an angle, and of each half of it, in the tables that both sides read.
const PHASE: u32 = 20;
const HALF: u32 = PHASE / 2;

/// A series per column of a `rows x coef.len()` masked tensor.
#[derive(Clone, Debug)]
pub struct Cosine {
    /// Rows.
    pub rows: usize,
    /// Per column, the coefficients `a_0, a_1, ..`.
    pub coef: Arc<Vec<Vec<f64>>>,
    /// Per column, how many periods `2^period` units hold.
    pub turns: Arc<Vec<u32>>,
    /// See [`Self::turns`].
    pub period: u32,
    /// Scale of the result is `2^f_out`.
    pub f_out: u32,
    /// Ring of the result.
    pub k_out: u32,
}

/// Cosine and sine of every coarse and of every fine angle.
static TABLES: LazyLock<[Vec<[f64; 2]>; 2]> = LazyLock::new(|| {
    let table = |unit: f64| {
        let angle = |i: i32| libm::sincos(f64::from(i) * std::f64::consts::TAU * unit);
        (0..1 << HALF).map(|i| [angle(i).1, angle(i).0]).collect()
    };
    [table(libm::exp2(-f64::from(HALF))), table(libm::exp2(-f64::from(PHASE)))]
});

type Lanes = [f64; LANES];

/// Cosines and sines of one harmonic after another, of as many angles as there are lanes.
struct Harmonics {
    first: [Lanes; 2],
    now: [Lanes; 2],
}

impl Harmonics {
    #[inline(always)]
    fn new(tables: &[Vec<[f64; 2]>; 2], x: &[u64; LANES], turns: &[u64; LANES], period: u32) -> Harmonics {
        let mut first = [[0.0; LANES]; 2];
        for (lane, (x, turns)) in x.iter().zip(turns).enumerate() {
            let x = x.wrapping_mul(*turns);
            let at = (x & mask(period)) << PHASE.saturating_sub(period) >> period.saturating_sub(PHASE);
            let [c, s] = tables[0][(at >> HALF) as usize];
            let [d, t] = tables[1][(at & mask(HALF)) as usize];
            (first[0][lane], first[1][lane]) = (c * d - s * t, s * d + c * t);
        }
        Harmonics { first, now: [[1.0; LANES], [0.0; LANES]] }
    }

    #[inline(always)]
    fn next(&mut self) -> &[Lanes; 2] {
        let [c, s] = &mut self.now;
        let [d, t] = &self.first;
        for lane in 0..LANES {
            let cosine = c[lane] * d[lane] - s[lane] * t[lane];
            s[lane] = s[lane] * d[lane] + c[lane] * t[lane];
            c[lane] = cosine;
        }
        &self.now
    }
}

/// Of a block of columns: the periods, and per harmonic the root of each coefficient, with its sign.
struct Block {
    turns: [u64; LANES],
    factors: Vec<Lanes>,
}

/// The lanes of a block of columns; those past the last column are zero.
fn lanes(row: &[u64]) -> [u64; LANES] {
    let mut x = [0; LANES];
    x[..row.len()].copy_from_slice(row);
    x
}

impl Cosine {
    /// Harmonics of each block of columns.
    fn harmonics(&self) -> Vec<usize> {
        let longest = |block: &[Vec<f64>]| block.iter().map(|c| c.len() - 1).max().unwrap_or(0);
        self.coef.chunks(LANES).map(longest).collect()
    }

    fn blocks(&self) -> Vec<Block> {
        let unit = libm::exp2(f64::from(self.f_out));
        let block = |((coef, turns), n): ((&[Vec<f64>], &[u32]), usize)| {
            let factor = |j: usize, lane: usize| {
                let a = coef.get(lane).and_then(|c| c.get(j)).copied().unwrap_or(0.0);
                // Exact operations of IEEE, unlike most of `libm`.
                (a.abs() * unit).sqrt().copysign(a)
            };
            Block {
                turns: std::array::from_fn(|lane| turns.get(lane).copied().map_or(0, u64::from)),
                factors: (1..=n).map(|j| std::array::from_fn(|lane| factor(j, lane))).collect(),
            }
        };
        self.coef.chunks(LANES).zip(self.turns.chunks(LANES)).zip(self.harmonics()).map(block).collect()
    }

    fn words(&self) -> usize {
        self.rows * self.harmonics().iter().sum::<usize>() * 2 * LANES
    }

    /// What is dealt.
    pub fn dealt(&self) -> Vec<Dealt> {
        vec![(self.words(), self.k_out)]
    }

    /// Dealer.
    pub fn deal(&self, d: &mut Deal, lam: &[u64]) -> Result<(), Error> {
        let blocks = self.blocks();
        let mut t = d.tensor(self.words(), self.k_out)?;
        for row in lam.chunks_exact(self.coef.len()) {
            for (l, block) in row.chunks(LANES).zip(&blocks) {
                let out = t.room(d, block.factors.len() * 2 * LANES).as_chunks_mut().0;
                vector::run(Factors { tables: &TABLES, l: lanes(l), period: self.period, block, out });
            }
        }
        t.end(d);
        Ok(())
    }

    /// Meaning in the clear, in units.
    pub fn plain(&self, x: &[f64]) -> Vec<f64> {
        let angle = std::f64::consts::TAU / 2f64.powi(self.period as i32);
        let value = |(i, x): (usize, &f64)| {
            let at = i % self.coef.len();
            let angle = angle * f64::from(self.turns[at]) * x;
            let sum: f64 = self.coef[at].iter().enumerate().map(|(j, a)| a * libm::cos(angle * j as f64)).sum();
            sum * 2f64.powi(self.f_out as i32)
        };
        x.iter().enumerate().map(value).collect()
    }

    /// Evaluator: share of the series.
    pub fn eval(&self, t: &mut Take, x: &Masked) -> Result<Vec<u64>, Error> {
        let blocks = self.blocks();
        let dealt = t.half(self.words(), self.k_out)?;
        let first = |a: &Vec<f64>| {
            if t.leads() { libm::round(a[0] * 2f64.powi(self.f_out as i32)) as i64 as u64 } else { 0 }
        };
        let constant: Vec<u64> = self.coef.iter().map(first).collect();
        let (cols, words) = (self.coef.len(), self.words() / self.rows.max(1));
        let mut out = vec![0; x.m.len()];
        t.divide(
            self.rows,
            [&mut out],
            |row| [row * cols],
            |rows, [out]| {
                let (mut dealt, keep) = (dealt.from(rows.start * words), mask(self.k_out));
                for (m, out) in x.m[rows.start * cols..].chunks_exact(cols).zip(out.chunks_exact_mut(cols)) {
                    let blocks = constant.chunks(LANES).zip(&blocks);
                    for ((m, out), (c, block)) in m.chunks(LANES).zip(out.chunks_mut(LANES)).zip(blocks) {
                        let dealt = dealt.next(block.factors.len() * 2 * LANES).as_chunks().0;
                        let mut sum = lanes(c);
                        vector::run(Sums {
                            tables: &TABLES,
                            m: lanes(m),
                            period: self.period,
                            block,
                            dealt,
                            sum: &mut sum,
                        });
                        out.iter_mut().zip(sum).for_each(|(y, sum)| *y = sum & keep);
                    }
                }
            },
        );
        Ok(out)
    }
}

/// The dealer's factors of one block of columns.
struct Factors<'a> {
    tables: &'a [Vec<[f64; 2]>; 2],
    l: [u64; LANES],
    period: u32,
    block: &'a Block,
    out: &'a mut [[u64; LANES]],
}

impl Kernel for Factors<'_> {
    #[inline(always)]
    fn run(self) {
        let mut harmonics = Harmonics::new(self.tables, &self.l, &self.block.turns, self.period);
        for (f, [c, s]) in self.block.factors.iter().zip(self.out.as_chunks_mut::<2>().0) {
            let [cosine, sine] = harmonics.next();
            for lane in 0..LANES {
                c[lane] = rounded(cosine[lane] * f[lane].abs());
                s[lane] = rounded(sine[lane] * f[lane].abs());
            }
        }
    }
}

/// The evaluator's sums of one block of columns.
struct Sums<'a> {
    tables: &'a [Vec<[f64; 2]>; 2],
    m: [u64; LANES],
    period: u32,
    block: &'a Block,
    dealt: &'a [[u64; LANES]],
    sum: &'a mut [u64; LANES],
}

impl Kernel for Sums<'_> {
    #[inline(always)]
    fn run(self) {
        let mut harmonics = Harmonics::new(self.tables, &self.m, &self.block.turns, self.period);
        let mut sum = *self.sum;
        for (a, [c, s]) in self.block.factors.iter().zip(self.dealt.as_chunks::<2>().0) {
            let [cosine, sine] = harmonics.next();
            for lane in 0..LANES {
                sum[lane] = sum[lane]
                    .wrapping_add(rounded(a[lane] * cosine[lane]).wrapping_mul(c[lane]))
                    .wrapping_add(rounded(a[lane] * sine[lane]).wrapping_mul(s[lane]));
            }
        }
        *self.sum = sum;
    }
}

/// Least-squares cosine series of an even function on `[-r, r]` with the given period and the fewest harmonics whose
/// error is below `tolerance` (ridge 1e-5, which keeps coefficients and with them rounding noise small). `None` also where
/// `r` is too wide for the samples to tell.
pub fn fit_even(f: impl Fn(f64) -> f64, r: f64, period: f64, tolerance: f64) -> Option<Vec<f64>> {
    const SAMPLES: usize = 801;
    const WIDEST: f64 = SAMPLES as f64 / 4.0;
    if r.is_nan() || r > WIDEST {
        return None;
    }
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
        if i == 0 {
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
            rows in 1usize..4,
            seed in any::<u64>(),
        ) {
            // Fits take longer than the gate.
            static FITS: Mutex<BTreeMap<u64, Vec<f64>>> = Mutex::new(BTreeMap::new());
            let period = 2.3 * range;
            let fit = || fit_even(half_gelu, range, period, 2e-3).unwrap();
            let c = FITS.lock().unwrap().entry(range as u64).or_insert_with(fit).clone();
            let ulp = period / 2f64.powi(30);
            let mut w = World::seeded(seed);
            let cols = places.len();
            let mut x = w.edges(31, rows * cols);
            x.iter_mut().zip(places.iter().cycle()).for_each(|([x, ..], p)| *x = (p * range / ulp) as i64 as u64 & mask(31));
            let (x, lam, e) = masked(&x, 31, false);
            // One column a value, so that columns of different series stand side by side.
            let coef: Vec<Vec<f64>> = (0..cols).map(|i| if i % 3 == 2 { vec![0.25] } else { c.clone() }).collect();
            let turns = Arc::new(vec![1; coef.len()]);
            let g = Cosine { rows, coef: Arc::new(coef), turns, period: 30, f_out: 18, k_out: 24 };
            let s = w.run(&g.dealt(), |d| g.deal(d, &lam), |t, i| g.eval(t, &e[i]));
            for (i, (x, y)) in x.iter().zip(add(&s, 24)).enumerate() {
                let x = crate::ring::signed(*x, 31) as f64 * ulp;
                let (got, want) = (y as f64 / 262144.0, if i % cols % 3 == 2 { 0.25 } else { half_gelu(x) });
                prop_assert!((got - want).abs() < 0.012 + 0.001 * range, "range {}: {} for {} at {}", range, got, want, x);
            }
        }
    }
}
