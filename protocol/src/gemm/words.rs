//! Products of whole words: masked values times masked values.

use zeroize::DefaultIsZeroes;

use super::{Level, MR, NR};
use crate::ring::mask;
use crate::wipe::Wiped;

/// Inner elements that are packed of one column after the other.
const BLOCK: usize = 16;

/// Order of the right operand's words.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// `k x n`.
    Rows,
    /// `n x k`.
    Columns,
}

/// `out = a b mod 2^bits`; `a` is `m x k`, `b` is `k x n`, all row-major, bits above the ring do not matter.
pub fn matmul(a: &[u64], b: &[u64], m: usize, k: usize, n: usize, bits: u32, out: &mut [u64]) {
    product_on(Level::detect(), a, b, (m, k, n), Order::Rows, bits, out);
}

/// As [`matmul`], with `b` given transposed, `n x k`.
pub fn matmul_bt(a: &[u64], b: &[u64], m: usize, k: usize, n: usize, bits: u32, out: &mut [u64]) {
    product_on(Level::detect(), a, b, (m, k, n), Order::Columns, bits, out);
}

/// As [`matmul`], by the kernels of one level.
#[doc(hidden)]
pub fn product_on(
    level: Level,
    a: &[u64],
    b: &[u64],
    (m, k, n): (usize, usize, usize),
    order: Order,
    bits: u32,
    out: &mut [u64],
) {
    assert_eq!((a.len(), b.len(), out.len()), (m * k, k * n, m * n), "product of {m} x {k} and {k} x {n}");
    if m == 0 || k == 0 || n == 0 {
        return out.fill(0);
    }
    let p = Product { level, b, k, n, order };
    if bits <= 32 {
        p.of::<u32>(a, out);
    } else {
        p.of::<u64>(a, out);
    }
    let keep = mask(bits);
    out.iter_mut().for_each(|o| *o &= keep);
}

struct Product<'a> {
    level: Level,
    b: &'a [u64],
    k: usize,
    n: usize,
    order: Order,
}

impl Product<'_> {
    fn of<W: Word>(&self, a: &[u64], out: &mut [u64]) {
        let a: Wiped<W> = Wiped::new(a.iter().map(|&a| W::narrow(a)).collect());
        let mut panel = Wiped::new(vec![W::default(); self.k * NR]);
        for from in (0..self.n).step_by(NR) {
            let width = NR.min(self.n - from);
            self.pack(from, width, &mut panel);
            for (a, out) in a.chunks(MR * self.k).zip(out.chunks_mut(MR * self.n)) {
                let mut tile = [[W::default(); NR]; MR];
                W::tile(self.level, a, self.k, a.len() / self.k, &panel, &mut tile);
                for (out, sums) in out.chunks_exact_mut(self.n).zip(&tile) {
                    out[from..][..width].iter_mut().zip(sums).for_each(|(o, &s)| *o = s.widen());
                }
            }
        }
    }

    /// Columns `from .. from + width` into a panel of `k x NR`, padded with zeros.
    fn pack<W: Word>(&self, from: usize, width: usize, panel: &mut [W]) {
        if width < NR {
            panel.fill(W::default());
        }
        match self.order {
            Order::Rows => {
                for (to, b) in panel.chunks_exact_mut(NR).zip(self.b.chunks_exact(self.n)) {
                    to.iter_mut().zip(&b[from..][..width]).for_each(|(to, b)| *to = W::narrow(*b));
                }
            }
            Order::Columns => {
                for (i, to) in panel.chunks_mut(BLOCK * NR).enumerate() {
                    let columns = self.b[from * self.k..].chunks_exact(self.k).take(width);
                    for (j, b) in columns.enumerate() {
                        let to = to.iter_mut().skip(j).step_by(NR);
                        to.zip(&b[i * BLOCK..]).for_each(|(to, b)| *to = W::narrow(*b));
                    }
                }
            }
        }
    }
}

/// A word that products are computed in.
pub(super) trait Word: DefaultIsZeroes {
    fn narrow(x: u64) -> Self;
    fn widen(self) -> u64;
    fn add_product(self, a: Self, b: Self) -> Self;
    /// See [`word_tile`].
    fn tile(level: Level, a: &[Self], k: usize, rows: usize, panel: &[Self], tile: &mut [[Self; NR]; MR]);
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
    fn tile(level: Level, a: &[u32], k: usize, rows: usize, panel: &[u32], tile: &mut [[u32; NR]; MR]) {
        level.word32_tile(a, k, rows, panel, tile);
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
    fn tile(level: Level, a: &[u64], k: usize, rows: usize, panel: &[u64], tile: &mut [[u64; NR]; MR]) {
        level.word64_tile(a, k, rows, panel, tile);
    }
}

/// `tile[r][j] += sum_i a[r * k + i] * panel[i][j]`, `R` rows and `C` columns at a time so that the sums stay in
/// registers. Inlined into functions that allow wider vectors.
#[inline(always)]
pub(super) fn word_tile<W: Word, const R: usize, const C: usize>(
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
