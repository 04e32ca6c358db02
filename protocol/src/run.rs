//! The two interpreters that run a [`Program`] jointly: the dealer and the evaluator.
//!
//! The dealer walks the program with masks only; the evaluator with shares and masked values. Both label all randomness
//! with the step, and [`Prg`] refuses a label twice.
//!
//! With threads of the backend's, a dealer deals several operations at once, and an evaluator, whose operations wait for one
//! another, makes a large one in parts. Every message and share is that of one thread.

mod dealing;
mod device;

use std::sync::Arc;

use zeroize::Zeroize;

use crate::backend::Backend;
use crate::gates::parts::Parts;
use crate::gates::{Deal, Halves, Masked, Take};
use crate::prg::{Prg, StepPrg, Words};
use crate::program::{Kind, Op, Program, Value};
use crate::ring::{check_packed, mask, pack_to, packed_len, unpack_to};
use crate::vector::{self, Kernel};
use crate::wipe::{Wiped, append, wipe};
use crate::{DealerSink, Error, EvaluatorIo, Role};

use dealing::Masks;
use device::Held;
pub use device::{Segment, Source, segments};

/// Words that are added to others at a time, a multiple of eight.
const BLOCK: usize = 1024;

/// Adds the second half of the masks of a value that is opened.
fn add_masks(v: &Value, mut drawn: Words, to: &mut [u64]) {
    let mut half = Wiped::new(vec![0; BLOCK.min(to.len())]);
    for to in to.chunks_mut(BLOCK) {
        let half = &mut half[..to.len()];
        drawn.next(half);
        vector::run(Combine { to, with: half, xor: v.xor, keep: mask(v.bits) });
    }
}

/// Adds packed words, of which as many are there.
fn add_packed(v: &Value, bytes: &[u8], to: &mut [u64]) {
    let mut words = vec![0; BLOCK.min(to.len())];
    for (to, bytes) in to.chunks_mut(BLOCK).zip(bytes.chunks(BLOCK / 8 * v.bits as usize)) {
        let words = &mut words[..to.len()];
        unpack_to(bytes, v.bits, words);
        vector::run(Combine { to, with: words, xor: v.xor, keep: mask(v.bits) });
    }
}

/// Wipes all words past the first `keep` of `held` positions.
fn cut(words: &mut Vec<u64>, held: usize, keep: usize) {
    let len = words.len() / held * keep;
    words[len..].zeroize();
    words.truncate(len);
}

/// What a dealer keeps between the programs of one session: masks of what the evaluators keep. Wiped when dropped.
#[derive(Default)]
pub struct DealerState {
    positions: usize,
    kept: Vec<Vec<u64>>,
}

impl DealerState {
    /// Forgets and wipes what belongs to positions past the first `keep`; nothing if there are fewer.
    pub fn cut(&mut self, keep: usize) {
        if keep < self.positions {
            self.kept.iter_mut().for_each(|l| cut(l, self.positions, keep));
            self.positions = keep;
        }
    }
}

impl Drop for DealerState {
    fn drop(&mut self) {
        self.kept.iter_mut().for_each(wipe);
    }
}

/// What an evaluator keeps between the programs of one session. Wiped when dropped.
#[derive(Default)]
pub struct EvaluatorState {
    positions: usize,
    kept: Vec<(Vec<u64>, Masked)>,
}

impl EvaluatorState {
    /// Positions of which keys and values are kept.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Forgets and wipes what belongs to positions past the first `keep`; nothing if there are fewer.
    pub fn cut(&mut self, keep: usize) {
        if keep < self.positions {
            for (share, masked) in &mut self.kept {
                [share, &mut masked.m, &mut masked.l].into_iter().for_each(|w| cut(w, self.positions, keep));
            }
            self.positions = keep;
        }
    }
}

impl Drop for EvaluatorState {
    fn drop(&mut self) {
        for (share, masked) in &mut self.kept {
            wipe(share);
            masked.wipe();
        }
    }
}

fn not_the_state(p: &Program, held: usize) -> Error {
    let reason = format!("{held} positions are kept, but the program comes after {}", p.past);
    Error::Malformed { what: "session state", reason }
}

