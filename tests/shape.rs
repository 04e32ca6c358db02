//! What traffic and metrics tell about lengths: a tap before each party notes every frame between it and a client. Texts whose
//! padded lengths are equal cannot be told apart by it, and a party's metrics have no exact number of tokens.

#[path = "common/processes.rs"]
#[allow(dead_code)]
mod processes;
#[path = "common/tap.rs"]
mod tap;
#[path = "common/tiny.rs"]
#[allow(dead_code)]
mod tiny;

use std::time::Duration;

use processes::{Home, Lane, decoder};
use tacet_client::generate::{Decoder, Positions};
use tacet_client::{Client, Generator, Parties};
use tacet_party::config::Limits;
use tacet_protocol::Role;
use tacet_protocol::seal;
use tacet_protocol::wire::INPUT_OVERHEAD;
use tap::{Frame, Tap};
use tiny::Tiny;

const INPUT: u8 = 13;

/// What an evaluator counts of what is sent for its clients.
const COUNTERS: [&str; 2] = ["tacet_opened_bytes_total", "tacet_dealt_bytes_total"];

fn on_one_thread<F: Future>(f: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(f)
}

/// The lane's parties behind taps.
fn tapped(home: &Home, lane: &Lane) -> (Parties, Vec<Tap>) {
    let mut parties = Parties::load(&lane.parties).unwrap();
    let taps = parties.party.iter_mut().map(|p| Tap::before(p, &home.dir)).collect();
    (parties, taps)
}

fn take(taps: &[Tap]) -> Vec<Vec<Frame>> {
    taps.iter().map(Tap::take).collect()
}

#[test]
fn texts_of_one_padded_length_make_the_same_frames() {
    let home = Home::new();
    let tiny = Tiny::new(1);
    let lane = Lane::start(&home, "lane", &tiny.dir, Limits::default());
    on_one_thread(async {
        let (parties, taps) = tapped(&home, &lane);
        let client = Client::builder().parties(parties.clone()).model(&tiny.dir).connect().await.unwrap();
        let mut shapes = Vec::new();
        for n in [1, 2, 5, 8, 9, 16] {
            let ids: Vec<u32> = (0..n).map(|i| 3 + 5 * i % 60).collect();
            client.embed_ids(&ids).await.unwrap();
            shapes.push(take(&taps));
        }
        assert!(shapes[..4].iter().all(|s| *s == shapes[0]), "{shapes:#?}");
        assert_eq!(shapes[4], shapes[5]);
        assert_ne!(shapes[0], shapes[4]);
        for (tokens, shape) in [(8, &shapes[0]), (16, &shapes[4])] {
            let p = client.program(tokens).unwrap();
            for (party, frames) in parties.party.iter().zip(shape) {
                let sent: Vec<&Frame> = frames.iter().filter(|f| f.from_client).collect();
                assert_eq!(sent[0].tokens, Some(tokens as u32), "{frames:?}");
                // A request, the sealed half of an evaluator, and nothing more.
                let sealed = 4 + INPUT_OVERHEAD + p.half_len(party.role) + seal::OVERHEAD;
                match party.role {
                    Role::Dealer => assert_eq!(sent.len(), 1, "{frames:?}"),
                    _ => assert_eq!((sent.len(), sent[1].kind, sent[1].len), (2, INPUT, sealed), "{frames:?}"),
                }
            }
        }
    });
}

/// The frames of a prompt and of `steps` tokens after it.
async fn generated(g: &Generator, taps: &[Tap], prompt: u32, steps: u32) -> Vec<Vec<Frame>> {
    let mut s = g.sequence();
    let tokens: Vec<u32> = (0..prompt).map(|i| 259 + 7 * i % 200).collect();
    s.feed(&tokens, Positions::Last).await.unwrap();
    for i in 0..steps {
        s.feed(&[259 + 11 * (prompt + i) % 200], Positions::Last).await.unwrap();
    }
    take(taps)
}

#[test]
fn prompts_of_one_padded_length_and_all_tokens_make_the_same_frames() {
    let home = Home::new();
    let Some(dir) = decoder() else { return };
    let lane = Lane::start(&home, "lane", &dir, Limits::default());
    on_one_thread(async {
        let (parties, taps) = tapped(&home, &lane);
        let g = Client::builder().parties(parties).model(&dir).generator().await.unwrap();
        let short = generated(&g, &taps, 2, 3).await;
        assert_eq!(generated(&g, &taps, 8, 3).await, short);
        assert_ne!(generated(&g, &taps, 9, 3).await, short);
        // What shows is the number of tokens: every one of them makes the same frames as the others.
        let more = generated(&g, &taps, 5, 4).await;
        for (party, (short, more)) in short.iter().zip(&more).enumerate() {
            assert_eq!(more[0].tokens, Some(8));
            for from_client in [true, false] {
                let of =
                    |all: &[Frame]| all.iter().filter(|f| f.from_client == from_client).cloned().collect::<Vec<_>>();
                let (short, more) = (of(short), of(more));
                assert_eq!(more.len(), short.len() + usize::from(party != 2), "{more:?}");
                assert_eq!(more[..short.len()], short);
                assert!(party == 2 || short[short.len() - 3..].iter().all(|f| f == &more[short.len()]), "{more:?}");
            }
        }
    });
}

#[test]
fn metrics_tell_the_length_of_an_answer_to_a_factor_of_two() {
    let home = Home::new();
    let Some(dir) = decoder() else { return };
    let lane = Lane::start(&home, "lane", &dir, Limits::default());
    on_one_thread(async {
        let parties = Parties::load(&lane.parties).unwrap();
        let g = Client::builder().parties(parties).model(&dir).generator().await.unwrap();
        let counted = || [0, 1].map(|party| COUNTERS.map(|name| lane.metric(party, name)));
        let (mut before, mut opened, mut increments) = (counted(), Vec::new(), Vec::new());
        assert_eq!(before, [[0; 2]; 2]);
        for steps in 6..11 {
            let spent = g.spent().opened_bytes;
            generated(&g, &[], 5, steps).await;
            opened.push(g.spent().opened_bytes - spent);
            // The connection's own work, which tells the parties that the sequence was dropped, goes on meanwhile.
            let ended = async {
                while (0..3).any(|p| lane.metric(p, "tacet_sessions") > 0) {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(60), ended).await.expect("the sequence ends");
            let after = counted();
            let more = [0, 1].map(|p| [0, 1].map(|c| after[p][c] - before[p][c]));
            assert!(more.iter().flatten().all(|n| n.is_power_of_two()), "{more:?}");
            assert_eq!(more.map(|m| m[0]), [opened[opened.len() - 1].next_power_of_two(); 2]);
            increments.push(more);
            before = after;
        }
        // Answers of different lengths, most of which look the same.
        assert!(opened.windows(2).all(|w| w[0] < w[1]), "{opened:?}");
        increments.dedup();
        assert!(increments.len() <= 3, "{increments:?}");
    });
}
