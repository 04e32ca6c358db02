//! `2^x` of attention scores below their row's bound, and the zero flag that lets few windows serve a long range.
//!
//! `2^(m - l)` factors. For every possible high part of `m` the dealer deals `2^(high part of x) 2^(-low part of l)`; the
//! evaluators multiply the entry they need by the public `2^(low part of m)`. Below its windows the table aliases, so an
//! XOR-shared flag (one dealt bit per window of the whole ring) marks those scores; [`FlagRescale`] zeroes them while it
//! brings the result into the next ring.
//!
//! Everything public has to be the same words at both evaluators, whatever their machines. [`PublicPowers`] are products of
//! integers from tables, which `libm` makes equal everywhere, so a processor without doubles computes them too. Where a head
//! has too few scores for tables, each power is `libm`'s own: which of the two it is depends on the gate's shape alone.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::bits::rotate_bits;
use super::grid::Grid;
use super::powers::{LARGEST, OFTEN, Place, Powers, Public, PublicPowers, USED};
use super::rowmax::Levels;
use super::{Deal, Dealt, Half, Halves, Masked, Take, rounded};
use crate::Error;
use crate::ring::mask;
use crate::vector::{self, Kernel};

/// Steps of the maximum's levels below the bound from which on every exponential is zero: all windows of the dealt powers.
pub const VANISHED: u32 = 16;

/// Powers of two by which every exponential is smaller than it says, so that one of a row's bound is still below its ring's
/// quarter when it has been truncated. All of a row are, so softmax does not see it.
const BELOW: f64 = 0.01;

/// One head's scale: scores are `x * ulp` in powers of two.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Head {
    /// Levels of the maximum; the step is `2^(k - levels.bits)`.
    pub levels: Levels,
    /// Powers of two per unit of the score's ring.
    pub ulp: f64,
}

impl Head {
    /// Bits of a ring in which steps have as many as are used of them.
    pub fn least_ring(&self) -> u32 {
        self.levels.bits + USED
    }

    /// Powers of two that a window of `2^steps` steps is worth, rounded up; `k` is the scores' ring.
    pub fn window(&self, k: u32, steps: u32) -> u32 {
        libm::ceil(self.ulp * libm::exp2(f64::from(k - self.levels.bits + steps))) as u32
    }
}

