//! Parties that stop, come back, hold another model or another certificate, and what they leave behind.

#[allow(dead_code)]
mod common;
#[path = "../src/keys.rs"]
#[allow(dead_code)]
mod keys;
#[path = "../src/local.rs"]
#[allow(dead_code)]
mod local;

use std::collections::BTreeMap;
use std::path::Path;

use common::raw::Raw;
use common::rogue::{Fault, Rogue};
use common::tiny::{self, Random};
use common::{NAMES, World, embed, in_time, join_all, on_one_thread, until, until_async};
use tacet_client::ClientError;
use tacet_party::config::Limits;
use tacet_protocol::Role;
use tacet_protocol::ring::{mask, pack};

#[test]
fn a_restarted_party_is_linked_again_and_the_next_session_works() {
    let mut world = World::start(2, Limits::default());
    on_one_thread(async { world.works(&world.client().await).await });
    // One that is dialled, and one that dials.
    for party in [1, 0] {
        world.end(party, "KILL");
        world.restart(party);
        // The others take the silence of the old process for a broken link, without being told or restarted.
        let linked = |i: usize| world.log(i).matches("ready role").count();
        let before = linked(party);
        until("the restarted party to be linked", || {
            linked(party) > before || world.page(party, "/readyz") == "ready\n"
        });
        until("a session to work", || on_one_thread(async { embed(&world.client().await).await.is_ok() }));
        world.until_ready();
        on_one_thread(async { world.works(&world.client().await).await });
    }
}

/// Copies the lane's model with one weight changed.
fn other_model(world: &World) -> tiny::Tiny {
    let other = tiny::Tiny::new(2);
    let mut weights = tiny::weights(2);
    weights[9].2[17] += 0.125;
    std::fs::write(other.dir.join("model.safetensors"), tiny::safetensors(&weights)).unwrap();
    assert_ne!(
        std::fs::read(other.dir.join("model.safetensors")).unwrap(),
        std::fs::read(world.model.dir.join("model.safetensors")).unwrap()
    );
    other
}

#[test]
fn a_party_with_another_model_is_not_linked_and_everyone_says_why() {
    let mut world = World::start(2, Limits { join_s: 2, ..Limits::default() });
    let other = other_model(&world);
    for (party, peers) in [(1, [0, 2]), (2, [0, 1])] {
        let ours = world.config(party).model;
        world.end(party, "TERM");
        world.configure(party, |c| c.model = other.dir.clone());
        world.restart(party);
        for peer in peers {
            world.until_reason(peer, NAMES[party], "another model");
            world.until_reason(party, NAMES[peer], "another model");
        }
        on_one_thread(async {
            let e = embed(&world.client().await).await.unwrap_err();
            // Whichever party answers first: the one with the other model, or one that misses it.
            let text = e.to_string();
            match e {
                ClientError::Refused { party: p, code: 3, .. } | ClientError::Failed { party: p, .. } => {
                    assert_eq!(p, NAMES[party], "{text}");
                }
                ClientError::Refused { code: 5, .. } => {
                    assert!(
                        text.contains(&format!("party {}", NAMES[party])) || text.contains("did not join"),
                        "{text}"
                    );
                }
                _ => panic!("{text}"),
            }
        });
        world.end(party, "TERM");
        world.configure(party, |c| c.model = ours);
        world.restart(party);
        world.until_ready();
        on_one_thread(async { world.works(&world.client().await).await });
    }
}

