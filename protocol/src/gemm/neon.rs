//! The tile kernels of the parent for aarch64's vectors of 16 bytes.
//!
//! A value of [`Neon`] is proof that the processor has the instructions; only `detect` makes one. Besides calling functions
//! compiled for those instructions, the unsafe code here is loads and stores, each through a reference to an array of
//! exactly that size.
//!
//! What these kernels compute has been checked by the parent's tests on an emulated processor; how fast they are has not been
//! measured.

use std::arch::aarch64::*;
use std::arch::is_aarch64_feature_detected;
use std::ops::Range;

use super::limbs::{self, Limbs};
use super::nibbles::{BLOCK, Block};
use super::panels::Panel;
use super::ternary::Ternary;
use super::words::word_tile;
use super::{LimbTile, MR, NR, tables};

/// Rows that the limb kernel keeps in registers.
const ROWS: usize = 4;
/// Outputs that it handles at a time.
const COLUMNS: usize = 16;

/// Proof of Advanced SIMD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neon(());

impl Neon {
    pub(super) fn detect() -> Option<Neon> {
        // Kernels read bytes of words in their order.
        (cfg!(target_endian = "little") && is_aarch64_feature_detected!("neon")).then_some(Neon(()))
    }

    pub(super) fn limb_tile(self, a: &[i16], stride: usize, rows: usize, panel: Panel, tile: &mut LimbTile) {
        // SAFETY: `self` proves the feature.
        unsafe {
            match panel {
                Panel::Four(p) => nibbles_neon(a, stride, rows, p, tile),
                Panel::Narrow(p) => limbs_neon(a, stride, rows, p, tile),
                Panel::Wide(p) => limbs_neon(a, stride, rows, p, tile),
            }
        }
    }

    pub(super) fn split(self, x: &[u64], cols: usize, limbs: &Limbs, a: &mut [i16]) {
        limbs::split(x, cols, limbs, a);
    }

    pub(super) fn combine(self, limbs: &Limbs, sums: &[[i32; NR]], out: &mut [u64]) {
        limbs::combine(limbs, sums, out);
    }

    pub(super) fn ternary(self, x: &[u64], t: &Ternary, panels: Range<usize>, bits: u32, out: &mut [u64]) {
        if x.len() / t.cols_in() <= Neon::few(bits) {
            return self.byte_planes(x, t, panels, bits, out);
        }
        // Sums of several rows are vectors of every processor that this is compiled for.
        tables::outputs(x, t, panels, bits, out);
    }

    pub(super) fn word32_tile(self, a: &[u32], k: usize, rows: usize, panel: &[u32], tile: &mut [[u32; NR]; MR]) {
        // SAFETY: `self` proves the feature.
        unsafe { word32_neon(a, k, rows, panel, tile) }
    }

    pub(super) fn word64_tile(self, a: &[u64], k: usize, rows: usize, panel: &[u64], tile: &mut [[u64; NR]; MR]) {
        // There is no product of 64-bit lanes.
        word_tile::<_, 2, 8>(a, k, rows, panel, tile);
    }
}

/// Packed weights: the first and the second of eight outputs' pairs, 16 bits each.
trait Stored: Sized {
    /// # Safety
    /// Advanced SIMD.
    unsafe fn load(from: &[Self; 16]) -> int16x8x2_t;
}

impl Stored for i16 {
    #[inline(always)]
    unsafe fn load(from: &[i16; 16]) -> int16x8x2_t {
        // SAFETY: `from` is 32 bytes; the caller has the feature.
        unsafe { vld2q_s16(from.as_ptr()) }
    }
}

impl Stored for i8 {
    #[inline(always)]
    unsafe fn load(from: &[i8; 16]) -> int16x8x2_t {
        // SAFETY: `from` is 16 bytes; the caller has the feature.
        unsafe {
            let int8x8x2_t(first, second) = vld2_s8(from.as_ptr());
            int16x8x2_t(vmovl_s8(first), vmovl_s8(second))
        }
    }
}

