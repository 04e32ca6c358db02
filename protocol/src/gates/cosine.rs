//! Cosine series: `sum_j a_j cos(2 pi j q x / 2^p)` per channel, the even part of GELU and SiLU about zero.
//!
//! `cos(t (m - l)) = cos(t m) cos(t l) + sin(t m) sin(t l)`: two dealt elements a harmonic. Both factors carry the root of
//! the coefficient, which makes the roundings of both together least.
//!
//! Factors are products of integers from tables, which `libm` makes equal on every machine, so a processor without doubles
//! computes the same ones. Cosines and sines are at `2^30`: an angle's are a coarse and a fine one's, turned by each other,
//! and harmonics follow from the first by the addition theorem. Each of these products is rounded to the nearest, as the
//! tables are, so that a vector's length grows by less than three units with each: 2^28 harmonics fit an `i32`, and the
//! hundredth is right to `2^-21`, far less than what a factor's own rounding to an integer leaves.
//!
//! [`LANES`] columns stand side by side and have as many harmonics as the longest series among them needs, so a planner
//! that sorts channels by the length of their series deals least.

use std::sync::{Arc, LazyLock, OnceLock};

use serde::{Deserialize, Serialize};

use super::{Deal, Dealt, Masked, Take};
use crate::Error;
use crate::ring::mask;
use crate::vector::{self, Kernel};

/// Columns that share a number of harmonics.
pub const LANES: usize = 16;

/// Bits of an angle that count, of which a whole turn has `2^PHASE`.
const PHASE: u32 = 20;
/// Bits of each half of an angle, by which [`Cosine::angles`] are read.
const HALF: u32 = PHASE / 2;
/// Cosines and sines are at `2^UNIT`.
const UNIT: u32 = 30;

/// A series per column of a `rows x coef.len()` masked tensor.
#[derive(Clone, Debug)]
pub struct Cosine {
    /// Rows.
    pub rows: usize,
    /// What is summed of each column.
    pub columns: Arc<Columns>,
    /// See [`Columns::turns`].
    pub period: u32,
    /// Scale of the result is `2^f_out`.
    pub f_out: u32,
    /// Ring of the result.
    pub k_out: u32,
}

/// The series of some columns.
#[derive(Debug, Serialize, Deserialize)]
pub struct Columns {
    /// Per column, the coefficients `a_0, a_1, ..`.
    pub coef: Vec<Vec<f64>>,
    /// Per column, how many periods `2^period` units hold.
    pub turns: Vec<u32>,
    /// Of the scale that was first asked for, which a model's programs all have.
    #[serde(skip)]
    made: OnceLock<(u32, Arc<Series>)>,
}

impl Columns {
    /// As many coefficients as turns.
    pub fn new(coef: Vec<Vec<f64>>, turns: Vec<u32>) -> Columns {
        Columns { coef, turns, made: OnceLock::new() }
    }
}

/// What is public of a [`Cosine`], in integers. Of a harmonic's cosine and of its sine, `v` at `2^30`, and the harmonic's
/// factor `a`, the evaluators multiply dealt words by `(a v + 2^(shift - 1)) >> shift`, modulo `2^k_out`.
///
/// Dealt are, row by row and block by block, of each harmonic the words of [`LANES`] cosines and of as many sines.
#[derive(Clone, Debug)]
pub struct Series {
    /// Each [`LANES`] columns, in order; those past the last are zero.
    pub blocks: Vec<Block>,
    /// From 1 to 59; factors are at `2^(shift - 30)`.
    pub shift: u32,
}

/// [`LANES`] columns.
#[derive(Clone, Debug)]
pub struct Block {
    /// Per column, the periods that `2^period` units hold.
    pub turns: [u32; LANES],
    /// Per harmonic, from the first on, and column: the coefficient's root at `2^(f_out / 2)` and the series' scale, at most
    /// `2^30`, with the coefficient's sign.
    pub factors: Vec<[i32; LANES]>,
    /// Per column `a_0` at `2^f_out`, modulo 2^64, which E1 adds.
    pub constant: [u64; LANES],
}

/// Cosine and sine, at `2^30`, of every coarse and of every fine angle.
pub type Angles = [[[i32; 2]; 1 << HALF]; 2];

static ANGLES: LazyLock<Angles> = LazyLock::new(|| {
    let at = |v: f64| libm::round(v * f64::from(1 << UNIT)) as i32;
    let table = |unit: f64| {
        std::array::from_fn(|i| {
            let (sine, cosine) = libm::sincos(i as f64 * std::f64::consts::TAU * unit);
            [at(cosine), at(sine)]
        })
    };
    [table(libm::exp2(-f64::from(HALF))), table(libm::exp2(-f64::from(PHASE)))]
});

