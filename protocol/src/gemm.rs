//! Matrix products in Z_2^bits: shares times public 16-bit weights, and masked values times masked values.
//!
//! [`linear`] splits the ring words into signed 16-bit limbs and multiplies limbs by weights, sixteen bits by sixteen
//! into wrapping 32, which is what processors do fastest. For rings up to 32 bits wrapping is harmless; above, the
//! inner dimension is cut where a 32-bit sum stays exact. [`matmul`] and [`matmul_bt`] multiply whole words.
//!
//! Work is done in tiles of `MR` rows by `NR` columns over operands packed for them. The tile kernels are plain loops
//! here; `simd` compiles or writes them for the vector units found at run time.

pub(crate) mod gram;
#[allow(unsafe_code)]
#[cfg(target_arch = "x86_64")]
mod simd;

use crate::ring::mask;

/// Rows of a tile.
const MR: usize = 12;
/// Columns of a tile, and of a packed panel.
const NR: usize = 32;
/// Inner elements of a weight panel to go through at a time, so that it stays in the second-level cache.
const KC: usize = 2048;

/// 16-bit limb products accumulated for a tile, wrapping.
type LimbTile = [[i32; NR]; MR];

/// Public weights of a linear layer, packed for the kernels.
#[derive(Clone)]
pub struct Weights {
    rows_out: usize,
    cols_in: usize,
    /// Panels of [`NR`] outputs; within one, pairs of inputs; within one, an output's two weights side by side.
    data: Vec<i16>,
    largest: u32,
}

impl Weights {
    /// Packs `w`, row-major, `out` rows of `inp`.
    pub fn new(out: usize, inp: usize, w: &[i16]) -> Weights {
        assert_eq!(w.len(), out * inp, "weights have {out} x {inp} elements");
        let pairs = inp.div_ceil(2);
        let mut data = vec![0; out.div_ceil(NR) * pairs * NR * 2];
        for o in 0..out {
            let panel = &mut data[o / NR * pairs * NR * 2..];
            for i in 0..inp {
                panel[(i / 2 * NR + o % NR) * 2 + i % 2] = w[o * inp + i];
            }
        }
        let largest = w.iter().map(|w| u32::from(w.unsigned_abs())).max().unwrap_or(0);
        Weights { rows_out: out, cols_in: inp, data, largest }
    }

    /// Outputs.
    pub fn rows_out(&self) -> usize {
        self.rows_out
    }

    /// Inputs.
    pub fn cols_in(&self) -> usize {
        self.cols_in
    }

    /// The weight of input `i` in output `o`.
    pub fn at(&self, o: usize, i: usize) -> i16 {
        self.data[(o / NR * self.cols_in.div_ceil(2) * NR + i / 2 * NR + o % NR) * 2 + i % 2]
    }
}

/// `out[r][o] = sum_i x[r][i] * w[o][i] mod 2^bits`, all row-major; `x` may have bits above the ring.
pub fn linear(x: &[u64], rows: usize, w: &Weights, bits: u32, out: &mut [u64]) {
    assert_eq!(x.len(), rows * w.cols_in, "input is {rows} x {}", w.cols_in);
    assert_eq!(out.len(), rows * w.rows_out, "output is {rows} x {}", w.rows_out);
    linear_on(Level::detect(), x, rows, w, bits, out);
}

/// As [`linear`], by the kernels of one level.
#[doc(hidden)]
pub fn linear_on(level: Level, x: &[u64], rows: usize, w: &Weights, bits: u32, out: &mut [u64]) {
    out.fill(0);
    if rows == 0 || w.cols_in == 0 || w.rows_out == 0 {
        return;
    }
    let limbs = bits.div_ceil(16) as usize;
    // A sum of `depth` products of a limb (at most 2^15) and a weight stays below 2^31.
    let exact = ((1 << 16) / w.largest.max(1)) as usize;
    let depth = if bits <= 32 { KC } else { KC.min(exact.saturating_sub(1) & !1) };
    if depth == 0 {
        return linear_wide(x, w, bits, out);
    }
    let stride = w.cols_in.next_multiple_of(2);
    let a = split(x, w.cols_in, limbs);
    let panel_len = stride * NR;
    let rows_per_tile = MR / limbs;
    for from in (0..stride).step_by(depth) {
        let to = (from + depth).min(stride);
        for (p, panel) in w.data.chunks_exact(panel_len).enumerate() {
            let panel = &panel[from * NR..to * NR];
            let columns = p * NR..(p * NR + NR).min(w.rows_out);
            for first in (0..rows).step_by(rows_per_tile) {
                let count = rows_per_tile.min(rows - first);
                let mut tile = [[0; NR]; MR];
                let a = &a[first * limbs * stride + from..];
                limb_tile(level, a, stride, count * limbs, panel, &mut tile);
                for (r, limb_rows) in tile[..count * limbs].chunks_exact(limbs).enumerate() {
                    let row = (first + r) * w.rows_out;
                    combine(limb_rows, &mut out[row + columns.start..row + columns.end]);
                }
            }
        }
    }
    let keep = mask(bits);
    out.iter_mut().for_each(|o| *o &= keep);
}

