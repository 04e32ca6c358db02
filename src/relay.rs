//! A network between processes of one machine: a UDP relay that delays, paces and loses datagrams.
//!
//! Each direction of each flow has a line of its own: a datagram leaves when the line has carried those before it, arrives
//! half a round trip later, and is dropped where the line's queue is full, as a router would. Threads that sleep are more
//! exact than an asynchronous runtime's timers, whose grain is a millisecond; on Linux they also ask for no timer slack, which
//! is 50 us a sleep. Datagrams that come as one train (a message of several, which the system passes on as one) leave as one,
//! when the line has carried the last: one at a time they would cost more of this machine's processors than all that the
//! network between the parties costs otherwise. No datagram is early; what the relay's own threads take comes on top.
//!
//! A datagram that is larger than the network's packets is lost, as on a path that does not let them be divided: it is how
//! endpoints find out.

use std::collections::HashMap;
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use quinn_udp::{RecvMeta, Transmit, UdpSocketState};

/// Bytes of IPv4's and UDP's headers.
const HEADERS: usize = 28;

/// What a line does to datagrams.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Time there and back.
    pub rtt: Duration,
    /// Bytes a second, each way.
    pub bandwidth: f64,
    /// Share of datagrams that are lost.
    pub loss: f64,
    /// Bytes of the largest packet, its headers included.
    pub mtu: usize,
}

impl Link {
    /// One that takes packets of this size and nothing of the time.
    pub fn free(mtu: usize) -> Link {
        Link { rtt: Duration::ZERO, bandwidth: f64::INFINITY, loss: 0.0, mtu }
    }

    /// Bytes that wait for the line at most: what it carries in a round trip and a tenth of a second, and one train.
    fn queue(&self) -> usize {
        ((self.bandwidth * (self.rtt.as_secs_f64() + 0.1)) as usize).max(1 << 16)
    }

    /// How long the line is busy with so many bytes.
    fn busy(&self, bytes: usize) -> Duration {
        Duration::try_from_secs_f64(bytes as f64 / self.bandwidth).unwrap_or(Duration::MAX)
    }
}

/// A socket that takes and gives trains.
struct Socket {
    socket: UdpSocket,
    state: UdpSocketState,
}

impl Socket {
    fn new() -> io::Result<Socket> {
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        let s = socket2::SockRef::from(&socket);
        let _ = s.set_recv_buffer_size(8 << 20);
        let _ = s.set_send_buffer_size(8 << 20);
        let state = UdpSocketState::new((&socket).into())?;
        // It was made ready for a runtime; here a thread waits for each.
        socket.set_nonblocking(false)?;
        Ok(Socket { socket, state })
    }

    /// Waits for the next train; its datagrams are `stride` long, the last one at most.
    fn receive(&self, buffer: &mut [u8]) -> io::Result<RecvMeta> {
        let mut meta = [RecvMeta::default()];
        self.state.recv((&self.socket).into(), &mut [IoSliceMut::new(buffer)], &mut meta)?;
        Ok(meta[0])
    }

    fn send(&self, train: &Train, destination: SocketAddr) {
        // The largest that one call takes, in whole datagrams.
        let most = (60_000 / train.stride).clamp(1, self.state.max_gso_segments());
        for contents in train.bytes.chunks(most * train.stride) {
            let segment_size = Some(train.stride).filter(|s| contents.len() > *s);
            let t = Transmit { destination, ecn: None, contents, segment_size, src_ip: None };
            // A receiver that is not there loses datagrams, as on any network.
            let _ = self.state.send((&self.socket).into(), &t);
        }
    }
}

/// Datagrams of one length, but for the last, that came at once.
struct Train {
    bytes: Vec<u8>,
    stride: usize,
}

/// One direction of a flow.
struct Line {
    link: Link,
    free: Instant,
    queued: Arc<AtomicUsize>,
    random: u64,
    to: Sender<(Instant, Train)>,
}

impl Line {
    fn start(link: Link, out: Arc<Socket>, target: SocketAddr, seed: u64) -> io::Result<Line> {
        let (to, from) = channel();
        let queued = Arc::new(AtomicUsize::new(0));
        let waiting = Arc::clone(&queued);
        spawn(move || deliver(&from, &out, target, &waiting))?;
        Ok(Line { link, free: Instant::now(), queued, random: seed | 1, to })
    }

    fn lost(&mut self) -> bool {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        ((self.random >> 11) as f64 / (1u64 << 53) as f64) < self.link.loss
    }

