//! Row-wise functions of wide dynamic range (reciprocal, inverse square root): quadratics over windows at several scales.
//!
//! At scale `s` the window is `h = 2^drop`; `x = i h + r` with `i = m_hi - l_hi` and `r = m_lo - l_lo` in `(-h, h)`: a
//! borrow only means that a window's quadratic is used a little past it. `c0 + c1 r + c2 r^2` is a quadratic in the
//! public `m_lo` whose three coefficients depend on the window and `l_lo`, so the dealer deals three elements a window.
//! Windows alias every 64, so a value is right only while `x < 57 h`; a thermometer of flags, one dealt bit per window of
//! `8 h`, says so for each scale but the widest, and [`Select`] picks the finest scale whose flag and all wider ones hold.

use super::{Deal, Dealt, Masked, Take};
use crate::Error;
use crate::ring::mask;
use crate::vector::{self, Kernel};

const WINDOWS: usize = 64;
/// Each scale's window is this many bits wider than the one before.
pub const STRIDE: u32 = 3;

/// Quadratics of one scalar per row.
#[derive(Clone, Debug)]
pub struct Piecewise {
    /// Rows.
    pub rows: usize,
    /// Ring of the input; `0 <= x < 63 * 2^(drop + 3 (scales - 1))`, and the ring has room for the widest flags.
    pub k_in: u32,
    /// log2 of the finest window.
    pub drop: u32,
    /// Number of scales, at most 8.
    pub scales: usize,
    /// Per scale and window, `c0, c1, c2` in units of the output and of the window.
    pub coef: Vec<[[f64; 3]; WINDOWS]>,
    /// Bits of the position in a window that are used.
    pub rho_bits: u32,
    /// Ring of the output.
    pub k_out: u32,
}

/// Quadratics through three points a window of `f` (input in units, output in units of the result).
pub fn fit_quadratics(f: impl Fn(f64) -> f64, drop: u32, scales: usize) -> Vec<[[f64; 3]; WINDOWS]> {
    (0..scales as u32)
        .map(|s| {
            let h = 2f64.powi((drop + STRIDE * s) as i32);
            std::array::from_fn(|i| {
                let at = |r: f64| f((i as f64 + r).max(0.0) * h);
                let (lo, mid, hi) = (at(-0.8), at(0.0), at(0.8));
                [mid, (hi - lo) / 1.6, (hi + lo - 2.0 * mid) / 1.28]
            })
        })
        .collect()
}

impl Piecewise {
    fn drop_of(&self, s: usize) -> u32 {
        self.drop + STRIDE * s as u32
    }

    /// What is dealt.
    pub fn dealt(&self) -> Vec<Dealt> {
        let flags = self.rows * (self.scales - 1);
        let mut v = vec![(self.rows * self.scales * WINDOWS * 3, self.k_out)];
        if flags > 0 {
            v.push((flags, 64));
        }
        v
    }

    fn low(&self, x: u64, s: usize) -> u64 {
        (x & mask(self.drop_of(s))) >> (self.drop_of(s) - self.rho_bits)
    }

    /// Dealer.
    pub fn deal(&self, d: &mut Deal, lam: &[u64]) -> Result<(), Error> {
        let flags = self.rows * (self.scales - 1);
        let unit = 2f64.powi(-(self.rho_bits as i32));
        // Per scale and coefficient, twice, so that every rotation is a slice.
        let coef: Vec<[[f64; 2 * WINDOWS]; 3]> =
            self.coef.iter().map(|c| std::array::from_fn(|i| std::array::from_fn(|j| c[j % WINDOWS][i]))).collect();
        let mut tables = d.tensor(self.rows * self.scales * WINDOWS * 3, self.k_out)?;
        let mut words = Vec::with_capacity(flags);
        for &l in lam {
            for (s, coef) in coef.iter().enumerate() {
                let drop = self.drop_of(s);
                let at = WINDOWS - (l >> drop) as usize % WINDOWS;
                let low = self.low(l, s) as f64 * unit;
                let out = tables.room(d, WINDOWS * 3).as_chunks_mut().0;
                vector::run(Quadratics { coef, at, low, unit, out });
                if s + 1 < self.scales {
                    // Set for windows 0..7 of 8h, rotated by the mask's window.
                    words.push(0x7fu64.rotate_left((l >> (drop + STRIDE)) as u32 % 64));
                }
            }
        }
        tables.end(d);
        if flags > 0 {
            d.xor(words)?;
        }
        Ok(())
    }

