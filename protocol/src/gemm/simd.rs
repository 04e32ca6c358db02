//! The tile kernels of the parent for x86-64 vector units.
//!
//! A value of [`Avx2`] or [`Avx512`] is proof that the processor has the instructions; only `detect` makes one.
//! Besides calling functions compiled for those instructions, the unsafe code here is unaligned loads and stores,
//! each through a reference to an array of exactly that size.

use std::arch::x86_64::*;
use std::ops::Range;

use super::limbs::{self, Limbs};
use super::nibbles::{self, BLOCK, Block};
use super::panels::Panel;
use super::ternary::Ternary;
use super::words::word_tile;
use super::{LimbTile, MR, NR, planes, tables};

/// Rows that the AVX2 kernel keeps in registers.
const ROWS2: usize = 6;

/// Most rows that wait for memory more than for arithmetic.
const STREAMED: usize = 6;
/// Bytes by which weights are asked for before they are read.
const AHEAD: usize = 4096;

/// Proof of AVX2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx2(());

/// Proof of AVX-512 F, BW, DQ and VNNI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx512(());

impl Avx2 {
    pub(super) fn detect() -> Option<Avx2> {
        is_x86_feature_detected!("avx2").then_some(Avx2(()))
    }

    pub(super) fn limb_tile(self, a: &[i16], stride: usize, rows: usize, panel: Panel, tile: &mut LimbTile) {
        // SAFETY: `self` proves AVX2.
        unsafe {
            match panel {
                Panel::Four(p) => nibbles_avx2(a, stride, rows, p, tile),
                Panel::Narrow(p) => limbs_avx2(a, stride, rows, p, tile),
                Panel::Wide(p) => limbs_avx2(a, stride, rows, p, tile),
            }
        }
    }

    pub(super) fn widen(self, blocks: &[Block], to: &mut [i16]) {
        #[target_feature(enable = "avx2")]
        fn run(blocks: &[Block], to: &mut [i16]) {
            nibbles::widen(blocks, to);
        }
        // SAFETY: `self` proves the features.
        unsafe { run(blocks, to) }
    }

    pub(super) fn split(self, x: &[u64], cols: usize, limbs: &Limbs, a: &mut [i16]) {
        #[target_feature(enable = "avx2")]
        fn run(x: &[u64], cols: usize, limbs: &Limbs, a: &mut [i16]) {
            limbs::split(x, cols, limbs, a);
        }
        // SAFETY: `self` proves the features.
        unsafe { run(x, cols, limbs, a) }
    }

    pub(super) fn combine(self, limbs: &Limbs, sums: &[[i32; NR]], out: &mut [u64]) {
        #[target_feature(enable = "avx2")]
        fn run(limbs: &Limbs, sums: &[[i32; NR]], out: &mut [u64]) {
            limbs::combine(limbs, sums, out);
        }
        // SAFETY: `self` proves the features.
        unsafe { run(limbs, sums, out) }
    }

    pub(super) fn ternary(self, x: &[u64], t: &Ternary, panels: Range<usize>, bits: u32, out: &mut [u64]) {
        // Tables of few rows leave places of vectors empty.
        let few = if bits <= 32 { 2 } else { 1 };
        if x.len() / t.cols_in() <= few {
            return self.planes(x, t, panels, bits, out);
        }
        // SAFETY: `self` proves the features.
        unsafe { tables_avx2(x, t, panels, bits, out) }
    }

    pub(super) fn word32_tile(self, a: &[u32], k: usize, rows: usize, panel: &[u32], tile: &mut [[u32; NR]; MR]) {
        #[target_feature(enable = "avx2")]
        fn run(a: &[u32], k: usize, rows: usize, panel: &[u32], tile: &mut [[u32; NR]; MR]) {
            word_tile::<_, 4, 16>(a, k, rows, panel, tile);
        }
        // SAFETY: `self` proves the features.
        unsafe { run(a, k, rows, panel, tile) }
    }

