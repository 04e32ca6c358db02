//! Sessions: admission, the meeting of the three parties' streams, and the engines behind them.
//!
//! A session is one future per party; whatever ends it (an error, a deadline, a client that vanished) drops the future,
//! which drops its streams and channels: the engine thread sees a closed channel and ends, and the peers see a reset.
//! Every party sends before it receives in each round, so a pair of evaluators cannot wait for one another.

use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use quinn::{Connection, RecvStream, SendStream};
use tacet_protocol::prg::{Prg, SessionKey};
use tacet_protocol::program::{Kind, Program};
use tacet_protocol::ring::{mask, pack, unpack};
use tacet_protocol::seal::{self, SealContext};
use tacet_protocol::wire::{CONTROL_LIMIT, Dealing, Message, SessionId};
use tacet_protocol::{DealerSink, Error, EvaluatorIo, Role, run};
use tacet_transport::{TransportError, receive, receive_step, send};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use crate::{Link, Party, lock};

/// Why a session ended, as the client is told.
pub struct Fail {
    code: u16,
    text: String,
}

/// Codes of [`Fail`]; stable, for programs.
pub mod code {
    /// The token is not known.
    pub const UNAUTHORISED: u16 = 1;
    /// Too many sessions, or the party is stopping.
    pub const BUSY: u16 = 2;
    /// Another model or plan.
    pub const DIGEST: u16 = 3;
    /// A request that cannot be served: length, sealing, a repeated session name.
    pub const REQUEST: u16 = 4;
    /// Another party is not reachable or did not join.
    pub const PEER: u16 = 5;
    /// The evaluation failed.
    pub const PROTOCOL: u16 = 6;
    /// The session took too long.
    pub const DEADLINE: u16 = 7;
}

fn fail(code: u16, text: impl Into<String>) -> Fail {
    Fail { code, text: text.into() }
}

impl From<TransportError> for Fail {
    fn from(e: TransportError) -> Fail {
        fail(code::PROTOCOL, format!("another party: {e}"))
    }
}

impl From<Error> for Fail {
    fn from(e: Error) -> Fail {
        fail(code::PROTOCOL, e.to_string())
    }
}

type Streams = (SendStream, RecvStream, [u8; 16]);

enum Slot {
    Waiting(oneshot::Sender<Streams>),
    Here(Box<Streams>, Instant),
}

/// Where a peer's stream waits for the client's request, or the other way round.
#[derive(Default)]
pub struct Meeting(Mutex<HashMap<(SessionId, Role), Slot>>);

impl Meeting {
    fn put(&self, key: (SessionId, Role), streams: Streams, limit: Duration) {
        let mut m = lock(&self.0);
        m.retain(|_, s| !matches!(s, Slot::Here(_, at) if at.elapsed() > limit));
        match m.remove(&key) {
            Some(Slot::Waiting(w)) => {
                let _ = w.send(streams);
            }
            // Bounded: a peer that floods session names loses its own streams.
            _ if m.len() < 1024 => {
                m.insert(key, Slot::Here(Box::new(streams), Instant::now()));
            }
            _ => {}
        }
    }

    async fn take(&self, key: (SessionId, Role), limit: Duration) -> Option<Streams> {
        let wait = {
            let mut m = lock(&self.0);
            match m.remove(&key) {
                Some(Slot::Here(s, _)) => return Some(*s),
                _ => {
                    let (tx, rx) = oneshot::channel();
                    m.insert(key, Slot::Waiting(tx));
                    rx
                }
            }
        };
        let got = timeout(limit, wait).await;
        lock(&self.0).remove(&key);
        got.ok()?.ok()
    }
}

