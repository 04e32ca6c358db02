//! Dealing ahead, the dealer's end: which bundles to make, when, and which session gets one.
//!
//! See [`crate::pool`] for what a bundle is, who sees what and why no mask repeats. The dealer keeps no dealt bytes: of a
//! bundle it holds the two streams, which end when the bundle is dropped here, and a figure of what it cost.
//!
//! Policy: the lengths asked for last come first, `[pool] depth` bundles of each; `[pool] prefill` stands in for queries
//! before the first ones. One bundle is dealt at a time, and its dealing pauses between steps while a session runs here,
//! unless that session was given the bundle. Where an evaluator has no room, bundles of less recent lengths make way.

use std::collections::VecDeque;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use quinn::{RecvStream, SendStream};
use tacet_protocol::Role;
use tacet_protocol::program::Program;
use tacet_protocol::query::padded;
use tacet_protocol::wire::{BundleId, CONTROL_LIMIT, Message};
use tacet_transport::{receive, send};
use tokio::sync::{Notify, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::engine::{self, Dealt, Pace};
use crate::fail::{Fail, code, fail};
use crate::pool::{Figures, bundle_prg, ended};
use crate::session::{link, nonce};
use crate::{Link, Party, lock};

/// Lengths remembered as asked for.
const LENGTHS: usize = 16;
/// When to look again although nothing was reported: an evaluator may have made room for another reason.
const AGAIN: Duration = Duration::from_secs(10);

/// A bundle whose halves lie at the evaluators, or are on their way there.
pub struct Bundle {
    pub id: BundleId,
    tokens: usize,
    program: [u8; 32],
    /// The links that carry the halves: a session over newer ones cannot use it.
    links: [Link; 2],
    bytes: u64,
    handed: watch::Sender<bool>,
    dealt: watch::Receiver<Option<Dealt>>,
    /// Holds the streams; ends with this value.
    task: JoinSet<()>,
    live: oneshot::Sender<()>,
}

impl Bundle {
    /// Lets the dealing run on while a session waits for it, and waits for its end.
    ///
    /// # Errors
    /// The bundle's streams broke.
    pub async fn finish(&mut self) -> Result<Dealt, Fail> {
        let _ = self.handed.send(true);
        let dealt = self.dealt.wait_for(Option::is_some).await.ok().and_then(|d| *d);
        dealt.ok_or_else(|| fail(code::PEER, "an evaluator dropped the bundle of this session"))
    }

    /// Drops the bundle and waits until the evaluators have.
    async fn retire(mut self) {
        drop(self.live);
        self.task.join_next().await;
    }
}

#[derive(Default)]
struct Inner {
    /// Lengths to keep ready, the most recent first.
    wanted: VecDeque<usize>,
    bundles: Vec<Bundle>,
}

/// Bundles that no session has yet.
pub struct Stock {
    inner: Mutex<Inner>,
    sessions: watch::Sender<usize>,
    changed: Notify,
    depth: usize,
    most: usize,
}

/// A session that runs here: dealing ahead pauses until it is dropped.
pub struct Busy<'a>(&'a Stock);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.sessions.send_modify(|n| *n -= 1);
        self.0.changed.notify_one();
    }
}

impl Stock {
    pub fn new(config: &crate::config::Pool) -> Stock {
        let lengths = config.prefill.iter().filter_map(|t| padded(*t)).take(LENGTHS);
        let inner = Inner { wanted: lengths.collect(), bundles: Vec::new() };
        Stock {
            inner: Mutex::new(inner),
            sessions: watch::Sender::new(0),
            changed: Notify::new(),
            depth: config.depth,
            most: config.bundles,
        }
    }

