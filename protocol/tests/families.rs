//! Every decoder family against Hugging Face transformers, on the tiny checkpoints that `vectors/make_decoders.py` makes,
//! and a small trained model against its own published text.

#[path = "../../tests/common/trained.rs"]
mod trained;

use std::path::PathBuf;

use serde::Deserialize;
use tacet_protocol::model::decoder::{Activation, DecoderModel, Mlp, NormKind};

const CHECKPOINTS: [&str; 12] = [
    "llama",
    "llama3",
    "smollm2",
    "mistral",
    "qwen2",
    "qwen3",
    "gpt2",
    "gguf-f16",
    "gguf-bf16",
    "gguf-q8_0",
    "gguf-q4_0",
    "gguf-q4_1",
];

/// Of a logit, relative to the largest one. Transformers computes RMS norms and rotary angles in float32; GPT-2 has
/// neither, and its logits are written to nine decimals.
fn bound(model: &DecoderModel) -> f64 {
    if model.config.norm == NormKind::Rms { 1e-6 } else { 1e-9 }
}

#[derive(Deserialize)]
struct Expected {
    tokens: Vec<u32>,
    logits: Vec<Vec<f64>>,
}

fn vectors(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/vectors").join(name)
}

fn load(name: &str) -> DecoderModel {
    DecoderModel::load(&vectors(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn argmax(row: &[f64]) -> usize {
    row.iter().enumerate().fold(0, |best, (i, v)| if *v > row[best] { i } else { best })
}

fn expected(name: &str) -> Expected {
    serde_json::from_slice(&std::fs::read(vectors(name).join("expected.json")).unwrap()).unwrap()
}

#[test]
fn logits_equal_transformers() {
    for name in CHECKPOINTS {
        let (model, want) = (load(name), expected(name));
        let got = model.logits(&want.tokens).unwrap();
        let largest = want.logits.iter().flatten().fold(0f64, |m, v| m.max(v.abs()));
        assert!(largest > 3.0, "{name}: logits up to {largest} tell little");
        assert_eq!(got.len(), want.tokens.len() * model.config.vocab);
        let mut worst = 0f64;
        for (at, (got, want)) in got.chunks_exact(model.config.vocab).zip(&want.logits).enumerate() {
            assert_eq!(got.len(), want.len());
            worst = got.iter().zip(want).fold(worst, |m, (g, w)| m.max((g - w).abs() / largest));
            assert_eq!(argmax(got), argmax(want), "{name}: the best token after {at}");
        }
        println!("{name}: largest error {worst:.2e} of the largest logit");
        assert!(worst < bound(&model), "{name}: {worst:.2e}");
    }
}

#[test]
fn cached_decoding_gives_the_bits_of_prefill() {
    for name in CHECKPOINTS {
        let (model, tokens) = (load(name), expected(name).tokens);
        let prefill = model.logits(&tokens).unwrap();
        for parts in [1, 3, 5] {
            let mut cache = model.cache();
            let decoded: Vec<f64> = tokens.chunks(parts).flat_map(|part| cache.extend(part).unwrap()).collect();
            assert_eq!(cache.positions(), tokens.len());
            assert_eq!(decoded, prefill, "{name}, {parts} tokens at a time");
        }
    }
}

#[test]
fn every_earlier_token_and_its_place_matter() {
    for name in CHECKPOINTS {
        let (model, mut tokens) = (load(name), expected(name).tokens);
        let last = |tokens: &[u32]| model.logits(tokens).unwrap().split_off((tokens.len() - 1) * model.config.vocab);
        let before = last(&tokens);
        tokens.swap(2, 3);
        let after = last(&tokens);
        assert!(before.iter().zip(&after).any(|(a, b)| (a - b).abs() > 1e-6), "{name}");
    }
}

#[test]
fn the_common_description_says_what_the_families_are() {
    let llama = load("llama");
    assert_eq!((llama.config.heads, llama.config.kv_heads, llama.config.head_dim), (4, 2, 8));
    assert_eq!((llama.config.norm, llama.config.activation), (NormKind::Rms, Activation::Silu));
    assert_eq!((llama.config.bos, llama.config.eos.as_slice(), llama.tied()), (Some(1), &[2][..], false));
    assert_eq!(llama.layers[0].key.out, 16);
    assert!(llama.layers[0].query.bias.iter().all(|b| *b == 0.0));

    let llama3 = load("llama3");
    assert!(llama3.tied());
    assert_eq!(llama3.embedding(), llama3.head.weight);
    assert_eq!(llama3.layers[1].query.out, 64);
    // `generation_config.json` has the last word on what ends an answer.
    assert_eq!(llama3.config.eos, [2, 3, 4]);
    assert!(llama3.layers[1].output.bias.iter().all(|b| *b != 0.0));
    let Mlp::Gated { down, .. } = &llama3.layers[1].mlp else { panic!("not gated") };
    assert!(down.bias.iter().all(|b| *b != 0.0));

    let qwen3 = load("qwen3");
    assert_eq!((qwen3.config.family, qwen3.config.head_dim), ("qwen3", 12));
    assert_eq!(qwen3.layers[0].query_key_norm.as_ref().unwrap().0.weight.len(), 12);
    assert_eq!(qwen3.config.rope.as_ref().unwrap().inverse_frequencies.len(), 6);

    let gpt2 = load("gpt2");
    assert_eq!((gpt2.config.norm, gpt2.config.activation), (NormKind::Layer, Activation::GeluNew));
    assert!(gpt2.config.rope.is_none() && gpt2.tied());
    assert_eq!(gpt2.positions.as_ref().unwrap().len(), 64 * 32);

    // One checkpoint in two containers: the same rows in the same order.
    let (hf, gguf) = (load("llama3"), load("gguf-bf16"));
    assert_eq!(hf.layers[1].query.weight, gguf.layers[1].query.weight);
    assert_eq!(hf.layers[1].key.bias, gguf.layers[1].key.bias);
    let (hf, gguf) = (hf.config.rope.unwrap(), gguf.config.rope.unwrap());
    for (a, b) in hf.inverse_frequencies.iter().zip(&gguf.inverse_frequencies) {
        assert!((a - b).abs() < 1e-6 * a, "{a}, {b}");
    }
}

#[test]
fn sequences_are_checked_and_errors_leave_the_cache() {
    let model = load("gpt2");
    let mut cache = model.cache();
    assert!(cache.extend(&[]).is_err());
    cache.extend(&[1; 60]).unwrap();
    let long = cache.extend(&[1; 5]).unwrap_err().to_string();
    assert!(long.contains("5 tokens after 60") && long.contains("64 positions"), "{long}");
    let outside = cache.extend(&[2, 987_654]).unwrap_err().to_string();
    assert!(outside.contains("token 1 ") && !outside.contains("987654"), "{outside}");
    assert_eq!(cache.positions(), 60);
    let mut whole = vec![1; 60];
    whole.push(7);
    assert_eq!(cache.extend(&[7]).unwrap(), model.logits(&whole).unwrap()[60 * 96..]);
}

/// Below this gap between the two best logits the published run may differ in its last bits.
const NEAR_TIE: f64 = 1e-3;

#[test]
fn a_trained_model_continues_its_published_text() {
    let Some(dir) = trained::trained() else { return };
    let model = DecoderModel::load(&dir).unwrap();
    let ids: Vec<u32> = serde_json::from_slice(&std::fs::read(dir.join("greedy_200_ids.json")).unwrap()).unwrap();
    let logits = model.logits(&ids[..ids.len() - 1]).unwrap();
    let (mut near, mut smallest) = (0, f64::INFINITY);
    for (at, (row, next)) in logits.chunks_exact(model.config.vocab).zip(&ids[1..]).enumerate() {
        let best = argmax(row);
        let second = row.iter().enumerate().filter(|(i, _)| *i != best).fold(f64::MIN, |m, (_, v)| m.max(*v));
        smallest = smallest.min(row[best] - second);
        near += usize::from(row[best] - second < NEAR_TIE);
        assert!(best == *next as usize || row[best] - row[*next as usize] < NEAR_TIE, "step {at}");
    }
    println!("{} steps, smallest gap {smallest:.4}, {near} near ties", ids.len() - 1);
    // Decoding by itself gives the text too.
    let mut cache = model.cache();
    let mut text = vec![ids[0]];
    while text.len() < 60 {
        let row = cache.extend(&text[text.len() - 1..]).unwrap();
        text.push(argmax(&row) as u32);
    }
    assert_eq!(text, ids[..60]);
}
