//! Powers of two of the place in a window, of which [`super::exp::Exp`] takes one a score: as doubles, and as the integers that
//! both evaluators have to agree on.

use super::rounded;
use crate::ring::mask;
use crate::vector::{self, Kernel};

/// Bits of a place in a step that count.
pub(crate) const USED: u32 = 14;
/// Uses up to which tables are not worth making.
pub(crate) const OFTEN: usize = 512;
/// The most powers of two of a public factor.
pub(crate) const LARGEST: i32 = 60;
/// Scale of [`PublicPowers::fine`].
const FINE: u32 = 30;

/// The place of a word in its window: its low bits, of which [`USED`] of each step count and the others are taken for half.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    /// Bits of a window.
    bits: u32,
    /// Bits that count below the top byte.
    fine: u32,
}

impl Place {
    /// For windows of so many bits and `2^steps` steps.
    pub fn new(bits: u32, steps: u32) -> Place {
        Place { bits, fine: USED + steps - 8 }
    }

    /// The bits that count.
    #[inline(always)]
    fn of(self, x: u64) -> u64 {
        (x & mask(self.bits)) >> (self.bits - 8 - self.fine)
    }

    /// Their top byte and the rest.
    #[inline(always)]
    fn parts(self, x: u64) -> [usize; 2] {
        let low = self.of(x);
        [usize::from((low >> self.fine) as u8), (low & mask(self.fine)) as usize]
    }

    /// What one of those that count is worth in powers of two, where a unit of the ring is worth `ulp`; the top byte's are
    /// worth `2^fine` such.
    fn unit(self, ulp: f64) -> f64 {
        2f64.powi((self.bits - 8 - self.fine) as i32) * ulp
    }
}

/// `2^(ulp low(x) + f)` for the place in a window.
pub(crate) struct Powers {
    place: Place,
    /// Exponent of a unit of the place, and what is added.
    unit: f64,
    f: f64,
    /// Of the top byte and of the rest, where they are used often enough to be worth making.
    tables: Option<[Vec<f64>; 2]>,
}

impl Powers {
    /// To be used so many times.
    pub fn new(place: Place, ulp: f64, f: i32, times: usize) -> Powers {
        let (unit, f, rest) = (place.unit(ulp), f64::from(f), 1u64 << place.fine);
        let coarse = || (0..256).map(|a| libm::exp2(f64::from(a) * unit * rest as f64 + f)).collect();
        let fine = || (0..rest).map(|a| libm::exp2((a as f64 + 0.5) * unit)).collect();
        Powers { place, unit, f, tables: (times > OFTEN).then(|| [coarse(), fine()]) }
    }

    #[inline(always)]
    pub fn of(&self, x: u64) -> f64 {
        match &self.tables {
            Some([coarse, fine]) => {
                let [a, b] = self.place.parts(x);
                coarse[a] * fine[b]
            }
            None => libm::exp2((self.place.of(x) as f64 + 0.5) * self.unit + self.f),
        }
    }
}

/// The evaluators' factors `2^(ulp place + f_pub)` of one head, in integers: `(c t + 2^(shift - 1)) >> shift`, where
/// `[c, shift] = coarse[a]` and `t = fine[b]`. It is the nearest integer, but for `2^-30` of it.
///
/// The place is the low `bits` bits of a masked score's word less its bound's, as [`super::exp::Exp`] adds them; `a` is the top
/// byte of them, `b` the `fine_bits` bits below, and what is below these does not count but for half of what it may be.
#[derive(Clone, Debug)]
pub struct PublicPowers {
    /// Bits of a window, modulo which places are taken.
    pub bits: u32,
    /// Bits by which `fine` is read.
    pub fine_bits: u32,
    /// Powers at 256 places with their shifts, which are from 1 to 61: each at a scale of its own, by which it is at least
    /// `2^31`.
    pub coarse: [[u32; 2]; 256],
    /// `2^fine_bits` powers, from one to below two, at `2^30`: products are below `2^63`.
    pub fine: Vec<u32>,
}

