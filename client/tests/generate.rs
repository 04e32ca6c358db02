//! Detokenising and the generation loop, over a toy model and over real tokenizers where they are present.

mod common;
#[path = "../../tests/common/trained.rs"]
mod trained;

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use common::{Toy, Watch, byte_level, codec};
use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use tacet_client::generate::{Codec, Conversation, Finish, GenerateError, Request, Sampling, TokenLogprob, logprob};
use tokenizers::Tokenizer;
use trained::trained;

/// The text so far never changes: each prefix of deltas is a prefix of the whole.
fn streamed(codec: &Codec, tokens: &[u32]) -> String {
    let mut d = codec.detokeniser();
    let mut deltas: Vec<String> = tokens.iter().map(|t| d.push(*t)).collect();
    deltas.push(d.finish());
    let whole = codec.decode(tokens);
    let mut at = 0;
    for d in &deltas {
        assert!(whole[at..].starts_with(d.as_str()));
        at += d.len();
    }
    assert_eq!(at, whole.len());
    whole
}

#[test]
fn byte_level_streams_equal_the_tokenizers_decode_of_the_whole() {
    let (t, c) = (byte_level(), codec(99));
    let n = t.get_vocab_size(true) as u64;
    let mut rng = ChaCha20Rng::from_seed([1; 32]);
    for round in 0..3000 {
        let len = rng.next_u64() % 24;
        // Every other round, only the pieces of code points.
        let one = |r: u64| if round % 2 == 0 { r % n } else { 128 + r % 139 };
        let tokens: Vec<u32> = (0..len).map(|_| one(rng.next_u64()) as u32).collect();
        assert_eq!(streamed(&c, &tokens), t.decode(&tokens, true).unwrap(), "{tokens:?}");
    }
    for text in ["naïve café 🙂! the end", "日本語\u{FFFD}x", "👨‍👩‍👧", "\u{FFFD}"] {
        assert_eq!(streamed(&c, t.encode_fast(text, false).unwrap().get_ids()), text);
    }
}

#[test]
fn no_delta_is_ever_half_a_code_point() {
    let c = codec(99);
    let tokens = c.encode("🙂! é", false).unwrap();
    let mut d = c.detokeniser();
    let deltas: Vec<String> = tokens.iter().map(|t| d.push(*t)).collect();
    // The merges of the tokenizer cut the emoji in the middle; nothing comes before its last byte.
    assert_eq!(deltas.iter().filter(|d| !d.is_empty()).map(String::as_str).collect::<Vec<_>>(), ["🙂!", " ", "é"]);
    let mut d = c.detokeniser();
    assert_eq!((d.push(0xE4), d.push(0xB8), d.finish()), ("".into(), "".into(), "\u{FFFD}".into()));
}

#[test]
fn llama_streams_equal_the_tokenizers_decode_of_the_whole() {
    let Some(dir) = trained() else { return };
    let t = Tokenizer::from_file(dir.join("tokenizer.json")).unwrap();
    let c = Codec::load(&dir).unwrap();
    let n = t.get_vocab_size(true) as u64;
    let byte = |b: u8| t.token_to_id(&format!("<0x{b:02X}>")).unwrap();
    let mut rng = ChaCha20Rng::from_seed([2; 32]);
    let texts = ["中", "é", "🙂", "a", " ", "\u{FFFD}", "  x"];
    for _ in 0..3000 {
        let mut tokens = Vec::new();
        for _ in 0..rng.next_u64() % 16 {
            // A whole text in bytes, or any other token.
            match rng.next_u64() % 3 {
                0 => tokens.extend(texts[rng.next_u64() as usize % texts.len()].bytes().map(byte)),
                _ => {
                    let id = (rng.next_u64() % n) as u32;
                    if !t.id_to_token(id).unwrap().starts_with("<0x") {
                        tokens.push(id);
                    }
                }
            }
        }
        assert_eq!(streamed(&c, &tokens), t.decode(&tokens, true).unwrap(), "{tokens:?}");
    }
    // Any tokens at all: a lossy decode of their bytes, less the leading space.
    for _ in 0..3000 {
        let tokens: Vec<u32> = (0..rng.next_u64() % 24).map(|_| (rng.next_u64() % n) as u32).collect();
        let spoken = tokens.iter().filter(|t| **t > 2);
        let bytes: Vec<u8> = spoken.flat_map(|t| c.token_bytes(*t)).collect();
        let whole = String::from_utf8_lossy(&bytes).into_owned();
        assert_eq!(streamed(&c, &tokens), whole.strip_prefix(' ').unwrap_or(&whole), "{tokens:?}");
    }
    let ids: Vec<u32> = serde_json::from_slice(&std::fs::read(dir.join("greedy_200_ids.json")).unwrap()).unwrap();
    let text = std::fs::read_to_string(dir.join("greedy_200.txt")).unwrap();
    assert_eq!(streamed(&c, &ids).trim(), text.trim());
}