    pub(super) fn word64_tile(self, a: &[u64], k: usize, rows: usize, panel: &[u64], tile: &mut [[u64; NR]; MR]) {
        #[target_feature(enable = "avx2")]
        fn run(a: &[u64], k: usize, rows: usize, panel: &[u64], tile: &mut [[u64; NR]; MR]) {
            word_tile::<_, 2, 8>(a, k, rows, panel, tile);
        }
        // SAFETY: `self` proves the features.
        unsafe { run(a, k, rows, panel, tile) }
    }
}

impl Avx512 {
    pub(super) fn detect() -> Option<Avx512> {
        let all = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vnni");
        all.then_some(Avx512(()))
    }

    pub(super) fn limb_tile(self, a: &[i16], stride: usize, rows: usize, panel: Panel, tile: &mut LimbTile) {
        // SAFETY: `self` proves the features.
        unsafe {
            match panel {
                Panel::Four(p) => nibbles_avx512(a, stride, rows, p, tile),
                Panel::Narrow(p) => limbs_avx512(a, stride, rows, p, tile),
                Panel::Wide(p) => limbs_avx512(a, stride, rows, p, tile),
            }
        }
    }

    pub(super) fn widen(self, blocks: &[Block], to: &mut [i16]) {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq")]
        fn run(blocks: &[Block], to: &mut [i16]) {
            nibbles::widen(blocks, to);
        }
        // SAFETY: `self` proves the features.
        unsafe { run(blocks, to) }
    }

    pub(super) fn split(self, x: &[u64], cols: usize, limbs: &Limbs, a: &mut [i16]) {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq")]
        fn run(x: &[u64], cols: usize, limbs: &Limbs, a: &mut [i16]) {
            limbs::split(x, cols, limbs, a);
        }
        // SAFETY: `self` proves the features.
        unsafe { run(x, cols, limbs, a) }
    }

    pub(super) fn combine(self, limbs: &Limbs, sums: &[[i32; NR]], out: &mut [u64]) {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq")]
        fn run(limbs: &Limbs, sums: &[[i32; NR]], out: &mut [u64]) {
            limbs::combine(limbs, sums, out);
        }
        // SAFETY: `self` proves the features.
        unsafe { run(limbs, sums, out) }
    }

    pub(super) fn ternary(self, x: &[u64], t: &Ternary, panels: Range<usize>, bits: u32, out: &mut [u64]) {
        // Three planes take longer than words that are added as they are.
        let many = if planes::wide(bits) { 8 } else { usize::MAX };
        if x.len() / t.cols_in() < many {
            return self.planes(x, t, panels, bits, out);
        }
        // SAFETY: `self` proves AVX-512 F, of which AVX2 is a part.
        unsafe { tables_avx2(x, t, panels, bits, out) }
    }

    pub(super) fn word32_tile(self, a: &[u32], k: usize, rows: usize, panel: &[u32], tile: &mut [[u32; NR]; MR]) {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq")]
        fn run(a: &[u32], k: usize, rows: usize, panel: &[u32], tile: &mut [[u32; NR]; MR]) {
            word_tile::<_, 12, 16>(a, k, rows, panel, tile);
        }
        // SAFETY: `self` proves the features.
        unsafe { run(a, k, rows, panel, tile) }
    }

    pub(super) fn word64_tile(self, a: &[u64], k: usize, rows: usize, panel: &[u64], tile: &mut [[u64; NR]; MR]) {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq")]
        fn run(a: &[u64], k: usize, rows: usize, panel: &[u64], tile: &mut [[u64; NR]; MR]) {
            word_tile::<_, 6, 16>(a, k, rows, panel, tile);
        }
        // SAFETY: `self` proves the features.
        unsafe { run(a, k, rows, panel, tile) }
    }
}

