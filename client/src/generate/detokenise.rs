//! Tokens to text as they arrive: what was emitted never changes, and no code point is cut.
//!
//! A token is turned into bytes by the rules of the model's `decoder` (tokenizer.json); bytes become text as soon as they
//! end a code point. For GPT-2-style tokenizers the result equals a decode of the whole by the definition of
//! `ByteLevel`. `ByteFallback` (Llama) turns a whole run of byte tokens into U+FFFD if any part of it is invalid, which
//! no stream can know in time; here only the invalid bytes are replaced. For valid UTF-8 the two are equal.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use serde::Deserialize;
use tokenizers::Tokenizer;

use super::GenerateError;

/// The `decoder` of a tokenizer.json, as far as generating models use it.
#[derive(Deserialize)]
#[serde(tag = "type")]
enum Part {
    ByteLevel {},
    ByteFallback {},
    Fuse {},
    Replace { pattern: Pattern, content: String },
    Strip { content: char, start: usize, stop: usize },
    Metaspace { replacement: char, prepend_scheme: Scheme },
    Sequence { decoders: Vec<Part> },
}

#[derive(Deserialize)]
enum Pattern {
    String(String),
}

#[derive(Deserialize, PartialEq)]
#[serde(rename_all = "snake_case")]
enum Scheme {
    First,
    Never,
    Always,
}

/// How a token's spelling becomes bytes, and what is dropped at the start of a text.
#[derive(Default)]
pub(super) struct Rules {
    byte_level: bool,
    byte_fallback: bool,
    fused: bool,
    replace: Vec<(String, String)>,
    strip: Option<(char, usize)>,
    /// Metaspace's mark, which is dropped from the first token.
    mark: Option<char>,
}

impl Rules {
    pub(super) fn of(tokenizer: &Tokenizer) -> Result<Rules, GenerateError> {
        let decoder = tokenizer
            .get_decoder()
            .ok_or_else(|| GenerateError::Tokenizer("no decoder: the model does not generate text".into()))?;
        let part = serde_json::to_value(decoder).and_then(serde_json::from_value::<Part>);
        let part = part.map_err(|e| GenerateError::Tokenizer(format!("this decoder is not supported: {e}")))?;
        let mut rules = Rules::default();
        rules.add(part)?;
        Ok(rules)
    }

    fn add(&mut self, part: Part) -> Result<(), GenerateError> {
        match part {
            Part::ByteLevel {} => self.byte_level = true,
            Part::ByteFallback {} => self.byte_fallback = true,
            Part::Fuse {} => self.fused = true,
            Part::Replace { pattern: Pattern::String(p), content } if !self.fused => self.replace.push((p, content)),
            Part::Strip { content, start, stop: 0 } if self.fused => self.strip = Some((content, start)),
            Part::Metaspace { replacement, prepend_scheme } if !self.fused => {
                if prepend_scheme != Scheme::Never {
                    self.mark = Some(replacement);
                }
                self.replace.push((replacement.into(), " ".into()));
            }
            Part::Sequence { decoders } => decoders.into_iter().try_for_each(|d| self.add(d))?,
            _ => return Err(GenerateError::Tokenizer("this order of decoders is not supported".into())),
        }
        Ok(())
    }

    /// Bytes of a token anywhere but at the start of a text.
    fn bytes(&self, token: &str) -> Vec<u8> {
        let text = self.replace.iter().fold(token.to_string(), |t, (from, to)| t.replace(from.as_str(), to));
        if self.byte_fallback
            && let Some(byte) = byte_token(&text)
        {
            return vec![byte];
        }
        if self.byte_level {
            let bytes: Option<Vec<u8>> = text.chars().map(|c| BYTE_OF.get(&c).copied()).collect();
            return bytes.unwrap_or_else(|| text.into_bytes());
        }
        text.into_bytes()
    }
}

/// `<0x0A>` and its like.
fn byte_token(t: &str) -> Option<u8> {
    let hex = t.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2).then(|| u8::from_str_radix(hex, 16).ok()).flatten()
}

/// GPT-2's printable stand-ins for bytes (`bytes_to_unicode` in its encoder.py).
static BYTE_OF: LazyLock<HashMap<char, u8>> = LazyLock::new(|| {
    let plain = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let moved = (0..=255u8).filter(|b| !plain(*b)).zip('\u{100}'..).map(|(b, c)| (c, b));
    (0..=255u8).filter(|b| plain(*b)).map(|b| (char::from(b), b)).chain(moved).collect()
});

/// Spelling of tokens: shared by all answers of a model.
#[derive(Clone)]
pub(super) struct Pieces {
    pub(super) tokenizer: Arc<Tokenizer>,
    pub(super) rules: Arc<Rules>,
}

impl Pieces {
    /// Bytes of one token by itself; none for a special token or one that the tokenizer does not have.
    pub(super) fn bytes(&self, token: u32) -> Option<Vec<u8>> {
        let spelling = self.spelling(token)?;
        Some(self.rules.bytes(&spelling))
    }

    fn spelling(&self, token: u32) -> Option<String> {
        let t = self.tokenizer.id_to_token(token)?;
        (!self.tokenizer.get_added_vocabulary().is_special_token(&t)).then_some(t)
    }
}

/// Streams one text. Special tokens are skipped.
pub struct Detokeniser {
    pieces: Pieces,
    first: bool,
    /// Leading characters that may still be dropped.
    strip: usize,
    /// The beginning of a code point.
    partial: Vec<u8>,
}

impl Detokeniser {
    pub(super) fn new(pieces: Pieces) -> Detokeniser {
        let strip = pieces.rules.strip.map_or(0, |s| s.1);
        Detokeniser { pieces, first: true, strip, partial: Vec::new() }
    }

    /// The text that a token completes; may be empty.
    pub fn push(&mut self, token: u32) -> String {
        let Some(mut spelling) = self.pieces.spelling(token) else { return String::new() };
        if std::mem::take(&mut self.first)
            && let Some(mark) = self.pieces.rules.mark
        {
            spelling.retain(|c| c != mark);
        }
        self.partial.extend(self.pieces.rules.bytes(&spelling));
        let mut out = String::new();
        let mut rest = self.partial.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(s) => {
                    out.push_str(s);
                    rest = &[];
                    break;
                }
                Err(e) => {
                    let (good, bad) = rest.split_at(e.valid_up_to());
                    out.push_str(std::str::from_utf8(good).unwrap_or_default());
                    rest = bad;
                    let Some(n) = e.error_len() else { break };
                    out.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[n..];
                }
            }
        }
        self.partial = rest.to_vec();
        self.stripped(out)
    }

    /// The end of the text: an unfinished code point becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        let left = std::mem::take(&mut self.partial);
        self.stripped(String::from_utf8_lossy(&left).into_owned())
    }

    fn stripped(&mut self, mut text: String) -> String {
        if let Some((c, _)) = self.pieces.rules.strip {
            while self.strip > 0 && !text.is_empty() {
                if !text.starts_with(c) {
                    self.strip = 0;
                    break;
                }
                text.remove(0);
                self.strip -= 1;
            }
        }
        text
    }
}
