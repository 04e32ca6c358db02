//! The dealer's walk through a program, which deals several operations at once where the backend has threads for it.
//!
//! What is dealt of an operation depends on the masks of what it reads, and masks come from the keystream: no operation waits
//! for what another one deals. The walk goes through the steps in order, on the caller's thread. It takes every step's
//! generators, moves masks about and sends the messages, in the order of the steps too; jobs in between expand one value's
//! masks, or deal one operation. Products are left to the backend, whose they are: the walk waits for them. With one thread a job
//! is done where it is begun.
//!
//! Bound on memory: as many operations as [`Walk::most`] says are begun and not sent, and their messages take at most
//! [`MOST_BYTES`], or are those of a single operation; masks are expanded for no more operations beyond. They are wiped when the
//! last job that reads them is done, or is dropped.
//!
//! What runs beside what, and when, is decided by shapes and by how long jobs take, of which each one's work depends on shapes
//! alone.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use super::{add_masks, deal_gate};
use crate::backend::{Backend, Cpu};
use crate::gates::Deal;
use crate::gemm::Threads;
use crate::prg::{Prg, StepPrg};
use crate::program::{Id, Kind, Op, Program};
use crate::wipe::{Wiped, append};
use crate::{DealerSink, Error, Role};

/// Bytes of messages that wait for one another.
const MOST_BYTES: u64 = 256 << 20;

/// Operations begun and not sent, for each thread: some wait for those before them.
const EACH: usize = 4;

/// The masks of a value: both halves added, and E1's where an operation needs it. Wiped when dropped.
pub(super) struct Masks {
    pub sum: Wiped<u64>,
    pub first: Wiped<u64>,
}

impl Masks {
    /// Of which no half is needed.
    pub fn whole(sum: Vec<u64>) -> Masks {
        Masks { sum: Wiped::new(sum), first: Wiped::new(Vec::new()) }
    }
}

/// Both halves added, of a value that has masks.
pub(super) fn sum(masks: &Option<Arc<Masks>>) -> &[u64] {
    masks.as_ref().map_or(&[], |m| &m.sum)
}

enum Made {
    Masks(Id, Masks),
    Messages(u32, [Wiped<u8>; 2]),
}

type Reported = Result<Made, Error>;

/// Tells the walk what a job made, when it is dropped: also where the job panics, so that the walk does not wait for it.
struct Report {
    to: Sender<Reported>,
    made: Reported,
}

impl Report {
    fn end(mut self, made: Reported) {
        self.made = made;
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        let _ = self.to.send(std::mem::replace(&mut self.made, Err(panicked())));
    }
}

fn panicked() -> Error {
    Error::Device("a thread of the dealer panicked".into())
}

type Job<'p> = Box<dyn FnOnce() + Send + 'p>;

/// Deals all of a program, from the masks of values that are there at its start; returns those there at its end.
pub(super) fn deal_all(
    p: &Program,
    prg: [Prg; 2],
    masks: Vec<Option<Arc<Masks>>>,
    sink: &mut dyn DealerSink,
) -> Result<Vec<Option<Arc<Masks>>>, Error> {
    let by_halves = by_halves(p)?;
    let threads = sink.backend().threads();
    let most = threads.as_ref().map_or(1, |t| EACH * t.count());
    let mut walk = Walk {
        p,
        by_halves,
        expected: vec![false; p.values.len()],
        masks,
        sink,
        threads: threads.clone(),
        most,
        reports: channel(),
        begun: 0,
        unsent: VecDeque::new(),
        bytes: 0,
    };
    match threads {
        None => walk.run(prg, &|job| job())?,
        Some(t) => t.scope(|s| walk.run(prg, &|job| s.spawn(move |_| job())))?,
    }
    Ok(walk.masks)
}

/// Which values' masks are needed by halves. None that another program left, of which a dealer keeps the sums.
fn by_halves(p: &Program) -> Result<Vec<bool>, Error> {
    let mut all = vec![false; p.values.len()];
    for op in &p.ops {
        op.inputs[..op.kind.by_halves()].iter().for_each(|v| all[*v] = true);
    }
    match p.carried[0].iter().find(|v| all[**v]) {
        None => Ok(all),
        Some(v) => {
            let reason = "a value of the program before is read by halves of its mask".into();
            Err(Error::Plan { op: p.values[*v].name.clone(), reason })
        }
    }
}

/// An operation begun, whose messages have not been sent.
struct Unsent {
    step: u32,
    bytes: u64,
    messages: Option<[Wiped<u8>; 2]>,
}

struct Walk<'w, 'p> {
    p: &'p Program,
    by_halves: Vec<bool>,
    /// Of every value, from when they have been expanded until nothing is begun any more that reads them.
    masks: Vec<Option<Arc<Masks>>>,
    /// Values whose masks a job expands.
    expected: Vec<bool>,
    sink: &'w mut dyn DealerSink,
    threads: Option<Threads>,
    /// Operations that are begun and not sent, and by how many steps masks are ahead.
    most: usize,
    reports: (Sender<Reported>, Receiver<Reported>),
    /// Jobs that have not reported.
    begun: usize,
    /// In the order of their steps, and the bytes of their messages.
    unsent: VecDeque<Unsent>,
    bytes: u64,
}