/// Powers of two that the widest window of some heads is worth.
pub fn widest(heads: &[Head], k: u32, steps: u32) -> u32 {
    heads.iter().fold(0, |m, h| m.max(h.window(k, steps)))
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
    /// log2 of the steps in a window, 2 or 3. All but the last window is right for certain, in that a value may be flagged.
    pub window_steps: u32,
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

    /// Windows of the dealt powers, a power of two.
    pub fn windows(&self) -> usize {
        (VANISHED >> self.window_steps) as usize
    }

    /// Windows of the whole ring, as words of flags and bits of each.
    fn flags(&self, h: Head) -> (usize, u32) {
        let n = 1usize << (h.levels.bits - self.window_steps);
        (n.div_ceil(64), n.min(64) as u32)
    }

    /// Words of the flag output: a bit per score.
    pub fn flag_len(&self) -> usize {
        self.len().div_ceil(64)
    }

    /// What is dealt: per head, windows and flags.
    pub fn dealt(&self) -> Vec<Dealt> {
        let n = self.grid.len();
        let of = |h: &Head| {
            let (words, bits) = self.flags(*h);
            [(n * self.windows(), self.k_out - self.spared(h)), (n * words, bits)]
        };
        self.heads.iter().flat_map(of).collect()
    }

    /// Bits that this head's powers are dealt without: those by which its windows, and so the factors that multiply what was
    /// rounded, are narrower than the widest.
    pub fn spared(&self, h: &Head) -> u32 {
        widest(&self.heads, self.k, self.window_steps) - h.window(self.k, self.window_steps)
    }

    /// What the evaluators multiply a head's powers by; `None` where there are too few scores for tables, or where factors
    /// would not fit, as no planner makes them: then they are rounded doubles.
    pub fn public_tables(&self, head: usize) -> Option<PublicPowers> {
        let h = self.heads.get(head)?;
        let fits = self.f_pub >= 0 && self.f_pub + h.window(self.k, self.window_steps) as i32 <= LARGEST;
        let often = fits && self.grid.len() > OFTEN;
        often.then(|| PublicPowers::new(self.place(*h), h.ulp, self.f_pub))
    }

    fn place(&self, h: Head) -> Place {
        Place::new(self.window_bits(h), self.window_steps)
    }

    fn window_bits(&self, h: Head) -> u32 {
        self.k - h.levels.bits + self.window_steps
    }

    /// What is added to a score's word for that of `x - bound`, given the word of the bound's level.
    fn offset(&self, constant: u64, level: u64, h: Head) -> u64 {
        constant.wrapping_sub(level << (self.k - h.levels.bits))
    }

    /// The public part of the difference: one step of headroom above the level count, which starts where a maximum may be.
    pub fn headroom(&self, h: Head) -> u64 {
        (1u64 << (self.k - 1)).wrapping_sub((1 + h.levels.below()) << (self.k - h.levels.bits))
    }

    /// Dealer.
    pub fn deal(&self, d: &mut Deal, ls: &[u64], ll: &[u64]) -> Result<(), Error> {
        let (n, windows) = (self.grid.len(), self.windows());
        for (i, &h) in self.heads.iter().enumerate() {
            let (wb, spared) = (self.window_bits(h), self.spared(&h));
            // Twice, so that every rotation is a slice.
            let power = |i: usize| {
                let i = i % windows;
                let e = if i == 0 { 0.0 } else { (i as f64 - windows as f64) * 2f64.powi(wb as i32) * h.ulp };
                libm::exp2(e + f64::from(self.f_deal) - f64::from(spared) - BELOW)
            };
            let hi: Vec<f64> = (0..2 * windows).map(power).collect();
            let low = Powers::new(self.place(h), -h.ulp, 0, n);
            // Flags by window of the whole ring: set for all but the exp table's.
            let (words, bits) = self.flags(h);
            let mut pattern = vec![0u64; words];
            (1..=words * bits as usize - windows).for_each(|i| pattern[i / 64] |= 1 << (i % 64));
            let mut tables = d.tensor(n * windows, self.k_out - spared)?;
            let mut flags = d.some_bits(n * words, bits)?;
            for (row, l) in self.grid.split(&ls[i * n..][..n]) {
                let offset = self.offset(0, ll[i * self.grid.rows + row], h);
                for l in l {
                    let l = l.wrapping_add(offset) & mask(self.k);
                    let (lh, low) = ((l >> wb) as usize, low.of(l));
                    let at = windows - lh % windows;
                    let to = tables.room(d, windows);
                    to.iter_mut().zip(&hi[at..at + windows]).for_each(|(to, hi)| *to = rounded(hi * low));
                    rotate_bits(&pattern, lh, bits, flags.room(d, words));
                }
            }
            tables.end(d);
            flags.end(d);
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
            let step = 2f64.powi((self.k - h.levels.bits) as i32);
            let level = level[e / n * self.grid.rows + rows[e % n]] + h.levels.below() as f64;
            let x = s + 2f64.powi(self.k as i32 - 1) - (level + 1.0) * step;
            out.push(libm::exp2(x * h.ulp + f64::from(self.f_pub + self.f_deal) - BELOW));
            let below = x < -step * f64::from(VANISHED);
            flags[e / 64] |= u64::from(below) << (e % 64);
        }
        (out, flags)
    }

    /// Evaluator: share of the exponentials, and XOR share of the packed flags.
    pub fn eval(&self, t: &mut Take, s: &Masked, level: &Masked) -> Result<(Vec<u64>, Vec<u64>), Error> {
        let halves = t.halves(&self.dealt())?;
        let mut out = vec![0; self.len()];
        let mut flags = vec![0u64; self.flag_len()];
        t.divide(
            self.flag_len(),
            [&mut out, &mut flags],
            |i| [64 * i, i],
            |blocks, [out, flags]| {
                let scores = 64 * blocks.start..(64 * blocks.end).min(self.len());
                self.eval_some(scores, &halves, s, level, (out, flags));
            },
        );
        Ok((out, flags))
    }

    /// Some scores, from the first of a word's flags on.
    fn eval_some(
        &self,
        scores: Range<usize>,
        halves: &[Half],
        s: &Masked,
        level: &Masked,
        (out, flags): (&mut [u64], &mut [u64]),
    ) {
        let (n, windows) = (self.grid.len(), self.windows());
        let (mut at, mut x, mut factors) = (0, [0; 64], [0; 64]);
        for ((i, &h), halves) in self.heads.iter().enumerate().zip(halves.chunks_exact(2)) {
            // Those of this head, and the first of the row that they begin in.
            let own = scores.start.max(i * n)..scores.end.min((i + 1) * n);
            if own.is_empty() {
                continue;
            }
            let mut e = own.start - i * n;
            let (wb, spared) = (self.window_bits(h), self.spared(&h));
            let (words, _) = self.flags(h);
            let (mut tables, mut dealt_flags) = (halves[0].from(e * windows), halves[1].from(e * words));
            // As for the whole head: what few and what many are made by may differ in the last bit.
            let low = match self.public_tables(i) {
                Some(powers) => Public::Tables(Box::new(powers)),
                None => Public::Each(Powers::new(self.place(h), h.ulp, self.f_pub, n)),
            };
            for (row, first) in self.grid.starts() {
                let end = (i * n + first + self.grid.row_len(row)).min(own.end);
                let offset = self.offset(self.headroom(h), level.m[i * self.grid.rows + row], h);
                // None of a row that ends before.
                for m in s.m.get(i * n + e..end).unwrap_or_default().chunks(64) {
                    let (x, factors) = (&mut x[..m.len()], &mut factors[..m.len()]);
                    x.iter_mut().zip(m).for_each(|(x, m)| *x = m.wrapping_add(offset) & mask(self.k));
                    low.fill(x, factors);
                    for (x, factor) in x.iter().zip(factors) {
                        let window = (x >> wb) as usize;
                        let entry = tables.pick(e, windows, window & (windows - 1));
                        out[at] = (entry << spared).wrapping_mul(*factor) & mask(self.k_out);
                        let bit = dealt_flags.pick(e, words, window / 64) >> (window % 64) & 1;
                        flags[at / 64] |= bit << (at % 64);
                        (at, e) = (at + 1, e + 1);
                    }
                }
            }
        }
    }
}

