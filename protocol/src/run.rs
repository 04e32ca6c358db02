//! The two interpreters that run a [`Program`] jointly: the dealer and the evaluator.
//!
//! The dealer walks the program with masks only; the evaluator with shares and masked values. Both label all randomness
//! with the step, and [`Prg`] refuses a label twice.

use zeroize::{Zeroize, Zeroizing};

use crate::gates::{Deal, Masked, Take};
use crate::gemm::linear;
use crate::prg::Prg;
use crate::program::{Kind, Op, Program};
use crate::ring::{mask, pack, packed_len, unpack};
use crate::{DealerSink, Error, EvaluatorIo, Role};

/// The last step that reads each value.
fn last_use(p: &Program) -> Vec<usize> {
    let mut last = vec![0; p.values.len()];
    for (i, op) in p.ops.iter().enumerate() {
        op.inputs.iter().chain(&op.outputs).for_each(|v| last[*v] = i);
    }
    last
}

fn combine(xor: bool, a: u64, b: u64) -> u64 {
    if xor { a ^ b } else { a.wrapping_add(b) }
}

/// Expands one half of the masks of an opening's values.
fn masks(p: &Program, op: &Op, step: u32, prg: &mut Prg) -> Result<Vec<Vec<u64>>, Error> {
    op.inputs
        .iter()
        .enumerate()
        .map(|(slot, v)| {
            let mut l = vec![0; p.values[*v].len];
            prg.fill(step, slot as u32, p.values[*v].bits, &mut l)?;
            Ok(l)
        })
        .collect()
}

/// Deals a whole program: masks and corrections depend on shapes only, so this may run ahead of the query.
///
/// # Errors
/// Those of the sink, and a reused mask label.
pub fn deal(p: &Program, e1: Prg, e2: Prg, sink: &mut dyn DealerSink) -> Result<(), Error> {
    let mut prg = [e1, e2];
    let last = last_use(p);
    let mut lam: Vec<Vec<u64>> = vec![Vec::new(); p.values.len()];
    for (i, op) in p.ops.iter().enumerate() {
        let step = i as u32;
        if matches!(op.kind, Kind::Open) {
            let [a, b] = &mut prg;
            let (a, b) = (masks(p, op, step, a)?, masks(p, op, step, b)?);
            for ((out, mut a), b) in op.outputs.iter().zip(a).zip(b) {
                let v = &p.values[*out];
                a.iter_mut().zip(b).for_each(|(a, b)| *a = combine(v.xor, *a, b) & mask(v.bits));
                lam[*out] = a;
            }
        }
        let mut d = Deal::new(&mut prg, step);
        let l = |n: usize| lam[op.inputs[n]].as_slice();
        match &op.kind {
            Kind::Rescale(g) => g.deal(&mut d, l(0))?,
            Kind::Product(g) => g.deal(&mut d, l(0), l(1))?,
            Kind::RowMax(g) => g.deal(&mut d, l(0))?,
            Kind::And(g) => g.deal(&mut d, l(0))?,
            Kind::CountClear(g) => g.deal(&mut d, l(0))?,
            Kind::Exp(g) => g.deal(&mut d, l(0), l(1))?,
            Kind::FlagRescale(g) => g.deal(&mut d, l(0), l(1))?,
            Kind::Piecewise(g) => g.deal(&mut d, l(0))?,
            Kind::Select(g) => g.deal(&mut d, l(0), l(1))?,
            Kind::Variance(g) => g.deal(&mut d, l(0))?,
            Kind::Broadcast(g) => g.deal(&mut d, l(0), l(1))?,
            Kind::Cosine(g) => g.deal(&mut d, l(0))?,
            Kind::Input | Kind::Open | Kind::Linear { .. } | Kind::Add | Kind::RowSum { .. } | Kind::Pool { .. } => {}
        }
        let [a, b] = d.out;
        for (role, bytes) in [(Role::E1, a), (Role::E2, b)] {
            if !bytes.is_empty() {
                sink.send(role, step, bytes)?;
            }
        }
        for v in op.inputs.iter().filter(|v| last[**v] == i) {
            lam[*v].zeroize();
        }
    }
    lam.iter_mut().for_each(Zeroize::zeroize);
    Ok(())
}

/// An evaluator's values; wiped when dropped, also on an error.
struct State {
    share: Vec<Vec<u64>>,
    masked: Vec<Masked>,
}

