//! Products with ternary weights where tables of bytes are in registers: aarch64's vectors look a byte of the sums of three
//! inputs up for sixteen outputs at once.
//!
//! A code's five bits are an index into two registers as they are, signs included, and every byte of a ring's words is a plane
//! with tables of its own. Bytes are added as numbers without a sign; what carries from one plane to the next is in their
//! sums of 16 bits, which a block does not exceed, so that words put together from them are right modulo `2^64`.
//!
//! The unsafe code here is calls of functions for a feature that an argument proves, and loads and stores, each through a
//! reference to an array of exactly that size.

use std::arch::aarch64::*;
use std::ops::Range;

use zeroize::Zeroizing;

use super::neon::Neon;
use super::tables::{LINE, lines, sums_of_three};
use super::ternary::{CODE, CODES, GROUP, PACKED, PANEL, Ternary, Words};
use crate::ring::mask;
use crate::wipe::Wiped;

/// Words of weights of a block, as many as sums of 16 bits allow.
const BLOCK: usize = u16::MAX as usize / (u8::MAX as usize * CODES);
/// Entries of a table, as many as there are codes.
const ENTRIES: usize = 1 << CODE;
/// Planes of half a word, whose sums are in registers at a time.
const PLANES: usize = 4;
/// Vectors of outputs at a time, so that their sums are.
const VECTORS: usize = 2;
/// Planes of all rows up to which this takes fewer instructions than tables in memory, which add the sums of several rows up
/// at once.
const MOST: usize = 8;

/// A byte of the sums of three words.
type Table = [u8; ENTRIES];

impl Neon {
    /// Rows of a ring up to which this is the way to go.
    pub(super) fn few(bits: u32) -> usize {
        MOST / bits.div_ceil(8) as usize
    }

    /// Outputs of some panels, row-major.
    pub(super) fn byte_planes(self, x: &[u64], t: &Ternary, panels: Range<usize>, bits: u32, out: &mut [u64]) {
        let (planes, keep, cols) = (bits.div_ceil(8) as usize, mask(bits), t.cols_in());
        let scales = t.scales(panels.clone());
        let columns = scales.len();
        let block = BLOCK.min(t.words_in());
        let each = block * CODES * planes;
        let mut tables = Wiped::new(vec![0; x.len() / cols * each * ENTRIES + LINE]);
        let (tables, _) = lines(&mut tables).as_chunks_mut::<ENTRIES>();
        let mut sums = Zeroizing::new([[0; PANEL]; 2 * PLANES]);
        for from in (0..t.words_in()).step_by(block) {
            let to = (from + block).min(t.words_in());
            let inputs = from * PACKED..(to * PACKED).min(cols);
            for (x, tables) in x.chunks_exact(cols).zip(tables.chunks_exact_mut(each)) {
                for (half, tables) in tables.chunks_mut(block * CODES * PLANES).enumerate() {
                    // SAFETY: `self` proves the feature.
                    unsafe { fill_neon(&x[inputs.clone()], half, tables, PLANES.min(planes - half * PLANES)) }
                }
            }
            for (p, column) in panels.clone().zip((0..columns).step_by(PANEL)) {
                let width = PANEL.min(columns - column);
                for (tables, out) in tables.chunks_exact(each).zip(out.chunks_exact_mut(columns)) {
                    let halves = tables.chunks(block * CODES * PLANES);
                    for (tables, sums) in halves.zip(sums[..planes].chunks_mut(PLANES)) {
                        self.look_up(width, tables, t.panel(p, from..to), sums);
                    }
                    let out = &mut out[column..][..width];
                    combine(&sums[..planes], &scales[column..][..width], from > 0, keep, out);
                }
            }
        }
    }

    /// Sums over `words` for `columns` outputs and planes, whose tables of a code are after one another.
    fn look_up(self, columns: usize, tables: &[Table], words: &[Words], sums: &mut [[u16; PANEL]]) {
        // SAFETY: `self` proves the feature.
        unsafe {
            match sums.len() {
                1 => look_up_neon::<1>(columns, tables, words, sums),
                2 => look_up_neon::<2>(columns, tables, words, sums),
                3 => look_up_neon::<3>(columns, tables, words, sums),
                _ => look_up_neon::<PLANES>(columns, tables, words, sums),
            }
        }
    }
}