/// First frame of a stream that a peer opened.
pub async fn stream_from_peer(party: Arc<Party>, from: Role, tx: SendStream, mut rx: RecvStream) {
    let limit = Duration::from_secs(party.config.limits.join_s);
    match timeout(limit, receive(&mut rx, CONTROL_LIMIT)).await {
        Ok(Ok(Message::Join { session, nonce })) if party.config.role == Role::Dealer => {
            party.meeting.put((session, from), (tx, rx, nonce), limit)
        }
        Ok(Ok(Message::Peer { session })) if (party.config.role, from) == (Role::E2, Role::E1) => {
            party.meeting.put((session, from), (tx, rx, [0; 16]), limit);
        }
        _ => {}
    }
}

/// Serves a client's connection: one session a stream.
pub async fn client(party: Arc<Party>, c: Connection) {
    while let Ok((mut tx, mut rx)) = c.accept_bi().await {
        let party = Arc::clone(&party);
        tokio::spawn(async move {
            let result = one(&party, &mut tx, &mut rx).await;
            if let Err(f) = result {
                // At most 1000 bytes of UTF-8.
                let text: String = f.text.chars().take(250).collect();
                eprintln!("session failed code={} reason={text:?}", f.code);
                let _ = send(&mut tx, &Message::Failure { code: f.code, text }).await;
            }
            let _ = tx.finish();
            let _ = timeout(Duration::from_secs(2), tx.stopped()).await;
        });
    }
}

async fn one(party: &Arc<Party>, tx: &mut SendStream, rx: &mut RecvStream) -> Result<(), Fail> {
    let limits = &party.config.limits;
    // The largest request: a full input at 64 bits, its seal and the fixed fields.
    let program_8 = party.program(8)?;
    let width = program_8.input_len() / 8;
    let longest = width * limits.tokens * 8 + CONTROL_LIMIT;
    let request = timeout(Duration::from_secs(limits.join_s), receive(rx, longest)).await;
    let request = request
        .map_err(|_| fail(code::DEADLINE, "no request arrived"))?
        .map_err(|e| fail(code::REQUEST, e.to_string()))?;
    let Message::Request { session, token, model, program, tokens, sealed } = request else {
        return Err(fail(code::REQUEST, "a session starts with a request"));
    };
    let refused = |f: Fail| {
        party.counters.refused.fetch_add(1, Relaxed);
        f
    };
    if !party.clients.knows(&token) {
        return Err(refused(fail(
            code::UNAUTHORISED,
            "this token is not known here: ask the party for one (`tacet keys client`)",
        )));
    }
    if party.draining.load(Relaxed) {
        return Err(refused(fail(code::BUSY, "the party is stopping")));
    }
    // E1 decides who runs, so that three full parties never admit three different sets of sessions; the two others hold
    // a request until E1's stream for it arrives, and take their own permit then.
    let gate = if party.config.role == Role::E1 { &party.permits } else { &party.waiting };
    let busy = || fail(code::BUSY, format!("all {} sessions are taken: try again shortly", limits.sessions));
    let _permit = Arc::clone(gate).try_acquire_owned().map_err(|_| refused(busy()))?;
    let tokens = tokens as usize;
    if tokens == 0 || tokens > limits.tokens {
        return Err(refused(fail(
            code::REQUEST,
            format!("{tokens} tokens, but this party takes 1 to {}", limits.tokens),
        )));
    }
    if model != party.model {
        return Err(refused(fail(
            code::DIGEST,
            "the client has another model than the parties: compare the digests of `tacet doctor`",
        )));
    }
    let plan = party.program(tokens)?;
    if program != plan.digest() {
        return Err(refused(fail(
            code::DIGEST,
            "the client plans this model differently: run the same release everywhere",
        )));
    }
    first_time(party, session).map_err(refused)?;
    party.counters.accepted.fetch_add(1, Relaxed);
    send(tx, &Message::Accept).await?;
    let work = async {
        match party.config.role {
            Role::Dealer => deal(party, session, plan).await,
            role => {
                let context = SealContext {
                    session,
                    party: party.config.name.clone(),
                    role,
                    model_digest: model,
                    program_digest: program,
                };
                let plain =
                    seal::open(&party.seal, &context, &sealed).map_err(|e| fail(code::REQUEST, e.to_string()))?;
                let input = expand(role, &plan, &plain)?;
                evaluate(party, role, session, plan, input).await
            }
        }
    };
    let result = tokio::select! {
        r = timeout(Duration::from_secs(limits.session_s), work) => r.unwrap_or_else(|_| Err(fail(code::DEADLINE, format!("the session took longer than {} s", limits.session_s)))),
        // A client neither sends nor ends its stream before it has the answer.
        _ = rx.read_chunk(1, true) => Err(fail(code::REQUEST, "the client left")),
    };
    let counter = if result.is_ok() { &party.counters.completed } else { &party.counters.failed };
    counter.fetch_add(1, Relaxed);
    send(tx, &result?).await?;
    Ok(())
}

