use std::sync::Arc;

use tacet_protocol::gates::join::Join;
use tacet_protocol::gates::spline::{Scales, Spline};
use tacet_protocol::gates::tails::Tails;

use super::*;

#[test]
fn joins() {
    let Some(gpu) = gpu() else { return };
    let mut next = noise(11);
    for (k_in, k_series, k_out, shift, drop) in [
        (4, 3, 3, 0, 0),
        (4, 3, 64, 100, 1),
        (24, 13, 17, 9, 5),
        (32, 33, 32, 30, 31),
        (33, 32, 33, 40, 0),
        (62, 40, 64, 64, 2),
        (62, 30, 50, 63, 28),
        (50, 40, 1, 90, 38),
    ] {
        for (rows, cols) in [(1, 1), (7, 3), (2, 64), (3, 50), (2, 131)] {
            let (len, mult) = (rows * cols, (0..cols).map(|_| (next() >> 36) as i64).collect());
            let g = Join { len, mult: Arc::new(mult), shift, k_in, k_series, drop, k_out };
            let bits = (len.div_ceil(64), 64, true);
            let inputs = [(len, k_in, false), (len, k_series, false), bits, bits];
            let what = format!("join {k_in} {k_series} {k_out} {shift} {drop}");
            check(&gpu, &what, Kind::Join(g), &inputs, &[(len, k_out, false)], next());
        }
    }
}

#[test]
fn tails() {
    let Some(gpu) = gpu() else { return };
    let mut next = noise(13);
    for k in [7, 8, 31, 32, 33, 38, 39, 40, 50, 64] {
        for (rows, cols) in [(1, 1), (9, 7), (2, 64), (3, 50), (2, 131)] {
            let inner = Arc::new((0..cols).map(|_| 1 + next() as u32 % 32).collect());
            let g = Tails { len: rows * cols, inner, k };
            let bits = (g.out_len(), 64, true);
            check(&gpu, &format!("{k} bits' tails"), Kind::Tails(g), &[(rows * cols, k, false)], &[bits; 2], next());
        }
    }
}

#[test]
fn functions_that_the_processor_makes() {
    let Some(gpu) = gpu() else { return };
    let mut next = noise(17);
    for (drop, count, rho, k_out) in [(7, 1, 7, 20), (7, 7, 10, 62), (18, 10, 7, 33), (0, 24, 10, 64), (30, 2, 7, 1)] {
        for (rows, degree) in [(1, 3), (5, 4), (67, 3)] {
            let scales = Scales { drop, count, degree };
            for k_in in [scales.ring(), 64] {
                let g = Spline::new(|x| 1e12 / (x + 1.0), rows, scales, rho, [k_in, k_out]);
                let what = format!("{scales:?} to {k_out} bits");
                check(&gpu, &what, Kind::Spline(g), &[(rows, k_in, false)], &[(rows, k_out, false)], next());
            }
        }
    }
}
