//! Dealing ahead, the evaluator's end: halves of bundles that wait, in memory or on disk, for the session that uses them.
//!
//! A *bundle* is one dealing of a whole program. The dealer opens a stream to each evaluator and names the bundle
//! (`Prepare`); the evaluator sets aside the exact bytes it will receive, answers with a nonce of its own (`Ready`), and
//! keeps the steps that follow: in memory, and where that is full as ciphertext in a file (see [`crate::spool`]). Each
//! evaluator decides that by itself, and no one else can tell. When both evaluators have joined a session, the dealer names the bundle to both (`Start`).
//!
//! **Who sees what.** Prepare carries a random name, a length and the digest of a public program; the steps are
//! the same correlated randomness that a session would receive while it runs. All of it is drawn before any input exists,
//! so a bundle says nothing about a query; which length is dealt ahead follows from the lengths asked for before, which
//! all parties know. A disk sees ciphertext under a key of this process. Openings go between the evaluators as ever, and the dealer still receives nothing that depends on data.
//!
//! **Why no mask repeats.** Both ends derive the bundle's key from the secret of the link that carries the stream (fresh
//! X25519 keys of that connection), the bundle's name and a fresh nonce of each end, under a label that no session uses.
//! A half is *moved* out of the pool, generator included, by the one session that the dealer names it to; the dealer moves
//! its own end in the same way. A name that is unknown, used already or of another program ends the session.
//!
//! **Lifetime.** A half lives as long as its stream. When the link breaks, the dealer restarts or drops the bundle, the
//! stream ends and the half is wiped; when the half is used or this process ends, the dealer sees that in turn.
//!
//! **Bounds.** `[pool] memory_mb` bounds the payload bytes of halves in memory, `[pool] spool_mb` those on disk, `[pool]
//! bundles` the number of both; a bundle that fits neither is refused before its first byte. On their way to the disk, steps
//! of all bundles take `limits.buffer_mb` between them, or one of them more; on their way back a session's take that.

use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};

use quinn::{RecvStream, SendStream};
use tacet_protocol::Role;
use tacet_protocol::prg::{Prg, SessionKey};
use tacet_protocol::program::Program;
use tacet_protocol::wire::{BundleId, Message};
use tacet_transport::{receive_step, send};
use tokio::runtime::Handle;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::config::Config;
use crate::engine::{Space, collect, dealt_steps};
use crate::fail::{Fail, code, fail};
use crate::flow::{Held, Permit, Room, channel};
use crate::session::{FAREWELL, nonce};
use crate::spool::{Reader, Spool, SpoolError, Writer};
use crate::{Link, Party, PartyError, engine, lock};

/// What the dealer says of a bundle.
pub struct Prepare {
    pub bundle: BundleId,
    pub program: [u8; 32],
    pub tokens: usize,
    pub nonce: [u8; 16],
}

/// Where the steps of a half wait.
pub enum Kept {
    Memory(UnboundedReceiver<Held>),
    Disk(Reader),
}

/// One evaluator's half of a bundle.
pub struct Half {
    program: [u8; 32],
    complete: bool,
    pub prg: Prg,
    pub dealt: Kept,
    /// The task that reads the stream; it ends with this value.
    pub stream: JoinSet<()>,
}

/// Halves that wait.
pub struct Pool {
    halves: Mutex<HashMap<BundleId, Half>>,
    memory: Room,
    spool: Option<Arc<Spool>>,
    /// For steps on their way to the disk.
    arriving: Room,
    most: usize,
}

/// Counts for the operator.
#[derive(Default)]
pub struct Figures {
    pub ready: u64,
    pub dealing: u64,
    pub bytes: u64,
    /// Bundles on disk, and their bytes there.
    pub spooled: (u64, u64),
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
    /// An empty pool.
    ///
    /// # Errors
    /// A folder for bundles that cannot be used.
    pub fn open(config: &Config) -> Result<Pool, PartyError> {
        let c = &config.pool;
        // The dealer keeps no dealt bytes.
        let dir = c.spool_dir.as_ref().filter(|_| c.spool_mb > 0 && config.role != Role::Dealer);
        let spool = dir.map(|dir| Spool::open(dir, c.spool_mb as u64 * 1_000_000).map(Arc::new)).transpose()?;
        Ok(Pool {
            halves: Mutex::default(),
            memory: Room::new(c.memory_mb.saturating_mul(1_000_000)),
            spool,
            arriving: Room::new(config.limits.buffer()),
            most: c.bundles,
        })
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
        let spooled = self.spool.as_ref().map_or((0, 0), |s| s.used());
        Figures { ready, dealing: halves.len() as u64 - ready, bytes: self.memory.used() as u64, spooled }
    }