    fn carry(&mut self, train: &[u8], stride: usize) {
        let now = Instant::now();
        let stride = stride.max(1);
        let mut bytes = Vec::with_capacity(train.len());
        for datagram in train.chunks(stride) {
            let queued = self.queued.load(Ordering::Relaxed) + datagram.len();
            if self.lost() || queued > self.link.queue() || datagram.len() + HEADERS > self.link.mtu {
                continue;
            }
            let start = self.free.max(now);
            self.free = start.checked_add(self.link.busy(datagram.len())).unwrap_or(start);
            self.queued.fetch_add(datagram.len(), Ordering::Relaxed);
            bytes.extend_from_slice(datagram);
        }
        if !bytes.is_empty() {
            // The other end of the channel lives as long as the process.
            let _ = self.to.send((self.free + self.link.rtt / 2, Train { bytes, stride }));
        }
    }
}

fn deliver(from: &Receiver<(Instant, Train)>, out: &Socket, target: SocketAddr, queued: &AtomicUsize) {
    exact();
    while let Ok((at, train)) = from.recv() {
        let wait = at.saturating_duration_since(Instant::now());
        if !wait.is_zero() {
            std::thread::sleep(wait);
        }
        queued.fetch_sub(train.bytes.len(), Ordering::Relaxed);
        out.send(&train, target);
    }
}

/// Lets this thread's sleeps end when they are over, not up to 50 us later.
fn exact() {
    #[cfg(target_os = "linux")]
    let _ = nix::sys::prctl::set_timerslack(1);
}

fn spawn(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name("relay".into()).spawn(work).map(drop)
}

/// Starts a relay towards `target`; returns where it listens. Its threads end with the process.
pub fn start(target: SocketAddr, link: Link) -> io::Result<SocketAddr> {
    let front = Arc::new(Socket::new()?);
    let addr = front.socket.local_addr()?;
    spawn(move || {
        if let Err(e) = forward(&front, target, link) {
            eprintln!("relay towards {target}: {e}");
        }
    })?;
    Ok(addr)
}

fn forward(front: &Arc<Socket>, target: SocketAddr, link: Link) -> io::Result<()> {
    let mut flows: HashMap<SocketAddr, Line> = HashMap::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let RecvMeta { addr: source, len, stride, .. } = front.receive(&mut buffer)?;
        if !flows.contains_key(&source) {
            let back = Arc::new(Socket::new()?);
            let seed = u64::from(source.port()) << 20 | flows.len() as u64;
            flows.insert(source, Line::start(link, Arc::clone(&back), target, seed)?);
            let mut line = Line::start(link, Arc::clone(front), source, !seed)?;
            spawn(move || {
                let mut buffer = vec![0; 1 << 16];
                loop {
                    match back.receive(&mut buffer) {
                        Ok(m) => line.carry(&buffer[..m.len], m.stride),
                        Err(e) => return eprintln!("relay from {target}: {e}"),
                    }
                }
            })?;
        }
        if let Some(line) = flows.get_mut(&source) {
            line.carry(&buffer[..len], stride);
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
        let at = start(server.local_addr().unwrap(), Link { rtt, bandwidth: 1e8, loss: 0.0, mtu: 1500 }).unwrap();
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
    fn a_train_takes_the_time_that_its_bytes_take_and_keeps_its_datagrams() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        // 100 kB at 1 MB/s each way.
        let link = Link { rtt: Duration::from_millis(10), bandwidth: 1e6, loss: 0.0, mtu: 1500 };
        let at = start(server.local_addr().unwrap(), link).unwrap();
        let client = Socket::new().unwrap();
        let bytes: Vec<u8> = (0..50_000u32).map(|i| (i / 1000) as u8).collect();
        let started = Instant::now();
        for _ in 0..2 {
            client.send(&Train { bytes: bytes.clone(), stride: 1000 }, at);
        }
        let mut buffer = [0; 2000];
        for i in 0..100u32 {
            let (n, from) = server.recv_from(&mut buffer).unwrap();
            assert_eq!((n, u32::from(buffer[0])), (1000, i % 50));
            // Never early, whether the system passed them on as trains or one by one.
            assert!(started.elapsed() >= Duration::from_millis(u64::from(i) + 1) + link.rtt / 2, "{i}");
            server.send_to(&buffer[..n], from).unwrap();
        }
        for _ in 0..100 {
            assert_eq!(client.receive(&mut buffer).unwrap().stride, 1000);
        }
    }

    #[test]
    fn lost_datagrams_do_not_arrive() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        server.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let link = Link { loss: 1.0, ..Link::free(1500) };
        let at = start(server.local_addr().unwrap(), link).unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.send_to(&[1], at).unwrap();
        assert!(server.recv_from(&mut [0; 8]).is_err());
    }

    #[test]
    fn datagrams_that_are_larger_than_a_packet_do_not_arrive() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let at = start(server.local_addr().unwrap(), Link::free(1500)).unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        for len in [1473, 6500, 1472] {
            client.send_to(&vec![7; len], at).unwrap();
        }
        assert_eq!(server.recv_from(&mut [0; 8000]).unwrap().0, 1472);
    }
}
