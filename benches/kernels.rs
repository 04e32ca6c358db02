//! Rates of the linear kernels, in multiply-accumulates a second: `cargo bench -p tacet-protocol --bench kernels`, or with a
//! part of a name behind `--`, such as `u32 x i8/avx2`.
//!
//! Every level that this processor has is measured on one thread: the loops without vector instructions, then each set of
//! those. Then the best by two and more threads, layers that come from memory, beside reading as many bytes, and attention's products.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput, measurement::WallTime};
use tacet_protocol::backend::{Backend, Cpu};
use tacet_protocol::gates::grid::Grid;
use tacet_protocol::gates::product::{HeadProduct, Side};
use tacet_protocol::gemm::{Level, Order, Threads, Weights, linear_on, product_on};
use tacet_protocol::prg::{Prg, SessionKey};

/// Rows, inputs and outputs: a projection of 128 tokens, and of one.
const SHAPES: [(usize, usize, usize); 2] = [(128, 768, 3072), (1, 768, 3072)];

/// Weights by the bits that they have with their sign; those of most decoders have thirteen.
const WEIGHTS: [(&str, u32); 5] = [("ternary", 2), ("i4 blocks", 4), ("i8", 8), ("i13", 13), ("i16", 16)];

/// Words that are the same in every run.
struct Words(Prg, u32);

impl Words {
    fn next(&mut self, n: usize, bits: u32) -> Vec<u64> {
        let mut v = vec![0; n];
        self.1 += 1;
        self.0.fill(self.1, 0, bits, &mut v).expect("every step is new");
        v
    }

    /// Of two bits, -1, 0 and 1 times one magnitude; of four, with a scale and an offset of every 32.
    fn weights(&mut self, out: usize, inp: usize, bits: u32) -> Weights {
        let signed = |v: &u64| (*v as i64 - (1 << (bits - 1))) as i16;
        let mut w: Vec<i16> = self.next(out * inp, bits).iter().map(signed).collect();
        if bits == 2 {
            w.iter_mut().for_each(|w| *w = (*w).max(-1) * 1000);
        }
        if bits == 4 {
            w.iter_mut().enumerate().for_each(|(at, w)| *w = *w * 500 + (at / 32 % 90) as i16);
        }
        Weights::new(out, inp, &w)
    }
}

fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name| text.lines().find_map(|l: &str| Some(l.strip_prefix(name)?.split_once(": ")?.1));
    match (field("model name"), field("cpu family"), field("model\t")) {
        (Some(name), Some(family), Some(model)) => format!("{name}, family {family}, model {model}"),
        _ => std::env::consts::ARCH.into(),
    }
}

/// Rows, inputs and outputs of a layer that no cache holds.
const LARGE: (usize, usize, usize) = (1, 4096, 22016);

/// Times `run` under `kernel/how`.
fn rate(g: &mut BenchmarkGroup<WallTime>, kernel: &str, how: &str, macs: usize, mut run: impl FnMut(&mut Vec<u64>)) {
    g.throughput(Throughput::Elements(macs as u64));
    let mut y = Vec::new();
    g.bench_function(BenchmarkId::new(kernel, how), |b| {
        b.iter(|| {
            run(&mut y);
            black_box(&y);
        });
    });
}

