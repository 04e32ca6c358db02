//! Rates of the gates of one layer, at the dealer and at an evaluator, in elements a second on one thread, and the bytes
//! dealt for an element: `TACET_MODEL_DIR=DIR cargo bench -p tacet-protocol --bench gates`, or with a part of a name
//! behind `--`, such as `exp`. `TACET_TOKENS` is the length, 128 if absent: of a decoder the rows of its first program.
//!
//! Each gate is as the planner made it, in a program with nothing else but a cheap gate on either side, by whose messages it is
//! timed. Expanding the masks of what it reads belongs to the opening and is not counted; unpacking and sharing what is
//! dealt is. An element is a score for the gates of the row maximum and of exp, a row for those that work by rows, an output for
//! others; packed bits count by words of 64.

use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput};
use tacet_protocol::gates::squares::Squares;
use tacet_protocol::model::decoder::DecoderModel;
use tacet_protocol::model::{BertModel, is_encoder};
use tacet_protocol::plan::{DecoderPlanner, Planner};
use tacet_protocol::prg::{Prg, SessionKey};
use tacet_protocol::program::{Kind, Op, Program, Value};
use tacet_protocol::{DealerSink, Error, EvaluatorIo, Role, run};

/// The layer whose gates are timed: the first one's bounds are those of the embedding.
const LAYER: &str = "layer 1: ";

/// Times the step `gate`, whose neighbours send and receive too.
struct Alone {
    program: Program,
    gate: u32,
}

impl Alone {
    /// The operation `gate` between two others that read little, behind one opening of what all three read.
    fn new(mut p: Program, gate: usize) -> Alone {
        let words = |o: &Op| o.inputs.iter().map(|v| p.values[*v].len()).sum::<usize>();
        // With two tensors each evaluator receives one, whatever the step's number.
        let fit = |i: &usize| *i != gate && p.ops[*i].kind.dealt().len() > 1;
        let mut cheap: Vec<usize> = (0..p.ops.len()).filter(fit).collect();
        cheap.sort_by_key(|i| words(&p.ops[*i]));
        let mut all: Vec<Option<Op>> = p.ops.drain(..).map(Some).collect();
        let three = [cheap[0], gate, cheap[1]].map(|i| all[i].take().expect("each is another operation"));
        let mut read: Vec<usize> = three.iter().flat_map(|o| o.inputs.clone()).collect();
        read.sort();
        read.dedup();
        let mut shares = Vec::new();
        for v in &read {
            // A share of ones: marks of no past position and of new ones.
            let (mut none, one, rows) = (p.values[*v].clone(), p.values[*v].clone(), p.values[*v].len());
            none.shape = vec![0];
            p.values.extend([none, one]);
            let [none, one] = [p.values.len() - 2, p.values.len() - 1];
            p.ops.push(Op { kind: Kind::Marks { rows }, inputs: vec![none], outputs: vec![one] });
            shares.push(one);
        }
        p.ops.push(Op { kind: Kind::Open, inputs: shares, outputs: read });
        p.ops.extend(three);
        let gate = p.ops.len() as u32 - 2;
        Alone { program: p, gate }
    }

    fn op(&self) -> &Op {
        &self.program.ops[self.gate as usize]
    }

    fn elements(&self) -> usize {
        let (op, values) = (self.op(), &self.program.values);
        match op.kind {
            Kind::RowMax(_) | Kind::And(_) | Kind::Reached(_) => values[op.inputs[0]].len(),
            Kind::Spline(_) | Kind::Squares(_) => values[op.outputs[0]].shape[0],
            _ => values[op.outputs[0]].len(),
        }
    }

    fn prg(i: u8) -> Prg {
        Prg::new(&SessionKey::from_seed([i; 32]))
    }

    fn deal(&self) -> Sink {
        let (gate, role) = (self.gate, self.role());
        let mut sink = Sink { gate, role, since: Instant::now(), took: Duration::ZERO, dealt: Vec::new() };
        run::deal(&self.program, Self::prg(1), Self::prg(2), &mut sink).expect("dealing");
        sink
    }

    /// An evaluator that receives something for the gate.
    fn role(&self) -> Role {
        if self.program.dealt_len(self.gate as usize)[0] > 0 { Role::E1 } else { Role::E2 }
    }

    fn evaluate(&self, dealt: Vec<Vec<u8>>) -> Duration {
        let (p, role) = (&self.program, self.role());
        let input = p.inputs().map(|v| vec![0; p.values[v].len()]).collect();
        let (gate, dealt) = (self.gate, dealt.into_iter());
        let mut io = Io { gate, dealt, since: Instant::now(), took: Duration::ZERO };
        let share = run::evaluate(p, role, Self::prg(if role == Role::E1 { 1 } else { 2 }), input, &mut io);
        black_box(share.expect("evaluation"));
        io.took
    }
}

