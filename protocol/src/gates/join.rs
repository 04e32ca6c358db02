//! A function put together from its series inside an interval and its asymptotes beyond: `x` above and 0 below, as those of
//! GELU and SiLU. With the bits of [`super::tails`], `y = above x + inside (x / 2 + s)` for the series `s` of the even part.
//!
//! With `U = x / 2 + s` and bits opened as `c = b ^ r`, `b = c + (1 - 2c) r`, so `y` is linear in `x`, `U`, `r x` and `r' U`.
//! Each of `x`, `x / 2` and `s` is brought to the result's scale and ring as [`super::rescale`] does it: a public part, less
//! what either evaluator makes of its half of the mask, plus what wrapped: the halves' carry, and where the public part says so
//! the mask's top bit. The dealer deals carries, top bits and bits `r`, and the products of each `r` with what belongs to it,
//! the sum of both halves' parts among them. Evaluators see what they open, `x`, `s` and the two bits
//! under masks of their own; which of the three cases a value is in decides nothing that they do.

use std::sync::Arc;

use super::rescale::{self, Scale};
use super::{Deal, Dealt, Halves, Masked, Take, Width, scaled};
use crate::Error;
use crate::ring::mask;
use crate::vector::{self, Kernel};

/// Joins of a masked `rows x mult.len()` tensor with the masked series and bits of its elements.
#[derive(Clone, Debug)]
pub struct Join {
    /// Elements.
    pub len: usize,
    /// Per column: the scale of `x` is `mult / 2^shift`.
    pub mult: Arc<Vec<i64>>,
    /// Common binary exponent of the scales.
    pub shift: u32,
    /// Ring of `x`; `|x| < 2^(k_in - 2)`.
    pub k_in: u32,
    /// Ring of the series; `|s| < 2^(k_series - 2)`.
    pub k_series: u32,
    /// log2 of the series' scale over the result's.
    pub drop: u32,
    /// Ring of the result.
    pub k_out: u32,
}

/// Dealt tensors, in this order: of both masks their carries and their top bits; the bit `r` of "above" and its products;
/// that of "inside" and its products.
const DEALT: usize = 11;

impl Join {
    /// Binary exponents of the scales of `x` and of `x / 2`.
    fn shifts(&self) -> [u32; 2] {
        [self.shift, self.shift + 1]
    }

    /// Of each column, by either scale.
    fn columns(&self, of: impl Fn(i64, u32) -> u64) -> [Vec<u64>; 2] {
        self.shifts().map(|shift| self.mult.iter().map(|mult| of(*mult, shift)).collect())
    }

    /// What a wrapped mask adds to `x` and to `x / 2`.
    pub fn wraps(&self) -> [Vec<u64>; 2] {
        self.columns(|mult, shift| rescale::wrap(mult, shift, self.k_in, self.k_out))
    }

    /// What a quarter of the ring of `x` makes of `x` and of `x / 2`, which is added before scaling.
    pub fn quarters(&self) -> [Vec<u64>; 2] {
        self.columns(|mult, shift| scaled(1 << (self.k_in - 2), mult, shift))
    }

    /// What a wrapped mask adds to the series.
    pub fn series_wrap(&self) -> u64 {
        1u64.checked_shl(self.k_series - self.drop).unwrap_or(0)
    }

    /// What is dealt.
    pub fn dealt(&self) -> Vec<Dealt> {
        let ring = |shift| rescale::bit_ring(&self.mult, shift, self.k_in, self.k_out);
        let [whole, half] = self.shifts().map(ring);
        let (k, b) = (self.k_out, whole.max(half));
        let s = self.k_out.saturating_sub(self.k_series - self.drop).max(1);
        let rings: [u32; DEALT] = [b, s, b, s, k, k, b, k, k, b, s];
        rings.map(|k| (self.len, k)).to_vec()
    }

    fn widths(&self) -> [Width; 2] {
        self.shifts().map(|shift| Width::of(self.k_in, &self.mult, shift))
    }

    /// `x` and `x / 2` at the result's scale, with their multipliers.
    fn scaled(&self, widths: [Width; 2], x: &Part, mult: &[i64]) -> [Part; 2] {
        let mut y = [[0; 64]; 2];
        for ((y, width), shift) in y.iter_mut().zip(widths).zip(self.shifts()) {
            vector::run(Scale { width, x, mult, shift, y });
        }
        y
    }

    fn dropped(&self, s: u64) -> u64 {
        (s + (1 << self.drop >> 1)) >> self.drop
    }