/// See [`tables::outputs`].
#[target_feature(enable = "avx2")]
fn tables_avx2(x: &[u64], t: &Ternary, panels: Range<usize>, bits: u32, out: &mut [u64]) {
    tables::outputs(x, t, panels, bits, out);
}

/// Asks for the weights that come after the next few: a page's end stops the processor from doing so by itself.
#[inline(always)]
pub(super) fn prefetch<W>(weights: &W) {
    for line in (0..size_of_val(weights)).step_by(64) {
        // SAFETY: a prefetch of any address is allowed.
        unsafe { _mm_prefetch::<_MM_HINT_T0>((&raw const *weights).cast::<i8>().wrapping_add(AHEAD + line)) }
    }
}

/// Packed weights, widened to 16 bits as they are loaded.
trait Stored: Sized {
    /// # Safety
    /// AVX2.
    unsafe fn load256(from: &[Self; 16]) -> __m256i;
    /// # Safety
    /// AVX-512 F and BW.
    unsafe fn load512(from: &[Self; 32]) -> __m512i;
}

impl Stored for i16 {
    #[inline(always)]
    unsafe fn load256(from: &[i16; 16]) -> __m256i {
        // SAFETY: `from` is 32 bytes; the caller has the features.
        unsafe { _mm256_loadu_si256((&raw const *from).cast()) }
    }

    #[inline(always)]
    unsafe fn load512(from: &[i16; 32]) -> __m512i {
        // SAFETY: `from` is 64 bytes; the caller has the features.
        unsafe { _mm512_loadu_si512((&raw const *from).cast()) }
    }
}

impl Stored for i8 {
    #[inline(always)]
    unsafe fn load256(from: &[i8; 16]) -> __m256i {
        // SAFETY: `from` is 16 bytes; the caller has the features.
        unsafe { _mm256_cvtepi8_epi16(_mm_loadu_si128((&raw const *from).cast())) }
    }

    #[inline(always)]
    unsafe fn load512(from: &[i8; 32]) -> __m512i {
        // SAFETY: `from` is 32 bytes; the caller has the features.
        unsafe { _mm512_cvtepi8_epi16(_mm256_loadu_si256((&raw const *from).cast())) }
    }
}

/// Two neighbouring limbs as one 32-bit operand.
#[inline(always)]
fn pair(x: &[i16; 2]) -> i32 {
    i32::from(x[0]) & 0xffff | i32::from(x[1]) << 16
}

/// The first `depth` elements of `R` rows, as pairs.
#[inline(always)]
fn pairs<const R: usize>(a: &[i16], stride: usize, depth: usize) -> [&[[i16; 2]]; R] {
    std::array::from_fn(|r| a[r * stride..][..depth].as_chunks().0)
}

/// Few rows at all columns of a panel, more at a half of them, so that sums fill the registers.
#[target_feature(enable = "avx2")]
fn limbs_avx2<W: Stored>(a: &[i16], stride: usize, rows: usize, panel: &[W], tile: &mut LimbTile) {
    for first in (0..rows).step_by(ROWS2) {
        let streamed = rows <= STREAMED;
        let (a, tile) = (&a[first * stride..], &mut tile[first..]);
        match rows - first {
            1 => rows_avx2::<W, 1, 4>(a, stride, panel, tile, streamed),
            2 => rows_avx2::<W, 2, 4>(a, stride, panel, tile, streamed),
            3 => rows_avx2::<W, 3, 2>(a, stride, panel, tile, streamed),
            4 => rows_avx2::<W, 4, 2>(a, stride, panel, tile, streamed),
            5 => rows_avx2::<W, 5, 2>(a, stride, panel, tile, streamed),
            _ => rows_avx2::<W, ROWS2, 2>(a, stride, panel, tile, streamed),
        }
    }
}

