//! `residual`: a layer's accumulators, rescaled onto a masked residual, and the sums of squares of the new residual's rows before
//! it is opened, so that a norm's first two openings are one.
//!
//! With `x` and the accumulators `a` masked, [`super::rescale`] writes `z = round(c' x / 2^s) + round(c a / 2^s)` as `P - D` with
//! `D = A - u W b - u' W' b'`: `P` and the bits `u` are public, `A` and the top bits `b` of both masks are the dealer's. A share of
//! `z`, and so of `D = P - z`, needs the dealt carries and top bits alone, hence
//! `z^2 = 2 P z - P^2 + D^2`, `D^2 = A^2 - u W b (2 A - W) - u' W' b' (2 A - W') + 2 u u' W W' b b'`.
//! Dealt are `sum A^2`, one a row, `b (2 A - W)` in the narrow ring that `W` leaves of it, and the same of the residual's own bits
//! where it is rounded: where it comes at a scale of its own (`c'`), or where `s > 0`.
//!
//! Who sees what: nothing but masked values and shares of functions of their masks, as in every gate.

use std::sync::Arc;

use super::rescale::{Rescale, Terms};
use super::{Bits, Deal, Dealt, Halves, Masked, Subtract, Take, from};
use crate::Error;
use crate::ring::mask;
use crate::vector::{self, Kernel};
use crate::wipe::Wiped;

/// `before(x) + scale(a)`, and the sum over each row of `round((before(x) + scale(a)) / 2^shift)^2`.
#[derive(Clone, Debug)]
pub struct Residual {
    /// From all columns of the accumulators to the residual's unit; its output ring is that of the residual before and after.
    pub scale: Rescale,
    /// To the same from what the residual was before, where that is at another scale.
    pub before: Option<Rescale>,
    /// Bits that are squared without.
    pub shift: u32,
    /// Ring of the sums: the residual's where `shift` is zero.
    pub k_squares: u32,
}

impl Residual {
    fn cols(&self) -> usize {
        self.scale.mult.len()
    }

    /// What makes up the value that is squared: of the accumulators, and of the residual before.
    pub fn parts(&self) -> [Rescale; 2] {
        let of = |g: &Rescale| Rescale { shift: g.shift + self.shift, k_out: self.k_squares, ..g.clone() };
        let same = || {
            let (mult, k_in) = (Arc::new(vec![1; self.cols()]), self.scale.k_out);
            Rescale { mult, shift: 0, k_in, bias: Vec::new(), ..self.scale.clone() }
        };
        [of(&self.scale), self.before.as_ref().map_or_else(|| of(&same()), of)]
    }

    /// Whether the residual before is rounded, so that its own carries and top bits count.
    pub fn rounds_before(&self) -> bool {
        self.shift > 0 || self.before.is_some()
    }

    /// What is dealt: sums of a row's `A^2`; carries, top bits and `b (2 A - W)` of the accumulators' masks; the same of the
    /// residual's, and `b b'`, where they count.
    pub fn dealt(&self) -> Vec<Dealt> {
        let n = self.scale.len();
        let rings = self.parts().map(|part| part.k_bit());
        // Carries and top bits serve the residual and what is squared.
        let shared = rings[0].max(self.scale.k_bit());
        let mut all = vec![(self.scale.rows, self.k_squares), (n, shared), (n, shared), (n, rings[0])];
        if self.rounds_before() {
            let shared = self.before.as_ref().map_or(rings[1], |before| rings[1].max(before.k_bit()));
            all.extend([(n, shared), (n, shared), (n, rings[1])]);
            // Twice the product of both wraps has as many low zeros as leave this.
            let both = (rings[0] + rings[1]).saturating_sub(self.k_squares + 1);
            all.extend((both > 0).then_some((n, both)));
        }
        all
    }