#[test]
fn a_party_with_another_certificate_is_not_linked() {
    let mut world = World::start(1, Limits::default());
    let pinned = world.config(0).peer[0].certificate.clone();
    keys::make(&world.dir(), "mallory").unwrap();
    let wrong = world.dir().join("mallory.crt");
    // A dialler that expects another certificate, then one that is itself not expected.
    for (party, peer, reason) in [(0, 1, "not the pinned one"), (1, 0, "")] {
        let at = world.config(party).peer.iter().position(|p| p.name == NAMES[peer]).unwrap();
        let right = world.config(party).peer[at].certificate.clone();
        world.end(party, "TERM");
        world.configure(party, |c| c.peer[at].certificate = wrong.clone());
        world.restart(party);
        world.until_reason(party, NAMES[peer], reason);
        world.until_reason(peer, NAMES[party], "");
        on_one_thread(async {
            let e = embed(&world.client().await).await.unwrap_err();
            // The one that misses the other, or the dealer, which sees the first one leave.
            assert!(matches!(e, ClientError::Refused { code: 5 | 6, .. } | ClientError::Failed { .. }), "{e}");
        });
        world.end(party, "TERM");
        world.configure(party, |c| c.peer[at].certificate = right);
        world.restart(party);
        world.until_ready();
    }
    assert_eq!(world.config(0).peer[0].certificate, pinned);
    on_one_thread(async { world.works(&world.client().await).await });
}

#[test]
fn a_party_that_is_told_to_stop_finishes_what_runs() {
    let mut world = World::start(2, Limits { join_s: 30, ..Limits::default() });
    for (party, name) in NAMES.into_iter().enumerate() {
        // So that the process is this test's child, whose status it can read.
        world.end(party, "TERM");
        world.restart(party);
        world.until_ready();
        on_one_thread(async {
            let c = world.client().await;
            world.works(&c).await;
            // Another party is frozen in the middle, so that the session runs for as long as this test likes.
            let frozen = (party + 1) % 3;
            world.signal(frozen, "STOP");
            let stopping = async {
                until_async("the session to run", || world.metric(party, "tacet_sessions_accepted_total ") == Some(2))
                    .await;
                world.signal(party, "TERM");
                until_async("the party to drain", || world.page(party, "/readyz") == "not ready\nstopping\n").await;
                let e = embed(&c).await.unwrap_err();
                assert!(e.to_string().contains("stopping"), "{e}");
                assert!(matches!(&e, ClientError::Refused { party: p, code: 2, .. } if p == name), "{e}");
                world.signal(frozen, "CONT");
            };
            let (finished, ()) = tokio::join!(embed(&c), stopping);
            world.check(&finished.unwrap_or_else(|e| panic!("{name} drains: {e}")));
        });
        assert!(world.wait(party).success(), "{}", world.log(party));
        assert!(world.log(party).contains("drained=true"), "{}", world.log(party));
        world.restart(party);
        world.until_ready();
        on_one_thread(async { world.works(&world.client().await).await });
    }
}

/// Everything that a party's process has open for writing or below the lane's folder, by name.
fn files(world: &World) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    let mut read = |p: &Path| {
        if p.is_file() {
            all.insert(p.display().to_string(), std::fs::read(p).unwrap_or_default());
        }
    };
    for f in std::fs::read_dir(world.dir()).unwrap() {
        read(&f.unwrap().path());
    }
    for party in 0..3 {
        for fd in std::fs::read_dir(format!("/proc/{}/fd", world.pid(party))).unwrap().flatten() {
            if let Ok(p) = std::fs::read_link(fd.path()) {
                read(&p);
            }
        }
    }
    all
}

