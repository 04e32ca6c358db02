//! Private generation end to end: three party processes, real QUIC, a real trained Llama, and what happens when something
//! goes wrong. The model comes from `TACET_SHARED`; without it every test says that it was skipped.

#[path = "../src/keys.rs"]
#[allow(dead_code)]
mod keys;
#[path = "../src/local.rs"]
#[allow(dead_code)]
mod local;
#[path = "common/trained.rs"]
mod trained;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use local::Lane;
use tacet_client::generate::{Codec, Conversation, Decoder, Positions, Request, Sampling};
use tacet_client::{Client, ClientError, Generator};
use tacet_party::config::Limits;
use tacet_protocol::model::decoder::DecoderModel;
use tacet_protocol::plan::DecoderPlanner;
use tacet_protocol::query;

/// One lane at a time: three parties, a client and their deadlines share the machine's cores.
static ALONE: Mutex<()> = Mutex::new(());

fn model() -> Option<(PathBuf, MutexGuard<'static, ()>)> {
    Some((trained::trained()?, ALONE.lock().unwrap_or_else(PoisonError::into_inner)))
}

fn lane(model: &Path, limits: Limits) -> Lane {
    Lane::start(Path::new(env!("CARGO_BIN_EXE_tacet")), model, limits).unwrap()
}

async fn generator(lane: &Lane, model: &Path) -> Generator {
    Client::builder().parties(lane.parties.clone()).model(model).generator().await.unwrap()
}

fn on_one_thread<F: Future>(f: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(f)
}

#[test]
fn a_trained_model_goes_on_as_in_the_clear_at_the_planned_cost() {
    let Some((dir, _alone)) = model() else { return };
    let steps = 60;
    let o = Command::new(env!("CARGO_BIN_EXE_tacet"))
        .args(["generate", "--local", "--model", dir.to_str().unwrap(), "--prompt", ""])
        .args(["--max-tokens", &steps.to_string(), "--temperature", "0", "--json"])
        .output()
        .unwrap();
    assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
    let v: serde_json::Value = serde_json::from_slice(&o.stdout).unwrap();
    let reference: Vec<u64> = serde_json::from_slice(&std::fs::read(dir.join("greedy_200_ids.json")).unwrap()).unwrap();
    let ids = |key: &str| v[key].as_array().unwrap().iter().map(|t| t.as_u64().unwrap()).collect::<Vec<u64>>();
    let all = [ids("prompt_tokens"), ids("tokens")].concat();
    // The closest of the reference's first 60 choices lead by far more than what is lost in fixed point.
    assert_eq!(all, reference[..steps + 1]);

    // The last token is never fed.
    let planner = DecoderPlanner::new(&DecoderModel::load(&dir).unwrap()).unwrap();
    let programs = std::iter::once((0, 8)).chain((8..8 + steps - 1).map(|past| (past, 1)));
    let costs: Vec<_> = programs.map(|(past, rows)| planner.program(true, past, rows, false).unwrap().cost()).collect();
    let spent = |key: &str| v["spent"][key].as_u64().unwrap();
    assert_eq!(spent("steps"), costs.len() as u64);
    assert_eq!(spent("rounds"), costs.iter().map(|c| u64::from(c.rounds)).sum::<u64>());
    assert_eq!(spent("opened_bytes"), costs.iter().map(|c| c.opened_bytes).sum::<u64>());
    assert_eq!(spent("dealt_bytes"), costs.iter().flat_map(|c| c.dealt_bytes).sum::<u64>());
    assert!(costs[1..].iter().all(|c| c.rounds == 17 * 5 + 3));
}

#[test]
fn forgetting_tokens_and_scoring_all_positions_give_the_same_logits() {
    let Some((dir, _alone)) = model() else { return };
    let lane = lane(&dir, Limits::default());
    on_one_thread(async {
        let g = generator(&lane, &dir).await;
        let tokens = [1, 403, 407, 261, 378];
        let plain = DecoderModel::load(&dir).unwrap().logits(&tokens).unwrap();
        let vocab = g.model().config.vocab;
        let near = |got: &[f32], at: usize| {
            let want = &plain[at * vocab..][..vocab];
            let spread = want.iter().fold(0f64, |m, v| m.max(v.abs()));
            got.iter().zip(want).all(|(a, b)| (f64::from(*a) - b).abs() < 0.02 * spread)
        };
        let mut s = g.sequence();
        let all = s.feed(&tokens, Positions::All).await.unwrap();
        assert!(all.len() == 5 && all.iter().enumerate().all(|(at, row)| near(row, at)));
        s.truncate(3);
        assert_eq!(s.len(), 3);
        // The parties keep three tokens, after which the two others come as a padded turn.
        let last = s.feed(&tokens[3..], Positions::Last).await.unwrap();
        assert!(last.len() == 1 && near(&last[0], 4));
    });
}

