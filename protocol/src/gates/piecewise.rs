//! Row-wise functions of wide dynamic range (reciprocal, inverse square root): cubics or quartics over windows at several scales.
//!
//! At scale `s` the window is `h = 2^drop`; `x = i h + r` with `i = m_hi - l_hi` and `r = m_lo - l_lo` in `(-h, h)`: a
//! borrow only means that a window's polynomial is used a little past it. `c0 + c1 r + c2 r^2 + ...` is a polynomial in the
//! public `m_lo` whose coefficients depend on the window and `l_lo`, so the dealer deals four or five elements a window.
//! Windows alias, every 16 for example, so a value is right only while `x < 15 h`, and is used while `x < 12 h`: windows of the
//! next scale are four times as wide, and a flag says whether `x` lies in the first three of them. Flags are read off dealt
//! bits, one for each of some windows of that scale, and alias too, but only past what a flag some scales wider excludes:
//! [`Scales::reach`] scales, for as many times more bits. [`super::select`] picks the finest scale whose flag holds together
//! with every flag that it relies on.
//!
//! Each scale has its own unit, so that where it is picked its values have the same few bits at every scale: the tables
//! are dealt in a narrow ring, and what is picked is brought to one unit in a wide one.

use super::bits::rotate_bits;
use super::{Deal, Dealt, Half, Masked, Take};
use crate::Error;
use crate::ring::mask;
use crate::vector::{self, Kernel};

/// Scales of one function, from the finest on, and their windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scales {
    /// log2 of the finest window.
    pub drop: u32,
    /// Number of scales, at most [`MOST_SCALES`].
    pub count: usize,
    /// Windows of a scale, a power of two from 8 on.
    pub windows: usize,
    /// How many scales wider the flag is that one relies on, at least one.
    pub reach: usize,
    /// Degree of a window's polynomial: three or four.
    pub degree: usize,
}

/// Windows of the next scale in which a scale is still used: fewer than a quarter of its own.
const FINER: u32 = 3;
/// Scales whose flags fit a word.
pub const MOST_SCALES: usize = 64;

impl Scales {
    /// Bits by which each scale's window is wider than that of the one before.
    pub fn stride(windows: usize) -> u32 {
        windows.ilog2() - 2
    }

    fn drop_of(&self, s: usize) -> u32 {
        self.drop + Self::stride(self.windows) * s as u32
    }

    /// Exclusive bound on the input.
    pub fn largest(&self) -> f64 {
        (self.windows - 1) as f64 * libm::exp2(f64::from(self.drop_of(self.count - 1)))
    }

    /// Bits of a ring that has room for every window and flag.
    pub fn ring(&self) -> u32 {
        self.drop_of(self.count - 1) + self.windows.ilog2() + 1
    }

    /// log2 of the windows of scale `s + 1` that have a dealt bit for the flag of `s`: what the flag that it relies on excludes,
    /// or all that there are, lies beyond.
    pub fn flag_bits(&self, s: usize) -> u32 {
        Self::stride(self.windows) * self.reach.min(self.count - 1 - s) as u32 + FINER.ilog2() + 1
    }

    /// Words of the flag of scale `s`, and bits of each.
    fn flag(&self, s: usize) -> (usize, u32) {
        let n = 1usize << self.flag_bits(s);
        (n.div_ceil(64), n.min(64) as u32)
    }

    /// Bits that are dealt of a row, roughly: of tables, flags and selection.
    pub fn cost(&self) -> usize {
        let flags = (0..self.count - 1).map(|s| 1 << self.flag_bits(s));
        let cases = (0..self.count).map(|s| 1 << (self.count - 1 - s).div_ceil(self.reach));
        self.count * self.windows * (self.degree + 1) * 24 + flags.sum::<usize>() + 150 * cases.sum::<usize>()
    }
}

/// Most coefficients of a window's polynomial.
const TERMS: usize = 5;
/// A window's polynomial, lowest coefficient first.
pub type Polynomial = [f64; TERMS];

/// Polynomials of one scalar per row.
#[derive(Clone, Debug)]
pub struct Piecewise {
    /// Rows.
    pub rows: usize,
    /// Ring of the input, at least [`Scales::ring`]; `0 <= x <` [`Scales::largest`].
    pub k_in: u32,
    /// Scales and windows.
    pub scales: Scales,
    /// Per scale and window, in units of the scale's output and of the window.
    pub coef: Vec<Vec<Polynomial>>,
    /// Bits of the position in a window that are used.
    pub rho_bits: u32,
    /// Ring of the values at every scale.
    pub k_out: u32,
}