    /// Drops the halves on disk that no session has, and says how many; their streams end with them.
    fn drop_spooled(&self) -> usize {
        let mut halves = lock(&self.halves);
        let all = halves.len();
        halves.retain(|_, h| matches!(h.dealt, Kept::Memory(_)));
        all - halves.len()
    }
}

/// Serves a stream on which the dealer prepares a bundle.
pub async fn prepare(party: Arc<Party>, from: Link, mut tx: SendStream, rx: RecvStream, p: Prepare) {
    match admit(&party, p.tokens, &p.program).await {
        Ok((plan, place)) => start(party, &from, tx, rx, &p, &plan, place),
        Err(Fail { code, text }) => {
            let told = async {
                let _ = send(&mut tx, &Message::Failure { code, text }).await;
                let _ = tx.finish();
                let _ = tx.stopped().await;
            };
            let _ = timeout(FAREWELL, told).await;
        }
    }
}

/// Room for a bundle that was set aside.
enum Place {
    Memory(Vec<Permit>),
    Disk(Writer, Reader),
}

/// Checks a bundle against the limits and sets aside its room.
async fn admit(party: &Arc<Party>, tokens: usize, program: &[u8; 32]) -> Result<(Arc<Program>, Place), Fail> {
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
    if let Some(room) = party.pool.memory.reserve(steps.iter().map(|s| s.1)) {
        return Ok((plan, Place::Memory(room)));
    }
    let spool = Arc::clone(party.pool.spool.as_ref().ok_or_else(full)?);
    // A file is made beside the network's thread.
    let file = tokio::task::spawn_blocking(move || spool.claim(&steps)).await;
    let (writer, reader) = file.ok().flatten().ok_or_else(full)?;
    Ok((plan, Place::Disk(writer, reader)))
}

/// Receives a bundle's steps in order and writes them to the disk.
async fn spool(rx: &mut RecvStream, steps: Vec<(u32, usize)>, room: &Room, mut writer: Writer) -> Result<(), Fail> {
    for (step, len) in steps {
        let permit = room.wait(len).await;
        let bytes = receive_step(rx, step, len).await?;
        // A thread is held for the writing alone: a stream that stalls takes none.
        let put = tokio::task::spawn_blocking(move || {
            let writer = writer.put(bytes);
            drop(permit);
            writer
        });
        writer = put.await.map_err(|_| fail(code::PROTOCOL, "the writing of a bundle stopped"))??;
    }
    Ok(())
}

/// Reads a half from the disk ahead of the session that takes its steps, bounded by `room`.
///
/// # Errors
/// What was written is not there any more. No other half on disk is trusted then: those that wait are dropped.
pub async fn unspool(party: &Party, reader: Reader, room: Room, to: UnboundedSender<Held>) -> Result<(), Fail> {
    // The engine finds its channel open until the reason is told here.
    let (open, handle, (done_tx, done)) = (to.clone(), Handle::current(), oneshot::channel());
    engine::spawn("spool", move || {
        let _ = done_tx.send(reader.run(&room, &to, &handle));
    })?;
    let read = done.await.map_err(|_| fail(code::PROTOCOL, "the reading of a bundle stopped"))?;
    if read.as_ref().is_err_and(SpoolError::is_fault) {
        let dropped = party.pool.drop_spooled();
        party.counters.bundles_dropped.fetch_add(dropped as u64, Relaxed);
    }
    drop(open);
    Ok(read?)
}

fn start(party: Arc<Party>, from: &Link, tx: SendStream, rx: RecvStream, p: &Prepare, plan: &Program, place: Place) {
    let role = party.config.role;
    let Ok(ours) = nonce() else { return };
    let ((to, waits), steps, bundle) = (channel(), dealt_steps(plan, role), p.bundle);
    let prg = bundle_prg(from, role, &bundle, &ours, &p.nonce);
    let (mut tx, mut rx, here) = (tx, rx, Arc::clone(&party));
    let (room, writer, dealt) = match place {
        Place::Memory(room) => (room, None, Kept::Memory(waits)),
        Place::Disk(writer, reader) => (Vec::new(), Some(writer), Kept::Disk(reader)),
    };
    let read = async move {
        let kept = async {
            send(&mut tx, &Message::Ready { nonce: ours }).await?;
            match writer {
                Some(writer) => spool(&mut rx, steps, &here.pool.arriving, writer).await?,
                None => collect(&mut rx, steps, Space::Reserved(room), to).await?,
            }
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
