//! CPU time of every kind of operation, at the dealer and at an evaluator, in one process without a network:
//! `cargo bench -p tacet-party --bench interpreters -- --model DIR --tokens 128`.
//!
//! The time is what the thread had of a processor, so that it is meaningful while others share the machine.
//!
//! With `--threads 1,2`, in place of that: how long the dealer and either evaluator takes by so many threads, each party alone, by
//! the clock on the wall. The numbers of threads take turns; medians, and the shortest.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use tacet_party::clock::processor;
use tacet_protocol::backend::{Backend, Cpu};
use tacet_protocol::gemm::Threads;
use tacet_protocol::model::BertModel;
use tacet_protocol::plan::Planner;
use tacet_protocol::prg::{Prg, SessionKey};
use tacet_protocol::program::Program;
use tacet_protocol::{DealerSink, Error, EvaluatorIo, Role, run};

/// Attributes time to operations by when they ask for something.
struct Clock<'a> {
    program: &'a Program,
    since: Duration,
    step: usize,
    spent: BTreeMap<&'static str, Duration>,
}

impl<'a> Clock<'a> {
    fn new(program: &'a Program) -> Self {
        Clock { program, since: processor(), step: 0, spent: BTreeMap::new() }
    }

    /// Ends what ran since the last call; it belonged to `step`.
    fn end(&mut self, step: usize) {
        let now = processor();
        *self.spent.entry(self.program.ops[step].kind.name()).or_default() += now - self.since;
        self.since = now;
        self.step = step;
    }
}

struct Sink<'a> {
    clock: Clock<'a>,
    dealt: [Vec<Vec<u8>>; 2],
}

impl DealerSink for Sink<'_> {
    fn send(&mut self, to: Role, step: u32, bytes: Vec<u8>) -> Result<(), Error> {
        self.clock.end(step as usize);
        self.dealt[usize::from(to == Role::E2)].push(bytes);
        Ok(())
    }
}

struct Io<'a> {
    clock: Clock<'a>,
    dealt: std::vec::IntoIter<Vec<u8>>,
    to: Sender<Vec<u8>>,
    from: Receiver<Vec<u8>>,
}

impl EvaluatorIo for Io<'_> {
    fn dealt(&mut self, step: u32, _: usize) -> Result<Vec<u8>, Error> {
        self.clock.end(self.clock.step);
        self.clock.step = step as usize;
        self.dealt.next().ok_or_else(|| Error::Transport("nothing dealt".into()))
    }

    fn exchange(&mut self, step: u32, out: Vec<u8>) -> Result<Vec<u8>, Error> {
        self.clock.end(self.clock.step);
        self.clock.step = step as usize;
        let gone = |_| Error::Transport("gone".into());
        self.to.send(out).map_err(gone)?;
        self.from.recv().map_err(|_| Error::Transport("gone".into()))
    }
}

fn show(who: &str, spent: &BTreeMap<&'static str, Duration>) {
    let mut all: Vec<_> = spent.iter().collect();
    all.sort_by_key(|(_, time)| std::cmp::Reverse(**time));
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    println!("{who}: {:.0} ms", ms(spent.values().sum()));
    for (name, time) in all.into_iter().filter(|(_, time)| ms(**time) > 0.5) {
        println!("  {name:16} {:7.1} ms", ms(*time));
    }
}

/// A dealer that nobody waits for.
struct Kept<'a> {
    backend: &'a dyn Backend,
    dealt: [Vec<Vec<u8>>; 2],
}

impl DealerSink for Kept<'_> {
    fn send(&mut self, to: Role, _: u32, bytes: Vec<u8>) -> Result<(), Error> {
        self.dealt[usize::from(to == Role::E2)].push(bytes);
        Ok(())
    }

    fn backend(&self) -> &dyn Backend {
        self.backend
    }
}

/// An evaluator that waits for nobody: the other's openings are zero.
struct Alone<'a> {
    backend: &'a dyn Backend,
    dealt: std::vec::IntoIter<Vec<u8>>,
}