/// Polynomials through `f` at the Chebyshev points of a window and its neighbours' halves, one more than their degree (input
/// in units, output in units of the result).
pub fn fit(f: impl Fn(f64) -> f64, scales: Scales) -> Vec<Vec<Polynomial>> {
    let points = 2.0 * (scales.degree + 1) as f64;
    let points = [1.0, 3.0].map(|i| libm::cos(i * std::f64::consts::PI / points));
    let [a2, b2] = points.map(|r| r * r);
    let window = |s: usize, i: usize| {
        let h = 2f64.powi(scales.drop_of(s) as i32);
        let at = |r: f64| f((i as f64 + r).max(0.0) * h);
        // Even and odd parts at either point.
        let [e, g] = points.map(|r| (at(r) + at(-r)) / 2.0);
        let [o, q] = points.map(|r| (at(r) - at(-r)) / (2.0 * r));
        let c3 = (o - q) / (a2 - b2);
        let c1 = q - c3 * b2;
        if scales.degree == 3 {
            let c2 = (e - g) / (a2 - b2);
            return [g - c2 * b2, c1, c2, c3, 0.0];
        }
        let middle = at(0.0);
        let [e, g] = [(e - middle) / a2, (g - middle) / b2];
        let c4 = (e - g) / (a2 - b2);
        [middle, c1, g - c4 * b2, c3, c4]
    };
    (0..scales.count).map(|s| (0..scales.windows).map(|i| window(s, i)).collect()).collect()
}

/// Gives every scale the unit that leaves what it is picked for just below a quarter of a ring of `k` bits, roundings
/// included; returns log2 of the units.
pub fn narrow(coef: &mut [Vec<Polynomial>], k: u32) -> Vec<i32> {
    let quarter = libm::exp2(f64::from(k - 2)) * (1.0 - 1e-3);
    let unit = |(s, windows): (usize, &mut Vec<Polynomial>)| {
        // Below its third window, a scale but the finest is not picked.
        let used = &windows[if s == 0 { 0 } else { FINER as usize }..];
        let largest = used.iter().map(|c| c.iter().map(|c| c.abs()).sum()).fold(0.0, f64::max);
        let shift = libm::ceil(libm::log2(largest / quarter)).max(2.0 - f64::from(k));
        windows.iter_mut().flatten().for_each(|c| *c *= libm::exp2(-shift));
        shift as i32
    };
    coef.iter_mut().enumerate().map(unit).collect()
}

/// Bits of a ring in which polynomials of positions of so many bits lose a few parts in 2^12 to roundings: a coefficient's is
/// multiplied by a position, and over the windows in which a scale is used a function falls by twice the factor between
/// scales.
pub fn narrow_ring(rho_bits: u32, windows: usize) -> u32 {
    rho_bits + 13 + Scales::stride(windows)
}

impl Piecewise {
    fn terms(&self) -> usize {
        self.scales.degree + 1
    }

    fn tables(&self) -> usize {
        self.rows * self.scales.count * self.scales.windows * self.terms()
    }

    /// The flags of every scale but the widest.
    fn flags(&self) -> impl Iterator<Item = (usize, u32)> {
        (0..self.scales.count - 1).map(|s| self.scales.flag(s))
    }

    /// What is dealt.
    pub fn dealt(&self) -> Vec<Dealt> {
        let flags = self.flags().map(|(words, bits)| (self.rows * words, bits));
        [(self.tables(), self.k_out)].into_iter().chain(flags).collect()
    }

    fn low(&self, x: u64, s: usize) -> u64 {
        let drop = self.scales.drop_of(s);
        (x & mask(drop)) >> (drop - self.rho_bits)
    }

    /// Dealer.
    pub fn deal(&self, d: &mut Deal, lam: &[u64]) -> Result<(), Error> {
        let windows = self.scales.windows;
        let unit = 2f64.powi(-(self.rho_bits as i32));
        // Per scale and coefficient, twice, so that every rotation is a slice.
        let twice = |c: &Vec<Polynomial>, i: usize| (0..2 * windows).map(|j| c[j % windows][i]).collect::<Vec<_>>();
        let of = |c| std::array::from_fn(|i| twice(c, i));
        let coef: Vec<[Vec<f64>; TERMS]> = self.coef.iter().map(of).collect();
        let mut tables = d.tensor(self.tables(), self.k_out)?;
        let flag = |(words, bits)| {
            let mut pattern = vec![0; words];
            pattern[0] = mask(FINER);
            Ok((pattern, bits, d.some_bits(self.rows * words, bits)?))
        };
        let mut flags = self.flags().map(flag).collect::<Result<Vec<_>, Error>>()?;
        for &l in lam {
            for (s, coef) in coef.iter().enumerate() {
                let at = windows - (l >> self.scales.drop_of(s)) as usize % windows;
                let coef = coef.each_ref().map(|c| &c[at..at + windows]);
                let low = self.low(l, s) as f64 * unit;
                let out = tables.room(d, windows * self.terms());
                match self.scales.degree {
                    3 => vector::run(Shifted::<4> { coef, low, unit, out: out.as_chunks_mut().0 }),
                    _ => vector::run(Shifted::<TERMS> { coef, low, unit, out: out.as_chunks_mut().0 }),
                }
                if let Some((pattern, bits, to)) = flags.get_mut(s) {
                    let by = (l >> self.scales.drop_of(s + 1) & mask(self.scales.flag_bits(s))) as usize;
                    rotate_bits(pattern, by, *bits, to.room(d, pattern.len()));
                }
            }
        }
        tables.end(d);
        flags.into_iter().for_each(|(.., t)| t.end(d));
        Ok(())
    }

