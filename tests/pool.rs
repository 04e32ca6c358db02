//! Dealing ahead over real processes: what is used, what is dropped, and what stays within its bounds.

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
use tacet_client::{Client, ClientError, Embedding};
use tacet_party::config::{Limits, Pool};

const READY: &str = "tacet_bundles{state=\"ready\"}";
const DEALER: usize = 2;

fn model() -> Option<PathBuf> {
    let dir = std::env::var_os("TACET_MODEL_DIR").map(PathBuf::from);
    if dir.is_none() {
        println!("skipped: TACET_MODEL_DIR does not name a directory with all-MiniLM-L6-v2");
    }
    dir
}

/// One lane at a time: three parties, a client and their deadlines share the machine's cores.
static ALONE: Mutex<()> = Mutex::new(());

fn lane(model: &Path, pool: Pool) -> (Lane, MutexGuard<'static, ()>) {
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    (Lane::start_with(Path::new(env!("CARGO_BIN_EXE_tacet")), model, Limits::default(), pool).unwrap(), alone)
}

fn on_one_thread<F: Future>(f: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(f)
}

/// Waits until all three parties report `value`.
async fn all(lane: &Lane, name: &str, value: u64) {
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        let seen: Vec<_> = (0..3).map(|p| lane.metric(p, name)).collect();
        if seen.iter().all(|v| *v == Some(value)) {
            return;
        }
        assert!(Instant::now() < until, "{name}: {seen:?}, not {value} everywhere");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn ids(tokens: u32) -> Vec<u32> {
    (0..tokens).map(|i| 2000 + i).collect()
}

/// Embeds and compares with plaintext: with masks that differ at the two ends the answer would be noise.
async fn embed(c: &Client, ids: &[u32]) -> Embedding {
    let e = c.embed_ids(ids).await.unwrap();
    let plain = c.model().plaintext(ids).unwrap();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    let cosine = dot(&e.vector, &plain) / (dot(&e.vector, &e.vector) * dot(&plain, &plain)).sqrt();
    assert!(cosine >= 0.999, "{cosine}");
    e
}

#[test]
fn the_second_query_of_a_length_uses_a_bundle_and_each_serves_once() {
    let Some(model) = model() else { return };
    let (lane, _alone) = lane(&model, Pool { depth: 1, ..Pool::default() });
    on_one_thread(async {
        let c = Client::builder().parties(lane.parties.clone()).model(&model).connect().await.unwrap();
        let first = embed(&c, &ids(9)).await;
        assert!(!first.stats.dealt_ahead && first.stats.dealing_s > 0.0);
        for used in 1..=3 {
            all(&lane, READY, 1).await;
            let e = embed(&c, &ids(9)).await;
            assert!(e.stats.dealt_ahead && e.stats.dealing_s > 0.0);
            assert_eq!(
                (e.stats.rounds, e.stats.opened_bytes, e.stats.dealt_bytes),
                (first.stats.rounds, first.stats.opened_bytes, first.stats.dealt_bytes)
            );
            all(&lane, "tacet_bundles_used_total", used).await;
        }
        all(&lane, "tacet_bundles_dropped_total", 0).await;
        assert_eq!(lane.metric(DEALER, "tacet_dealt_fresh_total"), Some(1));
        // Another length is dealt while its query runs, and does not touch the bundle that waits.
        all(&lane, READY, 1).await;
        assert!(!embed(&c, &ids(5)).await.stats.dealt_ahead);
        all(&lane, READY, 2).await;
    });
}

#[test]
fn prefilled_lengths_serve_sessions_that_run_at_once() {
    let Some(model) = model() else { return };
    let (lane, _alone) = lane(&model, Pool { depth: 2, prefill: vec![12, 4], ..Pool::default() });
    on_one_thread(async {
        all(&lane, READY, 4).await;
        let c = Client::builder().parties(lane.parties.clone()).model(&model).connect().await.unwrap();
        let (long, short) = (ids(12), ids(4));
        let (a, b, d, e) = tokio::join!(embed(&c, &long), embed(&c, &short), embed(&c, &long), embed(&c, &short));
        assert!([a, b, d, e].iter().all(|e| e.stats.dealt_ahead));
        all(&lane, READY, 4).await;
        all(&lane, "tacet_bundles_used_total", 4).await;
    });
}

#[test]
fn a_restarted_party_leaves_no_stale_bundle_in_use() {
    let Some(model) = model() else { return };
    for victim in 0..3 {
        let (mut lane, _alone) = lane(&model, Pool { depth: 1, prefill: vec![6], ..Pool::default() });
        on_one_thread(async {
            all(&lane, READY, 1).await;
            lane.kill(victim);
            lane.restart(victim).unwrap();
            // Another client, since the first one's connection to the victim is gone; a query may meet the broken link.
            let until = Instant::now() + Duration::from_secs(40);
            loop {
                let c = Client::builder().parties(lane.parties.clone()).model(&model).connect().await.unwrap();
                match c.embed_ids(&ids(6)).await {
                    Ok(_) => break,
                    Err(ClientError::Refused { .. } | ClientError::Failed { .. } | ClientError::Unreachable { .. })
                        if Instant::now() < until => {}
                    Err(e) => panic!("{e}"),
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            let c = Client::builder().parties(lane.parties.clone()).model(&model).connect().await.unwrap();
            for _ in 0..2 {
                all(&lane, READY, 1).await;
                assert!(embed(&c, &ids(6)).await.stats.dealt_ahead, "{victim}");
            }
        });
    }
}

#[test]
fn memory_is_bounded_and_recent_lengths_come_first() {
    let Some(model) = model() else { return };
    // One evaluator's part of a bundle of 16 tokens is 17 MB, of 8 tokens 8 MB.
    let (lane, _alone) = lane(&model, Pool { memory_mb: 20, depth: 2, prefill: vec![8], ..Pool::default() });
    on_one_thread(async {
        let within = |lane: &Lane| {
            (0..2).for_each(|p| assert!(lane.metric(p, "tacet_bundle_bytes").unwrap() <= 20_000_000, "party {p}"))
        };
        all(&lane, READY, 2).await;
        within(&lane);
        let c = Client::builder().parties(lane.parties.clone()).model(&model).connect().await.unwrap();
        let bytes = |n| c.program(n).unwrap().cost().dealt_bytes;
        assert!((0..2).all(|e| bytes(16)[e] + bytes(8)[e] > 20_000_000 && 2 * bytes(8)[e] <= 20_000_000));
        assert!(!embed(&c, &ids(16)).await.stats.dealt_ahead);
        // One of the new length; both of the old one made way, and a second new one does not fit.
        all(&lane, READY, 1).await;
        within(&lane);
        all(&lane, "tacet_bundles_dropped_total", 2).await;
        assert_eq!(lane.metric(0, "tacet_bundle_bytes"), Some(bytes(16)[0]));
        assert!(embed(&c, &ids(16)).await.stats.dealt_ahead);
        within(&lane);
        // A length that can never fit is dealt while its query runs.
        assert!(!embed(&c, &ids(30)).await.stats.dealt_ahead);
        assert!(!embed(&c, &ids(30)).await.stats.dealt_ahead);
        within(&lane);
    });
}

#[test]
fn no_pool_means_fresh_dealing() {
    let Some(model) = model() else { return };
    let (lane, _alone) = lane(&model, Pool { memory_mb: 0, ..Pool::default() });
    on_one_thread(async {
        let c = Client::builder().parties(lane.parties.clone()).model(&model).connect().await.unwrap();
        for _ in 0..2 {
            assert!(!embed(&c, &ids(4)).await.stats.dealt_ahead);
        }
        all(&lane, "tacet_bundles_used_total", 0).await;
        all(&lane, READY, 0).await;
        assert_eq!(lane.metric(DEALER, "tacet_dealt_fresh_total"), Some(2));
    });
}