/// `R` rows, `C` vectors of columns at a time; weights that are `streamed` come from memory.
#[target_feature(enable = "avx2")]
fn rows_avx2<W: Stored, const R: usize, const C: usize>(
    a: &[i16],
    stride: usize,
    panel: &[W],
    tile: &mut [[i32; NR]],
    streamed: bool,
) {
    let rows = pairs::<R>(a, stride, panel.len() / NR);
    for from in (0..NR).step_by(8 * C) {
        let mut sums = [[_mm256_setzero_si256(); C]; R];
        for (i, weights) in panel.as_chunks::<{ 2 * NR }>().0.iter().enumerate() {
            let (vectors, _) = weights[2 * from..].as_chunks::<16>();
            if streamed && from == 0 {
                prefetch(weights);
            }
            // SAFETY: this function has AVX2.
            let w: [__m256i; C] = std::array::from_fn(|c| unsafe { W::load256(&vectors[c]) });
            for r in 0..R {
                let x = _mm256_set1_epi32(pair(&rows[r][i]));
                for c in 0..C {
                    sums[r][c] = _mm256_add_epi32(sums[r][c], _mm256_madd_epi16(x, w[c]));
                }
            }
        }
        add_avx2(sums, from, tile);
    }
}

/// Adds sums to rows from a column on.
#[inline]
#[target_feature(enable = "avx2")]
fn add_avx2<const R: usize, const C: usize>(sums: [[__m256i; C]; R], from: usize, tile: &mut [[i32; NR]]) {
    for (row, sums) in tile.iter_mut().zip(sums) {
        let (vectors, _) = row[from..].as_chunks_mut::<8>();
        for (to, sum) in vectors.iter_mut().zip(sums) {
            // SAFETY: `to` is 8 elements of 32 bits.
            unsafe {
                let to = (&raw mut *to).cast::<__m256i>();
                _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), sum));
            }
        }
    }
}

/// As [`limbs_avx2`], with weights of four bits.
#[target_feature(enable = "avx2")]
fn nibbles_avx2(a: &[i16], stride: usize, rows: usize, blocks: &[Block], tile: &mut LimbTile) {
    for first in (0..rows).step_by(ROWS2) {
        let streamed = rows <= STREAMED;
        let (a, tile) = (&a[first * stride..], &mut tile[first..]);
        match rows - first {
            1 => nibble_rows_avx2::<1>(a, stride, blocks, tile, streamed),
            2 => nibble_rows_avx2::<2>(a, stride, blocks, tile, streamed),
            3 => nibble_rows_avx2::<3>(a, stride, blocks, tile, streamed),
            4 => nibble_rows_avx2::<4>(a, stride, blocks, tile, streamed),
            5 => nibble_rows_avx2::<5>(a, stride, blocks, tile, streamed),
            _ => nibble_rows_avx2::<ROWS2>(a, stride, blocks, tile, streamed),
        }
    }
}

/// Columns whose weights are in the lower halves of bytes, then the others.
#[target_feature(enable = "avx2")]
fn nibble_rows_avx2<const R: usize>(
    a: &[i16],
    stride: usize,
    blocks: &[Block],
    tile: &mut [[i32; NR]],
    streamed: bool,
) {
    let rows = pairs::<R>(a, stride, blocks.len() * BLOCK).map(|row| row.as_chunks::<{ BLOCK / 2 }>().0);
    for from in [0, NR / 2] {
        // To the bits of which rounded upper halves of products are sixteenths.
        let shift = _mm_cvtsi32_si128(if from == 0 { 11 } else { 7 });
        let mut sums = [[_mm256_setzero_si256(); 2]; R];
        for (b, block) in blocks.iter().enumerate() {
            if streamed && from == 0 {
                prefetch(block);
            }
            let inputs: [_; R] = std::array::from_fn(|r| &rows[r][b]);
            let scales: [__m256i; 2] = twice_avx2(&block.scales, from);
            let offsets: [__m256i; 2] = twice_avx2(&block.offsets, from);
            for (i, bytes) in block.pairs.iter().enumerate() {
                let (halves, _) = bytes.as_chunks::<16>();
                let w: [__m256i; 2] = std::array::from_fn(|c| {
                    // SAFETY: half of the bytes are 16.
                    let both = unsafe { _mm256_cvtepu8_epi16(_mm_loadu_si128((&raw const halves[c]).cast())) };
                    let level = _mm256_and_si256(_mm256_sll_epi16(both, shift), _mm256_set1_epi16(15 << 11));
                    _mm256_add_epi16(_mm256_mulhrs_epi16(level, scales[c]), offsets[c])
                });
                for r in 0..R {
                    let x = _mm256_set1_epi32(pair(&inputs[r][i]));
                    for c in 0..2 {
                        sums[r][c] = _mm256_add_epi32(sums[r][c], _mm256_madd_epi16(x, w[c]));
                    }
                }
            }
        }
        add_avx2(sums, from, tile);
    }
}

