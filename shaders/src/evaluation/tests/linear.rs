use std::sync::Arc;

use tacet_protocol::gates::grid::Grid;
use tacet_protocol::gates::product::{HeadProduct, Side};

use super::*;
use crate::tests::layer;

#[test]
fn layers() {
    let Some(gpu) = gpu() else { return };
    let mut next = noise(3);
    for (rows, out, inp) in [(1, 3, 5), (9, 67, 33), (40, 64, 64)] {
        for bits in [20, 32, 33, 50, 64] {
            let w: Vec<i16> = (0..out * inp).map(|_| next() as i16 >> (next() % 9)).collect();
            let mut layer = std::sync::Arc::try_unwrap(layer(out, inp, &w)).unwrap_or_else(|_| unreachable!());
            layer.bias = (0..out).map(|_| next() as i64 >> 9).collect();
            let kind = Kind::Linear { rows, layer: layer.into() };
            check(&gpu, "linear", kind, &[(rows * inp, bits, false)], &[(rows * out, bits, false)], next());
        }
    }
    // In parts.
    gpu.state().device.room = 8 << 10;
    let kind = Kind::Linear { rows: 3, layer: layer(150, 100, &[-7; 15_000]) };
    check(&gpu, "linear in parts", kind, &[(300, 40, false)], &[(450, 40, false)], 8);
}

/// More rows than a dispatch may multiply go in several, the last one with what is left.
#[test]
fn layers_in_dispatches_of_some_rows() {
    let Some(gpu) = gpu() else { return };
    let (out, inp) = (70usize, 33usize);
    let of_a_row = out.next_multiple_of(4) * inp.next_multiple_of(4);
    let mut next = noise(4);
    let w: Vec<i16> = (0..out * inp).map(|_| next() as i16 >> (next() % 9)).collect();
    let weights = layer(out, inp, &w);
    let products = |p: &Program, gpu: &Gpu| {
        let open = crate::evaluation::open(&gpu.state, p, Role::E1).unwrap();
        open.map(|e| e.dispatches().into_iter().filter(|macs| *macs > 0).collect::<Vec<_>>())
    };
    for (rows, at_most, want) in [(64, 64, vec![64]), (65, 64, vec![64, 1]), (200, 95, vec![64, 64, 64, 8])] {
        gpu.state().device.most_macs = at_most * of_a_row;
        for bits in [32, 50] {
            let kind = || Kind::Linear { rows, layer: Arc::clone(&weights) };
            let (x, y) = ([(rows * inp, bits, false)], [(rows * out, bits, false)]);
            check(&gpu, "linear by rows", kind(), &x, &y, next());
            let want = want.iter().map(|rows| rows * of_a_row).collect();
            assert_eq!(products(&program(kind(), &x, &y), &gpu), Some(want));
        }
    }
    // Not a tile's worth of rows.
    gpu.state().device.most_macs = 31 * of_a_row;
    set(&gpu, [false; 3]);
    let kind = Kind::Linear { rows: 32, layer: weights };
    assert!(products(&program(kind, &[(32 * inp, 50, false)], &[(32 * out, 50, false)]), &gpu).is_none());
}

#[test]
fn products_of_heads() {
    let Some(gpu) = gpu() else { return };
    let grids = [Grid::square(1), Grid::square(13), Grid::causal(0, 11), Grid::causal(9, 10), Grid::causal(30, 1)];
    for (grid, (kv_heads, share, dim)) in grids.into_iter().zip([(1, 1, 1), (2, 1, 7), (2, 3, 8), (1, 2, 5), (3, 1, 6)])
    {
        for (side, k) in [(Side::Scores, 28), (Side::Attend, 32), (Side::Attend, 46), (Side::Scores, 64)] {
            let g = HeadProduct { side, grid, heads: kv_heads * share, kv_heads, dim, k };
            let (queries, keys) = (grid.rows * g.heads * dim, grid.keys * kv_heads * dim);
            let first = if side == Side::Scores { queries } else { g.heads * grid.len() };
            let out = [(g.out_len(), k, false)];
            check(
                &gpu,
                &format!("{g:?}"),
                Kind::Product(g.clone()),
                &[(first, k, false), (keys, k, false)],
                &out,
                k.into(),
            );
        }
    }
}
