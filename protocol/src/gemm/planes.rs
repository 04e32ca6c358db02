//! Products with ternary weights where a table is in registers: vector units look the sums of three inputs up for eight or
//! sixteen outputs at once.
//!
//! Registers look 32 bits up, so that words of wider rings are cut into planes. Of the upper plane of 32 bits only the sum
//! modulo `2^32` matters; those below are so narrow that the sum over a block is exact. The unsafe code here is calls of
//! functions for features that an argument proves, and unaligned loads and stores, each through a reference to an array of
//! exactly that size.

use std::arch::x86_64::*;
use std::ops::Range;

use zeroize::Zeroizing;

use super::simd::{Avx2, Avx512, prefetch};
use super::tables::{LINE, lines, sums_of_three};
use super::ternary::{CODE, CODES, GROUP, PACKED, PANEL, Ternary, Words};
use crate::ring::mask;
use crate::wipe::Wiped;

/// Words of weights of a block: its tables stay in the second-level cache.
const BLOCK: usize = 56;
/// Widest plane whose sums over a block are exact.
const EXACT: u32 = 22;
/// Planes of rows that are gone through at a time, as many as registers allow.
const PLANES: usize = 4;

/// Sums of three words of a plane; the upper half of all codes is the lower one's negative.
type Table = [u32; 16];

/// What adds words up: [`PLANES`] planes of the outputs of a panel.
type Sums = [[u32; PANEL]; PLANES];

/// A vector unit.
trait Unit: Copy {
    /// The sums of each three words, at the codes of their weights.
    fn fill(self, words: &[u32], tables: &mut [Table]);

    /// Sums over `words` for `count` planes, whose tables are `block` words after one another, and `columns` outputs.
    fn look_up(self, count: usize, columns: usize, tables: &[Table], block: usize, words: &[Words], sums: &mut Sums);
}

impl Avx2 {
    /// Outputs of some panels, row-major.
    pub(super) fn planes(self, x: &[u64], t: &Ternary, panels: Range<usize>, bits: u32, out: &mut [u64]) {
        #[target_feature(enable = "avx2")]
        fn run(unit: Avx2, x: &[u64], t: &Ternary, panels: Range<usize>, bits: u32, out: &mut [u64]) {
            outputs(unit, x, t, panels, bits, out);
        }
        // SAFETY: `self` proves the features.
        unsafe { run(self, x, t, panels, bits, out) }
    }
}

impl Avx512 {
    /// Outputs of some panels, row-major.
    pub(super) fn planes(self, x: &[u64], t: &Ternary, panels: Range<usize>, bits: u32, out: &mut [u64]) {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq")]
        fn run(unit: Avx512, x: &[u64], t: &Ternary, panels: Range<usize>, bits: u32, out: &mut [u64]) {
            outputs(unit, x, t, panels, bits, out);
        }
        // SAFETY: `self` proves the features.
        unsafe { run(self, x, t, panels, bits, out) }
    }
}

impl Unit for Avx2 {
    #[inline(always)]
    fn fill(self, words: &[u32], tables: &mut [Table]) {
        for (three, table) in words.as_chunks::<GROUP>().0.iter().zip(tables) {
            table[..14].copy_from_slice(&sums_of_three(*three));
        }
    }

    #[inline(always)]
    fn look_up(self, count: usize, columns: usize, tables: &[Table], block: usize, words: &[Words], sums: &mut Sums) {
        // SAFETY: `self` proves the features.
        unsafe {
            match count {
                1 => look_up_avx2::<1, 4>(columns, tables, block, words, sums),
                2 => look_up_avx2::<2, 2>(columns, tables, block, words, sums),
                3 => look_up_avx2::<3, 2>(columns, tables, block, words, sums),
                _ => look_up_avx2::<PLANES, 2>(columns, tables, block, words, sums),
            }
        }
    }
}

impl Unit for Avx512 {
    #[inline(always)]
    fn fill(self, words: &[u32], tables: &mut [Table]) {
        // SAFETY: `self` proves the features.
        unsafe { fill_avx512(words, tables) }
    }

    #[inline(always)]
    fn look_up(self, count: usize, columns: usize, tables: &[Table], block: usize, words: &[Words], sums: &mut Sums) {
        // SAFETY: `self` proves the features.
        unsafe {
            match (count, columns <= PANEL / 2) {
                (1, true) => look_up_avx512::<1, 2>(tables, block, words, sums),
                (2, true) => look_up_avx512::<2, 2>(tables, block, words, sums),
                (3, true) => look_up_avx512::<3, 2>(tables, block, words, sums),
                (_, true) => look_up_avx512::<PLANES, 2>(tables, block, words, sums),
                (1, false) => look_up_avx512::<1, 4>(tables, block, words, sums),
                (2, false) => look_up_avx512::<2, 4>(tables, block, words, sums),
                (3, false) => look_up_avx512::<3, 4>(tables, block, words, sums),
                (_, false) => look_up_avx512::<PLANES, 4>(tables, block, words, sums),
            }
        }
    }
}

