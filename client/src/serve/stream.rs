//! Answers that arrive piece by piece: server-sent events for OpenAI's clients, lines of JSON for Ollama's.
//!
//! The work runs in a task of its own and writes into a short channel, which is the response's body. When the client goes
//! away, the body is dropped, the channel closes, and the task's future is dropped with all that it holds. A client that
//! stops reading is treated the same after a while, so that it cannot hold a slot for ever.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::http::{HeaderValue, Response, header};
use hyper::body::Frame;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::{Instant, Sleep, sleep};

use super::error::{ApiError, Dialect};

/// How long a client may leave what was written to it unread.
pub const STALLED: Duration = Duration::from_secs(60);

/// The client left, or does not read.
pub struct Gone;

/// Why a stream ends early.
pub enum Stop {
    Gone,
    Failed(ApiError),
}

impl From<Gone> for Stop {
    fn from(_: Gone) -> Stop {
        Stop::Gone
    }
}

impl<E: Into<ApiError>> From<E> for Stop {
    fn from(e: E) -> Stop {
        Stop::Failed(e.into())
    }
}

/// Where the work writes.
pub struct Sink {
    dialect: Dialect,
    tx: mpsc::Sender<Bytes>,
}

impl Sink {
    /// One event or line.
    pub async fn send(&self, v: &Value) -> Result<(), Gone> {
        let bytes = match self.dialect {
            Dialect::OpenAi => format!("data: {v}\n\n"),
            Dialect::Ollama => format!("{v}\n"),
        };
        self.raw(bytes).await
    }

    /// The end of OpenAI's streams.
    pub async fn done(&self) -> Result<(), Gone> {
        self.raw("data: [DONE]\n\n".into()).await
    }

    async fn raw(&self, text: String) -> Result<(), Gone> {
        self.tx.send_timeout(text.into(), STALLED).await.map_err(|_| Gone)
    }
}

/// A response whose body is what `work` writes. An error becomes the stream's last event.
pub fn respond<F>(dialect: Dialect, heartbeat: Duration, work: impl FnOnce(Sink) -> F) -> Response<Body>
where
    F: Future<Output = Result<(), Stop>> + Send + 'static,
{
    let (tx, rx) = mpsc::channel(16);
    let (closing, failing) = (tx.clone(), Sink { dialect, tx: tx.clone() });
    let work = work(Sink { dialect, tx });
    tokio::spawn(async move {
        let result = tokio::select! {
            r = work => r,
            () = closing.closed() => Err(Stop::Gone),
        };
        if let Err(Stop::Failed(e)) = result {
            let _ = failing.send(&e.body(dialect)).await;
        }
    });
    let beat = (dialect == Dialect::OpenAi).then(|| (heartbeat, Box::pin(sleep(heartbeat))));
    let mut r = Response::new(Body::new(Lines { rx, beat }));
    let kind = match dialect {
        Dialect::OpenAi => "text/event-stream; charset=utf-8",
        Dialect::Ollama => "application/x-ndjson",
    };
    r.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    r.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    r.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    r
}

struct Lines {
    rx: mpsc::Receiver<Bytes>,
    /// Period, and when the next comment is due. Lines of JSON have no comments.
    beat: Option<(Duration, Pin<Box<Sleep>>)>,
}

impl HttpBody for Lines {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let got = self.rx.poll_recv(cx);
        let Some((period, due)) = &mut self.beat else { return got.map(|b| b.map(|b| Ok(Frame::data(b)))) };
        let bytes = match got {
            Poll::Ready(None) => return Poll::Ready(None),
            Poll::Ready(Some(b)) => b,
            Poll::Pending => match due.as_mut().poll(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(()) => Bytes::from_static(b": waiting\n\n"),
            },
        };
        due.as_mut().reset(Instant::now() + *period);
        // Registers the new time with this task.
        Poll::Ready(Some(Ok(Frame::data(bytes))))
    }
}
