//! Dealing ahead, the evaluator's end: halves of bundles that wait in memory for the session that uses them.
//!
//! A *bundle* is one dealing of a whole program. The dealer opens a stream to each evaluator and names the bundle
//! (`Prepare`); the evaluator sets aside the exact bytes it will receive, answers with a nonce of its own (`Ready`), and
//! keeps the steps that follow. When both evaluators have joined a session, the dealer names the bundle to both (`Start`).
//!
//! **Who sees what.** Prepare carries a random name, a length and the digest of a public program; the steps are
//! the same correlated randomness that a session would receive while it runs. All of it is drawn before any input exists,
//! so a bundle says nothing about a query; which length is dealt ahead follows from the lengths asked for before, which
//! all parties know. Openings go between the evaluators as ever, and the dealer still receives nothing that depends on data.
//!
//! **Why no mask repeats.** Both ends derive the bundle's key from the secret of the link that carries the stream (fresh
//! X25519 keys of that connection), the bundle's name and a fresh nonce of each end, under a label that no session uses.
//! A half is *moved* out of the pool, generator included, by the one session that the dealer names it to; the dealer moves
//! its own end in the same way. A name that is unknown, used already or of another program ends the session.
//!
//! **Lifetime.** A half lives as long as its stream. When the link breaks, the dealer restarts or drops the bundle, the
//! stream ends and the half is wiped; when the half is used or this process ends, the dealer sees that in turn.
//!
//! **Bounds.** `[pool] memory_mb` bounds the payload bytes of all halves, `[pool] bundles` their number; a bundle that does
//! not fit is refused before its first byte.

use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};

use quinn::{RecvStream, SendStream};
use tacet_protocol::Role;
use tacet_protocol::prg::{Prg, SessionKey};
use tacet_protocol::program::Program;
use tacet_protocol::wire::{BundleId, Message};
use tacet_transport::send;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinSet;

use crate::engine::{Space, collect, dealt_steps};
use crate::fail::{Fail, code, fail};
use crate::flow::{Held, Room, channel};
use crate::session::nonce;
use crate::{Link, Party, lock};

/// What the dealer says of a bundle.
pub struct Prepare {
    pub bundle: BundleId,
    pub program: [u8; 32],
    pub tokens: usize,
    pub nonce: [u8; 16],
}

/// One evaluator's half of a bundle.
pub struct Half {
    program: [u8; 32],
    complete: bool,
    pub prg: Prg,
    pub dealt: UnboundedReceiver<Held>,
    /// The task that reads the stream; it ends with this value.
    pub stream: JoinSet<()>,
}

/// Halves that wait.
pub struct Pool {
    halves: Mutex<HashMap<BundleId, Half>>,
    memory: Room,
    most: usize,
}

/// Counts for the operator.
#[derive(Default)]
pub struct Figures {
    pub ready: u64,
    pub dealing: u64,
    pub bytes: u64,
}

/// The generator that an evaluator and the dealer share for one bundle.
pub fn bundle_prg(link: &Link, evaluator: Role, bundle: &BundleId, theirs: &[u8; 16], dealers: &[u8; 16]) -> Prg {
    let label = if evaluator == Role::E1 { "bundle-e1" } else { "bundle-e2" };
    Prg::new(&SessionKey::derive(&link.secret, label, bundle, theirs, dealers))
}

/// Waits until the other side ends a stream or breaks a rule by sending on it.
pub async fn ended(rx: &mut RecvStream) {
    let _ = rx.read_chunk(1, true).await;
}

impl Pool {
    pub fn new(config: &crate::config::Pool) -> Pool {
        Pool {
            halves: Mutex::default(),
            memory: Room::new(config.memory_mb.saturating_mul(1_000_000)),
            most: config.bundles,
        }
    }

    /// Moves a half out for the one session that uses it.
    ///
    /// # Errors
    /// A bundle that is not here, or of another program.
    pub fn take(&self, bundle: &BundleId, program: &Program) -> Result<Half, Fail> {
        let half = lock(&self.halves).remove(bundle);
        half.filter(|h| h.program == program.digest()).ok_or_else(|| {
            fail(
                code::PROTOCOL,
                "the dealer named a bundle that is not here for this program: it was used or dropped, try again",
            )
        })
    }

    pub fn figures(&self) -> Figures {
        let halves = lock(&self.halves);
        let ready = halves.values().filter(|h| h.complete).count() as u64;
        Figures { ready, dealing: halves.len() as u64 - ready, bytes: self.memory.used() as u64 }
    }
}

/// Serves a stream on which the dealer prepares a bundle.
pub async fn prepare(party: Arc<Party>, from: Link, mut tx: SendStream, rx: RecvStream, p: Prepare) {
    match admit(&party, p.tokens, &p.program).await {
        Ok((plan, space)) => start(party, &from, tx, rx, &p, &plan, space),
        Err(Fail { code, text }) => {
            let _ = send(&mut tx, &Message::Failure { code, text }).await;
            let _ = tx.finish();
            let _ = tx.stopped().await;
        }
    }
}

/// Checks a bundle against the limits and sets aside its room.
async fn admit(party: &Arc<Party>, tokens: usize, program: &[u8; 32]) -> Result<(Arc<Program>, Space), Fail> {
    if tokens == 0 || tokens > party.config.limits.tokens {
        return Err(fail(code::REQUEST, format!("{tokens} tokens, but at most {} here", party.config.limits.tokens)));
    }
    let plan = party.program(tokens).await?;
    if plan.digest() != *program {
        return Err(fail(code::DIGEST, "it plans this model differently: run the same release everywhere"));
    }
    let full = || fail(code::BUSY, "no room for another bundle: see [pool] in party.toml");
    if lock(&party.pool.halves).len() >= party.pool.most {
        return Err(full());
    }
    let steps = dealt_steps(&plan, party.config.role);
    let room = party.pool.memory.reserve(steps.iter().map(|s| s.1)).ok_or_else(full)?;
    Ok((plan, Space::Reserved(room)))
}

fn start(party: Arc<Party>, from: &Link, tx: SendStream, rx: RecvStream, p: &Prepare, plan: &Program, space: Space) {
    let role = party.config.role;
    let Ok(ours) = nonce() else { return };
    let ((to, dealt), steps, bundle) = (channel(), dealt_steps(plan, role), p.bundle);
    let prg = bundle_prg(from, role, &bundle, &ours, &p.nonce);
    let (mut tx, mut rx, here) = (tx, rx, Arc::clone(&party));
    let read = async move {
        let kept = async {
            send(&mut tx, &Message::Ready { nonce: ours }).await?;
            collect(&mut rx, steps, space, to).await?;
            if let Some(h) = lock(&here.pool.halves).get_mut(&bundle) {
                h.complete = true;
            }
            ended(&mut rx).await;
            Ok::<(), Fail>(())
        };
        let _ = kept.await;
        let unused = lock(&here.pool.halves).remove(&bundle);
        if let Some(half) = unused {
            here.counters.bundles_dropped.fetch_add(1, Relaxed);
            // Wiping takes a while: beside the network's thread, and before this task and its streams end with the half.
            let _ = tokio::task::spawn_blocking(move || drop(half)).await;
        }
    };
    // The task cannot look for its half before it is here: both happen under the lock.
    let mut halves = lock(&party.pool.halves);
    if halves.len() >= party.pool.most || halves.contains_key(&bundle) {
        return;
    }
    let mut stream = JoinSet::new();
    stream.spawn(read);
    halves.insert(bundle, Half { program: plan.digest(), complete: false, prg, dealt, stream });
}