/// Adds limb sums, each times its power of 2^16, to whole words.
fn combine(limb_rows: &[[i32; NR]], out: &mut [u64]) {
    for (l, sums) in limb_rows.iter().enumerate() {
        for (o, &sum) in out.iter_mut().zip(sums) {
            *o = o.wrapping_add((i64::from(sum) as u64) << (16 * l));
        }
    }
}

/// Splits each row into `limbs` rows of signed limbs, `x = sum_l limb_l * 2^(16 l)` mod `2^(16 limbs)`, padded to
/// pairs.
fn split(x: &[u64], cols: usize, limbs: usize) -> Vec<i16> {
    let stride = cols.next_multiple_of(2);
    // Taking a limb as signed owes one to the next limb when it is negative; these halves collect all that is owed.
    let owed = (0..limbs).fold(0u64, |sum, l| sum | 0x8000 << (16 * l));
    let mut a = vec![0; x.len() / cols * limbs * stride];
    for (row, x) in a.chunks_exact_mut(limbs * stride).zip(x.chunks_exact(cols)) {
        for (l, limb_row) in row.chunks_exact_mut(stride).enumerate() {
            for (limb, &x) in limb_row.iter_mut().zip(x) {
                *limb = ((x.wrapping_add(owed) >> (16 * l)) as u16 ^ 0x8000) as i16;
            }
        }
    }
    a
}

/// For rings above 32 bits with weights too large for exact 32-bit sums.
fn linear_wide(x: &[u64], w: &Weights, bits: u32, out: &mut [u64]) {
    let keep = mask(bits);
    let panel_len = w.cols_in.next_multiple_of(2) * NR;
    for (x, out) in x.chunks_exact(w.cols_in).zip(out.chunks_exact_mut(w.rows_out)) {
        for (panel, out) in w.data.chunks_exact(panel_len).zip(out.chunks_mut(NR)) {
            let mut sums = [0u64; NR];
            for (i, &x) in x.iter().enumerate() {
                let weights = &panel[i / 2 * NR * 2..][..NR * 2];
                for (j, sum) in sums.iter_mut().enumerate() {
                    *sum = sum.wrapping_add(x.wrapping_mul(i64::from(weights[2 * j + i % 2]) as u64));
                }
            }
            out.iter_mut().zip(sums).for_each(|(o, s)| *o = s & keep);
        }
    }
}

/// `out = a b mod 2^bits`; `a` is `m x k`, `b` is `k x n`, all row-major, bits above the ring do not matter.
pub fn matmul(a: &[u64], b: &[u64], m: usize, k: usize, n: usize, bits: u32, out: &mut [u64]) {
    product_on(Level::detect(), a, b, (m, k, n), (n, 1), bits, out);
}

/// As [`matmul`], with `b` given transposed, `n x k`.
pub fn matmul_bt(a: &[u64], b: &[u64], m: usize, k: usize, n: usize, bits: u32, out: &mut [u64]) {
    product_on(Level::detect(), a, b, (m, k, n), (1, k), bits, out);
}

