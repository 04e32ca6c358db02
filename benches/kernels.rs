//! Rates of the linear kernels, in multiply-accumulates a second on one thread: `cargo bench -p tacet-protocol --bench
//! kernels`, or with a part of a name behind `--`, such as `u32 x i8/avx2`.
//!
//! Every level that this processor has is measured: the loops without vector instructions, then each set of those.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput, measurement::WallTime};
use tacet_protocol::gemm::{Level, Order, Weights, linear_on, product_on};
use tacet_protocol::prg::{Prg, SessionKey};

/// Rows, inputs and outputs: a projection of 128 tokens, and of one.
const SHAPES: [(usize, usize, usize); 2] = [(128, 768, 3072), (1, 768, 3072)];

/// Words that are the same in every run.
struct Words(Prg, u32);

impl Words {
    fn next(&mut self, n: usize, bits: u32) -> Vec<u64> {
        let mut v = vec![0; n];
        self.1 += 1;
        self.0.fill(self.1, 0, bits, &mut v).expect("every step is new");
        v
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

/// Times `run` under `kernel/level`.
fn rate(
    g: &mut BenchmarkGroup<WallTime>,
    kernel: String,
    level: Level,
    macs: usize,
    mut run: impl FnMut(&mut Vec<u64>),
) {
    g.throughput(Throughput::Elements(macs as u64));
    let mut y = Vec::new();
    g.bench_function(BenchmarkId::new(kernel, level.name()), |b| {
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
    for (rows, inp, out) in SHAPES {
        let mut g = c.benchmark_group(format!("{rows}x{inp}x{out}"));
        let macs = rows * inp * out;
        let x = words.next(rows * inp, 64);
        // Weights of decoders have a sign and twelve bits.
        for (name, width) in [("i8", 8), ("i13", 13), ("i16", 16)] {
            let signed = |v: &u64| (*v as i64 - (1 << (width - 1))) as i16;
            let w: Vec<i16> = words.next(out * inp, width).iter().map(signed).collect();
            let w = Weights::new(out, inp, &w);
            for bits in [32, 48, 64] {
                for level in Level::all() {
                    rate(&mut g, format!("u{bits} x {name}"), level, macs, |y| {
                        y.resize(rows * out, 0);
                        linear_on(level, &x, rows, &w, bits, y);
                    });
                }
            }
        }
        let b = words.next(inp * out, 64);
        for bits in [32, 64] {
            for level in Level::all() {
                rate(&mut g, format!("u{bits} x u{bits}"), level, macs, |y| {
                    y.resize(rows * out, 0);
                    product_on(level, &x, &b, (rows, inp, out), Order::Columns, bits, y);
                });
            }
        }
        g.finish();
    }
    c.final_summary();
}