/// `(1 - flag) round(x / 2^shift)` into another ring; `flag` is a masked bit per element.
///
/// `1 - (c ^ r) = (1 - c) + (2c - 1) r`, so besides the rescale's carry and top bit `B` the dealer deals `r`, `rA` and `rB`, where
/// `A` is what both evaluators' own halves make, less the carry's part: nothing is left where a value is not kept.
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

    #[inline(always)]
    fn round(&self, v: u64) -> u64 {
        (v + (1 << self.shift >> 1)) >> self.shift
    }

    /// What is dealt.
    pub fn dealt(&self) -> Vec<Dealt> {
        let (k, b) = (self.k_out, self.k_bit());
        [b, b, k, k, b].map(|k| (self.len, k)).to_vec()
    }

    /// What is added where a sum left its ring.
    fn wrap(&self) -> u64 {
        1u64.checked_shl(self.k_in - self.shift).unwrap_or(0)
    }

    /// Dealer.
    pub fn deal(&self, d: &mut Deal, lx: Halves, lf: &[u64]) -> Result<(), Error> {
        let mut tensors = d.tensors(&self.dealt())?;
        for (at, f) in (0..self.len).step_by(64).zip(lf) {
            let l = lx.part(at..(at + 64).min(self.len));
            let n = l.sum.len();
            let mut parts = [[0; 64]; 5];
            vector::run(Parts { g: self, l, flags: *f, parts: &mut parts });
            for (t, part) in tensors.iter_mut().zip(&parts) {
                t.room(d, n).copy_from_slice(&part[..n]);
            }
        }
        tensors.into_iter().for_each(|t| t.end(d));
        Ok(())
    }

    /// Meaning in the clear, in units.
    pub fn plain(&self, x: &[f64], flag: &[u64]) -> Vec<f64> {
        let scale = 2f64.powi(-(self.shift as i32));
        let value = |(i, x): (usize, &f64)| if flag[i / 64] >> (i % 64) & 1 == 1 { 0.0 } else { x * scale };
        x.iter().enumerate().map(value).collect()
    }

    /// Evaluator: share of the kept values.
    pub fn eval(&self, t: &mut Take, x: &Masked, flag: &Masked) -> Result<Vec<u64>, Error> {
        let halves = t.halves(&self.dealt())?;
        let lead = u64::from(t.leads());
        let mut y = vec![0; self.len];
        t.divide(
            self.len.div_ceil(64),
            [&mut y],
            |i| [64 * i],
            |blocks, [y]| {
                let mut halves = super::from(&halves, 64 * blocks.start);
                for (i, y) in blocks.zip(y.chunks_mut(64)) {
                    let [m, l] = [&x.m, &x.l].map(|words| &words[64 * i..][..y.len()]);
                    let mut dealt = halves.iter_mut().map(|h| h.next(m.len()));
                    let dealt = std::array::from_fn(|_| dealt.next().unwrap_or_default());
                    vector::run(Keep { g: self, lead, m, l, flags: flag.m[i], dealt, y });
                }
            },
        );
        Ok(y)
    }
}