/// As [`matmul`], by the kernels of one level, with `b` in any order: element `(i, j)` is `b[i * strides.0 + j * strides.1]`.
#[doc(hidden)]
pub fn product_on(
    level: Level,
    a: &[u64],
    b: &[u64],
    (m, k, n): (usize, usize, usize),
    b_strides: (usize, usize),
    bits: u32,
    out: &mut [u64],
) {
    assert_eq!((a.len(), b.len(), out.len()), (m * k, k * n, m * n), "product of {m} x {k} and {k} x {n}");
    if bits <= 32 {
        product_of(a, b, (m, k, n), b_strides, out, |a, rows, panel, tile| word32_tile(level, a, k, rows, panel, tile));
    } else {
        product_of(a, b, (m, k, n), b_strides, out, |a, rows, panel, tile| word64_tile(level, a, k, rows, panel, tile));
    }
    let keep = mask(bits);
    out.iter_mut().for_each(|o| *o &= keep);
}

/// Packs `b` into panels of `k x NR`, and `a` narrowed, then runs `tile_kernel` over all tiles.
fn product_of<W: Word>(
    a: &[u64],
    b: &[u64],
    (m, k, n): (usize, usize, usize),
    (b_row, b_column): (usize, usize),
    out: &mut [u64],
    tile_kernel: impl Fn(&[W], usize, &[W], &mut [[W; NR]; MR]),
) {
    if m == 0 || k == 0 || n == 0 {
        return out.fill(0);
    }
    let a: Vec<W> = a.iter().map(|&a| W::narrow(a)).collect();
    let mut panel = vec![W::default(); k * NR];
    for from in (0..n).step_by(NR) {
        let width = NR.min(n - from);
        for (i, to) in panel.chunks_exact_mut(NR).enumerate() {
            to[width..].fill(W::default());
            for (j, to) in to[..width].iter_mut().enumerate() {
                *to = W::narrow(b[i * b_row + (from + j) * b_column]);
            }
        }
        for first in (0..m).step_by(MR) {
            let rows = MR.min(m - first);
            let mut tile = [[W::default(); NR]; MR];
            tile_kernel(&a[first * k..], rows, &panel, &mut tile);
            for (r, sums) in tile[..rows].iter().enumerate() {
                let out = &mut out[(first + r) * n + from..][..width];
                out.iter_mut().zip(sums).for_each(|(o, &s)| *o = s.widen());
            }
        }
    }
}

/// A word that products are computed in.
trait Word: Copy + Default {
    fn narrow(x: u64) -> Self;
    fn widen(self) -> u64;
    fn add_product(self, a: Self, b: Self) -> Self;
}

impl Word for u32 {
    #[inline(always)]
    fn narrow(x: u64) -> u32 {
        x as u32
    }
    #[inline(always)]
    fn widen(self) -> u64 {
        u64::from(self)
    }
    #[inline(always)]
    fn add_product(self, a: u32, b: u32) -> u32 {
        self.wrapping_add(a.wrapping_mul(b))
    }
}

impl Word for u64 {
    #[inline(always)]
    fn narrow(x: u64) -> u64 {
        x
    }
    #[inline(always)]
    fn widen(self) -> u64 {
        self
    }
    #[inline(always)]
    fn add_product(self, a: u64, b: u64) -> u64 {
        self.wrapping_add(a.wrapping_mul(b))
    }
}

/// Which kernels to run.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2(simd::Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(simd::Avx512),
}

impl Level {
    /// The best that this processor has. The answer is cached by the standard library.
    fn detect() -> Level {
        Level::all().last().unwrap_or(Level::Scalar)
    }

    /// What this processor has, slowest first.
    pub fn all() -> impl Iterator<Item = Level> {
        #[cfg(target_arch = "x86_64")]
        let vector = [simd::Avx2::detect().map(Level::Avx2), simd::Avx512::detect().map(Level::Avx512)];
        #[cfg(not(target_arch = "x86_64"))]
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
        }
    }
}

/// `tile[r][j] += sum_i a[r * stride + i] * panel[i][j]` for `rows` rows, wrapping.
fn limb_tile(level: Level, a: &[i16], stride: usize, rows: usize, panel: &[i16], tile: &mut LimbTile) {
    match level {
        Level::Scalar => limb_tile_plain(a, stride, rows, panel, tile),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2(cpu) => cpu.limb_tile(a, stride, rows, panel, tile),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512(cpu) => cpu.limb_tile(a, stride, rows, panel, tile),
    }
}