    /// Meaning in the clear, in units: the value at every scale, and one word of flags a row.
    pub fn plain(&self, x: &[f64]) -> (Vec<f64>, Vec<u64>) {
        let mut out = Vec::with_capacity(x.len() * self.scales);
        let mut flags = vec![0u64; x.len()];
        for (x, flags) in x.iter().zip(&mut flags) {
            for s in 0..self.scales {
                let at = x / 2f64.powi(self.drop_of(s) as i32);
                let [c0, c1, c2] = self.coef[s][at.floor() as usize % WINDOWS];
                let r = at - at.floor();
                out.push(c0 + r * (c1 + r * c2));
                if s + 1 < self.scales {
                    *flags |= u64::from(at < 56.0) << s;
                }
            }
        }
        (out, flags)
    }

    /// Evaluator: shares of the value at every scale (`rows x scales`), and one word of flags a row.
    pub fn eval(&self, t: &mut Take, x: &Masked) -> Result<(Vec<u64>, Vec<u64>), Error> {
        let mut tables = t.half(self.rows * self.scales * WINDOWS * 3, self.k_out)?;
        let f = if self.scales > 1 { t.next(self.rows * (self.scales - 1), 64)? } else { Vec::new() };
        let mut out = Vec::with_capacity(self.rows * self.scales);
        let mut flags = vec![0u64; self.rows];
        for (r, &m) in x.m.iter().enumerate() {
            for s in 0..self.scales {
                let drop = self.drop_of(s);
                let mut a = [0u64; 3];
                tables.at(((r * self.scales + s) * WINDOWS + (m >> drop) as usize % WINDOWS) * 3, &mut a);
                let p = self.low(m, s);
                // The square keeps as many bits as the position, so that no rounded coefficient is multiplied by more.
                let square = (p * p) >> self.rho_bits;
                let sum = a[1].wrapping_mul(p).wrapping_add(a[2].wrapping_mul(square)).wrapping_add(a[0]);
                out.push(sum & mask(self.k_out));
                if s + 1 < self.scales {
                    let word = f[r * (self.scales - 1) + s];
                    flags[r] |= (word >> ((m >> (drop + STRIDE)) % 64) & 1) << s;
                }
            }
        }
        Ok((out, flags))
    }
}

/// The dealt coefficients of every window of one row and scale.
struct Quadratics<'a> {
    coef: &'a [[f64; 2 * WINDOWS]; 3],
    at: usize,
    low: f64,
    unit: f64,
    out: &'a mut [[u64; 3]],
}

impl Kernel for Quadratics<'_> {
    #[inline(always)]
    fn run(self) {
        let Quadratics { coef, at, low, unit, out } = self;
        let [c0, c1, c2] = coef.each_ref().map(|c| &c[at..at + WINDOWS]);
        for (i, out) in out.iter_mut().enumerate() {
            let a = [c0[i] - c1[i] * low + c2[i] * low * low, (c1[i] - 2.0 * c2[i] * low) * unit, c2[i] * unit];
            *out = a.map(|a| a.round() as i64 as u64);
        }
    }
}

/// Picks, per row, the finest scale whose flag and all wider flags are set.
///
/// The choice is a function of the opened flags and their masks, so the dealer deals, for every possible opening, the
/// choice as a one-hot share and the chosen value's mask.
#[derive(Clone, Debug)]
pub struct Select {
    /// Rows.
    pub rows: usize,
    /// Scales.
    pub scales: usize,
    /// Ring of values and result.
    pub k: u32,
}

impl Select {
    fn cases(&self) -> usize {
        1 << (self.scales - 1)
    }

    fn entries(&self) -> usize {
        self.rows * self.cases() * (self.scales + 1)
    }

    /// What is dealt.
    pub fn dealt(&self) -> Vec<Dealt> {
        vec![(self.entries(), self.k)]
    }

    /// Dealer.
    pub fn deal(&self, d: &mut Deal, lv: &[u64], lf: &[u64]) -> Result<(), Error> {
        let mut v = Vec::with_capacity(self.entries());
        for (lv, lf) in lv.chunks_exact(self.scales).zip(lf) {
            for c in 0..self.cases() as u64 {
                let chosen = self.chosen(c ^ lf);
                v.extend((0..self.scales).map(|s| u64::from(s == chosen)));
                v.push(lv[chosen]);
            }
        }
        d.share(self.k, v)
    }

    fn chosen(&self, flags: u64) -> usize {
        let widest = self.scales - 1;
        (0..self.scales).rev().take_while(|s| *s == widest || flags >> s & 1 == 1).last().unwrap_or(widest)
    }

