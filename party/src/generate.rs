//! Sessions of a decoder: a padded prompt, then one token after another, until the client leaves or is idle too long.
//!
//! Every token is a program of its own under a key of its own (the session's, with the program's number). The dealer needs
//! no word of the client for the next one: it deals programs one after another, as far ahead as the evaluators' buffers
//! take them, so that a token's dealing has mostly arrived when the token does.
//!
//! **Who sees what.** As for any program (see [`tacet_protocol::gates`]). Between programs the evaluators keep masked keys
//! and values with their own halves of the masks, and the dealer keeps the masks; each is read again by later products
//! and never opened again. All three learn the prompt's padded length and the number of tokens that followed, and when.
//! What they keep is wiped when the session ends, however it ends.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use quinn::{RecvStream, SendStream};
use tacet_protocol::plan::DecoderPlanner;
use tacet_protocol::program::Program;
use tacet_protocol::query::step_digest;
use tacet_protocol::run::EvaluatorState;
use tacet_protocol::seal::SealContext;
use tacet_protocol::wire::{Dealing, Message, SessionId};
use tacet_protocol::{Error, Role};
use tacet_transport::send;
use tokio::sync::mpsc::{self, UnboundedReceiver};
use tokio::time::timeout;
use zeroize::Zeroize;

use crate::Party;
use crate::engine::{self, Dealable, Evaluation, Place, Space, collect, dealt_steps};
use crate::fail::{Fail, code, fail};
use crate::flow::{Held, Room, channel};
use crate::pool::ended;
use crate::session::{Met, both, input, meet, next_frame, nonce, opened, running, session_prg};

/// A session that was admitted.
pub struct Sequence {
    pub session: SessionId,
    pub planner: Arc<DecoderPlanner>,
    /// The first program.
    pub plan: Arc<Program>,
    pub place: Place,
}

/// The programs of a sequence, one after another, until it is as long as the model takes.
struct Programs {
    planner: Arc<DecoderPlanner>,
    first: Option<Arc<Program>>,
    marked: usize,
    past: usize,
}

impl Programs {
    fn new(s: &Sequence) -> Programs {
        let marked = s.plan.tokens();
        Programs { planner: Arc::clone(&s.planner), first: Some(Arc::clone(&s.plan)), marked, past: 0 }
    }

    fn next(&mut self) -> Result<Option<Arc<Program>>, Error> {
        let p = match self.first.take() {
            Some(p) => p,
            None if self.past >= self.planner.longest() => return Ok(None),
            None => Arc::new(self.planner.program(self.marked, self.past, 1, false)?),
        };
        self.past += p.tokens();
        Ok(Some(p))
    }
}

/// Serves a whole sequence; the client ends it by leaving.
pub async fn serve(party: &Arc<Party>, s: Sequence, tx: &mut SendStream, rx: &mut RecvStream) -> Result<(), Fail> {
    match party.config.role {
        Role::Dealer => deal(party, s, rx).await,
        role => evaluate(party, role, s, tx, rx).await,
    }
}

async fn deal(party: &Party, s: Sequence, client: &mut RecvStream) -> Result<(), Fail> {
    let (mut j1, mut j2) = both(party, s.session).await?;
    let place = running(party).await?;
    let _busy = party.stock.busy();
    let ours = nonce()?;
    let start = Message::Start { dealing: Dealing::Fresh { nonce: ours } };
    send(&mut j1.tx, &start).await?;
    send(&mut j2.tx, &start).await?;
    let (session, links, nonces) = (s.session, [j1.link.clone(), j2.link.clone()], [j1.nonce, j2.nonce]);
    let (mut programs, mut n) = (Programs::new(&s), 0);
    let next = move || -> Result<Option<Dealable>, Error> {
        let Some(p) = programs.next()? else { return Ok(None) };
        let prg = [0, 1].map(|i| {
            let role = if i == 0 { Role::E1 } else { Role::E2 };
            session_prg(&links[i], role, n, &session, &nonces[i], &ours)
        });
        n += 1;
        Ok(Some((p, prg)))
    };
    let dealing = async {
        let (streams, buffer) = ([&mut j1.tx, &mut j2.tx], party.config.limits.buffer());
        let dealt = engine::deal_all(next, streams, buffer, None, place, Arc::clone(&party.compute)).await;
        if let Ok(d) = &dealt {
            party.counters.dealt_fresh.fetch_add(1, Relaxed);
            party.counters.dealt.fetch_add(d.bytes.iter().sum(), Relaxed);
        }
        // All that the sequence can take, or an evaluator that left, which the other arms tell.
        std::future::pending::<()>().await
    };
    tokio::select! {
        () = dealing => {}
        () = ended(&mut j1.rx) => {}
        () = ended(&mut j2.rx) => {}
        _ = client.read_chunk(1, true) => {}
    }
    Ok(())
}