    /// Meaning in the clear, in units: the value at every scale, and one word of flags a row.
    pub fn plain(&self, x: &[f64]) -> (Vec<f64>, Vec<u64>) {
        let Scales { count, windows, .. } = self.scales;
        let mut out = Vec::with_capacity(x.len() * count);
        let mut flags = vec![0u64; x.len()];
        for (x, flags) in x.iter().zip(&mut flags) {
            for s in 0..count {
                let at = x / 2f64.powi(self.scales.drop_of(s) as i32);
                let r = at - at.floor();
                out.push(self.coef[s][at.floor() as usize % windows].iter().rev().fold(0.0, |y, c| y * r + c));
                if s + 1 < count {
                    *flags |= u64::from(at < f64::from(FINER << Scales::stride(windows))) << s;
                }
            }
        }
        (out, flags)
    }

    /// Evaluator: shares of the value at every scale (`rows x scales`), and one word of flags a row.
    pub fn eval(&self, t: &mut Take, x: &Masked) -> Result<(Vec<u64>, Vec<u64>), Error> {
        let Scales { count, windows, .. } = self.scales;
        let tables = t.half(self.tables(), self.k_out)?;
        let dealt = t.halves(&self.dealt()[1..])?;
        let (mut out, mut flags) = (vec![0; self.rows * count], vec![0u64; self.rows]);
        t.divide(
            self.rows,
            [&mut out, &mut flags],
            |row| [row * count, row],
            |rows, [out, flags]| {
                let mut tables = tables.from(0);
                let flag = dealt.iter().zip(self.flags());
                let mut dealt: Vec<Half> = flag.map(|(half, (words, _))| half.from(rows.start * words)).collect();
                for ((r, out), flags) in rows.zip(out.chunks_exact_mut(count)).zip(flags) {
                    let m = x.m[r];
                    for (s, out) in out.iter_mut().enumerate() {
                        let window = (m >> self.scales.drop_of(s)) as usize % windows;
                        let mut a = [0u64; TERMS];
                        tables.at(((r * count + s) * windows + window) * self.terms(), &mut a[..self.terms()]);
                        let p = self.low(m, s);
                        // Powers keep as many bits as the position, so that no rounded coefficient is multiplied by more.
                        let square = (p * p) >> self.rho_bits;
                        let powers = [p, square, (square * p) >> self.rho_bits, (square * square) >> self.rho_bits];
                        let terms = a[1..].iter().zip(powers);
                        *out = terms.fold(a[0], |sum, (a, p)| sum.wrapping_add(a.wrapping_mul(p))) & mask(self.k_out);
                        if let Some(flag) = dealt.get_mut(s) {
                            let at = (m >> self.scales.drop_of(s + 1) & mask(self.scales.flag_bits(s))) as usize;
                            let word = flag.next(self.scales.flag(s).0)[at / 64];
                            *flags |= (word >> (at % 64) & 1) << s;
                        }
                    }
                }
            },
        );
        Ok((out, flags))
    }
}

/// The dealt coefficients of every window of one row and scale.
struct Shifted<'a, const N: usize> {
    coef: [&'a [f64]; TERMS],
    low: f64,
    unit: f64,
    out: &'a mut [[u64; N]],
}