    pub fn busy(&self) -> Busy<'_> {
        self.sessions.send_modify(|n| *n += 1);
        Busy(self)
    }

    /// A link is up or down, or a bundle went.
    pub fn changed(&self) {
        self.changed.notify_one();
    }

    /// Moves out a bundle for a session of this program whose evaluators joined over `links`, and remembers the length.
    pub fn take(&self, program: &Program, links: [&Link; 2]) -> Option<Bundle> {
        let mut s = lock(&self.inner);
        let tokens = program.tokens();
        s.wanted.retain(|t| *t != tokens);
        s.wanted.push_front(tokens);
        s.wanted.truncate(LENGTHS);
        let fits = |b: &Bundle| b.program == program.digest() && b.links.iter().zip(links).all(|(a, b)| a.same(b));
        // The oldest is dealt the furthest.
        let at = s.bundles.iter().position(fits)?;
        Some(s.bundles.remove(at))
    }

    /// The next length to deal, if any: the most recent one that is short of `depth` and not among those refused.
    fn next(&self, refused: &[usize]) -> Option<usize> {
        let s = lock(&self.inner);
        let have = |t: usize| s.bundles.iter().filter(|b| b.tokens == t).count();
        s.wanted.iter().copied().find(|t| have(*t) < self.depth && !refused.contains(t))
    }

    /// Moves out a bundle of a length less recent than `tokens`, to make way for one of that.
    fn least_recent(&self, tokens: usize) -> Option<Bundle> {
        let mut s = lock(&self.inner);
        let rank = |t: usize| s.wanted.iter().position(|w| *w == t).unwrap_or(usize::MAX);
        let (worst, at) = s.bundles.iter().enumerate().map(|(i, b)| (rank(b.tokens), i)).max()?;
        if worst > rank(tokens) { Some(s.bundles.remove(at)) } else { None }
    }

    fn remove(&self, id: &BundleId) -> Option<Bundle> {
        let mut s = lock(&self.inner);
        let at = s.bundles.iter().position(|b| b.id == *id)?;
        Some(s.bundles.remove(at))
    }

    fn full(&self) -> bool {
        lock(&self.inner).bundles.len() >= self.most
    }

    pub fn figures(&self) -> Figures {
        let s = lock(&self.inner);
        let ready = s.bundles.iter().filter(|b| b.dealt.borrow().is_some()).count() as u64;
        let bytes = s.bundles.iter().map(|b| b.bytes).sum();
        Figures { ready, dealing: s.bundles.len() as u64 - ready, bytes, spooled: (0, 0) }
    }
}

/// Keeps the stock up while the party runs.
pub async fn keep(party: Arc<Party>) {
    let stock = &party.stock;
    let mut refused = Vec::new();
    loop {
        let may = party.ready() && *stock.sessions.borrow() == 0;
        let Some(tokens) = stock.next(&refused).filter(|_| may) else {
            let _ = timeout(AGAIN, stock.changed.notified()).await;
            refused.clear();
            continue;
        };
        let made = if stock.full() {
            Err(fail(code::BUSY, "all bundles of [pool] are there"))
        } else {
            make(&party, tokens).await
        };
        match made {
            Ok(()) => {}
            Err(f) => match stock.least_recent(tokens).filter(|_| f.code == code::BUSY) {
                Some(b) => {
                    b.retire().await;
                    party.counters.bundles_dropped.fetch_add(1, Relaxed);
                }
                None => refused.push(tokens),
            },
        }
    }
}

/// Asks one evaluator to make room for its half, which it has so long to answer: what is dealt ahead waits for it.
async fn ask(link: &Link, prepare: Message, limit: Duration) -> Result<(SendStream, RecvStream, [u8; 16]), Fail> {
    let late = |_| fail(code::PEER, "an evaluator does not say whether it has room for a bundle");
    timeout(limit, asked(link, prepare)).await.map_err(late)?
}

async fn asked(link: &Link, prepare: Message) -> Result<(SendStream, RecvStream, [u8; 16]), Fail> {
    let (mut tx, mut rx) = link.connection.open_bi().await.map_err(|e| fail(code::PEER, e.to_string()))?;
    send(&mut tx, &prepare).await?;
    match receive(&mut rx, CONTROL_LIMIT).await? {
        Message::Ready { nonce } => Ok((tx, rx, nonce)),
        Message::Failure { code, text } => Err(fail(code, text)),
        m => Err(fail(code::PROTOCOL, format!("{m:?} in place of readiness"))),
    }
}

async fn either(a: &mut RecvStream, b: &mut RecvStream) {
    tokio::select! {
        () = ended(a) => {}
        () = ended(b) => {}
    }
}

