//! A connection that fails when its peer takes nothing for too long: hyper waits for a writer without end, and such a peer
//! would hold one of the endpoint's connections for as long as it likes.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

/// Passes on what it wraps. Time counts only while something waits to be written, and from the last bytes taken: neither a
/// silent stream nor a slow reader is stalled.
pub struct Stalling<S> {
    inner: S,
    limit: Duration,
    /// Since when a write has waited, as the time at which it has done so for too long.
    due: Option<Pin<Box<Sleep>>>,
}

impl<S> Stalling<S> {
    pub fn new(inner: S, limit: Duration) -> Stalling<S> {
        Stalling { inner, limit, due: None }
    }

    fn timed<T>(&mut self, cx: &mut Context<'_>, poll: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if poll.is_ready() {
            self.due = None;
            return poll;
        }
        let due = self.due.get_or_insert_with(|| Box::pin(sleep(self.limit)));
        due.as_mut().poll(cx).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Stalling<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Stalling<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.inner).poll_write(cx, buf);
        self.timed(cx, poll)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let poll = Pin::new(&mut self.inner).poll_flush(cx);
        self.timed(cx, poll)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let poll = Pin::new(&mut self.inner).poll_shutdown(cx);
        self.timed(cx, poll)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
        self.timed(cx, poll)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use tokio::time::timeout;

    const SHORT: Duration = Duration::from_millis(100);
    /// What only a test that fails waits for.
    const LONG: Duration = Duration::from_secs(30);

    #[tokio::test]
    async fn a_peer_that_takes_nothing_fails_every_kind_of_write() {
        let (near, _far) = duplex(8);
        let mut s = Stalling::new(near, SHORT);
        s.write_all(&[0; 8]).await.unwrap();
        let e = timeout(LONG, s.write_all(&[0; 8])).await.expect("in time").unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::TimedOut);
        let (near, _far) = duplex(8);
        let mut s = Stalling::new(near, SHORT);
        s.write_all(&[0; 8]).await.unwrap();
        let both = [io::IoSlice::new(&[0; 4]), io::IoSlice::new(&[0; 4])];
        let e = timeout(LONG, s.write_vectored(&both)).await.expect("in time").unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::TimedOut);
        // Neither flushes nor ends.
        let mut s = Stalling::new(Stuck, SHORT);
        let e = timeout(LONG, s.flush()).await.expect("in time").unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::TimedOut);
        let mut s = Stalling::new(Stuck, SHORT);
        let e = timeout(LONG, s.shutdown()).await.expect("in time").unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn time_counts_from_the_last_bytes_taken() {
        let (near, mut far) = duplex(8);
        let mut s = Stalling::new(near, SHORT);
        s.write_all(&[1; 8]).await.unwrap();
        for _ in 0..3 {
            // Longer than a write may wait, but none does.
            sleep(SHORT * 2).await;
            // Polled in this order, the write waits, and is taken before it is polled again.
            let mut taken = [0; 8];
            let (written, read) = tokio::join!(s.write_all(&[1; 8]), far.read_exact(&mut taken));
            written.unwrap();
            read.unwrap();
            assert_eq!(taken, [1; 8]);
        }
    }

    struct Stuck;

    impl AsyncWrite for Stuck {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
            Poll::Pending
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }
}
