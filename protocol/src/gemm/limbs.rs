//! Ring words as signed limbs whose products with weights are summed in 32 bits.
//!
//! Of a limb at `2^p` only the sum modulo `2^(bits - p)` matters. So the upper 32 bits of a ring are two limbs of 16 bits,
//! whose sums may wrap; what lies below is cut into limbs so narrow that many products of them have an exact sum.

use super::{KC, NR};

/// How words of a ring are cut for weights of some size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Limbs {
    /// Lowest bit and width of each.
    parts: Vec<(u32, u32)>,
    /// Products, a number of steps, whose sums are right.
    pub(super) depth: usize,
}

impl Limbs {
    /// For words of `bits` bits and weights of at most `largest` in magnitude, `2^15` or less, which are gone through `step`
    /// at a time: 2, or a power of two up to 256.
    pub(super) fn new(bits: u32, largest: u32, step: usize) -> Limbs {
        let Some(low) = bits.checked_sub(32).filter(|low| *low > 0) else {
            return Limbs { parts: (0..bits.div_ceil(16)).map(|l| (16 * l, 16)).collect(), depth: KC };
        };
        let cut = |n: u32| {
            let width = low.div_ceil(n);
            let exact = (i32::MAX as u32 >> (width - 1)) / largest.max(1);
            let lower = (0..n).map(|l| (width * l, width.min(low - width * l)));
            let parts: Vec<(u32, u32)> = lower.chain([(low, 16), (low + 16, 16)]).collect();
            Limbs { parts, depth: KC.min(exact as usize / step * step) }
        };
        // Bytes are always narrow enough.
        let all = (low.div_ceil(16)..=low.div_ceil(8)).map(cut).filter(|l| l.depth > 0);
        all.min_by_key(Limbs::cost).unwrap_or_else(|| cut(low.div_ceil(8)))
    }

    pub(super) fn count(&self) -> usize {
        self.parts.len()
    }

    /// Time in proportion: to add a sum to the words takes as long as some twenty products.
    fn cost(&self) -> usize {
        self.count() * (10_000 + 200_000 / self.depth)
    }

    /// What makes a part of a word that is taken as signed right for the next one, which it owes one to when negative.
    fn owed(&self) -> u64 {
        self.parts.iter().fold(0, |sum, (at, width)| sum | 1 << (at + width - 1))
    }
}

/// Each row of `x` as rows of limbs, `x = sum_l limb_l 2^(p_l)` mod `2^bits`, padded to pairs.
#[inline(always)]
pub(super) fn split(x: &[u64], cols: usize, limbs: &Limbs, a: &mut [i16]) {
    let stride = cols.next_multiple_of(2);
    let owed = limbs.owed();
    for (row, x) in a.chunks_exact_mut(limbs.count() * stride).zip(x.chunks_exact(cols)) {
        for ((at, width), limb_row) in limbs.parts.iter().zip(row.chunks_exact_mut(stride)) {
            let (keep, half) = ((1u32 << width) - 1, 1i32 << (width - 1));
            for (limb, &x) in limb_row.iter_mut().zip(x) {
                *limb = (((x.wrapping_add(owed) >> at) as u32 & keep) as i32 - half) as i16;
            }
        }
    }
}

/// Adds limb sums, each times its power of two, to whole words.
#[inline(always)]
pub(super) fn combine(limbs: &Limbs, sums: &[[i32; NR]], out: &mut [u64]) {
    for ((at, _), sums) in limbs.parts.iter().zip(sums) {
        for (o, &sum) in out.iter_mut().zip(sums) {
            *o = o.wrapping_add((i64::from(sum) as u64) << at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::mask;

    #[test]
    fn limbs_cover_a_ring_and_exact_sums_fit() {
        for bits in 1..=64u32 {
            for largest in [0, 1, 127, 128, 129, 255, 2047, 4095, 4096, 32767, 32768] {
                let step = [2, 32][bits as usize % 2];
                let limbs = Limbs::new(bits, largest, step);
                let mut next = 0;
                for (at, width) in &limbs.parts {
                    assert!(*at == next && (1..=16).contains(width), "{limbs:?}");
                    next = at + width;
                    // Wraps where nothing above is kept.
                    let most = (limbs.depth as u64 * u64::from(largest)) << (width - 1);
                    assert!(bits - at <= 32 || most < 1 << 31, "{bits} bits, {largest}: {limbs:?}");
                }
                assert!(next >= bits && limbs.depth > 0 && limbs.depth.is_multiple_of(step), "{limbs:?}");
            }
        }
    }

    #[test]
    fn limbs_add_up_to_their_word() {
        let words = [0, 1, 0x7f, 0x80, 0x7fff, 0x8000, 0xffff_ffff, 1 << 63, u64::MAX, 0x8000_8000_8000_8000];
        for bits in 1..=64 {
            for largest in [1, 128, 4095, 32768] {
                let limbs = Limbs::new(bits, largest, 2);
                let mut a = vec![0; limbs.count() * words.len()];
                split(&words, words.len(), &limbs, &mut a);
                for (i, word) in words.iter().enumerate() {
                    let mut out = [0];
                    let sums: Vec<[i32; NR]> = a.chunks(words.len()).map(|row| [row[i].into(); NR]).collect();
                    combine(&limbs, &sums, &mut out);
                    assert_eq!(out[0] & mask(bits), word & mask(bits), "{bits} bits: {limbs:?}");
                }
            }
        }
    }
}