    /// Dealer, from the masks of `x` and `s` and of both bits.
    pub fn deal(&self, d: &mut Deal, lx: Halves, ls: Halves, above: &[u64], inside: &[u64]) -> Result<(), Error> {
        let mut tensors = d.tensors(&self.dealt())?;
        let (mult, widths) = (super::cycle(&self.mult), self.widths());
        let wraps = self.wraps().map(|w| super::cycle(&w));
        for (i, at) in (0..self.len).step_by(64).enumerate() {
            let n = (self.len - at).min(64);
            let [x, s] = [lx, ls].map(|l| l.part(at..at + n));
            let halves = |l: Halves, k: u32| {
                let (sum, first) = (part(l.sum), part(l.first));
                let second = std::array::from_fn(|i| sum[i].wrapping_sub(first[i]) & mask(k));
                [sum, first, second]
            };
            let (x, s) = (halves(x, self.k_in), halves(s, self.k_series));
            let c = 64 * i % self.mult.len();
            let scaled = [&x[1], &x[2]].map(|half| self.scaled(widths, half, &mult[c..][..64]));
            let wraps = wraps.each_ref().map(|w| &w[c..][..64]);
            let mut parts = [[0; 64]; DEALT];
            let bits = [above[i], inside[i]];
            vector::run(Parts { g: self, x: &x, s: &s, scaled: &scaled, wraps, bits, parts: &mut parts });
            for (t, part) in tensors.iter_mut().zip(&parts) {
                t.room(d, n).copy_from_slice(&part[..n]);
            }
        }
        tensors.into_iter().for_each(|t| t.end(d));
        Ok(())
    }

    /// Meaning in the clear, in units.
    pub fn plain(&self, x: &[f64], s: &[f64], above: &[u64], inside: &[u64]) -> Vec<f64> {
        let (unit, drop) = (libm::exp2(-f64::from(self.shift)), libm::exp2(-f64::from(self.drop)));
        let value = |(e, (x, s)): (usize, (&f64, &f64))| {
            let bit = |b: &[u64]| (b[e / 64] >> (e % 64) & 1) as f64;
            let x = x * (self.mult[e % self.mult.len()] as f64 * unit);
            bit(above) * x + bit(inside) * (x / 2.0 + s * drop)
        };
        x.iter().zip(s).enumerate().map(value).collect()
    }

    /// Evaluator: share of the joined values.
    pub fn eval(
        &self,
        t: &mut Take,
        x: &Masked,
        s: &Masked,
        above: &Masked,
        inside: &Masked,
    ) -> Result<Vec<u64>, Error> {
        let halves = t.halves(&self.dealt())?;
        let quarter = 1u64 << (self.k_in - 2);
        let wraps = self.wraps().map(|w| super::cycle(&w));
        let quarters = self.quarters().map(|q| super::cycle(&q));
        let (mult, widths) = (super::cycle(&self.mult), self.widths());
        let lead = u64::from(t.leads());
        let mut y = vec![0; self.len];
        t.divide(
            self.len.div_ceil(64),
            [&mut y],
            |i| [64 * i],
            |blocks, [y]| {
                let (mut halves, keep) = (super::from(&halves, 64 * blocks.start), mask(self.k_in));
                for (i, y) in blocks.zip(y.chunks_mut(64)) {
                    let (n, c) = (y.len(), 64 * i % self.mult.len());
                    let [m, own_x, s, own_s] = [&x.m, &x.l, &s.m, &s.l].map(|words| &words[64 * i..][..n]);
                    let raised = part(m).map(|m| m.wrapping_add(quarter) & keep);
                    let [scaled, own] = [&raised, &part(own_x)].map(|x| self.scaled(widths, x, &mult[c..][..64]));
                    let own_s = part(own_s);
                    let mut dealt = halves.iter_mut().map(|h| h.next(n));
                    let dealt: [&[u64]; DEALT] = std::array::from_fn(|_| dealt.next().unwrap_or_default());
                    let quarters = quarters.each_ref().map(|q| &q[c..][..n]);
                    let wraps = wraps.each_ref().map(|w| &w[c..][..n]);
                    let bits = [above.m[i], inside.m[i]];
                    let (raised, scaled, own, own_s) = (&raised, &scaled, &own, &own_s);
                    vector::run(Joined {
                        g: self,
                        lead,
                        raised,
                        s,
                        scaled,
                        own,
                        own_s,
                        quarters,
                        wraps,
                        bits,
                        dealt,
                        y,
                    });
                }
            },
        );
        Ok(y)
    }
}

/// Sixty-four words; where there are fewer, the rest is of no account.
type Part = [u64; 64];

fn part(x: &[u64]) -> Part {
    let mut part = [0; 64];
    part[..x.len()].copy_from_slice(x);
    part
}

