//! Rates of the kernels on this machine's best adapter: `cargo bench -p tacet-shaders --bench adapters [-- --peak GMACS]`.
//!
//! `--peak` states what the adapter could do at most, in 10^9 multiply-accumulates of 32-bit integers a second; each line
//! then says which part of it a kernel reaches. On a software adapter the figures say only that the kernels run.

use tacet_shaders::{Choice, Gpu};

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let stated = args.iter().position(|a| a == "--peak").and_then(|i| args.get(i + 1));
    let peak: Option<f64> = stated.map(|p| p.parse().expect("--peak takes a number"));
    let gpu = match Gpu::open(Choice::Any) {
        Ok(gpu) => gpu,
        Err(e) => return println!("skipped: {e}"),
    };
    println!("{}, driver {}", gpu.adapter(), gpu.adapter().driver);
    if !gpu.adapter().hardware {
        println!("computed by the processor: this checks that the kernels run, not how fast they are");
    }
    for r in gpu.rates().expect("an adapter that works") {
        let [rows, inputs, columns] = r.shape;
        let part = peak.map_or(String::new(), |p| format!(", {:.1} % of {p} GMAC/s", r.gmacs / p * 100.0));
        println!("{:<36} {rows} x {inputs} x {columns}: {:.2} GMAC/s{part}", r.kernel, r.gmacs);
    }
}