fn main() {
    println!("{}", processor());
    let quick = Criterion::default().warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_secs(1));
    let mut c = quick.sample_size(20).configure_from_args();
    let mut words = Words(Prg::new(&SessionKey::from_seed([1; 32])), 0);
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let mut counts: Vec<usize> = [2, 4, 8, cores].into_iter().filter(|n| (2..=cores).contains(n)).collect();
    counts.dedup();
    let pools: Vec<Threads> = counts.into_iter().map(|n| Threads::new(n).expect("threads")).collect();
    for (rows, inp, out) in SHAPES {
        let mut g = c.benchmark_group(format!("{rows}x{inp}x{out}"));
        let macs = rows * inp * out;
        let x = words.next(rows * inp, 64);
        for (name, width) in WEIGHTS {
            let w = words.weights(out, inp, width);
            for bits in [32, 48, 64] {
                let name = format!("u{bits} x {name}");
                for level in Level::all() {
                    rate(&mut g, &name, level.name(), macs, |y| {
                        y.resize(rows * out, 0);
                        linear_on(level, &x, rows, &w, bits, y);
                    });
                }
                for pool in &pools {
                    rate(&mut g, &name, &format!("{} threads", pool.count()), macs, |y| {
                        y.resize(rows * out, 0);
                        pool.linear(&x, rows, &w, bits, y);
                    });
                }
            }
        }
        let b = words.next(inp * out, 64);
        // Of one row, and by several threads, there are attention's products only, below.
        for bits in [32, 64].into_iter().filter(|_| rows > 1) {
            for level in Level::all() {
                rate(&mut g, &format!("u{bits} x u{bits}"), level.name(), macs, |y| {
                    y.resize(rows * out, 0);
                    product_on(level, &x, &b, (rows, inp, out), Order::Columns, bits, y);
                });
            }
        }
        g.finish();
    }
    let (rows, inp, out) = LARGE;
    let mut g = c.benchmark_group(format!("{rows}x{inp}x{out}"));
    let x = words.next(rows * inp, 64);
    for (name, width) in WEIGHTS {
        let w = words.weights(out, inp, width);
        for bits in [32, 48, 64] {
            let name = format!("u{bits} x {name}");
            rate(&mut g, &name, Level::detect().name(), rows * inp * out, |y| {
                y.resize(rows * out, 0);
                linear_on(Level::detect(), &x, rows, &w, bits, y);
            });
            for pool in &pools {
                rate(&mut g, &name, &format!("{} threads", pool.count()), rows * inp * out, |y| {
                    y.resize(rows * out, 0);
                    pool.linear(&x, rows, &w, bits, y);
                });
            }
        }
    }
    for bytes in [1, 2] {
        let read = words.next(inp * out * bytes / 8, 64);
        g.throughput(Throughput::Bytes(8 * read.len() as u64));
        g.bench_function(format!("read {bytes} bytes a weight"), |b| {
            b.iter(|| {
                let mut all = [0; 8];
                for part in read.as_chunks::<8>().0 {
                    all.iter_mut().zip(part).for_each(|(a, p)| *a ^= p);
                }
                black_box(all)
            });
        });
    }
    g.finish();
    // Attention's products of whole words, which threads divide by heads: of one new position with the keys and with the values of
    // all before it, of several, of a prompt, whose later keys count as nothing, and of a text. Of a few rows words are of 64 bits
    // whatever the ring.
    let mut g = c.benchmark_group("12 heads of 64");
    let (heads, dim) = (12, 64);
    let after = |past, rows| (format!("{rows} after {past}"), Grid::causal(past, rows));
    let text = ("128 of a text".to_string(), Grid::square(128));
    for (shape, grid) in [after(512, 1), after(4096, 1), after(512, 16), after(0, 128), text] {
        let rows = grid.rows;
        for (side, k) in [(Side::Scores, 28), (Side::Scores, 62), (Side::Attend, 28), (Side::Attend, 62)] {
            let p = HeadProduct { side, grid, heads, kv_heads: heads, dim, k };
            let short = words.next(if side == Side::Scores { rows * heads * dim } else { heads * grid.len() }, k);
            let long = words.next(grid.keys * heads * dim, k);
            let macs = heads * grid.len() * dim;
            let word = if k > 32 { 64 } else { 32 };
            let name = format!("{side:?} u{word} x u{word}");
            let mut measure = |how: &str, backend: &dyn Backend| {
                rate(&mut g, &name, &format!("{shape}, {how}"), macs, |y| {
                    *y = backend.product(&p, &[(&short, &long)]).expect("the processor does not fail");
                });
            };
            measure("one thread", &Cpu);
            pools.iter().for_each(|pool| measure(&format!("{} threads", pool.count()), pool));
        }
    }
    g.finish();
    c.final_summary();
}
