//! The party server: one role of a lane, its links to the two others, and the sessions of its clients.
//!
//! Who sees what: a dealer receives shapes and nonces, never an opening or an input; an evaluator receives its sealed half
//! of each input, the other's openings and the dealer's corrections. Nothing of a session is written to disk or logged
//! beyond counts and timings; of what is dealt ahead, ciphertext may be. A party runs its network on one thread; each
//! session's arithmetic has a thread of its own.
#![forbid(unsafe_code)]

mod ahead;
pub mod clock;
mod compute;
pub mod config;
mod course;
mod engine;
mod fail;
mod flow;
mod generate;
mod http;
mod meeting;
mod mesh;
pub mod plans;
mod pool;
mod session;
mod spool;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use quinn::Connection;
use tacet_protocol::plan::{Keep, Progress, Shelf};
use tacet_protocol::program::Program;
use tacet_protocol::programs::Programs;
use tacet_protocol::seal::SealKeyPair;
use tacet_protocol::wire::SessionId;
use tacet_protocol::{Role, lock};
use tacet_transport::{Identity, TransportError, accept_config, certificate_from_pem, endpoint};
use tokio::sync::Semaphore;
use zeroize::Zeroizing;

use config::{Clients, Config};
use plans::Plans;

/// Why a party does not start or stops.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PartyError {
    /// The configuration or a file it names.
    #[error("configuration: {0}")]
    Config(String),
    /// The model or its plan.
    #[error(transparent)]
    Protocol(#[from] tacet_protocol::Error),
    /// Sockets and certificates.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The operating system.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// A live connection to another party.
#[derive(Clone)]
struct Link {
    connection: Connection,
    /// X25519 secret of this connection's fresh ephemeral keys; session keys of the evaluator-dealer pair derive from it.
    secret: Arc<Zeroizing<[u8; 32]>>,
}

impl Link {
    /// Whether both are the same connection.
    fn same(&self, other: &Link) -> bool {
        Arc::ptr_eq(&self.secret, &other.secret)
    }
}

#[derive(Default)]
struct Counters {
    accepted: AtomicU64,
    refused: AtomicU64,
    completed: AtomicU64,
    failed: AtomicU64,
    opened: AtomicU64,
    dealt: AtomicU64,
    dealt_fresh: AtomicU64,
    bundles_used: AtomicU64,
    bundles_dropped: AtomicU64,
}

struct Party {
    config: Config,
    clients: Clients,
    model: [u8; 32],
    plan: [u8; 32],
    plans: Plans,
    seal: SealKeyPair,
    compute: Arc<compute::Compute>,
    programs: Arc<Programs>,
    links: Mutex<HashMap<Role, Link>>,
    /// Why a link is down, by peer name.
    trouble: Mutex<HashMap<String, String>>,
    meeting: meeting::Meeting,
    /// Bundles dealt ahead: an evaluator's halves, and the dealer's list of both.
    pool: pool::Pool,
    stock: ahead::Stock,
    /// Sessions that run here.
    permits: Arc<Semaphore>,
    /// Requests that wait for the other parties.
    waiting: Arc<Semaphore>,
    /// Connections of clients, and of anyone who has not shown yet to be a peer.
    connections: Arc<Semaphore>,
    recent: Mutex<(HashSet<SessionId>, VecDeque<SessionId>)>,
    draining: AtomicBool,
    counters: Counters,
}

/// Requests that may wait for the other parties, for each session that may run.
const WAITING: usize = 16;

impl Party {
    /// The program for a length, from a small cache; planned beside the network's thread.
    async fn program(&self, tokens: usize) -> Result<Arc<Program>, fail::Fail> {
        if let Some(p) = self.programs.made(tokens) {
            return Ok(p);
        }
        let (programs, plans) = (Arc::clone(&self.programs), self.plans.clone());
        let planned = tokio::task::spawn_blocking(move || programs.get(tokens, || plans.first(tokens))).await;
        Ok(planned.map_err(|_| fail::fail(fail::code::PROTOCOL, "planning stopped"))??)
    }

    /// Who holds a permit of this takes part: E1 decides who runs, the others hold a request until E1's stream for it comes.
    fn gate(&self) -> &Arc<Semaphore> {
        if self.config.role == Role::E1 { &self.permits } else { &self.waiting }
    }

    fn link(&self, role: Role) -> Option<Link> {
        lock(&self.links).get(&role).filter(|l| l.connection.close_reason().is_none()).cloned()
    }

    fn ready(&self) -> bool {
        !self.draining.load(Ordering::Relaxed) && self.config.peer.iter().all(|p| self.link(p.role).is_some())
    }
}

/// Runs a party until SIGTERM or SIGINT, then lets running sessions finish within the drain time; `planning` hears how its
/// model's plan comes about.
///
/// # Errors
/// A configuration, model or socket that cannot be used.
pub async fn serve(config: Config, planning: fn(Progress)) -> Result<(), PartyError> {
    // The dealer makes masks and corrections of shapes and scales.
    let keep = if config.role == Role::Dealer { Keep::Shapes } else { Keep::Weights };
    let shelf = config.plans.as_ref().filter(|dir| !dir.as_os_str().is_empty()).map(Shelf::new);
    let (plans, model) = Plans::load(&config.model, keep, shelf.as_ref(), &planning)?;
    let identity = Identity::from_pem(&config::read(&config.certificate)?, &config::read(&config.key)?)?;
    let seal = config::unhex(&config::read(&config.seal_key)?)
        .ok_or_else(|| PartyError::Config(format!("{}: 64 hex digits expected", config.seal_key.display())))?;
    let mut pins = Vec::new();
    for p in &config.peer {
        pins.push(certificate_from_pem(&config::read(&p.certificate)?)?);
    }
    let compute = Arc::new(compute::Compute::open(config.backend, config.threads)?);
    let shortest = plans.first(8)?;
    // A dealer needs no weights. An evaluator's adapter has them, or has said why not, before the party says that it is ready.
    if config.role != Role::Dealer {
        compute.prepare(&shortest)?;
    }
    let quic = endpoint(config.listen, Some(accept_config(&identity, pins.clone())?))?;
    let http = match config.http {
        Some(addr) => Some(tokio::net::TcpListener::bind(addr).await?),
        None => None,
    };
    let party = Arc::new(Party {
        clients: Clients::load(&config.clients)?,
        model,
        plan: shortest.digest(),
        plans,
        seal: SealKeyPair::from_secret(seal),
        compute,
        programs: Arc::default(),
        links: Mutex::default(),
        trouble: Mutex::default(),
        meeting: meeting::Meeting::default(),
        pool: pool::Pool::open(&config)?,
        stock: ahead::Stock::new(&config.pool),
        permits: Arc::new(Semaphore::new(config.limits.sessions)),
        waiting: Arc::new(Semaphore::new(config.limits.sessions * WAITING)),
        connections: Arc::new(Semaphore::new(config.limits.connections)),
        recent: Mutex::default(),
        draining: AtomicBool::new(false),
        counters: Counters::default(),
        config,
    });
    if let Some(l) = http {
        tokio::spawn(http::serve(Arc::clone(&party), l));
    }
    for (peer, pin) in party.config.peer.clone().into_iter().zip(&pins) {
        if mesh::dials(party.config.role, peer.role) {
            let dial = tacet_transport::dial_config(pin.clone(), Some(&identity))?;
            tokio::spawn(mesh::keep_dialling(Arc::clone(&party), quic.clone(), peer, dial));
        }
    }
    // A sequence is dealt ahead of its client, not of its session.
    if party.config.role == Role::Dealer && matches!(party.plans, Plans::Encoder(_)) {
        tokio::spawn(ahead::keep(Arc::clone(&party)));
    }
    let (c, backend) = (&party.config, party.compute.name());
    eprintln!("listening role={:?} name={} listen={} backend={backend:?}", c.role, c.name, c.listen);
    let mut term = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    loop {
        tokio::select! {
            incoming = quic.accept() => match incoming {
                Some(i) => { tokio::spawn(mesh::accepted(Arc::clone(&party), i, pins.clone())); }
                None => break,
            },
            _ = term.recv() => break,
            _ = tokio::signal::ctrl_c() => break,
        }
    }
    party.draining.store(true, Ordering::Relaxed);
    let all = party.config.limits.sessions * if party.config.role == Role::E1 { 1 } else { WAITING };
    let drained =
        tokio::time::timeout(Duration::from_secs(party.config.limits.drain_s), party.gate().acquire_many(all as u32))
            .await;
    eprintln!("stopping name={} drained={}", party.config.name, drained.is_ok());
    quic.close(0u32.into(), b"stopping");
    quic.wait_idle().await;
    Ok(())
}
