//! `2^x` of attention scores below their row's bound, and the zero flag that lets few windows serve a long range.
//!
//! `2^(m - l)` factors. For every possible high part of `m` the dealer deals `2^(high part of x) 2^(-low part of l)`; the
//! evaluators multiply the entry they need by the public `2^(low part of m)`. Below its windows the table aliases, so an
//! XOR-shared flag (one dealt bit per window of the whole ring) marks those scores; [`FlagRescale`] zeroes them while it
//! brings the result into the next ring. Everything public is derived by IEEE products of tables from `libm`, so that both
//! evaluators get the same words on any machine.

use super::bits::rotate;
use super::grid::Grid;
use super::{Deal, Dealt, Masked, Take};
use crate::Error;
use crate::ring::mask;

const WINDOWS: usize = 8;

/// One head's scale: scores are `x * ulp` in powers of two.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    /// log2 of the number of maximum levels; the step is `2^(k - level_bits)`.
    pub level_bits: u32,
    /// Powers of two per unit of the score's ring.
    pub ulp: f64,
}

/// Scores and a level count for each (head, row) to `2^(score - bound)` at scale `2^(f_pub + f_deal)`, and flags.
#[derive(Clone, Debug)]
pub struct Exp {
    /// The scores of each head.
    pub grid: Grid,
    /// One entry per head.
    pub heads: Vec<Head>,
    /// Ring of the scores.
    pub k: u32,
    /// Ring of the result, at least `f_pub + f_deal + 2`.
    pub k_out: u32,
    /// Bits of the public factor.
    pub f_pub: i32,
    /// Bits of the dealt factor.
    pub f_deal: i32,
}

impl Exp {
    fn len(&self) -> usize {
        self.heads.len() * self.grid.len()
    }

    fn flag_bits(h: Head) -> usize {
        1 << (h.level_bits - 1)
    }

    /// Words of the flag output: a bit per score.
    pub fn flag_len(&self) -> usize {
        self.len().div_ceil(64)
    }

    /// What is dealt: per head, windows and flags.
    pub fn dealt(&self) -> Vec<Dealt> {
        let n = self.grid.len();
        self.heads.iter().flat_map(|h| [(n * WINDOWS, self.k_out), (n * Self::flag_bits(*h) / 64, 64)]).collect()
    }

    /// Mask or opened word of `x - bound`, with one step of headroom above the level count.
    fn below(&self, s: u64, level: u64, h: Head) -> u64 {
        s.wrapping_sub(level << (self.k - h.level_bits)) & mask(self.k)
    }

    fn offset(&self, h: Head) -> u64 {
        (1u64 << (self.k - 1)).wrapping_sub(1 << (self.k - h.level_bits))
    }

    /// Dealer.
    pub fn deal(&self, d: &mut Deal, ls: &[u64], ll: &[u64]) -> Result<(), Error> {
        let n = self.grid.len();
        let rows = self.grid.row_of();
        for (i, &h) in self.heads.iter().enumerate() {
            let wb = self.k - h.level_bits + 1;
            let hi: [f64; WINDOWS] = std::array::from_fn(|i| {
                let e = if i == 0 { 0.0 } else { (i as f64 - WINDOWS as f64) * 2f64.powi(wb as i32) * h.ulp };
                libm::exp2(e + self.f_deal as f64)
            });
            // Flags by window of the whole ring: set where x is certainly or possibly below the exp table's range.
            let nf = Self::flag_bits(h);
            let mut pattern = vec![0u64; nf / 64];
            (1..nf - WINDOWS + 2).for_each(|i| pattern[i / 64] |= 1 << (i % 64));
            let mut flags = vec![0; n * nf / 64];
            let mut tab = Vec::with_capacity(n * WINDOWS);
            for (e, &s) in ls[i * n..][..n].iter().enumerate() {
                let l = self.below(s, ll[i * self.grid.rows + rows[e]], h);
                let (lh, low) = ((l >> wb) as usize, libm::exp2(-((l & mask(wb)) as f64) * h.ulp));
                for j in 0..WINDOWS {
                    tab.push((hi[j.wrapping_sub(lh) % WINDOWS] * low).round() as u64);
                }
                rotate(&pattern, lh, &mut flags[e * nf / 64..][..nf / 64]);
            }
            d.share(self.k_out, tab)?;
            d.xor(flags)?;
        }
        Ok(())
    }