impl<'p> Walk<'_, 'p> {
    fn run(&mut self, mut prg: [Prg; 2], spawn: &dyn Fn(Job<'p>)) -> Result<(), Error> {
        let (p, last) = (self.p, self.p.last_use());
        // Generators of the steps from the present one on.
        let mut ahead = VecDeque::new();
        for (i, op) in p.ops.iter().enumerate() {
            while ahead.len() < self.most && i + ahead.len() < p.ops.len() {
                let step = i + ahead.len();
                let [a, b] = &mut prg;
                let mut both = [a.step(step as u32)?, b.step(step as u32)?];
                if matches!(p.ops[step].kind, Kind::Open) {
                    self.expand(&p.ops[step], &mut both, spawn)?;
                }
                ahead.push_back(both);
            }
            let both = ahead.pop_front().ok_or(Error::MaskReuse { step: i as u32, slot: 0 })?;
            let len = p.dealt_len(i);
            if matches!(op.kind, Kind::Append) {
                self.append(op, last[op.inputs[0]] == i)?;
            } else if len != [0, 0] {
                self.deal(op, both, len, spawn)?;
            }
            for v in op.inputs.iter().filter(|v| last[**v] == i) {
                self.masks[*v] = None;
            }
        }
        while self.begun > 0 {
            self.wait()?;
        }
        Ok(())
    }

    /// Begins to expand the masks of what is opened.
    fn expand(&mut self, op: &'p Op, prg: &mut [StepPrg; 2], spawn: &dyn Fn(Job<'p>)) -> Result<(), Error> {
        for (slot, out) in op.outputs.iter().enumerate() {
            let v = &self.p.values[*out];
            let [a, b] = prg;
            let (mut first, second) = (a.words(slot as u32, v.bits)?, b.words(slot as u32, v.bits)?);
            let by_halves = self.by_halves[*out];
            self.expected[*out] = true;
            let expanded = move || {
                let mut sum = Wiped::new(vec![0; v.len()]);
                first.next(&mut sum);
                let first = Wiped::new(if by_halves { sum.to_vec() } else { Vec::new() });
                add_masks(v, second, &mut sum);
                Ok(Made::Masks(*out, Masks { sum, first }))
            };
            self.begin(expanded, spawn)?;
        }
        Ok(())
    }

    /// Deals an operation, or begins to.
    fn deal(&mut self, op: &'p Op, prg: [StepPrg; 2], len: [u64; 2], spawn: &dyn Fn(Job<'p>)) -> Result<(), Error> {
        let (step, bytes) = (prg[0].step(), len[0] + len[1]);
        self.wait_for(op)?;
        while self.unsent.len() >= self.most || !self.unsent.is_empty() && self.bytes + bytes > MOST_BYTES {
            self.wait()?;
        }
        let inputs: Vec<Option<Arc<Masks>>> = op.inputs.iter().map(|v| self.masks[*v].clone()).collect();
        let dealt = move |backend: &dyn Backend| {
            let mut d = Deal::new(prg, len);
            deal_gate(op, &mut d, &inputs, backend)?;
            Ok(Made::Messages(step, d.end().map(Wiped::new)))
        };
        self.unsent.push_back(Unsent { step, bytes, messages: None });
        self.bytes += bytes;
        if matches!(op.kind, Kind::Product(_)) {
            let made = dealt(self.sink.backend())?;
            return self.take(made);
        }
        let threads = self.threads.clone();
        self.begin(move || dealt(threads.as_ref().map_or(&Cpu, |t| t)), spawn)
    }

    /// The rows of one masked tensor after those of another; the first grows where it lies if nothing else reads it.
    fn append(&mut self, op: &Op, last: bool) -> Result<(), Error> {
        self.wait_for(op)?;
        let [a, b] = [0, 1].map(|n| op.inputs[n]);
        let first = if last { self.masks[a].take() } else { self.masks[a].clone() };
        let mut grown = match first.map(Arc::try_unwrap) {
            None => Masks::whole(Vec::new()),
            Some(Ok(alone)) => alone,
            Some(Err(shared)) => Masks::whole(shared.sum.to_vec()),
        };
        append(&mut grown.sum, sum(&self.masks[b]));
        self.masks[op.outputs[0]] = Some(Arc::new(grown));
        Ok(())
    }

    fn begin(&mut self, job: impl FnOnce() -> Reported + Send + 'p, spawn: &dyn Fn(Job<'p>)) -> Result<(), Error> {
        let report = Report { to: self.reports.0.clone(), made: Err(panicked()) };
        self.begun += 1;
        spawn(Box::new(move || report.end(job())));
        while let Ok(made) = self.reports.1.try_recv() {
            self.ended(made)?;
        }
        Ok(())
    }

    /// Waits until the masks of what an operation reads are there.
    fn wait_for(&mut self, op: &Op) -> Result<(), Error> {
        while op.inputs.iter().any(|v| self.expected[*v]) {
            self.wait()?;
        }
        Ok(())
    }

    /// Waits for a job's report, of which there is one to come.
    fn wait(&mut self) -> Result<(), Error> {
        let made = self.reports.1.recv().map_err(|_| panicked())?;
        self.ended(made)
    }

    fn ended(&mut self, made: Reported) -> Result<(), Error> {
        self.begun -= 1;
        self.take(made?)
    }

    /// Keeps masks; sends messages if those of all steps before have been sent.
    fn take(&mut self, made: Made) -> Result<(), Error> {
        match made {
            Made::Masks(v, masks) => {
                self.expected[v] = false;
                self.masks[v] = Some(Arc::new(masks));
            }
            Made::Messages(step, both) => {
                if let Some(u) = self.unsent.iter_mut().find(|u| u.step == step) {
                    u.messages = Some(both);
                }
            }
        }
        while let Some(Unsent { step, bytes, messages: Some(both) }) = self.unsent.front_mut() {
            let (step, bytes) = (*step, *bytes);
            for (role, message) in [Role::E1, Role::E2].into_iter().zip(both) {
                if !message.is_empty() {
                    self.sink.send(role, step, message.take())?;
                }
            }
            self.bytes -= bytes;
            self.unsent.pop_front();
        }
        Ok(())
    }
}
