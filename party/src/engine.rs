//! Between streams and the protocol's interpreters: each run has a thread of its own, fed through channels.
//!
//! An engine takes dealt steps from a channel and cannot tell whether they were dealt ahead or are on their way. Dropping
//! a future of this module closes its channels: the thread ends at its next message, and gives its place back only then.
//! Every party sends before it receives in each round, so a pair of evaluators cannot wait for one another.
//!
//! Bound on memory: a stream and its engine hold at most `limits.buffer_mb` between them, or one message if that is larger.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use quinn::{RecvStream, SendStream};
use tacet_protocol::backend::Backend;
use tacet_protocol::prg::Prg;
use tacet_protocol::program::{Kind, Program};
use tacet_protocol::ring::pack;
use tacet_protocol::run::{DealerState, EvaluatorState};
use tacet_protocol::wipe::Wiped;
use tacet_protocol::wire::{CONTROL_LIMIT, DealerTime, EvaluatorTime, Message, Next};
use tacet_protocol::{DealerSink, Error, EvaluatorIo, Role, run};
use tacet_transport::{receive, receive_step, send, send_step};
use tokio::runtime::Handle;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot, watch};

use crate::clock::{micros, processor, timed};
use crate::compute::Compute;
use crate::fail::{Fail, code, fail};
use crate::flow::{Held, Permit, Room, channel};

/// A session's place among those that run here, held until both the session and its thread have ended.
pub type Place = Option<Arc<OwnedSemaphorePermit>>;

/// Steps with the payload lengths that one evaluator receives for them.
pub fn dealt_steps(p: &Program, role: Role) -> Vec<(u32, usize)> {
    let side = usize::from(role == Role::E2);
    (0..p.ops.len()).map(|i| (i as u32, p.dealt_len(i)[side] as usize)).filter(|s| s.1 > 0).collect()
}

fn openings(p: &Program) -> Vec<(u32, usize)> {
    let opens = p.ops.iter().enumerate().filter(|(_, o)| matches!(o.kind, Kind::Open));
    opens.map(|(i, o)| (i as u32, p.opening_len(o))).collect()
}

fn ended() -> Error {
    Error::Transport("the session ended".into())
}

/// Where a received message finds its room.
pub enum Space {
    /// Set aside beforehand, a permit a step.
    Reserved(Vec<Permit>),
    /// Shared, and waited for.
    Shared(Room),
}

/// Receives the expected steps in order and hands them on; to the end also where nobody takes them any more, so that
/// what follows on the stream is found.
pub async fn collect(
    stream: &mut RecvStream,
    steps: Vec<(u32, usize)>,
    space: Space,
    to: UnboundedSender<Held>,
) -> Result<(), Fail> {
    let (mut reserved, shared) = match space {
        Space::Reserved(p) => (p.into_iter(), None),
        Space::Shared(r) => (Vec::new().into_iter(), Some(r)),
    };
    for (step, len) in steps {
        let permit = match &shared {
            Some(r) => r.wait(len).await,
            None => reserved.next().ok_or_else(|| fail(code::PROTOCOL, "a step without room"))?,
        };
        let bytes = receive_step(stream, step, len).await?;
        let _ = to.send(Held { step, bytes, permit });
    }
    Ok(())
}

/// What a dealer sends.
enum Dealing {
    /// Of a sequence: the program whose steps follow, and what those before it took.
    Next(Announced, DealerTime),
    Step(Held),
}

/// Sends what a dealer makes; a message's room is free again once the stream has taken it. Programs that the evaluators no
/// longer wait for are dropped, unless they have been announced.
async fn forward(mut rx: UnboundedReceiver<Dealing>, stream: &mut SendStream, asked: &AtomicU32) -> Result<(), Fail> {
    let mut wanted = true;
    while let Some(d) = rx.recv().await {
        match d {
            Dealing::Next(n, so_far) => {
                wanted = n.asked == asked.load(Ordering::Acquire);
                if wanted {
                    send(stream, &Message::Announce { next: n.next, so_far }).await?;
                }
            }
            Dealing::Step(_) if !wanted => {}
            Dealing::Step(Held { step, bytes, permit }) => {
                send_step(stream, step, bytes).await?;
                drop(permit);
            }
        }
    }
    Ok(())
}

async fn result<T>(done: oneshot::Receiver<Result<T, Error>>) -> Result<T, Fail> {
    Ok(done.await.map_err(|_| fail(code::PROTOCOL, "the engine stopped"))??)
}

/// Runs `work` on a thread of its own, to whose end nothing is tied.
pub fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), Fail> {
    let thread = std::thread::Builder::new().name(name.into()).spawn(work);
    thread.map(drop).map_err(|e| fail(code::PROTOCOL, format!("no thread: {e}")))
}