/// Deals a whole program: masks and corrections depend on shapes only, so this may run ahead of the query.
///
/// # Errors
/// Those of the sink and its backend, and a reused mask label.
pub fn deal(p: &Program, e1: Prg, e2: Prg, sink: &mut dyn DealerSink) -> Result<(), Error> {
    deal_next(p, e1, e2, &mut DealerState::default(), sink)
}

/// As [`deal`], for a program that goes on where the one before it in the session ended. The generators are fresh ones:
/// each program of a session has keys of its own.
///
/// # Errors
/// Those of [`deal`], and a state that is not the one the program starts from; the state is then empty.
pub fn deal_next(
    p: &Program,
    e1: Prg,
    e2: Prg,
    state: &mut DealerState,
    sink: &mut dyn DealerSink,
) -> Result<(), Error> {
    let mut held = std::mem::take(state);
    // A share that is kept has no mask.
    let fits = |v: usize, l: &Vec<u64>| l.is_empty() || l.len() == p.values[v].len();
    let all = held.positions == p.past && held.kept.len() == p.carried[0].len();
    if !all || p.carried[0].iter().zip(&held.kept).any(|(v, l)| !fits(*v, l)) {
        return Err(not_the_state(p, held.positions));
    }
    let mut masks: Vec<Option<Arc<Masks>>> = vec![None; p.values.len()];
    for (v, l) in p.carried[0].iter().zip(&mut held.kept) {
        masks[*v] = Some(Arc::new(Masks::whole(std::mem::take(l))));
    }
    let mut masks = dealing::deal_all(p, [e1, e2], masks, sink)?;
    let kept = |v: &usize| match masks[*v].take().map(Arc::try_unwrap) {
        None => Vec::new(),
        Some(Ok(mut alone)) => alone.sum.take(),
        Some(Err(shared)) => shared.sum.to_vec(),
    };
    let kept = p.carried[1].iter().map(kept).collect();
    *state = DealerState { positions: p.past + p.tokens, kept };
    Ok(())
}

/// Deals what an operation needs, from the masks of what it reads.
fn deal_gate(op: &Op, d: &mut Deal, masks: &[Option<Arc<Masks>>], backend: &dyn Backend) -> Result<(), Error> {
    let l = |n: usize| dealing::sum(&masks[n]);
    let halves = |n: usize| Halves { sum: l(n), first: masks[n].as_ref().map_or(&[][..], |m| &m.first) };
    match &op.kind {
        Kind::Rescale(g) => g.deal(d, halves(0)),
        Kind::Residual(g) => g.deal(d, halves(0), halves(1)),
        Kind::Product(g) => g.deal(d, l(0), l(1), backend),
        Kind::RowMax(g) => g.deal(d, l(0)),
        Kind::And(g) => g.deal(d, l(0)),
        Kind::CountClear(g) => g.deal(d, l(0)),
        Kind::Exp(g) => g.deal(d, l(0), l(1)),
        Kind::FlagRescale(g) => g.deal(d, halves(0), l(1)),
        Kind::Spline(g) => g.deal(d, l(0)),
        Kind::Variance(g) => g.deal(d, l(0)),
        Kind::Squares(g) => g.deal(d, l(0)),
        Kind::Broadcast(g) => g.deal(d, halves(0), l(1)),
        Kind::Cosine(g) => g.deal(d, l(0)),
        Kind::Tails(g) => g.deal(d, l(0)),
        Kind::Join(g) => g.deal(d, halves(0), halves(1), l(2), l(3)),
        Kind::Turn(g) => g.deal(d, l(0), l(1)),
        Kind::Rotate(g) => g.deal(d, halves(0)),
        Kind::Hadamard(g) => g.deal(d, l(0), l(1)),
        Kind::Reached(g) => g.deal(d, l(0)),
        Kind::Input
        | Kind::Open
        | Kind::Linear { .. }
        | Kind::Truncate(_)
        | Kind::Gain(_)
        | Kind::RowSum(_)
        | Kind::First { .. }
        | Kind::Last { .. }
        | Kind::Append
        | Kind::Marks { .. }
        | Kind::PadKeys(_) => Ok(()),
    }
}

/// An evaluator's values. Shares and halves of masks are wiped after their last use, also on an error. What both evaluators
/// know is not: masked values, the words that the other sent of them, and what the dealer sent, which is a value less a half
/// that the other evaluator draws. Each is uniform to whoever lacks masks and keys, and those are gone.
struct State {
    share: Vec<Vec<u64>>,
    masked: Vec<Masked>,
}

