//! `rescale`: `y = round(c x)` for a public real `c`, per column, into another ring.
//!
//! With `x' = x + 2^(k-2) >= 0` and `m' = x' + l` mod 2^k, the sum wrapped iff `msb(l) = 1` and `msb(m') = 0`, because
//! `x' < 2^(k-1)`. The mask is the sum of the evaluators' halves less `2^k` where that carries. So
//! `y = R(c m') - R(c 2^(k-2)) - R(c l_1) - R(c l_2) + (carry + wrap) R(c 2^k)`, exact to 3 ulp for `|x| < 2^(k-2)`: four terms
//! are rounded once, the last may count twice. Either evaluator computes what is made of its own half.
//! Dealt: the bits `carry` and `msb(l)`, in a ring as narrow as the power of two in `R(c 2^k)` allows.

use std::sync::Arc;

use super::{Deal, Dealt, Halves, Masked, Take, Width, scaled_as};
use crate::Error;
use crate::ring::mask;
use crate::vector::{self, Kernel};

/// Largest binary exponent of scales.
pub const MOST_SHIFT: u32 = 100;

/// Rescales columns `first .. first + mult.len()` of a `rows x stride` masked tensor.
#[derive(Clone, Debug)]
pub struct Rescale {
    /// Rows of input and output.
    pub rows: usize,
    /// Columns of the input.
    pub stride: usize,
    /// First input column read.
    pub first: usize,
    /// Per output column: the scale is `mult / 2^shift`.
    pub mult: Arc<Vec<i64>>,
    /// Common binary exponent of the scales, at most [`MOST_SHIFT`].
    pub shift: u32,
    /// Ring of the input; `|x| < 2^(k_in - 2)`.
    pub k_in: u32,
    /// Ring of the output.
    pub k_out: u32,
    /// Per column, added to the result; empty for none.
    pub bias: Vec<i64>,
}

impl Rescale {
    /// Of each column, what a wrap around the input's ring adds.
    pub fn wraps(&self) -> Vec<u64> {
        self.mult.iter().map(|mult| wrap(*mult, self.shift, self.k_in, self.k_out)).collect()
    }

    /// Of each column, what offsets the quarter of the ring that is added before scaling, and the bias.
    pub fn constants(&self) -> Vec<u64> {
        let (quarter, width) = (1u64 << (self.k_in - 2), self.width());
        let bias = |c: usize| self.bias.get(c).copied().unwrap_or(0) as u64;
        let constant = |(c, mult): (usize, &i64)| bias(c).wrapping_sub(scaled_as(width, quarter, *mult, self.shift));
        self.mult.iter().enumerate().map(constant).collect()
    }

    /// Bits of the ring in which `msb(l)` is dealt.
    pub(super) fn k_bit(&self) -> u32 {
        bit_ring(&self.mult, self.shift, self.k_in, self.k_out)
    }

    /// Output elements.
    pub fn len(&self) -> usize {
        self.rows * self.mult.len()
    }

    /// Whether there is nothing to rescale.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What is dealt.
    pub fn dealt(&self) -> Vec<Dealt> {
        vec![(self.len(), self.k_bit()); 2]
    }

    /// Dealer: of the whole input's masks.
    pub fn deal(&self, d: &mut Deal, lam: Halves) -> Result<(), Error> {
        let columns = (self.first, self.mult.len());
        lam.deal_bits(d, (self.rows, self.stride), columns, (self.k_in, self.k_bit()))
    }

    fn width(&self) -> Width {
        Width::of(self.k_in, &self.mult, self.shift)
    }

    /// Meaning in the clear, in units.
    pub fn plain(&self, x: &[f64]) -> Vec<f64> {
        let scale = 2f64.powi(-(self.shift as i32));
        let row = |row: &[f64]| -> Vec<f64> {
            let column = |(c, x): (usize, &f64)| {
                x * (self.mult[c] as f64 * scale) + self.bias.get(c).copied().unwrap_or(0) as f64
            };
            row[self.first..][..self.mult.len()].iter().enumerate().map(column).collect()
        };
        x.chunks_exact(self.stride).flat_map(row).collect()
    }

    /// Evaluator: share of the rescaled columns.
    pub fn eval(&self, t: &mut Take, x: &Masked) -> Result<Vec<u64>, Error> {
        let carry = t.half(self.len(), self.k_bit())?;
        let top = t.half(self.len(), self.k_bit())?;
        let (n, leads) = (self.mult.len(), t.leads());
        let terms = Terms::new(self);
        let mut y = vec![0; self.len()];
        t.divide(
            self.rows,
            [&mut y],
            |row| [row * n],
            |rows, [y]| {
                let [mut carry, mut top] = [&carry, &top].map(|half| half.from(rows.start * n));
                let [m, l] = [&x.m, &x.l].map(|words| words[rows.start * self.stride..].chunks_exact(self.stride));
                for ((m, l), y) in m.zip(l).zip(y.chunks_exact_mut(n)) {
                    let [m, l] = [m, l].map(|row| &row[self.first..][..n]);
                    if leads {
                        terms.public(m, y);
                    }
                    terms.own(l, y);
                    terms.wraps(m, carry.next(n), top.next(n), y);
                }
            },
        );
        Ok(y)
    }
}