struct Io {
    backend: Arc<dyn Backend>,
    dealt: UnboundedReceiver<Held>,
    out: mpsc::Sender<(u32, Vec<u8>)>,
    back: UnboundedReceiver<Held>,
    rounds: u32,
    opened: u64,
    received: u64,
    /// For the dealer and for the other evaluator.
    waited: [Duration; 2],
}

fn next(from: &mut UnboundedReceiver<Held>) -> Result<Vec<u8>, Error> {
    from.blocking_recv().map(|mut h| h.bytes.take()).ok_or_else(ended)
}

impl EvaluatorIo for Io {
    fn dealt(&mut self, _: u32, len: usize) -> Result<Vec<u8>, Error> {
        self.received += len as u64;
        timed(&mut self.waited[0], || next(&mut self.dealt))
    }

    fn exchange(&mut self, step: u32, out: Vec<u8>) -> Result<Vec<u8>, Error> {
        self.rounds += 1;
        self.opened += out.len() as u64;
        self.out.blocking_send((step, out)).map_err(|_| ended())?;
        timed(&mut self.waited[1], || next(&mut self.back))
    }

    fn backend(&self) -> &dyn Backend {
        &*self.backend
    }
}

/// What an evaluator starts from.
pub struct Evaluation {
    pub plan: Arc<Program>,
    /// Of a sequence: what the other evaluator has to be at too.
    pub next: Option<Next>,
    pub role: Role,
    /// Generator of this evaluator's masks, common with the dealer.
    pub prg: Prg,
    /// Its share of the input.
    pub input: Vec<Vec<u64>>,
    /// What the program before this one in the session left.
    pub state: EvaluatorState,
    /// The dealer's steps.
    pub dealt: UnboundedReceiver<Held>,
    /// Bound on openings that wait.
    pub room: Room,
    pub place: Place,
    pub compute: Arc<Compute>,
}

/// An evaluator's share of the result, and what it counted.
pub struct Evaluated {
    pub share: Vec<u8>,
    pub rounds: u32,
    pub opened: u64,
    pub dealt: u64,
    /// Without the time online, which began before.
    pub time: EvaluatorTime,
    pub state: EvaluatorState,
}

/// Evaluates with the other evaluator at the end of `peer`.
pub async fn evaluate(e: Evaluation, peer: (&mut SendStream, &mut RecvStream)) -> Result<Evaluated, Fail> {
    let openings = openings(&e.plan);
    // One opening at most: the engine waits for the other's before it makes the next.
    let ((out_tx, mut out_rx), (back_tx, back), (done_tx, done)) = (mpsc::channel(1), channel(), oneshot::channel());
    let Evaluation { plan, next, role, prg, input, mut state, dealt, room, place, compute } = e;
    spawn("evaluator", move || {
        let evaluated = compute.backend().and_then(|backend| {
            let started = Instant::now();
            let waited = [Duration::ZERO; 2];
            let mut io = Io { backend, dealt, out: out_tx, back, rounds: 0, opened: 0, received: 0, waited };
            state.cut(plan.past());
            let share = Wiped::new(run::evaluate_next(&plan, role, prg, input, &mut state, &mut io)?);
            let share = pack(&share, plan.output_bits());
            let [dealer, peer] = io.waited;
            let computing = micros(started.elapsed().saturating_sub(dealer + peer));
            let (dealer, peer) = (micros(dealer), micros(peer));
            let time = EvaluatorTime { online: 0, computing, processor: micros(processor()), dealer, peer };
            Ok(Evaluated { share, rounds: io.rounds, opened: io.opened, dealt: io.received, time, state })
        });
        drop(place);
        let _ = done_tx.send(evaluated);
    })?;
    let (tx, rx) = peer;
    let sent = async {
        if let Some(next) = next {
            send(tx, &Message::Next(next)).await?;
        }
        while let Some((step, bytes)) = out_rx.recv().await {
            send_step(tx, step, Wiped::new(bytes)).await?;
        }
        Ok(())
    };
    let received = async {
        if let Some(next) = next {
            agreed(next, receive(rx, CONTROL_LIMIT).await?)?;
        }
        collect(rx, openings, Space::Shared(room), back_tx).await
    };
    let (evaluated, ..) = tokio::try_join!(result(done), sent, received)?;
    Ok(evaluated)
}

/// Whether the other evaluator is at the same program.
fn agreed(ours: Next, theirs: Message) -> Result<(), Fail> {
    let text = match theirs {
        Message::Next(n) if n == ours => return Ok(()),
        Message::Next(n) => format!(
            "the other evaluator is at program {} ({} rows after {}), this one at {} ({} after {})",
            n.number, n.rows, n.past, ours.number, ours.rows, ours.past
        ),
        m => format!("{m:?} from the other evaluator in place of its program's number"),
    };
    Err(fail(code::PROTOCOL, text))
}

/// When a dealing ahead may go on: while no session runs here, or once a session waits for this very bundle.
pub struct Pace {
    pub sessions: watch::Receiver<usize>,
    pub handed: watch::Receiver<bool>,
}