fn limb_tile_plain(a: &[i16], stride: usize, rows: usize, panel: &[i16], tile: &mut LimbTile) {
    let depth = panel.len() / NR;
    for (r, sums) in tile[..rows].iter_mut().enumerate() {
        let a = &a[r * stride..][..depth];
        for (x, weights) in a.chunks_exact(2).zip(panel.chunks_exact(2 * NR)) {
            for (sum, w) in sums.iter_mut().zip(weights.chunks_exact(2)) {
                let pair = (i32::from(x[0]) * i32::from(w[0])).wrapping_add(i32::from(x[1]) * i32::from(w[1]));
                *sum = sum.wrapping_add(pair);
            }
        }
    }
}

fn word32_tile(level: Level, a: &[u32], k: usize, rows: usize, panel: &[u32], tile: &mut [[u32; NR]; MR]) {
    match level {
        Level::Scalar => word_tile::<_, 2, 8>(a, k, rows, panel, tile),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2(cpu) => cpu.word32_tile(a, k, rows, panel, tile),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512(cpu) => cpu.word32_tile(a, k, rows, panel, tile),
    }
}

fn word64_tile(level: Level, a: &[u64], k: usize, rows: usize, panel: &[u64], tile: &mut [[u64; NR]; MR]) {
    match level {
        Level::Scalar => word_tile::<_, 2, 8>(a, k, rows, panel, tile),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2(cpu) => cpu.word64_tile(a, k, rows, panel, tile),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512(cpu) => cpu.word64_tile(a, k, rows, panel, tile),
    }
}

/// `tile[r][j] += sum_i a[r * k + i] * panel[i][j]`, `R` rows and `C` columns at a time so that the sums stay in
/// registers. Inlined into functions that allow wider vectors.
#[inline(always)]
fn word_tile<W: Word, const R: usize, const C: usize>(
    a: &[W],
    k: usize,
    rows: usize,
    panel: &[W],
    tile: &mut [[W; NR]; MR],
) {
    let mut first = 0;
    while first < rows {
        let (a, tile) = (&a[first * k..], &mut tile[first..]);
        if rows - first >= R {
            word_rows::<W, R, C>(a, k, panel, tile);
            first += R;
        } else {
            word_rows::<W, 1, C>(a, k, panel, tile);
            first += 1;
        }
    }
}

