//! Where a peer's stream waits for the client's request, or the other way round.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use quinn::{RecvStream, SendStream};
use tacet_protocol::Role;
use tacet_protocol::wire::SessionId;
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::{Link, lock};

/// A stream that a peer opened for a session.
pub struct Joined {
    pub tx: SendStream,
    pub rx: RecvStream,
    /// The peer's part of the session key's freshness; unused between evaluators.
    pub nonce: [u8; 16],
    /// The link it arrived on, whose secret both ends derive keys from even if a newer link is up by now.
    pub link: Link,
}

enum Slot {
    Waiting(oneshot::Sender<Joined>),
    Here(Box<Joined>, Instant),
}

/// Streams and sessions that wait for one another.
#[derive(Default)]
pub struct Meeting(Mutex<HashMap<(SessionId, Role), Slot>>);

impl Meeting {
    /// Hands the stream to the session that waits for it, or keeps it for `limit`.
    pub fn put(&self, key: (SessionId, Role), joined: Joined, limit: Duration) {
        let mut m = lock(&self.0);
        m.retain(|_, s| !matches!(s, Slot::Here(_, at) if at.elapsed() > limit));
        match m.remove(&key) {
            Some(Slot::Waiting(w)) => {
                let _ = w.send(joined);
            }
            // Bounded: a peer that floods session names loses its own streams.
            _ if m.len() < 1024 => {
                m.insert(key, Slot::Here(Box::new(joined), Instant::now()));
            }
            _ => {}
        }
    }

    /// The stream of `key`, waiting for it up to `limit`.
    pub async fn take(&self, key: (SessionId, Role), limit: Duration) -> Option<Joined> {
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