struct Sink {
    gate: u32,
    role: Role,
    since: Instant,
    took: Duration,
    dealt: Vec<Vec<u8>>,
}

impl DealerSink for Sink {
    fn send(&mut self, to: Role, step: u32, bytes: Vec<u8>) -> Result<(), Error> {
        if step == self.gate {
            self.took = self.since.elapsed();
        }
        if to == self.role {
            self.dealt.push(bytes);
        }
        if step < self.gate {
            self.since = Instant::now();
        }
        Ok(())
    }
}

struct Io {
    gate: u32,
    dealt: std::vec::IntoIter<Vec<u8>>,
    since: Instant,
    took: Duration,
}

impl EvaluatorIo for Io {
    fn dealt(&mut self, step: u32, _: usize) -> Result<Vec<u8>, Error> {
        if step > self.gate {
            self.took = self.since.elapsed();
        }
        let bytes = self.dealt.next();
        self.since = Instant::now();
        bytes.ok_or_else(|| Error::Transport("nothing dealt".into()))
    }

    fn exchange(&mut self, _: u32, out: Vec<u8>) -> Result<Vec<u8>, Error> {
        // No gate's time depends on values: this evaluator's own opening does for the other's.
        Ok(out)
    }
}

/// The program of a model's directory for a number of tokens, as often as it is asked for.
fn planned(dir: &Path, tokens: usize) -> Result<Box<dyn Fn() -> Program>, Error> {
    if is_encoder(dir) {
        let planner = Planner::new(&BertModel::load(dir)?)?;
        planner.program(tokens)?;
        return Ok(Box::new(move || {
            let mut p = planner.program(tokens).expect("it was planned before");
            add_squares(&mut p);
            p
        }));
    }
    let planner = DecoderPlanner::new(&DecoderModel::load(dir)?)?;
    planner.program(true, 0, tokens, false)?;
    Ok(Box::new(move || planner.program(true, 0, tokens, false).expect("it was planned before")))
}

/// Adds the sums of squares of what the first variance is of, with which decoders of wide ranges begin their norms: an
/// encoder has none.
fn add_squares(p: &mut Program) {
    let variance = p.ops.iter().find(|o| matches!(o.kind, Kind::Variance(_)));
    let Some(x) = variance.map(|o| o.inputs[0]) else { return };
    let Value { bits: k_in, ref shape, .. } = p.values[x];
    let (rows, dim) = (shape[0], shape[1]);
    let sum = Value { name: format!("{LAYER}norm"), shape: vec![rows], bits: 64, ..p.values[x].clone() };
    p.values.push(sum);
    let squares = Squares { rows, dim, shift: vec![0; dim], k_in, k_out: 64 };
    p.ops.push(Op { kind: Kind::Squares(squares), inputs: vec![x], outputs: vec![p.values.len() - 1] });
}

fn main() {
    let Some(dir) = std::env::var_os("TACET_MODEL_DIR") else {
        return println!("skipped: TACET_MODEL_DIR does not name a model's directory");
    };
    let tokens = std::env::var("TACET_TOKENS").map_or(128, |t| t.parse().expect("TACET_TOKENS is a number"));
    let planned = planned(dir.as_ref(), tokens).expect("a model that can be planned for that many tokens");
    let p = planned();
    let mut c = Criterion::default().warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_secs(1));
    c = c.sample_size(20).configure_from_args();
    let mut seen = Vec::new();
    for (i, op) in p.ops.iter().enumerate() {
        let name = |v: usize| p.values[v].name.strip_prefix(LAYER);
        let (Some(name), true) = (name(op.outputs[0]), !op.kind.dealt().is_empty()) else { continue };
        let kind = (op.kind.name(), p.dealt_len(i).iter().sum::<u64>(), p.values[op.outputs[0]].len());
        if seen.contains(&kind) {
            continue;
        }
        seen.push(kind);
        let alone = Alone::new(planned(), i);
        let (elements, dealt) = (alone.elements(), alone.deal().dealt);
        println!("{}, {name}: {elements} elements, {:.2} bytes dealt each", kind.0, kind.1 as f64 / elements as f64);
        let mut g = c.benchmark_group(format!("{}, {name}", kind.0));
        g.throughput(Throughput::Elements(elements as u64));
        g.bench_function("dealer", |b| b.iter_custom(|n| (0..n).map(|_| alone.deal().took).sum()));
        g.bench_function("evaluator", |b| b.iter_custom(|n| (0..n).map(|_| alone.evaluate(dealt.clone())).sum()));
        g.finish();
    }
}