fn first_time(party: &Party, session: SessionId) -> Result<(), Fail> {
    let mut r = lock(&party.recent);
    if !r.0.insert(session) {
        return Err(fail(code::REQUEST, "this session name was used before"));
    }
    r.1.push_back(session);
    if r.1.len() > 65_536
        && let Some(old) = r.1.pop_front()
    {
        r.0.remove(&old);
    }
    Ok(())
}

/// A sealed half to words: a seed for E1, packed words for E2.
fn expand(role: Role, p: &Program, plain: &[u8]) -> Result<Vec<u64>, Fail> {
    let bits = p.input_bits();
    if role == Role::E2 {
        return unpack(plain, p.input_len(), bits).map_err(|e| fail(code::REQUEST, e.to_string()));
    }
    let seed: [u8; 32] = plain.try_into().map_err(|_| fail(code::REQUEST, "a seed has 32 bytes"))?;
    let mut out = vec![0; p.input_len()];
    Prg::new(&SessionKey::from_seed(seed)).fill(0, 0, bits, &mut out)?;
    debug_assert!(out.iter().all(|w| *w <= mask(bits)));
    Ok(out)
}

fn nonce() -> Result<[u8; 16], Fail> {
    let mut n = [0; 16];
    getrandom::fill(&mut n).map_err(|e| fail(code::PROTOCOL, format!("no randomness: {e}")))?;
    Ok(n)
}

fn pair_key(link: &Link, evaluator: Role, session: &SessionId, theirs: &[u8; 16], dealers: &[u8; 16]) -> Prg {
    let label = if evaluator == Role::E1 { "dealer-e1" } else { "dealer-e2" };
    Prg::new(&SessionKey::derive(&link.secret, label, session, theirs, dealers))
}

fn link(party: &Party, role: Role) -> Result<Link, Fail> {
    party.link(role).ok_or_else(|| {
        let name = party.config.peer.iter().find(|p| p.role == role).map_or("?", |p| p.name.as_str());
        fail(code::PEER, format!("party {name} ({role:?}) is not connected"))
    })
}

fn not_joined(role: Role) -> Fail {
    fail(code::PEER, format!("{role:?} did not join the session in time"))
}

/// A place among the running sessions; E1 admitted this one, so it is free now or soon.
async fn running(party: &Party, wait: Duration) -> Result<tokio::sync::SemaphorePermit<'_>, Fail> {
    let permit = timeout(wait, party.permits.acquire()).await;
    permit.ok().and_then(Result::ok).ok_or_else(|| fail(code::BUSY, "all sessions are taken: try again shortly"))
}

type Frame = (u32, Vec<u8>);

struct Io {
    dealt: mpsc::Receiver<Vec<u8>>,
    out: mpsc::Sender<Frame>,
    back: mpsc::Receiver<Vec<u8>>,
    rounds: u32,
    opened: u64,
    received: u64,
}

fn ended() -> Error {
    Error::Transport("the session ended".into())
}