impl State {
    fn wipe(&mut self, v: usize) {
        wipe(&mut self.share[v]);
        wipe(&mut self.masked[v].l);
        self.masked[v].m = Vec::new();
    }
}

impl Drop for State {
    fn drop(&mut self) {
        (0..self.share.len()).for_each(|v| self.wipe(v));
    }
}

/// Evaluates a program on this evaluator's share of the input; returns its share of the result.
///
/// # Errors
/// Those of the transport and the backend, messages of a wrong length, a reused mask label.
pub fn evaluate(
    p: &Program,
    role: Role,
    prg: Prg,
    input: Vec<Vec<u64>>,
    io: &mut dyn EvaluatorIo,
) -> Result<Vec<u64>, Error> {
    evaluate_next(p, role, prg, input, &mut EvaluatorState::default(), io)
}

/// As [`evaluate`], for a program that goes on where the one before it in the session ended.
///
/// # Errors
/// Those of [`evaluate`], and a state that is not the one the program starts from; the state is then empty.
pub fn evaluate_next(
    p: &Program,
    role: Role,
    mut prg: Prg,
    input: Vec<Vec<u64>>,
    state: &mut EvaluatorState,
    io: &mut dyn EvaluatorIo,
) -> Result<Vec<u64>, Error> {
    let (last, parts) = (p.last_use(), Parts::new(io.backend().threads()));
    let n = p.values.len();
    let mut st = State { share: vec![Vec::new(); n], masked: (0..n).map(|_| Masked::default()).collect() };
    let fits = input.iter().map(Vec::len).eq(p.inputs().map(|v| p.values[v].len()));
    for (v, words) in p.inputs().zip(input) {
        st.share[v] = words;
    }
    if !fits || role == Role::Dealer {
        return Err(Error::Malformed { what: "input share", reason: "not the program's inputs".into() });
    }
    let mut held = std::mem::take(state);
    let fits = |v: usize, k: &(Vec<u64>, Masked)| k.0.len().max(k.1.m.len()) == p.values[v].len();
    let all = held.positions == p.past && held.kept.len() == p.carried[0].len();
    if !all || p.carried[0].iter().zip(&held.kept).any(|(v, k)| !fits(*v, k)) {
        return Err(not_the_state(p, held.positions));
    }
    for (v, kept) in p.carried[0].iter().zip(&mut held.kept) {
        (st.share[*v], st.masked[*v]) = std::mem::take(kept);
    }
    let device = io.backend().evaluation(p, role)?;
    if let Some(mut device) = device {
        let start = p.inputs().chain(p.carried[0].iter().copied());
        let start = start.map(|v| {
            let held = Held { share: std::mem::take(&mut st.share[v]), masked: std::mem::take(&mut st.masked[v]) };
            (v, held)
        });
        let (output, kept) = device::evaluate(p, role, prg, start.collect(), &mut *device, io)?;
        let kept =
            kept.into_iter().map(|mut h| (std::mem::take(&mut h.share), std::mem::take(&mut h.masked))).collect();
        *state = EvaluatorState { positions: p.past + p.tokens, kept };
        return Ok(output);
    }
    for (i, op) in p.ops.iter().enumerate() {
        let step = i as u32;
        let prg = prg.step(step)?;
        if matches!(op.kind, Kind::Open) {
            open(p, op, prg, &mut st, io, &last, &parts)?;
        } else if matches!(op.kind, Kind::Append) {
            let [a, b] = [0, 1].map(|n| op.inputs[n]);
            let mut grown = if last[a] == i {
                std::mem::take(&mut st.masked[a])
            } else {
                Masked { m: st.masked[a].m.clone(), l: st.masked[a].l.clone() }
            };
            append(&mut grown.m, &st.masked[b].m);
            append(&mut grown.l, &st.masked[b].l);
            st.masked[op.outputs[0]] = grown;
        } else if let Kind::Truncate(g) = &op.kind {
            let x = &mut st.share[op.inputs[0]];
            let mut y = if last[op.inputs[0]] == i { std::mem::take(x) } else { x.clone() };
            let len = y.len();
            parts.divide((len, len), [&mut y], |at| [at], |_, [y]| g.apply(y, role == Role::E1));
            st.share[op.outputs[0]] = y;
        } else if !matches!(op.kind, Kind::Input) {
            let msg = dealt(p, i, role, io)?;
            let mut t = Take::new(prg, role, &msg).by(parts.clone());
            let out = gate(p, op, &mut t, &st, role, io.backend(), &parts)?;
            for (v, o) in op.outputs.iter().zip(out) {
                st.share[*v] = o;
            }
        }
        for v in op.inputs.iter().filter(|v| last[**v] == i) {
            st.wipe(*v);
        }
    }
    let kept = |v: &usize| (std::mem::take(&mut st.share[*v]), std::mem::take(&mut st.masked[*v]));
    let kept = p.carried[1].iter().map(kept).collect();
    *state = EvaluatorState { positions: p.past + p.tokens, kept };
    Ok(std::mem::take(&mut st.share[p.output]))
}

