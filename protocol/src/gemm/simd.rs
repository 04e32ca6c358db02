//! The tile kernels of the parent for x86-64 vector units.
//!
//! A value of [`Avx2`] or [`Avx512`] is proof that the processor has the instructions; only `detect` makes one.
//! Besides calling functions compiled for those instructions, the unsafe code here is unaligned loads and stores,
//! each through a reference to an array of exactly that size.

use std::arch::x86_64::*;

use super::{LimbTile, MR, NR, word_tile};

/// 16 ring words of a tile row, as pairs of 16-bit operands: what the AVX2 kernel handles of a panel row at a time.
const HALF: usize = NR / 2;
/// Rows that the AVX2 kernel keeps in registers.
const ROWS2: usize = 6;

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

    pub(super) fn limb_tile(self, a: &[i16], stride: usize, rows: usize, panel: &[i16], tile: &mut LimbTile) {
        for first in (0..rows).step_by(ROWS2) {
            let a = &a[first * stride..];
            let tile = &mut tile[first..];
            for half in [0, HALF] {
                // SAFETY: `self` proves AVX2.
                unsafe {
                    match rows - first {
                        1 => limbs_avx2::<1>(a, stride, panel, half, tile),
                        2 => limbs_avx2::<2>(a, stride, panel, half, tile),
                        3 => limbs_avx2::<3>(a, stride, panel, half, tile),
                        4 => limbs_avx2::<4>(a, stride, panel, half, tile),
                        5 => limbs_avx2::<5>(a, stride, panel, half, tile),
                        _ => limbs_avx2::<6>(a, stride, panel, half, tile),
                    }
                }
            }
        }
    }

    pub(super) fn word32_tile(self, a: &[u32], k: usize, rows: usize, panel: &[u32], tile: &mut [[u32; NR]; MR]) {
        #[target_feature(enable = "avx2")]
        fn run(a: &[u32], k: usize, rows: usize, panel: &[u32], tile: &mut [[u32; NR]; MR]) {
            word_tile::<_, 4, 16>(a, k, rows, panel, tile);
        }
        // SAFETY: `self` proves AVX2.
        unsafe { run(a, k, rows, panel, tile) }
    }

    pub(super) fn word64_tile(self, a: &[u64], k: usize, rows: usize, panel: &[u64], tile: &mut [[u64; NR]; MR]) {
        #[target_feature(enable = "avx2")]
        fn run(a: &[u64], k: usize, rows: usize, panel: &[u64], tile: &mut [[u64; NR]; MR]) {
            word_tile::<_, 2, 8>(a, k, rows, panel, tile);
        }
        // SAFETY: `self` proves AVX2.
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

    pub(super) fn limb_tile(self, a: &[i16], stride: usize, rows: usize, panel: &[i16], tile: &mut LimbTile) {
        // SAFETY: `self` proves the features.
        unsafe {
            match rows {
                1 => limbs_avx512::<1>(a, stride, panel, tile),
                2 => limbs_avx512::<2>(a, stride, panel, tile),
                3 => limbs_avx512::<3>(a, stride, panel, tile),
                4 => limbs_avx512::<4>(a, stride, panel, tile),
                5 => limbs_avx512::<5>(a, stride, panel, tile),
                6 => limbs_avx512::<6>(a, stride, panel, tile),
                7 => limbs_avx512::<7>(a, stride, panel, tile),
                8 => limbs_avx512::<8>(a, stride, panel, tile),
                9 => limbs_avx512::<9>(a, stride, panel, tile),
                10 => limbs_avx512::<10>(a, stride, panel, tile),
                11 => limbs_avx512::<11>(a, stride, panel, tile),
                _ => limbs_avx512::<MR>(a, stride, panel, tile),
            }
        }
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

#[target_feature(enable = "avx2")]
fn limbs_avx2<const R: usize>(a: &[i16], stride: usize, panel: &[i16], half: usize, tile: &mut [[i32; NR]]) {
    let rows = pairs::<R>(a, stride, panel.len() / NR);
    let mut sums = [[_mm256_setzero_si256(); 2]; R];
    for (i, weights) in panel.as_chunks::<{ 2 * NR }>().0.iter().enumerate() {
        let (vectors, _) = weights[2 * half..].as_chunks::<16>();
        let (w0, w1) = (load256(&vectors[0]), load256(&vectors[1]));
        for r in 0..R {
            let x = _mm256_set1_epi32(pair(&rows[r][i]));
            sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(x, w0));
            sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(x, w1));
        }
    }
    for (row, sums) in tile.iter_mut().zip(sums) {
        let (vectors, _) = row[half..].as_chunks_mut::<8>();
        for (to, sum) in vectors.iter_mut().zip(sums) {
            // SAFETY: `to` is 8 elements of 32 bits.
            unsafe {
                let to = (&raw mut *to).cast::<__m256i>();
                _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), sum));
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load256(from: &[i16; 16]) -> __m256i {
    // SAFETY: `from` is 32 bytes.
    unsafe { _mm256_loadu_si256((&raw const *from).cast()) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn limbs_avx512<const R: usize>(a: &[i16], stride: usize, panel: &[i16], tile: &mut LimbTile) {
    let rows = pairs::<R>(a, stride, panel.len() / NR);
    let mut sums = [[_mm512_setzero_si512(); 2]; R];
    for (i, weights) in panel.as_chunks::<{ 2 * NR }>().0.iter().enumerate() {
        let (vectors, _) = weights.as_chunks::<32>();
        let (w0, w1) = (load512(&vectors[0]), load512(&vectors[1]));
        for r in 0..R {
            let x = _mm512_set1_epi32(pair(&rows[r][i]));
            sums[r][0] = _mm512_dpwssd_epi32(sums[r][0], x, w0);
            sums[r][1] = _mm512_dpwssd_epi32(sums[r][1], x, w1);
        }
    }
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

#[inline]
#[target_feature(enable = "avx512f")]
fn load512(from: &[i16; 32]) -> __m512i {
    // SAFETY: `from` is 64 bytes.
    unsafe { _mm512_loadu_si512((&raw const *from).cast()) }
}
