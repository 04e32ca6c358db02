//! What a round between two parties costs on this machine, network aside: measured between two QUIC endpoints on loopback.
//!
//! Each end has what a party has: a thread that runs the streams, and one that computes and hands messages over. A round is
//! the one of two evaluators: both compute, send, and wait for the other's. Without the computing a round would be too
//! cheap, since a thread that waits for long takes longer to wake; it goes through memory, as a party's computing does, and is
//! timed by itself in each round. Both ends share this machine, as they do in `tacet bench`.
//! A dealing is a long stream one way, whose receiver keeps what it gets: it does not fit a processor's caches.
//!
//! For an emulated network the two are a [`relay`] apart that adds no time of its own: packets are as small as there, and what the
//! relay takes of this machine's processors is in the figures.

use std::hint::black_box;
use std::net::SocketAddr;
use std::sync::mpsc::{Sender, channel};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::time::{ClockId, clock_gettime};
use quinn::{RecvStream, SendStream};
use serde::Serialize;
use tacet_protocol::wipe::Wiped;
use tacet_transport::{Identity, accept_config, dial_config, endpoint, receive_step, send_step, widen};
use tokio::sync::mpsc;

use crate::relay::{self, Link};

/// Rounds, the length of their messages, and whether both ends compute before. The first of all and the first large ones
/// find small packets and cold threads.
const ROUNDS: [(usize, usize, bool); 5] =
    [(50, SMALL, true), (150, SMALL, true), (20, LARGE, false), (40, SMALL, false), (40, LARGE, false)];
/// Pairs of endpoints that are measured one after another: on which processors the threads of one meet is chance, and lasts.
const PAIRS: usize = 6;
/// How long both ends compute before a round.
const WORK: Duration = Duration::from_micros(300);
/// Messages of a dealing, which is sent twice: the first finds fresh memory.
const DEALING: (u32, usize) = (48, 1 << 20);
const SMALL: usize = 1 << 10;
const LARGE: usize = 256 << 10;

/// A round's cost.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Exchange {
    /// Seconds of a round of 1 KB each way, besides computing.
    pub round_s: f64,
    /// Processor seconds of it, at both ends together.
    pub round_processor_s: f64,
    /// Seconds that a further byte each way takes.
    pub byte_s: f64,
    /// Processor seconds of an opened byte, at the end that sends and at the one that receives.
    pub byte_processor_s: f64,
    /// Processor seconds of a dealt byte, at both ends.
    pub dealt_processor_s: f64,
}

/// Rounds of one length.
#[derive(Clone, Copy, Default)]
struct Part {
    mean: f64,
    processor: f64,
}

impl Exchange {
    /// Measures for a second or two: means over pairs of endpoints, but for the slowest and the fastest one. With `mtu` they
    /// are a relay apart that carries packets of so many bytes.
    ///
    /// # Errors
    /// No socket, no thread.
    pub fn measure(mtu: Option<usize>) -> Result<Exchange> {
        let pairs = (0..PAIRS).map(|_| Exchange::pair(mtu)).collect::<Result<Vec<_>>>()?;
        Ok(Exchange::each(|f| {
            let mut all: Vec<f64> = pairs.iter().map(f).collect();
            all.sort_by(f64::total_cmp);
            all[1..PAIRS - 1].iter().sum::<f64>() / (PAIRS - 2) as f64
        }))
    }

    /// Whose every figure is what `of` makes of that figure of others.
    pub fn each(of: impl Fn(fn(&Exchange) -> f64) -> f64) -> Exchange {
        Exchange {
            round_s: of(|x| x.round_s),
            round_processor_s: of(|x| x.round_processor_s),
            byte_s: of(|x| x.byte_s),
            byte_processor_s: of(|x| x.byte_processor_s),
            dealt_processor_s: of(|x| x.dealt_processor_s),
        }
    }

    fn pair(mtu: Option<usize>) -> Result<Exchange> {
        let (left, right) = (identity()?, identity()?);
        let (to, at) = channel();
        let accept = accept_config(&right, vec![left.certificate.clone()])?;
        let dial = dial_config(right.certificate.clone(), Some(&left))?;
        let listening = spawn(move || on_loopback(accepting(accept, to)))?;
        let dialling = spawn(move || {
            let to = at.recv()?;
            let to = mtu.map_or(Ok(to), |mtu| relay::start(to, Link::free(mtu)))?;
            on_loopback(dialling(dial, to))
        })?;
        let ([_, round, _, small, large], dealt_processor_s) = joined(dialling)?;
        joined(listening)?;
        let further = (LARGE - SMALL) as f64;
        Ok(Exchange {
            round_s: round.mean,
            round_processor_s: round.processor,
            byte_s: (large.mean - small.mean).max(0.0) / further,
            byte_processor_s: (large.processor - small.processor).max(0.0) / (2.0 * further),
            dealt_processor_s,
        })
    }
}

fn identity() -> Result<Identity> {
    let (certificate, key) = Identity::generate("exchange")?;
    Ok(Identity::from_pem(&certificate, &key)?)
}

fn spawn<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<JoinHandle<Result<T>>> {
    Ok(Builder::new().name("exchange".into()).spawn(work)?)
}

fn joined<T>(thread: JoinHandle<Result<T>>) -> Result<T> {
    thread.join().map_err(|_| anyhow::anyhow!("a thread that exchanges messages panicked"))?
}

fn on_loopback<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}

const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

