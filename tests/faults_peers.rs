//! A party that does not keep to the protocol: the honest ones end that session, say why, keep running, and serve the
//! next one when an honest party is back.

#[allow(dead_code)]
mod common;
#[path = "../src/keys.rs"]
#[allow(dead_code)]
mod keys;
#[path = "../src/local.rs"]
#[allow(dead_code)]
mod local;

use common::rogue::{Fault, Rogue};
use common::{NAMES, World, embed, in_time, on_one_thread, until, until_async};
use tacet_party::config::Limits;
use tacet_protocol::Role;
use tacet_protocol::wire::Message;

fn limits() -> Limits {
    Limits { join_s: 4, session_s: 6, ..Limits::default() }
}

/// A fault, and the texts of which the victim's log shows one.
type Case<'a> = (Fault, &'a [&'a str]);

/// In the middle of a session.
const FAULTS: [Case; 11] = [
    (Fault::Truncated, &["ended within a frame"]),
    (Fault::Oversized, &["a frame of 2147483648 bytes where"]),
    (Fault::Trailing, &["bytes where at most", "was due"]),
    (Fault::Short, &["1 bytes missing", "was due"]),
    (Fault::Reordered, &["was due", "bytes where at most"]),
    (Fault::Replayed, &["was due", "bytes where at most"]),
    (Fault::Version, &["protocol version 200; this side speaks"]),
    (Fault::Unknown, &["kind 200"]),
    (Fault::OtherKind, &["was due"]),
    // Both evaluators wait equally long; the loser sees the winner or the client leave.
    (Fault::Silent, &["longer than 6 s", "the client left", "stream finished early"]),
    // A reset may overtake the message that opens the stream.
    (Fault::Reset, &["reset by peer", "did not join the session in time"]),
];

/// Plays party `rogue` and spoils message `at` of what `victim` gets, once per fault; then the honest party returns.
fn misbehave(rogue: usize, victims: &[(usize, usize, &[Case])]) {
    let mut world = World::start(2, limits());
    world.end(rogue, "TERM");
    on_one_thread(async {
        let mut played = Rogue::new(&world, rogue);
        in_time("linking", played.link()).await;
        let (client, ()) = in_time("connecting", async { tokio::join!(world.client(), played.meet_client()) }).await;
        for &(victim, at, faults) in victims {
            for (fault, says) in faults {
                let role = [Role::E1, Role::E2, Role::Dealer][victim];
                let before = world.log(victim).len();
                // What the rogue holds open stays open until the client has its error. A party that hears of the end
                // before it has begun never turns to the rogue.
                let e = tokio::select! {
                    biased;
                    e = embed(&client) => e,
                    never = async { let _held = played.session(role, at, *fault).await; std::future::pending().await } => never,
                };
                let e = e.expect_err("the session must not succeed");
                let at = format!("{} to {}, message {at}, {fault:?}", NAMES[rogue], NAMES[victim]);
                let named = e.party().is_some();
                assert!(named, "{at}: {e}");
                let said = || world.log(victim)[before..].to_string();
                until_async(&format!("{at}: {says:?}"), || says.iter().any(|s| said().contains(s))).await;
            }
        }
        played.leave().await;
    });
    for honest in (0..3).filter(|i| *i != rogue) {
        assert_eq!(world.page(honest, "/healthz"), "ok\n", "{} is gone", NAMES[honest]);
        assert!(!world.log(honest).contains("panicked"), "{}", world.log(honest));
    }
    world.restart(rogue);
    world.until_ready();
    on_one_thread(async { world.works(&world.client().await).await });
    // A client may have its answer a moment before its session has ended.
    for honest in (0..3).filter(|i| *i != rogue) {
        until("the session to end", || world.metric(honest, "tacet_sessions ") == Some(0));
    }
}

#[test]
fn a_dealer_that_misbehaves() {
    let opening: [Case; 4] = [
        (Fault::Truncated, &["ended within a frame"]),
        (Fault::Trailing, &["1 trailing bytes"]),
        (Fault::OtherKind, &["in place of its start"]),
        (Fault::Silent, &["did not join the session in time", "the client left", "stream finished early"]),
    ];
    misbehave(2, &[(0, 5, &FAULTS), (1, 9, &FAULTS), (0, 0, &opening)]);
}

#[test]
fn a_first_evaluator_that_misbehaves() {
    // The dealer and the other evaluator wait equally long; whoever loses hears of it from the client.
    let not_joined: &[&str] = &["did not join the session in time", "the client left"];
    let opening = [Fault::Truncated, Fault::Trailing].map(|f| (f, not_joined));
    // The exponentials: half of that frame is more than its head.
    misbehave(0, &[(1, 8, &FAULTS), (1, 0, &opening), (2, 0, &opening)]);
}

#[test]
fn a_second_evaluator_that_misbehaves() {
    misbehave(1, &[(0, 0, &FAULTS[..4]), (0, 20, &FAULTS)]);
}

#[test]
fn greetings_that_are_refused_say_why() {
    let mut world = World::start(1, limits());
    world.end(0, "TERM");
    on_one_thread(async {
        let rogue = Rogue::new(&world, 0);
        let change = |f: &dyn Fn(&mut Message)| {
            let mut m = rogue.hello();
            f(&mut m);
            m.encode()
        };
        let mut version = rogue.hello().encode();
        version[4] = 200;
        let mut trailing = rogue.hello().encode();
        trailing.push(0);
        trailing[0] += 1;
        let cases = [
            (version, "protocol version 200; this side speaks"),
            (trailing, "1 trailing bytes"),
            (vec![0xff; 64], "a frame of 4294967295 bytes"),
            (Message::Accept.encode(), "in place of a greeting"),
            (
                change(&|m| {
                    if let Message::Hello { model, .. } = m {
                        model[0] ^= 1
                    }
                }),
                "it has another model",
            ),
            (
                change(&|m| {
                    if let Message::Hello { program, .. } = m {
                        program[0] ^= 1
                    }
                }),
                "plans this model differently",
            ),
            (
                change(&|m| {
                    if let Message::Hello { role, .. } = m {
                        *role = 1
                    }
                }),
                "its role is not the configured one",
            ),
            (
                change(&|m| {
                    if let Message::Hello { name, .. } = m {
                        name.push('x')
                    }
                }),
                "its name is not the configured one",
            ),
            (
                change(&|m| {
                    if let Message::Hello { ephemeral, .. } = m {
                        *ephemeral = [0; 32]
                    }
                }),
                "small order",
            ),
        ];
        for (greeting, says) in cases {
            for (party, role) in [(1, Role::E2), (2, Role::Dealer)] {
                let (connection, _) = rogue.dial(role, &greeting).await;
                connection.closed().await;
                world.until_reason(party, "alpha", says);
                assert!(world.page(party, "/readyz").starts_with("not ready\n"));
            }
        }
        rogue.leave().await;
    });
    world.restart(0);
    world.until_ready();
    on_one_thread(async { world.works(&world.client().await).await });
}
