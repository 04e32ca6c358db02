//! Matrix products in Z_2^bits: shares times public 16-bit weights, and masked values times masked values.
//!
//! [`linear`] splits the ring words into signed limbs ([`limbs`]) and multiplies limbs by weights, sixteen bits by sixteen
//! into wrapping 32, which is what processors do fastest; of weights that are -1, 0 and 1 times a magnitude it looks sums of
//! three up instead ([`ternary`]). [`matmul`] and [`matmul_bt`] multiply whole words ([`words`]).
//!
//! Work is done in tiles of `MR` rows by `NR` columns over operands packed for them. The tile kernels are plain loops
//! here; `simd` and `neon` compile or write them for the vector units found at run time ([`level`]).

#[allow(unsafe_code)]
#[cfg(target_arch = "aarch64")]
mod byte_planes;
pub(crate) mod gram;
mod input;
mod level;
mod limbs;
#[allow(unsafe_code)]
#[cfg(target_arch = "aarch64")]
mod neon;
mod nibbles;
mod panels;
#[allow(unsafe_code)]
#[cfg(target_arch = "x86_64")]
mod planes;
#[allow(unsafe_code)]
#[cfg(target_arch = "x86_64")]
mod simd;
mod tables;
mod ternary;
#[cfg(test)]
mod tests;
mod threads;
mod weights;
mod words;

use std::ops::Range;

use crate::ring::mask;
use input::Input;
#[doc(hidden)]
pub use level::Level;
use limbs::Limbs;
use panels::{Panel, Panels};
pub use threads::Threads;
pub use weights::Weights;
pub(crate) use weights::{Packed, Packing};
#[doc(hidden)]
pub use words::{Order, product_on};
pub use words::{matmul, matmul_bt};

/// Rows of a tile.
const MR: usize = 12;
/// Columns of a tile, and of a packed panel.
const NR: usize = 32;
/// Inner elements of a weight panel to go through at a time, so that it stays in the second-level cache.
const KC: usize = 2048;

/// 16-bit limb products accumulated for a tile, wrapping.
type LimbTile = [[i32; NR]; MR];

/// `out[r][o] = sum_i x[r][i] * w[o][i] mod 2^bits`, all row-major; `x` may have bits above the ring.
pub fn linear(x: &[u64], rows: usize, w: &Weights, bits: u32, out: &mut [u64]) {
    linear_on(Level::detect(), x, rows, w, bits, out);
}

/// As [`linear`], by the kernels of one level.
#[doc(hidden)]
pub fn linear_on(level: Level, x: &[u64], rows: usize, w: &Weights, bits: u32, out: &mut [u64]) {
    assert_eq!(x.len(), rows * w.cols_in(), "input is {rows} x {}", w.cols_in());
    assert_eq!(out.len(), rows * w.rows_out(), "output is {rows} x {}", w.rows_out());
    if rows == 0 || w.cols_in() == 0 || w.rows_out() == 0 {
        return out.fill(0);
    }
    Input::new(level, x, w, bits, false).outputs(0..rows, 0..w.panels(), out);
}

/// Outputs of some panels, row-major, of rows split into limbs.
fn outputs(level: Level, limbs: &Limbs, a: &[i16], w: &Panels, panels: Range<usize>, bits: u32, out: &mut [u64]) {
    out.fill(0);
    let stride = w.cols_in.next_multiple_of(2);
    let row_len = limbs.count() * stride;
    let columns = (panels.end * NR).min(w.rows_out) - panels.start * NR;
    let rows_per_tile = MR / limbs.count();
    // One tile reads weights once, in their order; more find their panel in the cache again, where those of four bits are
    // widened for all of them.
    let once = a.len() <= rows_per_tile * row_len;
    let block = if once { stride } else { KC };
    let mut widened = Vec::new();
    for start in (0..stride).step_by(block) {
        let end = (start + block).min(stride);
        for (p, column) in panels.clone().zip((0..columns).step_by(NR)) {
            let width = NR.min(columns - column);
            let panel = match w.panel(p, start..end) {
                Panel::Four(blocks) if !once => {
                    widened.resize((end - start) * NR, 0);
                    level.widen(blocks, &mut widened);
                    Panel::Wide(&widened)
                }
                panel => panel,
            };
            let tiles = a.chunks(rows_per_tile * row_len).zip(out.chunks_mut(rows_per_tile * columns));
            for (a, out) in tiles {
                for from in (start..end).step_by(limbs.depth) {
                    let panel = panel.inputs(from - start..(from + limbs.depth).min(end) - start);
                    let mut tile = [[0; NR]; MR];
                    level.limb_tile(&a[from..], stride, a.len() / stride, panel, &mut tile);
                    for (sums, out) in tile.chunks_exact(limbs.count()).zip(out.chunks_exact_mut(columns)) {
                        level.combine(limbs, sums, &mut out[column..][..width]);
                    }
                }
            }
        }
    }
    let keep = mask(bits);
    out.iter_mut().for_each(|o| *o &= keep);
}