/// Each of sixteen elements twice.
#[inline]
#[target_feature(enable = "avx2")]
fn twice_avx2<W>(of: &[W; NR], from: usize) -> [__m256i; 2] {
    let (vectors, _) = of[from..].as_chunks::<8>();
    const { assert!(size_of::<W>() == 2) };
    std::array::from_fn(|c| {
        // SAFETY: a vector is 16 bytes.
        let once = unsafe { _mm256_cvtepu16_epi32(_mm_loadu_si128((&raw const vectors[c]).cast())) };
        _mm256_or_si256(once, _mm256_slli_epi32::<16>(once))
    })
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn limbs_avx512<W: Stored>(a: &[i16], stride: usize, rows: usize, panel: &[W], tile: &mut LimbTile) {
    match rows {
        1 => rows_avx512::<W, 1>(a, stride, panel, tile),
        2 => rows_avx512::<W, 2>(a, stride, panel, tile),
        3 => rows_avx512::<W, 3>(a, stride, panel, tile),
        4 => rows_avx512::<W, 4>(a, stride, panel, tile),
        5 => rows_avx512::<W, 5>(a, stride, panel, tile),
        6 => rows_avx512::<W, 6>(a, stride, panel, tile),
        7 => rows_avx512::<W, 7>(a, stride, panel, tile),
        8 => rows_avx512::<W, 8>(a, stride, panel, tile),
        9 => rows_avx512::<W, 9>(a, stride, panel, tile),
        10 => rows_avx512::<W, 10>(a, stride, panel, tile),
        11 => rows_avx512::<W, 11>(a, stride, panel, tile),
        _ => rows_avx512::<W, MR>(a, stride, panel, tile),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn rows_avx512<W: Stored, const R: usize>(a: &[i16], stride: usize, panel: &[W], tile: &mut LimbTile) {
    let rows = pairs::<R>(a, stride, panel.len() / NR);
    let mut sums = [[_mm512_setzero_si512(); 2]; R];
    for (i, weights) in panel.as_chunks::<{ 2 * NR }>().0.iter().enumerate() {
        let (vectors, _) = weights.as_chunks::<32>();
        if R <= STREAMED {
            prefetch(weights);
        }
        // SAFETY: this function has the features.
        let (w0, w1) = unsafe { (W::load512(&vectors[0]), W::load512(&vectors[1])) };
        for r in 0..R {
            let x = _mm512_set1_epi32(pair(&rows[r][i]));
            sums[r][0] = _mm512_dpwssd_epi32(sums[r][0], x, w0);
            sums[r][1] = _mm512_dpwssd_epi32(sums[r][1], x, w1);
        }
    }
    add_avx512(sums, tile);
}

/// Adds sums to rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn add_avx512<const R: usize>(sums: [[__m512i; 2]; R], tile: &mut LimbTile) {
    for (row, sums) in tile.iter_mut().zip(sums) {
        let (vectors, _) = row.as_chunks_mut::<16>();
        for (to, sum) in vectors.iter_mut().zip(sums) {
            // SAFETY: `to` is 16 elements of 32 bits.
            unsafe {
                let to = (&raw mut *to).cast::<i32>();
                _mm512_storeu_epi32(to, _mm512_add_epi32(_mm512_loadu_epi32(to), sum));
            }
        }
    }
}

/// As [`limbs_avx512`], with weights of four bits.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn nibbles_avx512(a: &[i16], stride: usize, rows: usize, blocks: &[Block], tile: &mut LimbTile) {
    match rows {
        1 => nibble_rows_avx512::<1>(a, stride, blocks, tile),
        2 => nibble_rows_avx512::<2>(a, stride, blocks, tile),
        3 => nibble_rows_avx512::<3>(a, stride, blocks, tile),
        4 => nibble_rows_avx512::<4>(a, stride, blocks, tile),
        5 => nibble_rows_avx512::<5>(a, stride, blocks, tile),
        6 => nibble_rows_avx512::<6>(a, stride, blocks, tile),
        7 => nibble_rows_avx512::<7>(a, stride, blocks, tile),
        8 => nibble_rows_avx512::<8>(a, stride, blocks, tile),
        9 => nibble_rows_avx512::<9>(a, stride, blocks, tile),
        10 => nibble_rows_avx512::<10>(a, stride, blocks, tile),
        11 => nibble_rows_avx512::<11>(a, stride, blocks, tile),
        _ => nibble_rows_avx512::<MR>(a, stride, blocks, tile),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn nibble_rows_avx512<const R: usize>(a: &[i16], stride: usize, blocks: &[Block], tile: &mut LimbTile) {
    let rows = pairs::<R>(a, stride, blocks.len() * BLOCK).map(|row| row.as_chunks::<{ BLOCK / 2 }>().0);
    let mut sums = [[_mm512_setzero_si512(); 2]; R];
    for (b, block) in blocks.iter().enumerate() {
        if R <= STREAMED {
            prefetch(block);
        }
        let inputs: [_; R] = std::array::from_fn(|r| &rows[r][b]);
        let [s0, s1] = twice_avx512(&block.scales);
        let [t0, t1] = twice_avx512(&block.offsets);
        for (i, bytes) in block.pairs.iter().enumerate() {
            // SAFETY: the bytes are 32.
            let both = unsafe { _mm512_cvtepu8_epi16(_mm256_loadu_si256((&raw const *bytes).cast())) };
            // At the bits of which rounded upper halves of products are sixteenths.
            let lower = _mm512_and_si512(_mm512_slli_epi16::<11>(both), _mm512_set1_epi16(15 << 11));
            let upper = _mm512_and_si512(_mm512_slli_epi16::<7>(both), _mm512_set1_epi16(15 << 11));
            let w0 = _mm512_add_epi16(_mm512_mulhrs_epi16(lower, s0), t0);
            let w1 = _mm512_add_epi16(_mm512_mulhrs_epi16(upper, s1), t1);
            for r in 0..R {
                let x = _mm512_set1_epi32(pair(&inputs[r][i]));
                sums[r][0] = _mm512_dpwssd_epi32(sums[r][0], x, w0);
                sums[r][1] = _mm512_dpwssd_epi32(sums[r][1], x, w1);
            }
        }
    }
    add_avx512(sums, tile);
}

/// Each element twice.
#[inline]
#[target_feature(enable = "avx512f")]
fn twice_avx512<W>(of: &[W; NR]) -> [__m512i; 2] {
    let (vectors, _) = of.as_chunks::<16>();
    const { assert!(size_of::<W>() == 2) };
    std::array::from_fn(|c| {
        // SAFETY: a vector is 32 bytes.
        let once = unsafe { _mm512_cvtepu16_epi32(_mm256_loadu_si256((&raw const vectors[c]).cast())) };
        _mm512_or_si512(once, _mm512_slli_epi32::<16>(once))
    })
}