impl PublicPowers {
    /// For factors from one to `2^`[`LARGEST`].
    pub(crate) fn new(place: Place, ulp: f64, f: i32) -> PublicPowers {
        let (unit, rest) = (place.unit(ulp), 1u64 << place.fine);
        // Where the cast would give `2^32` it gives the largest below.
        let fixed = |power: f64| (libm::exp2(power) + 0.5) as u32;
        let coarse = std::array::from_fn(|a| {
            let power = a as f64 * unit * rest as f64 + f64::from(f);
            let whole = power as u32;
            [fixed(power - f64::from(whole) + 31.0), 31 + FINE - whole]
        });
        let fine = (0..rest).map(|b| fixed((b as f64 + 0.5) * unit + f64::from(FINE)));
        PublicPowers { bits: place.bits, fine_bits: place.fine, coarse, fine: fine.collect() }
    }

    /// The factor of a score's word less its bound's.
    #[inline(always)]
    pub fn of(&self, x: u64) -> u64 {
        let [a, b] = Place { bits: self.bits, fine: self.fine_bits }.parts(x);
        let [c, shift] = self.coarse[a];
        // As above, with one shift that is not known.
        (((u64::from(c) * u64::from(self.fine[b])) >> (shift - 1)) + 1) >> 1
    }
}

/// One head's factors at an evaluator.
pub(crate) enum Public {
    Tables(Box<PublicPowers>),
    Each(Powers),
}

impl Public {
    /// Those of some words.
    pub fn fill(&self, x: &[u64], out: &mut [u64]) {
        match self {
            Public::Tables(powers) => vector::run(Factors { powers, x, out }),
            Public::Each(powers) => out.iter_mut().zip(x).for_each(|(out, x)| *out = rounded(powers.of(*x))),
        }
    }
}

struct Factors<'a> {
    powers: &'a PublicPowers,
    x: &'a [u64],
    out: &'a mut [u64],
}

impl Kernel for Factors<'_> {
    #[inline(always)]
    fn run(self) {
        self.out.iter_mut().zip(self.x).for_each(|(out, x)| *out = self.powers.of(*x));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn public_factors_are_the_nearest_integers(
            (bits, steps) in (17u32..40, 2u32..=3),
            // Of a window, up to what factors may have, and of the least of it.
            window in 0.1f64..=1.0,
            f in 0i32..=30,
            words in prop::collection::vec(any::<u64>(), 1..200),
        ) {
            let place = Place::new(bits, steps);
            let ulp = window * f64::from(LARGEST - f) / 2f64.powi(bits as i32);
            let powers = PublicPowers::new(place, ulp, f);
            prop_assert!(powers.coarse.iter().all(|[c, shift]| c >> 31 == 1 && (1..=61).contains(shift)));
            prop_assert!(powers.fine.iter().all(|t| t >> FINE == 1));
            let (top, counts) = (1u64 << bits, 1u64 << (bits - USED - steps));
            let edges = [0, 1, counts - 1, counts, top / 2 - 1, top / 2, top - 1, top, top + 1, u64::MAX];
            let words: Vec<u64> = edges.into_iter().chain(words).collect();
            let mut factors = vec![0; words.len()];
            Public::Tables(Box::new(powers)).fill(&words, &mut factors);
            for (x, got) in words.iter().zip(factors) {
                let middle = (x & mask(bits)) / counts * counts + counts / 2;
                // Where all bits count, the middle is half a unit on.
                let middle = if counts == 1 { middle as f64 + 0.5 } else { middle as f64 };
                let want = libm::exp2(middle * ulp + f64::from(f));
                prop_assert!((got as f64 - want).abs() <= 0.5 + want * 2f64.powi(-30), "{} for {} of {}", got, want, x);
            }
        }
    }
}
