//! GELU and SiLU of a channel: which interval about zero gets a series, and how long it has to be.
//!
//! Both are `x / 2` and an even part `E`, and `E(x)` is `|x| / 2` up to a tolerance beyond a few units. A channel whose proven
//! range is wide gets a series on an interval only, see [`crate::gates::join`]. The windows that tell inside from beyond are
//! a 128th of the ring, so the ring's unit fixes them, and the periods of the series are whole parts of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{SLACK, pow2};
use crate::gates::cosine::{Columns, fit_even};
use crate::gates::tails::WINDOWS;

/// Periods of a series in lengths of its interval: a longer one leaves room to turn around smoothly, a shorter one has
/// fewer harmonics.
const PERIODS: std::ops::RangeInclusive<f64> = 2.05..=4.0;
/// Steps of what half a ring is worth that are tried.
const TRIED: usize = 4;
/// Windows that values may reach: some less than [`crate::gates::tails::REACH`], so that a series over all of them has room
/// to turn around.
const WITHIN: u32 = 29;
/// Most that the coefficients of a series may add up to, in half intervals: what it is where it is not used.
const SWING: f64 = 2.0;

/// A channel's pieces.
#[derive(Clone)]
pub struct Curve {
    /// Periods of the series in half a ring.
    turns: u32,
    /// The first window above, see [`crate::gates::tails::Tails`].
    inner: u32,
    series: Vec<f64>,
}

/// The channels of one layer.
#[derive(Serialize, Deserialize)]
pub struct Curves {
    pub columns: Arc<Columns>,
    pub inner: Arc<Vec<u32>>,
    /// Bound on every series.
    pub bound: f64,
}

impl Curves {
    pub fn new(curves: &[Curve]) -> Curves {
        let sum = |c: &Curve| c.series.iter().map(|a| a.abs()).sum::<f64>();
        Curves {
            columns: Arc::new(Columns::new(
                curves.iter().map(|c| c.series.clone()).collect(),
                curves.iter().map(|c| c.turns).collect(),
            )),
            inner: Arc::new(curves.iter().map(|c| c.inner).collect()),
            bound: curves.iter().map(sum).fold(0.0, f64::max) * SLACK,
        }
    }

    /// Ring of a series at `2^-f`.
    pub fn ring(&self, f: u32) -> u32 {
        libm::ceil(libm::log2(self.bound + pow2(-4))).max(0.0) as u32 + f + 2
    }
}

impl Curve {
    /// By which channels are sorted, since those side by side share a number of harmonics.
    pub fn harmonics(&self) -> usize {
        self.series.len()
    }
}

/// The pieces of one nonlinearity, by what half a ring is worth.
pub struct Activation {
    even: fn(f64) -> f64,
    tolerance: f64,
    /// From where on the even part is `|x| / 2`.
    line: f64,
    known: BTreeMap<u64, Option<Curve>>,
}

/// What half a ring may be worth for a channel up to `range`, in steps of a sixteenth. A range that is no number has no end.
pub fn half_ring(range: f64) -> f64 {
    if range.is_nan() {
        return f64::INFINITY;
    }
    let half = range * SLACK * f64::from(WINDOWS) / f64::from(WITHIN);
    let step = step(half);
    libm::ceil(half / step).max(1.0) * step
}

fn step(half: f64) -> f64 {
    pow2(libm::floor(libm::log2(half.max(32.0))) as i32 - 4)
}

/// This step and the larger ones.
pub fn half_rings(from: f64) -> impl Iterator<Item = f64> {
    std::iter::successors(Some(from), |half| Some(half + step(*half)))
}

impl Activation {
    pub fn new(even: fn(f64) -> f64, tolerance: f64) -> Activation {
        let at = |i: i32| f64::from(i) / 64.0;
        let line = (1..64 * 64).rev().map(at).find(|x| x / 2.0 - even(*x) > tolerance).unwrap_or(0.0) + at(1);
        Activation { even, tolerance, line, known: BTreeMap::new() }
    }