impl EvaluatorIo for Alone<'_> {
    fn dealt(&mut self, _: u32, _: usize) -> Result<Vec<u8>, Error> {
        self.dealt.next().ok_or_else(|| Error::Transport("nothing dealt".into()))
    }

    fn exchange(&mut self, _: u32, out: Vec<u8>) -> Result<Vec<u8>, Error> {
        Ok(vec![0; out.len()])
    }

    fn backend(&self) -> &dyn Backend {
        self.backend
    }
}

/// Times by which each number of threads is measured.
const TRIES: usize = 15;

fn alone(p: &Program, counts: &[usize]) {
    let backend = |n: &usize| -> Box<dyn Backend> {
        if *n == 1 { Box::new(Cpu) } else { Box::new(Threads::new(*n).expect("threads")) }
    };
    let backends: Vec<_> = counts.iter().map(backend).collect();
    let mut took = vec![[const { Vec::new() }; 3]; counts.len()];
    // The first try of each finds fresh memory and cold weights.
    for _ in 0..=TRIES {
        for (backend, took) in backends.iter().zip(&mut took) {
            let mut sink = Kept { backend: &**backend, dealt: [Vec::new(), Vec::new()] };
            let start = Instant::now();
            run::deal(p, prg(1), prg(2), &mut sink).expect("dealing");
            took[0].push(start.elapsed());
            for ((role, dealt), took) in [Role::E1, Role::E2].into_iter().zip(sink.dealt).zip(&mut took[1..]) {
                let input: Vec<Vec<u64>> = p.inputs().map(|v| vec![0; p.values[v].len()]).collect();
                let mut io = Alone { backend: &**backend, dealt: dealt.into_iter() };
                let start = Instant::now();
                run::evaluate(p, role, prg(1 + u8::from(role == Role::E2)), input, &mut io).expect("evaluation");
                took.push(start.elapsed());
            }
        }
    }
    for (n, took) in counts.iter().zip(&mut took) {
        let of = |took: &mut Vec<Duration>| {
            took.remove(0);
            took.sort();
            format!("{:4.0} ms ({:.0})", took[took.len() / 2].as_secs_f64() * 1e3, took[0].as_secs_f64() * 1e3)
        };
        let [dealer, e1, e2] = took.each_mut().map(of);
        println!("{n:3} threads: dealer {dealer}, E1 {e1}, E2 {e2}");
    }
}

fn prg(i: u8) -> Prg {
    Prg::new(&SessionKey::from_seed([i; 32]))
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let value = |name: &str| args.iter().position(|a| a == name).and_then(|i| args.get(i + 1)).cloned();
    let Some(dir) = value("--model").or_else(|| std::env::var("TACET_MODEL_DIR").ok()) else {
        println!("skipped: neither --model nor TACET_MODEL_DIR names a model's directory");
        return;
    };
    let tokens = value("--tokens").map_or(128, |t| t.parse().expect("--tokens takes a number"));
    let planner = Planner::new(&BertModel::load(dir.as_ref()).expect("a model")).expect("a plan");
    let p = planner.program(tokens).expect("a program");
    if let Some(counts) = value("--threads") {
        let counts = counts.split(',').map(|n| n.parse().expect("--threads takes numbers"));
        return alone(&p, &counts.collect::<Vec<_>>());
    }
    for _ in 0..2 {
        let mut sink = Sink { clock: Clock::new(&p), dealt: [Vec::new(), Vec::new()] };
        run::deal(&p, prg(1), prg(2), &mut sink).expect("dealing");
        show("dealer", &sink.clock.spent);
        let ((to1, from2), (to2, from1)) = (channel(), channel());
        let [d1, d2] = sink.dealt;
        let evaluate = |role, prg, dealt: Vec<Vec<u8>>, to, from| {
            let input: Vec<Vec<u64>> = p.inputs().map(|v| vec![0; p.values[v].len()]).collect();
            let mut io = Io { clock: Clock::new(&p), dealt: dealt.into_iter(), to, from };
            run::evaluate(&p, role, prg, input, &mut io).expect("evaluation");
            io.clock.spent
        };
        let (a, b) = std::thread::scope(|s| {
            let other = s.spawn(|| evaluate(Role::E2, prg(2), d2, to2, from2));
            (evaluate(Role::E1, prg(1), d1, to1, from1), other.join().expect("evaluation"))
        });
        show("E1", &a);
        show("E2", &b);
    }
}