#[target_feature(enable = "neon")]
fn limbs_neon<W: Stored>(a: &[i16], stride: usize, rows: usize, panel: &[W], tile: &mut LimbTile) {
    for first in (0..rows).step_by(ROWS) {
        let (a, tile) = (&a[first * stride..], &mut tile[first..]);
        match rows - first {
            1 => rows_neon::<W, 1>(a, stride, panel, tile),
            2 => rows_neon::<W, 2>(a, stride, panel, tile),
            3 => rows_neon::<W, 3>(a, stride, panel, tile),
            _ => rows_neon::<W, ROWS>(a, stride, panel, tile),
        }
    }
}

#[target_feature(enable = "neon")]
fn rows_neon<W: Stored, const R: usize>(a: &[i16], stride: usize, panel: &[W], tile: &mut [[i32; NR]]) {
    let depth = panel.len() / NR;
    let rows: [&[[i16; 2]]; R] = std::array::from_fn(|r| a[r * stride..][..depth].as_chunks().0);
    for from in (0..NR).step_by(COLUMNS) {
        let mut sums = [[vdupq_n_s32(0); COLUMNS / 4]; R];
        for (i, weights) in panel.as_chunks::<{ 2 * NR }>().0.iter().enumerate() {
            let (vectors, _) = weights[2 * from..].as_chunks::<16>();
            // SAFETY: this function has the feature.
            let w = unsafe { [W::load(&vectors[0]), W::load(&vectors[1])] };
            for r in 0..R {
                multiply_neon(&rows[r][i], &w, &mut sums[r]);
            }
        }
        add_neon(sums, from, tile);
    }
}

/// Sums of columns of a row.
type Sums = [int32x4_t; COLUMNS / 4];

/// Adds the products of a pair of limbs and their weights.
#[inline]
#[target_feature(enable = "neon")]
fn multiply_neon([x, y]: &[i16; 2], w: &[int16x8x2_t; COLUMNS / 8], sums: &mut Sums) {
    for (w, sums) in w.iter().zip(sums.as_chunks_mut::<2>().0) {
        sums[0] = vmlal_n_s16(sums[0], vget_low_s16(w.0), *x);
        sums[1] = vmlal_high_n_s16(sums[1], w.0, *x);
        sums[0] = vmlal_n_s16(sums[0], vget_low_s16(w.1), *y);
        sums[1] = vmlal_high_n_s16(sums[1], w.1, *y);
    }
}

/// Adds sums to rows from a column on.
#[inline]
#[target_feature(enable = "neon")]
fn add_neon<const R: usize>(sums: [Sums; R], from: usize, tile: &mut [[i32; NR]]) {
    for (row, sums) in tile.iter_mut().zip(sums) {
        for (to, sum) in row[from..].as_chunks_mut::<4>().0.iter_mut().zip(sums) {
            // SAFETY: `to` is 4 elements of 32 bits.
            unsafe { vst1q_s32(to.as_mut_ptr(), vaddq_s32(vld1q_s32(to.as_ptr()), sum)) }
        }
    }
}

/// As [`limbs_neon`], with weights of four bits.
#[target_feature(enable = "neon")]
fn nibbles_neon(a: &[i16], stride: usize, rows: usize, blocks: &[Block], tile: &mut LimbTile) {
    for first in (0..rows).step_by(ROWS) {
        let (a, tile) = (&a[first * stride..], &mut tile[first..]);
        match rows - first {
            1 => nibble_rows_neon::<1>(a, stride, blocks, tile),
            2 => nibble_rows_neon::<2>(a, stride, blocks, tile),
            3 => nibble_rows_neon::<3>(a, stride, blocks, tile),
            _ => nibble_rows_neon::<ROWS>(a, stride, blocks, tile),
        }
    }
}