    /// Dealer: masks of the accumulators and of the residual.
    pub fn deal(&self, d: &mut Deal, acc: Halves, x: Halves) -> Result<(), Error> {
        let (n, mut tensors) = (self.cols(), d.tensors(&self.dealt())?);
        let parts = self.parts();
        let terms = parts.each_ref().map(Terms::new);
        let words = || Wiped::new(vec![0; n]);
        let (mut second, mut less, mut both) = (words(), words(), words());
        let mut dealt: [[Wiped<u64>; 3]; 2] = std::array::from_fn(|_| std::array::from_fn(|_| words()));
        for row in 0..self.scale.rows {
            less.fill(0);
            let halves = [acc, x].map(|l| l.part(row * n..(row + 1) * n));
            for (((l, part), terms), [carry, top, _]) in halves.into_iter().zip(&parts).zip(&terms).zip(&mut dealt) {
                vector::run(Bits { l, bits: part.k_in, carry, top });
                vector::run(Second { l, keep: mask(part.k_in), second: &mut second });
                terms.own(l.first, &mut less);
                terms.own(&second, &mut less);
                vector::run(AddTimes { to: &mut less, by: carry, what: &terms.wrap });
            }
            for ([_, top, cross], terms) in dealt.iter_mut().zip(&terms) {
                vector::run(Cross { less: &less, top, wrap: &terms.wrap, cross });
            }
            let [[_, top, _], [_, own, _]] = &dealt;
            both.iter_mut().zip(top.iter()).zip(own.iter()).for_each(|((both, a), b)| *both = a & b);
            let (sums, elements) = tensors.split_at_mut(1);
            sums[0].room(d, 1)[0] = less.iter().fold(0, |sum: u64, v| sum.wrapping_add(v.wrapping_mul(*v)));
            for (tensor, words) in elements.iter_mut().zip(dealt.iter().flatten().chain([&both])) {
                tensor.room(d, n).copy_from_slice(words);
            }
        }
        tensors.into_iter().for_each(|t| t.end(d));
        Ok(())
    }

    /// Meaning in the clear, in units.
    pub fn plain(&self, acc: &[f64], x: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let before = self.before.as_ref().map_or(x.to_vec(), |before| before.plain(x));
        let sum: Vec<f64> = self.scale.plain(acc).iter().zip(before).map(|(a, x)| a + x).collect();
        let unit = libm::exp2(-f64::from(2 * self.shift));
        let squares = sum.chunks_exact(self.cols()).map(|row| row.iter().map(|v| v * v).sum::<f64>() * unit).collect();
        (sum, squares)
    }

    /// Evaluator: shares of the new residual and of its rows' sums of squares.
    pub fn eval(&self, t: &mut Take, acc: &Masked, x: &Masked) -> Result<(Vec<u64>, Vec<u64>), Error> {
        let (n, leads, dealt) = (self.cols(), t.leads(), self.dealt());
        let sum = t.half(self.scale.rows, self.k_squares)?;
        let halves = t.halves(&dealt[1..])?;
        let parts = self.parts();
        let squared = parts.each_ref().map(Terms::new);
        let scales = Scales { squared, whole: Terms::new(&self.scale), before: self.before.as_ref().map(Terms::new) };
        let (mut out, mut sums) = (vec![0; self.scale.len()], vec![0; self.scale.rows]);
        t.divide(
            self.scale.rows,
            [&mut out, &mut sums],
            |row| [row * n, row],
            |rows, [out, sums]| {
                sum.from(rows.start).read(sums);
                let mut halves = from(&halves, rows.start * n);
                let mut room = Room::new(n);
                for (row, (out, sum)) in rows.zip(out.chunks_exact_mut(n).zip(sums)) {
                    let own = [acc, x].map(|v| [&v.m, &v.l].map(|words| &words[row * n..][..n]));
                    let mut next = halves.iter_mut().map(|half| half.next(n));
                    let dealt = std::array::from_fn(|_| next.next().unwrap_or_default());
                    self.row(&scales, leads, own, dealt, &mut room, (out, sum));
                }
            },
        );
        Ok((out, sums))
    }

