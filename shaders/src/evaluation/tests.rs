//! Programs of one gate each: what a device sends and makes is what the processor does, bit for bit, for words at random and at
//! the edges. Without an adapter (lavapipe will do) these say that they are skipped.

mod bits;
mod functions;
mod linear;
mod positions;
mod residual;
mod rows;
mod series;
mod words;

use tacet_protocol::backend::{Backend, Cpu, Evaluation, Part};
use tacet_protocol::model::decoder::DecoderModel;
use tacet_protocol::plan::DecoderPlanner;
use tacet_protocol::prg::{Prg, SessionKey};
use tacet_protocol::program::{Kind, Op, Program, Value};
use tacet_protocol::ring::pack;
use tacet_protocol::{Error, EvaluatorIo, Role, lock, run};

use super::ALL;
use crate::layers::Layers;
use crate::tests::{full, gpu, noise, set, telling, ways};
use crate::{Gpu, GpuError};

/// Words, ring, and whether they are packed bits.
type Shape = (usize, u32, bool);

/// A peer and a dealer of whom everything is noise, half of it at the edges of rings.
struct Noise<'a> {
    p: &'a Program,
    role: Role,
    backend: &'a dyn Backend,
    next: Box<dyn FnMut() -> u64 + 'a>,
    sent: Vec<Vec<u8>>,
}

impl Noise<'_> {
    fn words(&mut self, n: usize, bits: u32) -> Vec<u64> {
        let top = 1u64 << (bits - 1);
        let edges = [0, 1, top - 1, top, top >> 1, (top >> 1).wrapping_sub(1), u64::MAX, top | top >> 1];
        let next = &mut self.next;
        let mut word = || if next() & 1 == 0 { next() } else { edges[next() as usize % edges.len()] };
        (0..n).map(|_| word()).collect()
    }

    fn packed(&mut self, shapes: Vec<(usize, u32)>) -> Vec<u8> {
        shapes.into_iter().flat_map(|(n, bits)| pack(&self.words(n, bits), bits)).collect()
    }
}

impl EvaluatorIo for Noise<'_> {
    fn dealt(&mut self, step: u32, _: usize) -> Result<Vec<u8>, Error> {
        let drawn = usize::from(self.role != Role::E1);
        let tensors = self.p.ops[step as usize].kind.dealt().into_iter().enumerate();
        let sent =
            tensors.filter(|(slot, _)| (step.count_ones() as usize + slot) % 2 != drawn).map(|(_, t)| t).collect();
        Ok(self.packed(sent))
    }

    fn exchange(&mut self, step: u32, out: Vec<u8>) -> Result<Vec<u8>, Error> {
        self.sent.push(out);
        let shape = |v: &usize| (self.p.values[*v].len(), self.p.values[*v].bits);
        Ok(self.packed(self.p.ops[step as usize].inputs.iter().map(shape).collect()))
    }

    fn backend(&self) -> &dyn Backend {
        self.backend
    }
}

/// A program that opens what the gate reads, and what it makes but for the first, which is the result.
fn program(kind: Kind, inputs: &[Shape], outputs: &[Shape]) -> Program {
    let local = matches!(
        kind,
        Kind::Linear { .. }
            | Kind::Truncate(_)
            | Kind::Gain(_)
            | Kind::RowSum(_)
            | Kind::First { .. }
            | Kind::Last { .. }
            | Kind::Marks { .. }
            | Kind::PadKeys(_)
    );
    let value = |(len, bits, xor): &Shape| Value {
        name: String::new(),
        shape: vec![*len],
        bits: *bits,
        xor: *xor,
        ulp: 1.0,
        bound: 0.0,
    };
    let (n, made) = (inputs.len(), outputs.len());
    let values = [inputs, inputs, outputs, outputs].concat().iter().map(value).collect();
    let ids = |from: usize, n: usize| (from..from + n).collect::<Vec<_>>();
    let op = |kind, inputs, outputs| Op { kind, inputs, outputs };
    let mut ops: Vec<Op> = (0..n).map(|v| op(Kind::Input, vec![], vec![v])).collect();
    ops.push(op(Kind::Open, ids(0, n), ids(n, n)));
    ops.push(op(kind, ids(if local { 0 } else { n }, n), ids(2 * n, made)));
    if made > 1 {
        ops.push(op(Kind::Open, ids(2 * n + 1, made - 1), ids(2 * n + made + 1, made - 1)));
    }
    Program::of(values, ops, ids(0, n), 2 * n)
}

/// What one evaluator sends, and its share.
fn trace(p: &Program, role: Role, seed: u64, backend: &dyn Backend) -> (Vec<Vec<u8>>, Vec<u64>) {
    let mut io = Noise { p, role, backend, next: Box::new(noise(seed)), sent: Vec::new() };
    let prg = Prg::new(&SessionKey::from_seed([seed as u8; 32]));
    let input = p.inputs().map(|v| io.words(p.values[v].len(), p.values[v].bits)).collect();
    let share = run::evaluate(p, role, prg, input, &mut io).unwrap();
    (io.sent, share)
}

/// Compares a gate's program on the device with the processor's, for both evaluators and with all kinds of words.
fn check(gpu: &Gpu, what: &str, kind: Kind, inputs: &[Shape], outputs: &[Shape], seed: u64) {
    let what = format!("{what} of {inputs:?}");
    let p = program(kind, inputs, outputs);
    for role in [Role::E1, Role::E2] {
        let want = trace(&p, role, seed, &Cpu);
        for way in ways(gpu).into_iter().filter(|[_, _, subgroups]| !subgroups) {
            set(gpu, way);
            let on_device = gpu.evaluation(&p, role).unwrap().is_some();
            assert!(on_device, "{what} has no kernel");
            let got = trace(&p, role, seed, gpu);
            for (i, (want, got)) in want.0.iter().zip(&got.0).enumerate() {
                let first = want.iter().zip(got).position(|(a, b)| a != b);
                assert!(
                    first.is_none() && want.len() == got.len(),
                    "{role:?} sends something else in round {i}: {what}"
                );
            }
            if let Some(i) = want.1.iter().zip(&got.1).position(|(a, b)| a != b) {
                panic!("{role:?}, word {i}: {:x} and not {:x}: {what}, {way:?}", got.1[i], want.1[i]);
            }
            assert_eq!(want.1.len(), got.1.len());
        }
    }
}

