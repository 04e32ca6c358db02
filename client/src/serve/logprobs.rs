//! Log-probabilities as clients read them.

use serde_json::{Map, Value, json};

use crate::generate::{Codec, TokenLogprob};

/// `{token, logprob, bytes, top_logprobs}`: chat's form, and Ollama's.
pub fn entry(codec: &Codec, l: &TokenLogprob) -> Value {
    let one = |token: u32, logprob: f32| json!({"token": codec.token_text(token), "logprob": logprob, "bytes": codec.token_bytes(token)});
    let mut v = one(l.token, l.logprob);
    v["top_logprobs"] = l.top.iter().map(|(t, p)| one(*t, *p)).collect();
    v
}

/// The columns of a text completion's `logprobs`.
#[derive(Default)]
pub struct Columns {
    tokens: Vec<String>,
    logprobs: Vec<Option<f32>>,
    top: Vec<Option<Map<String, Value>>>,
    offsets: Vec<usize>,
    /// Characters so far.
    offset: usize,
}

impl Columns {
    /// A token without a probability: the first of an echoed prompt.
    pub fn first(&mut self, codec: &Codec, token: u32) {
        self.push(codec.token_text(token), None, None);
    }

    /// A token with its probability. Its own spelling is always among the alternatives; of two tokens that are spelled
    /// alike, the more probable one counts.
    pub fn token(&mut self, codec: &Codec, l: &TokenLogprob) {
        let mut top = Map::new();
        for (t, p) in l.top.iter().chain([&(l.token, l.logprob)]) {
            top.entry(codec.token_text(*t)).or_insert_with(|| json!(p));
        }
        self.push(codec.token_text(l.token), Some(l.logprob), Some(top));
    }

    fn push(&mut self, text: String, logprob: Option<f32>, top: Option<Map<String, Value>>) {
        self.offsets.push(self.offset);
        self.offset += text.chars().count();
        self.tokens.push(text);
        self.logprobs.push(logprob);
        self.top.push(top);
    }

    /// What was added since the last call.
    pub fn take(&mut self) -> Value {
        let c = std::mem::replace(self, Columns { offset: self.offset, ..Columns::default() });
        json!({"tokens": c.tokens, "token_logprobs": c.logprobs, "top_logprobs": c.top, "text_offset": c.offsets})
    }
}