/// Columns whose weights are in the lower halves of bytes, then the others.
#[target_feature(enable = "neon")]
fn nibble_rows_neon<const R: usize>(a: &[i16], stride: usize, blocks: &[Block], tile: &mut [[i32; NR]]) {
    const { assert!(COLUMNS == NR / 2) };
    let rows: [&[[i16; 2]]; R] = std::array::from_fn(|r| a[r * stride..][..blocks.len() * BLOCK].as_chunks().0);
    let rows = rows.map(|row| row.as_chunks::<{ BLOCK / 2 }>().0);
    for from in [0, COLUMNS] {
        let to_upper = vdupq_n_s8(if from == 0 { 4 } else { 0 });
        let mut sums = [[vdupq_n_s32(0); COLUMNS / 4]; R];
        for (b, block) in blocks.iter().enumerate() {
            let inputs: [_; R] = std::array::from_fn(|r| &rows[r][b]);
            let (scales, offsets) = (columns_neon(&block.scales, from), columns_neon(&block.offsets, from));
            for (i, bytes) in block.pairs.iter().enumerate() {
                // SAFETY: the bytes are 32.
                let uint8x16x2_t(first, second) = unsafe { vld2q_u8(bytes.as_ptr()) };
                let first = weights_neon(vshlq_u8(first, to_upper), scales, offsets);
                let second = weights_neon(vshlq_u8(second, to_upper), scales, offsets);
                let w = [int16x8x2_t(first[0], second[0]), int16x8x2_t(first[1], second[1])];
                for r in 0..R {
                    multiply_neon(&inputs[r][i], &w, &mut sums[r]);
                }
            }
        }
        add_neon(sums, from, tile);
    }
}

/// What sixteen columns from one on have.
#[inline]
#[target_feature(enable = "neon")]
fn columns_neon(of: &[i16; NR], from: usize) -> [int16x8_t; COLUMNS / 8] {
    let (vectors, _) = of[from..].as_chunks::<8>();
    // SAFETY: a vector is 16 bytes.
    unsafe { [vld1q_s16(vectors[0].as_ptr()), vld1q_s16(vectors[1].as_ptr())] }
}

/// The weights of levels that are in the upper halves of bytes.
#[inline]
#[target_feature(enable = "neon")]
fn weights_neon(levels: uint8x16_t, scales: [int16x8_t; 2], offsets: [int16x8_t; 2]) -> [int16x8_t; 2] {
    let levels = vandq_u8(levels, vdupq_n_u8(15 << 4));
    // At the bits of which rounded upper halves of doubled products are sixteenths.
    let lower = vreinterpretq_s16_u16(vshll_n_u8::<7>(vget_low_u8(levels)));
    let upper = vreinterpretq_s16_u16(vshll_high_n_u8::<7>(levels));
    [vaddq_s16(vqrdmulhq_s16(lower, scales[0]), offsets[0]), vaddq_s16(vqrdmulhq_s16(upper, scales[1]), offsets[1])]
}

/// Four rows by 16 columns of sums at a time, then row by row.
#[target_feature(enable = "neon")]
fn word32_neon(a: &[u32], k: usize, rows: usize, panel: &[u32], tile: &mut [[u32; NR]; MR]) {
    let whole = rows - rows % ROWS;
    for first in (0..whole).step_by(ROWS) {
        words_neon::<ROWS>(&a[first * k..], k, panel, &mut tile[first..]);
    }
    for first in whole..rows {
        words_neon::<1>(&a[first * k..], k, panel, &mut tile[first..]);
    }
}

#[target_feature(enable = "neon")]
fn words_neon<const R: usize>(a: &[u32], k: usize, panel: &[u32], tile: &mut [[u32; NR]]) {
    let rows: [&[u32]; R] = std::array::from_fn(|r| &a[r * k..][..k]);
    for from in (0..NR).step_by(COLUMNS) {
        let mut sums = [[vdupq_n_u32(0); COLUMNS / 4]; R];
        for (i, b) in panel.as_chunks::<NR>().0.iter().take(k).enumerate() {
            let (vectors, _) = b[from..].as_chunks::<4>();
            // SAFETY: each is 16 bytes.
            let b: [uint32x4_t; COLUMNS / 4] = std::array::from_fn(|c| unsafe { vld1q_u32(vectors[c].as_ptr()) });
            for r in 0..R {
                let x = vdupq_n_u32(rows[r][i]);
                for (sum, b) in sums[r].iter_mut().zip(b) {
                    *sum = vmlaq_u32(*sum, x, b);
                }
            }
        }
        for (row, sums) in tile.iter_mut().zip(sums) {
            for (to, sum) in row[from..].as_chunks_mut::<4>().0.iter_mut().zip(sums) {
                // SAFETY: `to` is 4 elements of 32 bits.
                unsafe { vst1q_u32(to.as_mut_ptr(), vaddq_u32(vld1q_u32(to.as_ptr()), sum)) }
            }
        }
    }
}