    /// A row of the residual, and the sum of its squares, which is there but for what this evaluator makes.
    fn row(
        &self,
        Scales { squared: [layer, before], whole, before: whole_before }: &Scales,
        leads: bool,
        [[acc_m, acc_l], [x_m, x_l]]: [[&[u64]; 2]; 2],
        [carry, top, cross, own_carry, own_top, own_cross, both]: [&[u64]; 7],
        Room { p, rounded, w, own_w, z }: &mut Room,
        (out, sum): (&mut [u64], &mut u64),
    ) {
        layer.public(acc_m, p);
        before.public(x_m, rounded);
        vector::run(Add { to: p, what: rounded });
        z.copy_from_slice(p);
        if !leads {
            z.fill(0);
        }
        layer.own(acc_l, z);
        before.own(x_l, z);
        if self.rounds_before() {
            before.wraps(x_m, own_carry, own_top, z);
        }
        layer.wraps(acc_m, carry, top, z);
        layer.wrapped(acc_m, w);
        vector::run(Squares { p, z, leads, sum });
        vector::run(TakeTimes { from: sum, by: w, what: cross });
        if self.rounds_before() {
            before.wrapped(x_m, own_w);
            vector::run(TakeTimes { from: sum, by: own_w, what: own_cross });
            w.iter_mut().zip(&*own_w).for_each(|(w, own)| *w = w.wrapping_mul(*own).wrapping_mul(2).wrapping_neg());
            vector::run(TakeTimes { from: sum, by: w, what: both });
        }
        *sum &= mask(self.k_squares);
        if self.shift == 0 {
            out.copy_from_slice(z);
            return;
        }
        if leads {
            whole.public(acc_m, out);
            match whole_before {
                Some(before) => before.public(x_m, rounded),
                None => rounded.copy_from_slice(x_m),
            }
            vector::run(Add { to: out, what: rounded });
        }
        match whole_before {
            Some(before) => {
                before.own(x_l, out);
                before.wraps(x_m, own_carry, own_top, out);
            }
            None => vector::run(Subtract { words: out, half: x_l, xor: false }),
        }
        whole.own(acc_l, out);
        whole.wraps(acc_m, carry, top, out);
    }
}

/// Terms of both parts of what is squared, and of those of the residual.
struct Scales<'a> {
    squared: [Terms<'a>; 2],
    whole: Terms<'a>,
    before: Option<Terms<'a>>,
}

/// Where an evaluator makes a row: public parts, what wraps, and its share of what is squared.
struct Room {
    p: Vec<u64>,
    rounded: Vec<u64>,
    w: Vec<u64>,
    own_w: Vec<u64>,
    z: Wiped<u64>,
}

impl Room {
    fn new(n: usize) -> Room {
        let [p, rounded, w, own_w] = std::array::from_fn(|_| vec![0; n]);
        Room { p, rounded, w, own_w, z: Wiped::new(vec![0; n]) }
    }
}

/// A mask's second half.
struct Second<'a> {
    l: Halves<'a>,
    keep: u64,
    second: &'a mut [u64],
}

impl Kernel for Second<'_> {
    #[inline(always)]
    fn run(self) {
        let halves = self.l.sum.iter().zip(self.l.first);
        self.second.iter_mut().zip(halves).for_each(|(s, (sum, first))| *s = sum.wrapping_sub(*first) & self.keep);
    }
}

struct Add<'a> {
    to: &'a mut [u64],
    what: &'a [u64],
}

impl Kernel for Add<'_> {
    #[inline(always)]
    fn run(self) {
        self.to.iter_mut().zip(self.what).for_each(|(to, what)| *to = to.wrapping_add(*what));
    }
}

/// Adds what carries are short of.
struct AddTimes<'a> {
    to: &'a mut [u64],
    by: &'a [u64],
    what: &'a [u64],
}

impl Kernel for AddTimes<'_> {
    #[inline(always)]
    fn run(self) {
        let products = self.by.iter().zip(self.what);
        self.to.iter_mut().zip(products).for_each(|(to, (by, what))| *to = to.wrapping_add(by.wrapping_mul(*what)));
    }
}

/// `b (2 A - W)` from `less = -A`.
struct Cross<'a> {
    less: &'a [u64],
    top: &'a [u64],
    wrap: &'a [u64],
    cross: &'a mut [u64],
}

impl Kernel for Cross<'_> {
    #[inline(always)]
    fn run(self) {
        let of = self.less.iter().zip(self.top).zip(self.wrap);
        for (cross, ((less, top), wrap)) in self.cross.iter_mut().zip(of) {
            *cross = (less << 1).wrapping_add(*wrap).wrapping_neg() & top.wrapping_neg();
        }
    }
}

/// Adds `2 P z - P^2`, the latter where this evaluator leads.
struct Squares<'a> {
    p: &'a [u64],
    z: &'a [u64],
    leads: bool,
    sum: &'a mut u64,
}

impl Kernel for Squares<'_> {
    #[inline(always)]
    fn run(self) {
        let less = u64::from(self.leads).wrapping_neg();
        for (p, z) in self.p.iter().zip(self.z) {
            *self.sum = self.sum.wrapping_add(p.wrapping_mul((z << 1).wrapping_sub(p & less)));
        }
    }
}