/// What is dealt of up to 64 elements, whose flags' masks are one word.
struct Parts<'a> {
    g: &'a FlagRescale,
    l: Halves<'a>,
    flags: u64,
    parts: &'a mut [[u64; 64]; 5],
}

impl Kernel for Parts<'_> {
    #[inline(always)]
    fn run(self) {
        let Parts { g, l, flags, parts: [carry, top, r, ra, rb] } = self;
        let wrap = g.wrap();
        for (i, (l, first)) in l.sum.iter().zip(l.first).enumerate().take(64) {
            let (c, b) = (u64::from(l < first), l >> (g.k_in - 1));
            let second = (l.wrapping_sub(*first)) & mask(g.k_in);
            let a = g.round(*first).wrapping_add(g.round(second)).wrapping_sub(c * wrap);
            let bit = flags >> i & 1;
            (carry[i], top[i], r[i], ra[i], rb[i]) = (c, b, bit, a.wrapping_mul(bit), b * bit);
        }
    }
}

/// Up to 64 elements, whose flags are one word.
struct Keep<'a> {
    g: &'a FlagRescale,
    lead: u64,
    m: &'a [u64],
    l: &'a [u64],
    flags: u64,
    dealt: [&'a [u64]; 5],
    y: &'a mut [u64],
}

