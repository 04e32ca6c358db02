//! Ceilings of a party's streams: the keystream of masks, packing, and QUIC between two threads of this process over loopback:
//! `cargo bench -p tacet-transport --bench streams`.
//!
//! Processor time is what the two threads ran (Linux only); rates are the best of several tries.

#[path = "../tests/common/ends.rs"]
mod ends;

use std::hint::black_box;
use std::net::SocketAddr;
use std::thread;
use std::time::Instant;

use tacet_protocol::prg::{Prg, SessionKey};
use tacet_protocol::ring::{pack_to, packed_len, unpack_to};
use tacet_protocol::wipe::Wiped;
use tacet_transport::{receive_step, send_step};

use ends::{Outcome, accepted, configs, dialled, runtime};

const MB: usize = 1 << 20;
/// Frames of a megabyte in one try, and tries.
const FRAMES: u32 = 256;
const TRIES: u32 = 5;
/// Bytes of a frame that goes to and fro, and how often it does.
const PING: usize = 1024;
const PINGS: u32 = 2000;

/// Seconds that this thread has run.
fn ran() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split_whitespace().next().and_then(|v| v.parse::<f64>().ok()).unwrap_or(0.0) / 1e9
}

fn keystream() -> Outcome<()> {
    let mut prg = Prg::new(&SessionKey::from_seed([1; 32]));
    let mut words = vec![0; MB];
    for (bits, width) in [(8, 1), (32, 4), (64, 8)] {
        let mut best = f64::INFINITY;
        for i in 0..20 {
            let start = Instant::now();
            prg.fill(bits, i, bits, &mut words)?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        println!("keystream as words of {bits} bits: {:.1} GB/s", (width * MB) as f64 / best / 1e9);
    }
    Ok(())
}

/// Of a thousand words at a time, as gates do it.
fn packing() {
    const WORDS: usize = 1024;
    for bits in [4, 12, 20, 30, 44] {
        let (mut words, mut bytes) = (vec![u64::MAX; WORDS], vec![0; packed_len(WORDS, bits)]);
        let mut best = [f64::INFINITY; 2];
        for _ in 0..20 {
            let start = Instant::now();
            (0..1000).for_each(|_| pack_to(black_box(&words), bits, black_box(&mut bytes)));
            let between = Instant::now();
            (0..1000).for_each(|_| unpack_to(black_box(&bytes), bits, black_box(&mut words)));
            let took = [between - start, between.elapsed()].map(|t| t.as_secs_f64() / 1000.0);
            best = [best[0].min(took[0]), best[1].min(took[1])];
        }
        let [pack, unpack] = best.map(|s| WORDS as f64 / s / 1e9);
        println!("words of {bits} bits: {pack:.2} G packed a second, {unpack:.2} G unpacked");
    }
}

/// Takes frames, then sends back what it gets; gives the processor time of each try.
fn accept(quic: quinn::ServerConfig, at: std::sync::mpsc::Sender<SocketAddr>) -> Outcome<Vec<f64>> {
    runtime()?.block_on(async {
        let (_e, c, mut tx, mut rx) = accepted(quic, at).await?;
        receive_step(&mut rx, 0, 1).await?;
        let mut spent = Vec::new();
        for _ in 0..TRIES {
            let start = ran();
            for step in 0..FRAMES {
                receive_step(&mut rx, step, MB).await?;
            }
            send_step(&mut tx, 0, Wiped::new(vec![0])).await?;
            spent.push(ran() - start);
        }
        for step in 0..PINGS {
            let frame = receive_step(&mut rx, step, PING).await?;
            send_step(&mut tx, step, frame).await?;
        }
        // Until the other end has all of it.
        c.closed().await;
        Ok(spent)
    })
}

/// Sends; gives seconds and processor time of each try, and seconds of each round trip.
fn dial(quic: quinn::ClientConfig, to: SocketAddr) -> Outcome<(Vec<[f64; 2]>, Vec<f64>)> {
    runtime()?.block_on(async {
        let (e, c, mut tx, mut rx) = dialled(quic, to).await?;
        send_step(&mut tx, 0, Wiped::new(vec![0])).await?;
        let (mut tries, mut trips) = (Vec::new(), Vec::new());
        for _ in 0..TRIES {
            let (start, before) = (Instant::now(), ran());
            for step in 0..FRAMES {
                send_step(&mut tx, step, Wiped::new(vec![0; MB])).await?;
            }
            receive_step(&mut rx, 0, 1).await?;
            tries.push([start.elapsed().as_secs_f64(), ran() - before]);
        }
        for step in 0..PINGS {
            let start = Instant::now();
            send_step(&mut tx, step, Wiped::new(vec![0; PING])).await?;
            receive_step(&mut rx, step, PING).await?;
            trips.push(start.elapsed().as_secs_f64());
        }
        c.close(0u32.into(), b"");
        e.wait_idle().await;
        Ok((tries, trips))
    })
}

fn main() -> Outcome<()> {
    keystream()?;
    packing();
    let (server, client) = configs()?;
    let (at, address) = std::sync::mpsc::channel();
    let acceptor = thread::spawn(move || accept(server, at));
    let (tries, mut trips) = dial(client, address.recv()?)?;
    let accepted = acceptor.join().map_err(|_| "the accepting thread panicked")??;
    let gb = FRAMES as f64 * MB as f64 / 1e9;
    let best = |v: &mut dyn Iterator<Item = f64>| v.fold(f64::INFINITY, f64::min);
    let seconds = best(&mut tries.iter().map(|t| t[0]));
    let work = best(&mut tries.iter().zip(&accepted).map(|(t, a)| t[1] + a));
    println!("QUIC, one stream: {:.2} GB/s, {:.2} processor seconds a GB at both ends", gb / seconds, work / gb);
    trips.sort_by(f64::total_cmp);
    println!("QUIC, round trip of {PING} bytes: {:.0} us (median)", trips[trips.len() / 2] * 1e6);
    Ok(())
}
