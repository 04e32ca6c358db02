//! What frames and packets add to the bytes of steps, as the connection counts what it puts into datagrams. Counted, not timed.

#[path = "../../tests/common/ends.rs"]
mod ends;

use std::net::SocketAddr;
use std::sync::Arc;
use std::thread;

use quinn::{ConnectionStats, MtuDiscoveryConfig, TransportConfig};
use tacet_protocol::wipe::Wiped;
use tacet_protocol::wire::STEP_HEADER;
use tacet_transport::{receive_step, send_step};

use ends::{Outcome, accepted, configs, dialled, runtime};

/// Payload bytes of a step: those of small steps of a prompt, and of large ones.
const SIZES: [usize; 2] = [64 << 10, 1 << 20];
/// Payload bytes in all.
const TOTAL: usize = 64 << 20;

/// Takes steps of a size, and answers each with as many bytes or, if it does not, the last with one.
fn accept(
    quic: quinn::ServerConfig,
    size: usize,
    answers: bool,
    at: std::sync::mpsc::Sender<SocketAddr>,
) -> Outcome<ConnectionStats> {
    runtime()?.block_on(async {
        let (_e, c, mut tx, mut rx) = accepted(quic, at).await?;
        let steps = (TOTAL / size) as u32;
        for step in 0..steps {
            let bytes = receive_step(&mut rx, step, size).await?;
            if answers {
                send_step(&mut tx, step, bytes).await?;
            }
        }
        send_step(&mut tx, steps, Wiped::new(vec![0])).await?;
        // Until the other end has all of it.
        c.closed().await;
        Ok(c.stats())
    })
}

fn dial(quic: quinn::ClientConfig, size: usize, answers: bool, to: SocketAddr) -> Outcome<ConnectionStats> {
    runtime()?.block_on(async {
        let (e, c, mut tx, mut rx) = dialled(quic, to).await?;
        let steps = (TOTAL / size) as u32;
        for step in 0..steps {
            send_step(&mut tx, step, Wiped::new(vec![0; size])).await?;
            if answers {
                receive_step(&mut rx, step, size).await?;
            }
        }
        receive_step(&mut rx, steps, 1).await?;
        c.close(0u32.into(), b"");
        e.wait_idle().await;
        Ok(c.stats())
    })
}

/// What datagrams of both ends have beside the payload, as a share of it, handshake, acknowledgements and looking for the path's
/// size included: of steps in one direction, or to and fro. Less what was sent again, which is the path's doing.
fn overhead(size: usize, answers: bool, packet: Option<u16>) -> Outcome<f64> {
    let (mut server, mut client) = configs()?;
    if let Some(packet) = packet {
        let mut mtu = MtuDiscoveryConfig::default();
        mtu.upper_bound(packet);
        let mut t = TransportConfig::default();
        t.mtu_discovery_config(Some(mtu));
        let t = Arc::new(t);
        server.transport_config(Arc::clone(&t));
        client.transport_config(t);
    }
    let (at, address) = std::sync::mpsc::channel();
    let acceptor = thread::spawn(move || accept(server, size, answers, at));
    let dialled = dial(client, size, answers, address.recv()?)?;
    let accepted = acceptor.join().map_err(|_| "the accepting thread panicked")??;
    let both = [dialled, accepted];
    let sent: u64 = both.iter().map(|s| s.udp_tx.bytes).sum();
    let again: u64 = both.iter().map(|s| s.path.lost_bytes).sum();
    let payload = (TOTAL / size * size * if answers { 2 } else { 1 }) as f64;
    Ok((sent - again) as f64 / payload - 1.0)
}

/// The least of up to three tries: a machine so busy that packets are lost in numbers makes a connection try smaller ones.
fn least(size: usize, answers: bool, packet: Option<u16>, most: f64) -> f64 {
    let mut least = f64::INFINITY;
    for _ in 0..3 {
        least = least.min(overhead(size, answers, packet).unwrap());
        if least < most {
            break;
        }
    }
    least
}

#[test]
fn frames_and_packets_take_less_than_a_hundredth_of_steps() {
    for size in SIZES {
        let header = 100.0 * STEP_HEADER as f64 / size as f64;
        assert!(header < 0.05, "{header} % of a step of {size} bytes");
        for (answers, how) in [(false, "one way"), (true, "to and fro")] {
            let all = 100.0 * least(size, answers, None, 0.01);
            println!("steps of {} KB {how}: {all:.2} %, of which frames {header:.3} %", size >> 10);
            assert!(all < 1.0, "steps of {size} bytes {how}: {all} %");
        }
    }
}

/// Most paths between organisations carry no more than this, where headers and tags weigh more.
#[test]
fn packets_of_1452_bytes_take_less_than_three_hundredths() {
    for (answers, how) in [(false, "one way"), (true, "to and fro")] {
        let all = 100.0 * least(SIZES[0], answers, Some(1452), 0.03);
        println!("steps of {} KB {how}, packets of 1452 bytes: {all:.2} %", SIZES[0] >> 10);
        assert!(all < 3.0, "{how}: {all} %");
    }
}