impl Kernel for Keep<'_> {
    #[inline(always)]
    fn run(self) {
        let Keep { g, lead, m, l, flags, dealt: [carry, b, r, ra, rb], y } = self;
        let quarter = 1u64 << (g.k_in - 2);
        let wrap = g.wrap();
        let (keep_in, keep) = (mask(g.k_in), mask(g.k_out));
        let below = quarter >> g.shift;
        let n = y.len();
        let (m, l, carry, b, r, ra, rb) = (&m[..n], &l[..n], &carry[..n], &b[..n], &r[..n], &ra[..n], &rb[..n]);
        for i in 0..n {
            let m = m[i].wrapping_add(quarter) & keep_in;
            let uw = wrap * (1 - (m >> (g.k_in - 1)));
            let public = g.round(m).wrapping_sub(below);
            let c = flags >> i & 1;
            let own = g.round(l[i]).wrapping_sub(wrap.wrapping_mul(carry[i]));
            let kept = (public * lead).wrapping_sub(own).wrapping_add(uw.wrapping_mul(b[i]));
            let gated = r[i].wrapping_mul(public).wrapping_sub(ra[i]).wrapping_add(uw.wrapping_mul(rb[i]));
            let v = (1 - c).wrapping_mul(kept).wrapping_add((2 * c).wrapping_sub(1).wrapping_mul(gated));
            y[i] = v & keep;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::local::Truncate;
    use super::super::testing::{World, add, masked};
    use super::*;
    use crate::ring::signed;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn exponentials_of_the_whole_range_are_right_or_flagged(
            // From 23 on by tables.
            tokens in prop_oneof![4 => 1usize..8, 1 => 23usize..26],
            // The planner's steps are of 2 to 6 powers of two.
            heads in prop::collection::vec((6u32..=11, 2.0f64..6.0), 1..3),
            (level, window_steps) in (0.0f64..1.0, 2u32..=3),
            seed in any::<u64>(),
        ) {
            let k = 28;
            let mut w = World::seeded(seed);
            let n = tokens * tokens;
            // Wide ones, whose last is half of the range, are for steps of three at least.
            let step = |step: f64| if window_steps == 2 { step } else { 3.0 + (step - 2.0) / 4.0 };
            let heads: Vec<Head> =
                heads.into_iter().map(|(level_bits, s)| (level_bits, step(s))).map(|(level_bits, step)| Head { levels: Levels { first: (level_bits > 7) as u32, ..Levels::all(level_bits) }, ulp: step * 2f64.powi(level_bits as i32 - k as i32) }).collect();
            let (mut x, mut bound) = (w.edges(k, heads.len() * n), vec![]);
            let mut levels = w.edges(12, heads.len() * tokens);
            for (i, h) in heads.iter().enumerate() {
                let step = 1i64 << (k - h.levels.bits);
                let count = 8 + (level * ((1 << h.levels.bits) - 12) as f64) as i64;
                // Counted from where a maximum may be, modulo the ring of counts.
                let counted = (count as u64).wrapping_sub(h.levels.below()) & mask(12);
                levels[i * tokens..][..tokens].iter_mut().for_each(|[c, ..]| *c = counted);
                // A step of headroom above the level count; scores from a step below it to the lower end of the range.
                bound.push((count + 1) * step - (1 << (k - 1)));
                let room = (count - 4) * step;
                for (j, [x, ..]) in x[i * n..][..n].iter_mut().enumerate() {
                    let below = if j % 2 == 0 { *x as i64 % room } else { (*x as i64 % (12 * step)).min(room) };
                    *x = (bound[i] - step - below) as u64 & mask(k);
                }
            }
            let ((x, ls, es), (_, ll, el)) = (masked(&x, k, false), masked(&levels, 12, false));
            // As fine as the planner makes it, and half as much.
            let shift = widest(&heads, k, window_steps) + 6;
            let k_out = 19 + shift + 2;
            let g = Exp { grid: Grid::square(tokens), heads, k, window_steps, k_out, f_pub: 8, f_deal: 11 + shift as i32 };
            let s = w.run(&g.dealt(), |d| g.deal(d, &ls, &ll), |t, i| g.eval(t, &es[i], &el[i]));
            let [(e1, f1), (e2, f2)] = s;
            let flags: Vec<u64> = f1.iter().zip(&f2).map(|(a, b)| a ^ b).collect();
            // Opened with two bits below the unit, as the planner does, or with all.
            let spare = if seed % 2 == 0 { 2 } else { shift };
            let (mut e, mut k_in) = ([e1, e2], k_out);
            if spare < shift {
                let t = Truncate { k: k_out, shift: shift - spare, raise: true };
                e.iter_mut().enumerate().for_each(|(i, e)| t.apply(e, i == 0));
                k_in = k_out - t.shift;
            }
            let e: Vec<u64> = e[0].iter().zip(&e[1]).map(|(a, b)| a.wrapping_add(*b) & mask(k_in)).collect();
            let r = FlagRescale { len: e.len(), shift: spare, k_in, k_out: 40 };
            let ((le, ee), (lf, ef)) = (w.mask(&e, k_in), w.mask_bits(&flags));
            let s = w.run(&r.dealt(), |d| r.deal(d, Halves { sum: &le, first: &ee[0].l }, &lf), |t, i| r.eval(t, &ee[i], &ef[i]));
            for (at, (x, y)) in x.iter().zip(add(&s, 40)).enumerate() {
                let want = libm::exp2((signed(*x, k) - bound[at / n]) as f64 * g.heads[at / n].ulp + 19.0 - BELOW);
                let err = (y as f64 - want).abs();
                // Half a unit of the 8-bit public factor, and what a raised flag may drop.
                prop_assert!(err <= 6.0 + 2.1e-3 * want, "{} for {}", y, want);
            }
        }

        // That parts give what the whole does is checked wherever a gate is run.
        #[test]
        fn parts_may_begin_in_any_row_of_any_grid(
            (rows, past, causal) in (prop_oneof![4 => 1usize..14, 1 => 23usize..34], 0usize..8, any::<bool>()),
            level_bits in prop::collection::vec(6u32..=9, 1..4),
            seed in any::<u64>(),
        ) {
            let mut w = World::seeded(seed);
            let grid = if causal { Grid::causal(past, rows) } else { Grid::square(rows) };
            let heads: Vec<Head> = level_bits.into_iter().map(|level_bits| Head { levels: Levels::all(level_bits), ulp: 2f64.powi(-20) }).collect();
            let ((_, ls, es), (_, ll, el)) =
                (masked(&w.edges(28, heads.len() * grid.len()), 28, false), masked(&w.edges(12, heads.len() * rows), 12, false));
            let g = Exp { grid, heads, k: 28, window_steps: 2, k_out: 40, f_pub: 8, f_deal: 11 };
            w.run(&g.dealt(), |d| g.deal(d, &ls, &ll), |t, i| g.eval(t, &es[i], &el[i]));
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
            let s = w.run(&g.dealt(), |d| g.deal(d, Halves { sum: &lx, first: &ex[0].l }, &lf), |t, i| g.eval(t, &ex[i], &ef[i]));
            for (i, y) in add(&s, k_out).into_iter().enumerate() {
                if flags[i / 64] >> (i % 64) & 1 == 1 {
                    prop_assert_eq!(y, 0);
                    continue;
                }
                let x = signed(x[i], k_in);
                let fraction = (x - (x >> shift << shift)) as f64 / 2f64.powi(shift as i32);
                let error = signed((y - (x >> shift)) as u64, k_out) as f64 - fraction;
                prop_assert!(error.abs() <= 1.5, "{} ulp", error);
            }
        }
    }
}
