//! What an evaluator does with its share alone: no message, nothing dealt, nothing opened.
//!
//! Truncation of shares is exact where the ring loses as many bits as the value. With `x = a + b mod 2^k`, each evaluator
//! computes `(share + 2^(s-1)) >> s`; these add to `x / 2^s + e` modulo `2^(k-s)` with `-1 < e <= 1`, for every `x` and every
//! sharing: what the sum wrapped by is a multiple of `2^k`, hence of `2^(k-s)` after the shift, and what is left are two
//! remainders below `2^s`. (Where the ring stays as wide, as in SecureML's truncation, the wrap is off by `2^(k-s)` with a
//! probability that grows with the value.) So a share is never opened, nor multiplied by weights, in more bits than what
//! reads it resolves.
//!
//! What is opened then is often rescaled by a power of two, a few bits. Rounding half up, once of the public part and once of
//! each own half taken off, is then half of an input's unit down on average; truncation for such a reader adds that half.
//!
//! Who sees what: nobody anything.

use super::parts::Parts;
use crate::ring::mask;
use crate::vector::{self, Kernel};

/// `x / 2^shift`, or half of a unit more, in a ring of `k - shift` bits, to less than a unit or just one.
#[derive(Clone, Copy, Debug)]
pub struct Truncate {
    /// Ring of the input.
    pub k: u32,
    /// Bits that are dropped of values and ring, at least one and fewer than there are.
    pub shift: u32,
    /// Whether half of a unit is added.
    pub raise: bool,
}

impl Truncate {
    /// Meaning in the clear, in units: without what is added for a reader that takes it off.
    pub fn plain(&self, x: &[f64]) -> Vec<f64> {
        let unit = libm::exp2(-f64::from(self.shift));
        x.iter().map(|x| x * unit).collect()
    }

    /// Evaluator: its share, which may have bits above the ring, becomes one of the result.
    pub fn apply(&self, x: &mut [u64], leads: bool) {
        // Both evaluators' are half of a unit each.
        let offset = 1u64 << (self.shift - 1) << u32::from(leads && self.raise);
        vector::run(Shift { g: self, offset, x });
    }
}

struct Shift<'a> {
    g: &'a Truncate,
    offset: u64,
    x: &'a mut [u64],
}

impl Kernel for Shift<'_> {
    #[inline(always)]
    fn run(self) {
        let (offset, keep, shift) = (self.offset, mask(self.g.k), self.g.shift);
        self.x.iter_mut().for_each(|x| *x = (x.wrapping_add(offset) & keep) >> shift);
    }
}

/// `gain[c] x[c] - sum_i mean[i] x[i] + bias[c]` of each row: a layer norm's gain and shift in integers, less the mean of
/// what they give where that is wanted.
#[derive(Clone, Debug)]
pub struct Gain {
    /// Ring of input and output.
    pub k: u32,
    /// Per column, in units of its own.
    pub gain: Vec<i64>,
    /// In the same units; empty for none.
    pub mean: Vec<i64>,
    /// In units of the output.
    pub bias: Vec<i64>,
}

impl Gain {
    /// Meaning in the clear, in units.
    pub fn plain(&self, x: &[f64]) -> Vec<f64> {
        let row = |x: &[f64]| {
            let mean: f64 = x.iter().zip(&self.mean).map(|(x, m)| x * *m as f64).sum();
            let column = |((x, gain), bias): ((&f64, &i64), &i64)| x * *gain as f64 - mean + *bias as f64;
            x.iter().zip(&self.gain).zip(&self.bias).map(column).collect::<Vec<_>>()
        };
        x.chunks_exact(self.gain.len()).flat_map(row).collect()
    }

    /// Evaluator: from its share; one of both adds the constants.
    pub(crate) fn eval(&self, x: &[u64], leads: bool, parts: &Parts) -> Vec<u64> {
        let (n, len) = (self.gain.len(), x.len());
        let mut y = vec![0; len];
        parts.divide(
            (len / n, len),
            [&mut y],
            |row| [row * n],
            |rows, [y]| {
                for (x, y) in x[rows.start * n..].chunks_exact(n).zip(y.chunks_exact_mut(n)) {
                    vector::run(Columns { g: self, leads, x, y });
                }
            },
        );
        y
    }
}

struct Columns<'a> {
    g: &'a Gain,
    leads: bool,
    x: &'a [u64],
    y: &'a mut [u64],
}

