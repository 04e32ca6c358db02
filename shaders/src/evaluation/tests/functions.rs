use std::sync::Arc;

use tacet_protocol::gates::join::Join;
use tacet_protocol::gates::piecewise::{Piecewise, Scales};
use tacet_protocol::gates::select::Select;
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
fn polynomials_in_windows() {
    let Some(gpu) = gpu() else { return };
    let mut next = noise(17);
    for (drop, count, windows, rho_bits, k_out) in [
        (7, 1, 8, 7, 20),
        (7, 7, 16, 7, 21),
        (7, 5, 32, 7, 33),
        (18, 10, 64, 18, 32),
        (18, 8, 128, 7, 64),
        (3, 57, 8, 3, 1),
        (10, 4, 256, 9, 30),
    ] {
        for (rows, reach, degree) in [(1, 1, 3), (5, 2, 4), (3, 4, 3), (67, 1, 4)] {
            // Flags of a few bits and of many words.
            let scales = Scales { drop, count, windows, reach, degree };
            if rows << scales.flag_bits(0) > 1 << 24 {
                continue;
            }
            for k_in in [scales.ring(), 64] {
                // Evaluators have only what is dealt of polynomials.
                let coef = vec![vec![[0.0; 5]; windows]; count];
                let g = Piecewise { rows, k_in, scales, coef, rho_bits, k_out };
                let outputs = [(rows * count, k_out, false), (rows, 64, true)];
                let what = format!("{scales:?} to {k_out} bits");
                check(&gpu, &what, Kind::Piecewise(g), &[(rows, k_in, false)], &outputs, next());
            }
        }
    }
}

#[test]
fn choices_among_scales() {
    let Some(gpu) = gpu() else { return };
    let mut next = noise(19);
    for (k_in, k_out) in [(3, 1), (3, 64), (20, 32), (21, 51), (32, 33), (33, 20), (62, 64), (62, 31)] {
        for (rows, scales, reach) in [(1, 1, 1), (5, 2, 1), (66, 7, 2), (3, 10, 4), (4, 12, 1), (2, 20, 3), (2, 64, 9)]
        {
            // The least and the most that are allowed, and others.
            let [least, most] = [1 - k_in as i32, k_out as i32 - 1];
            let mut shift = |s: usize| match s % 5 {
                0 => most,
                1 => least,
                _ => least + (next() % (most - least + 1) as u64) as i32,
            };
            let shifts = (0..scales).map(&mut shift).collect();
            let g = Select { rows, shifts, reach, k_in, k_out };
            let inputs = [(rows * scales, k_in, false), (rows, 64, true)];
            check(&gpu, &format!("{g:?}"), Kind::Select(g), &inputs, &[(rows, k_out, false)], next());
        }
    }
}