    /// Meaning in the clear, in units: exponentials, and a flag where one is below the windows.
    pub fn plain(&self, s: &[f64], level: &[f64]) -> (Vec<f64>, Vec<u64>) {
        let n = self.grid.len();
        let rows = self.grid.row_of();
        let mut out = Vec::with_capacity(s.len());
        let mut flags = vec![0u64; self.flag_len()];
        for (e, s) in s.iter().enumerate() {
            let h = self.heads[e / n];
            let step = 2f64.powi((self.k - h.level_bits) as i32);
            let x = s + 2f64.powi(self.k as i32 - 1) - (level[e / n * self.grid.rows + rows[e % n]] + 1.0) * step;
            out.push(libm::exp2(x * h.ulp + f64::from(self.f_pub + self.f_deal)));
            let below = x < -2.0 * step * (WINDOWS - 1) as f64;
            flags[e / 64] |= u64::from(below) << (e % 64);
        }
        (out, flags)
    }

    /// Evaluator: share of the exponentials, and XOR share of the packed flags.
    pub fn eval(&self, t: &mut Take, s: &Masked, level: &Masked) -> Result<(Vec<u64>, Vec<u64>), Error> {
        let n = self.grid.len();
        let rows = self.grid.row_of();
        let mut out = Vec::with_capacity(self.len());
        let mut flags = vec![0u64; self.flag_len()];
        for (i, &h) in self.heads.iter().enumerate() {
            let wb = self.k - h.level_bits + 1;
            let nf = Self::flag_bits(h);
            let tab = t.next(n * WINDOWS, self.k_out)?;
            let fl = t.next(n * nf / 64, 64)?;
            let unit = 2f64.powi(wb as i32 - 8) * h.ulp;
            let coarse: Vec<f64> = (0..256).map(|a| libm::exp2(a as f64 * unit + self.f_pub as f64)).collect();
            let fine: Vec<f64> = (0..256).map(|a| libm::exp2((a as f64 + 0.5) * unit / 256.0)).collect();
            for e in 0..n {
                let m =
                    self.below(s.m[i * n + e], level.m[i * self.grid.rows + rows[e]], h).wrapping_add(self.offset(h))
                        & mask(self.k);
                let (mh, low) = ((m >> wb) as usize, (m & mask(wb)) >> (wb - 16));
                let public = (coarse[(low >> 8) as usize] * fine[(low & 255) as usize]).round() as u64;
                out.push(tab[e * WINDOWS + mh % WINDOWS].wrapping_mul(public) & mask(self.k_out));
                let bit = fl[e * nf / 64 + mh / 64] >> (mh % 64) & 1;
                flags[(i * n + e) / 64] |= bit << ((i * n + e) % 64);
            }
        }
        Ok((out, flags))
    }
}

/// `(1 - flag) round(x / 2^shift)` into another ring; `flag` is a masked bit per element.
///
/// `1 - (c ^ r) = (1 - c) + (2c - 1) r`, so besides the rescale's `A` and `B` the dealer deals `r`, `rA` and `rB`.
#[derive(Clone, Debug)]
pub struct FlagRescale {
    /// Elements.
    pub len: usize,
    /// Binary exponent of the scale.
    pub shift: u32,
    /// Ring of the input; `|x| < 2^(k_in - 2)`.
    pub k_in: u32,
    /// Ring of the output.
    pub k_out: u32,
}