    /// The one with the shortest series, and what half a ring is worth for it: this much or a few steps more, since periods
    /// are whole parts of it. `None` where no series is good enough.
    pub fn curve(&mut self, least: f64) -> Option<(f64, Curve)> {
        let tried = half_rings(least).take(TRIED).filter_map(|half| Some((half, self.at(half)?)));
        tried.min_by_key(|(_, c)| c.harmonics())
    }

    fn at(&mut self, half_ring: f64) -> Option<Curve> {
        if let Some(known) = self.known.get(&half_ring.to_bits()) {
            return known.clone();
        }
        let made = self.make(half_ring);
        self.known.insert(half_ring.to_bits(), made.clone());
        made
    }

    fn make(&self, half_ring: f64) -> Option<Curve> {
        let window = half_ring / f64::from(WINDOWS);
        // A value "above" may lie a window below the first one.
        let inner = (libm::ceil(self.line / window) as u32 + 1).min(WINDOWS / 2);
        let inner = if inner > WITHIN { WINDOWS / 2 } else { inner };
        let end = f64::from(inner.min(WITHIN)) * window;
        let most = libm::floor(half_ring / (PERIODS.start() * end)).max(1.0) as u32;
        let tried = (1..=most).filter_map(|turns| {
            let period = half_ring / f64::from(turns);
            if turns > 1 && period > PERIODS.end() * end {
                return None;
            }
            let series = fit_even(self.even, end, period, self.tolerance)?;
            let swing = series.iter().map(|a| a.abs()).sum::<f64>();
            (swing <= SWING * end.max(1.0)).then_some(Curve { turns, inner, series })
        });
        tried.min_by_key(Curve::harmonics)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_within_the_tolerance_over_every_range() {
        let gelu: fn(f64) -> f64 = |x| x * libm::erf(x / std::f64::consts::SQRT_2) / 2.0;
        let silu: fn(f64) -> f64 = |x| x * libm::tanh(x / 2.0) / 2.0;
        for (even, tolerance) in [(gelu, 2e-3), (silu, 1e-3)] {
            let mut a = Activation::new(even, tolerance);
            for range in [0.3, 1.0, 4.0, 7.5, 12.0, 20.0, 33.0, 64.0, 200.0, 900.0, 2000.0] {
                let Some((half, c)) = a.curve(half_ring(range)) else { panic!("nothing for {range}") };
                let (window, angle) = (half / 64.0, std::f64::consts::TAU * f64::from(c.turns) / half);
                let series = |x: f64| -> f64 {
                    c.series.iter().enumerate().map(|(j, a)| a * libm::cos(angle * j as f64 * x)).sum()
                };
                assert!(range <= f64::from(WITHIN) * window);
                for i in 0..4000 {
                    let x = f64::from(i) / 4000.0 * range;
                    let inside = (x / 2.0 + series(x) - (x / 2.0 + even(x))).abs();
                    let beyond = (x / 2.0 - even(x)).abs();
                    // Where bits may say either, both have to be right.
                    let (low, high) = (f64::from(c.inner - 1) * window, f64::from(c.inner) * window);
                    assert!(x > high && c.inner < 32 || inside <= 1.05 * tolerance, "{range}: {inside} at {x}");
                    assert!(x < low || c.inner == 32 || beyond <= 1.05 * tolerance, "{range}: {beyond} at {x}");
                }
            }
        }
    }

    #[test]
    fn a_range_too_wide_for_a_series_has_none() {
        let mut a = Activation::new(|x| x * libm::tanh(x / 2.0) / 2.0, 1e-3);
        for range in [4e3, 1e7, 1e30, f64::INFINITY, f64::NAN] {
            assert!(a.curve(half_ring(range)).is_none(), "{range}");
        }
    }
}
