//! Whole programs on a device: every opening, every dealt byte and the result are those of the processor, with the same
//! generators. Skipped, and said so, without an adapter or a model.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};

use tacet_protocol::backend::{Backend, Cpu};
use tacet_protocol::model::BertModel;
use tacet_protocol::model::decoder::DecoderModel;
use tacet_protocol::plan::{DecoderPlanner, Planner};
use tacet_protocol::prg::{Prg, SessionKey};
use tacet_protocol::program::Program;
use tacet_protocol::run::{self, DealerState, EvaluatorState};
use tacet_protocol::{DealerSink, Error, EvaluatorIo, Role};
use tacet_shaders::{Choice, Gpu};

/// A device for every product, and none where there is none.
fn gpu() -> Option<Gpu> {
    match Gpu::open(Choice::Any) {
        Ok(gpu) => Some(gpu.for_all()),
        Err(e) => {
            println!("skipped: {e}");
            None
        }
    }
}

struct Sink<'a> {
    backend: &'a dyn Backend,
    dealt: [Vec<(u32, Vec<u8>)>; 2],
}

impl DealerSink for Sink<'_> {
    fn send(&mut self, to: Role, step: u32, bytes: Vec<u8>) -> Result<(), Error> {
        self.dealt[usize::from(to == Role::E2)].push((step, bytes));
        Ok(())
    }

    fn backend(&self) -> &dyn Backend {
        self.backend
    }
}

struct Io<'a> {
    backend: &'a dyn Backend,
    dealt: std::slice::Iter<'a, (u32, Vec<u8>)>,
    to: Sender<Vec<u8>>,
    from: Receiver<Vec<u8>>,
    opened: Vec<(u32, Vec<u8>)>,
}

impl EvaluatorIo for Io<'_> {
    fn dealt(&mut self, _: u32, _: usize) -> Result<Vec<u8>, Error> {
        Ok(self.dealt.next().expect("dealt before").1.clone())
    }

    fn exchange(&mut self, step: u32, out: Vec<u8>) -> Result<Vec<u8>, Error> {
        self.opened.push((step, out.clone()));
        let gone = || Error::Transport("the other thread ended".into());
        self.to.send(out).map_err(|_| gone())?;
        self.from.recv().map_err(|_| gone())
    }

    fn backend(&self) -> &dyn Backend {
        self.backend
    }
}

#[derive(Default)]
struct States(DealerState, [EvaluatorState; 2]);

/// All that the three parties made: dealt messages, openings, and shares of the result.
#[derive(PartialEq)]
struct Trace {
    dealt: [Vec<(u32, Vec<u8>)>; 2],
    opened: [Vec<(u32, Vec<u8>)>; 2],
    result: [Vec<u64>; 2],
}

fn trace(p: &Program, seed: u8, states: &mut States, backend: &dyn Backend) -> Trace {
    let prg = |i: u8| Prg::new(&SessionKey::from_seed([seed ^ i << 6; 32]));
    let mut sink = Sink { backend, dealt: [Vec::new(), Vec::new()] };
    let States(dealer, [st1, st2]) = states;
    run::deal_next(p, prg(1), prg(2), dealer, &mut sink).unwrap();
    let input = |i: u64| -> Vec<Vec<u64>> {
        let words = |v: usize| (0..p.values[v].len() as u64).map(|n| (n + i).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40);
        p.inputs().map(|v| words(v).collect()).collect()
    };
    let ((to1, from2), (to2, from1)) = (channel(), channel());
    let io = |i: usize, to, from| Io { backend, dealt: sink.dealt[i].iter(), to, from, opened: Vec::new() };
    let (mut io1, mut io2) = (io(0, to1, from1), io(1, to2, from2));
    let (y1, y2) = std::thread::scope(|s| {
        let e1 = s.spawn(|| run::evaluate_next(p, Role::E1, prg(1), input(1), st1, &mut io1).unwrap());
        let e2 = s.spawn(|| run::evaluate_next(p, Role::E2, prg(2), input(2), st2, &mut io2).unwrap());
        (e1.join().unwrap(), e2.join().unwrap())
    });
    let opened = [io1.opened, io2.opened];
    Trace { dealt: sink.dealt, opened, result: [y1, y2] }
}

fn same(p: &Program, seed: u8, states: &mut [States; 2], gpu: &Gpu, what: &str) {
    let [on_cpu, on_gpu] = states;
    let (want, got) = (trace(p, seed, on_cpu, &Cpu), trace(p, seed, on_gpu, gpu));
    assert!(!want.opened[0].is_empty() && want.result[0].len() == p.output_len());
    for i in 0..2 {
        for (want, got) in want.opened[i].iter().zip(&got.opened[i]) {
            assert!(want == got, "{what}: E{} opens something else at step {}", i + 1, want.0);
        }
    }
    assert!(want == got, "{what}: dealing or results differ");
}

