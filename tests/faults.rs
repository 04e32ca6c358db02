//! Faults of clients, and of parties in the middle of their sessions, over real processes: each ends in an error that
//! names its cause, and the next session is unharmed.

#[allow(dead_code)]
mod common;
#[path = "../src/keys.rs"]
#[allow(dead_code)]
mod keys;
#[path = "../src/local.rs"]
#[allow(dead_code)]
mod local;

use std::time::{Duration, Instant};

use common::raw::{self, Raw};
use common::tiny::{self, Random};
use common::{World, embed, join_all, on_one_thread, until_async};
use tacet_client::ClientError;
use tacet_party::config::Limits;
use tacet_protocol::ring::{mask, pack};
use tacet_protocol::wire::Message;
use tacet_transport::{certificate_from_pem, dial_config, endpoint, send};

#[test]
fn an_unknown_token_is_refused() {
    let world = World::start(1, Limits::default());
    on_one_thread(async {
        let mut p = world.lane.parties.clone();
        p.token = "guess".into();
        let stranger = tacet_client::Client::builder().parties(p).model(&world.model.dir).connect().await.unwrap();
        let e = embed(&stranger).await.unwrap_err();
        assert!(matches!(e, ClientError::Refused { code: 1, .. }), "{e}");
        world.works(&world.client().await).await;
    });
}

#[test]
fn of_many_sessions_at_once_each_completes_or_is_refused_as_busy() {
    let world = World::start(1, Limits { sessions: 16, join_s: 30, ..Limits::default() });
    on_one_thread(async {
        let c = world.client().await;
        // With the dealer frozen none can complete before all 64 have been admitted or refused.
        world.signal(2, "STOP");
        let all = join_all((0..64).map(|_| embed(&c)));
        let thaw = async {
            until_async("48 to be refused", || world.metric(0, "tacet_sessions_refused_total ") == Some(48)).await;
            assert_eq!(world.metric(0, "tacet_sessions "), Some(16));
            world.signal(2, "CONT");
        };
        let (results, ()) = tokio::join!(all, thaw);
        let mut done = 0;
        for r in results {
            match r {
                Ok(e) => {
                    world.check(&e);
                    done += 1;
                }
                Err(ClientError::Refused { code: 2, .. }) => {}
                Err(e) => panic!("{e}"),
            }
        }
        assert_eq!(done, 16);
        // Those that were refused left nothing behind at any party, and the places are free again.
        for i in 0..3 {
            until_async("every place to be free", || world.metric(i, "tacet_sessions ") == Some(0)).await;
        }
        for r in join_all((0..16).map(|_| embed(&c))).await {
            world.check(&r.unwrap_or_else(|e| panic!("{e}")));
        }
    });
}

#[test]
fn absurd_shares_spoil_only_their_own_session() {
    let world = World::start(2, Limits { join_s: 2, ..Limits::default() });
    let mut random = Random::new(tiny::seed());
    on_one_thread(async {
        let c = world.client().await;
        let raw = Raw::connect(&world, &c).await;
        let p = c.program(common::IDS.len()).unwrap();
        let half = |word: &mut dyn FnMut(u32) -> u64| -> Vec<u8> {
            let input = |v: usize| {
                let v = &p.values[v];
                pack(&(0..v.len()).map(|_| word(v.bits)).collect::<Vec<_>>(), v.bits)
            };
            p.inputs().flat_map(input).collect()
        };
        let halves = [half(&mut mask), half(&mut |bits| 1 << (bits - 1)), half(&mut |bits| random.word() & mask(bits))];
        for (i, half) in halves.iter().enumerate() {
            let (absurd, honest) =
                tokio::join!(raw.session([i as u8; 16], &p, [&[0xff; 32], half]), join_all((0..4).map(|_| embed(&c))));
            assert!(matches!(
                absurd[..],
                [Ok(Message::Output { .. }), Ok(Message::Output { .. }), Ok(Message::Done { .. })]
            ));
            for e in honest {
                world.check(&e.unwrap_or_else(|e| panic!("{e}")));
            }
        }
        // Halves of another form than the program's are refused by the party that opens them.
        let half = &halves[0];
        let (short, long) = (&half[1..], [&half[..], &[0]].concat());
        for (i, (halves, party, says)) in [
            ([&[1; 31][..], half], 0, "31 bytes, 32 are due"),
            ([&[1; 32], short], 1, "are due"),
            ([&[1; 32], &long], 1, "are allowed"),
            ([&[1; 32], &[]], 1, "are due"),
        ]
        .into_iter()
        .enumerate()
        {
            let answers = raw.session([100 + i as u8; 16], &p, halves).await;
            assert!(answers.iter().all(Result::is_err));
            let (code, text) = answers[party].as_ref().unwrap_err();
            assert!(*code == 4 && text.contains(says), "{code}: {text}");
        }
        world.works(&c).await;
    });
}