fn truncation() -> Program {
    let kind = Kind::Truncate(tacet_protocol::gates::local::Truncate { k: 40, shift: 9, raise: false });
    program(kind, &[(100, 40, false)], &[(100, 31, false)])
}

/// What held words is zero when an evaluation is over.
#[test]
fn nothing_of_an_evaluation_stays_on_the_device() {
    let Some(gpu) = gpu() else { return };
    let p = truncation();
    let mut on_device = super::open(&gpu.state, &p, Role::E1).unwrap().unwrap();
    on_device.put(0, Part::Share, &[u64::MAX - 999; 100]).unwrap();
    for (i, segment) in run::segments(&p, Role::E1).iter().enumerate() {
        on_device.run(i, &vec![0x5a; segment.bytes]).unwrap();
    }
    assert!(on_device.get(2, Part::Share).unwrap().iter().any(|w| *w != 0));
    let state = gpu.state();
    assert!(state.layouts.held > 0);
    on_device.clear(&state.device);
    let left: usize = on_device.contents(&state.device).iter().filter(|b| **b != 0).count();
    assert_eq!(left, 0);
    drop(state);
    drop(on_device);
    assert_eq!(gpu.state().layouts.held, 0);
}

/// A device that is lost between two openings: an error, and nothing to send.
#[test]
fn an_evaluation_ends_with_its_device() {
    let Some(gpu) = gpu() else { return };
    let p = truncation();
    let mut on_device = gpu.evaluation(&p, Role::E2).unwrap().unwrap();
    on_device.put(0, Part::Share, &[7; 100]).unwrap();
    gpu.close();
    let fed = vec![0; run::segments(&p, Role::E2)[0].bytes];
    let e = on_device.run(0, &fed).unwrap_err();
    assert!(matches!(&e, Error::Device(t) if t.contains("was lost")), "{e}");
    drop(on_device);
    assert!(gpu.evaluation(&p, Role::E2).is_err());
}

/// Too large for the adapter's bindings: left to the processor, which has the products on the device as before.
#[test]
fn what_does_not_fit_is_left_to_the_processor() {
    let Some(gpu) = gpu() else { return };
    gpu.state().device.room_for_all = 1 << 10;
    assert!(gpu.evaluation(&truncation(), Role::E1).unwrap().is_none());
    // Nor beside as many as there may be.
    gpu.state().layouts.held = ALL;
    gpu.state().device.room_for_all = 1 << 20;
    assert!(gpu.evaluation(&truncation(), Role::E2).unwrap().is_none());
    gpu.state().layouts.held = 0;
    assert!(gpu.evaluation(&truncation(), Role::E2).unwrap().is_some());
}

/// A driver that refuses a kernel is not asked again, and that is said; one without memory is.
#[test]
fn what_a_driver_refuses_is_left_to_the_processor() {
    let Some((gpu, lines)) = gpu().map(telling) else { return };
    gpu.state().device.say(full(&gpu));
    assert!(gpu.evaluation(&truncation(), Role::E1).unwrap().is_none());
    assert!(gpu.evaluation(&truncation(), Role::E1).unwrap().is_some());
    let reason = "not this one".to_string();
    gpu.state().device.say(GpuError::Refused { adapter: gpu.adapter().to_string(), reason });
    for _ in 0..2 {
        assert!(gpu.evaluation(&truncation(), Role::E1).unwrap().is_none());
    }
    let lines = lock(&lines);
    assert!(lines.len() == 2 && lines[0].contains("out of memory") && lines[1].contains("not this one"), "{lines:?}");
}

/// A device with memory for a part of a model's weights: it computes the products of those, and the processor all else; sent is
/// what a processor alone sends.
#[test]
fn programs_whose_weights_do_not_fit() {
    let Some((gpu, lines)) = gpu().map(telling) else { return };
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../protocol/tests/vectors/llama");
    let planner = DecoderPlanner::new(&DecoderModel::load(&dir).unwrap()).unwrap();
    let p = planner.program(true, 0, 32, false).unwrap();
    let layers = p.ops.iter().filter(|op| matches!(op.kind, Kind::Linear { .. })).count();
    gpu.hold(&p).unwrap();
    assert!(lock(&lines).is_empty() && gpu.state().layers.parts().len() == layers);
    assert!(gpu.evaluation(&p, Role::E1).unwrap().is_some());
    let half = gpu.state().layers.held() / 2;
    gpu.state().layers = Layers::new();
    gpu.state().layers.most = half;
    gpu.hold(&p).unwrap();
    let parts = gpu.state().layers.parts();
    assert!(parts.contains(&0) && parts.contains(&1), "{parts:?}");
    assert!(lock(&lines).len() == 1 && lock(&lines)[0].contains(&format!("of {layers} layers")), "{lines:?}");
    assert!(gpu.evaluation(&p, Role::E1).unwrap().is_none());
    for role in [Role::E1, Role::E2] {
        let before = gpu.products();
        assert!(trace(&p, role, 11, &gpu) == trace(&p, role, 11, &Cpu), "{role:?}");
        assert!(gpu.products() > before);
    }
    assert_eq!(lock(&lines).len(), 1);
}