    /// Meaning in the clear, in units.
    pub fn plain(&self, v: &[f64], flags: &[u64]) -> Vec<f64> {
        v.chunks_exact(self.scales).zip(flags).map(|(v, f)| v[self.chosen(*f)]).collect()
    }

    /// Evaluator: one share per row.
    pub fn eval(&self, t: &mut Take, v: &Masked, flags: &Masked) -> Result<Vec<u64>, Error> {
        let mut tables = t.half(self.entries(), self.k)?;
        let w = self.scales + 1;
        let mut e = vec![0u64; w];
        let row = |r: usize| {
            let c = (flags.m[r] & (self.cases() as u64 - 1)) as usize;
            tables.at((r * self.cases() + c) * w, &mut e);
            let values = &v.m[r * self.scales..];
            let y = e[..self.scales].iter().zip(values).fold(0u64, |y, (e, m)| y.wrapping_add(e.wrapping_mul(*m)));
            y.wrapping_sub(e[self.scales]) & mask(self.k)
        };
        Ok((0..self.rows).map(row).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{World, add, masked};
    use super::*;
    use proptest::prelude::*;

    /// A function's ring, windows and range, as the planner sets them.
    struct Case {
        k_in: u32,
        drop: u32,
        scales: usize,
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
            let edge = 1u64 << at.ilog2().saturating_sub(5);
            let v = if *near == 0 {
                at
            } else {
                (at / edge * edge).saturating_add_signed(near.signum() * (near.abs() - 1))
            };
            *x = v.clamp(c.range.start, c.range.end - 1);
        }
        let (x, lam, e) = masked(&x, c.k_in, false);
        let (rows, scales, k_out) = (x.len(), c.scales, c.k_out);
        let coef = fit_quadratics(&f, c.drop, scales);
        let p = Piecewise { rows, k_in: c.k_in, drop: c.drop, scales, coef, rho_bits: c.rho_bits, k_out };
        let s = w.run(&p.dealt(), |d| p.deal(d, &lam), |t, i| p.eval(t, &e[i]));
        let [(v1, f1), (v2, f2)] = s;
        let v: Vec<u64> = v1.iter().zip(&v2).map(|(a, b)| a.wrapping_add(*b) & mask(k_out)).collect();
        let fl: Vec<u64> = f1.iter().zip(&f2).map(|(a, b)| a ^ b).collect();
        let g = Select { rows, scales, k: k_out };
        let ((lv, ev), (lf, ef)) = (w.mask(&v, k_out), w.mask_bits(&fl));
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
        fn inverse_square_root_over_five_decades(places in places(), seed in any::<u64>()) {
            let f = |v: f64| 2f64.powi(50) / v.max(1.0).sqrt();
            let range = 6 << 31..62 << 46;
            check(f, &Case { k_in: 58, drop: 31, scales: 6, rho_bits: 7, k_out: 58, range, tolerance: 0.004 }, &places, seed);
        }

        #[test]
        fn reciprocal_over_the_softmax_range(places in places(), seed in any::<u64>()) {
            let f = |v: f64| 2f64.powi(44) / v.max(32.0);
            let range = 6 << 6..1 << 23;
            check(f, &Case { k_in: 25, drop: 6, scales: 5, rho_bits: 6, k_out: 51, range, tolerance: 0.012 }, &places, seed);
        }

        #[test]
        fn the_finest_scale_whose_flag_and_all_wider_ones_hold_is_selected(
            (rows, scales, k) in (1usize..5, 1usize..=8, 1u32..=64),
            seed in any::<u64>(),
        ) {
            let mut w = World::seeded(seed);
            let (v, lv, ev) = masked(&w.edges(k, rows * scales), k, false);
            // Bits above the scales are never set by the gate before, on either side.
            let keep = (1u64 << (scales - 1)) - 1;
            let mut flags = w.edges(64, rows);
            flags.iter_mut().for_each(|[f, ..]| *f &= keep);
            let (flags, lf, ef) = masked(&flags, 64, true);
            let g = Select { rows, scales, k };
            let s = w.run(&g.dealt(), |d| g.deal(d, &lv, &lf), |t, i| g.eval(t, &ev[i], &ef[i]));
            for (row, got) in add(&s, k).into_iter().enumerate() {
                let wider = (0..scales - 1).rev().take_while(|s| flags[row] >> s & 1 == 1).count();
                prop_assert_eq!(got, crate::ring::signed(v[row * scales + scales - 1 - wider], k));
            }
        }
    }
}
