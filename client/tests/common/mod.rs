//! A byte-level tokenizer and a plaintext toy model: what the private engine is replaced by in these tests.
#![allow(dead_code)] // Each test file uses its own part.

pub mod endpoint;
pub mod http;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Map, Value, json};
use tacet_client::ClientError;
use tacet_client::generate::{Boxed, ChatTemplate, Codec, Decoder, Positions};
use tokenizers::Tokenizer;

pub const CHATML: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + \
    '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// GPT-2's stand-in for a byte, by its definition.
pub fn stand_in(byte: u8) -> char {
    let plain = |b: u8| (33..=126).contains(&b) || (161..=172).contains(&b) || b >= 174;
    if plain(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|b| !plain(*b)).count() as u32;
    char::from_u32(256 + before).unwrap()
}

/// Byte-level BPE: all bytes, some merges (one of which cuts a code point), and ChatML's special tokens.
pub fn byte_level() -> Tokenizer {
    let spell = |b: &[u8]| b.iter().map(|b| stand_in(*b)).collect::<String>();
    let mut vocab = Map::new();
    (0..=255u8).for_each(|b| _ = vocab.insert(spell(&[b]), json!(b)));
    let mut merges = Vec::new();
    let pairs: [(&[u8], &[u8]); 9] = [
        (b"t", b"h"),
        (b"th", b"e"),
        (b" ", b"the"),
        (b"a", b"n"),
        (b"an", b"d"),
        (b" ", b"and"),
        (b"o", b"n"),
        (&[0xF0], &[0x9F]),
        (&[0x99, 0x82], b"!"),
    ];
    vocab.insert(spell(&[0x99, 0x82]), json!(256));
    merges.push(json!([spell(&[0x99]), spell(&[0x82])]));
    for (a, b) in pairs {
        let id = vocab.len();
        vocab.insert(spell(&[a, b].concat()), json!(id));
        merges.push(json!([spell(a), spell(b)]));
    }
    let first = vocab.len();
    let special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].iter().enumerate();
    let added: Vec<Value> = special
        .map(|(i, t)| {
            json!({"id": first + i, "content": t, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let t = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": merges},
    });
    Tokenizer::from_bytes(t.to_string()).unwrap()
}

pub fn codec(context: usize) -> Codec {
    codec_of(context, Some(ChatTemplate::new(CHATML, BTreeMap::new()).unwrap()))
}

pub fn codec_without_template(context: usize) -> Codec {
    codec_of(context, None)
}

fn codec_of(context: usize, template: Option<ChatTemplate>) -> Codec {
    let t = byte_level();
    let eos = ["<|im_end|>", "<|endoftext|>"].map(|e| t.token_to_id(e).unwrap());
    Codec::new(t, template, eos.into_iter().collect(), context).unwrap()
}

/// What a test sees and steers of its decoders.
#[derive(Default)]
pub struct Watch {
    pub opened: AtomicUsize,
    pub dropped: AtomicUsize,
    pub fed: AtomicUsize,
    /// Milliseconds that each feed takes.
    pub slow: AtomicUsize,
    /// Feeds until one fails; 0 is never.
    pub fail_after: AtomicUsize,
    pub unreachable: AtomicBool,
}

/// Continues what it read in a corpus: the token after the longest match of the context's end, by a wide margin; the
/// other logits depend on the last token only.
pub struct Toy {
    corpus: Arc<Vec<u32>>,
    vocab: usize,
    tokens: Vec<u32>,
    watch: Arc<Watch>,
}

impl Toy {
    pub fn new(codec: &Codec, corpus: &str, watch: Arc<Watch>) -> Toy {
        watch.opened.fetch_add(1, Ordering::SeqCst);
        let corpus = Arc::new(codec.encode(corpus, false).unwrap());
        // A few rows more than the tokenizer has tokens, as real models do.
        Toy { corpus, vocab: byte_level().get_vocab_size(true) + 5, tokens: Vec::new(), watch }
    }

    fn logits(&self) -> Vec<f32> {
        let last = u64::from(*self.tokens.last().unwrap());
        let noise = |i: u64| ((i * 2_654_435_761 + last * 40_503) % 1000) as f32 / 1000.0;
        let mut row: Vec<f32> = (0..self.vocab as u64).map(noise).collect();
        let shared = |end: usize| {
            self.tokens.iter().rev().zip(self.corpus[..end].iter().rev()).take_while(|(a, b)| a == b).count()
        };
        let best = (1..self.corpus.len()).max_by_key(|end| shared(*end)).unwrap();
        row[self.corpus[best] as usize] = 12.0;
        row
    }
}

impl Drop for Toy {
    fn drop(&mut self) {
        self.watch.dropped.fetch_add(1, Ordering::SeqCst);
    }
}

impl Decoder for Toy {
    fn feed<'a>(
        &'a mut self,
        tokens: &'a [u32],
        positions: Positions,
    ) -> Boxed<'a, Result<Vec<Vec<f32>>, ClientError>> {
        Box::pin(async move {
            let slow = self.watch.slow.load(Ordering::SeqCst) as u64;
            if slow > 0 {
                tokio::time::sleep(Duration::from_millis(slow)).await;
            }
            let left = self.watch.fail_after.load(Ordering::SeqCst);
            if left > 0 && self.watch.fail_after.fetch_sub(1, Ordering::SeqCst) == 1 {
                return Err(ClientError::Failed { party: "alpha".into(), reason: "the link closed".into() });
            }
            let mut rows = Vec::new();
            for t in tokens {
                self.tokens.push(*t);
                rows.push(self.logits());
            }
            self.watch.fed.fetch_add(tokens.len(), Ordering::SeqCst);
            Ok(if positions == Positions::All { rows } else { rows.split_off(rows.len() - 1) })
        })
    }

    fn len(&self) -> usize {
        self.tokens.len()
    }

    fn truncate(&mut self, len: usize) {
        self.tokens.truncate(len);
    }
}