#[inline(always)]
fn word_rows<W: Word, const R: usize, const C: usize>(a: &[W], k: usize, panel: &[W], tile: &mut [[W; NR]]) {
    let rows: [&[W]; R] = std::array::from_fn(|r| &a[r * k..][..k]);
    for from in (0..NR).step_by(C) {
        let mut sums = [[W::default(); C]; R];
        for (i, b) in panel.as_chunks::<NR>().0.iter().take(k).enumerate() {
            let b: [W; C] = std::array::from_fn(|j| b[from + j]);
            for r in 0..R {
                for j in 0..C {
                    sums[r][j] = sums[r][j].add_product(rows[r][i], b[j]);
                }
            }
        }
        for (to, sums) in tile.iter_mut().zip(sums) {
            for (to, sum) in to[from..from + C].iter_mut().zip(sums) {
                *to = to.add_product(sum, W::narrow(1));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A small generator, so that shapes of a megabyte need no strategy.
    pub(super) fn noise(seed: u64) -> impl FnMut() -> u64 {
        let mut state = seed;
        move || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ z >> 31
        }
    }

    fn linear_reference(x: &[u64], rows: usize, out: usize, inp: usize, w: &[i16], bits: u32) -> Vec<u64> {
        let mut y = vec![0u64; rows * out];
        for (at, y) in y.iter_mut().enumerate() {
            for i in 0..inp {
                let weight = i64::from(w[at % out * inp + i]) as u64;
                *y = y.wrapping_add(x[at / out * inp + i].wrapping_mul(weight));
            }
            *y &= mask(bits);
        }
        y
    }

    fn check_linear(x: &[u64], rows: usize, out: usize, inp: usize, w: &[i16], bits: u32) {
        let expected = linear_reference(x, rows, out, inp, w, bits);
        let weights = Weights::new(out, inp, w);
        for level in Level::all() {
            let mut got = vec![1; rows * out];
            linear_on(level, x, rows, &weights, bits, &mut got);
            assert!(got == expected, "{level:?}: {rows} x {inp} -> {out}, {bits} bits, {}", weights.largest);
        }
    }

    fn check_product(a: &[u64], b: &[u64], (m, k, n): (usize, usize, usize), bits: u32) {
        let mut transposed = vec![0; k * n];
        let mut expected = vec![0u64; m * n];
        for i in 0..m {
            for j in 0..n {
                for l in 0..k {
                    let term = a[i * k + l].wrapping_mul(b[l * n + j]);
                    expected[i * n + j] = expected[i * n + j].wrapping_add(term);
                    transposed[j * k + l] = b[l * n + j];
                }
            }
        }
        expected.iter_mut().for_each(|e| *e &= mask(bits));
        for level in Level::all() {
            let mut got = vec![1; m * n];
            product_on(level, a, b, (m, k, n), (n, 1), bits, &mut got);
            assert!(got == expected, "{level:?}: {m} x {k} x {n}, {bits} bits");
            got.fill(1);
            product_on(level, a, &transposed, (m, k, n), (1, k), bits, &mut got);
            assert!(got == expected, "{level:?} transposed: {m} x {k} x {n}, {bits} bits");
        }
    }

    const WIDTHS: [u32; 12] = [1, 8, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64];

    #[test]
    fn extremes_wrap_as_the_ring_does() {
        let words = [0, 1, 0x7fff, 0x8000, 0xffff, 0x7fff_8000, 0x8000_0000, 0xffff_ffff, 1 << 63, u64::MAX];
        for weight in [i16::MIN, -255, -128, -1, 0, 1, 127, 255, i16::MAX] {
            for word in words {
                for bits in WIDTHS {
                    check_linear(&[word; 2 * 130], 2, 3, 130, &[weight; 3 * 130], bits);
                }
            }
        }
        for word in words {
            for bits in WIDTHS {
                check_product(&[word; 3 * 70], &[word.wrapping_neg() ^ 1; 70 * 2], (3, 70, 2), bits);
            }
        }
    }

    #[test]
    fn deep_sums_stay_exact_in_wide_rings() {
        // One sign throughout: the largest 32-bit partial sums that the cut of the inner dimension allows.
        for weight in [127, -127, 128, -128, 255, 256, -256, 2047, 16384, i16::MIN] {
            for word in [0x7fff, 0x8000, 0x8000_8000_8000_8000] {
                check_linear(&[word; 5000], 1, 1, 5000, &[weight; 5000], 64);
            }
        }
    }

    #[test]
    fn every_tile_height_and_model_shapes() {
        let mut next = noise(1);
        for rows in 1..=2 * MR + 1 {
            let x: Vec<u64> = (0..rows * 37).map(|_| next()).collect();
            let w: Vec<i16> = (0..40 * 37).map(|_| next() as i8 as i16).collect();
            for bits in WIDTHS {
                check_linear(&x, rows, 40, 37, &w, bits);
            }
            check_product(&x, &x[..37 * rows], (rows, 37, rows), 32);
            check_product(&x, &x[..37 * rows], (rows, 37, rows), 64);
        }
        let x: Vec<u64> = (0..9 * 3000).map(|_| next()).collect();
        let w: Vec<i16> = (0..384 * 3000).map(|_| next() as i8 as i16).collect();
        check_linear(&x, 9, 384, 3000, &w, 32);
        check_linear(&x, 9, 384, 3000, &w, 64);
    }

    #[test]
    fn empty_operands() {
        linear(&[], 0, &Weights::new(2, 3, &[1; 6]), 32, &mut []);
        let mut out = [7; 2];
        linear(&[], 1, &Weights::new(2, 0, &[]), 32, &mut out);
        assert_eq!(out, [0, 0]);
        let mut out = [7; 6];
        matmul(&[], &[], 2, 0, 3, 32, &mut out);
        assert_eq!(out, [0; 6]);
        matmul_bt(&[], &[1; 4], 0, 2, 2, 32, &mut []);
    }

    proptest! {
        #[test]
        fn kernels_agree_with_the_reference(
            rows in 1usize..20, out in 1usize..70, inp in 1usize..80, bits in 1u32..=64, shift in 0u32..16, seed: u64,
        ) {
            let mut next = noise(seed);
            let x: Vec<u64> = (0..rows * inp).map(|_| next()).collect();
            let w: Vec<i16> = (0..out * inp).map(|_| next() as i16 >> shift).collect();
            check_linear(&x, rows, out, inp, &w, bits);
            let b: Vec<u64> = (0..inp * out).map(|_| next()).collect();
            check_product(&x, &b, (rows, inp, out), bits);
        }
    }
}