/// Whether words of a ring are cut into more than two planes.
pub(super) fn wide(bits: u32) -> bool {
    bits > 32 + EXACT
}

/// Lowest bit and width of each plane of a ring.
fn cuts(bits: u32) -> Vec<(u32, u32)> {
    let low = bits.saturating_sub(32);
    let width = low.div_ceil(low.div_ceil(EXACT).max(1));
    let lower = (0..low.div_ceil(EXACT)).map(|p| (width * p, width.min(low - width * p)));
    lower.chain([(low, 32)]).collect()
}

/// Inlined into functions that allow wider vectors.
#[inline(always)]
fn outputs(unit: impl Unit, x: &[u64], t: &Ternary, panels: Range<usize>, bits: u32, out: &mut [u64]) {
    let (planes, keep, cols) = (cuts(bits), mask(bits), t.cols_in());
    let scales = t.scales(panels.clone());
    let (columns, tile) = (scales.len(), PLANES / planes.len());
    let block = BLOCK.min(t.words_in());
    let mut plane = Wiped::new(vec![0; block * PACKED]);
    let mut tables = Wiped::new(vec![0; PLANES * block * CODES * 16 + LINE]);
    let (tables, _) = lines(&mut tables).as_chunks_mut::<16>();
    let mut sums = Zeroizing::new([[0; PANEL]; PLANES]);
    for (x, out) in x.chunks(tile * cols).zip(out.chunks_mut(tile * columns)) {
        let count = x.len() / cols * planes.len();
        for from in (0..t.words_in()).step_by(block) {
            let to = (from + block).min(t.words_in());
            let inputs = from * PACKED..(to * PACKED).min(cols);
            for (i, tables) in tables.chunks_exact_mut(block * CODES).take(count).enumerate() {
                let row = &x[i / planes.len() * cols..][inputs.clone()];
                let plane = &mut plane[..(to - from) * PACKED];
                cut(row, &planes, i % planes.len(), plane);
                unit.fill(plane, tables);
            }
            for (p, column) in panels.clone().zip((0..columns).step_by(PANEL)) {
                let width = PANEL.min(columns - column);
                unit.look_up(count, width, tables, block, t.panel(p, from..to), &mut sums);
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

#[target_feature(enable = "avx512f")]
fn fill_avx512(words: &[u32], tables: &mut [Table]) {
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

/// `R` planes at `8 C` outputs at a time.
#[inline(never)]
#[target_feature(enable = "avx2")]
fn look_up_avx2<const R: usize, const C: usize>(
    columns: usize,
    tables: &[Table],
    block: usize,
    words: &[Words],
    sums: &mut Sums,
) {
    for from in (0..columns).step_by(8 * C) {
        let mut all = [[_mm256_setzero_si256(); C]; R];
        for (k, words) in words.iter().enumerate() {
            if from == 0 {
                prefetch(&words.0);
            }
            let (vectors, _) = words.0[from..].as_chunks::<8>();
            // SAFETY: each vector is 32 bytes.
            let mut codes: [__m256i; C] =
                std::array::from_fn(|c| unsafe { _mm256_loadu_si256((&raw const vectors[c]).cast()) });
            for g in 0..CODES {
                for r in 0..R {
                    let (halves, _) = tables[(r * block + k) * CODES + g].as_chunks::<8>();
                    // SAFETY: half a table is 32 bytes.
                    let [below, above] = [0, 1].map(|i| unsafe { _mm256_loadu_si256((&raw const halves[i]).cast()) });
                    for c in 0..C {
                        // Three bits of a code choose within halves, the fourth between them, the fifth is the sign; a code of
                        // zero makes zero of zero.
                        let half = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes[c]));
                        let sign = _mm256_slli_epi32::<27>(codes[c]);
                        let [below, above] =
                            [below, above].map(|t| _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(t, codes[c])));
                        let sum = _mm256_castps_si256(_mm256_blendv_ps(below, above, half));
                        all[r][c] = _mm256_add_epi32(all[r][c], _mm256_sign_epi32(sum, sign));
                    }
                }
                for c in &mut codes {
                    *c = _mm256_srli_epi32::<{ CODE as i32 }>(*c);
                }
            }
        }
        for (to, all) in sums.iter_mut().zip(all) {
            for (to, sum) in to[from..].as_chunks_mut::<8>().0.iter_mut().zip(all) {
                // SAFETY: `to` is 32 bytes.
                unsafe { _mm256_storeu_si256((&raw mut *to).cast(), sum) }
            }
        }
    }
}

/// `R` planes at `16 C` outputs.
#[inline(never)]
#[target_feature(enable = "avx512f")]
fn look_up_avx512<const R: usize, const C: usize>(tables: &[Table], block: usize, words: &[Words], sums: &mut Sums) {
    let mut all = [[_mm512_setzero_si512(); C]; R];
    for (k, words) in words.iter().enumerate() {
        prefetch(&words.0);
        let (vectors, _) = words.0.as_chunks::<16>();
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
            let planes = cuts(bits);
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