/// The dealer's message for a step, as long as it must be.
fn dealt(p: &Program, step: usize, role: Role, io: &mut dyn EvaluatorIo) -> Result<Vec<u8>, Error> {
    let want = p.dealt_len(step)[crate::gates::index(role)] as usize;
    let msg = if want > 0 { io.dealt(step as u32, want)? } else { Vec::new() };
    if msg.len() == want {
        return Ok(msg);
    }
    let reason = format!("step {step}: {want} bytes expected, {} received", msg.len());
    Err(Error::Malformed { what: "dealt message", reason })
}

/// The other evaluator's opening for this one's, of the same length.
fn exchange(step: u32, message: Vec<u8>, io: &mut dyn EvaluatorIo) -> Result<Vec<u8>, Error> {
    let len = message.len();
    let got = io.exchange(step, message)?;
    if got.len() == len {
        return Ok(got);
    }
    let reason = format!("step {step}: {len} bytes expected, {} received", got.len());
    Err(Error::Malformed { what: "opening", reason })
}

fn open(
    p: &Program,
    op: &Op,
    mut prg: StepPrg,
    st: &mut State,
    io: &mut dyn EvaluatorIo,
    last: &[usize],
    parts: &Parts,
) -> Result<(), Error> {
    let step = prg.step();
    // Words of a part, which are whole blocks and so begin at a byte of the message.
    let each = |len: usize| parts.units(len.div_ceil(BLOCK), len) * BLOCK;
    let mut own = Vec::with_capacity(op.inputs.len());
    let mut sent = Vec::with_capacity(op.inputs.len());
    let mut msg = vec![0; p.opening_len(op)];
    let mut rest = msg.as_mut_slice();
    for (slot, v) in op.inputs.iter().enumerate() {
        let f = &p.values[*v];
        let drawn = prg.words(slot as u32, f.bits)?;
        let mut l = Wiped::new(vec![0; f.len()]);
        // What is read for the last time becomes the masked value where it lies.
        let mut m = if last[*v] == step as usize { std::mem::take(&mut st.share[*v]) } else { st.share[*v].clone() };
        let head;
        (head, rest) = rest.split_at_mut(packed_len(f.len(), f.bits));
        let (each, bytes) = (each(f.len()), |words: usize| words / 8 * f.bits as usize);
        let words = m.chunks_mut(each).zip(l.chunks_mut(each));
        parts.each(words.zip(head.chunks_mut(bytes(each))).enumerate().collect(), |(i, ((m, l), head))| {
            let mut drawn = drawn.from(i * each);
            let words = m.chunks_mut(BLOCK).zip(l.chunks_mut(BLOCK));
            for ((m, l), head) in words.zip(head.chunks_mut(bytes(BLOCK))) {
                drawn.next(l);
                // A share may live in a wider ring than the one it is opened in: reduction is a homomorphism.
                vector::run(Combine { to: m, with: l, xor: f.xor, keep: mask(f.bits) });
                pack_to(m, f.bits, head);
            }
        });
        own.push(l);
        sent.push(m);
    }
    let got = exchange(step, msg, io)?;
    let mut rest = got.as_slice();
    for (((v, out), mut m), mut l) in op.inputs.iter().zip(&op.outputs).zip(sent).zip(own) {
        let f = &p.values[*v];
        let (head, tail) = rest.split_at(packed_len(f.len(), f.bits));
        rest = tail;
        check_packed(head, m.len(), f.bits)?;
        let (each, bytes) = (each(m.len()), |words: usize| words / 8 * f.bits as usize);
        parts.each(m.chunks_mut(each).zip(head.chunks(bytes(each))).collect(), |(m, head)| add_packed(f, head, m));
        st.masked[*out] = Masked { m, l: l.take() };
    }
    Ok(())
}

