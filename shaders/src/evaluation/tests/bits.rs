use tacet_protocol::gates::bits::{And, CountClear, Segment};
use tacet_protocol::gates::exp::FlagRescale;
use tacet_protocol::gates::grid::Grid;
use tacet_protocol::gates::rowmax::{Levels, RowMax};

use super::*;

/// Segments of so many rows and words each.
pub(super) fn segments(all: &[(usize, usize)]) -> Vec<Segment> {
    all.iter().map(|(rows, words)| Segment { rows: *rows, words: *words }).collect()
}

pub(super) fn words(all: &[Segment]) -> usize {
    all.iter().map(|s| s.rows * s.words).sum()
}

pub(super) fn rows(all: &[Segment]) -> usize {
    all.iter().map(|s| s.rows).sum()
}

#[test]
fn levels_of_rows() {
    let Some(gpu) = gpu() else { return };
    let grids = [
        Grid::square(1),
        Grid::square(13),
        Grid::square(70),
        Grid::causal(0, 11),
        Grid::causal(9, 10),
        Grid::causal(130, 1),
        Grid::causal(3, 67),
    ];
    let levels: [&[u32]; 4] = [&[6], &[6, 7, 8, 9, 10], &[10, 6, 11], &[8, 8]];
    for grid in grids {
        for (level_bits, k) in levels.into_iter().zip([6, 31, 32, 50]).chain([(levels[0], 64), (&[12, 9], 33)]) {
            let g =
                RowMax { grid, levels: level_bits.iter().copied().map(Levels::all).collect(), k: k.max(level_bits[0]) };
            let scores = [(level_bits.len() * grid.len(), g.k, false)];
            let out = [(g.out_len(), 64, true)];
            check(&gpu, &format!("{g:?}"), Kind::RowMax(g.clone()), &scores, &out, k.into());
        }
    }
    // More keys than any slice of them, up to the last of the code's.
    for grid in [Grid { rows: 2, keys: 1022, causal: false }, Grid::causal(1021, 1)] {
        let g = RowMax {
            grid,
            levels: vec![Levels { first: 1, words: 1, bits: 7 }, Levels { first: 5, words: 8, bits: 10 }],
            k: 28,
        };
        let out = [(g.out_len(), 64, true)];
        check(&gpu, &format!("{g:?}"), Kind::RowMax(g.clone()), &[(2 * grid.len(), 28, false)], &out, 1);
    }
}

#[test]
fn conjunctions() {
    let Some(gpu) = gpu() else { return };
    let all: [&[(usize, usize)]; 4] = [
        &[(1, 1)],
        &[(3, 2), (3, 4), (0, 8), (3, 4), (1, 6), (2, 1)],
        &[(65, 16), (7, 3)],
        &[(2, 12), (5, 32), (4, 8), (9, 5)],
    ];
    for segments in all.map(segments) {
        for members in 2..=5 {
            let n = words(&segments);
            let g = And { segments: segments.clone(), members };
            let out = [(n, 64, true)];
            check(&gpu, &format!("{g:?}"), Kind::And(g.clone()), &[(members * n, 64, true)], &out, n as u64);
        }
    }
}

#[test]
fn counts() {
    let Some(gpu) = gpu() else { return };
    let all: [&[(usize, usize)]; 4] =
        [&[(1, 1)], &[(3, 2), (0, 3), (2, 4), (5, 4)], &[(70, 16)], &[(2, 1), (3, 32), (2, 3)]];
    for segments in all.map(segments) {
        for k in [1, 7, 10, 32] {
            let rings = (0..segments.len() as u32).map(|i| (k + 5 * i - 1) % 32 + 1).collect();
            let g = CountClear { segments: segments.clone(), rings };
            let (n, out) = (words(&segments), [(rows(&segments), 32, false)]);
            check(&gpu, &format!("{g:?}"), Kind::CountClear(g.clone()), &[(n, 64, true)], &out, k.into());
        }
    }
}

#[test]
fn rescales_by_flags() {
    let Some(gpu) = gpu() else { return };
    for (k_in, shift) in [(2, 0), (2, 2), (31, 7), (32, 0), (32, 31), (33, 33), (46, 14), (62, 40), (63, 1), (63, 63)] {
        for (k_out, len) in [(1, 1), (17, 63), (32, 64), (33, 65), (46, 131), (64, 200)] {
            let g = FlagRescale { len, shift, k_in, k_out };
            let inputs = [(len, k_in, false), (len.div_ceil(64), 64, true)];
            let out = [(len, k_out, false)];
            check(&gpu, &format!("{g:?}"), Kind::FlagRescale(g.clone()), &inputs, &out, k_in.into());
        }
    }
}