fn toy(codec: &Codec, corpus: &str) -> (Conversation, Arc<Watch>) {
    let watch = Arc::<Watch>::default();
    (Conversation::new(Box::new(Toy::new(codec, corpus, Arc::clone(&watch)))), watch)
}

fn greedy() -> Request {
    Request { sampling: Sampling::greedy(), continues: true, ..Request::default() }
}

struct Run {
    deltas: Vec<String>,
    tokens: Vec<u32>,
    logprobs: Vec<TokenLogprob>,
    finish: Option<Finish>,
}

async fn run(c: &Codec, conversation: &mut Conversation, prompt: &[u32], r: Request) -> Result<Run, GenerateError> {
    let mut g = conversation.generate(c, prompt, r)?;
    let mut out = Run { deltas: vec![], tokens: vec![], logprobs: vec![], finish: None };
    while let Some(s) = g.next().await? {
        assert!(out.finish.is_none());
        out.deltas.push(s.text);
        out.tokens.push(s.token);
        out.logprobs.extend(s.logprob);
        out.finish = s.finish;
    }
    Ok(out)
}

const CORPUS: &str = "Once upon a time the café 🙂! opened, and the rain stopped.<|endoftext|>";

#[tokio::test]
async fn a_completion_ends_at_the_end_token_at_a_stop_string_or_at_its_length() {
    let c = codec(200);
    let (mut v, _) = toy(&c, CORPUS);
    let prompt = c.encode("Once upon", false).unwrap();
    let all = run(&c, &mut v, &prompt, greedy()).await.unwrap();
    assert_eq!(all.deltas.concat(), " a time the café 🙂! opened, and the rain stopped.");
    assert_eq!(all.finish, Some(Finish::Stop));
    assert!(c.is_eos(*all.tokens.last().unwrap()));

    let stop = Request { stop: vec!["rain".into(), "pened, and".into()], ..greedy() };
    let r = run(&c, &mut v, &prompt, stop).await.unwrap();
    assert_eq!((r.deltas.concat().as_str(), r.finish), (" a time the café 🙂! o", Some(Finish::Stop)));

    let short = Request { max_tokens: Some(3), ..greedy() };
    let r = run(&c, &mut v, &prompt, short).await.unwrap();
    assert_eq!((r.tokens.len(), r.finish), (3, Some(Finish::Length)));
    // What was held back for a stop string that never came is shown at the end.
    let held = Request { max_tokens: Some(4), stop: vec!["time".into()], ..greedy() };
    assert_eq!(run(&c, &mut v, &prompt, held).await.unwrap().deltas.concat(), " a t");
    // Half an emoji: the length ends it as U+FFFD.
    let at = all.tokens.iter().position(|t| c.token_bytes(*t)[0] == 0xF0).unwrap();
    let cut = Request { max_tokens: Some(at + 1), ..greedy() };
    assert!(run(&c, &mut v, &prompt, cut).await.unwrap().deltas.concat().ends_with("café \u{FFFD}"));

    let stop = Request { stop_tokens: c.encode("m", false).unwrap(), ..greedy() };
    assert_eq!(run(&c, &mut v, &prompt, stop).await.unwrap().deltas.concat(), " a ti");
    let on = Request { ignore_eos: true, max_tokens: Some(all.tokens.len() + 2), ..greedy() };
    assert_eq!(run(&c, &mut v, &prompt, on).await.unwrap().finish, Some(Finish::Length));
}

