//! Sessions: admission, and each role's part.
//!
//! A session is one future per party; whatever ends it (an error, a deadline, a client that vanished) drops the future,
//! which drops its streams and channels: the engine thread sees a closed channel and ends, and the peers see the end of
//! their streams.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use quinn::{Connection, ConnectionError, RecvStream, SendStream};
use tacet_protocol::Role;
use tacet_protocol::prg::{Prg, SessionKey};
use tacet_protocol::program::Program;
use tacet_protocol::run::EvaluatorState;
use tacet_protocol::seal::{self, SealContext};
use tacet_protocol::wire::{CONTROL_LIMIT, DealerTime, Dealing, EvaluatorTime, INPUT_OVERHEAD, Message, SessionId};
use tacet_transport::{TransportError, receive, send};
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::UnboundedSender;
use tokio::time::{timeout, timeout_at};
use zeroize::{Zeroize, Zeroizing};

use crate::clock::micros;
use crate::engine::{self, Evaluated, Evaluation, Place, Space, collect, dealt_steps};
use crate::fail::{Fail, code, fail};
use crate::flow::{self, Held, Room};
use crate::generate::{self, Sequence};
use crate::meeting::Joined;
use crate::plans::Plans;
use crate::pool::{Half, Kept, ended, unspool};
use crate::spool::Reader;
use crate::{Link, Party, lock};

/// A request; its token is known.
struct Request {
    session: SessionId,
    model: [u8; 32],
    program: [u8; 32],
    tokens: usize,
}

/// Serves a client's connection: one session a stream. Before a known token has come the connection has a deadline, a small
/// window, and one small frame at a time.
pub async fn client(party: Arc<Party>, c: Connection, _slot: OwnedSemaphorePermit) {
    let deadline = Instant::now() + Duration::from_secs(party.config.limits.join_s);
    let mut known = false;
    while !known {
        let first = async {
            let (tx, mut rx) = c.accept_bi().await?;
            let r = request(&party, &mut rx).await;
            Ok::<_, ConnectionError>((tx, rx, r))
        };
        match timeout_at(deadline.into(), first).await {
            Ok(Ok((tx, rx, r))) if Instant::now() < deadline => {
                known = r.is_ok();
                tokio::spawn(serve(Arc::clone(&party), tx, rx, r));
            }
            Ok(Err(_)) => return,
            _ => return c.close(3u32.into(), b"no request with a known token came in time"),
        }
    }
    tacet_transport::admit(&c);
    while let Ok((tx, mut rx)) = c.accept_bi().await {
        let party = Arc::clone(&party);
        tokio::spawn(async move {
            let r = request(&party, &mut rx).await;
            serve(party, tx, rx, r).await;
        });
    }
}

/// The first frame of a client's stream, if its token is known: a request, or nothing but the token.
async fn request(party: &Party, rx: &mut RecvStream) -> Result<Option<Request>, Fail> {
    let limit = Duration::from_secs(party.config.limits.join_s);
    let first = timeout(limit, receive(rx, CONTROL_LIMIT)).await;
    let first = first
        .map_err(|_| fail(code::DEADLINE, "no request arrived"))?
        .map_err(|e| fail(code::REQUEST, e.to_string()))?;
    let (token, request) = match first {
        Message::Token { token } => (token, None),
        Message::Request { session, token, model, program, tokens } => {
            (token, Some(Request { session, model, program, tokens: tokens as usize }))
        }
        _ => return Err(fail(code::REQUEST, "a session starts with a request")),
    };
    if !party.clients.knows(&Zeroizing::new(token)) {
        party.counters.refused.fetch_add(1, Relaxed);
        return Err(fail(
            code::UNAUTHORISED,
            "this token is not known here: ask the party for one (`tacet keys client`)",
        ));
    }
    Ok(request)
}

/// Serves one stream to its end.
async fn serve(party: Arc<Party>, mut tx: SendStream, mut rx: RecvStream, request: Result<Option<Request>, Fail>) {
    // Held until the answer is acknowledged: a party that stops waits for it.
    let mut place = None;
    let result = match request {
        Ok(Some(r)) => one(&party, &mut tx, &mut rx, r, &mut place).await,
        Ok(None) => tell(&mut tx, &Message::Accept, party.config.limits.join_s, CLIENT).await,
        Err(f) => Err(f),
    };
    if let Err(f) = result {
        // At most 1000 bytes of UTF-8.
        let text: String = f.text.chars().take(250).collect();
        eprintln!("session failed code={} reason={text:?}", f.code);
        let _ = timeout(FAREWELL, send(&mut tx, &Message::Failure { code: f.code, text })).await;
    }
    let _ = tx.finish();
    let _ = timeout(FAREWELL, tx.stopped()).await;
}

