//! The whole encoder under masked evaluation, three roles in one process, against the f64 model and the cost model.

mod common;
#[path = "../../tests/common/tiny.rs"]
#[allow(dead_code)]
mod tiny;

use std::path::PathBuf;
use std::time::Instant;

use common::{States, run};
use tacet_protocol::model::BertModel;
use tacet_protocol::plan::Planner;
use tacet_protocol::program::Program;
use tacet_protocol::query;
use tacet_protocol::ring::{mask, signed};
use tacet_protocol::twin::{self, Plain};
use zeroize::Zeroizing;

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// Rows of all-MiniLM-L6-v2, and the megabytes that they open each way and are dealt in all.
const MEGABYTES: [(usize, f64, f64); 4] =
    [(8, 1.561, 8.336), (16, 3.234, 17.27), (32, 6.902, 36.97), (128, 37.89, 203.5)];

#[test]
fn real_weights_agree_with_plaintext_and_cost_is_exact() {
    let Some(dir) = std::env::var_os("TACET_MODEL_DIR").map(PathBuf::from) else {
        println!("skipped: TACET_MODEL_DIR does not name a directory with all-MiniLM-L6-v2");
        return;
    };
    let t = Instant::now();
    let model = BertModel::load(&dir).unwrap();
    println!("load {:?}", t.elapsed());
    let t = Instant::now();
    let planner = Planner::new(&model).unwrap();
    println!("plan {:?}", t.elapsed());
    let layers = model.layers.len() as u32;
    for (tokens, padded) in [(2usize, 8), (8, 8), (9, 16), (25, 32), (32, 32), (97, 128), (128, 128)] {
        let ids: Vec<u32> = (0..tokens)
            .map(|i| match i {
                0 => 101,
                _ if i + 1 == tokens => 102,
                _ => 1996 + (i as u32 * 7919) % 9000,
            })
            .collect();
        assert_eq!(query::padded(tokens), Some(padded));
        let p = planner.program(padded).unwrap();
        assert_eq!(p.digest(), planner.program(padded).unwrap().digest());
        let c = p.cost();
        let rows = model.embed_tokens(&ids).unwrap();
        let input = p.encode_input(&rows).unwrap();
        let t = Instant::now();
        let ([y1, y2], _) = run(&p, &input, 9, &mut States::default());
        let took = t.elapsed();
        let got = p.decode_output(&y1, &y2, tokens).unwrap();
        let want = model.plaintext(&ids).unwrap();
        let units: Vec<Vec<f64>> = p
            .inputs()
            .zip(&input)
            .map(|(v, x)| x.iter().map(|x| signed(*x, p.values[v].bits) as f64).collect())
            .collect();
        let twin = twin::evaluate(&p, &units, &mut Vec::new(), |v, made| within_its_bound(&p, v, made)).unwrap();
        let (cos, rounding, approximation) = (cosine(&got, &want), cosine(&got, &twin), cosine(&twin, &want));
        let [first, second] = c.dealt_bytes;
        let (opened, dealt) = (c.opened_bytes as f64 / 1e6, (first + second) as f64 / 1e6);
        println!(
            "{tokens} of {padded} tokens: cosine {cos:.6} (to the twin {rounding:.6}, of the twin {approximation:.6}), \
             {} rounds a layer, opened {opened:.2} MB, dealt {dealt:.2} MB, {took:?}",
            c.rounds / layers
        );
        assert!(cos >= 0.9995, "{tokens} tokens: cosine {cos}");
        assert!(rounding >= 0.9996 && approximation >= 0.9998, "{tokens} tokens: {rounding} {approximation}");
        // One more for the mean.
        assert_eq!(c.rounds, 17 * layers + 1);
        // Both links carry about half of what is dealt.
        assert!(first.abs_diff(second) * 10 < first + second, "{first} and {second} bytes are dealt");
        // What is reached, to a hundredth: more is a regression, and less is to be written down here.
        let (_, much, more) = MEGABYTES.into_iter().find(|(rows, ..)| *rows == padded).unwrap();
        let near = |got: f64, due: f64| (got / due - 1.0).abs() < 0.01;
        assert!(near(opened, much), "{padded} rows: {opened:.2} MB opened where {much} were");
        assert!(near(dealt, more), "{padded} rows: {dealt:.2} MB dealt where {more} were");
    }
}

/// No value of a real text leaves the range that was proven for every text.
fn within_its_bound(p: &Program, v: usize, made: &Plain) {
    let Plain::Real(made) = made else { return };
    let value = &p.values[v];
    let largest = made.iter().fold(0f64, |m, x| m.max(x.abs()));
    // Exponentials that alias are flagged and dropped; scales outside their range are not chosen.
    let any = value.name.ends_with("exponentials") || value.name.contains(" scales");
    assert!(any || largest <= value.bound, "{}: {largest:e} above {:e}", value.name, value.bound);
}