/// Takes off the sum of products.
struct TakeTimes<'a> {
    from: &'a mut u64,
    by: &'a [u64],
    what: &'a [u64],
}

impl Kernel for TakeTimes<'_> {
    #[inline(always)]
    fn run(self) {
        for (by, what) in self.by.iter().zip(self.what) {
            *self.from = self.from.wrapping_sub(by.wrapping_mul(*what));
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
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn sums_and_their_squares_in_every_ring(
            (rows, cols) in (1usize..4, 1usize..3),
            (k_in, k_x, k_squares) in (4u32..=62, 4u32..=62, 4u32..=64),
            (drop, shift) in (0u32..60, 0u32..12),
            mult in prop::collection::vec(prop_oneof![Just(1i64), -(1i64 << 27)..=1 << 27], 2),
            before in prop::option::of((prop::collection::vec(-(1i64 << 27)..=1 << 27, 2), 0u32..60, 4u32..=62)),
            seed in any::<u64>(),
        ) {
            let shift = shift.min(k_x - 2);
            let k_squares = if shift == 0 { k_x } else { k_squares };
            let mult = Arc::new(mult[..cols].to_vec());
            let scale = Rescale { rows, stride: cols, first: 0, mult, shift: drop, k_in, k_out: k_x, bias: vec![] };
            let before = before.map(|(mult, shift, k_in)| Rescale { mult: Arc::new(mult[..cols].to_vec()), shift, k_in, ..scale.clone() });
            // Rings of the residual before and after.
            let (k_before, k_x) = (before.as_ref().map_or(k_x, |b| b.k_in), k_x);
            let by = |c: usize| before.as_ref().map_or((1, 0), |b| (b.mult[c], b.shift));
            let by: Vec<(i64, u32)> = (0..cols).map(by).collect();
            let g = Residual { scale, before, shift, k_squares };
            let mut w = World::seeded(seed);
            let mut half = |k: u32| {
                let mut x = w.edges(k, rows * cols);
                for [x, ..] in &mut x {
                    let v = signed(*x, k) >> 1;
                    *x = (if v == -(1 << (k - 2)) { v + 1 } else { v }) as u64 & mask(k);
                }
                masked(&x, k, false)
            };
            let ((acc, l_acc, e_acc), (x, l_x, e_x)) = (half(k_in), half(k_before));
            let halves = |sum, first| Halves { sum, first };
            let s = w.run(
                &g.dealt(),
                |d| g.deal(d, halves(&l_acc, &e_acc[0].l), halves(&l_x, &e_x[0].l)),
                |t, i| g.eval(t, &e_acc[i], &e_x[i]),
            );
            let [a, b] = s;
            let (sum, squares) = (add(&[a.0, b.0], k_x), add(&[a.1, b.1], k_squares));
            for (row, squares) in squares.into_iter().enumerate() {
                let mut near = vec![0u64];
                for (c, (by, drop_before)) in by.iter().enumerate() {
                    let at = row * cols + c;
                    let (acc, x) = (i128::from(signed(acc[at], k_in)), i128::from(signed(x[at], k_before)));
                    let (exact, x) = (acc * i128::from(g.scale.mult[c]), x * i128::from(*by));
                    let floor = (x >> drop_before) + (exact >> drop);
                    let off = signed((sum[at] as u64).wrapping_sub(floor as u64), k_x);
                    // Three of either that is rounded, and both floors.
                    prop_assert!((-6..=8).contains(&off), "off by {} units", off);
                    prop_assert!(g.before.is_some() || (-3..=4).contains(&off), "off by {} units", off);
                    // What is squared: the very sum, or both scaled down, each within three units.
                    let squared: Vec<u64> = match shift {
                        0 => vec![sum[at] as u64],
                        _ => {
                            let v = (x >> (drop_before + shift)) + (exact >> (drop + shift));
                            (-6..=8).map(|near| (v + near) as u64).collect()
                        }
                    };
                    near = near.iter().flat_map(|sum| squared.iter().map(|v| sum.wrapping_add(v.wrapping_mul(*v)))).collect();
                }
                prop_assert!(near.iter().any(|v| signed(*v, k_squares) == squares), "squares {} of row {}", squares, row);
            }
        }
    }
}
