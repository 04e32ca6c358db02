//! Later turns of private sequences over real processes: padded, taken back, ended early, and asked for by clients that lie.
//! The models are tiny checkpoints of the tree.

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
use quinn::{RecvStream, SendStream};
use tacet_client::generate::{Decoder, Positions};
use tacet_client::{Client, ClientError, Generator, Sequence};
use tacet_party::config::{Limits, unhex};
use tacet_protocol::Role;
use tacet_protocol::model::decoder::DecoderModel;
use tacet_protocol::plan::DecoderPlanner;
use tacet_protocol::program::Program;
use tacet_protocol::query::step_digest;
use tacet_protocol::seal::{SealContext, seal};
use tacet_protocol::wire::{CONTROL_LIMIT, Message, Next, SessionId};
use tacet_transport::{certificate_from_pem, dial_config, endpoint, receive, send};

fn tiny(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("protocol/tests/vectors").join(name)
}

/// One lane at a time: three parties, a client and their deadlines share the machine's cores.
static ALONE: Mutex<()> = Mutex::new(());

fn lane(model: &Path, limits: Limits) -> (Lane, MutexGuard<'static, ()>) {
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    (Lane::start(Path::new(env!("CARGO_BIN_EXE_tacet")), model, limits).unwrap(), alone)
}

async fn generator(lane: &Lane, model: &Path) -> Generator {
    Client::builder().parties(lane.parties.clone()).model(model).generator().await.unwrap()
}

fn on_one_thread<F: Future>(f: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(f)
}

/// Feeds `new` and compares the last logits with those of all of `tokens` in the clear.
async fn check(model: &DecoderModel, s: &mut Sequence, tokens: &mut Vec<u32>, new: &[u32]) {
    tokens.extend(new);
    let got = s.feed(new, Positions::Last).await.unwrap();
    let all = model.logits(tokens).unwrap();
    let want = &all[(tokens.len() - 1) * model.config.vocab..];
    let spread = want.iter().fold(0f64, |m, v| m.max(v.abs()));
    let worst = got[0].iter().zip(want).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
    assert!(got.len() == 1 && worst < 0.02 * spread, "{worst} of {spread} after {} tokens", tokens.len());
    assert_eq!(s.len(), tokens.len());
}

#[test]
fn a_later_turn_spends_its_new_rows_only_and_gives_what_its_tokens_give() {
    for name in ["llama", "qwen3", "gpt2"] {
        let dir = tiny(name);
        let (lane, _alone) = lane(&dir, Limits::default());
        on_one_thread(async {
            let g = generator(&lane, &dir).await;
            let model = DecoderModel::load(&dir).unwrap();
            let planner = DecoderPlanner::new(&model).unwrap();
            let (mut s, mut t) = (g.sequence(), Vec::new());
            // Each feed, and the program that it has to be.
            check(&model, &mut s, &mut t, &[5, 9, 12, 7, 21, 30, 3, 8, 11, 40, 2, 6]).await;
            check(&model, &mut s, &mut t, &[17]).await;
            check(&model, &mut s, &mut t, &[4, 19, 33, 10, 22]).await;
            check(&model, &mut s, &mut t, &[25]).await;
            // Another turn after the same beginning: the fifth token of the last turn lies at position 22.
            s.truncate(15);
            t.truncate(15);
            check(&model, &mut s, &mut t, &[14, 28, 31]).await;
            check(&model, &mut s, &mut t, &[13]).await;
            // Within the prompt, before everything that was padded in between.
            s.truncate(7);
            t.truncate(7);
            check(&model, &mut s, &mut t, &[16, 20, 24, 26]).await;
            check(&model, &mut s, &mut t, &[18]).await;
            let programs = [(0, 16), (16, 1), (17, 8), (25, 1), (22, 8), (30, 1), (11, 8), (19, 1)];
            let costs: Vec<_> = programs
                .iter()
                .map(|(past, rows)| planner.program(true, *past, *rows, false).unwrap().cost())
                .collect();
            let spent = g.spent();
            assert_eq!(spent.steps, costs.len() as u64, "{name}");
            assert_eq!(spent.rounds, costs.iter().map(|c| u64::from(c.rounds)).sum::<u64>(), "{name}");
            assert_eq!(spent.opened_bytes, costs.iter().map(|c| c.opened_bytes).sum::<u64>(), "{name}");
            assert_eq!(spent.dealt_bytes, costs.iter().flat_map(|c| c.dealt_bytes).sum::<u64>(), "{name}");
            // Moving past keys takes three rounds, and only where positions rotate.
            assert_eq!(costs[2].rounds, costs[0].rounds + if name == "gpt2" { 0 } else { 3 });
        });
        assert!(
            (0..2).all(|i| lane.metric(i, "tacet_sessions_accepted_total") == Some(1)),
            "one session served it all"
        );
    }
}