/// What is dealt of up to 64 elements.
struct Parts<'a> {
    g: &'a Join,
    /// Masks, and both halves.
    x: &'a [Part; 3],
    s: &'a [Part; 3],
    /// Of either half of those of `x`.
    scaled: &'a [[Part; 2]; 2],
    wraps: [&'a [u64]; 2],
    bits: [u64; 2],
    parts: &'a mut [Part; DEALT],
}

impl Kernel for Parts<'_> {
    #[inline(always)]
    fn run(self) {
        let Parts { g, x: [x, x1, _], s: [s, s1, s2], scaled, wraps, bits: [above, inside], parts } = self;
        let [[whole1, half1], [whole2, half2]] = scaled;
        let [x_wrap, u_wrap] = wraps.map(part);
        let bit = |word: u64| std::array::from_fn::<u64, 64, _>(|i| word >> i & 1);
        let (r, q) = (bit(above), bit(inside));
        let carry = |l: &Part, first: &Part| std::array::from_fn::<u64, 64, _>(|i| u64::from(l[i] < first[i]));
        let (c, cs) = (carry(x, x1), carry(s, s1));
        let (b, bs) = (x.map(|x| x >> (g.k_in - 1)), s.map(|s| s >> (g.k_series - 1)));
        let a = std::array::from_fn(|i| whole1[i].wrapping_add(whole2[i]).wrapping_sub(c[i].wrapping_mul(x_wrap[i])));
        let u = std::array::from_fn(|i| {
            let series = g.dropped(s1[i]).wrapping_add(g.dropped(s2[i])).wrapping_sub(cs[i] * g.series_wrap());
            half1[i].wrapping_add(half2[i]).wrapping_sub(c[i].wrapping_mul(u_wrap[i])).wrapping_add(series)
        });
        let times = |x: &Part, r: &Part| std::array::from_fn(|i| x[i] & r[i].wrapping_neg());
        let products = [times(&a, &r), times(&b, &r), times(&u, &q), times(&b, &q), times(&bs, &q)];
        let [ra, rb, qu, qb, qs] = products;
        *parts = [c, cs, b, bs, r, ra, rb, q, qu, qb, qs];
    }
}