impl EvaluatorIo for Io {
    fn dealt(&mut self, _: u32, len: usize) -> Result<Vec<u8>, Error> {
        self.received += len as u64;
        self.dealt.blocking_recv().ok_or_else(ended)
    }

    fn exchange(&mut self, step: u32, out: Vec<u8>) -> Result<Vec<u8>, Error> {
        self.rounds += 1;
        self.opened += out.len() as u64;
        self.out.blocking_send((step, out)).map_err(|_| ended())?;
        self.back.blocking_recv().ok_or_else(ended)
    }
}

async fn forward(mut rx: mpsc::Receiver<Frame>, stream: &mut SendStream) -> Result<(), Fail> {
    while let Some((step, bytes)) = rx.recv().await {
        send(stream, &Message::Step { step, bytes }).await?;
    }
    Ok(())
}

/// Receives the expected steps in order and hands them to the engine; the channel's bound is the back-pressure.
async fn collect(stream: &mut RecvStream, steps: Vec<(u32, usize)>, to: mpsc::Sender<Vec<u8>>) -> Result<(), Fail> {
    for (step, len) in steps {
        let mut b = receive_step(stream, step, len).await?;
        if to.send(std::mem::take(&mut *b)).await.is_err() {
            break;
        }
    }
    Ok(())
}

async fn evaluate(
    party: &Party,
    role: Role,
    session: SessionId,
    plan: Arc<Program>,
    input: Vec<u64>,
) -> Result<Message, Fail> {
    let wait = Duration::from_secs(party.config.limits.join_s);
    let dealer = link(party, Role::Dealer)?;
    let ours = nonce()?;
    let opened = async {
        let (mut tx, mut rx) = dealer.connection.open_bi().await.map_err(|e| fail(code::PEER, e.to_string()))?;
        send(&mut tx, &Message::Join { session, nonce: ours }).await?;
        match receive(&mut rx, CONTROL_LIMIT).await? {
            Message::Start { dealing: Dealing::Fresh { nonce } } => Ok((tx, rx, nonce)),
            m => Err(fail(code::PROTOCOL, format!("{m:?} from the dealer in place of its nonce"))),
        }
    };
    let met = async {
        if role == Role::E2 {
            return party.meeting.take((session, Role::E1), wait).await.ok_or_else(|| not_joined(Role::E1));
        }
        let (mut tx, rx) =
            link(party, Role::E2)?.connection.open_bi().await.map_err(|e| fail(code::PEER, e.to_string()))?;
        send(&mut tx, &Message::Peer { session }).await?;
        Ok((tx, rx, [0; 16]))
    };
    let opened = async { timeout(wait, opened).await.unwrap_or_else(|_| Err(not_joined(Role::Dealer))) };
    let ((_keep, mut from_dealer, theirs), (mut to_peer, mut from_peer, _)) = tokio::try_join!(opened, met)?;
    let _running = if role == Role::E1 { None } else { Some(running(party, wait).await?) };
    let prg = pair_key(&dealer, role, &session, &ours, &theirs);

    let side = usize::from(role == Role::E2);
    let dealt: Vec<(u32, usize)> =
        (0..plan.ops.len()).map(|i| (i as u32, plan.dealt_len(i)[side] as usize)).filter(|s| s.1 > 0).collect();
    let openings: Vec<(u32, usize)> = plan
        .ops
        .iter()
        .enumerate()
        .filter(|(_, o)| matches!(o.kind, Kind::Open))
        .map(|(i, o)| (i as u32, plan.opening_len(o)))
        .collect();
    let ((dealt_tx, dealt_rx), (out_tx, out_rx), (back_tx, back_rx), (done_tx, done_rx)) =
        (mpsc::channel(4), mpsc::channel(4), mpsc::channel(4), oneshot::channel());
    let started = Instant::now();
    std::thread::Builder::new()
        .name("evaluator".into())
        .spawn(move || {
            let mut io = Io { dealt: dealt_rx, out: out_tx, back: back_rx, rounds: 0, opened: 0, received: 0 };
            let share = run::evaluate(&plan, role, prg, input, &mut io).map(|s| pack(&s, plan.output_bits()));
            let _ = done_tx.send(share.map(|s| (s, io.rounds, io.opened, io.received)));
        })
        .map_err(|e| fail(code::PROTOCOL, format!("no thread: {e}")))?;
    let engine = async { done_rx.await.map_err(|_| fail(code::PROTOCOL, "the engine stopped"))?.map_err(Fail::from) };
    let moved = async {
        tokio::try_join!(
            forward(out_rx, &mut to_peer),
            collect(&mut from_dealer, dealt, dealt_tx),
            collect(&mut from_peer, openings, back_tx)
        )
    };
    let ((share, rounds, opened, dealt), _) = tokio::try_join!(engine, moved)?;
    let _ = to_peer.finish();
    party.counters.opened.fetch_add(opened, Relaxed);
    party.counters.dealt.fetch_add(dealt, Relaxed);
    Ok(Message::Output { share, rounds, opened, dealt, online_us: started.elapsed().as_micros() as u64 })
}