#[test]
fn taking_back_after_every_answer_stays_in_step() {
    let dir = tiny("llama");
    let (lane, _alone) = lane(&dir, Limits { buffer_mb: 1, ..Limits::default() });
    on_one_thread(async {
        let g = generator(&lane, &dir).await;
        let model = DecoderModel::load(&dir).unwrap();
        let (mut s, mut t) = (g.sequence(), Vec::new());
        check(&model, &mut s, &mut t, &[5, 9, 12, 7, 21, 30, 3, 8]).await;
        for i in 0..25u32 {
            let keep = 4 + i as usize % 5;
            s.truncate(keep);
            t.truncate(keep);
            let new = [i % 40, 41 - i, 7, 23];
            check(&model, &mut s, &mut t, &new[..1 + i as usize % 3]).await;
        }
    });
}

#[test]
fn a_sequence_that_padding_has_filled_begins_again_and_one_that_is_too_long_says_so() {
    let dir = tiny("llama");
    let (lane, _alone) = lane(&dir, Limits::default());
    on_one_thread(async {
        let g = generator(&lane, &dir).await;
        let model = DecoderModel::load(&dir).unwrap();
        let longest = g.longest();
        let (mut s, mut t) = (g.sequence(), Vec::new());
        // Ten turns of two tokens take eight positions each.
        for i in 0..12u32 {
            check(&model, &mut s, &mut t, &[3 + i, 50 - i]).await;
        }
        check(&model, &mut s, &mut t, &vec![11; longest - 24]).await;
        let e = s.feed(&[5], Positions::Last).await.unwrap_err();
        let ClientError::ContextLength { tokens, positions, limit } = e else { panic!("{e}") };
        assert_eq!((tokens, positions, limit), (longest + 1, 96, longest));
    });
}

fn running(lane: &Lane, party: usize) -> Option<u64> {
    lane.metric(party, "tacet_sessions")
}

