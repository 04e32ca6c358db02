use std::sync::Arc;

use tacet_protocol::gates::rescale::Rescale;
use tacet_protocol::gates::residual::Residual;

use super::*;

#[test]
fn residuals_and_their_squares() {
    let Some(gpu) = gpu() else { return };
    let mut next = noise(7);
    // Rings of the accumulators, of the residual, of what it was before, and of sums; bits dropped of each and squared without.
    for (k_in, k_x, k_before, k_squares, [drop, drop_before, shift]) in [
        (4, 4, 4, 4, [0, 0, 0]),
        (4, 4, 5, 64, [3, 2, 2]),
        (23, 20, 31, 40, [9, 12, 3]),
        (32, 32, 33, 33, [20, 1, 1]),
        (33, 40, 32, 64, [35, 30, 9]),
        (62, 62, 62, 64, [59, 59, 11]),
        (62, 48, 50, 61, [64, 70, 6]),
        (50, 62, 62, 32, [90, 33, 4]),
    ] {
        for (rows, cols) in [(1, 1), (3, 7), (2, 64), (5, 150)] {
            for (scaled, shift) in [(false, 0), (false, shift), (true, 0), (true, shift)] {
                let mut mult = |_| match next() % 4 {
                    0 => 1,
                    _ => next() as i64 >> 36,
                };
                let bias = if rows == 3 { (0..cols).map(|c| c as i64 * -12345).collect() } else { vec![] };
                let all = Arc::new((0..cols).map(&mut mult).collect());
                let scale = Rescale { rows, stride: cols, first: 0, mult: all, shift: drop, k_in, k_out: k_x, bias };
                let all = Arc::new((0..cols).map(&mut mult).collect());
                let before = Rescale { mult: all, shift: drop_before, k_in: k_before, bias: vec![], ..scale.clone() };
                let before = scaled.then_some(before);
                let k_before = before.as_ref().map_or(k_x, |before| before.k_in);
                let k_squares = if shift == 0 { k_x } else { k_squares };
                let g = Residual { scale, before, shift, k_squares };
                let n = rows * cols;
                let what = format!("residual {k_in} {k_x} {k_squares} {drop} {drop_before} {shift} {scaled}");
                let inputs = [(n, k_in, false), (n, k_before, false)];
                check(&gpu, &what, Kind::Residual(g), &inputs, &[(n, k_x, false), (rows, k_squares, false)], next());
            }
        }
    }
}