/// Up to 64 elements, whose bits are a word each.
struct Joined<'a> {
    g: &'a Join,
    lead: u64,
    raised: &'a Part,
    s: &'a [u64],
    scaled: &'a [Part; 2],
    /// What this evaluator's halves of the masks make.
    own: &'a [Part; 2],
    own_s: &'a Part,
    quarters: [&'a [u64]; 2],
    wraps: [&'a [u64]; 2],
    bits: [u64; 2],
    dealt: [&'a [u64]; DEALT],
    y: &'a mut [u64],
}

impl Kernel for Joined<'_> {
    #[inline(always)]
    fn run(self) {
        let Joined { g, lead, raised, s, scaled, own, own_s, quarters, wraps, bits: [above, inside], dealt, y } = self;
        let ([whole, half], [own_whole, own_half]) = (scaled, own);
        let n = y.len().min(64);
        let [c, cs, b, bs, r, ra, rb, q, qu, qb, qs] = dealt.map(|d| &d[..n]);
        let ([x_quarter, u_quarter], [x_wrap, u_wrap]) = (quarters.map(|q| &q[..n]), wraps.map(|w| &w[..n]));
        let (raised, s, whole, half) = (&raised[..n], &s[..n], &whole[..n], &half[..n]);
        let (own_whole, own_half, own_s) = (&own_whole[..n], &own_half[..n], &own_s[..n]);
        let (keep, keep_series, series_wrap) = (mask(g.k_out), mask(g.k_series), g.series_wrap());
        let series_quarter = 1u64 << (g.k_series - 2);
        // In a place of its own, so that the loop is known not to change what it reads.
        let mut joined = [0; 64];
        for (i, joined) in joined[..n].iter_mut().enumerate() {
            let wrapped = 1 - (raised[i] >> (g.k_in - 1));
            let series = s[i].wrapping_add(series_quarter) & keep_series;
            let (wx, wu) = (wrapped * x_wrap[i], wrapped * u_wrap[i]);
            let ws = (1 - (series >> (g.k_series - 1))) * series_wrap;
            // What is public of x and of U.
            let x = whole[i].wrapping_sub(x_quarter[i]);
            let v = half[i].wrapping_sub(u_quarter[i]);
            let v = v.wrapping_add(g.dropped(series)).wrapping_sub(series_quarter >> g.drop);
            let share = (x * lead).wrapping_sub(own_whole[i]).wrapping_add(x_wrap[i].wrapping_mul(c[i]));
            let share = share.wrapping_add(wx.wrapping_mul(b[i]));
            let share_u = (v * lead).wrapping_sub(own_half[i].wrapping_add(g.dropped(own_s[i])));
            let share_u =
                share_u.wrapping_add(u_wrap[i].wrapping_mul(c[i])).wrapping_add(series_wrap.wrapping_mul(cs[i]));
            let share_u = share_u.wrapping_add(wu.wrapping_mul(b[i])).wrapping_add(ws.wrapping_mul(bs[i]));
            let gated = r[i].wrapping_mul(x).wrapping_sub(ra[i]).wrapping_add(wx.wrapping_mul(rb[i]));
            let gated_u = q[i].wrapping_mul(v).wrapping_sub(qu[i]);
            let gated_u = gated_u.wrapping_add(wu.wrapping_mul(qb[i])).wrapping_add(ws.wrapping_mul(qs[i]));
            // Where a bit is opened as one, what its mask's bit gives counts negative.
            let (above, inside) = ((above >> i & 1).wrapping_neg(), (inside >> i & 1).wrapping_neg());
            let above = (above & share).wrapping_add((gated ^ above).wrapping_sub(above));
            let inside = (inside & share_u).wrapping_add((gated_u ^ inside).wrapping_sub(inside));
            *joined = above.wrapping_add(inside) & keep;
        }
        y.copy_from_slice(&joined[..n]);
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
        fn each_case_gives_its_piece_in_every_ring(
            (rows, k_in, k_series, k_out) in (1usize..50, 4u32..=62, 3u32..=40, 3u32..=64),
            (shift, drop) in (0u32..=100, 0.0f64..1.0),
            mult in prop::collection::vec(0i64..=1 << 27, 1..5),
            seed in any::<u64>(),
        ) {
            let drop = (drop * f64::from(k_series - 2)) as u32;
            let mut w = World::seeded(seed);
            let mut quarter = |k: u32, n: usize| {
                let mut x = w.edges(k, n);
                for [x, ..] in &mut x {
                    let v = signed(*x, k) >> 1;
                    *x = (if v == -(1 << (k - 2)) { v + 1 } else { v }) as u64 & mask(k);
                }
                masked(&x, k, false)
            };
            let n = rows * mult.len();
            let ((x, lx, ex), (s, ls, es)) = (quarter(k_in, n), quarter(k_series, n));
            let words = n.div_ceil(64);
            let (above, la, ea) = masked(&w.edges(64, words), 64, true);
            let (mut inside, ..) = masked(&w.edges(64, words), 64, true);
            inside.iter_mut().zip(&above).for_each(|(i, a)| *i &= !a);
            let (li, ei) = w.mask_bits(&inside);
            let g = Join { len: n, mult: Arc::new(mult), shift, k_in, k_series, drop, k_out };
            let got = w.run(&g.dealt(), |d| g.deal(d, Halves { sum: &lx, first: &ex[0].l }, Halves { sum: &ls, first: &es[0].l }, &la, &li), |t, i| g.eval(t, &ex[i], &es[i], &ea[i], &ei[i]));
            for (e, y) in add(&got, k_out).into_iter().enumerate() {
                let bit = |b: &[u64]| b[e / 64] >> (e % 64) & 1 == 1;
                let exact = i128::from(signed(x[e], k_in)) * i128::from(g.mult[e % g.mult.len()]);
                let series = i128::from(signed(s[e], k_series));
                // Twice the result, in units of 2^-shift and 2^-drop: integers, and what they are off by at most.
                let (twice, units) = match (bit(&above), bit(&inside)) {
                    (true, _) => (vec![(2 * exact, shift)], 3.0),
                    (_, true) => (vec![(exact, shift), (2 * series, drop)], 5.0),
                    _ => (vec![], 0.0),
                };
                let floor: i128 = twice.iter().map(|(v, s)| v >> s).sum();
                let rest: f64 = twice.iter().map(|(v, s)| (v - (v >> s << s)) as f64 / 2f64.powi(*s as i32)).sum();
                let off = signed(y.wrapping_mul(2).wrapping_sub(floor as i64) as u64 & mask(k_out), k_out) as f64 - rest;
                // Where the rest takes it past the ring's end, it is at the other; in the smallest rings anything is within bounds.
                let ring = libm::exp2(f64::from(k_out));
                let off = if off < -ring / 2.0 { off + ring } else { off };
                prop_assert!(off.abs() <= 2.0 * units, "{} units off at {}", off / 2.0, e);
            }
        }
    }
}