impl FlagRescale {
    fn k_bit(&self) -> u32 {
        self.k_out.saturating_sub(self.k_in - self.shift).max(1)
    }

    fn round(&self, v: u64) -> u64 {
        (v + (1 << self.shift >> 1)) >> self.shift
    }

    /// What is dealt.
    pub fn dealt(&self) -> Vec<Dealt> {
        let (k, b) = (self.k_out, self.k_bit());
        [k, b, k, k, b].map(|k| (self.len, k)).to_vec()
    }

    /// Dealer.
    pub fn deal(&self, d: &mut Deal, lx: &[u64], lf: &[u64]) -> Result<(), Error> {
        let a: Vec<u64> = lx.iter().map(|l| self.round(*l)).collect();
        let b: Vec<u64> = lx.iter().map(|l| l >> (self.k_in - 1)).collect();
        let r: Vec<u64> = (0..self.len).map(|i| lf[i / 64] >> (i % 64) & 1).collect();
        let times = |x: &[u64]| x.iter().zip(&r).map(|(x, r)| x * r).collect::<Vec<_>>();
        let (ra, rb) = (times(&a), times(&b));
        d.share(self.k_out, a)?;
        d.share(self.k_bit(), b)?;
        d.share(self.k_out, r)?;
        d.share(self.k_out, ra)?;
        d.share(self.k_bit(), rb)
    }

    /// Meaning in the clear, in units.
    pub fn plain(&self, x: &[f64], flag: &[u64]) -> Vec<f64> {
        let scale = 2f64.powi(-(self.shift as i32));
        let value = |(i, x): (usize, &f64)| if flag[i / 64] >> (i % 64) & 1 == 1 { 0.0 } else { x * scale };
        x.iter().enumerate().map(value).collect()
    }

