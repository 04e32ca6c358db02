//! Which kernels to run: those for the vector units that this processor has.

use std::ops::Range;

use super::limbs::{self, Limbs};
#[cfg(target_arch = "aarch64")]
use super::neon;
use super::nibbles::{self, BLOCK, Block};
use super::panels::Panel;
#[cfg(target_arch = "x86_64")]
use super::simd;
use super::ternary::Ternary;
use super::words;
use super::{LimbTile, MR, NR, tables};

/// Which kernels to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Plain loops.
    Scalar,
    /// Vectors of 32 bytes.
    #[cfg(target_arch = "x86_64")]
    Avx2(simd::Avx2),
    /// Vectors of 64 bytes, with sums of 16-bit products.
    #[cfg(target_arch = "x86_64")]
    Avx512(simd::Avx512),
    /// Vectors of 16 bytes.
    #[cfg(target_arch = "aarch64")]
    Neon(neon::Neon),
}

impl Level {
    /// The best that this processor has. The answer is cached by the standard library.
    pub fn detect() -> Level {
        Level::all().last().unwrap_or(Level::Scalar)
    }

    /// What this processor has, slowest first.
    pub fn all() -> impl Iterator<Item = Level> {
        #[cfg(target_arch = "x86_64")]
        let vector = [simd::Avx2::detect().map(Level::Avx2), simd::Avx512::detect().map(Level::Avx512)];
        #[cfg(target_arch = "aarch64")]
        let vector = [neon::Neon::detect().map(Level::Neon)];
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        let vector = [None];
        [Some(Level::Scalar)].into_iter().chain(vector).flatten()
    }

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Level::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(_) => "avx512",
            #[cfg(target_arch = "aarch64")]
            Level::Neon(_) => "neon",
        }
    }

    /// `tile[r][j] += sum_i a[r * stride + i] * panel[i][j]` for `rows` rows, wrapping.
    pub(super) fn limb_tile(self, a: &[i16], stride: usize, rows: usize, panel: Panel, tile: &mut LimbTile) {
        match self {
            Level::Scalar => match panel {
                Panel::Four(p) => widened(p, a, |a, p| limb_tile_plain(a, stride, rows, p, tile)),
                Panel::Narrow(p) => limb_tile_plain(a, stride, rows, p, tile),
                Panel::Wide(p) => limb_tile_plain(a, stride, rows, p, tile),
            },
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(cpu) => cpu.limb_tile(a, stride, rows, panel, tile),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(cpu) => cpu.limb_tile(a, stride, rows, panel, tile),
            #[cfg(target_arch = "aarch64")]
            Level::Neon(cpu) => cpu.limb_tile(a, stride, rows, panel, tile),
        }
    }

    /// See [`nibbles::widen`].
    pub(super) fn widen(self, blocks: &[Block], to: &mut [i16]) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(cpu) => cpu.widen(blocks, to),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(cpu) => cpu.widen(blocks, to),
            _ => nibbles::widen(blocks, to),
        }
    }

    /// See [`limbs::split`].
    pub(super) fn split(self, x: &[u64], cols: usize, limbs: &Limbs, a: &mut [i16]) {
        match self {
            Level::Scalar => limbs::split(x, cols, limbs, a),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(cpu) => cpu.split(x, cols, limbs, a),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(cpu) => cpu.split(x, cols, limbs, a),
            #[cfg(target_arch = "aarch64")]
            Level::Neon(cpu) => cpu.split(x, cols, limbs, a),
        }
    }

    /// See [`limbs::combine`].
    pub(super) fn combine(self, limbs: &Limbs, sums: &[[i32; NR]], out: &mut [u64]) {
        match self {
            Level::Scalar => limbs::combine(limbs, sums, out),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(cpu) => cpu.combine(limbs, sums, out),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(cpu) => cpu.combine(limbs, sums, out),
            #[cfg(target_arch = "aarch64")]
            Level::Neon(cpu) => cpu.combine(limbs, sums, out),
        }
    }

    /// `x W^T` for the outputs of some panels, row-major; `x` may have bits above the ring.
    pub(super) fn ternary(self, x: &[u64], t: &Ternary, panels: Range<usize>, bits: u32, out: &mut [u64]) {
        match self {
            Level::Scalar => tables::outputs(x, t, panels, bits, out),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(cpu) => cpu.ternary(x, t, panels, bits, out),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(cpu) => cpu.ternary(x, t, panels, bits, out),
            #[cfg(target_arch = "aarch64")]
            Level::Neon(cpu) => cpu.ternary(x, t, panels, bits, out),
        }
    }

    /// See [`words::word_tile`].
    pub(super) fn word32_tile(self, a: &[u32], k: usize, rows: usize, panel: &[u32], tile: &mut [[u32; NR]; MR]) {
        match self {
            Level::Scalar => words::word_tile::<_, 2, 8>(a, k, rows, panel, tile),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(cpu) => cpu.word32_tile(a, k, rows, panel, tile),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(cpu) => cpu.word32_tile(a, k, rows, panel, tile),
            #[cfg(target_arch = "aarch64")]
            Level::Neon(cpu) => cpu.word32_tile(a, k, rows, panel, tile),
        }
    }

    /// See [`words::word_tile`].
    pub(super) fn word64_tile(self, a: &[u64], k: usize, rows: usize, panel: &[u64], tile: &mut [[u64; NR]; MR]) {
        match self {
            Level::Scalar => words::word_tile::<_, 2, 8>(a, k, rows, panel, tile),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(cpu) => cpu.word64_tile(a, k, rows, panel, tile),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(cpu) => cpu.word64_tile(a, k, rows, panel, tile),
            #[cfg(target_arch = "aarch64")]
            Level::Neon(cpu) => cpu.word64_tile(a, k, rows, panel, tile),
        }
    }
}

fn limb_tile_plain<W: Copy + Into<i32>>(a: &[i16], stride: usize, rows: usize, panel: &[W], tile: &mut LimbTile) {
    let depth = panel.len() / NR;
    for (r, sums) in tile[..rows].iter_mut().enumerate() {
        let a = &a[r * stride..][..depth];
        for (x, weights) in a.chunks_exact(2).zip(panel.chunks_exact(2 * NR)) {
            for (sum, w) in sums.iter_mut().zip(weights.chunks_exact(2)) {
                let pair = (i32::from(x[0]) * w[0].into()).wrapping_add(i32::from(x[1]) * w[1].into());
                *sum = sum.wrapping_add(pair);
            }
        }
    }
}

/// Goes through blocks of weights one by one, in 16 bits, each with the inputs from it on.
fn widened(blocks: &[Block], a: &[i16], mut with: impl FnMut(&[i16], &[i16])) {
    for (block, at) in blocks.iter().zip((0..).step_by(BLOCK)) {
        let mut wide = [[0; 2 * NR]; BLOCK / 2];
        block.widen(&mut wide);
        with(&a[at..], wide.as_flattened());
    }
}