#[test]
fn an_encoder() {
    let Some(dir) = std::env::var_os("TACET_MODEL_DIR").map(PathBuf::from) else {
        println!("skipped: TACET_MODEL_DIR does not name a directory with all-MiniLM-L6-v2");
        return;
    };
    let Some(gpu) = gpu() else { return };
    let planner = Planner::new(&BertModel::load(&dir).unwrap()).unwrap();
    // Few scores have no tables of powers: then the device has the products only.
    for (tokens, whole) in [(8, false), (32, true)] {
        let p = planner.program(tokens).unwrap();
        assert_eq!(gpu.evaluation(&p, Role::E1).unwrap().is_some(), whole, "{tokens} tokens");
        same(&p, 3, &mut Default::default(), &gpu, &format!("{tokens} tokens"));
    }
}

/// A prompt and what follows it: several rows, which the device evaluates like the prompt, and a step, which it does not. Each
/// reads keys and values that the program before it left.
#[test]
fn decoders() {
    let Some(gpu) = gpu() else { return };
    for name in ["llama", "gpt2", "qwen3"] {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../protocol/tests/vectors").join(name);
        let planner = DecoderPlanner::new(&DecoderModel::load(&dir).unwrap()).unwrap();
        let mut states = <[States; 2]>::default();
        for (n, (past, rows, whole)) in [(0, 32, true), (32, 16, true), (48, 1, false)].into_iter().enumerate() {
            let p = planner.program(true, past, rows, false).unwrap();
            assert_eq!(gpu.evaluation(&p, Role::E2).unwrap().is_some(), whole, "{name}, {rows} after {past}");
            same(&p, n as u8, &mut states, &gpu, &format!("{name}, {rows} after {past}"));
        }
    }
}

/// A device that is lost in the middle of a program: the evaluator ends with an error that says so, and nothing more was
/// sent than before the product that failed.
#[test]
fn nothing_is_sent_after_a_device_is_lost() {
    struct Failing(std::sync::atomic::AtomicUsize);
    impl Backend for Failing {
        fn linear(
            &self,
            layer: &std::sync::Arc<tacet_protocol::program::Linear>,
            x: &[u64],
            rows: usize,
            bits: u32,
        ) -> Result<Vec<u64>, Error> {
            match self.0.fetch_sub(1, std::sync::atomic::Ordering::Relaxed) {
                0 => Err(Error::Device("lost".into())),
                _ => Cpu.linear(layer, x, rows, bits),
            }
        }

        fn product(
            &self,
            g: &tacet_protocol::gates::product::HeadProduct,
            pairs: &[(&[u64], &[u64])],
        ) -> Result<Vec<u64>, Error> {
            Cpu.product(g, pairs)
        }
    }
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../protocol/tests/vectors/llama");
    let p = DecoderPlanner::new(&DecoderModel::load(&dir).unwrap()).unwrap().program(true, 0, 8, false).unwrap();
    let prg = |i: u8| Prg::new(&SessionKey::from_seed([i; 32]));
    let mut sink = Sink { backend: &Cpu, dealt: [Vec::new(), Vec::new()] };
    run::deal(&p, prg(1), prg(2), &mut sink).unwrap();
    let linear = |op: &tacet_protocol::program::Op| matches!(op.kind, tacet_protocol::program::Kind::Linear { .. });
    for n in 0..3 {
        let failing = Failing(n.into());
        let ((to, _theirs), (answers, from)) = (channel(), channel());
        // The other's openings, in the clear: zeros.
        for op in p.ops.iter().filter(|o| matches!(o.kind, tacet_protocol::program::Kind::Open)) {
            answers.send(vec![0; p.opening_len(op)]).unwrap();
        }
        let mut io = Io { backend: &failing, dealt: sink.dealt[0].iter(), to, from, opened: Vec::new() };
        let input = p.inputs().map(|v| vec![0; p.values[v].len()]).collect();
        let e = run::evaluate(&p, Role::E1, prg(1), input, &mut io).unwrap_err();
        assert!(matches!(e, Error::Device(_)), "{e}");
        let at = p.ops.iter().enumerate().filter(|(_, o)| linear(o)).nth(n).unwrap().0;
        let opened = p.ops[..at].iter().filter(|o| matches!(o.kind, tacet_protocol::program::Kind::Open)).count();
        assert_eq!(io.opened.len(), opened, "the product at step {at} failed");
    }
}
