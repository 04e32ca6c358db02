//! Which values lie beyond an interval about zero, above it or below: where a function such as GELU is its asymptote.
//!
//! Half of the ring is cut into 64 windows. With `i = m_hi - l_hi` modulo 64, a value of window `n` has `i = n` or `n + 1`
//! (the borrow of the low bits), and the dealer deals one word per value, XOR-shared: ones at `inner <= i < 32`, rotated by
//! `l_hi`. Its bit at the public `m_hi` says "above"; its bit `31 + inner` places further on is one for
//! `-31 <= i <= -inner` and says "below". Both are read from the same sharing, each evaluator from its own half; nothing is
//! sent. What is neither is "inside".
//!
//! So where "above" is set, a value is at least `inner - 1` windows, where "below" is, at most `1 - inner`, and inside it is
//! within `inner` windows of zero, for values of less than 31 windows.

use std::sync::Arc;

use super::{Deal, Dealt, Masked, Take};
use crate::Error;
use crate::ring::mask;
use crate::vector::{self, Kernel};

/// Windows of half a ring, a bit of a word each.
pub const WINDOWS: u32 = 64;
/// Windows that a value may reach on either side of zero.
pub const REACH: u32 = WINDOWS / 2 - 1;

/// Bits "above" and "inside" of a `rows x inner.len()` masked tensor, packed in its order.
#[derive(Clone, Debug)]
pub struct Tails {
    /// Elements.
    pub len: usize,
    /// Per column, the first window above; of a column with 32, everything is inside.
    pub inner: Arc<Vec<u32>>,
    /// Ring of the input, at least 7 bits; values are below [`REACH`] windows of `2^(k - 7)`.
    pub k: u32,
}

impl Tails {
    /// Words of each output.
    pub fn out_len(&self) -> usize {
        self.len.div_ceil(64)
    }

    /// What is dealt.
    pub fn dealt(&self) -> Vec<Dealt> {
        vec![(self.len, 64)]
    }

    /// Dealer.
    pub fn deal(&self, d: &mut Deal, lam: &[u64]) -> Result<(), Error> {
        let ones: Vec<u64> = self.inner.iter().map(|i| mask(32) & !mask(*i)).collect();
        let mut t = d.bits(self.len)?;
        for row in lam.chunks(self.inner.len()) {
            vector::run(Rotated { top: self.k - 7, l: row, ones: &ones, words: t.room(d, row.len()) });
        }
        t.end(d);
        Ok(())
    }

    /// Meaning in the clear, of values in units.
    pub fn plain(&self, x: &[f64]) -> (Vec<u64>, Vec<u64>) {
        let (mut above, mut inside) = (vec![0; self.out_len()], vec![0; self.out_len()]);
        for (e, x) in x.iter().enumerate() {
            let edge = f64::from(self.inner[e % self.inner.len()]) * libm::exp2(f64::from(self.k - 7));
            above[e / 64] |= u64::from(*x >= edge) << (e % 64);
            inside[e / 64] |= u64::from(x.abs() < edge) << (e % 64);
        }
        (above, inside)
    }

    /// Evaluator: XOR shares of "above" and "inside".
    pub fn eval(&self, t: &mut Take, x: &Masked) -> Result<(Vec<u64>, Vec<u64>), Error> {
        let dealt = t.half(self.len, 64)?;
        let lead = u64::from(t.leads()).wrapping_neg();
        let (mut above, mut inside) = (vec![0; self.out_len()], vec![0; self.out_len()]);
        let inner = super::cycle(&self.inner);
        t.divide(
            self.out_len(),
            [&mut above, &mut inside],
            |i| [i; 2],
            |blocks, [above, inside]| {
                let mut dealt = dealt.from(64 * blocks.start);
                for ((i, above), inside) in blocks.zip(above).zip(inside) {
                    let m = &x.m[64 * i..self.len.min(64 * (i + 1))];
                    let (dealt, inner) = (dealt.next(m.len()), &inner[64 * i % self.inner.len()..]);
                    let mut flags = [0; 2];
                    vector::run(Flags { top: self.k - 7, m, dealt, inner: &inner[..m.len()], flags: &mut flags });
                    *above = flags[0];
                    *inside = flags[0] ^ flags[1] ^ (lead & mask(m.len() as u32));
                }
            },
        );
        Ok((above, inside))
    }
}