#[test]
fn a_killed_party_ends_the_session_with_an_error_within_a_deadline() {
    for victim in 0..3 {
        let mut world = World::start(2, Limits { join_s: 30, ..Limits::default() });
        on_one_thread(async {
            let c = world.client().await;
            // Another party is frozen, so that the session is still running when the victim dies.
            let frozen = (victim + 1) % 3;
            world.signal(frozen, "STOP");
            let started = Instant::now();
            let kill = async {
                until_async("the session to run", || world.metric(victim, "tacet_sessions_accepted_total ") == Some(1))
                    .await;
                world.end(victim, "KILL");
                world.signal(frozen, "CONT");
            };
            let (e, ()) = tokio::join!(embed(&c), kill);
            let e = e.unwrap_err();
            // Before anyone gives up waiting for it to join.
            assert!(started.elapsed() < Duration::from_secs(29), "{:?}", started.elapsed());
            let named =
                matches!(e, ClientError::Refused { .. } | ClientError::Failed { .. } | ClientError::Unreachable { .. });
            assert!(named, "{e}");
        });
        for alive in (0..3).filter(|i| *i != victim) {
            assert_eq!(world.page(alive, "/healthz"), "ok\n");
        }
    }
}

#[test]
fn malformed_bytes_end_only_their_own_stream() {
    let world = World::start(1, Limits { join_s: 2, ..Limits::default() });
    on_one_thread(async {
        let c = world.client().await;
        let raw = Raw::connect(&world, &c).await;
        let p = c.program(5).unwrap();
        let request = |session: u8| raw.request([session; 16], &p).encode();
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
        version[4] = 200;
        let mut tokens = request(4);
        let at = tokens.len() - 4;
        tokens[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        let cases = [
            // First of all a known token, without which the connection would not last.
            (with_input(5, 80), "sealed input rejected"),
            (vec![0xff; 64], "allowed"),
            (trailing, "trailing"),
            (version, "version 200"),
            (tokens, "tokens"),
            (Message::Accept.encode(), "starts with a request"),
            (with_input(5, 80), "used before"),
            (with_input(6, 81), "at most 86 are allowed"),
            ([request(7), Message::Accept.encode()].concat(), "followed by its input"),
            (truncated.clone(), "no request arrived"),
        ];
        for (bytes, want) in cases {
            let (_, said) = raw::bytes(&raw.connections[0], &bytes, false).await.unwrap_err();
            assert!(said.contains(want), "{want:?}: {said:?}");
        }
        let (_, said) = raw::bytes(&raw.connections[0], &truncated, true).await.unwrap_err();
        assert!(said.contains("ended within a frame"), "{said:?}");
        // Another certificate than the pinned one.
        let target = &world.lane.parties.party[0];
        let quic = endpoint(([127, 0, 0, 1], 0).into(), None).unwrap();
        let wrong = std::fs::read_to_string(&world.lane.parties.party[1].certificate).unwrap();
        let dial = dial_config(certificate_from_pem(&wrong).unwrap(), None).unwrap();
        let e = quic.connect_with(dial, target.addr, "tacet").unwrap().await.unwrap_err();
        assert!(e.to_string().contains("not the pinned one"), "{e}");
        world.works(&c).await;
    });
}

#[test]
fn a_client_that_leaves_frees_its_session() {
    let world = World::start(1, Limits { sessions: 1, ..Limits::default() });
    on_one_thread(async {
        let c = world.client().await;
        world.signal(2, "STOP");
        let running = async {
            until_async("the session to run", || world.metric(0, "tacet_sessions ") == Some(1)).await;
        };
        tokio::select! { r = embed(&c) => panic!("{r:?}"), () = running => {} }
        // The dropped future has reset its streams; the only place is free while the dealer is still frozen.
        until_async("the place to be free", || world.metric(0, "tacet_sessions ") == Some(0)).await;
        world.signal(2, "CONT");
        world.works(&c).await;
    });
}

#[test]
fn clients_that_do_not_read_hold_no_session_for_long() {
    let world = World::start(2, Limits { sessions: 2, join_s: 2, ..Limits::default() });
    on_one_thread(async {
        let c = world.client().await;
        let deaf = Raw::deaf(&world, &c).await;
        let p = c.program(8).unwrap();
        let mut streams = Vec::new();
        for name in 0..2 {
            let (mut tx, rx) = deaf.connections[0].open_bi().await.unwrap();
            send(&mut tx, &deaf.request([name; 16], &p)).await.unwrap();
            streams.push((tx, rx));
        }
        until_async("all places to be taken", || world.metric(0, "tacet_sessions ") == Some(2)).await;
        until_async("the places to be free", || world.metric(0, "tacet_sessions ") == Some(0)).await;
        world.works(&c).await;
    });
}
