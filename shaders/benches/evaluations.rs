//! An evaluator's part of a query, on this machine's best adapter and on its processor, without a network:
//! `cargo bench -p tacet-shaders --bench evaluations -- --model DIR --tokens 128 [--repeat 5]`.
//!
//! An encoder's query, or a decoder's prompt and a step after it. All that is received is zero, which makes no difference to the
//! time. Said too is what travels between processor and device, with the part of the time in which the processor draws and copies.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use tacet_protocol::backend::{Backend, Cpu, Evaluation, Part};
use tacet_protocol::gates::product::HeadProduct;
use tacet_protocol::model::{BertModel, is_encoder};
use tacet_protocol::plan::{DecoderPlanner, Keep, Planner};
use tacet_protocol::prg::{Prg, SessionKey};
use tacet_protocol::program::{Id, Linear, Program};
use tacet_protocol::run::{self, EvaluatorState, segments};
use tacet_protocol::{Error, EvaluatorIo, Role};
use tacet_shaders::{Choice, Gpu};

/// A device that looks at the clock.
struct Timed {
    gpu: Gpu,
    nanoseconds: Arc<AtomicU64>,
}

struct TimedEvaluation(Box<dyn Evaluation>, Arc<AtomicU64>);

impl Evaluation for TimedEvaluation {
    fn put(&mut self, v: Id, part: Part, words: &[u64]) -> Result<(), Error> {
        self.0.put(v, part, words)
    }

    fn run(&mut self, segment: usize, fed: &[u8]) -> Result<Vec<u8>, Error> {
        let start = Instant::now();
        let message = self.0.run(segment, fed);
        self.1.fetch_add(start.elapsed().as_nanos() as u64, Relaxed);
        message
    }

    fn get(&mut self, v: Id, part: Part) -> Result<Vec<u64>, Error> {
        self.0.get(v, part)
    }
}

impl Backend for Timed {
    fn linear(&self, layer: &Arc<Linear>, x: &[u64], rows: usize, bits: u32) -> Result<Vec<u64>, Error> {
        self.gpu.linear(layer, x, rows, bits)
    }

    fn product(&self, g: &HeadProduct, pairs: &[(&[u64], &[u64])]) -> Result<Vec<u64>, Error> {
        self.gpu.product(g, pairs)
    }

    fn evaluation(&self, p: &Program, role: Role) -> Result<Option<Box<dyn Evaluation>>, Error> {
        let timed = |e| -> Box<dyn Evaluation> { Box::new(TimedEvaluation(e, Arc::clone(&self.nanoseconds))) };
        Ok(self.gpu.evaluation(p, role)?.map(timed))
    }
}

struct Alone<'a>(&'a dyn Backend);

impl EvaluatorIo for Alone<'_> {
    fn dealt(&mut self, _: u32, len: usize) -> Result<Vec<u8>, Error> {
        Ok(vec![0; len])
    }

    fn exchange(&mut self, _: u32, out: Vec<u8>) -> Result<Vec<u8>, Error> {
        Ok(vec![0; out.len()])
    }

    fn backend(&self) -> &dyn Backend {
        self.0
    }
}

fn evaluate(p: &Program, backend: &dyn Backend, state: &mut EvaluatorState) -> f64 {
    let input = p.inputs().map(|v| vec![0; p.values[v].len()]).collect();
    let prg = Prg::new(&SessionKey::from_seed([1; 32]));
    let start = Instant::now();
    run::evaluate_next(p, Role::E1, prg, input, state, &mut Alone(backend)).expect("an evaluation");
    start.elapsed().as_secs_f64()
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

/// Seconds of each program in turn, medians; each goes on where the one before it ended.
fn seconds(programs: &[Program], backend: &dyn Backend, repeat: usize) -> Vec<f64> {
    let mut all = vec![Vec::new(); programs.len()];
    // The first puts weights on the device and compiles kernels.
    for i in 0..=repeat {
        let mut state = EvaluatorState::default();
        for (p, all) in programs.iter().zip(&mut all) {
            let took = evaluate(p, backend, &mut state);
            if i > 0 {
                all.push(took);
            }
        }
    }
    all.into_iter().map(median).collect()
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let after = |name: &str| args.iter().position(|a| a == name).and_then(|i| args.get(i + 1));
    let number = |name, other| after(name).map_or(other, |n| n.parse().expect("a number"));
    let Some(dir) = after("--model").map(PathBuf::from) else {
        return println!("skipped: --model names no model directory");
    };
    let gpu = match Gpu::open(Choice::Any) {
        Ok(gpu) => gpu,
        Err(e) => return println!("skipped: {e}"),
    };
    println!("{}, driver {}", gpu.adapter(), gpu.adapter().driver);
    if !gpu.adapter().hardware {
        println!("computed by the processor: this checks that the kernels run, not how fast they are");
    }
    let (tokens, repeat) = (number("--tokens", 128), number("--repeat", 5));
    let programs = if is_encoder(&dir) {
        let planner = Planner::new(&BertModel::load(&dir).expect("a model")).expect("a plan");
        vec![planner.program(tokens).expect("a program")]
    } else {
        let (planner, _) = DecoderPlanner::load(&dir, Keep::Weights, None, &|_| ()).expect("a plan");
        let program = |past, rows| planner.program(true, past, rows, false).expect("a program");
        vec![program(0, tokens), program(tokens, 1)]
    };
    let timed = Timed { gpu, nanoseconds: Arc::default() };
    let of_processor = seconds(&programs, &Cpu, repeat);
    let of_device = seconds(&programs, &timed, repeat);
    for (p, (cpu, gpu)) in programs.iter().zip(of_processor.into_iter().zip(of_device)) {
        println!("{} rows after {}: processor {:.1} ms, device {:.1} ms", p.tokens(), p.past(), cpu * 1e3, gpu * 1e3);
        if timed.gpu.evaluation(p, Role::E1).expect("a device").is_none() {
            println!("  of it the products on the device, the gates on the processor");
            continue;
        }
        let all = segments(p, Role::E1);
        let fed: usize = all.iter().map(|s| s.bytes).sum();
        let most = all.iter().map(|s| s.bytes).max().unwrap_or(0);
        let cost = p.cost();
        println!(
            "  to the device {:.1} MB in {} pieces, the largest {:.1} MB; back {:.1} MB; {:.2} G multiply-accumulates",
            fed as f64 / 1e6,
            all.len(),
            most as f64 / 1e6,
            cost.opened_bytes as f64 / 1e6,
            cost.multiplications as f64 / 1e9
        );
        if p.past() == 0 {
            timed.nanoseconds.store(0, Relaxed);
            let whole = evaluate(p, &timed, &mut EvaluatorState::default());
            let device = timed.nanoseconds.load(Relaxed) as f64 / 1e9;
            let rest = (whole - device) * 1e3;
            println!("  of {:.1} ms the processor draws and copies for {rest:.1} ms", whole * 1e3);
        }
    }
}