/// The terms of a row's rescaled columns, see the module's first lines.
pub(super) struct Terms<'a> {
    g: &'a Rescale,
    width: Width,
    /// Of each column, what a wrap adds.
    pub wrap: Vec<u64>,
    constant: Vec<u64>,
}

impl<'a> Terms<'a> {
    pub fn new(g: &'a Rescale) -> Self {
        Terms { g, width: g.width(), wrap: g.wraps(), constant: g.constants() }
    }

    /// `y = R(c m') - R(c 2^(k-2))`, and the bias.
    pub fn public(&self, m: &[u64], y: &mut [u64]) {
        vector::run(Public { g: self.g, width: self.width, m, constant: &self.constant, y });
    }

    /// Takes `R(c l)` off.
    pub fn own(&self, l: &[u64], y: &mut [u64]) {
        vector::run(Own { g: self.g, width: self.width, l, y });
    }

    /// What the wrap adds where the mask's top bit is set.
    pub fn wrapped(&self, m: &[u64], y: &mut [u64]) {
        vector::run(Wrapped { k_in: self.g.k_in, m, wrap: &self.wrap, y });
    }

    /// Adds `(carry + wrap) R(c 2^k)`.
    pub fn wraps(&self, m: &[u64], carry: &[u64], top: &[u64], y: &mut [u64]) {
        vector::run(Wraps { g: self.g, m, carry, top, wrap: &self.wrap, y });
    }
}

/// Bits of the ring in which a bit is dealt that is multiplied by what a wrap of any column adds.
pub(super) fn bit_ring(mult: &[i64], shift: u32, k_in: u32, k_out: u32) -> u32 {
    let any = match k_in.checked_sub(shift) {
        // No wrap is rounded: each is its multiplier with as many zeros more.
        Some(more) => mult.iter().fold(0, |any, m| any | *m as u64).checked_shl(more).unwrap_or(0),
        None => mult.iter().fold(0, |any, m| any | wrap(*m, shift, k_in, k_out)),
    };
    (k_out - any.trailing_zeros().min(k_out)).max(1)
}

/// `round(2^k_in mult / 2^shift)`: what a wrap around the input's ring adds.
pub(super) fn wrap(mult: i64, shift: u32, k_in: u32, k_out: u32) -> u64 {
    if let Some(more) = k_in.checked_sub(shift) {
        return (mult as u64).checked_shl(more).unwrap_or(0) & mask(k_out);
    }
    // 2^k_in does not fit the unsigned argument of `scaled` for k_in = 64, hence the i128 here.
    let p = i128::from(mult) << k_in;
    ((p + (1i128 << (shift - 1))) >> shift) as u64 & mask(k_out)
}

/// `y = scaled(x)`, column by column.
pub(super) struct Scale<'a> {
    pub width: Width,
    pub x: &'a [u64],
    pub mult: &'a [i64],
    pub shift: u32,
    pub y: &'a mut [u64],
}

impl Kernel for Scale<'_> {
    #[inline(always)]
    fn run(self) {
        let Scale { width, x, mult, shift, y } = self;
        // A loop for each width, so that none is chosen within.
        let each = y.iter_mut().zip(x).zip(mult);
        match width {
            Width::One => each.for_each(|((y, x), mu)| *y = scaled_as(Width::One, *x, *mu, shift)),
            Width::Two => each.for_each(|((y, x), mu)| *y = scaled_as(Width::Two, *x, *mu, shift)),
            Width::Wide => each.for_each(|((y, x), mu)| *y = scaled_as(Width::Wide, *x, *mu, shift)),
        }
    }
}

/// The part of a row that both evaluators could compute.
struct Public<'a> {
    g: &'a Rescale,
    width: Width,
    m: &'a [u64],
    constant: &'a [u64],
    y: &'a mut [u64],
}

impl Kernel for Public<'_> {
    #[inline(always)]
    fn run(self) {
        let Public { g, width, m, constant, y } = self;
        let (keep, quarter) = (mask(g.k_in), 1u64 << (g.k_in - 2));
        y.iter_mut().zip(m).for_each(|(y, m)| *y = m.wrapping_add(quarter) & keep);
        let each = y.iter_mut().zip(&*g.mult).zip(constant);
        let shift = g.shift;
        match width {
            Width::One => each.for_each(|((y, mu), c)| *y = scaled_as(Width::One, *y, *mu, shift).wrapping_add(*c)),
            Width::Two => each.for_each(|((y, mu), c)| *y = scaled_as(Width::Two, *y, *mu, shift).wrapping_add(*c)),
            Width::Wide => each.for_each(|((y, mu), c)| *y = scaled_as(Width::Wide, *y, *mu, shift).wrapping_add(*c)),
        }
    }
}

