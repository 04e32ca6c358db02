//! One message of a whole encoder is damaged on its way: the run ends in a wrong answer or a typed error at every role,
//! never in a panic or a hang.
//!
//! Messages are delivered without the checks of a transport, which also compares step numbers: what is tested is that
//! the interpreters alone are safe. The roles are semi-honest, so a wrong answer is the expected outcome of changed words.

#[path = "../../tests/common/tiny.rs"]
#[allow(dead_code)]
mod tiny;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use tacet_protocol::model::BertModel;
use tacet_protocol::plan::Planner;
use tacet_protocol::prg::{Prg, SessionKey};
use tacet_protocol::program::{Kind, Program};
use tacet_protocol::ring::mask;
use tacet_protocol::{DealerSink, Error, EvaluatorIo, Role, run};
use tiny::{Random, Tiny};
use zeroize::Zeroizing;

/// Far longer than any run, so that only a real hang reaches it.
const HANG: Duration = Duration::from_secs(60);

/// The four directions in which messages flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    DealtToE1,
    DealtToE2,
    E1ToE2,
    E2ToE1,
}

const WAYS: [Way; 4] = [Way::DealtToE1, Way::DealtToE2, Way::E1ToE2, Way::E2ToE1];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Harm {
    /// One bit, by its number modulo the message's length.
    Flip(usize),
    /// Every byte.
    Garble,
    /// The last byte is missing.
    Truncate,
    /// A byte too many.
    Extend,
    /// Nothing is left.
    Empty,
    /// This message and the next change places.
    Reorder,
    /// The message comes twice.
    Replay,
    /// The message never comes.
    Drop,
}

/// Which message is damaged, and how.
#[derive(Clone, Copy, Debug)]
struct Tamper {
    way: Way,
    step: u32,
    harm: Harm,
}

/// The end of one direction at its sender, with the interceptor in it.
struct Wire {
    way: Way,
    tamper: Option<Tamper>,
    held: Option<Vec<u8>>,
    out: Sender<Vec<u8>>,
}

impl Wire {
    fn send(&mut self, step: u32, mut bytes: Vec<u8>) -> Result<(), Error> {
        let put = |b| self.out.send(b).map_err(|_| Error::Transport("the other thread ended".into()));
        let Some(t) = self.tamper.filter(|t| (t.way, t.step) == (self.way, step)) else {
            put(bytes)?;
            return self.held.take().map_or(Ok(()), put);
        };
        match t.harm {
            Harm::Flip(bit) => {
                let bit = bit % (bytes.len() * 8);
                bytes[bit / 8] ^= 1 << (bit % 8);
            }
            Harm::Garble => bytes.iter_mut().for_each(|b| *b = !*b),
            Harm::Truncate => bytes.truncate(bytes.len() - 1),
            Harm::Extend => bytes.push(0),
            Harm::Empty => bytes.clear(),
            Harm::Reorder => {
                self.held = Some(bytes);
                return Ok(());
            }
            Harm::Replay => put(bytes.clone())?,
            Harm::Drop => return Ok(()),
        }
        put(bytes)
    }
}

struct Io {
    dealer: Receiver<Vec<u8>>,
    to: Wire,
    from: Receiver<Vec<u8>>,
}

/// An engine that waits for a message that cannot come any more is a hang; so is a peer that never ends.
fn take(from: &Receiver<Vec<u8>>) -> Result<Vec<u8>, Error> {
    from.recv_timeout(HANG).map_err(|e| match e {
        RecvTimeoutError::Timeout => panic!("no message within {HANG:?}"),
        RecvTimeoutError::Disconnected => Error::Transport("the other thread ended".into()),
    })
}

impl EvaluatorIo for Io {
    fn dealt(&mut self, _: u32, _: usize) -> Result<Vec<u8>, Error> {
        take(&self.dealer)
    }

    fn exchange(&mut self, step: u32, out: Vec<u8>) -> Result<Vec<u8>, Error> {
        self.to.send(step, out)?;
        take(&self.from)
    }
}

struct Sink([Wire; 2]);

impl DealerSink for Sink {
    fn send(&mut self, to: Role, step: u32, bytes: Vec<u8>) -> Result<(), Error> {
        self.0[usize::from(to == Role::E2)].send(step, bytes)
    }
}

