//! Products with ternary weights where a table is two registers: AVX-512 looks the sums of three inputs up for sixteen outputs
//! at once.
//!
//! Registers look 32 bits up, so that words of wider rings are cut into planes. Of the upper plane of 32 bits only the sum
//! modulo `2^32` matters; those below are so narrow that the sum over a block is exact. The unsafe code here is unaligned
//! loads and stores, each through a reference to an array of exactly that size, and one call that the features allow.

use std::arch::x86_64::*;
use std::ops::Range;

use super::simd::{Avx512, prefetch};
use super::ternary::{CODE, CODES, GROUP, PACKED, PANEL, Ternary};
use crate::ring::mask;
use crate::wipe::Wiped;

/// Words of weights of a block: its tables stay in the second-level cache.
const BLOCK: usize = 56;
/// Widest plane whose sums over a block are exact.
const EXACT: u32 = 22;
/// Planes of rows that are gone through at a time, as many as registers allow.
const PLANES: usize = 4;

/// The upper half of a table is the lower one's negative.
type Table = [u32; 16];

/// What adds words up: [`PLANES`] planes of the outputs of a panel.
type Sums = [[u32; PANEL]; PLANES];

/// Outputs of some panels, row-major.
pub(super) fn outputs(_: Avx512, x: &[u64], t: &Ternary, panels: Range<usize>, bits: u32, out: &mut [u64]) {
    // SAFETY: the first argument proves the features.
    unsafe { run(x, t, panels, bits, out) }
}