impl Pace {
    async fn turn(&mut self) {
        tokio::select! {
            _ = self.sessions.wait_for(|n| *n == 0) => {}
            _ = self.handed.wait_for(|h| *h) => {}
        }
    }
}

struct Sink {
    backend: Arc<dyn Backend>,
    to: [UnboundedSender<Dealing>; 2],
    room: [Room; 2],
    sent: [u64; 2],
    pace: Option<Pace>,
    started: Instant,
    paused: Duration,
    /// For room.
    waited: Duration,
    handle: Handle,
}

impl Sink {
    fn announce(&self, next: Announced) -> Result<(), Error> {
        let so_far = self.time();
        self.to.iter().try_for_each(|to| to.send(Dealing::Next(next, so_far))).map_err(|_| ended())
    }

    fn time(&self) -> DealerTime {
        let dealing = micros(self.started.elapsed().saturating_sub(self.paused));
        DealerTime { dealing, processor: micros(processor()), room: micros(self.waited) }
    }
}

impl DealerSink for Sink {
    fn send(&mut self, to: Role, step: u32, bytes: Vec<u8>) -> Result<(), Error> {
        let i = usize::from(to == Role::E2);
        let bytes = Wiped::new(bytes);
        let handle = self.handle.clone();
        handle.block_on(async {
            if let Some(pace) = &mut self.pace {
                let since = Instant::now();
                tokio::select! {
                    () = pace.turn() => {}
                    () = self.to[i].closed() => {}
                }
                self.paused += since.elapsed();
            }
            let since = Instant::now();
            let permit = self.room[i].wait(bytes.len()).await;
            self.waited += since.elapsed();
            self.sent[i] += bytes.len() as u64;
            self.to[i].send(Dealing::Step(Held { step, bytes, permit })).map_err(|_| ended())
        })
    }

    fn backend(&self) -> &dyn Backend {
        &*self.backend
    }
}

/// What a dealing came to.
#[derive(Clone, Copy)]
pub struct Dealt {
    /// Payload bytes to E1 and E2.
    pub bytes: [u64; 2],
    pub time: DealerTime,
}

/// Deals a whole program onto the two evaluators' streams.
pub async fn deal(
    plan: Arc<Program>,
    prg: [Prg; 2],
    streams: [&mut SendStream; 2],
    buffer: usize,
    pace: Option<Pace>,
    place: Place,
    compute: Arc<Compute>,
) -> Result<Dealt, Fail> {
    let mut one = Some(Dealable { plan, prg, next: None });
    deal_all(move || Ok(one.take()), streams, buffer, pace, place, compute, &AtomicU32::new(0)).await
}

/// A program of a sequence.
#[derive(Clone, Copy)]
pub struct Announced {
    pub next: Next,
    /// How often the evaluators had asked for another continuation.
    pub asked: u32,
}

/// A program to deal.
pub struct Dealable {
    pub plan: Arc<Program>,
    /// Generators of both evaluators' masks.
    pub prg: [Prg; 2],
    /// Of a sequence: what the evaluators are told first.
    pub next: Option<Announced>,
}

/// Deals one program after another, each going on after the positions that it leaves of those before, as far as the
/// streams take it. `next` may wait, on the dealing's own thread. `asked` counts what the evaluators have asked for.
pub async fn deal_all(
    mut next: impl FnMut() -> Result<Option<Dealable>, Error> + Send + 'static,
    streams: [&mut SendStream; 2],
    buffer: usize,
    pace: Option<Pace>,
    place: Place,
    compute: Arc<Compute>,
    asked: &AtomicU32,
) -> Result<Dealt, Fail> {
    let ((s1, r1), (s2, r2)) = (mpsc::unbounded_channel(), mpsc::unbounded_channel());
    let (done_tx, done) = oneshot::channel();
    let handle = Handle::current();
    spawn("dealer", move || {
        let dealt = compute.backend().and_then(|backend| {
            let room = [Room::new(buffer), Room::new(buffer)];
            let (started, [paused, waited]) = (Instant::now(), [Duration::ZERO; 2]);
            let mut sink = Sink { backend, to: [s1, s2], room, sent: [0; 2], pace, started, paused, waited, handle };
            let mut state = DealerState::default();
            while let Some(Dealable { plan, prg: [p1, p2], next }) = timed(&mut sink.paused, &mut next)? {
                if let Some(n) = next {
                    state.cut(plan.past());
                    sink.announce(n)?;
                }
                run::deal_next(&plan, p1, p2, &mut state, &mut sink)?;
            }
            Ok(Dealt { bytes: sink.sent, time: sink.time() })
        });
        drop(place);
        let _ = done_tx.send(dealt);
    })?;
    let [tx1, tx2] = streams;
    let (dealt, ..) = tokio::try_join!(result(done), forward(r1, tx1, asked), forward(r2, tx2, asked))?;
    Ok(dealt)
}