/// Each evaluator's share of the result, or why it has none. Panics if a role panics or does not end.
fn lane(p: &Arc<Program>, input: &[Zeroizing<Vec<u64>>], tamper: Option<Tamper>) -> [Result<Vec<u64>, Error>; 2] {
    let prg = |i: u8| Prg::new(&SessionKey::from_seed([i; 32]));
    let halves = p.split(input).unwrap();
    let s1 = p.expand(Role::E1, halves.seed.as_slice()).unwrap();
    let s2 = p.expand(Role::E2, &halves.packed).unwrap();
    let wire = |way| {
        let (out, from) = channel();
        (Wire { way, tamper, held: None, out }, from)
    };
    let [(d1, from_d1), (d2, from_d2), (a, from_a), (b, from_b)] = WAYS.map(wire);
    let (report, ended) = channel();
    let spawn = |role: Role, job: Box<dyn FnOnce() -> Result<Vec<u64>, Error> + Send>| {
        let report = report.clone();
        std::thread::spawn(move || {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job));
            report.send((role, result.map_err(|_| ()))).unwrap();
        });
    };
    let program = Arc::clone(p);
    spawn(
        Role::Dealer,
        Box::new(move || {
            let r = run::deal(&program, prg(1), prg(2), &mut Sink([d1, d2]));
            r.map(|()| Vec::new())
        }),
    );
    for (role, key, share, mut io) in [
        (Role::E1, 1, s1, Io { dealer: from_d1, to: a, from: from_b }),
        (Role::E2, 2, s2, Io { dealer: from_d2, to: b, from: from_a }),
    ] {
        let program = Arc::clone(p);
        spawn(role, Box::new(move || run::evaluate(&program, role, prg(key), share, &mut io)));
    }
    let mut results = BTreeMap::new();
    for _ in 0..3 {
        let (role, result) = ended.recv_timeout(2 * HANG).unwrap_or_else(|_| panic!("{tamper:?}: a role does not end"));
        let result = result.unwrap_or_else(|()| panic!("{tamper:?}: {role:?} panicked"));
        results.insert(role as u8, result);
    }
    [Role::E1, Role::E2].map(|r| results.remove(&(r as u8)).unwrap())
}

fn sum(p: &Program, shares: [Result<Vec<u64>, Error>; 2]) -> Result<Vec<u64>, Error> {
    let [a, b] = shares;
    Ok(a?.iter().zip(b?).map(|(a, b)| a.wrapping_add(b) & mask(p.output_bits())).collect())
}

/// Every step with a message, with the name of what it carries: an operation's dealt tensors or its opened result.
fn messages(p: &Program) -> Vec<(Way, u32, String)> {
    let mut maker = vec!["input"; p.values.len()];
    let mut all = Vec::new();
    for (i, op) in p.ops.iter().enumerate() {
        if matches!(op.kind, Kind::Open) {
            let what: BTreeSet<&str> = op.inputs.iter().map(|v| maker[*v]).collect();
            let what = format!("opened {what:?}");
            all.extend([Way::E1ToE2, Way::E2ToE1].map(|w| (w, i as u32, what.clone())));
        }
        op.outputs.iter().for_each(|v| maker[*v] = op.kind.name());
        for (way, len) in [Way::DealtToE1, Way::DealtToE2].into_iter().zip(p.dealt_len(i)) {
            if len > 0 {
                all.push((way, i as u32, format!("dealt {}", op.kind.name())));
            }
        }
    }
    all
}

fn program() -> (Tiny, Arc<Program>, Vec<Zeroizing<Vec<u64>>>) {
    let dir = Tiny::new(2);
    let model = BertModel::load(&dir.dir).unwrap();
    let p = Planner::new(&model).unwrap().program(8).unwrap();
    let input = p.encode_input(&model.embed_tokens(&[1, 2, 3]).unwrap()).unwrap();
    (dir, Arc::new(p), input)
}

#[test]
fn damaged_messages_give_wrong_answers_or_typed_errors() {
    let mut random = Random::new(tiny::seed());
    let (_dir, p, input) = program();
    let right = sum(&p, lane(&p, &input, None)).unwrap();
    let all = messages(&p);
    for op in p.ops.iter().filter(|o| !o.kind.dealt().is_empty()) {
        let dealt = format!("dealt {}", op.kind.name());
        assert!(all.iter().any(|(_, _, what)| *what == dealt), "no {dealt}");
    }
    let mut effective = BTreeSet::new();
    let mut outcomes = BTreeMap::<&str, usize>::new();
    for (way, step, what) in &all {
        for harm in [
            Harm::Flip(random.word() as usize >> 1),
            Harm::Flip(random.word() as usize >> 1),
            Harm::Garble,
            Harm::Truncate,
            Harm::Extend,
            Harm::Empty,
            Harm::Reorder,
            Harm::Replay,
            Harm::Drop,
        ] {
            let got = sum(&p, lane(&p, &input, Some(Tamper { way: *way, step: *step, harm })));
            let at = format!("{what}, {way:?}, step {step}, {harm:?}");
            let outcome = match (harm, got) {
                // A message of another length than its step's can never pass.
                (Harm::Truncate | Harm::Extend | Harm::Empty, Ok(_)) => panic!("{at}: not noticed"),
                (_, Err(Error::Malformed { .. } | Error::Transport(_))) => {
                    effective.extend(matches!(harm, Harm::Flip(_) | Harm::Garble).then_some(what));
                    "error"
                }
                (_, Err(e)) => panic!("{at}: {e}"),
                // A bit of a table entry that nobody looks up may change without a trace, and a histogram may give the same
                // maximum.
                (Harm::Flip(_) | Harm::Garble, Ok(y)) if y == right => "no effect",
                // The second of two equal messages is one too many at the very end.
                (Harm::Replay, Ok(y)) if y == right => "replay after the last",
                (_, Ok(y)) if y == right => panic!("{at}: no effect"),
                (_, Ok(_)) => {
                    effective.insert(what);
                    "wrong answer"
                }
            };
            *outcomes.entry(outcome).or_default() += 1;
        }
    }
    println!("{} messages: {outcomes:?}", all.len());
    // Every kind of message matters: somewhere, changed bits of it were noticed or changed the answer.
    for (_, _, what) in &all {
        assert!(effective.contains(what), "{what} never had an effect");
    }
}