struct Sink([mpsc::Sender<Frame>; 2], [u64; 2]);

impl DealerSink for Sink {
    fn send(&mut self, to: Role, step: u32, bytes: Vec<u8>) -> Result<(), Error> {
        let i = usize::from(to == Role::E2);
        self.1[i] += bytes.len() as u64;
        self.0[i].blocking_send((step, bytes)).map_err(|_| ended())
    }
}

async fn deal(party: &Party, session: SessionId, plan: Arc<Program>) -> Result<Message, Fail> {
    let wait = Duration::from_secs(party.config.limits.join_s);
    let join = |r: Role| async move { party.meeting.take((session, r), wait).await.ok_or_else(|| not_joined(r)) };
    let ((mut tx1, _rx1, n1), (mut tx2, _rx2, n2)) = tokio::try_join!(join(Role::E1), join(Role::E2))?;
    let _running = running(party, wait).await?;
    let ours = nonce()?;
    send(&mut tx1, &Message::Start { dealing: Dealing::Fresh { nonce: ours } }).await?;
    send(&mut tx2, &Message::Start { dealing: Dealing::Fresh { nonce: ours } }).await?;
    let prg =
        [(Role::E1, n1), (Role::E2, n2)].map(|(r, n)| link(party, r).map(|l| pair_key(&l, r, &session, &n, &ours)));
    let [p1, p2] = prg;
    let (p1, p2) = (p1?, p2?);
    let ((s1, r1), (s2, r2), (done_tx, done_rx)) = (mpsc::channel(4), mpsc::channel(4), oneshot::channel());
    let started = Instant::now();
    std::thread::Builder::new()
        .name("dealer".into())
        .spawn(move || {
            let mut sink = Sink([s1, s2], [0; 2]);
            let r = run::deal(&plan, p1, p2, &mut sink);
            let _ = done_tx.send(r.map(|()| (sink.1, started.elapsed().as_micros() as u64)));
        })
        .map_err(|e| fail(code::PROTOCOL, format!("no thread: {e}")))?;
    let engine = async { done_rx.await.map_err(|_| fail(code::PROTOCOL, "the engine stopped"))?.map_err(Fail::from) };
    let ((dealt, dealing_us), _, _) = tokio::try_join!(engine, forward(r1, &mut tx1), forward(r2, &mut tx2))?;
    let _ = (tx1.finish(), tx2.finish());
    // The streams must outlive the last byte's acknowledgement.
    let _ = tokio::join!(timeout(wait, tx1.stopped()), timeout(wait, tx2.stopped()));
    party.counters.dealt.fetch_add(dealt.iter().sum(), Relaxed);
    Ok(Message::Done { dealt, dealing_us, ahead: false })
}