    /// Evaluator: share of the kept values.
    pub fn eval(&self, t: &mut Take, x: &Masked, flag: &Masked) -> Result<Vec<u64>, Error> {
        let (n, k, kb) = (self.len, self.k_out, self.k_bit());
        let (a, b, r, ra, rb) = (t.next(n, k)?, t.next(n, kb)?, t.next(n, k)?, t.next(n, k)?, t.next(n, kb)?);
        let quarter = 1u64 << (self.k_in - 2);
        let wrap = 1u64.checked_shl(self.k_in - self.shift).unwrap_or(0);
        let lead = u64::from(t.leads());
        let mut y = Vec::with_capacity(n);
        for i in 0..n {
            let m = x.m[i].wrapping_add(quarter) & mask(self.k_in);
            let uw = wrap * (1 - (m >> (self.k_in - 1)));
            let public = self.round(m).wrapping_sub(quarter >> self.shift);
            let c = flag.m[i / 64] >> (i % 64) & 1;
            let kept = (public * lead).wrapping_sub(a[i]).wrapping_add(uw.wrapping_mul(b[i]));
            let gated = r[i].wrapping_mul(public).wrapping_sub(ra[i]).wrapping_add(uw.wrapping_mul(rb[i]));
            let v = (1 - c).wrapping_mul(kept).wrapping_add((2 * c).wrapping_sub(1).wrapping_mul(gated));
            y.push(v & mask(k));
        }
        Ok(y)
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
        fn exponentials_of_the_whole_range_are_right_or_flagged(
            tokens in 1usize..8,
            // The planner's steps are of 1.5 to 3 powers of two.
            heads in prop::collection::vec((7u32..=11, 1.5f64..3.0), 1..3),
            level in 0.0f64..1.0,
            seed in any::<u64>(),
        ) {
            let k = 28;
            let mut w = World::seeded(seed);
            let n = tokens * tokens;
            let heads: Vec<Head> =
                heads.into_iter().map(|(level_bits, step)| Head { level_bits, ulp: step * 2f64.powi(level_bits as i32 - k as i32) }).collect();
            let (mut x, mut bound) = (w.edges(k, heads.len() * n), vec![]);
            let mut levels = w.edges(12, heads.len() * tokens);
            for (i, h) in heads.iter().enumerate() {
                let step = 1i64 << (k - h.level_bits);
                let count = 8 + (level * ((1 << h.level_bits) - 12) as f64) as i64;
                levels[i * tokens..][..tokens].iter_mut().for_each(|[c, ..]| *c = count as u64);
                // A step of headroom above the level count; scores from a step below it to the lower end of the range.
                bound.push((count + 1) * step - (1 << (k - 1)));
                let room = (count - 4) * step;
                for (j, [x, ..]) in x[i * n..][..n].iter_mut().enumerate() {
                    let below = if j % 2 == 0 { *x as i64 % room } else { (*x as i64 % (12 * step)).min(room) };
                    *x = (bound[i] - step - below) as u64 & mask(k);
                }
            }
            let ((x, ls, es), (_, ll, el)) = (masked(&x, k, false), masked(&levels, 12, false));
            let g = Exp { grid: Grid::square(tokens), heads, k, k_out: 30, f_pub: 8, f_deal: 20 };
            let s = w.run(&g.dealt(), |d| g.deal(d, &ls, &ll), |t, i| g.eval(t, &es[i], &el[i]));
            let [(e1, f1), (e2, f2)] = s;
            let flags: Vec<u64> = f1.iter().zip(&f2).map(|(a, b)| a ^ b).collect();
            let e: Vec<u64> = e1.iter().zip(&e2).map(|(a, b)| a.wrapping_add(*b) & mask(30)).collect();
            let r = FlagRescale { len: e.len(), shift: 12, k_in: 30, k_out: 40 };
            let ((le, ee), (lf, ef)) = (w.mask(&e, 30), w.mask_bits(&flags));
            let s = w.run(&r.dealt(), |d| r.deal(d, &le, &lf), |t, i| r.eval(t, &ee[i], &ef[i]));
            for (at, (x, y)) in x.iter().zip(add(&s, 40)).enumerate() {
                let want = libm::exp2((signed(*x, k) - bound[at / n]) as f64 * g.heads[at / n].ulp) * 65536.0;
                let err = (y as f64 - want).abs();
                // Half a unit of the 8-bit public factor, and what a raised flag may drop.
                prop_assert!(err <= 6.0 + 2.1e-3 * want, "{} for {}", y, want);
            }
        }

        #[test]
        fn flagged_values_are_zero_and_others_rescaled(
            (len, k_in, k_out) in (1usize..100, 4u32..=62, 3u32..=64),
            shift in 0.0f64..1.0,
            seed in any::<u64>(),
        ) {
            let shift = (shift * (k_in - 2) as f64) as u32;
            let mut w = World::seeded(seed);
            let mut x = w.edges(k_in, len);
            for [x, ..] in &mut x {
                let v = signed(*x, k_in) >> 1;
                *x = (if v == -(1 << (k_in - 2)) { v + 1 } else { v }) as u64 & mask(k_in);
            }
            let (x, lx, ex) = masked(&x, k_in, false);
            let (flags, lf, ef) = masked(&w.edges(64, len.div_ceil(64)), 64, true);
            let g = FlagRescale { len, shift, k_in, k_out };
            let s = w.run(&g.dealt(), |d| g.deal(d, &lx, &lf), |t, i| g.eval(t, &ex[i], &ef[i]));
            for (i, y) in add(&s, k_out).into_iter().enumerate() {
                if flags[i / 64] >> (i % 64) & 1 == 1 {
                    prop_assert_eq!(y, 0);
                    continue;
                }
                let x = signed(x[i], k_in);
                let fraction = (x - (x >> shift << shift)) as f64 / 2f64.powi(shift as i32);
                let error = signed((y - (x >> shift)) as u64, k_out) as f64 - fraction;
                prop_assert!(error.abs() <= 1.0, "{} ulp", error);
            }
        }
    }
}