/// Polls until something that has to happen has happened; the limit only tells a hang from a slow machine.
async fn until(what: &str, done: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(40);
    while !done() {
        assert!(Instant::now() < end, "waited too long for {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn until_free(lane: &Lane) {
    until("the session to end on all three", || (0..3).all(|i| running(lane, i) == Some(0))).await;
}

#[test]
fn a_client_that_vanishes_within_a_step_or_between_two_frees_all_three() {
    let dir = tiny("llama");
    let (lane, _alone) = lane(&dir, Limits { sessions: 1, idle_s: 600, ..Limits::default() });
    on_one_thread(async {
        let g = generator(&lane, &dir).await;
        // Between two steps, after a turn, and after what was taken back.
        let mut s = g.sequence();
        s.feed(&[5, 9], Positions::Last).await.unwrap();
        s.feed(&[7, 8], Positions::Last).await.unwrap();
        s.truncate(3);
        assert!((0..3).all(|i| running(&lane, i) == Some(1)));
        drop(s);
        until_free(&lane).await;
        // Within the prompt's program and a later one, which cannot end while an evaluator stands still.
        for tokens in [&[][..], &[5, 9], &[5, 9, 7, 8]] {
            let mut s = g.sequence();
            if !tokens.is_empty() {
                s.feed(tokens, Positions::Last).await.unwrap();
                signal(&lane, "STOP");
            }
            let feeding = async {
                let _ = s.feed(&[11; 8], Positions::Last).await;
                assert!(tokens.is_empty(), "an answer of an evaluator that stands still");
            };
            let _ = tokio::time::timeout(Duration::from_millis(100), feeding).await;
            drop(s);
            if !tokens.is_empty() {
                until("two parties to be free", || [0, 2].iter().all(|i| running(&lane, *i) == Some(0))).await;
                signal(&lane, "CONT");
            }
            until_free(&lane).await;
        }
    });
    // A client that falls silent: nobody drives its connections any more.
    let silent = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let sequence = silent.block_on(async {
        let g = generator(&lane, &dir).await;
        let mut s = g.sequence();
        s.feed(&[5, 9], Positions::Last).await.unwrap();
        s
    });
    on_one_thread(async {
        assert!((0..3).all(|i| running(&lane, i) == Some(1)));
        until_free(&lane).await;
    });
    drop((sequence, silent));
}

/// To the second evaluator.
fn signal(lane: &Lane, name: &str) {
    let pid = lane.report()[1].pid.to_string();
    assert!(Command::new("kill").args([&format!("-{name}"), &pid]).status().unwrap().success());
}

/// A client below the SDK, with a sequence of its own.
struct Raw<'a> {
    lane: &'a Lane,
    planner: &'a DecoderPlanner,
    model: &'a DecoderModel,
    session: SessionId,
    first: [u8; 32],
    streams: Vec<(SendStream, RecvStream)>,
}

impl Raw<'_> {
    /// Eight tokens, answered.
    async fn begin<'a>(lane: &'a Lane, planner: &'a DecoderPlanner, model: &'a DecoderModel, name: u8) -> Raw<'a> {
        let quic = endpoint(([127, 0, 0, 1], 0).into(), None).unwrap();
        let p = planner.program(true, 0, 8, false).unwrap();
        let mut raw = Raw { lane, planner, model, session: [name; 16], first: p.digest(), streams: Vec::new() };
        let inputs = raw.inputs(&p, p.digest(), 8);
        // A party waits for the others from its request on: no handshake comes in between.
        let mut connections = Vec::new();
        for party in &lane.parties.party {
            let pem = std::fs::read_to_string(&party.certificate).unwrap();
            let dial = dial_config(certificate_from_pem(&pem).unwrap(), None).unwrap();
            connections.push(quic.connect_with(dial, party.addr, "tacet").unwrap().await.unwrap());
        }
        for ((party, input), c) in lane.parties.party.iter().zip(inputs).zip(&connections) {
            let (mut tx, rx) = c.open_bi().await.unwrap();
            let (session, token) = (raw.session, lane.parties.token.clone());
            let request = Message::Request { session, token, model: model.digest(), program: p.digest(), tokens: 8 };
            send(&mut tx, &request).await.unwrap();
            if party.role != Role::Dealer {
                send(&mut tx, &input).await.unwrap();
            }
            raw.streams.push((tx, rx));
        }
        for i in 0..2 {
            assert_eq!(raw.last_word(i).await, None);
        }
        raw
    }

    /// Sealed halves of as many tokens, for each party.
    fn inputs(&self, p: &Program, digest: [u8; 32], tokens: usize) -> Vec<Message> {
        let rows = self.model.embed_tokens(&vec![9; tokens], 0).unwrap();
        let halves = p.split(&p.encode_input(&rows).unwrap()).unwrap();
        let sealed = self.lane.parties.party.iter().map(|party| {
            let context = SealContext {
                session: self.session,
                party: party.name.clone(),
                role: party.role,
                model_digest: self.model.digest(),
                program_digest: digest,
            };
            let half: &[u8] = if party.role == Role::E1 { halves.seed.as_slice() } else { &halves.packed };
            Message::Input { sealed: seal(&unhex(&party.seal_public).unwrap(), &context, half).unwrap() }
        });
        sealed.collect()
    }

    /// Inputs of one token, or of as many as rows, for the program `next`.
    fn step(&self, next: Next) -> Vec<Message> {
        let (past, rows) = (next.past as usize, next.rows as usize);
        let p = self.planner.program(true, past, rows, false).unwrap();
        self.inputs(&p, step_digest(&self.first, next.number, past, rows), rows)
    }

    async fn tell(&mut self, party: usize, m: &Message) {
        // A party that has ended the session stops reading.
        let _ = send(&mut self.streams[party].0, m).await;
    }

    /// None for an answer; what it says where it ends the session.
    async fn last_word(&mut self, party: usize) -> Option<(u16, String)> {
        let rx = &mut self.streams[party].1;
        loop {
            let m = tokio::time::timeout(Duration::from_secs(40), receive(rx, CONTROL_LIMIT)).await.expect("a word");
            match m {
                Ok(Message::Accept) => {}
                Ok(Message::Output { .. }) => return None,
                Ok(Message::Failure { code, text }) => return Some((code, text)),
                m => panic!("{m:?} from party {party}"),
            }
        }
    }
}

