use tacet_protocol::gates::broadcast::{Broadcast, Variance};
use tacet_protocol::gates::grid::Grid;
use tacet_protocol::gates::local::Gain;
use tacet_protocol::gates::pad::{LEVELS, PadKeys};
use tacet_protocol::gates::squares::Squares;

use super::*;

/// Rings of one word and of two, with their edges.
const RINGS: [u32; 8] = [1, 2, 17, 31, 32, 33, 46, 64];

/// Rows and columns: one, less and more than the threads of a workgroup, and as many.
const SIZES: [(usize, usize); 6] = [(1, 1), (3, 5), (2, 64), (5, 67), (70, 3), (2, 200)];

/// Grids with few and many rows and keys, causal and not.
fn grids() -> [Grid; 8] {
    let wide = Grid { rows: 3, keys: 130, causal: false };
    let causal = [(0, 1), (0, 11), (9, 10), (150, 3), (30, 1)].map(|(past, rows)| Grid::causal(past, rows));
    let [a, b, c, d, e] = causal;
    [Grid::square(1), Grid::square(13), wide, a, b, c, d, e]
}

#[test]
fn copies() {
    let Some(gpu) = gpu() else { return };
    for (bits, (rows, cols)) in RINGS.into_iter().zip(SIZES.into_iter().cycle()) {
        let shape = |n| [(n, bits, false)];
        let (all, seed) = (shape(rows * cols), bits.into());
        check(&gpu, "first", Kind::First { cols }, &all, &shape(cols), seed);
        check(&gpu, "last", Kind::Last { cols }, &all, &shape(cols), seed);
        let kind = || Kind::Marks { rows };
        check(&gpu, "marks", kind(), &shape(cols), &shape(cols + rows), seed);
        check(&gpu, "marks of both", kind(), &[shape(cols), shape(rows)].concat(), &shape(cols + rows), seed);
        check(&gpu, "marks of the first", kind(), &shape(0), &shape(rows), seed);
    }
}

#[test]
fn gains() {
    let Some(gpu) = gpu() else { return };
    let mut next = noise(11);
    for k in RINGS {
        for (rows, cols) in SIZES {
            for centred in [false, true] {
                let mut columns = |n: usize| (0..n).map(|_| next() as i64 >> (next() % 64)).collect();
                let [gain, mean, bias] = [cols, if centred { cols } else { 0 }, cols].map(&mut columns);
                let shape = [(rows * cols, k, false)];
                let kind = Kind::Gain(Gain { k, gain, mean, bias });
                check(&gpu, &format!("gain, {k}, {cols}, {centred}"), kind, &shape, &shape, next());
            }
        }
    }
}

#[test]
fn row_sums() {
    let Some(gpu) = gpu() else { return };
    for (k, heads) in RINGS.into_iter().zip([1, 3, 2].into_iter().cycle()) {
        for grid in grids() {
            let (read, made) = ([(heads * grid.len(), k, false)], [(heads * grid.rows, k, false)]);
            check(&gpu, &format!("row sum, {grid:?}"), Kind::RowSum(grid), &read, &made, k.into());
        }
    }
}

#[test]
fn padded_keys() {
    let Some(gpu) = gpu() else { return };
    let mut next = noise(13);
    for (k, wider) in [(12, 0), (28, 0), (28, 4), (31, 1), (32, 32), (33, 0), (50, 9), (64, 0)] {
        for (grid, heads) in grids().into_iter().zip([1, 3, 2].into_iter().cycle()) {
            let levels: Vec<u32> = (0..heads).map(|_| LEVELS + next() as u32 % 40).collect();
            let level_bits: Vec<u32> = (0..heads).map(|_| 7 + next() as u32 % 6).collect();
            let scores = (heads * grid.len(), k, false);
            let g = PadKeys { grid, levels, level_bits, k };
            let (what, keep) = (format!("{g:?}"), (grid.keys, k + wider, false));
            check(&gpu, &what, Kind::PadKeys(g), &[scores, keep], &[scores], next());
        }
    }
}

#[test]
fn broadcasts() {
    let Some(gpu) = gpu() else { return };
    let wider = [(0, 0), (1, 0), (0, 13), (15, 31), (32, 32), (-1, 0), (-20, 3), (-40, 0)];
    for (k, (x, r)) in RINGS.into_iter().flat_map(|k| wider.map(|w| (k, w))) {
        for (rows, dim, groups) in [(1, 1, 1), (3, 5, 1), (4, 3, 5), (7, 64, 2), (2, 1, 67), (66, 2, 1)] {
            let (cols, k_x) = (dim * groups, (k as i32 + x).clamp(3, 64) as u32);
            let g = Broadcast { rows, cols, dim, k_x, k };
            let of = [(rows * cols, k_x, false), (rows * groups, (k + r).min(64), false)];
            let what = format!("{g:?}");
            check(&gpu, &what, Kind::Broadcast(g), &of, &[(rows * cols, k, false)], (k + k_x + r).into());
        }
    }
}

#[test]
fn variances() {
    let Some(gpu) = gpu() else { return };
    for k in RINGS {
        for (rows, cols) in SIZES {
            for centre in [false, true] {
                let g = Variance { rows, cols, centre, k };
                let what = format!("{g:?}");
                check(&gpu, &what, Kind::Variance(g), &[(rows * cols, k, false)], &[(rows, k, false)], k.into());
            }
        }
    }
}

#[test]
fn sums_of_squares() {
    let Some(gpu) = gpu() else { return };
    let mut next = noise(17);
    for k_in in [2, 3, 20, 32, 33, 34, 46, 63] {
        for (k_out, (rows, dim, groups)) in RINGS
            .into_iter()
            .zip([(1, 1, 1), (3, 5, 2), (2, 64, 1), (2, 67, 3), (70, 2, 1), (1, 200, 1)].into_iter().cycle())
        {
            let mut shift: Vec<u32> = (0..dim * groups).map(|_| next() as u32 % (k_in - 1)).collect();
            (shift[0], shift[dim * groups - 1]) = (0, k_in - 2);
            let g = Squares { rows, dim, shift, k_in, k_out };
            let (read, made) = ([(rows * dim * groups, k_in, false)], [(g.out_len(), k_out, false)]);
            check(&gpu, &format!("{g:?}"), Kind::Squares(g), &read, &made, next());
        }
    }
}