/// How long whoever is answered or refused may take to read the end of it.
pub const FAREWELL: Duration = Duration::from_secs(2);

/// Who reads what a party writes.
pub const CLIENT: &str = "the client";

/// Sends a message to whoever may not read it, and would hold a session's place for as long as it does not.
pub async fn tell(tx: &mut SendStream, m: &Message, seconds: u64, whom: &str) -> Result<(), Fail> {
    let sent = timeout(Duration::from_secs(seconds), send(tx, m)).await;
    let late = |_| fail(code::DEADLINE, format!("{whom} does not read what it is sent"));
    Ok(sent.map_err(late)??)
}

async fn one(
    party: &Arc<Party>,
    tx: &mut SendStream,
    rx: &mut RecvStream,
    request: Request,
    place: &mut Place,
) -> Result<(), Fail> {
    let limits = &party.config.limits;
    let Request { session, model, program, tokens } = request;
    let refused = |f: Fail| {
        party.counters.refused.fetch_add(1, Relaxed);
        f
    };
    if party.draining.load(Relaxed) {
        return Err(refused(fail(code::BUSY, "the party is stopping")));
    }
    // E1 decides who runs, so that three full parties never admit three different sets of sessions; the two others hold
    // a request until E1's stream for it arrives, and take their own permit then.
    let busy = || fail(code::BUSY, format!("all {} sessions are taken: try again shortly", limits.sessions));
    let permit = Arc::clone(party.gate()).try_acquire_owned().map_err(|_| refused(busy()))?;
    *place = Some(Arc::new(permit));
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
    let plan = party.program(tokens).await?;
    if program != plan.digest() {
        return Err(refused(fail(
            code::DIGEST,
            "the client plans this model differently: run the same release everywhere",
        )));
    }
    first_time(party, session).map_err(refused)?;
    party.counters.accepted.fetch_add(1, Relaxed);
    tell(tx, &Message::Accept, limits.join_s, CLIENT).await?;
    let failed = |f: Fail| {
        party.counters.failed.fetch_add(1, Relaxed);
        f
    };
    if let Plans::Decoder(planner) = &party.plans {
        let s = Sequence { session, planner: Arc::clone(planner), plan, place: place.clone() };
        generate::serve(party, s, tx, rx).await.map_err(failed)?;
        party.counters.completed.fetch_add(1, Relaxed);
        return Ok(());
    }
    let input = match party.config.role {
        Role::Dealer => Vec::new(),
        role => {
            let name = party.config.name.clone();
            let context = SealContext { session, party: name, role, model_digest: model, program_digest: program };
            input(party, rx, &context, &plan).await.map_err(failed)?
        }
    };
    let work = async {
        match party.config.role {
            Role::Dealer => deal(party, session, plan).await,
            role => evaluate(party, role, session, plan, input, place.clone()).await,
        }
    };
    let result = tokio::select! {
        r = timeout(Duration::from_secs(limits.session_s), work) => r.unwrap_or_else(|_| Err(fail(code::DEADLINE, format!("the session took longer than {} s", limits.session_s)))),
        // A client neither sends nor ends its stream before it has the answer.
        _ = rx.read_chunk(1, true) => Err(fail(code::REQUEST, "the client left")),
    };
    let mut answer = result.map_err(failed)?;
    party.counters.completed.fetch_add(1, Relaxed);
    let sent = tell(tx, &answer, limits.session_s, CLIENT).await;
    if let Message::Output { share, .. } = &mut answer {
        share.zeroize();
    }
    sent
}

/// The frame with an evaluator's half of at most `len` bytes, sealed, or a shorter one; none where the stream has ended.
pub async fn next_frame(rx: &mut RecvStream, len: usize) -> Option<Result<Message, Fail>> {
    match receive(rx, len + seal::OVERHEAD + INPUT_OVERHEAD).await {
        Ok(m) => Some(Ok(m)),
        Err(TransportError::Connection(_)) => None,
        Err(e) => Some(Err(fail(code::REQUEST, e.to_string()))),
    }
}

/// Opens an evaluator's half.
pub fn opened(party: &Party, context: &SealContext, p: &Program, m: Message) -> Result<Vec<Vec<u64>>, Fail> {
    let Message::Input { sealed } = m else {
        return Err(fail(code::REQUEST, "a request is followed by its input"));
    };
    let refused = |e: tacet_protocol::Error| fail(code::REQUEST, e.to_string());
    let plain = seal::open(&party.seal, context, &sealed).map_err(refused)?;
    p.expand(context.role, &plain).map_err(refused)
}