/// Adds words in their ring, or bits.
struct Combine<'a> {
    to: &'a mut [u64],
    with: &'a [u64],
    xor: bool,
    keep: u64,
}

impl Kernel for Combine<'_> {
    #[inline(always)]
    fn run(self) {
        let keep = self.keep;
        let pairs = self.to.iter_mut().zip(self.with);
        if self.xor {
            pairs.for_each(|(a, b)| *a = (*a ^ b) & keep);
        } else {
            pairs.for_each(|(a, b)| *a = a.wrapping_add(*b) & keep);
        }
    }
}

fn gate(
    p: &Program,
    op: &Op,
    t: &mut Take,
    st: &State,
    role: Role,
    backend: &dyn Backend,
    parts: &Parts,
) -> Result<Vec<Vec<u64>>, Error> {
    let m = |n: usize| &st.masked[op.inputs[n]];
    let s = |n: usize| st.share[op.inputs[n]].as_slice();
    let bits = p.values[op.outputs[0]].bits;
    let mk = mask(bits);
    let one = |v: Vec<u64>| Ok(vec![v]);
    let two = |(a, b): (Vec<u64>, Vec<u64>)| Ok(vec![a, b]);
    match &op.kind {
        Kind::Rescale(g) => one(g.eval(t, m(0))?),
        Kind::Residual(g) => two(g.eval(t, m(0), m(1))?),
        Kind::Product(g) => one(g.eval(t, m(0), m(1), backend)?),
        Kind::RowMax(g) => one(g.eval(t, m(0))?),
        Kind::And(g) => one(g.eval(t, m(0))?),
        Kind::CountClear(g) => one(g.eval(t, m(0))?),
        Kind::Exp(g) => two(g.eval(t, m(0), m(1))?),
        Kind::FlagRescale(g) => one(g.eval(t, m(0), m(1))?),
        Kind::Spline(g) => one(g.eval(t, &m(0).m)?),
        Kind::Variance(g) => one(g.eval(t, m(0))?),
        Kind::Squares(g) => one(g.eval(t, m(0))?),
        Kind::Broadcast(g) => one(g.eval(t, m(0), m(1))?),
        Kind::Cosine(g) => one(g.eval(t, m(0))?),
        Kind::Tails(g) => two(g.eval(t, m(0))?),
        Kind::Join(g) => one(g.eval(t, m(0), m(1), m(2), m(3))?),
        Kind::Linear { rows, layer } => {
            let mut out = backend.linear(layer, s(0), *rows, bits)?;
            if role == Role::E1 {
                for row in out.chunks_exact_mut(layer.bias.len()) {
                    row.iter_mut().zip(&layer.bias).for_each(|(o, b)| *o = o.wrapping_add(*b as u64) & mk);
                }
            }
            one(out)
        }
        Kind::Gain(g) => one(g.eval(s(0), role == Role::E1, parts)),
        Kind::RowSum(grid) => {
            let sum = |(_, row): (usize, &[u64])| row.iter().fold(0u64, |a, b| a.wrapping_add(*b)) & mk;
            one(s(0).chunks_exact(grid.len()).flat_map(|head| grid.split(head).map(sum)).collect())
        }
        Kind::First { cols } => one(s(0)[..*cols].to_vec()),
        Kind::Last { cols } => one(s(0)[s(0).len() - cols..].to_vec()),
        Kind::Marks { rows } => one(match op.inputs.len() {
            1 => [s(0), &vec![u64::from(role == Role::E1); *rows]].concat(),
            _ => [s(0), s(1)].concat(),
        }),
        Kind::Turn(g) => one(g.eval(t, m(0), m(1))?),
        Kind::Rotate(g) => one(g.eval(t, m(0))?),
        Kind::Hadamard(g) => one(g.eval(t, m(0), m(1))?),
        Kind::Reached(g) => one(g.eval(t, m(0))?),
        Kind::PadKeys(g) => one(g.eval(role == Role::E1, s(0), s(1))),
        Kind::Input | Kind::Open | Kind::Append | Kind::Truncate(_) => Ok(Vec::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemm::Threads;
    use crate::prg::SessionKey;
    use crate::program::{Id, Outcome};
    use crate::ring::pack;

    /// Another evaluator that opens the same words each time.
    struct Other<'a>(&'a Program, Vec<u8>);

    impl EvaluatorIo for Other<'_> {
        fn dealt(&mut self, _: u32, _: usize) -> Result<Vec<u8>, Error> {
            Err(Error::Transport("nothing is dealt".into()))
        }

        fn exchange(&mut self, _: u32, out: Vec<u8>) -> Result<Vec<u8>, Error> {
            self.1 = out;
            let words =
                |v: &Id| (0..self.0.values[*v].len() as u64).map(|i| i.wrapping_mul(0x9e37_79b9)).collect::<Vec<_>>();
            Ok(self.0.ops[0].inputs.iter().flat_map(|v| pack(&words(v), self.0.values[*v].bits)).collect())
        }
    }

    #[test]
    fn openings_are_the_same_in_parts() {
        let shapes =
            [(5000, 13, false), (3, 64, true), (2048, 1, false), (8191, 33, true), (0, 9, false), (1025, 64, false)];
        let value = |(len, bits, xor)| Value { name: String::new(), shape: vec![len], bits, xor, ulp: 1.0, bound: 0.0 };
        let n = shapes.len();
        let p = Program {
            values: [shapes, shapes].concat().into_iter().map(value).collect(),
            ops: vec![Op { kind: Kind::Open, inputs: (0..n).collect(), outputs: (n..2 * n).collect() }],
            past: 0,
            tokens: 1,
            inputs: (0..n).collect(),
            output: 0,
            carried: [vec![], vec![]],
            result: Outcome::Logits,
            digest: [0; 32],
        };
        let opened = |parts: &Parts, last: usize| {
            let words = |v: &Value| (0..v.len() as u64).map(|i| i.wrapping_mul(0xbf58_476d_1ce4_e5b9)).collect();
            let share = p.values[..n].iter().map(words).chain(vec![vec![]; n]).collect();
            let mut st = State { share, masked: (0..2 * n).map(|_| Masked::default()).collect() };
            let mut io = Other(&p, Vec::new());
            let prg = Prg::new(&SessionKey::from_seed([7; 32])).step(0).unwrap();
            open(&p, &p.ops[0], prg, &mut st, &mut io, &vec![last; 2 * n], parts).unwrap();
            let kept = st.share.clone();
            (std::mem::take(&mut io.1), st.masked.iter().map(|m| (m.m.clone(), m.l.clone())).collect::<Vec<_>>(), kept)
        };
        for last in [0, 1] {
            let want = opened(&Parts::new(None), last);
            assert!(want == opened(&Parts::least(Threads::new(3).unwrap()), last));
            // As one that draws all first.
            let mut prg = Prg::new(&SessionKey::from_seed([7; 32]));
            for (v, (_, l)) in want.1[n..].iter().enumerate() {
                let mut drawn = vec![0; p.values[v].len()];
                prg.fill(0, v as u32, p.values[v].bits, &mut drawn).unwrap();
                assert!(*l == drawn);
            }
        }
    }

    #[test]
    fn states_forget_whole_positions_of_everything_they_keep() {
        let words: Vec<u64> = (0..12).collect();
        let masked = || Masked { m: words.clone(), l: words.clone() };
        let mut e =
            EvaluatorState { positions: 6, kept: vec![(words[..6].to_vec(), Masked::default()), (vec![], masked())] };
        let mut d = DealerState { positions: 6, kept: vec![vec![], words.clone()] };
        for keep in [9, 6, 4, 5] {
            e.cut(keep);
            d.cut(keep);
        }
        assert_eq!((e.positions(), d.positions), (4, 4));
        assert_eq!((&e.kept[0].0[..], &e.kept[1].1.m[..], &e.kept[1].1.l[..]), (&words[..4], &words[..8], &words[..8]));
        assert!(e.kept[0].1.m.is_empty() && d.kept[0].is_empty() && d.kept[1] == words[..8]);
    }
}