#[test]
fn a_second_turn_of_a_conversation_spends_what_is_new() {
    let Some((dir, _alone)) = model() else { return };
    let lane = lane(&dir, Limits::default());
    on_one_thread(async {
        let g = generator(&lane, &dir).await;
        let codec = Codec::load(&dir).unwrap().within(g.longest());
        let model = DecoderModel::load(&dir).unwrap();
        let planner = DecoderPlanner::new(&model).unwrap();
        let request = || Request { max_tokens: Some(6), sampling: greedy(), continues: true, ..Request::default() };
        let mut c = Conversation::new(Box::new(g.sequence()));
        let prompt = codec.encode("Once upon a time, there was a little", true).unwrap();
        let (mut text, mut held, mut past, mut costs) = (prompt, 0, 0, Vec::new());
        for more in ["", ". He liked to play", " with his red ball"] {
            text.extend(codec.encode(more, false).unwrap());
            let mut generation = c.generate(&codec, &text, request()).unwrap();
            let mut answer = Vec::new();
            while let Some(step) = generation.next().await.unwrap() {
                answer.push(step.token);
            }
            assert_eq!(generation.reused(), held);
            assert_eq!(answer, in_the_clear(&model, &text, 6));
            // A program of what is new, then single tokens; the last one is not fed.
            for rows in std::iter::once(query::padded(text.len() - held).unwrap()).chain([1; 5]) {
                costs.push(planner.program(true, past, rows, false).unwrap().cost());
                past += rows;
            }
            held = text.len() + 5;
            text.extend(answer);
        }
        let spent = g.spent();
        assert_eq!(spent.steps, costs.len() as u64);
        assert_eq!(spent.rounds, costs.iter().map(|c| u64::from(c.rounds)).sum::<u64>());
        assert_eq!(spent.opened_bytes, costs.iter().map(|c| c.opened_bytes).sum::<u64>());
        assert_eq!(spent.dealt_bytes, costs.iter().flat_map(|c| c.dealt_bytes).sum::<u64>());
    });
}

fn greedy() -> Sampling {
    Sampling { temperature: 0.0, ..Sampling::default() }
}

/// The likeliest continuation by the f64 model.
fn in_the_clear(model: &DecoderModel, text: &[u32], n: usize) -> Vec<u32> {
    let mut all = text.to_vec();
    for _ in 0..n {
        let logits = model.logits(&all).unwrap();
        let row = &logits[(all.len() - 1) * model.config.vocab..];
        let best = (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap();
        all.push(best as u32);
    }
    all.split_off(text.len())
}

#[test]
fn a_killed_party_ends_a_sequence_and_a_client_that_leaves_frees_it() {
    let Some((dir, _alone)) = model() else { return };
    for victim in 0..3 {
        let mut lane = lane(&dir, Limits { sessions: 1, ..Limits::default() });
        on_one_thread(async {
            let g = generator(&lane, &dir).await;
            // One after another in the only place there is: each has to be given back.
            for _ in 0..3 {
                let mut s = g.sequence();
                s.feed(&[1, 403], Positions::Last).await.unwrap();
                s.feed(&[407], Positions::Last).await.unwrap();
            }
            let mut s = g.sequence();
            s.feed(&[1, 403], Positions::Last).await.unwrap();
            lane.kill(victim);
            let until = Instant::now() + Duration::from_secs(40);
            let e = loop {
                // The dealer deals ahead, so that a few tokens may still come after its end.
                match s.feed(&[407], Positions::Last).await {
                    Ok(_) => assert!(Instant::now() < until, "nobody misses party {victim}"),
                    Err(e) => break e,
                }
            };
            assert!(!matches!(e, ClientError::Deadline(_)) && Instant::now() < until, "{e}");
        });
    }
}

fn post(at: &str, token: &str, path: &str, body: &str) -> String {
    let mut s = TcpStream::connect(at).unwrap();
    s.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    write!(
        s,
        "POST {path} HTTP/1.1\r\nhost: {at}\r\nauthorization: Bearer {token}\r\ncontent-type: application/json\r\n\
         content-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut out = String::new();
    s.read_to_string(&mut out).unwrap();
    out
}

#[test]
fn the_endpoint_serves_both_dialects_over_the_parties() {
    let Some((dir, _alone)) = model() else { return };
    let mut child = Command::new(env!("CARGO_BIN_EXE_tacet"))
        .args(["serve", "--local", "--model", dir.to_str().unwrap(), "--listen", "127.0.0.1:0"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let (mut at, mut token) = (String::new(), String::new());
    while token.is_empty() {
        let line = lines.next().expect("the endpoint says where it is").unwrap();
        if let Some(rest) = line.strip_prefix("Ollama") {
            at = rest.trim().trim_start_matches("http://").to_string();
        } else if let Some(rest) = line.strip_prefix("token") {
            token = rest.trim().to_string();
        }
    }
    let openai = post(
        &at,
        &token,
        "/v1/completions",
        r#"{"model":"stories260k-hf","prompt":"Once upon a time","max_tokens":8,"temperature":0}"#,
    );
    let ollama = post(
        &at,
        &token,
        "/api/generate",
        r#"{"model":"stories260k-hf","prompt":"Once upon a time","stream":false,"raw":true,"options":{"num_predict":8,"temperature":0}}"#,
    );
    // The model has 512 positions.
    let long = "word ".repeat(600);
    let [too_long, too_long_here] = ["/v1/completions", "/api/generate"].map(|path| {
        post(&at, &token, path, &format!(r#"{{"model":"stories260k-hf","prompt":"{long}","stream":false}}"#))
    });
    let unauthorised = post(&at, "guess", "/v1/completions", r#"{"model":"stories260k-hf","prompt":"x"}"#);
    let _ = Command::new("kill").args(["-TERM", &child.id().to_string()]).status();
    let _ = child.wait();
    for answer in [openai, ollama] {
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("there was a"), "{answer}");
    }
    assert!(too_long.starts_with("HTTP/1.1 400") && too_long.contains("context_length_exceeded"), "{too_long}");
    assert!(too_long_here.starts_with("HTTP/1.1 400") && too_long_here.contains("context is 512"), "{too_long_here}");
    assert!(unauthorised.starts_with("HTTP/1.1 401"), "{unauthorised}");
}