/// An evaluator's share of the input, sealed, which follows the request.
pub async fn input(
    party: &Party,
    rx: &mut RecvStream,
    context: &SealContext,
    p: &Program,
) -> Result<Vec<Vec<u64>>, Fail> {
    let limit = Duration::from_secs(party.config.limits.join_s);
    match timeout(limit, next_frame(rx, p.half_len(context.role))).await {
        Err(_) => Err(fail(code::DEADLINE, "no input followed the request")),
        Ok(None) => Err(fail(code::REQUEST, "the stream ended before its input")),
        Ok(Some(m)) => opened(party, context, p, m?),
    }
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

pub fn nonce() -> Result<[u8; 16], Fail> {
    let mut n = [0; 16];
    getrandom::fill(&mut n).map_err(|e| fail(code::PROTOCOL, format!("no randomness: {e}")))?;
    Ok(n)
}

/// The generator that an evaluator and the dealer share for program `n` of one session, each under a key of its own.
pub fn session_prg(
    link: &Link,
    evaluator: Role,
    n: u32,
    session: &SessionId,
    theirs: &[u8; 16],
    dealers: &[u8; 16],
) -> Prg {
    let label = format!("dealer-{}/{n}", if evaluator == Role::E1 { "e1" } else { "e2" });
    Prg::new(&SessionKey::derive(&link.secret, &label, session, theirs, dealers))
}

pub fn link(party: &Party, role: Role) -> Result<Link, Fail> {
    party.link(role).ok_or_else(|| {
        let name = party.config.peer.iter().find(|p| p.role == role).map_or("?", |p| p.name.as_str());
        fail(code::PEER, format!("party {name} ({role:?}) is not connected"))
    })
}

fn not_joined(role: Role) -> Fail {
    fail(code::PEER, format!("{role:?} did not join the session in time"))
}

/// A place among the running sessions; E1 admitted this one, so it is free now or soon.
pub async fn running(party: &Party) -> Result<Place, Fail> {
    let wait = Duration::from_secs(party.config.limits.join_s);
    let permit = timeout(wait, Arc::clone(&party.permits).acquire_owned()).await;
    let permit = permit.ok().and_then(Result::ok).map(Arc::new);
    permit.map(Some).ok_or_else(|| fail(code::BUSY, "all sessions are taken: try again shortly"))
}

/// An evaluator's streams of one session.
pub struct Met {
    pub dealer: Link,
    /// This evaluator's part of the session key's freshness.
    pub ours: [u8; 16],
    /// The dealer takes its end as the end of this party's part.
    pub keep: SendStream,
    pub from_dealer: RecvStream,
    pub dealing: Dealing,
    pub to_peer: SendStream,
    pub from_peer: RecvStream,
}

/// Joins the dealer and meets the other evaluator.
pub async fn meet(party: &Party, role: Role, session: SessionId) -> Result<Met, Fail> {
    let wait = Duration::from_secs(party.config.limits.join_s);
    let dealer = link(party, Role::Dealer)?;
    let ours = nonce()?;
    let opened = async {
        let (mut tx, mut rx) = dealer.connection.open_bi().await.map_err(|e| fail(code::PEER, e.to_string()))?;
        send(&mut tx, &Message::Join { session, nonce: ours }).await?;
        match receive(&mut rx, CONTROL_LIMIT).await? {
            Message::Start { dealing } => Ok((tx, rx, dealing)),
            m => Err(fail(code::PROTOCOL, format!("{m:?} from the dealer in place of its start"))),
        }
    };
    let met = async {
        if role == Role::E2 {
            let joined = party.meeting.take((session, Role::E1), wait).await.ok_or_else(|| not_joined(Role::E1))?;
            return Ok((joined.tx, joined.rx));
        }
        let (mut tx, rx) =
            link(party, Role::E2)?.connection.open_bi().await.map_err(|e| fail(code::PEER, e.to_string()))?;
        send(&mut tx, &Message::Peer { session }).await?;
        Ok((tx, rx))
    };
    let opened = async { timeout(wait, opened).await.unwrap_or_else(|_| Err(not_joined(Role::Dealer))) };
    let other = if role == Role::E1 { Role::E2 } else { Role::E1 };
    let met = async { timeout(wait, met).await.unwrap_or_else(|_| Err(not_joined(other))) };
    let ((keep, from_dealer, dealing), (to_peer, from_peer)) = tokio::try_join!(opened, met)?;
    Ok(Met { dealer, ours, keep, from_dealer, dealing, to_peer, from_peer })
}

/// Both evaluators' streams at the dealer.
pub async fn both(party: &Party, session: SessionId) -> Result<(Joined, Joined), Fail> {
    let wait = Duration::from_secs(party.config.limits.join_s);
    let join = |r: Role| async move { party.meeting.take((session, r), wait).await.ok_or_else(|| not_joined(r)) };
    tokio::try_join!(join(Role::E1), join(Role::E2))
}

/// Where an evaluator's dealt steps come from.
enum Source {
    Dealer(UnboundedSender<Held>),
    Disk(Reader, UnboundedSender<Held>),
    /// They lie in the engine's channel.
    Memory,
}

/// An evaluator's part of a session. `gate` is its place where this party admits sessions.
async fn evaluate(
    party: &Party,
    role: Role,
    session: SessionId,
    plan: Arc<Program>,
    input: Vec<Vec<u64>>,
    gate: Place,
) -> Result<Message, Fail> {
    let limits = &party.config.limits;
    let Met { dealer, ours, keep: _keep, mut from_dealer, dealing, mut to_peer, mut from_peer } =
        meet(party, role, session).await?;
    let place = if role == Role::E1 { gate } else { running(party).await? };
    let started = Instant::now();
    let steps = dealt_steps(&plan, role);
    let (to, arrived) = flow::channel();
    let (prg, dealt, source, _stream) = match dealing {
        Dealing::Fresh { nonce } => {
            (session_prg(&dealer, role, 0, &session, &ours, &nonce), arrived, Source::Dealer(to), None)
        }
        Dealing::Ahead { bundle } => {
            let Half { prg, dealt, stream, .. } = party.pool.take(&bundle, &plan)?;
            party.counters.bundles_used.fetch_add(1, Relaxed);
            let (dealt, source) = match dealt {
                Kept::Memory(waits) => (waits, Source::Memory),
                Kept::Disk(reader) => (arrived, Source::Disk(reader, to)),
            };
            (prg, dealt, source, Some(stream))
        }
    };
    let arriving = async {
        let room = Room::new(limits.buffer());
        match source {
            Source::Dealer(to) => collect(&mut from_dealer, steps, Space::Shared(room), to).await,
            Source::Disk(reader, to) => unspool(party, reader, room, to).await,
            Source::Memory => Ok(()),
        }
    };
    let (room, compute) = (Room::new(limits.buffer()), Arc::clone(&party.compute));
    let work = engine::evaluate(
        Evaluation {
            plan,
            next: None,
            role,
            prg,
            input,
            state: EvaluatorState::default(),
            dealt,
            room,
            place,
            compute,
        },
        (&mut to_peer, &mut from_peer),
    );
    let (done, ()) = tokio::try_join!(work, arriving)?;
    let _ = to_peer.finish();
    party.counters.opened.fetch_add(done.opened, Relaxed);
    party.counters.dealt.fetch_add(done.dealt, Relaxed);
    Ok(output(done, started, DealerTime::default()).0)
}

/// An evaluator's answer, and what the next program starts from. `dealer` is for a client that the dealer tells nothing.
pub fn output(done: Evaluated, started: Instant, dealer: DealerTime) -> (Message, EvaluatorState) {
    let Evaluated { share, rounds, opened, dealt, time, state } = done;
    let time = EvaluatorTime { online: micros(started.elapsed()), ..time };
    (Message::Output { share, rounds, opened, dealt, time, dealer }, state)
}

/// The dealer's part of a session: hands out a bundle or deals, and stays until both evaluators are done.
async fn deal(party: &Party, session: SessionId, plan: Arc<Program>) -> Result<Message, Fail> {
    let (mut j1, mut j2) = both(party, session).await?;
    let place = running(party).await?;
    let _busy = party.stock.busy();
    let mut bundle = party.stock.take(&plan, [&j1.link, &j2.link]);
    let ours = nonce()?;
    let dealing = match &bundle {
        Some(b) => Dealing::Ahead { bundle: b.id },
        None => Dealing::Fresh { nonce: ours },
    };
    send(&mut j1.tx, &Message::Start { dealing }).await?;
    send(&mut j2.tx, &Message::Start { dealing }).await?;
    let dealt = match &mut bundle {
        Some(b) => {
            party.counters.bundles_used.fetch_add(1, Relaxed);
            b.finish().await?
        }
        None => {
            let prg =
                [(Role::E1, &j1), (Role::E2, &j2)].map(|(r, j)| session_prg(&j.link, r, 0, &session, &j.nonce, &ours));
            let buffer = party.config.limits.buffer();
            let streams = [&mut j1.tx, &mut j2.tx];
            let compute = Arc::clone(&party.compute);
            let dealt = engine::deal(plan, prg, streams, buffer, None, place.clone(), compute).await?;
            party.counters.dealt_fresh.fetch_add(1, Relaxed);
            party.counters.dealt.fetch_add(dealt.bytes.iter().sum(), Relaxed);
            dealt
        }
    };
    tokio::join!(ended(&mut j1.rx), ended(&mut j2.rx));
    Ok(Message::Done { dealt: dealt.bytes, time: dealt.time, ahead: bundle.is_some() })
}
