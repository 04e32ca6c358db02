//! Dealing ahead over real processes: what is used, what is dropped, and what stays within its bounds.

#[path = "../src/keys.rs"]
#[allow(dead_code)]
mod keys;
#[path = "../src/local.rs"]
#[allow(dead_code)]
mod local;

use std::collections::BTreeSet;
use std::os::unix::fs::{DirBuilderExt, FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use local::Lane;
use tacet_client::{Client, ClientError, Embedding};
use tacet_party::config::{Limits, Pool, hex};

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
    // One evaluator's part of a bundle of 16 tokens is 9 MB, of 8 tokens 4.6 MB.
    let (lane, _alone) = lane(&model, Pool { memory_mb: 12, depth: 2, prefill: vec![8], ..Pool::default() });
    on_one_thread(async {
        let within = |lane: &Lane| {
            (0..2).for_each(|p| assert!(lane.metric(p, "tacet_bundle_bytes").unwrap() <= 12_000_000, "party {p}"))
        };
        all(&lane, READY, 2).await;
        within(&lane);
        let c = Client::builder().parties(lane.parties.clone()).model(&model).connect().await.unwrap();
        let bytes = |n| c.program(n).unwrap().cost().dealt_bytes;
        assert!((0..2).all(|e| bytes(16)[e] + bytes(8)[e] > 12_000_000 && 2 * bytes(8)[e] <= 12_000_000));
        assert!(!embed(&c, &ids(16)).await.stats.dealt_ahead);
        // One of the new length; both of the old one made way, and a second new one does not fit. While only one of the old
        // ones has made way, one is ready as well.
        all(&lane, "tacet_bundles_dropped_total", 2).await;
        all(&lane, READY, 1).await;
        within(&lane);
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

/// A folder for bundles, removed at the end.
struct Spool(PathBuf);

impl Spool {
    fn new() -> Spool {
        let dir = std::env::temp_dir().join(format!("tacet-spool-{}", hex(&keys::random::<8>().unwrap())));
        std::fs::DirBuilder::new().mode(0o700).create(&dir).unwrap();
        Spool(dir)
    }

    fn names(&self) -> Vec<std::ffi::OsString> {
        std::fs::read_dir(&self.0).unwrap().map(|e| e.unwrap().file_name()).collect()
    }

    /// What a party's process holds open in it: where to reach it, and the random name that it had.
    fn open(&self, lane: &Lane, party: usize) -> BTreeSet<(PathBuf, PathBuf)> {
        let fds = std::fs::read_dir(format!("/proc/{}/fd", lane.report()[party].pid)).unwrap();
        let links = fds.filter_map(|fd| fd.ok().and_then(|fd| Some((fd.path(), std::fs::read_link(fd.path()).ok()?))));
        links.filter(|(_, to)| to.starts_with(&self.0)).collect()
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn bundles_that_memory_has_no_room_for_wait_on_disk_and_serve_once() {
    let Some(model) = model() else { return };
    let spool = Spool::new();
    std::fs::write(spool.0.join("0a".repeat(16) + ".bundle"), "of a party that was killed").unwrap();
    let dir = Some(spool.0.clone());
    let pool = Pool { memory_mb: 8, spool_mb: 28, spool_dir: dir, depth: 4, prefill: vec![8], ..Pool::default() };
    let (mut lane, _alone) = lane(&model, pool);
    on_one_thread(async {
        let c = Client::builder().parties(lane.parties.clone()).model(&model).connect().await.unwrap();
        let bytes = c.program(8).unwrap().cost().dealt_bytes;
        assert!((0..2).all(|e| (4_000_001..=8_000_000).contains(&bytes[e])), "one in memory, three on disk: {bytes:?}");
        let full = async |lane: &Lane| {
            all(lane, READY, 4).await;
            let held = |p: usize| {
                let seen = spool.open(lane, p);
                assert!(seen.iter().all(|(_, to)| to.to_string_lossy().ends_with(" (deleted)")), "{seen:?}");
                let sizes = seen.iter().map(|(fd, _)| std::fs::metadata(fd).unwrap().len()).sum::<u64>();
                assert_eq!(Some(sizes), lane.metric(p, "tacet_spooled_bytes"));
                assert_eq!(lane.metric(p, "tacet_spooled_bundles"), Some(seen.len() as u64));
                seen.into_iter().map(|(_, name)| name).collect::<BTreeSet<_>>()
            };
            let names = [0, 1, DEALER].map(held);
            assert_eq!(names.each_ref().map(BTreeSet::len), [3, 3, 0]);
            for (e, bytes) in bytes.into_iter().enumerate() {
                assert_eq!(lane.metric(e, "tacet_bundle_bytes"), Some(bytes));
                let spooled = lane.metric(e, "tacet_spooled_bytes").unwrap();
                assert!((3 * bytes..=28_000_000).contains(&spooled), "{spooled}");
            }
            assert!(spool.names().is_empty(), "nothing finds a bundle by name");
            names
        };
        let before = full(&lane).await;
        // All four at once: while one runs nothing is dealt ahead.
        let text = ids(7);
        let (a, b, d, e) = tokio::join!(embed(&c, &text), embed(&c, &text), embed(&c, &text), embed(&c, &text));
        assert!([a, b, d, e].iter().all(|e| e.stats.dealt_ahead));
        all(&lane, "tacet_bundles_used_total", 4).await;
        let after = full(&lane).await;
        assert!(before.iter().zip(&after).all(|(b, a)| b.is_disjoint(a)), "a file that was read is gone");
        all(&lane, "tacet_bundles_dropped_total", 0).await;
        assert_eq!(lane.metric(DEALER, "tacet_dealt_fresh_total"), Some(0));
        // A process that is killed leaves nothing, and another one starts afresh.
        lane.kill(0);
        lane.restart(0).unwrap();
        let again = full(&lane).await;
        assert!(after[0].is_disjoint(&again[0]));
    });
}

#[test]
fn a_bundle_that_was_altered_on_disk_ends_its_session_and_the_lane_goes_on_without_the_disk() {
    let Some(model) = model() else { return };
    let spool = Spool::new();
    let dir = Some(spool.0.clone());
    let pool = Pool { memory_mb: 0, spool_mb: 28, spool_dir: dir, depth: 2, prefill: vec![8], ..Pool::default() };
    let (lane, _alone) = lane(&model, pool);
    on_one_thread(async {
        all(&lane, READY, 2).await;
        for (fd, _) in spool.open(&lane, 0) {
            let file = std::fs::OpenOptions::new().read(true).write(true).open(fd).unwrap();
            let (at, mut byte) = (file.metadata().unwrap().len() / 2, [0]);
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 1], at).unwrap();
        }
        let c = Client::builder().parties(lane.parties.clone()).model(&model).connect().await.unwrap();
        let e = c.embed_ids(&ids(6)).await.unwrap_err();
        assert!(
            matches!(e, ClientError::Refused { code: 6, .. }) && e.to_string().contains("gave back something else"),
            "{e}"
        );
        // Neither the bundle that the session had nor the other one is there any more.
        all(&lane, READY, 0).await;
        assert!(spool.open(&lane, 0).is_empty());
        for _ in 0..2 {
            assert!(!embed(&c, &ids(6)).await.stats.dealt_ahead);
        }
        all(&lane, "tacet_bundles_used_total", 1).await;
        assert_eq!((0..3).map(|p| lane.metric(p, "tacet_sessions_failed_total").unwrap()).max(), Some(1));
    });
}

#[test]
fn a_folder_that_others_may_enter_is_refused() {
    let Some(model) = model() else { return };
    let spool = Spool::new();
    std::fs::set_permissions(&spool.0, PermissionsExt::from_mode(0o755)).unwrap();
    let pool = Pool { spool_mb: 28, spool_dir: Some(spool.0.clone()), ..Pool::default() };
    let e = Lane::start_with(Path::new(env!("CARGO_BIN_EXE_tacet")), &model, Limits::default(), pool).err().unwrap();
    assert!(e.to_string().contains("pool.spool_dir") && e.to_string().contains("chmod 700"), "{e:#}");
}
