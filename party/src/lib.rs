//! The party server: one role of a lane, its links to the two others, and the sessions of its clients.
//!
//! Who sees what: a dealer receives shapes and nonces, never an opening or an input; an evaluator receives its sealed half
//! of each input, the other's openings and the dealer's corrections. Nothing of a session is written to disk or logged
//! beyond counts and timings. A party runs its network on one thread; each session's arithmetic has a thread of its own.
#![forbid(unsafe_code)]

pub mod config;
mod http;
mod mesh;
mod session;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use quinn::Connection;
use tacet_protocol::Role;
use tacet_protocol::model::BertModel;
use tacet_protocol::plan::Planner;
use tacet_protocol::program::Program;
use tacet_protocol::seal::SealKeyPair;
use tacet_protocol::wire::SessionId;
use tacet_transport::{Identity, TransportError, accept_config, certificate_from_pem, endpoint};
use tokio::sync::{RwLock, Semaphore};
use zeroize::Zeroizing;

use config::{Clients, Config};

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

#[derive(Default)]
struct Counters {
    accepted: AtomicU64,
    refused: AtomicU64,
    completed: AtomicU64,
    failed: AtomicU64,
    opened: AtomicU64,
    dealt: AtomicU64,
}

/// Requests that may wait for the other parties, for each session that may run.
const WAITING: u32 = 16;

struct Party {
    config: Config,
    clients: Clients,
    model: [u8; 32],
    plan: [u8; 32],
    planner: Planner,
    seal: SealKeyPair,
    programs: Mutex<HashMap<usize, Arc<Program>>>,
    links: Mutex<HashMap<Role, Link>>,
    /// Why a link is down, by peer name.
    trouble: Mutex<HashMap<String, String>>,
    meeting: session::Meeting,
    /// Sessions that run here.
    permits: Arc<Semaphore>,
    /// Requests that wait for the other parties.
    waiting: Arc<Semaphore>,
    recent: Mutex<(HashSet<SessionId>, VecDeque<SessionId>)>,
    draining: AtomicBool,
    /// Held shared by every stream of a client until the client has its answer.
    answering: RwLock<()>,
    counters: Counters,
}

/// Locks ignoring poison: every critical section leaves its data whole.
fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Party {
    /// The program for a length, from a small cache.
    fn program(&self, tokens: usize) -> Result<Arc<Program>, tacet_protocol::Error> {
        if let Some(p) = lock(&self.programs).get(&tokens) {
            return Ok(Arc::clone(p));
        }
        let p = Arc::new(self.planner.program(tokens)?);
        let mut cache = lock(&self.programs);
        if cache.len() >= 64 {
            cache.clear();
        }
        cache.insert(tokens, Arc::clone(&p));
        Ok(p)
    }

    fn link(&self, role: Role) -> Option<Link> {
        lock(&self.links).get(&role).filter(|l| l.connection.close_reason().is_none()).cloned()
    }

    fn ready(&self) -> bool {
        !self.draining.load(Ordering::Relaxed) && self.config.peer.iter().all(|p| self.link(p.role).is_some())
    }
}

/// Runs a party until SIGTERM or SIGINT, then lets running sessions finish within the drain time.
///
/// # Errors
/// A configuration, model or socket that cannot be used.
pub async fn serve(config: Config) -> Result<(), PartyError> {
    let model = BertModel::load(&config.model)?;
    let planner = Planner::new(&model)?;
    let identity = Identity::from_pem(&config::read(&config.certificate)?, &config::read(&config.key)?)?;
    let seal = config::unhex(&config::read(&config.seal_key)?)
        .ok_or_else(|| PartyError::Config(format!("{}: 64 hex digits expected", config.seal_key.display())))?;
    let mut pins = Vec::new();
    for p in &config.peer {
        pins.push(certificate_from_pem(&config::read(&p.certificate)?)?);
    }
    let quic = endpoint(config.listen, Some(accept_config(&identity, pins.clone())?))?;
    let http = match config.http {
        Some(addr) => Some(tokio::net::TcpListener::bind(addr).await?),
        None => None,
    };
    let party = Arc::new(Party {
        clients: config::parse(&config.clients)?,
        model: model.digest(),
        plan: planner.program(8)?.digest(),
        planner,
        seal: SealKeyPair::from_secret(seal),
        programs: Mutex::default(),
        links: Mutex::default(),
        trouble: Mutex::default(),
        meeting: session::Meeting::default(),
        permits: Arc::new(Semaphore::new(config.limits.sessions)),
        waiting: Arc::new(Semaphore::new(config.limits.sessions * WAITING as usize)),
        recent: Mutex::default(),
        draining: AtomicBool::new(false),
        answering: RwLock::default(),
        counters: Counters::default(),
        config,
    });
    drop(model);
    if let Some(l) = http {
        tokio::spawn(http::serve(Arc::clone(&party), l));
    }
    for (peer, pin) in party.config.peer.clone().into_iter().zip(&pins) {
        if mesh::dials(party.config.role, peer.role) {
            let dial = tacet_transport::dial_config(pin.clone(), Some(&identity))?;
            tokio::spawn(mesh::keep_dialling(Arc::clone(&party), quic.clone(), peer, dial));
        }
    }
    eprintln!("listening role={:?} name={} listen={}", party.config.role, party.config.name, party.config.listen);
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
    let all = party.config.limits.sessions as u32;
    // Sessions that run, then those that E1 admitted and that have not begun here, then answers on their way. Requests that
    // come meanwhile are refused, so the last step waits for nothing new.
    let finished = async {
        let _ = party.permits.acquire_many(all).await;
        let _ = party.waiting.acquire_many(all * WAITING).await;
        drop(party.answering.write().await);
    };
    let drained = tokio::time::timeout(Duration::from_secs(party.config.limits.drain_s), finished).await;
    eprintln!("stopping name={} drained={}", party.config.name, drained.is_ok());
    quic.close(0u32.into(), b"stopping");
    quic.wait_idle().await;
    Ok(())
}
