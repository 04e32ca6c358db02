//! What a stranger can hold at a party, and how a party stops, over real processes.

#[path = "../src/keys.rs"]
#[allow(dead_code)]
mod keys;
#[path = "../src/local.rs"]
#[allow(dead_code)]
mod local;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use local::Lane;
use tacet_client::{Client, ClientError};
use tacet_party::config::{Limits, Pool};
use tacet_protocol::wire::{CONTROL_LIMIT, Message};
use tacet_transport::{Connection, certificate_from_pem, dial_config, endpoint, receive, send};

const E1: usize = 0;

fn model() -> Option<PathBuf> {
    let dir = std::env::var_os("TACET_MODEL_DIR").map(PathBuf::from);
    if dir.is_none() {
        println!("skipped: TACET_MODEL_DIR does not name a directory with all-MiniLM-L6-v2");
    }
    dir
}

/// One lane at a time: three parties, a client and their deadlines share the machine's cores.
static ALONE: Mutex<()> = Mutex::new(());

fn lane(model: &Path, limits: Limits) -> (Lane, MutexGuard<'static, ()>) {
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let pool = Pool { depth: 0, ..Pool::default() };
    (Lane::start_with(Path::new(env!("CARGO_BIN_EXE_tacet")), model, limits, pool).unwrap(), alone)
}

fn on_one_thread<F: Future>(f: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(f)
}

async fn stranger(lane: &Lane) -> Connection {
    let target = &lane.parties.party[E1];
    let pem = std::fs::read_to_string(&target.certificate).unwrap();
    let dial = dial_config(certificate_from_pem(&pem).unwrap(), None).unwrap();
    let quic = endpoint(([127, 0, 0, 1], 0).into(), None).unwrap();
    quic.connect_with(dial, target.addr, "tacet").unwrap().await.unwrap()
}

async fn closed(c: &Connection) -> String {
    tokio::time::timeout(Duration::from_secs(20), c.closed()).await.expect("the party closes").to_string()
}

#[test]
fn a_stranger_holds_little_and_not_for_long() {
    let Some(model) = model() else { return };
    let (lane, _alone) = lane(&model, Limits { join_s: 2, ..Limits::default() });
    on_one_thread(async {
        let c = stranger(&lane).await;
        // Says nothing.
        assert!(closed(&c).await.contains("no request with a known token"));
        // Announces more than it may before its token is known.
        let c = stranger(&lane).await;
        let (mut tx, mut rx) = c.open_bi().await.unwrap();
        tx.write_all(&(CONTROL_LIMIT as u32 + 1).to_le_bytes()).await.unwrap();
        let m = receive(&mut rx, CONTROL_LIMIT).await.unwrap();
        assert!(matches!(m, Message::Failure { text, .. } if text.contains("are allowed")));
        // Begins frames and never ends them: the connection's window is all that crosses.
        let frame = [&(CONTROL_LIMIT as u32).to_le_bytes()[..], &vec![1; CONTROL_LIMIT - 1]].concat();
        let mut begun = Vec::new();
        let c = stranger(&lane).await;
        while let Ok((mut tx, rx)) = c.open_bi().await {
            if begun.len() == 200 || tx.write_all(&frame).await.is_err() {
                break;
            }
            begun.push((tx, rx));
        }
        assert!(closed(&c).await.contains("no request with a known token"));
        let sent = c.stats().udp_tx.bytes;
        assert!(sent < 300_000, "{sent} bytes");
        // A client that shows its token is kept though it asks for nothing.
        let client = Client::builder().parties(lane.parties.clone()).model(&model).connect().await.unwrap();
        tokio::time::sleep(Duration::from_secs(4)).await;
        client.embed(&["still here"]).await.unwrap();
    });
}

#[test]
fn connections_are_counted() {
    let Some(model) = model() else { return };
    let (lane, _alone) = lane(&model, Limits { connections: 2, ..Limits::default() });
    on_one_thread(async {
        let one = Client::builder().parties(lane.parties.clone()).model(&model).connect().await.unwrap();
        let other = stranger(&lane).await;
        // Full: this handshake passes only because it comes from a peer's address, and is told to go.
        let third = stranger(&lane).await;
        assert!(closed(&third).await.contains("too many connections"));
        one.embed(&["still here"]).await.unwrap();
        other.close(0u32.into(), b"");
        drop(other);
        // Until the party hears of the end, a handshake passes and its connection is told to go, perhaps later.
        let token = Message::Token { token: lane.parties.token.clone() };
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let next = stranger(&lane).await;
            let shown = async {
                let (mut tx, mut rx) = next.open_bi().await.ok()?;
                send(&mut tx, &token).await.ok()?;
                receive(&mut rx, CONTROL_LIMIT).await.ok()
            };
            if shown.await == Some(Message::Accept) {
                break;
            }
            assert!(Instant::now() < end, "the place is never free");
        }
    });
}

#[test]
fn a_party_that_is_told_to_stop_answers_first() {
    let Some(model) = model() else { return };
    for victim in 0..3 {
        let (mut lane, _alone) = lane(&model, Limits::default());
        on_one_thread(async {
            let builder = Client::builder().parties(lane.parties.clone()).model(&model).retry_busy(false);
            let c = builder.connect().await.unwrap();
            let ids: Vec<u32> = (0..64).map(|i| 2000 + i).collect();
            let mut running = Box::pin(c.embed_ids(&ids));
            let told = async {
                while lane.metric(victim, "tacet_sessions_accepted_total") != Some(1) {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                let pid = lane.report()[victim].pid.to_string();
                assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
            };
            tokio::select! { r = &mut running => panic!("ended before it was told to stop: {:?}", r.map(|e| e.stats.total_s)), () = told => {} }
            let late = async {
                // It may take its time to hear of the signal, and may have ended by now.
                let end = Instant::now() + Duration::from_secs(60);
                while matches!(lane.linked(end), Ok(true)) {
                    assert!(Instant::now() < end, "party {victim} does not stop");
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                c.embed(&["too late"]).await.unwrap_err()
            };
            let (finished, late) = tokio::join!(running, late);
            let refused = matches!(late.cause(), ClientError::Refused { text, .. } if text.contains("stopping"));
            let gone = matches!(late.cause(), ClientError::Failed { .. } | ClientError::Unreachable { .. });
            assert!(refused || gone, "{late}");
            assert_eq!(finished.unwrap().vector.len(), 384, "{victim}");
        });
    }
}
