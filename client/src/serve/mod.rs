//! The local endpoint: OpenAI's and Ollama's HTTP interfaces in front of private models, on the client's own machine.
//!
//! Requests and answers are plaintext here, so this is part of the client and never of a party. It listens on loopback by
//! default; whoever listens elsewhere needs a token and puts TLS in front. Every request passes the guard (`Host` and
//! `Origin` against DNS rebinding and foreign web pages, then the bearer token), then a bound on what it may hold: body
//! bytes, connections, and running requests. A client that disconnects ends its generation at all parties.
//!
//! A request field that would change the answer and is not supported is refused by name; null and fields without effect
//! are accepted. Nothing of a request is logged: [`Counters`] are all that is kept. Idle caches are reused by
//! whichever request continues them (`pool`), which shows the parties that two requests belong together.
//!
//! Text in HTTP buffers is ordinary memory and not zeroized.

mod error;
mod fields;
mod guard;
mod job;
mod logprobs;
mod ollama;
mod openai;
mod pool;
mod registry;
mod stall;
mod stream;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use axum::response::IntoResponse;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use zeroize::Zeroizing;

use error::ApiError;
use pool::Pool;
use stall::Stalling;
use stream::STALLED;

pub use registry::{About, Embedder, Model, OpenDecoder, Progress, PullError, Puller, Registry, TextModel};

/// How the endpoint behaves.
#[derive(Clone)]
pub struct Config {
    /// Bearer token that every request must carry; `None` asks for none and is refused off loopback.
    pub token: Option<Zeroizing<String>>,
    /// Host names, besides those of loopback, under which the endpoint may be addressed.
    pub hosts: Vec<String>,
    /// Origins (`https://chat.example`), besides those of loopback, whose web pages may call.
    pub origins: Vec<String>,
    /// Most bytes of a request's body.
    pub body_limit: usize,
    /// Most requests that generate or embed at a time; more are told to come back.
    pub running: usize,
    /// Most open connections; more wait.
    pub connections: usize,
    /// Silence after which a stream of events gets a comment, so that proxies and clients keep it open.
    pub heartbeat: Duration,
    /// Most idle conversations whose caches are kept for a next turn.
    pub idle: usize,
    /// How long they are kept, unless a request says otherwise.
    pub keep_alive: Duration,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            token: None,
            hosts: Vec::new(),
            origins: Vec::new(),
            body_limit: 4 << 20,
            running: 4,
            connections: 256,
            heartbeat: Duration::from_secs(10),
            idle: 4,
            keep_alive: Duration::from_secs(300),
        }
    }
}

/// All that is kept about requests.
#[derive(Debug, Default)]
pub struct Counters {
    /// Requests that passed the guard.
    pub requests: AtomicU64,
    /// Answers with an error status.
    pub failed: AtomicU64,
    /// Tokens of prompts that were evaluated, not counting reused ones.
    pub prompt_tokens: AtomicU64,
    /// Generated tokens.
    pub answer_tokens: AtomicU64,
    /// Texts embedded.
    pub embedded: AtomicU64,
    /// Milliseconds spent generating and embedding.
    pub busy_ms: AtomicU64,
}

/// The endpoint's state.
pub struct Endpoint {
    config: Config,
    registry: Registry,
    running: Arc<Semaphore>,
    pool: Pool,
    counters: Counters,
}

impl Endpoint {
    /// An endpoint over these models.
    pub fn new(config: Config, registry: Registry) -> Arc<Endpoint> {
        let (running, pool) = (Arc::new(Semaphore::new(config.running)), Pool::new(config.idle));
        Arc::new(Endpoint { config, registry, running, pool, counters: Counters::default() })
    }

    /// The models.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// What was counted so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Serves until the future is dropped, which closes all connections and ends what they run.
    ///
    /// # Errors
    /// A listener that others can reach, without a token.
    pub async fn serve(self: Arc<Self>, listener: TcpListener) -> io::Result<()> {
        let local: SocketAddr = listener.local_addr()?;
        if !local.ip().is_loopback() && self.config.token.is_none() {
            let text = format!("{local} can be reached by others: set a token, or listen on 127.0.0.1");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let service = TowerToHyperService::new(self.router());
        let slots = Arc::new(Semaphore::new(self.config.connections));
        let mut connections = JoinSet::new();
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        loop {
            let accepted = async {
                let slot = Arc::clone(&slots).acquire_owned().await;
                (slot, listener.accept().await)
            };
            tokio::select! {
                (slot, stream) = accepted => {
                    let Ok((stream, _)) = stream else {
                        // Out of descriptors, most likely: closing connections will help.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    };
                    let _ = stream.set_nodelay(true);
                    let service = service.clone();
                    connections.spawn(async move {
                        let _slot = slot;
                        // An error here is a client that left, does not read, or does not speak HTTP.
                        let _ = connection(Stalling::new(stream, STALLED), service).await;
                    });
                }
                _ = tick.tick() => {
                    self.pool.expire();
                    while connections.try_join_next().is_some() {}
                }
            }
        }
    }

    /// The routes of both dialects behind the guard.
    pub fn router(self: &Arc<Self>) -> Router {
        let refuse =
            |status, message: &'static str| move || async move { ApiError::new(status, message).into_response() };
        Router::new()
            .merge(openai::routes())
            .merge(ollama::routes())
            .fallback(refuse(404, "there is no such route"))
            .method_not_allowed_fallback(refuse(405, "this route does not take that method"))
            .layer(axum::middleware::from_fn_with_state(Arc::clone(self), guard::guard))
            .with_state(Arc::clone(self))
    }

    /// A slot to run in.
    fn permit(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        Arc::clone(&self.running).try_acquire_owned().map_err(|_| ApiError::busy())
    }

    fn count(&self, counter: impl Fn(&Counters) -> &AtomicU64, n: u64) {
        counter(&self.counters).fetch_add(n, Ordering::Relaxed);
    }
}

/// One connection's requests, until it ends.
async fn connection<S>(stream: Stalling<S>, service: TowerToHyperService<Router>) -> hyper::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(Duration::from_secs(60)).max_buf_size(64 << 10);
    http.serve_connection(TokioIo::new(stream), service).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use tokio::time::timeout;

    const REQUEST: &[u8] = b"GET /api/version HTTP/1.1\r\nhost: localhost\r\n\r\n";

    fn service() -> TowerToHyperService<Router> {
        TowerToHyperService::new(Endpoint::new(Config::default(), Registry::default()).router())
    }

    #[tokio::test]
    async fn a_client_that_reads_none_of_its_answers_is_dropped() {
        let (mut client, server) = duplex(1 << 10);
        let serving = tokio::spawn(connection(Stalling::new(server, Duration::from_millis(100)), service()));
        let dropped = async {
            while client.write_all(REQUEST).await.is_ok() {}
            serving.await.unwrap().unwrap_err()
        };
        let e = timeout(Duration::from_secs(30), dropped).await.expect("in time");
        assert!(format!("{e:?}").contains("TimedOut"), "{e:?}");
    }

    #[tokio::test]
    async fn a_client_that_reads_is_answered_after_any_silence() {
        let (mut client, server) = duplex(64);
        let serving = tokio::spawn(connection(Stalling::new(server, Duration::from_millis(100)), service()));
        for _ in 0..3 {
            client.write_all(REQUEST).await.unwrap();
            let mut seen = Vec::new();
            while !seen.ends_with(b"}") {
                seen.push(client.read_u8().await.unwrap());
            }
            assert!(seen.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&seen));
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        drop(client);
        serving.await.unwrap().unwrap();
    }
}