type Step = (Arc<Program>, UnboundedReceiver<Held>);

/// Receives the dealing of one program after another, ahead of the client.
async fn read(
    from_dealer: &mut RecvStream,
    mut programs: Programs,
    role: Role,
    buffer: usize,
    to: mpsc::Sender<Step>,
) -> Result<(), Fail> {
    let room = Room::new(buffer);
    loop {
        // Beside the network's thread.
        let planned = tokio::task::spawn_blocking(move || (programs.next(), programs)).await;
        let (p, rest) = planned.map_err(|_| fail(code::PROTOCOL, "planning stopped"))?;
        programs = rest;
        let Some(p) = p? else { return Ok(()) };
        let (dealt_tx, dealt) = channel();
        if to.send((Arc::clone(&p), dealt)).await.is_err() {
            return Ok(());
        }
        collect(from_dealer, dealt_steps(&p, role), Space::Shared(room.clone()), dealt_tx).await?;
    }
}

async fn evaluate(
    party: &Party,
    role: Role,
    s: Sequence,
    tx: &mut SendStream,
    rx: &mut RecvStream,
) -> Result<(), Fail> {
    let limits = &party.config.limits;
    let session = s.session;
    let first = s.plan.digest();
    let context = |digest: [u8; 32]| SealContext {
        session,
        party: party.config.name.clone(),
        role,
        model_digest: party.model,
        program_digest: digest,
    };
    let prompt = input(party, rx, &context(first), &s.plan).await?;
    let Met { dealer, ours, keep: _keep, mut from_dealer, dealing, mut to_peer, mut from_peer } =
        meet(party, role, session).await?;
    let Dealing::Fresh { nonce } = dealing else {
        return Err(fail(code::PROTOCOL, "a sequence is dealt while it runs, but the dealer names a bundle"));
    };
    let place = if role == Role::E1 { s.place.clone() } else { running(party).await? };
    let (to, mut steps) = mpsc::channel(2);
    let reading = read(&mut from_dealer, Programs::new(&s), role, limits.buffer(), to);
    let evaluating = async {
        let (mut state, mut n, mut past, mut next) = (EvaluatorState::default(), 0, 0, Some(prompt));
        while let Some((plan, dealt)) = steps.recv().await {
            let input = match next.take() {
                Some(i) => i,
                None => match next_input(party, rx, &context(step_digest(&first, past)), &plan).await? {
                    Some(i) => i,
                    None => return Ok(()),
                },
            };
            let started = Instant::now();
            let prg = session_prg(&dealer, role, n, &session, &ours, &nonce);
            (n, past) = (n + 1, past + plan.tokens());
            let room = Room::new(limits.buffer());
            let (place, compute) = (place.clone(), Arc::clone(&party.compute));
            let work = engine::evaluate(
                Evaluation { plan, role, prg, input, state, dealt, room, place, compute },
                (&mut to_peer, &mut from_peer),
            );
            let limit = Duration::from_secs(limits.session_s);
            let done = tokio::select! {
                r = timeout(limit, work) => {
                    r.map_err(|_| fail(code::DEADLINE, format!("a step took longer than {} s", limits.session_s)))??
                }
                _ = tx.stopped() => return Err(fail(code::REQUEST, "the client left")),
            };
            party.counters.opened.fetch_add(done.opened, Relaxed);
            party.counters.dealt.fetch_add(done.dealt, Relaxed);
            let online_us = started.elapsed().as_micros() as u64;
            let (share, rounds, opened, dealt) = (done.share, done.rounds, done.opened, done.dealt);
            let mut answer = Message::Output { share, rounds, opened, dealt, online_us };
            let sent = send(tx, &answer).await;
            if let Message::Output { share, .. } = &mut answer {
                share.zeroize();
            }
            sent?;
            state = done.state;
        }
        Ok(())
    };
    tokio::select! {
        r = evaluating => r,
        // The end of the dealing is no failure: what has arrived serves the last steps.
        Err(f) = reading => Err(f),
    }
}

/// The input of a step; none where the client has left between two steps.
async fn next_input(
    party: &Party,
    rx: &mut RecvStream,
    context: &SealContext,
    plan: &Program,
) -> Result<Option<Vec<Vec<u64>>>, Fail> {
    let idle = party.config.limits.idle_s;
    match timeout(Duration::from_secs(idle), next_frame(rx, plan.half_len(context.role))).await {
        Err(_) => Err(fail(code::DEADLINE, format!("the client was idle for {idle} s"))),
        Ok(None) => Ok(None),
        Ok(Some(m)) => opened(party, context, plan, m?).map(Some),
    }
}