/// Makes one bundle and waits until it is dealt, or gone.
///
/// # Errors
/// The evaluators' refusals, with their code, and broken links.
async fn make(party: &Arc<Party>, tokens: usize) -> Result<(), Fail> {
    let plan = party.program(tokens).await?;
    let links = [link(party, Role::E1)?, link(party, Role::E2)?];
    let (id, ours) = (nonce()?, nonce()?);
    let prepare = || Message::Prepare { bundle: id, program: plan.digest(), tokens: tokens as u32, nonce: ours };
    // Both answers are awaited, and a half that came to nothing is wiped before the next is asked for: a refusal then
    // tells of bundles that are in use.
    let both = async {
        let limit = Duration::from_secs(party.config.limits.join_s);
        match tokio::join!(ask(&links[0], prepare(), limit), ask(&links[1], prepare(), limit)) {
            (Ok(a), Ok(b)) => Ok((a, b)),
            (Ok((mut tx, mut rx, _)), Err(f)) | (Err(f), Ok((mut tx, mut rx, _))) => {
                let _ = tx.finish();
                ended(&mut rx).await;
                Err(f)
            }
            (Err(f), Err(_)) => Err(f),
        }
    };
    let limit = Duration::from_secs(party.config.limits.join_s);
    let ((mut tx1, mut rx1, n1), (mut tx2, mut rx2, n2)) =
        timeout(limit, both).await.map_err(|_| fail(code::DEADLINE, "an evaluator does not answer"))??;
    let prg = [bundle_prg(&links[0], Role::E1, &id, &n1, &ours), bundle_prg(&links[1], Role::E2, &id, &n2, &ours)];
    let ((handed_tx, handed), (dealt_tx, dealt)) = (watch::channel(false), watch::channel(None));
    let pace = Pace { sessions: party.stock.sessions.subscribe(), handed };
    let (live, retired) = oneshot::channel::<()>();
    let (here, program, bytes) = (Arc::clone(party), plan.digest(), plan.cost().dealt_bytes.iter().sum());
    let work = async move {
        let (buffer, waited_for) = (here.config.limits.buffer(), pace.handed.clone());
        let compute = Arc::clone(&here.compute);
        let dealt = {
            let dealing = engine::deal(plan, prg, [&mut tx1, &mut tx2], buffer, Some(pace), None, compute);
            tokio::pin!(dealing);
            tokio::select! {
                biased;
                d = &mut dealing => d.ok(),
                // A session's evaluators may be done before the dealing's thread has said that it is; if they gave up,
                // writing to them fails.
                () = either(&mut rx1, &mut rx2) => if *waited_for.borrow() { dealing.await.ok() } else { None },
            }
        };
        if let Some(d) = dealt {
            here.counters.dealt.fetch_add(d.bytes.iter().sum(), Relaxed);
            let _ = dealt_tx.send(Some(d));
            tokio::select! {
                () = either(&mut rx1, &mut rx2) => {}
                _ = retired => {}
            }
        }
        // Held to the end of this task, which it aborts.
        let unused = here.stock.remove(&id);
        // Where one half is gone the other goes too; an evaluator ends its stream after it has wiped its half.
        let _ = (tx1.finish(), tx2.finish());
        let _ = timeout(AGAIN, async { tokio::join!(ended(&mut rx1), ended(&mut rx2)) }).await;
        if unused.is_some() {
            here.counters.bundles_dropped.fetch_add(1, Relaxed);
        }
        if dealt.is_some() {
            here.stock.changed();
        }
    };
    let mut done = dealt.clone();
    {
        // The task cannot look for its bundle before it is here: both happen under the lock.
        let mut s = lock(&party.stock.inner);
        let mut task = JoinSet::new();
        task.spawn(work);
        s.bundles.push(Bundle { id, tokens, program, links, bytes, handed: handed_tx, dealt, task, live });
    }
    let dealt = done.wait_for(Option::is_some).await.is_ok();
    if dealt { Ok(()) } else { Err(fail(code::PEER, "the bundle was dropped before it was dealt")) }
}