/// The sums of each three words at the codes of their weights, the lower `planes` bytes of their lower or upper half. Tables
/// past the last words keep what they had: weights there are zeros, and the sum at their code is zero in every table.
#[target_feature(enable = "neon")]
fn fill_neon(words: &[u64], half: usize, tables: &mut [Table], planes: usize) {
    let mut entries = Zeroizing::new([0; ENTRIES]);
    for (words, tables) in words.chunks(GROUP).zip(tables.chunks_exact_mut(planes)) {
        let three = std::array::from_fn(|i| words.get(i).map_or(0, |x| *x));
        for (code, sum) in sums_of_three(three).into_iter().enumerate() {
            let part = |sum: u64| (sum >> (32 * half)) as u32;
            (entries[code], entries[ENTRIES / 2 + code]) = (part(sum), part(sum.wrapping_neg()));
        }
        let (sixteens, _) = entries.as_chunks::<16>();
        // SAFETY: sixteen halves of words are 64 bytes.
        let [less, more] = [0, 1].map(|i| unsafe { vld4q_u8(sixteens[i].as_ptr().cast()) });
        let bytes = [(less.0, more.0), (less.1, more.1), (less.2, more.2), (less.3, more.3)];
        for (table, (less, more)) in tables.iter_mut().zip(bytes) {
            // SAFETY: a table is 32 bytes.
            unsafe { vst1q_u8_x2(table.as_mut_ptr(), uint8x16x2_t(less, more)) }
        }
    }
}

/// `R` planes at [`VECTORS`] times sixteen outputs at a time.
#[inline(never)]
#[target_feature(enable = "neon")]
fn look_up_neon<const R: usize>(columns: usize, tables: &[Table], words: &[Words], sums: &mut [[u16; PANEL]]) {
    let (tables, _) = tables.as_chunks::<R>().0.as_chunks::<CODES>();
    for from in (0..columns).step_by(16 * VECTORS) {
        let mut all = [[[vdupq_n_u16(0); 2]; VECTORS]; R];
        for (words, tables) in words.iter().zip(tables) {
            let (vectors, _) = words.0[from..].as_chunks::<16>();
            let codes: [[uint8x16_t; CODES]; VECTORS] = std::array::from_fn(|c| codes_neon(&vectors[c]));
            for (g, tables) in tables.iter().enumerate() {
                for (table, sums) in tables.iter().zip(&mut all) {
                    // SAFETY: a table is 32 bytes.
                    let table = unsafe { vld1q_u8_x2(table.as_ptr()) };
                    for (sums, codes) in sums.iter_mut().zip(&codes) {
                        let bytes = vqtbl2q_u8(table, codes[g]);
                        sums[0] = vaddw_u8(sums[0], vget_low_u8(bytes));
                        sums[1] = vaddw_high_u8(sums[1], bytes);
                    }
                }
            }
        }
        for (to, all) in sums.iter_mut().zip(all) {
            for (to, sum) in to[from..].as_chunks_mut::<8>().0.iter_mut().zip(all.as_flattened()) {
                // SAFETY: `to` is 8 elements of 16 bits.
                unsafe { vst1q_u16(to.as_mut_ptr(), *sum) }
            }
        }
    }
}

/// The codes of a word of each of sixteen outputs, a byte each.
#[inline]
#[target_feature(enable = "neon")]
fn codes_neon(words: &[u32; 16]) -> [uint8x16_t; CODES] {
    // SAFETY: sixteen words are 64 bytes.
    let uint8x16x4_t(a, b, c, d) = unsafe { vld4q_u8(words.as_ptr().cast()) };
    let code = |bits| vandq_u8(bits, vdupq_n_u8((1 << CODE) - 1));
    [
        code(a),
        code(vsliq_n_u8::<3>(vshrq_n_u8::<5>(a), b)),
        code(vshrq_n_u8::<2>(b)),
        code(vsliq_n_u8::<1>(vshrq_n_u8::<7>(b), c)),
        code(vsliq_n_u8::<4>(vshrq_n_u8::<4>(c), d)),
        // There is nothing above the last.
        vshrq_n_u8::<1>(d),
    ]
}

/// Sums of planes, each times its power of two, times magnitudes: added to the outputs of earlier blocks where there are any.
fn combine(sums: &[[u16; PANEL]], scales: &[u16], add: bool, keep: u64, out: &mut [u64]) {
    let mut words = [0u64; PANEL];
    for (plane, sums) in sums.iter().enumerate() {
        for (word, sum) in words.iter_mut().zip(sums) {
            *word = word.wrapping_add(u64::from(*sum) << (8 * plane));
        }
    }
    let before = if add { u64::MAX } else { 0 };
    for ((o, word), scale) in out.iter_mut().zip(words).zip(scales) {
        *o = (*o & before).wrapping_add(word.wrapping_mul(u64::from(*scale))) & keep;
    }
}