/// Numbers that fit an `i32`, in the width of their products.
type Lanes = [i64; LANES];

/// The product of two that fit an `i32`, which the compiler is told so.
#[inline(always)]
fn times(a: i64, b: i64) -> i64 {
    i64::from(a as i32).wrapping_mul(i64::from(b as i32))
}

/// `round(v / 2^shift)`, half up.
#[inline(always)]
fn shifted(v: i64, shift: u32) -> i64 {
    v.wrapping_add(1 << shift >> 1) >> shift
}

/// Cosine and sine of the sum of two angles.
#[inline(always)]
fn turned([c, s]: [i64; 2], [d, t]: [i64; 2]) -> [i64; 2] {
    [shifted(times(c, d) - times(s, t), UNIT), shifted(times(s, d) + times(c, t), UNIT)]
}

/// Cosines and sines of one harmonic after another, of as many angles as there are lanes.
struct Harmonics {
    first: [Lanes; 2],
    now: [Lanes; 2],
}

impl Harmonics {
    #[inline(always)]
    fn new(angles: &Angles, x: &[u64; LANES], turns: &[u32; LANES], period: u32) -> Harmonics {
        // Read before they are multiplied, many at once. Both masks are for the compiler, which then checks no bounds.
        let mut read = [[[0; 2]; LANES]; 2];
        for (lane, (x, turns)) in x.iter().zip(turns).enumerate() {
            let x = x.wrapping_mul(u64::from(*turns));
            let at = (x & mask(period)) << PHASE.saturating_sub(period) >> period.saturating_sub(PHASE);
            read[0][lane] = angles[0][(at >> HALF & mask(HALF)) as usize];
            read[1][lane] = angles[1][(at & mask(HALF)) as usize];
        }
        let mut first = [[0; LANES]; 2];
        for (lane, (coarse, fine)) in read[0].iter().zip(&read[1]).enumerate() {
            [first[0][lane], first[1][lane]] = turned(coarse.map(i64::from), fine.map(i64::from));
        }
        Harmonics { first, now: [[1 << UNIT; LANES], [0; LANES]] }
    }

    #[inline(always)]
    fn next(&mut self) -> &[Lanes; 2] {
        let [c, s] = &mut self.now;
        let [d, t] = &self.first;
        for lane in 0..LANES {
            [c[lane], s[lane]] = turned([c[lane], s[lane]], [d[lane], t[lane]]);
        }
        &self.now
    }
}

/// The lanes of a block of columns; those past the last column are zero.
fn lanes<T: Copy + Default>(row: &[T]) -> [T; LANES] {
    let mut x = [T::default(); LANES];
    x[..row.len()].copy_from_slice(row);
    x
}

impl Cosine {
    /// Harmonics of each block of columns.
    fn harmonics(&self) -> Vec<usize> {
        let longest = |block: &[Vec<f64>]| block.iter().map(|c| c.len() - 1).max().unwrap_or(0);
        self.columns.coef.chunks(LANES).map(longest).collect()
    }