#[test]
fn a_session_leaves_no_secret_in_any_file() {
    let mut world = World::start(2, Limits { join_s: 2, ..Limits::default() });
    let mut random = Random::new(tiny::seed());
    // So that the lane's folder, where nobody else writes, is their working folder too.
    for party in 0..3 {
        world.end(party, "TERM");
        world.restart(party);
        let cwd = std::fs::read_link(format!("/proc/{}/cwd", world.pid(party))).unwrap();
        assert_eq!(cwd, world.dir().canonicalize().unwrap());
    }
    world.until_ready();
    let names = files(&world).into_keys().collect::<Vec<_>>();
    let (seed, half) = on_one_thread(async {
        let c = world.client().await;
        let p = c.program(3).unwrap();
        let seed = random.bytes(32);
        let input = |v: usize| {
            let v = &p.values[v];
            pack(&(0..v.len()).map(|_| random.word() & mask(v.bits)).collect::<Vec<_>>(), v.bits)
        };
        let half: Vec<u8> = p.inputs().flat_map(input).collect();
        let raw = Raw::connect(&world, &c).await;
        for answer in raw.session([1; 16], &p, [&seed, &half]).await {
            answer.unwrap();
        }
        // One that fails half-way, since errors are what gets logged.
        let mut short = half.clone();
        short.pop();
        assert!(raw.session([2; 16], &p, [&seed, &short]).await.iter().any(Result::is_err));
        (seed, half)
    });
    let token = world.lane.parties.token.clone().into_bytes();
    let hex = |b: &[u8]| tacet_party::config::hex(b).into_bytes();
    let mut secrets = vec![("token", token), ("seed", seed[..16].to_vec()), ("seed in hex", hex(&seed[..8]))];
    // Whatever is written of a share contains one of its aligned pieces.
    secrets.extend(half.chunks_exact(16).map(|piece| ("share", piece.to_vec())));
    secrets.extend(half.chunks_exact(16).map(|piece| ("share in hex", hex(&piece[..8]))));
    let after = files(&world);
    assert_eq!(after.keys().collect::<Vec<_>>(), names.iter().collect::<Vec<_>>(), "a new file");
    for (name, bytes) in &after {
        for (what, secret) in &secrets {
            assert!(!bytes.windows(secret.len()).any(|w| w == secret), "{what} in {name}");
        }
    }
    world.end(0, "TERM");
}

#[test]
fn memory_does_not_grow_with_sessions() {
    let world = World::start(1, Limits::default());
    on_one_thread(async {
        let c = world.client().await;
        let mut early = [0.0; 3];
        for done in (0..500).step_by(10) {
            if done == 100 {
                early = [0, 1, 2].map(|i| world.resident_mb(i));
            }
            for r in join_all((0..10).map(|_| c.embed_ids(&[1, 2]))).await {
                r.unwrap_or_else(|e| panic!("{e}"));
            }
        }
        for (i, early) in early.into_iter().enumerate() {
            let late = world.resident_mb(i);
            println!("{}: {early:.1} MB after 100 sessions, {late:.1} MB after 500", NAMES[i]);
            // 400 session names are 20 KB; a leaked session would be 0.1 MB or more. The slack is for the
            // allocator, which keeps freed memory for seconds.
            assert!(late < early + 24.0, "{}: {early:.1} MB after 100 sessions, {late:.1} MB after 500", NAMES[i]);
        }
    });
    for i in 0..3 {
        // A client may have its answer a moment before its session has ended.
        until("the session to end", || world.metric(i, "tacet_sessions ") == Some(0));
        assert_eq!(world.metric(i, "tacet_sessions_completed_total "), Some(500));
    }
}

#[test]
fn a_client_that_is_killed_frees_its_session() {
    let mut world = World::start(1, Limits { sessions: 1, join_s: 30, ..Limits::default() });
    let parties = world.dir().join("parties.toml");
    std::fs::write(&parties, toml::to_string(&world.lane.parties).unwrap()).unwrap();
    world.end(2, "TERM");
    on_one_thread(async {
        let mut dealer = Rogue::new(&world, 2);
        in_time("linking", dealer.link()).await;
        let mut client = std::process::Command::new(env!("CARGO_BIN_EXE_tacet"))
            .args(["embed", "--text", "w1 w2 w3", "--model"])
            .arg(&world.model.dir)
            .arg("--parties")
            .arg(&parties)
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        in_time("the client", dealer.meet_client()).await;
        // The dealer greets the session and then says nothing: it runs until the evaluators miss the client.
        let _held = in_time("joining", dealer.session(Role::E1, 1, Fault::Silent)).await.unwrap();
        until_async("the session to run", || world.metric(0, "tacet_sessions ") == Some(1)).await;
        client.kill().unwrap();
        client.wait().unwrap();
        until_async("the session to end", || (0..2).all(|i| world.metric(i, "tacet_sessions ") == Some(0))).await;
        // One of the two notices first, and the other sees it leave.
        assert!((0..2).any(|i| world.log(i).contains("the client left")), "{}{}", world.log(0), world.log(1));
        dealer.leave().await;
    });
    world.restart(2);
    world.until_ready();
    on_one_thread(async { world.works(&world.client().await).await });
}