/// The dealer's words of a row.
struct Rotated<'a> {
    top: u32,
    l: &'a [u64],
    ones: &'a [u64],
    words: &'a mut [u64],
}

impl Kernel for Rotated<'_> {
    #[inline(always)]
    fn run(self) {
        let words = self.words.iter_mut().zip(self.l).zip(self.ones);
        words.for_each(|((w, l), ones)| *w = ones.rotate_left((l >> self.top) as u32 % WINDOWS));
    }
}

/// Shares of "above" and "below" of up to 64 values.
struct Flags<'a> {
    top: u32,
    m: &'a [u64],
    dealt: &'a [u64],
    inner: &'a [u32],
    flags: &'a mut [u64; 2],
}

impl Kernel for Flags<'_> {
    #[inline(always)]
    fn run(self) {
        let Flags { top, m, dealt, inner, flags } = self;
        let mut both = [0; 2];
        for (i, ((m, word), inner)) in m.iter().zip(dealt).zip(inner).enumerate() {
            let at = m >> top;
            both[0] |= (word >> (at % 64) & 1) << i;
            both[1] |= (word >> ((at + u64::from(REACH + inner)) % 64) & 1) << i;
        }
        *flags = both;
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{World, masked};
    use super::*;
    use crate::ring::signed;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn values_are_within_a_window_of_what_their_bits_say(
            (rows, k) in (1usize..60, 7u32..=64),
            inner in prop::collection::vec(prop_oneof![1u32..=31, Just(32)], 1..5),
            seed in any::<u64>(),
        ) {
            let mut w = World::seeded(seed);
            let mut x = w.edges(k, rows * inner.len());
            let window = 1i64 << (k - 7);
            for (i, [x, ..]) in x.iter_mut().enumerate() {
                // Half of them next to an edge.
                let edge = i64::from(inner[i % inner.len()].min(30)) * window;
                let v = if i % 2 == 0 { edge.wrapping_add(signed(*x, k) >> (k - 2)) } else { signed(*x, k) >> 2 };
                let v = if i % 4 == 0 { -v } else { v };
                *x = v.clamp(1 - i64::from(REACH) * window, i64::from(REACH) * window - 1) as u64 & mask(k);
            }
            let (x, lam, e) = masked(&x, k, false);
            let g = Tails { len: x.len(), inner: Arc::new(inner), k };
            let [(a1, i1), (a2, i2)] = w.run(&g.dealt(), |d| g.deal(d, &lam), |t, i| g.eval(t, &e[i]));
            for (e, x) in x.iter().enumerate() {
                let bit = |a: &[u64], b: &[u64]| (a[e / 64] ^ b[e / 64]) >> (e % 64) & 1 == 1;
                let (above, inside) = (bit(&a1, &a2), bit(&i1, &i2));
                let inner = i64::from(g.inner[e % g.inner.len()]);
                let x = signed(*x, k);
                prop_assert!(!(above && inside));
                if above {
                    prop_assert!(inner < 32 && x >= (inner - 1) * window, "{} above {}", x, inner);
                } else if inside {
                    prop_assert!(inner == 32 || x.abs() <= inner * window, "{} inside {}", x, inner);
                } else {
                    prop_assert!(inner < 32 && x < (1 - inner) * window, "{} below {}", x, inner);
                }
            }
            // Bits past the last are never set.
            let rest = (!0u64 << ((x.len() - 1) % 64)) << 1;
            prop_assert_eq!((a1[a1.len() - 1] | a2[a2.len() - 1] | i1[i1.len() - 1] | i2[i2.len() - 1]) & rest, 0);
        }
    }
}
