//! Products with ternary weights where tables lie in memory: each has the signed sums of three inputs for several rows side by
//! side, so that a code adds the sums of all of them at once.

use std::ops::Range;

use super::ternary::{CODE, CODES, GROUP, PACKED, PANEL, Ternary, Words};
use super::words::Word;
use crate::ring::mask;
use crate::wipe::Wiped;

/// Bytes of tables that stay in the first-level cache beside weights and sums.
const CACHED: usize = 24 << 10;
/// Entries of a table, as many as there are codes.
const ENTRIES: usize = 1 << CODE;

/// Elements of any type that a line of the cache holds at most.
pub(super) const LINE: usize = 64;

/// What begins with the first line of the cache, at most [`LINE`] elements in.
pub(super) fn lines<T>(v: &mut [T]) -> &mut [T] {
    let first = v.as_ptr().align_offset(LINE).min(LINE);
    &mut v[first..]
}

/// Sums of three inputs of `L` rows.
type Table<W, const L: usize> = [[W; L]; ENTRIES];

/// Outputs of some panels, row-major: the scalar reference, and inlined into functions that allow wider vectors.
#[inline(always)]
pub(super) fn outputs(x: &[u64], t: &Ternary, panels: Range<usize>, bits: u32, out: &mut [u64]) {
    let columns = t.scales(panels.clone()).len();
    let mut rows = x.len() / t.cols_in();
    let (mut x, mut out) = (x, out);
    while rows > 0 {
        let most = if bits <= 32 { 16 } else { 8 };
        // As many sums side by side as vectors have places, or hardly more than there are rows.
        let lanes = [1, 4, 8].into_iter().find(|lanes| rows <= *lanes).unwrap_or(most);
        let tile = rows.min(lanes);
        let (these, others) = x.split_at(tile * t.cols_in());
        let (to, rest) = out.split_at_mut(tile * columns);
        match (bits <= 32, lanes) {
            (true, 1) => rows_of::<u32, 1>(these, t, panels.clone(), bits, to),
            (true, 4) => rows_of::<u32, 4>(these, t, panels.clone(), bits, to),
            (true, 8) => rows_of::<u32, 8>(these, t, panels.clone(), bits, to),
            (true, _) => rows_of::<u32, 16>(these, t, panels.clone(), bits, to),
            (false, 1) => rows_of::<u64, 1>(these, t, panels.clone(), bits, to),
            (false, 4) => rows_of::<u64, 4>(these, t, panels.clone(), bits, to),
            (false, _) => rows_of::<u64, 8>(these, t, panels.clone(), bits, to),
        }
        (x, out, rows) = (others, rest, rows - tile);
    }
}

/// At most `L` rows.
#[inline(always)]
fn rows_of<W: Word, const L: usize>(x: &[u64], t: &Ternary, panels: Range<usize>, bits: u32, out: &mut [u64]) {
    let cols = t.cols_in();
    let block = (CACHED / (CODES * size_of::<Table<W, L>>())).clamp(1, t.words_in());
    let mut tables = Wiped::new(vec![W::default(); block * CODES * ENTRIES * L + LINE]);
    let mut sums = Wiped::new(vec![W::default(); panels.len() * PANEL * L + LINE]);
    let (tables, _) = lines(&mut tables).as_chunks_mut::<L>().0.as_chunks_mut::<ENTRIES>();
    let (sums, _) = lines(&mut sums).as_chunks_mut::<L>();
    for from in (0..t.words_in()).step_by(block) {
        let to = (from + block).min(t.words_in());
        for (g, table) in tables.iter_mut().take((to - from) * CODES).enumerate() {
            let first = from * PACKED + g * GROUP;
            let input = |r: usize, i: usize| if i < cols { x.get(r * cols + i).map_or(0, |x| *x) } else { 0 };
            let three = std::array::from_fn(|i| std::array::from_fn(|r| W::narrow(input(r, first + i))));
            fill(three, table);
        }
        let (tables, _) = tables.as_chunks::<CODES>();
        for (p, sums) in panels.clone().zip(sums.as_chunks_mut::<PANEL>().0) {
            add(tables, t.panel(p, from..to), sums);
        }
    }
    let scales = t.scales(panels);
    let keep = mask(bits);
    let columns = scales.len();
    // A few outputs of every row, so that what is written of one fills lines of the cache before the next is.
    for first in (0..columns).step_by(8) {
        for (r, out) in out.chunks_exact_mut(columns).enumerate().take(L) {
            let out = &mut out[first..(first + 8).min(columns)];
            for ((o, sums), scale) in out.iter_mut().zip(&sums[first..]).zip(&scales[first..]) {
                *o = sums[r].widen().wrapping_mul(u64::from(*scale)) & keep;
            }
        }
    }
}

/// The sums of three words of each row, at the codes of their weights.
#[inline(always)]
fn fill<W: Word, const L: usize>([a, b, c]: [[W; L]; GROUP], table: &mut Table<W, L>) {
    for r in 0..L {
        for (code, sum) in sums_of_three([a[r], b[r], c[r]]).into_iter().enumerate() {
            table[code][r] = sum;
            table[ENTRIES / 2 + code][r] = minus(W::default(), sum);
        }
    }
}

/// The sums of three words at the codes without a sign: `a t_0 + b t_1 + c t_2` at `9 t_0 + 3 t_1 + t_2`.
#[inline(always)]
pub(super) fn sums_of_three<W: Word>([a, b, c]: [W; GROUP]) -> [W; 14] {
    let (less, more) = (minus(a, b), plus(a, b));
    [
        W::default(),
        c,
        minus(b, c),
        b,
        plus(b, c),
        minus(less, c),
        less,
        plus(less, c),
        minus(a, c),
        a,
        plus(a, c),
        minus(more, c),
        more,
        plus(more, c),
    ]
}

#[inline(always)]
fn plus<W: Word>(x: W, y: W) -> W {
    x.add_product(y, W::narrow(1))
}

#[inline(always)]
fn minus<W: Word>(x: W, y: W) -> W {
    x.add_product(y, W::narrow(u64::MAX))
}

/// Adds what words of each output of a panel say.
#[inline(always)]
fn add<W: Word, const L: usize>(tables: &[[Table<W, L>; CODES]], words: &[Words], sums: &mut [[W; L]; PANEL]) {
    let add = |tables: &[Table<W, L>; CODES], word: u32, sums: &mut [W; L]| {
        for (g, table) in tables.iter().enumerate() {
            let entry = &table[(word >> (CODE * g as u32)) as usize % ENTRIES];
            sums.iter_mut().zip(entry).for_each(|(sum, entry)| *sum = plus(*sum, *entry));
        }
    };
    if L == 1 {
        // Output by output, or vectors would be made of single words.
        for (o, sums) in sums.iter_mut().enumerate() {
            let mut sum = *sums;
            tables.iter().zip(words).for_each(|(tables, words)| add(tables, words.0[o], &mut sum));
            *sums = sum;
        }
        return;
    }
    for (tables, words) in tables.iter().zip(words) {
        for (sums, word) in sums.iter_mut().zip(&words.0) {
            let mut row = *sums;
            add(tables, *word, &mut row);
            *sums = row;
        }
    }
}
