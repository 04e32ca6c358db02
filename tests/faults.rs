//! Faults over real processes: each ends in an error that names its cause, and the next session is unharmed.

#[path = "../src/keys.rs"]
#[allow(dead_code)]
mod keys;
#[path = "../src/local.rs"]
#[allow(dead_code)]
mod local;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use local::Lane;
use tacet_client::{Client, ClientError, Parties};
use tacet_party::config::Limits;
use tacet_protocol::wire::{CONTROL_LIMIT, Message};
use tacet_transport::{certificate_from_pem, dial_config, endpoint, receive};

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
    (Lane::start(Path::new(env!("CARGO_BIN_EXE_tacet")), model, limits).unwrap(), alone)
}

fn on_one_thread<F: Future>(f: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(f)
}

async fn connect(parties: &Parties, model: &Path) -> Client {
    Client::connect(parties, model).await.unwrap()
}

async fn still_works(c: &Client) {
    assert_eq!(c.embed(&["still here"]).await.unwrap()[0].vector.len(), 384);
}

#[test]
fn an_unknown_token_is_refused_and_a_limit_sheds_the_excess() {
    let Some(model) = model() else { return };
    let (lane, _alone) = lane(&model, Limits { sessions: 4, ..Limits::default() });
    on_one_thread(async {
        let mut p = lane.parties.clone();
        p.token = "guess".into();
        let e = connect(&p, &model).await.embed(&["x"]).await.unwrap_err();
        assert!(matches!(e, ClientError::Refused { code: 1, .. }), "{e}");

        let c = connect(&lane.parties, &model).await;
        let ids = c.tokens(0, &"card ".repeat(40)).unwrap();
        let mut all = Vec::new();
        for _ in 0..16 {
            all.push(Box::pin(c.embed_ids(&ids)));
        }
        let (mut done, mut shed) = (0, 0);
        let results = join_all(all).await;
        for r in results {
            match r {
                Ok(_) => done += 1,
                Err(ClientError::Refused { code: 2, .. }) => shed += 1,
                Err(e) => panic!("{e}"),
            }
        }
        assert!(done >= 4 && shed >= 1 && done + shed == 16, "{done} {shed}");
        still_works(&c).await;
    });
}

async fn join_all<F: Future + Unpin>(mut all: Vec<F>) -> Vec<F::Output> {
    let mut out: Vec<Option<F::Output>> = all.iter().map(|_| None).collect();
    std::future::poll_fn(|cx| {
        for (f, o) in all.iter_mut().zip(&mut out) {
            if o.is_none()
                && let std::task::Poll::Ready(v) = std::pin::Pin::new(f).poll(cx)
            {
                *o = Some(v);
            }
        }
        if out.iter().all(Option::is_some) { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
    out.into_iter().flatten().collect()
}

#[test]
fn a_killed_party_ends_the_session_with_its_name_within_a_deadline() {
    let Some(model) = model() else { return };
    for victim in 0..3 {
        let (mut lane, _alone) = lane(&model, Limits::default());
        on_one_thread(async {
            let c = connect(&lane.parties, &model).await;
            let ids = c.tokens(0, &"card ".repeat(120)).unwrap();
            let started = Instant::now();
            let session = c.embed_ids(&ids);
            let kill = async {
                tokio::time::sleep(Duration::from_millis(300)).await;
                lane.kill(victim);
                std::future::pending::<()>().await;
            };
            let e = tokio::select! { r = session => r.unwrap_err(), () = kill => unreachable!() };
            assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
            assert!(matches!(e, ClientError::Refused { .. } | ClientError::Failed { .. }), "{e}");
        });
    }
}

#[test]
fn malformed_bytes_end_only_their_own_stream() {
    let Some(model) = model() else { return };
    let (lane, _alone) = lane(&model, Limits::default());
    on_one_thread(async {
        let c = connect(&lane.parties, &model).await;
        let quic = endpoint(([127, 0, 0, 1], 0).into(), None).unwrap();
        let request = |session: u8| {
            let p = c.program(5).unwrap();
            let token = lane.parties.token.clone();
            Message::Request {
                session: [session; 16],
                token,
                model: c.model().digest(),
                program: p.digest(),
                tokens: 5,
            }
            .encode()
        };
        let with_input = |session: u8, sealed: usize| {
            [request(session), Message::Input { sealed: vec![7; sealed] }.encode()].concat()
        };
        let mut truncated = request(1);
        truncated.truncate(30);
        let mut trailing = request(2);
        trailing.push(0);
        let n = (trailing.len() - 4) as u32;
        trailing[..4].copy_from_slice(&n.to_le_bytes());
        let mut version = request(3);
        version[4] = 9;
        let mut tokens = request(4);
        let at = tokens.len() - 4;
        tokens[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        let cases = [
            (vec![0xff; 64], "allowed"),
            (trailing, "trailing"),
            (version, "version 9"),
            (tokens, "tokens"),
            (Message::Accept.encode(), "starts with a request"),
            (with_input(5, 80), "sealed input rejected"),
            (with_input(5, 80), "used before"),
            (with_input(6, 81), "at most 86 are allowed"),
            ([request(7), Message::Accept.encode()].concat(), "followed by its input"),
            (truncated, ""),
        ];
        let target = &lane.parties.party[0];
        let pem = std::fs::read_to_string(&target.certificate).unwrap();
        let dial = dial_config(certificate_from_pem(&pem).unwrap(), None).unwrap();
        let raw = quic.connect_with(dial, target.addr, "tacet").unwrap().await.unwrap();
        for (bytes, want) in cases {
            let (mut tx, mut rx) = raw.open_bi().await.unwrap();
            tx.write_all(&bytes).await.unwrap();
            if want.is_empty() {
                tx.finish().unwrap();
            }
            let mut said = String::new();
            while let Ok(m) =
                tokio::time::timeout(Duration::from_secs(10), receive(&mut rx, CONTROL_LIMIT)).await.unwrap()
            {
                if let Message::Failure { text, .. } = m {
                    said = text;
                }
            }
            assert!(said.contains(want), "{want:?}: {said:?}");
        }
        // Another certificate than the pinned one.
        let wrong = std::fs::read_to_string(&lane.parties.party[1].certificate).unwrap();
        let dial = dial_config(certificate_from_pem(&wrong).unwrap(), None).unwrap();
        let e = quic.connect_with(dial, target.addr, "tacet").unwrap().await.unwrap_err();
        assert!(e.to_string().contains("not the pinned one"), "{e}");
        still_works(&c).await;
    });
}

#[test]
fn a_client_that_leaves_frees_its_session() {
    let Some(model) = model() else { return };
    let (lane, _alone) = lane(&model, Limits { sessions: 1, ..Limits::default() });
    on_one_thread(async {
        let c = connect(&lane.parties, &model).await;
        let ids = c.tokens(0, &"card ".repeat(120)).unwrap();
        let left = tokio::time::timeout(Duration::from_millis(400), c.embed_ids(&ids)).await;
        assert!(left.is_err());
        // The only session of each party is free again as soon as the three have noticed.
        let until = Instant::now() + Duration::from_secs(15);
        while let Err(e) = c.embed(&["again"]).await {
            assert!(matches!(e, ClientError::Refused { code: 2, .. }) && Instant::now() < until, "{e}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
}
