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
        let _waits = Waits { meeting: self, key };
        timeout(limit, wait).await.ok()?.ok()
    }
}

/// A session's place, which goes when it no longer waits, however that ends: also where it is dropped in between, since its
/// client left or the other peer never came.
struct Waits<'a> {
    meeting: &'a Meeting,
    key: (SessionId, Role),
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        lock(&self.meeting.0).remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_session_that_is_dropped_leaves_no_place_behind() {
        let m = Meeting::default();
        for name in 0..3000u32 {
            let mut session = SessionId::default();
            session[..4].copy_from_slice(&name.to_le_bytes());
            let waits = m.take((session, Role::E1), Duration::from_secs(60));
            assert!(timeout(Duration::ZERO, waits).await.is_err(), "nobody came, and it was dropped");
        }
        assert!(lock(&m.0).is_empty());
        assert!(m.take((SessionId::default(), Role::E2), Duration::from_millis(1)).await.is_none());
        assert!(lock(&m.0).is_empty());
    }
}
