//! Rates of the linear kernels, in multiply-accumulates a second on one thread: `cargo bench -p tacet-protocol`.

use std::time::Instant;

use tacet_protocol::gemm::{Weights, linear, matmul_bt};
use tacet_protocol::prg::{Prg, SessionKey};

fn rate(work: usize, mut run: impl FnMut()) -> f64 {
    run();
    let best = (0..20).map(|_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    });
    work as f64 / best.fold(f64::INFINITY, f64::min) / 1e9
}

fn main() {
    let mut prg = Prg::new(&SessionKey::from_seed([1; 32]));
    let mut step = 0;
    let mut words = |n: usize, bits: u32| {
        let mut v = vec![0; n];
        step += 1;
        prg.fill(step, 0, bits, &mut v).expect("every step is new");
        v
    };
    for (rows, inp, out) in [(128, 384, 1536), (128, 1536, 384), (128, 768, 3072), (1, 768, 3072)] {
        let x = words(rows * inp, 64);
        let w: Vec<i16> = words(out * inp, 12).iter().map(|v| *v as i16 - 2048).collect();
        let w = Weights::new(out, inp, &w);
        let mut y = vec![0; rows * out];
        for bits in [32, 64] {
            let r = rate(rows * inp * out, || linear(&x, rows, &w, bits, &mut y));
            println!("linear {rows} x {inp} -> {out}, {bits} bits: {r:.1} GMAC/s");
        }
    }
    for (m, k, n) in [(128, 32, 128), (128, 128, 64)] {
        let (a, b) = (words(m * k, 64), words(k * n, 64));
        let mut y = vec![0; m * n];
        for bits in [32, 64] {
            let r = rate(m * k * n, || matmul_bt(&a, &b, m, k, n, bits, &mut y));
            println!("product {m} x {k} x {n}, {bits} bits: {r:.1} GMAC/s");
        }
    }
}