    /// Cosine and sine, at `2^30`, of the 1024 coarse angles, 1024th parts of a turn, and of the 1024 fine ones, 1024th parts of
    /// those. Of a word `x` in a column with so many `turns` the angle is the upper twenty bits of `turns x mod 2^period`,
    /// with zeros below them where that has fewer; its upper half is the coarse one's number, its lower half the fine one's.
    ///
    /// Of two angles' `[c, s]` and `[d, t]` the sum's is `[c d - s t, s d + c t]`, each plus `2^29` and shifted right by 30. The
    /// first harmonic is the coarse angle's plus the fine one's, and every other is the one before it plus the first.
    pub fn angles() -> &'static Angles {
        &ANGLES
    }

    /// What the evaluators compute with, and with magnitudes of factors the dealer: the same words on every machine.
    pub fn series(&self) -> Arc<Series> {
        let (f_out, made) = self.columns.made.get_or_init(|| (self.f_out, Arc::new(self.make())));
        if *f_out == self.f_out { Arc::clone(made) } else { Arc::new(self.make()) }
    }

    fn make(&self) -> Series {
        let Columns { coef, turns, .. } = &*self.columns;
        let unit = libm::exp2(f64::from(self.f_out));
        // Exact operations of IEEE, unlike most of `libm`.
        let root = |a: f64| (a.abs() * unit).sqrt().copysign(a);
        let largest = coef.iter().flat_map(|c| &c[1..]).fold(1.0, |m: f64, a| m.max(root(*a).abs()));
        // The largest is below `2^UNIT`.
        let bits = (UNIT as i32 - 1 - libm::ilogb(largest)).max(1 - UNIT as i32);
        let scale = libm::exp2(f64::from(bits));
        let block = |((coef, turns), n): ((&[Vec<f64>], &[u32]), usize)| {
            let factor = |j: usize, lane: usize| {
                let a = coef.get(lane).and_then(|c| c.get(j)).copied().unwrap_or(0.0);
                libm::round(root(a) * scale) as i32
            };
            let constant: Vec<u64> = coef.iter().map(|c| libm::round(c[0] * unit) as i64 as u64).collect();
            Block {
                turns: lanes(turns),
                factors: (1..=n).map(|j| std::array::from_fn(|lane| factor(j, lane))).collect(),
                constant: lanes(&constant),
            }
        };
        let blocks = coef.chunks(LANES).zip(turns.chunks(LANES)).zip(self.harmonics()).map(block).collect();
        Series { blocks, shift: (UNIT as i32 + bits) as u32 }
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
        let series = self.series();
        let mut t = d.tensor(self.words(), self.k_out)?;
        for row in lam.chunks_exact(self.columns.coef.len()) {
            for (l, block) in row.chunks(LANES).zip(&series.blocks) {
                let out = t.room(d, block.factors.len() * 2 * LANES).as_chunks_mut().0;
                let (l, period, shift) = (lanes(l), self.period, series.shift);
                vector::run(Factors { angles: &ANGLES, l, period, block, shift, out });
            }
        }
        t.end(d);
        Ok(())
    }

    /// Meaning in the clear, in units.
    pub fn plain(&self, x: &[f64]) -> Vec<f64> {
        let angle = std::f64::consts::TAU / 2f64.powi(self.period as i32);
        let value = |(i, x): (usize, &f64)| {
            let at = i % self.columns.coef.len();
            let angle = angle * f64::from(self.columns.turns[at]) * x;
            let sum: f64 = self.columns.coef[at].iter().enumerate().map(|(j, a)| a * libm::cos(angle * j as f64)).sum();
            sum * 2f64.powi(self.f_out as i32)
        };
        x.iter().enumerate().map(value).collect()
    }

    /// Evaluator: share of the series.
    pub fn eval(&self, t: &mut Take, x: &Masked) -> Result<Vec<u64>, Error> {
        let series = self.series();
        let dealt = t.half(self.words(), self.k_out)?;
        let lead = u64::from(t.leads());
        let (cols, words) = (self.columns.coef.len(), self.words() / self.rows.max(1));
        let mut out = vec![0; x.m.len()];
        t.divide(
            self.rows,
            [&mut out],
            |row| [row * cols],
            |rows, [out]| {
                let (mut dealt, keep) = (dealt.from(rows.start * words), mask(self.k_out));
                for (m, out) in x.m[rows.start * cols..].chunks_exact(cols).zip(out.chunks_exact_mut(cols)) {
                    for ((m, out), block) in m.chunks(LANES).zip(out.chunks_mut(LANES)).zip(&series.blocks) {
                        let dealt = dealt.next(block.factors.len() * 2 * LANES).as_chunks().0;
                        let mut sum = block.constant.map(|c| c * lead);
                        let (m, period, shift) = (lanes(m), self.period, series.shift);
                        vector::run(Sums { angles: &ANGLES, m, period, block, shift, dealt, sum: &mut sum });
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
    angles: &'a Angles,
    l: [u64; LANES],
    period: u32,
    block: &'a Block,
    shift: u32,
    out: &'a mut [[u64; LANES]],
}

impl Kernel for Factors<'_> {
    #[inline(always)]
    fn run(self) {
        let mut harmonics = Harmonics::new(self.angles, &self.l, &self.block.turns, self.period);
        for (f, [c, s]) in self.block.factors.iter().zip(self.out.as_chunks_mut::<2>().0) {
            let [cosine, sine] = harmonics.next();
            for lane in 0..LANES {
                let f = i64::from(f[lane].wrapping_abs());
                c[lane] = shifted(times(f, cosine[lane]), self.shift) as u64;
                s[lane] = shifted(times(f, sine[lane]), self.shift) as u64;
            }
        }
    }
}

/// The evaluator's sums of one block of columns.
struct Sums<'a> {
    angles: &'a Angles,
    m: [u64; LANES],
    period: u32,
    block: &'a Block,
    shift: u32,
    dealt: &'a [[u64; LANES]],
    sum: &'a mut [u64; LANES],
}

impl Kernel for Sums<'_> {
    #[inline(always)]
    fn run(self) {
        let mut harmonics = Harmonics::new(self.angles, &self.m, &self.block.turns, self.period);
        let mut sum = *self.sum;
        for (a, [c, s]) in self.block.factors.iter().zip(self.dealt.as_chunks::<2>().0) {
            let [cosine, sine] = harmonics.next();
            for lane in 0..LANES {
                let a = i64::from(a[lane]);
                let [cosine, sine] = [cosine[lane], sine[lane]].map(|v| shifted(times(a, v), self.shift) as u64);
                sum[lane] =
                    sum[lane].wrapping_add(cosine.wrapping_mul(c[lane])).wrapping_add(sine.wrapping_mul(s[lane]));
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
        fn factors_are_the_nearest_integers(
            (a, turns) in prop::collection::vec((prop::collection::vec(-40.0f64..40.0, 1..100), 1u32..9), 1..40).prop_map(|c| c.into_iter().unzip::<_, _, Vec<_>, Vec<_>>()),
            tiny in prop::sample::select(vec![1.0, 1e-3, 1e-9, 0.0]),
            (period, f_out) in (12u32..=40, 4u32..=40),
            words in prop::collection::vec(prop_oneof![any::<u64>(), Just(0), Just(u64::MAX), (0u32..48).prop_map(|b| 1 << b)], LANES),
        ) {
            let coef: Vec<Vec<f64>> = a.into_iter().map(|a| a.into_iter().map(|a| a * tiny).collect()).collect();
            let g = Cosine { rows: 1, columns: Arc::new(Columns::new(coef, turns)), period, f_out, k_out: 62 };
            let x = std::array::from_fn(|lane| words[lane]);
            let series = g.series();
            prop_assert!((1..=59).contains(&series.shift));
            prop_assert_eq!(series.blocks.iter().map(|b| b.factors.len()).collect::<Vec<_>>(), g.harmonics());
            for (b, block) in series.blocks.iter().enumerate() {
                // The evaluator's, by dealt ones and zeros, and the dealer's.
                let mut dealt = vec![[0; LANES]; 2 * block.factors.len()];
                let (l, shift) = (x, series.shift);
                vector::run(Factors { angles: &ANGLES, l, period, block, shift, out: &mut dealt });
                for j in 1..=block.factors.len() {
                    for odd in 0..2 {
                        let mut ones = vec![[0; LANES]; 2 * block.factors.len()];
                        ones[2 * (j - 1) + odd] = [1; LANES];
                        let mut sum = [0; LANES];
                        vector::run(Sums { angles: &ANGLES, m: x, period, block, shift, dealt: &ones, sum: &mut sum });
                        for lane in 0..LANES {
                            let column = b * LANES + lane;
                            let a = g.columns.coef.get(column).and_then(|c| c.get(j)).copied().unwrap_or(0.0);
                            let turns = u64::from(g.columns.turns.get(column).copied().unwrap_or(0));
                            // The bits of the angle that count.
                            let at = x[lane].wrapping_mul(turns) & mask(period);
                            let at = if period > PHASE { at >> (period - PHASE) } else { at << (PHASE - period) };
                            let angle = (at * j as u64 % (1 << PHASE)) as f64 * std::f64::consts::TAU * 2f64.powi(-(PHASE as i32));
                            let root = (a.abs() * 2f64.powi(f_out as i32)).sqrt();
                            let want = root * [libm::cos(angle), libm::sin(angle)][odd];
                            // Each harmonic's roundings are of the root's 2^-30.
                            let near = 0.5 + 1e-6 + root * 4.0 * (j + 1) as f64 * 2f64.powi(-30);
                            let got = sum[lane] as i64 as f64 * if a < 0.0 { -1.0 } else { 1.0 };
                            prop_assert!((got - want).abs() <= near, "{} for {}, harmonic {}", got, want, j);
                            let got = dealt[2 * (j - 1) + odd][lane] as i64 as f64;
                            prop_assert!((got - want).abs() <= near, "{} dealt for {}, harmonic {}", got, want, j);
                        }
                    }
                }
            }
        }

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
            let turns = vec![1; coef.len()];
            let g = Cosine { rows, columns: Arc::new(Columns::new(coef, turns)), period: 30, f_out: 18, k_out: 24 };
            let s = w.run(&g.dealt(), |d| g.deal(d, &lam), |t, i| g.eval(t, &e[i]));
            for (i, (x, y)) in x.iter().zip(add(&s, 24)).enumerate() {
                let x = crate::ring::signed(*x, 31) as f64 * ulp;
                let (got, want) = (y as f64 / 262144.0, if i % cols % 3 == 2 { 0.25 } else { half_gelu(x) });
                prop_assert!((got - want).abs() < 0.012 + 0.001 * range, "range {}: {} for {} at {}", range, got, want, x);
            }
        }
    }
}