/// Two-sample chi-square statistic with as many degrees of freedom as there are cells less one.
fn chi_square(a: &[u64], b: &[u64]) -> f64 {
    let (na, nb) = (a.iter().sum::<u64>() as f64, b.iter().sum::<u64>() as f64);
    let cell = |(x, y): (&u64, &u64)| {
        let d = *x as f64 * (nb / na).sqrt() - *y as f64 * (na / nb).sqrt();
        if x + y == 0 { 0.0 } else { d * d / (x + y) as f64 }
    };
    a.iter().zip(b).map(cell).sum()
}

/// What one evaluator receives must not depend on the text. (The dealer receives nothing, by its interface.)
#[test]
fn received_bytes_are_statistically_the_same_for_different_inputs() {
    let Some(dir) = std::env::var_os("TACET_MODEL_DIR").map(PathBuf::from) else {
        println!("skipped: TACET_MODEL_DIR does not name a directory with all-MiniLM-L6-v2");
        return;
    };
    const RUNS: u64 = 60;
    let model = BertModel::load(&dir).unwrap();
    let p = Planner::new(&model).unwrap().program(8).unwrap();
    // One input of zeros, one as large as the rings allow: far outside what any text gives.
    let words = |f: fn(u64) -> u64| -> Vec<Zeroizing<Vec<u64>>> {
        let input = |v: usize| (0..p.values[v].len() as u64).map(|i| f(i) & mask(p.values[v].bits)).collect();
        p.inputs().map(|v| Zeroizing::new(input(v))).collect()
    };
    let inputs = [words(|_| 0), words(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15))];
    // Per input and evaluator: counts of byte values, and counts of ones at each of the first 8192 bit positions.
    let mut seen = vec![[[0u64; 256]; 2]; 2];
    let mut ones = vec![[vec![0u64; 8192], vec![0u64; 8192]]; 2];
    for (i, input) in inputs.iter().enumerate() {
        for r in 0..RUNS {
            let (_, io) = run(&p, input, 1 + r * 2 + i as u64, &mut States::default());
            for (e, io) in io.iter().enumerate() {
                seen[i][e].iter_mut().zip(io.seen.iter()).for_each(|(a, b)| *a += b);
                ones[i][e].iter_mut().enumerate().for_each(|(j, n)| *n += u64::from(io.head[j / 8] >> (j % 8) & 1));
            }
        }
    }
    for e in 0..2 {
        let x = chi_square(&seen[0][e], &seen[1][e]);
        // 255 degrees of freedom: mean 255, deviation 22.6; six deviations.
        assert!(x < 391.0, "E{}: chi-square {x:.0} over byte values", e + 1);
        let worst = ones[0][e].iter().zip(&ones[1][e]).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        // The difference of two binomials of 60 has deviation 5.5; 8192 positions, six and a half deviations.
        assert!(worst <= 36, "E{}: a bit differs in {worst} of {RUNS} runs", e + 1);
    }
}

/// Small proven scores: what a sharp row gives to its other tokens is not lost below a maximum that is too finely stepped.
#[test]
fn attention_is_accurate_within_a_small_bound() {
    let dir = tiny::Tiny::new(1);
    let first = BertModel::load(&dir.dir).unwrap().embed_tokens(&[1]).unwrap();
    for factor in [0.5, 1.0, 2.0] {
        let mut weights = tiny::weights(1);
        for (name, shape, values) in &mut weights {
            // Every row of queries and keys looks for the first token, which therefore attends to itself most.
            if name.contains("query.weight") || name.contains("key.weight") {
                values.chunks_exact_mut(shape[1]).for_each(|r| {
                    r.iter_mut().zip(&first).for_each(|(w, x)| *w = (x * factor / first.len() as f64) as f32)
                });
            }
            if name.contains("value.weight") || name.contains("attention.output.dense.weight") {
                values.iter_mut().for_each(|v| *v *= 4.0);
            }
        }
        std::fs::write(dir.dir.join("model.safetensors"), tiny::safetensors(&weights)).unwrap();
        let model = BertModel::load(&dir.dir).unwrap();
        let p = Planner::new(&model).unwrap().program(8).unwrap();
        let ids = [1, 9, 17, 25, 33, 41];
        let input = p.encode_input(&model.embed_tokens(&ids).unwrap()).unwrap();
        let ([y1, y2], _) = run(&p, &input, 5, &mut States::default());
        let got = p.decode_output(&y1, &y2, ids.len()).unwrap();
        let cos = cosine(&got, &model.plaintext(&ids).unwrap());
        assert!(cos > 0.9999, "factor {factor}: cosine {cos}");
    }
}