impl State {
    fn wipe(&mut self, v: usize) {
        self.share[v].zeroize();
        self.masked[v].m.zeroize();
        self.masked[v].l.zeroize();
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
/// Those of the transport, messages of a wrong length, a reused mask label.
pub fn evaluate(
    p: &Program,
    role: Role,
    mut prg: Prg,
    input: Vec<u64>,
    io: &mut dyn EvaluatorIo,
) -> Result<Vec<u64>, Error> {
    if input.len() != p.input_len() || role == Role::Dealer {
        return Err(Error::Malformed {
            what: "input share",
            reason: format!("{} words expected, {} given", p.input_len(), input.len()),
        });
    }
    let last = last_use(p);
    let n = p.values.len();
    let mut st = State { share: vec![Vec::new(); n], masked: (0..n).map(|_| Masked::default()).collect() };
    st.share[p.input] = input;
    for (i, op) in p.ops.iter().enumerate() {
        let step = i as u32;
        if matches!(op.kind, Kind::Open) {
            open(p, op, step, &mut prg, &mut st, io)?;
        } else if !matches!(op.kind, Kind::Input) {
            let want = p.dealt_len(i)[crate::gates::index(role)] as usize;
            let msg = Zeroizing::new(if want > 0 { io.dealt(step, want)? } else { Vec::new() });
            if msg.len() != want {
                return Err(Error::Malformed {
                    what: "dealt message",
                    reason: format!("step {step}: {want} bytes expected, {} received", msg.len()),
                });
            }
            let mut t = Take::new(&mut prg, role, step, &msg);
            let out = gate(p, op, &mut t, &st, role)?;
            for (v, o) in op.outputs.iter().zip(out) {
                st.share[*v] = o;
            }
        }
        for v in op.inputs.iter().filter(|v| last[**v] == i) {
            st.wipe(*v);
        }
    }
    Ok(std::mem::take(&mut st.share[p.output]))
}

fn open(p: &Program, op: &Op, step: u32, prg: &mut Prg, st: &mut State, io: &mut dyn EvaluatorIo) -> Result<(), Error> {
    let own = masks(p, op, step, prg)?;
    let mut sent = Vec::with_capacity(op.inputs.len());
    let mut msg = Vec::with_capacity(p.opening_len(op));
    for (v, l) in op.inputs.iter().zip(&own) {
        let (x, f) = (&st.share[*v], &p.values[*v]);
        // A share may live in a wider ring than the one it is opened in: reduction is a homomorphism.
        let m: Vec<u64> = x.iter().zip(l).map(|(x, l)| combine(f.xor, *x, *l) & mask(f.bits)).collect();
        msg.extend_from_slice(&pack(&m, f.bits));
        sent.push(m);
    }
    let len = msg.len();
    let got = io.exchange(step, msg)?;
    if got.len() != len {
        return Err(Error::Malformed {
            what: "opening",
            reason: format!("step {step}: {len} bytes expected, {} received", got.len()),
        });
    }
    let mut rest = got.as_slice();
    for (((v, out), mut m), l) in op.inputs.iter().zip(&op.outputs).zip(sent).zip(own) {
        let f = &p.values[*v];
        let (head, tail) = rest.split_at(packed_len(f.len, f.bits));
        rest = tail;
        let theirs = unpack(head, f.len, f.bits)?;
        m.iter_mut().zip(theirs).for_each(|(a, b)| *a = combine(f.xor, *a, b) & mask(f.bits));
        st.masked[*out] = Masked { m, l };
    }
    Ok(())
}

fn gate(p: &Program, op: &Op, t: &mut Take, st: &State, role: Role) -> Result<Vec<Vec<u64>>, Error> {
    let m = |n: usize| &st.masked[op.inputs[n]];
    let s = |n: usize| st.share[op.inputs[n]].as_slice();
    let bits = p.values[op.outputs[0]].bits;
    let mk = mask(bits);
    let one = |v: Vec<u64>| Ok(vec![v]);
    let two = |(a, b): (Vec<u64>, Vec<u64>)| Ok(vec![a, b]);
    match &op.kind {
        Kind::Rescale(g) => one(g.eval(t, m(0))?),
        Kind::Product(g) => one(g.eval(t, m(0), m(1))?),
        Kind::RowMax(g) => one(g.eval(t, m(0))?),
        Kind::And(g) => one(g.eval(t, m(0))?),
        Kind::CountClear(g) => one(g.eval(t, m(0))?),
        Kind::Exp(g) => two(g.eval(t, m(0), m(1))?),
        Kind::FlagRescale(g) => one(g.eval(t, m(0), m(1))?),
        Kind::Piecewise(g) => two(g.eval(t, m(0))?),
        Kind::Select(g) => one(g.eval(t, m(0), m(1))?),
        Kind::Variance(g) => one(g.eval(t, m(0))?),
        Kind::Broadcast(g) => one(g.eval(t, m(0), m(1))?),
        Kind::Cosine(g) => one(g.eval(t, m(0))?),
        Kind::Linear { rows, layer } => {
            let mut out = vec![0; p.values[op.outputs[0]].len];
            linear(s(0), *rows, &layer.weights, bits, &mut out);
            if role == Role::E1 {
                for row in out.chunks_exact_mut(layer.bias.len()) {
                    row.iter_mut().zip(&layer.bias).for_each(|(o, b)| *o = o.wrapping_add(*b as u64) & mk);
                }
            }
            one(out)
        }
        Kind::Add => one(s(0).iter().zip(s(1)).map(|(a, b)| a.wrapping_add(*b) & mk).collect()),
        Kind::RowSum { cols } => {
            one(s(0).chunks_exact(*cols).map(|r| r.iter().fold(0u64, |a, b| a.wrapping_add(*b)) & mk).collect())
        }
        Kind::Pool { cols, mean } => {
            let mut out = s(0)[..*cols].to_vec();
            if *mean {
                for row in s(0).chunks_exact(*cols).skip(1) {
                    out.iter_mut().zip(row).for_each(|(o, v)| *o = o.wrapping_add(*v) & mk);
                }
            }
            one(out)
        }
        Kind::Input | Kind::Open => Ok(Vec::new()),
    }
}