#[test]
fn a_client_that_lies_about_what_comes_next_ends_its_own_session_with_a_reason() {
    let dir = tiny("llama");
    let (lane, _alone) = lane(&dir, Limits { join_s: 4, session_s: 20, ..Limits::default() });
    let model = DecoderModel::load(&dir).unwrap();
    let planner = DecoderPlanner::new(&model).unwrap();
    let next = |number, past, rows| Next { number, past, rows };
    const REQUEST: u16 = 4;
    on_one_thread(async {
        // Both evaluators are told the same, which cannot be; the second may hear of it from the first.
        for (name, (wrong, reason)) in [
            (next(1, 9, 1), "9 of 8 positions"),
            (next(1, 0, 8), "0 of 8 positions"),
            (next(1, u32::MAX, 8), "positions cannot be kept"),
            (next(1, 4, 7), "neither one nor a padded length"),
            (next(1, 4, 0), "neither one nor a padded length"),
            (next(1, 4, u32::MAX), "neither one nor a padded length"),
            (next(1, 4, 64), "64 rows after 4 positions, but the model takes 64"),
            (next(2, 4, 1), "program 2 is announced, the next one is 1"),
            (next(0, 0, 8), "program 0 is announced"),
        ]
        .into_iter()
        .enumerate()
        {
            let mut raw = Raw::begin(&lane, &planner, &model, 1 + name as u8).await;
            for i in 0..2 {
                raw.tell(i, &Message::Next(wrong)).await;
            }
            let words = [raw.last_word(0).await.unwrap(), raw.last_word(1).await.unwrap()];
            assert!(words.iter().any(|(code, text)| *code == REQUEST && text.contains(reason)), "{words:?}");
            until_free(&lane).await;
        }
        // Something else to each evaluator, or nothing to one.
        for (name, told) in [
            [Some(next(1, 4, 8)), Some(next(1, 5, 8))],
            [Some(next(1, 4, 8)), Some(next(1, 4, 1))],
            [Some(next(1, 4, 8)), None],
            [None, Some(next(1, 8, 8))],
        ]
        .into_iter()
        .enumerate()
        {
            let mut raw = Raw::begin(&lane, &planner, &model, 20 + name as u8).await;
            for (i, told) in told.into_iter().enumerate() {
                let input = &raw.step(told.unwrap_or(next(1, 8, 1)))[i];
                if let Some(n) = told {
                    raw.tell(i, &Message::Next(n)).await;
                }
                raw.tell(i, input).await;
            }
            for i in 0..2 {
                let (code, text) = raw.last_word(i).await.expect("no answer");
                assert!(code > 0 && !text.is_empty());
            }
            until_free(&lane).await;
        }
        // A second word in place of the input, and an input of a program that was taken back.
        let mut raw = Raw::begin(&lane, &planner, &model, 30).await;
        for i in 0..2 {
            raw.tell(i, &Message::Next(next(1, 4, 8))).await;
            raw.tell(i, &Message::Next(next(1, 4, 8))).await;
        }
        let words = [raw.last_word(0).await.unwrap(), raw.last_word(1).await.unwrap()];
        assert!(words.iter().any(|w| w.0 == REQUEST), "{words:?}");
        let mut raw = Raw::begin(&lane, &planner, &model, 31).await;
        let old = raw.step(next(1, 8, 1));
        for (i, input) in old.iter().enumerate().take(2) {
            raw.tell(i, input).await;
        }
        for (i, input) in old.iter().enumerate().take(2) {
            assert_eq!(raw.last_word(i).await, None);
            raw.tell(i, &Message::Next(next(2, 8, 1))).await;
            raw.tell(i, input).await;
        }
        let words = [raw.last_word(0).await.unwrap(), raw.last_word(1).await.unwrap()];
        assert!(words.iter().any(|w| w.0 == REQUEST), "{words:?}");
        until_free(&lane).await;
        // The dealer is sent nothing.
        let mut raw = Raw::begin(&lane, &planner, &model, 32).await;
        raw.tell(2, &Message::Next(next(1, 4, 8))).await;
        until_free(&lane).await;
        // Others go on.
        let g = generator(&lane, &dir).await;
        check(&model, &mut g.sequence(), &mut Vec::new(), &[5, 9, 12]).await;
    });
}
