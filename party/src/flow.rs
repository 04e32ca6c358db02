//! Channels between streams and engine threads, bounded in bytes.
//!
//! A message enters with a permit for its bytes and gives it back when the receiver takes it or is dropped. The permits
//! are those of a [`Room`]: a session's, which makes the sender wait (back-pressure), or the pool's, which were set aside
//! for the whole bundle before its first byte. Dropping either end wipes what is in between.

use std::sync::Arc;

use tacet_protocol::wipe::Wiped;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

/// A bound in bytes.
#[derive(Clone)]
pub struct Room {
    free: Arc<Semaphore>,
    bytes: usize,
}

/// Permission to hold some bytes.
pub type Permit = OwnedSemaphorePermit;

impl Room {
    /// Room for `bytes`.
    pub fn new(bytes: usize) -> Room {
        let bytes = bytes.min(Semaphore::MAX_PERMITS);
        Room { free: Arc::new(Semaphore::new(bytes)), bytes }
    }

    /// Waits for room; a message larger than all of it waits until it is alone.
    pub async fn wait(&self, len: usize) -> Permit {
        let n = u32::try_from(len.min(self.bytes)).unwrap_or(u32::MAX);
        Arc::clone(&self.free).acquire_many_owned(n).await.expect("a room is never closed")
    }

    /// Room for messages of all these lengths at once, or none.
    pub fn reserve(&self, lens: impl Iterator<Item = usize>) -> Option<Vec<Permit>> {
        lens.map(|len| Arc::clone(&self.free).try_acquire_many_owned(u32::try_from(len).ok()?).ok()).collect()
    }

    /// Bytes set aside now.
    pub fn used(&self) -> usize {
        self.bytes - self.free.available_permits()
    }
}

/// A message with its permit.
pub struct Held {
    pub step: u32,
    pub bytes: Wiped<u8>,
    pub permit: Permit,
}

/// A channel whose bound is the permits of its messages.
pub fn channel() -> (mpsc::UnboundedSender<Held>, mpsc::UnboundedReceiver<Held>) {
    mpsc::unbounded_channel()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(len: usize, permit: Permit) -> Held {
        Held { step: 0, bytes: Wiped::new(vec![1; len]), permit }
    }

    #[tokio::test]
    async fn bytes_in_flight_are_bounded_and_come_back() {
        let room = Room::new(100);
        let (tx, mut rx) = channel();
        assert!(tx.send(held(60, room.wait(60).await)).is_ok());
        assert!(room.reserve([30, 30].into_iter()).is_none());
        assert_eq!(room.used(), 60, "a refused reservation leaves nothing behind");
        let more = room.wait(60);
        tokio::pin!(more);
        assert!(futures_ready(more.as_mut()).is_none());
        drop(rx.recv().await);
        let more = futures_ready(more).expect("the receiver made room");
        assert!(tx.send(held(60, more)).is_ok());
        drop(rx);
        assert_eq!(room.used(), 0, "a dropped receiver frees what was on its way");
        let alone = room.wait(1000).await;
        assert_eq!((alone.num_permits(), room.used()), (100, 100));
    }

    fn futures_ready<F: Future + Unpin>(mut f: F) -> Option<F::Output> {
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        match std::pin::Pin::new(&mut f).poll(&mut cx) {
            std::task::Poll::Ready(v) => Some(v),
            std::task::Poll::Pending => None,
        }
    }
}