/// Lowest bit and width of each plane of a ring.
fn planes(bits: u32) -> Vec<(u32, u32)> {
    let low = bits.saturating_sub(32);
    let width = low.div_ceil(low.div_ceil(EXACT).max(1));
    let lower = (0..low.div_ceil(EXACT)).map(|p| (width * p, width.min(low - width * p)));
    lower.chain([(low, 32)]).collect()
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
fn run(x: &[u64], t: &Ternary, panels: Range<usize>, bits: u32, out: &mut [u64]) {
    let (planes, keep, cols) = (planes(bits), mask(bits), t.cols_in());
    let scales = t.scales(panels.clone());
    let (columns, tile) = (scales.len(), PLANES / planes.len());
    let block = BLOCK.min(t.words_in());
    let mut plane = Wiped::new(vec![0; block * PACKED]);
    let mut tables = Wiped::new(vec![0; PLANES * block * CODES * 16]);
    let (tables, _) = tables.as_chunks_mut::<16>();
    for (x, out) in x.chunks(tile * cols).zip(out.chunks_mut(tile * columns)) {
        let count = x.len() / cols * planes.len();
        for from in (0..t.words_in()).step_by(block) {
            let to = (from + block).min(t.words_in());
            let inputs = from * PACKED..(to * PACKED).min(cols);
            for (i, tables) in tables.chunks_exact_mut(block * CODES).take(count).enumerate() {
                let row = &x[i / planes.len() * cols..][inputs.clone()];
                let plane = &mut plane[..(to - from) * PACKED];
                cut(row, &planes, i % planes.len(), plane);
                fill(plane, tables);
            }
            for (p, column) in panels.clone().zip((0..columns).step_by(PANEL)) {
                let width = PANEL.min(columns - column);
                let mut sums = [[0; PANEL]; PLANES];
                let words = t.panel(p, from..to);
                match (count, width <= PANEL / 2) {
                    (1, true) => look_up::<1, 2>(tables, block, words, &mut sums),
                    (2, true) => look_up::<2, 2>(tables, block, words, &mut sums),
                    (3, true) => look_up::<3, 2>(tables, block, words, &mut sums),
                    (_, true) => look_up::<4, 2>(tables, block, words, &mut sums),
                    (1, false) => look_up::<1, 4>(tables, block, words, &mut sums),
                    (2, false) => look_up::<2, 4>(tables, block, words, &mut sums),
                    (3, false) => look_up::<3, 4>(tables, block, words, &mut sums),
                    (_, false) => look_up::<4, 4>(tables, block, words, &mut sums),
                }
                for (sums, out) in sums.chunks_exact(planes.len()).zip(out.chunks_exact_mut(columns)) {
                    combine(&planes, sums, &scales[column..][..width], from > 0, keep, &mut out[column..][..width]);
                }
            }
        }
    }
}

/// Plane `which` of words, `x = sum_p plane_p 2^(at_p)`: signed but for the last, which carries from the others reach.
#[inline(always)]
fn cut(x: &[u64], planes: &[(u32, u32)], which: usize, plane: &mut [u32]) {
    let (at, width) = planes[which];
    let last = planes.len() - 1;
    // What makes a part that is taken as signed right for the next one, which it owes one to when negative.
    let owed = planes[..last].iter().fold(0, |sum, (at, width)| sum | 1u64 << (at + width - 1));
    let (keep, half) = if which == last { (u32::MAX, 0) } else { ((1 << width) - 1, 1 << (width - 1)) };
    let (words, padding) = plane.split_at_mut(x.len());
    for (to, x) in words.iter_mut().zip(x) {
        *to = ((x.wrapping_add(owed) >> at) as u32 & keep).wrapping_sub(half);
    }
    padding.fill(0);
}

/// The sums of each three words, at the codes of their weights.
#[target_feature(enable = "avx512f")]
fn fill(words: &[u32], tables: &mut [Table]) {
    for (three, table) in words.as_chunks::<GROUP>().0.iter().zip(tables) {
        let [a, b, c] = three.map(|w| _mm512_set1_epi32(w.cast_signed()));
        // Codes with a plus and a minus for each word.
        let sum = _mm512_maskz_mov_epi32(0b0011_1111_1110_0000, a);
        let sum = _mm512_mask_add_epi32(sum, 0b0011_1000_0001_1100, sum, b);
        let sum = _mm512_mask_sub_epi32(sum, 0b0000_0000_1110_0000, sum, b);
        let sum = _mm512_mask_add_epi32(sum, 0b0010_0100_1001_0010, sum, c);
        let sum = _mm512_mask_sub_epi32(sum, 0b0000_1001_0010_0100, sum, c);
        // SAFETY: `table` is 64 bytes.
        unsafe { _mm512_storeu_si512((&raw mut *table).cast(), sum) }
    }
}

/// Sums over `words` for `R` planes and `16 C` outputs.
#[inline(never)]
#[target_feature(enable = "avx512f")]
fn look_up<const R: usize, const C: usize>(tables: &[Table], block: usize, words: &[[u32; PANEL]], sums: &mut Sums) {
    let mut all = [[_mm512_setzero_si512(); C]; R];
    for (k, words) in words.iter().enumerate() {
        prefetch(words);
        let (vectors, _) = words.as_chunks::<16>();
        // SAFETY: each vector is 64 bytes.
        let mut codes: [__m512i; C] =
            std::array::from_fn(|c| unsafe { _mm512_loadu_si512((&raw const vectors[c]).cast()) });
        for g in 0..CODES {
            for r in 0..R {
                // SAFETY: a table is 64 bytes.
                let lower = unsafe { _mm512_loadu_si512((&raw const tables[(r * block + k) * CODES + g]).cast()) };
                let upper = _mm512_sub_epi32(_mm512_setzero_si512(), lower);
                for c in 0..C {
                    all[r][c] = _mm512_add_epi32(all[r][c], _mm512_permutex2var_epi32(lower, codes[c], upper));
                }
            }
            for c in &mut codes {
                *c = _mm512_srli_epi32::<CODE>(*c);
            }
        }
    }
    for (to, all) in sums.iter_mut().zip(all) {
        for (to, sum) in to.as_chunks_mut::<16>().0.iter_mut().zip(all) {
            // SAFETY: `to` is 64 bytes.
            unsafe { _mm512_storeu_si512((&raw mut *to).cast(), sum) }
        }
    }
}

/// Sums of planes, each times its power of two, times magnitudes: added to the outputs of earlier blocks where there are any.
#[inline(always)]
fn combine(planes: &[(u32, u32)], sums: &[[u32; PANEL]], scales: &[u16], add: bool, keep: u64, out: &mut [u64]) {
    let mut words = [0u64; PANEL];
    for ((at, _), sums) in planes.iter().zip(sums) {
        for (word, sum) in words.iter_mut().zip(sums) {
            *word = word.wrapping_add((i64::from(sum.cast_signed()) as u64) << at);
        }
    }
    let before = if add { u64::MAX } else { 0 };
    for ((o, word), scale) in out.iter_mut().zip(words).zip(scales) {
        *o = (*o & before).wrapping_add(word.wrapping_mul(u64::from(*scale))) & keep;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn planes_cover_a_ring_and_exact_sums_fit() {
        let most = (BLOCK * PACKED) as u64;
        for bits in 1..=64 {
            let planes = planes(bits);
            let mut next = 0;
            for (at, width) in &planes {
                assert!(*at == next && (*width == 32 || most << (width - 1) < 1 << 31), "{planes:?}");
                next = at + width;
            }
            assert!(next >= bits && planes.len() < PLANES, "{planes:?}");
            let words =
                [0, 1, 0x7fff_ffff, 0x8000_0000, 1 << 63, u64::MAX, 0x8000_8000_8000_8000, 0x0020_0000_0020_0000];
            let mut sums = [0u64; 8];
            for (which, (at, _)) in planes.iter().enumerate() {
                let mut plane = [7; 9];
                cut(&words, &planes, which, &mut plane);
                assert_eq!(plane[8], 0);
                let signed = plane.map(|p| i64::from(p.cast_signed()) as u64);
                sums.iter_mut().zip(signed).for_each(|(sum, p)| *sum = sum.wrapping_add(p << at));
            }
            assert_eq!(sums.map(|s| s & mask(bits)), words.map(|w| w & mask(bits)), "{bits} bits");
        }
    }
}