async fn accepting(config: quinn::ServerConfig, at: Sender<SocketAddr>) -> Result<()> {
    let e = endpoint(LOOPBACK, Some(config))?;
    at.send(e.local_addr()?)?;
    let c = e.accept().await.context("nobody dialled")?.await?;
    widen(&c);
    let (mut tx, mut rx) = c.accept_bi().await?;
    carry(&mut tx, &mut rx).await?;
    let (n, len) = DEALING;
    for _ in 0..2 {
        let mut kept = Vec::new();
        for step in 0..n {
            kept.push(receive_step(&mut rx, step, len).await?);
        }
        drop(kept);
        send_step(&mut tx, n, Wiped::new(vec![1])).await?;
    }
    c.closed().await;
    Ok(())
}

async fn dialling(config: quinn::ClientConfig, to: SocketAddr) -> Result<([Part; 5], f64)> {
    let e = endpoint(LOOPBACK, None)?;
    let c = e.connect_with(config, to, "exchange")?.await?;
    widen(&c);
    let (mut tx, mut rx) = c.open_bi().await?;
    let parts = carry(&mut tx, &mut rx).await?;
    let (n, len) = DEALING;
    let mut dealt = 0.0;
    for _ in 0..2 {
        let before = processor()?;
        for step in 0..n {
            send_step(&mut tx, step, Wiped::new(vec![1; len])).await?;
        }
        receive_step(&mut rx, n, 1).await?;
        dealt = (processor()? - before).as_secs_f64() / (n as usize * len) as f64;
    }
    c.close(0u32.into(), b"done");
    e.wait_idle().await;
    Ok((parts, dealt))
}

/// One end of all rounds.
async fn carry(tx: &mut SendStream, rx: &mut RecvStream) -> Result<[Part; 5]> {
    let ((out, mut outgoing), (back, incoming)) = (mpsc::channel(1), mpsc::channel(1));
    let computing = spawn(move || compute(&out, incoming))?;
    let sent = async {
        while let Some((step, bytes)) = outgoing.recv().await {
            send_step(tx, step, bytes).await?;
        }
        anyhow::Ok(())
    };
    let received = async {
        for (step, len) in steps() {
            let _ = back.send(receive_step(rx, step, len).await?).await;
        }
        anyhow::Ok(())
    };
    tokio::try_join!(sent, received)?;
    joined(computing)
}

fn steps() -> impl Iterator<Item = (u32, usize)> {
    ROUNDS.into_iter().flat_map(|(n, len, _)| std::iter::repeat_n(len, n)).zip(0..).map(|(len, step)| (step, len))
}

fn compute(out: &mpsc::Sender<(u32, Wiped<u8>)>, mut incoming: mpsc::Receiver<Wiped<u8>>) -> Result<[Part; 5]> {
    let mut steps = steps();
    let mut memory = Read::new();
    let blocks = memory.calibrated();
    let mut parts = [Part::default(); 5];
    for (part, (n, _, works)) in parts.iter_mut().zip(ROUNDS) {
        let blocks = if works { blocks } else { 0 };
        let (before, mut worked) = (processor()?, 0.0);
        let mut times = Vec::with_capacity(n);
        for (step, len) in steps.by_ref().take(n) {
            worked += memory.work(blocks).as_secs_f64();
            let started = Instant::now();
            out.blocking_send((step, Wiped::new(vec![0; len]))).context("the stream ended")?;
            incoming.blocking_recv().context("the stream ended")?;
            times.push(started.elapsed().as_secs_f64());
        }
        // The mean, as a program's rounds add up, but for those in which something else ran.
        times.sort_by(f64::total_cmp);
        let usual = &times[..n - n / 20];
        let mean = usual.iter().sum::<f64>() / usual.len() as f64;
        // Both ends worked.
        let processor = ((processor()? - before).as_secs_f64() - 2.0 * worked) / n as f64;
        *part = Part { mean, processor: processor.max(0.0) };
    }
    Ok(parts)
}

/// Memory that a thread goes through: weights and tensors push what a round needs out of its processor's caches.
struct Read {
    words: Vec<u64>,
    at: usize,
}

impl Read {
    /// More than a processor's own caches hold.
    fn new() -> Read {
        Read { words: vec![1; 2 << 20], at: 0 }
    }

    /// Reads the next so many blocks.
    fn work(&mut self, blocks: usize) -> Duration {
        let started = Instant::now();
        let (all, _) = self.words.as_chunks::<64>();
        for _ in 0..blocks {
            self.at = (self.at + 1) % all.len();
            black_box(all[self.at].iter().fold(0u64, |a, w| a ^ w));
        }
        started.elapsed()
    }

    /// So many blocks as take [`WORK`].
    fn calibrated(&mut self) -> usize {
        let blocks = self.words.len() / 64;
        let mut all: Vec<_> = (0..5).map(|_| self.work(blocks)).collect();
        all.sort();
        (blocks as f64 * WORK.as_secs_f64() / all[2].as_secs_f64().max(1e-9)) as usize
    }
}

/// What this process has had of processors.
pub fn processor() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_takes_time_and_so_does_a_byte() {
        for mtu in [None, Some(1500)] {
            let e = Exchange::measure(mtu).unwrap();
            for seconds in [e.round_s, e.round_processor_s, e.byte_s, e.byte_processor_s, e.dealt_processor_s] {
                assert!(seconds.is_finite() && seconds >= 0.0, "{e:?}");
            }
            assert!(e.dealt_processor_s > 0.0, "{e:?}");
        }
    }
}
