//! A dealer and an evaluator by several threads: the messages and shares are those of one.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use tacet_protocol::backend::{Backend, Cpu};
use tacet_protocol::gemm::Threads;
use tacet_protocol::model::decoder::DecoderModel;
use tacet_protocol::plan::DecoderPlanner;
use tacet_protocol::prg::{Prg, SessionKey};
use tacet_protocol::program::Program;
use tacet_protocol::run::{self, DealerState, EvaluatorState};
use tacet_protocol::{DealerSink, Error, EvaluatorIo, Role};

/// A dealer's messages.
type Sent = Vec<(Role, u32, Vec<u8>)>;

/// Programs of one sequence: a prompt, long enough that its largest gates are divided, and what comes after it.
fn programs(name: &str) -> Vec<Program> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors").join(name);
    let planner = DecoderPlanner::new(&DecoderModel::load(&dir).unwrap()).unwrap();
    let program = |(past, rows)| planner.program(true, past, rows, false).unwrap();
    [(0, 60), (60, 1), (61, 3)].into_iter().map(program).collect()
}

fn prg(role: u8, n: usize) -> Prg {
    Prg::new(&SessionKey::from_seed([role + 2 * n as u8; 32]))
}

#[derive(Default)]
struct Sink<'a> {
    backend: Option<&'a dyn Backend>,
    sent: Sent,
    /// Messages that it takes, if not all.
    most: Option<usize>,
}

impl DealerSink for Sink<'_> {
    fn send(&mut self, to: Role, step: u32, bytes: Vec<u8>) -> Result<(), Error> {
        if self.most == Some(self.sent.len()) {
            return Err(Error::Transport("gone".into()));
        }
        self.sent.push((to, step, bytes));
        Ok(())
    }

    fn backend(&self) -> &dyn Backend {
        self.backend.unwrap_or(&Cpu)
    }
}

fn dealt(programs: &[Program], backend: &dyn Backend) -> Vec<Sent> {
    let mut state = DealerState::default();
    let deal = |(n, p): (usize, &Program)| {
        let mut sink = Sink { backend: Some(backend), ..Sink::default() };
        run::deal_next(p, prg(1, n), prg(2, n), &mut state, &mut sink).unwrap();
        sink.sent
    };
    programs.iter().enumerate().map(deal).collect()
}

#[test]
fn dealers_send_the_same_in_the_same_order() {
    for name in ["llama", "gpt2", "qwen3"] {
        let programs = programs(name);
        let want = dealt(&programs, &Cpu);
        assert!(want.iter().all(|sent| sent.is_sorted_by_key(|(_, step, _)| *step)));
        for threads in [1, 2, 3, 7] {
            let got = dealt(&programs, &Threads::new(threads).unwrap());
            for (n, (want, got)) in want.iter().zip(&got).enumerate() {
                let differs = want.iter().zip(got).find(|(a, b)| a != b).map(|(a, _)| a.1);
                assert!(want == got, "{name}, program {n}, {threads} threads: step {differs:?}");
            }
        }
    }
}

/// An evaluator alone: the other's openings are zero.
struct Alone<'a> {
    backend: &'a dyn Backend,
    dealt: std::vec::IntoIter<Vec<u8>>,
    opened: Vec<Vec<u8>>,
}

impl EvaluatorIo for Alone<'_> {
    fn dealt(&mut self, _: u32, _: usize) -> Result<Vec<u8>, Error> {
        self.dealt.next().ok_or_else(|| Error::Transport("nothing dealt".into()))
    }

    fn exchange(&mut self, _: u32, out: Vec<u8>) -> Result<Vec<u8>, Error> {
        let theirs = vec![0; out.len()];
        self.opened.push(out);
        Ok(theirs)
    }

    fn backend(&self) -> &dyn Backend {
        self.backend
    }
}

/// What an evaluator opens in each program, and its share of the result.
fn evaluated(programs: &[Program], role: Role, dealt: &[Sent], backend: &dyn Backend) -> Vec<(Vec<Vec<u8>>, Vec<u64>)> {
    let mut state = EvaluatorState::default();
    let evaluate = |(n, (p, sent)): (usize, (&Program, &Sent))| {
        let own: Vec<Vec<u8>> = sent.iter().filter(|(to, ..)| *to == role).map(|(.., bytes)| bytes.clone()).collect();
        let input = p.inputs().map(|v| (0..p.values[v].len() as u64).map(|i| (i * 0x9e37) & 0xffff).collect());
        let mut io = Alone { backend, dealt: own.into_iter(), opened: Vec::new() };
        let prg = prg(if role == Role::E1 { 1 } else { 2 }, n);
        let share = run::evaluate_next(p, role, prg, input.collect(), &mut state, &mut io).unwrap();
        (io.opened, share)
    };
    programs.iter().zip(dealt).enumerate().map(evaluate).collect()
}

#[test]
fn evaluators_open_the_same_and_end_with_the_same_share() {
    for name in ["llama", "gpt2", "qwen3"] {
        let programs = programs(name);
        let dealt = dealt(&programs, &Cpu);
        for role in [Role::E1, Role::E2] {
            let want = evaluated(&programs, role, &dealt, &Cpu);
            for threads in [1, 2, 5] {
                let got = evaluated(&programs, role, &dealt, &Threads::new(threads).unwrap());
                assert!(want == got, "{name}, {role:?}, {threads} threads");
            }
        }
    }
}

#[test]
fn a_sink_that_fails_ends_the_dealing() {
    let p = &programs("gpt2")[0];
    let threads = Threads::new(3).unwrap();
    for most in [0, 1, 20] {
        let mut sink = Sink { backend: Some(&threads), most: Some(most), ..Sink::default() };
        let e = run::deal(p, prg(1, 0), prg(2, 0), &mut sink).unwrap_err();
        assert!(matches!(e, Error::Transport(_)) && sink.sent.len() == most, "{e}");
    }
}

/// Threads beside a device: products are the device's, and where it fails the dealing ends.
#[test]
fn products_stay_with_the_backend() {
    struct Device(Threads, AtomicUsize);
    impl Backend for Device {
        fn linear(
            &self,
            layer: &std::sync::Arc<tacet_protocol::program::Linear>,
            x: &[u64],
            rows: usize,
            bits: u32,
        ) -> Result<Vec<u64>, Error> {
            Cpu.linear(layer, x, rows, bits)
        }

        fn product(
            &self,
            g: &tacet_protocol::gates::product::HeadProduct,
            pairs: &[(&[u64], &[u64])],
        ) -> Result<Vec<u64>, Error> {
            let left = self.1.fetch_update(Relaxed, Relaxed, |n| n.checked_sub(1));
            left.map_err(|_| Error::Device("lost".into()))?;
            Cpu.product(g, pairs)
        }

        fn threads(&self) -> Option<Threads> {
            Some(self.0.clone())
        }
    }
    let programs = programs("gpt2");
    let products = |p: &Program| p.describe().iter().filter(|op| op.op == "product").count();
    let device = Device(Threads::new(2).unwrap(), programs.iter().map(products).sum::<usize>().into());
    assert!(dealt(&programs, &device) == dealt(&programs, &Cpu));
    assert_eq!(device.1.into_inner(), 0);
    let device = Device(device.0, 1.into());
    let mut sink = Sink { backend: Some(&device), ..Sink::default() };
    let e = run::deal(&programs[0], prg(1, 0), prg(2, 0), &mut sink).unwrap_err();
    assert!(matches!(e, Error::Device(_)), "{e}");
}
