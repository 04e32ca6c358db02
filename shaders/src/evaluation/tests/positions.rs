use std::sync::Arc;

use tacet_protocol::gates::hadamard::Hadamard;
use tacet_protocol::gates::reached::Reached;
use tacet_protocol::gates::rotate::Rotate;
use tacet_protocol::gates::turn::Turn;

use super::bits::{rows, segments, words};
use super::*;

#[test]
fn levels_of_few_rows() {
    let Some(gpu) = gpu() else { return };
    let all: [&[(usize, usize)]; 3] = [&[(1, 1)], &[(3, 2), (0, 2), (2, 4), (1, 4)], &[(2, 16), (1, 3), (1, 16)]];
    for segments in all.map(segments) {
        for (members, k) in [(1, 12), (2, 1), (3, 32), (4, 10), (5, 33), (4, 64)] {
            let g = Reached { segments: segments.clone(), members, k };
            let (n, out) = (members * words(&segments), [(rows(&segments), k, false)]);
            check(&gpu, &format!("{g:?}"), Kind::Reached(g.clone()), &[(n, 64, true)], &out, k.into());
        }
    }
}

#[test]
fn turns() {
    let Some(gpu) = gpu() else { return };
    for (rows, dim, heads) in [(1, 2, 1), (3, 4, 2), (7, 10, 3), (33, 8, 1)] {
        for k in [1, 28, 32, 33, 50, 64] {
            let (cols, frequencies) = (dim * heads, vec![0.5; dim / 2]);
            let g = Turn { rows, dim, cols, frequencies, f: 15, k };
            let inputs = [(rows * cols, k, false), (dim, k, false)];
            check(&gpu, &format!("{g:?}"), Kind::Turn(g.clone()), &inputs, &[(rows * cols, k, false)], k.into());
        }
    }
}

#[test]
fn rotations() {
    let Some(gpu) = gpu() else { return };
    for (rows, position, dim, heads) in [(1, 0, 2, 1), (5, 7, 4, 2), (9, 1000, 14, 3), (65, 3, 2, 1)] {
        for (k_in, k_out, scale) in [
            (2, 1, 1.0),
            (31, 28, -0.01),
            (54, 28, 1e-9),
            (30, 40, 3.0),
            (40, 64, 1e9),
            (63, 33, 1e-18),
            (20, 32, 1e-25),
        ] {
            // Scales of every head, or of each its own.
            for period in [dim, dim * heads] {
                let mut next = noise(dim as u64);
                let own: Vec<f64> = (0..period).map(|_| scale * (next() % 1000) as f64 / 1000.0).collect();
                let g = Rotate {
                    rows,
                    position,
                    stride: dim * heads + 3,
                    first: 2,
                    dim,
                    frequencies: (0..dim / 2).map(|i| 0.3f64.powi(i as i32)).collect(),
                    scale: Arc::new(own.iter().copied().cycle().take(dim * heads).collect()),
                    power: 0,
                    k_in,
                    k_out,
                };
                let (inputs, out) = ([(rows * g.stride, k_in, false)], [(g.out_len(), k_out, false)]);
                check(&gpu, &format!("{g:?}"), Kind::Rotate(g.clone()), &inputs, &out, k_in.into());
            }
        }
    }
}

#[test]
fn products_word_by_word() {
    let Some(gpu) = gpu() else { return };
    for (len, k) in [(1, 1), (63, 28), (64, 32), (65, 33), (200, 57), (131, 64)] {
        let g = Hadamard { len, k };
        check(
            &gpu,
            &format!("{g:?}"),
            Kind::Hadamard(g.clone()),
            &[(len, k, false), (len, k, false)],
            &[(len, k, false)],
            k.into(),
        );
    }
}