impl Kernel for Columns<'_> {
    #[inline(always)]
    fn run(self) {
        let (g, keep, lead) = (self.g, mask(self.g.k), u64::from(self.leads).wrapping_neg());
        let products = self.x.iter().zip(&g.mean).map(|(x, m)| x.wrapping_mul(*m as u64));
        let mean = products.fold(0u64, u64::wrapping_add);
        let columns = self.x.iter().zip(&g.gain).zip(&g.bias);
        for (y, ((x, gain), bias)) in self.y.iter_mut().zip(columns) {
            let v = x.wrapping_mul(*gain as u64).wrapping_sub(mean).wrapping_add(*bias as u64 & lead);
            *y = v & keep;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::World;
    use super::*;
    use crate::gemm::Threads;
    use crate::ring::signed;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn truncation_is_within_a_unit_for_every_value_and_sharing(
            (k, shift) in (2u32..=64).prop_flat_map(|k| (Just(k), 1..k)),
            halves in prop::collection::vec(any::<u64>(), 6),
            above in any::<u64>(),
            raise in any::<bool>(),
            seed in any::<u64>(),
        ) {
            let x: Vec<u64> = World::seeded(seed).edges(k, halves.len()).iter().map(|[x, ..]| *x).collect();
            // Halves at the edges too, where remainders are nothing or all that they can be; bits above the ring do not count.
            let edges = [0, mask(k), mask(shift), 1 << (shift - 1), mask(shift - 1)];
            let first: Vec<u64> = halves.iter().zip(edges.iter().cycle()).map(|(h, e)| if h & 1 == 1 { *h } else { *e }).collect();
            let g = Truncate { k, shift, raise };
            let second: Vec<u64> = x.iter().zip(&first).map(|(x, a)| x.wrapping_sub(*a) ^ (above & !mask(k))).collect();
            let (mut a, mut b) = (first, second);
            g.apply(&mut a, true);
            g.apply(&mut b, false);
            for ((x, a), b) in x.iter().zip(a).zip(b) {
                prop_assert!(a <= mask(k - shift) && b <= mask(k - shift));
                // x / 2^s + e in units of 2^-s, modulo the ring.
                let sum = (a.wrapping_add(b) & mask(k - shift)) << shift;
                let more = if raise { 1u64 << (shift - 1) } else { 0 };
                let off = signed(sum.wrapping_sub(*x).wrapping_sub(more) & mask(k), k);
                let one = 1i128 << shift;
                // In a ring of a bit more than the shift, one unit up and one down are the same.
                let fits = |off: i128| -one < off && off <= one;
                prop_assert!(fits(off.into()) || fits(i128::from(off) + (1i128 << k)), "{:#x} off by {}", x, off);
            }
        }

        #[test]
        fn gains_are_linear_and_exact(
            k in 1u32..=64,
            columns in prop::collection::vec((any::<i16>(), any::<i16>(), any::<i32>()), 1..5),
            centred in any::<bool>(),
            rows in 0usize..3,
            seed in any::<u64>(),
        ) {
            let gain: Vec<i64> = columns.iter().map(|c| c.0.into()).collect();
            let mean: Vec<i64> = columns.iter().filter(|_| centred).map(|c| c.1.into()).collect();
            let bias: Vec<i64> = columns.iter().map(|c| c.2.into()).collect();
            let g = Gain { k, gain, mean, bias };
            let n = g.gain.len();
            let mut w = World::seeded(seed);
            let (x, a): (Vec<u64>, Vec<u64>) = w.edges(k, rows * n).iter().map(|[x, a, ..]| (*x, *a)).unzip();
            let b: Vec<u64> = x.iter().zip(&a).map(|(x, a)| x.wrapping_sub(*a)).collect();
            let [one, many] = [Parts::new(None), Parts::least(Threads::new(2).unwrap())];
            prop_assert_eq!(g.eval(&a, true, &one), g.eval(&a, true, &many));
            let (a, b) = (g.eval(&a, true, &one), g.eval(&b, false, &one));
            for (i, (a, b)) in a.iter().zip(&b).enumerate() {
                let row = &x[i / n * n..][..n];
                let at = |v: &[i64], c: usize| v.get(c).map_or(0, |v| i128::from(*v));
                let mean: i128 = row.iter().enumerate().map(|(c, x)| i128::from(*x) * at(&g.mean, c)).sum();
                let want = i128::from(row[i % n]) * at(&g.gain, i % n) - mean + at(&g.bias, i % n);
                prop_assert_eq!(a.wrapping_add(*b) & mask(k), want as u64 & mask(k));
            }
        }
    }
}
