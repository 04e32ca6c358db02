//! A network between processes of one machine: a UDP relay that delays, paces and loses datagrams.
//!
//! Each direction of each flow has a line of its own: a datagram leaves when the line has carried those before it, arrives
//! half a round trip later, and is dropped where the line's queue is full, as a router would. Threads that sleep are more
//! exact than an asynchronous runtime's timers, whose grain is a millisecond.

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

/// What a line does to datagrams.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Time there and back.
    pub rtt: Duration,
    /// Bytes a second, each way.
    pub bandwidth: f64,
    /// Share of datagrams that are lost.
    pub loss: f64,
}

impl Link {
    /// Bytes that wait for the line at most: what it carries in a round trip and a tenth of a second.
    fn queue(&self) -> usize {
        (self.bandwidth * (self.rtt.as_secs_f64() + 0.1)) as usize
    }
}

/// One direction of a flow.
struct Line {
    link: Link,
    free: Instant,
    queued: Arc<AtomicUsize>,
    random: u64,
    to: Sender<(Instant, Vec<u8>)>,
}

impl Line {
    fn start(link: Link, out: Arc<UdpSocket>, target: SocketAddr, seed: u64) -> io::Result<Line> {
        let (to, from) = channel();
        let queued = Arc::new(AtomicUsize::new(0));
        let waiting = Arc::clone(&queued);
        std::thread::Builder::new().name("relay".into()).spawn(move || deliver(&from, &out, target, &waiting))?;
        Ok(Line { link, free: Instant::now(), queued, random: seed | 1, to })
    }

    fn carry(&mut self, datagram: &[u8]) {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let lost = (self.random >> 11) as f64 / (1u64 << 53) as f64;
        if lost < self.link.loss || self.queued.load(Ordering::Relaxed) + datagram.len() > self.link.queue() {
            return;
        }
        let now = Instant::now();
        self.free = self.free.max(now) + Duration::from_secs_f64(datagram.len() as f64 / self.link.bandwidth);
        self.queued.fetch_add(datagram.len(), Ordering::Relaxed);
        // The other end of the channel lives as long as the process.
        let _ = self.to.send((self.free + self.link.rtt / 2, datagram.to_vec()));
    }
}

fn deliver(from: &Receiver<(Instant, Vec<u8>)>, out: &UdpSocket, target: SocketAddr, queued: &AtomicUsize) {
    while let Ok((at, datagram)) = from.recv() {
        let wait = at.saturating_duration_since(Instant::now());
        if !wait.is_zero() {
            std::thread::sleep(wait);
        }
        queued.fetch_sub(datagram.len(), Ordering::Relaxed);
        // A receiver that is not there loses datagrams, as on any network.
        let _ = out.send_to(&datagram, target);
    }
}

fn socket() -> io::Result<Arc<UdpSocket>> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    let s = socket2::SockRef::from(&socket);
    let _ = s.set_recv_buffer_size(8 << 20);
    let _ = s.set_send_buffer_size(8 << 20);
    Ok(Arc::new(socket))
}

/// Starts a relay towards `target`; returns where it listens. Its threads end with the process.
pub fn start(target: SocketAddr, link: Link) -> io::Result<SocketAddr> {
    let front = socket()?;
    let addr = front.local_addr()?;
    std::thread::Builder::new().name("relay".into()).spawn(move || {
        if let Err(e) = forward(&front, target, link) {
            eprintln!("relay towards {target}: {e}");
        }
    })?;
    Ok(addr)
}

fn forward(front: &Arc<UdpSocket>, target: SocketAddr, link: Link) -> io::Result<()> {
    let mut flows: HashMap<SocketAddr, Line> = HashMap::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let (n, source) = front.recv_from(&mut buffer)?;
        if !flows.contains_key(&source) {
            let back = socket()?;
            let seed = u64::from(source.port()) << 20 | flows.len() as u64;
            flows.insert(source, Line::start(link, Arc::clone(&back), target, seed)?);
            let mut line = Line::start(link, Arc::clone(front), source, !seed)?;
            std::thread::Builder::new().name("relay".into()).spawn(move || {
                let mut buffer = vec![0; 1 << 16];
                while let Ok((n, _)) = back.recv_from(&mut buffer) {
                    line.carry(&buffer[..n]);
                }
            })?;
        }
        if let Some(line) = flows.get_mut(&source) {
            line.carry(&buffer[..n]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datagrams_cross_both_ways_in_order_and_take_their_time() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let rtt = Duration::from_millis(30);
        let at = start(server.local_addr().unwrap(), Link { rtt, bandwidth: 1e8, loss: 0.0 }).unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        let started = Instant::now();
        for i in 0..20u8 {
            client.send_to(&[i; 100], at).unwrap();
        }
        let mut buffer = [0; 200];
        for i in 0..20u8 {
            let (n, from) = server.recv_from(&mut buffer).unwrap();
            assert_eq!((n, buffer[0]), (100, i));
            server.send_to(&buffer[..n], from).unwrap();
        }
        for i in 0..20u8 {
            let (n, _) = client.recv_from(&mut buffer).unwrap();
            assert_eq!((n, buffer[0]), (100, i));
        }
        assert!(started.elapsed() >= rtt);
    }

    #[test]
    fn lost_datagrams_do_not_arrive() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        server.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let link = Link { rtt: Duration::ZERO, bandwidth: 1e9, loss: 1.0 };
        let at = start(server.local_addr().unwrap(), link).unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.send_to(&[1], at).unwrap();
        assert!(server.recv_from(&mut [0; 8]).is_err());
    }
}