impl<const N: usize> Kernel for Shifted<'_, N> {
    #[inline(always)]
    fn run(self) {
        let Shifted { coef, low, unit, out } = self;
        for (i, out) in out.iter_mut().enumerate() {
            let mut c: [f64; N] = std::array::from_fn(|j| coef[j][i]);
            // The polynomial about the mask's own place in its window.
            for first in 0..N - 1 {
                for j in (first..N - 1).rev() {
                    c[j] -= c[j + 1] * low;
                }
            }
            c[1..].iter_mut().for_each(|c| *c *= unit);
            *out = c.map(|a| a.round() as i64 as u64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::select::Select;
    use super::super::testing::{World, add, masked};
    use super::*;
    use proptest::prelude::*;

    /// A function's ring, windows and range, as the planner sets them.
    struct Case {
        k_in: u32,
        scales: Scales,
        rho_bits: u32,
        k_out: u32,
        range: std::ops::Range<u64>,
        tolerance: f64,
    }

    /// `x` is given by its place in the range, on a logarithmic scale, and a distance from the next window's edge.
    fn check(f: impl Fn(f64) -> f64, c: &Case, places: &[(f64, i64)], seed: u64) {
        let mut w = World::seeded(seed);
        let span = (c.range.end as f64 / c.range.start as f64).log2();
        let mut x = w.edges(c.k_in, places.len());
        for ([x, ..], (place, near)) in x.iter_mut().zip(places) {
            let at = (c.range.start as f64 * (place * span).exp2()) as u64;
            // Bits of the window that holds it, of the coarsest scale at which it is in use.
            let edge = 1u64 << at.ilog2().saturating_sub(c.scales.windows.ilog2());
            let v = if *near == 0 {
                at
            } else {
                (at / edge * edge).saturating_add_signed(near.signum() * (near.abs() - 1))
            };
            *x = v.clamp(c.range.start, c.range.end - 1);
        }
        let (x, lam, e) = masked(&x, c.k_in, false);
        let (rows, k_out) = (x.len(), c.k_out);
        let f = |v: f64| f(v.max(2f64.powi(c.scales.drop as i32 - 1)));
        let mut coef = fit(f, c.scales);
        let k = narrow_ring(c.rho_bits, c.scales.windows);
        let shifts = narrow(&mut coef, k);
        let p = Piecewise { rows, k_in: c.k_in, scales: c.scales, coef, rho_bits: c.rho_bits, k_out: k };
        let s = w.run(&p.dealt(), |d| p.deal(d, &lam), |t, i| p.eval(t, &e[i]));
        let [(v1, f1), (v2, f2)] = s;
        let v: Vec<u64> = v1.iter().zip(&v2).map(|(a, b)| a.wrapping_add(*b) & mask(k)).collect();
        let fl: Vec<u64> = f1.iter().zip(&f2).map(|(a, b)| a ^ b).collect();
        let g = Select { rows, shifts, reach: c.scales.reach, k_in: k, k_out };
        let ((lv, ev), (lf, ef)) = (w.mask(&v, k), w.mask_bits(&fl));
        let s = w.run(&g.dealt(), |d| g.deal(d, &lv, &lf), |t, i| g.eval(t, &ev[i], &ef[i]));
        for (x, y) in x.iter().zip(add(&s, k_out)) {
            let want = f(*x as f64);
            assert!((y as f64 / want - 1.0).abs() < c.tolerance, "{x}: {y} for {want}");
        }
    }

    fn places() -> impl Strategy<Value = Vec<(f64, i64)>> {
        prop::collection::vec((0.0..=1.0, -2i64..=2), 1..30)
    }

    proptest! {
        #[test]
        fn inverse_square_root_over_five_decades(places in places(), reach in 1usize..=4, degree in 3usize..=4, seed in any::<u64>()) {
            let f = |v: f64| 2f64.powi(50) / v.sqrt();
            let range = 3 << 31..30 << 46;
            let scales = Scales { drop: 31, count: 6, windows: 32, reach, degree };
            check(f, &Case { k_in: 58, scales, rho_bits: 7, k_out: 58, range, tolerance: 0.004 }, &places, seed);
        }

        #[test]
        fn inverse_square_root_over_eleven_decades(
            places in places(),
            (windows, count) in prop_oneof![Just((16, 20)), Just((64, 10)), Just((128, 8))],
            (reach, degree) in (1usize..=4, 3usize..=4),
            seed in any::<u64>(),
        ) {
            let f = |v: f64| 2f64.powi(58) / v.sqrt();
            let range = 3 << 18..14 << 56;
            let scales = Scales { drop: 18, count, windows, reach, degree };
            check(f, &Case { k_in: 62, scales, rho_bits: 7, k_out: 62, range, tolerance: 0.004 }, &places, seed);
        }

        #[test]
        fn reciprocal_over_the_softmax_range(
            places in places(),
            (windows, count) in prop_oneof![Just((16, 7)), Just((32, 5))],
            (reach, degree) in (1usize..=4, 3usize..=4),
            seed in any::<u64>(),
        ) {
            let f = |v: f64| 2f64.powi(44) / v;
            let range = 3 << 7..14 << 19;
            let scales = Scales { drop: 7, count, windows, reach, degree };
            check(f, &Case { k_in: 25, scales, rho_bits: 7, k_out: 51, range, tolerance: 0.012 }, &places, seed);
        }
    }
}