/// Takes off what an evaluator's own half makes.
struct Own<'a> {
    g: &'a Rescale,
    width: Width,
    l: &'a [u64],
    y: &'a mut [u64],
}

impl Kernel for Own<'_> {
    #[inline(always)]
    fn run(self) {
        let Own { g, width, l, y } = self;
        let (each, shift) = (y.iter_mut().zip(l).zip(&*g.mult), g.shift);
        match width {
            Width::One => each.for_each(|((y, l), mu)| *y = y.wrapping_sub(scaled_as(Width::One, *l, *mu, shift))),
            Width::Two => each.for_each(|((y, l), mu)| *y = y.wrapping_sub(scaled_as(Width::Two, *l, *mu, shift))),
            Width::Wide => each.for_each(|((y, l), mu)| *y = y.wrapping_sub(scaled_as(Width::Wide, *l, *mu, shift))),
        }
    }
}

/// See [`Terms::wrapped`].
struct Wrapped<'a> {
    k_in: u32,
    m: &'a [u64],
    wrap: &'a [u64],
    y: &'a mut [u64],
}

impl Kernel for Wrapped<'_> {
    #[inline(always)]
    fn run(self) {
        let (top, quarter) = (self.k_in - 1, 1u64 << (self.k_in - 2));
        for (y, (m, wrap)) in self.y.iter_mut().zip(self.m.iter().zip(self.wrap)) {
            *y = (!(m.wrapping_add(quarter) >> top) & 1).wrapping_mul(*wrap);
        }
    }
}

/// Adds what sums that left their ring are short of.
struct Wraps<'a> {
    g: &'a Rescale,
    m: &'a [u64],
    carry: &'a [u64],
    top: &'a [u64],
    wrap: &'a [u64],
    y: &'a mut [u64],
}

impl Kernel for Wraps<'_> {
    #[inline(always)]
    fn run(self) {
        let (top, quarter, keep) = (self.g.k_in - 1, 1u64 << (self.g.k_in - 2), mask(self.g.k_out));
        let dealt = self.carry.iter().zip(self.top).zip(self.wrap);
        for ((y, m), ((c, b), wrap)) in self.y.iter_mut().zip(self.m).zip(dealt) {
            let u = !(m.wrapping_add(quarter) >> top) & 1;
            *y = y.wrapping_add((u * b).wrapping_add(*c).wrapping_mul(*wrap)) & keep;
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
        fn within_three_ulp_up_to_the_range_edge_in_every_ring(
            (rows, cols, first) in (1usize..4, 1usize..4, 0usize..3),
            (k_in, k_out, shift) in (4u32..=63, 3u32..=64, 0u32..=100),
            mult in prop::collection::vec(-(1i64 << 27)..=1 << 27, 3),
            bias in prop::collection::vec(any::<i32>(), 3),
            seed in any::<u64>(),
        ) {
            let stride = first + cols + 1;
            let mut w = World::seeded(seed);
            let mut x = w.edges(k_in, rows * stride);
            for [x, ..] in &mut x {
                // The proven range is half of the signed one, less its lower end.
                let v = signed(*x, k_in) >> 1;
                *x = (if v == -(1 << (k_in - 2)) { v + 1 } else { v }) as u64 & mask(k_in);
            }
            let (x, lam, e) = masked(&x, k_in, false);
            let bias: Vec<i64> = bias[..cols].iter().map(|b| i64::from(*b)).collect();
            let g = Rescale { rows, stride, first, mult: Arc::new(mult[..cols].to_vec()), shift, k_in, k_out, bias };
            let s = w.run(&g.dealt(), |d| g.deal(d, Halves { sum: &lam, first: &e[0].l }), |t, i| g.eval(t, &e[i]));
            for (at, y) in add(&s, k_out).into_iter().enumerate() {
                let (row, c) = (at / cols, at % cols);
                let exact = i128::from(signed(x[row * stride + first + c], k_in)) * i128::from(mult[c]);
                let floor = (exact >> shift) + i128::from(g.bias[c]);
                let fraction = (exact - (exact >> shift << shift)) as f64 / 2f64.powi(shift as i32);
                let error = signed((y as u64).wrapping_sub(floor as u64), k_out) as f64 - fraction;
                prop_assert!(error.abs() <= 3.0, "{} ulp at {}", error, at);
            }
        }
    }
}