#[tokio::test]
async fn a_later_turn_evaluates_only_what_is_new_and_answers_the_same() {
    let c = codec(200);
    let (mut v, watch) = toy(&c, CORPUS);
    let prompt = c.encode("Once upon", false).unwrap();
    let first = run(&c, &mut v, &prompt, Request { max_tokens: Some(5), ..greedy() }).await.unwrap();
    // The last token's successor was not asked for, so it was not fed.
    assert_eq!(watch.fed.swap(0, SeqCst), prompt.len() + 4);
    assert_eq!(v.len(), prompt.len() + 4);
    let longer = [prompt.as_slice(), &first.tokens, &c.encode("e", false).unwrap()].concat();
    let next = run(&c, &mut v, &longer, Request { max_tokens: Some(1), ..greedy() }).await.unwrap();
    assert_eq!(watch.fed.swap(0, SeqCst), 2);
    let (mut fresh, _) = toy(&c, CORPUS);
    let same = run(&c, &mut fresh, &longer, Request { max_tokens: Some(1), ..greedy() }).await.unwrap();
    assert_eq!(next.tokens, same.tokens);
    // The same prompt again: its last token only. Another one: from where they part.
    run(&c, &mut v, &longer, Request { max_tokens: Some(1), ..greedy() }).await.unwrap();
    assert_eq!(watch.fed.swap(0, SeqCst), 1);
    let other = [&prompt[..4], &c.encode("xyz", false).unwrap()].concat();
    let mut g = v.generate(&c, &other, greedy()).unwrap();
    assert!(g.prefill().await.unwrap().is_empty());
    assert_eq!((g.reused(), watch.fed.load(SeqCst)), (4, 3));
}

#[tokio::test]
async fn prompt_logprobs_are_those_of_feeding_it_token_by_token() {
    let c = codec(1000);
    let (mut v, _) = toy(&c, CORPUS);
    // Longer than one batch of scoring.
    let prompt = c.encode(&"Once upon a time the rain. ".repeat(12), false).unwrap();
    assert!(prompt.len() > 256);
    let r = Request { max_tokens: Some(1), logprobs: Some(3), prompt_logprobs: true, ..greedy() };
    let mut g = v.generate(&c, &prompt, r).unwrap();
    let scores = g.prefill().await.unwrap();
    assert_eq!(scores.len(), prompt.len() - 1);
    let step = g.next().await.unwrap().unwrap();
    let mut single = Toy::new(&c, CORPUS, Arc::default());
    for i in 0..prompt.len() {
        use tacet_client::generate::{Decoder, Positions};
        let row = single.feed(&prompt[i..=i], Positions::Last).await.unwrap().remove(0);
        let next = prompt.get(i + 1).copied().unwrap_or(step.token);
        let got = scores.get(i).or(step.logprob.as_ref()).unwrap();
        assert!(*got == logprob(&row, next, 3), "position {i}");
    }
}

#[tokio::test]
async fn bad_requests_are_refused_before_anything_is_evaluated() {
    let c = codec(8);
    let (mut v, watch) = toy(&c, CORPUS);
    let refused = |v: &mut Conversation, prompt: &[u32], r: Request| match v.generate(&c, prompt, r) {
        Err(GenerateError::Parameter { name, .. }) => name,
        Err(GenerateError::TooLong { .. }) => "too long",
        Err(_) => "other",
        Ok(_) => "accepted",
    };
    assert_eq!(refused(&mut v, &[], greedy()), "prompt");
    assert_eq!(refused(&mut v, &[1, 70_000], greedy()), "prompt");
    assert_eq!(refused(&mut v, &[1; 8], greedy()), "too long");
    assert_eq!(refused(&mut v, &[1; 9], Request { max_tokens: Some(0), ..greedy() }), "too long");
    assert_eq!(refused(&mut v, &[1; 8], Request { max_tokens: Some(0), ..greedy() }), "accepted");
    assert_eq!(refused(&mut v, &[1], Request { stop: vec!["".into()], ..greedy() }), "stop");
    assert_eq!(refused(&mut v, &[1], Request { logprobs: Some(21), ..greedy() }), "top_logprobs");
    let bias = Sampling { logit_bias: vec![(70_000, 1.0)], ..Sampling::greedy() };
    assert_eq!(refused(&mut v, &[1], Request { sampling: bias, ..greedy() }), "logit_bias");
    assert_eq!(watch.fed.load(SeqCst), 0);
    // The context ends an answer that would go on.
    let r = run(&c, &mut v, &c.encode("Once", false).unwrap(), greedy()).await.unwrap();
    assert_eq!((r.tokens.len(), r.finish), (4, Some(Finish::Length)));
}

#[tokio::test]
async fn a_failing_decoder_ends_the_answer_with_its_error() {
    let c = codec(200);
    let (mut v, watch) = toy(&c, CORPUS);
    watch.fail_after.store(3, SeqCst);
    let r = run(&c, &mut v, &c.encode("Once", false).unwrap(), greedy()).await;
    assert!(matches!(r, Err(GenerateError::Client(e)) if e.to_string().contains("alpha")));
}
