use std::sync::Arc;

use tacet_protocol::gates::cosine::{Columns, Cosine};
use tacet_protocol::gates::exp::{Exp, Head};
use tacet_protocol::gates::grid::Grid;
use tacet_protocol::gates::rowmax::Levels;

use super::*;

#[test]
fn exponentials() {
    let Some(gpu) = gpu() else { return };
    for (grid, window_steps) in [(Grid::square(23), 3), (Grid::causal(5, 31), 2), (Grid::causal(600, 2), 3)] {
        for (k, levels, k_out) in [(25, [6, 9, 11], 50), (36, [7, 6, 10], 64), (28, [8, 8, 8], 40)] {
            // Steps of two to six powers of two.
            let head = |(i, level_bits): (usize, &u32)| {
                let step = 2.0 + 1.7 * i as f64;
                Head {
                    levels: Levels { first: level_bits / 8, ..Levels::all(*level_bits) },
                    ulp: step / f64::from(1u32 << (k - level_bits)),
                }
            };
            let heads: Vec<Head> = levels.iter().enumerate().map(head).collect();
            let g = Exp { grid, heads, k, window_steps, k_out, f_pub: 3, f_deal: 20 };
            let n = g.heads.len() * grid.len();
            let inputs = [(n, k, false), (g.heads.len() * grid.rows, 9, false)];
            let outputs = [(n, k_out, false), (g.flag_len(), 64, true)];
            check(&gpu, &format!("{g:?}"), Kind::Exp(g.clone()), &inputs, &outputs, k.into());
        }
    }
}

#[test]
fn cosine_series() {
    let Some(gpu) = gpu() else { return };
    let mut next = noise(9);
    for (rows, cols, period, k_in) in [(3, 16, 17, 21), (5, 37, 20, 20), (2, 70, 33, 40), (1, 5, 40, 64)] {
        for (f_out, k_out) in [(16, 21), (20, 33), (30, 64)] {
            let mut unit = || (next() as i64 >> 11) as f64 * 2f64.powi(-52);
            let series = |i: usize| (0..1 + i % 11).map(|_| 3.0 * unit()).collect::<Vec<f64>>();
            let coef: Vec<Vec<f64>> = (0..cols).map(series).collect();
            let turns = (0..cols as u32).map(|i| 1 + i % 5).collect();
            let g = Cosine { rows, columns: Arc::new(Columns::new(coef, turns)), period, f_out, k_out };
            let (inputs, outputs) = ([(rows * cols, k_in, false)], [(rows * cols, k_out, false)]);
            check(&gpu, &format!("period {period}"), Kind::Cosine(g), &inputs, &outputs, next());
        }
    }
}
