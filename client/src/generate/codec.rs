//! A generating model's tokenizer files: text and chats to tokens, tokens to text.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use serde_json::{Map, Value};
use tokenizers::Tokenizer;

use super::detokenise::{Pieces, Rules};
use super::{ChatTemplate, Detokeniser, GenerateError, Message, parameter};

/// Tokenizer, template, end tokens and context length of a model.
pub struct Codec {
    pieces: Pieces,
    template: Option<ChatTemplate>,
    eos: BTreeSet<u32>,
    context: usize,
}

impl Codec {
    /// Reads tokenizer.json, tokenizer_config.json, chat_template.jinja, config.json and generation_config.json.
    ///
    /// # Errors
    /// Names the file and what is wrong with it.
    pub fn load(dir: &Path) -> Result<Codec, GenerateError> {
        let bad = |name: &str, e: String| GenerateError::Tokenizer(format!("{}: {e}", dir.join(name).display()));
        let json = |name: &str| match std::fs::read(dir.join(name)) {
            Ok(b) => serde_json::from_slice::<Value>(&b).map_err(|e| bad(name, e.to_string())),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Value::Null),
            Err(e) => Err(bad(name, e.to_string())),
        };
        let (config, generation, tokens) =
            (json("config.json")?, json("generation_config.json")?, json("tokenizer_config.json")?);
        let tokenizer =
            Tokenizer::from_file(dir.join("tokenizer.json")).map_err(|e| bad("tokenizer.json", e.to_string()))?;
        let mut eos = BTreeSet::new();
        for v in [&config["eos_token_id"], &generation["eos_token_id"]] {
            let many = v.as_array().map_or(std::slice::from_ref(v), Vec::as_slice);
            eos.extend(many.iter().filter_map(|v| u32::try_from(v.as_u64()?).ok()));
        }
        let name = &tokens["eos_token"];
        eos.extend(name.as_str().or(name["content"].as_str()).and_then(|n| tokenizer.token_to_id(n)));
        let context = ["max_position_embeddings", "n_positions", "n_ctx", "seq_length"];
        let context = context.iter().find_map(|k| config[k].as_u64()).or(tokens["model_max_length"].as_u64());
        // transformers writes 1e30 for "unknown", which is no u64.
        let context = context.ok_or_else(|| bad("config.json", "no max_position_embeddings".into()))?;
        Codec::new(tokenizer, ChatTemplate::load(dir)?, eos, context as usize)
    }

    /// A codec from its parts; `eos` are the tokens that end an answer, `context` the most tokens of prompt and answer.
    ///
    /// # Errors
    /// A tokenizer whose decoder cannot be streamed.
    pub fn new(
        mut tokenizer: Tokenizer,
        template: Option<ChatTemplate>,
        eos: BTreeSet<u32>,
        context: usize,
    ) -> Result<Codec, GenerateError> {
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| GenerateError::Tokenizer(e.to_string()))?;
        let rules = Arc::new(Rules::of(&tokenizer)?);
        Ok(Codec { pieces: Pieces { tokenizer: Arc::new(tokenizer), rules }, template, eos, context })
    }

    /// With another chat template than the model's own.
    pub fn with_template(self, template: ChatTemplate) -> Codec {
        Codec { template: Some(template), ..self }
    }

    /// The most tokens of prompt and answer together.
    pub fn context(&self) -> usize {
        self.context
    }

    /// The chat template, if the model has one.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// Whether a token ends an answer.
    pub fn is_eos(&self, token: u32) -> bool {
        self.eos.contains(&token)
    }

    /// Tokens of a text; `special` adds what the tokenizer puts around texts, such as a begin token.
    ///
    /// # Errors
    /// [`GenerateError::Tokenizer`].
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, GenerateError> {
        let e = self.pieces.tokenizer.encode_fast(text, special);
        Ok(e.map_err(|e| GenerateError::Tokenizer(e.to_string()))?.get_ids().to_vec())
    }

    /// Tokens of a chat up to where the model answers; see [`ChatTemplate::render`].
    ///
    /// # Errors
    /// No template, or one that refuses the messages.
    pub fn encode_chat(
        &self,
        messages: &[Message],
        answer: bool,
        variables: &Map<String, Value>,
        now: SystemTime,
    ) -> Result<Vec<u32>, GenerateError> {
        let t = self.template.as_ref().ok_or_else(|| {
            GenerateError::Template(
                "the model has none, so it cannot chat: complete texts, or give it one (--chat-template FILE)".into(),
            )
        })?;
        self.encode(&t.render(messages, answer, variables, now)?, false)
    }

    /// # Errors
    /// A token that the tokenizer does not have.
    pub fn check(&self, tokens: &[u32]) -> Result<(), GenerateError> {
        match tokens.iter().find(|t| self.pieces.tokenizer.id_to_token(**t).is_none()) {
            Some(t) => Err(parameter("prompt", format!("the model has no token {t}"))),
            None => Ok(()),
        }
    }

    /// # Errors
    /// A bias for a token that the tokenizer does not have.
    pub(super) fn check_bias(&self, bias: &[(u32, f64)]) -> Result<(), GenerateError> {
        match bias.iter().find(|(t, _)| self.pieces.tokenizer.id_to_token(*t).is_none()) {
            Some((t, _)) => Err(parameter("logit_bias", format!("the model has no token {t}"))),
            None => Ok(()),
        }
    }

    /// A new stream of text.
    pub fn detokeniser(&self) -> Detokeniser {
        Detokeniser::new(self.pieces.clone())
    }

    /// Text of a whole sequence, as its stream would be. Special tokens are skipped.
    pub fn decode(&self, tokens: &[u32]) -> String {
        let mut d = self.detokeniser();
        let mut text: String = tokens.iter().map(|t| d.push(*t)).collect();
        text.push_str(&d.finish());
        text
    }

    /// Bytes of one token by itself, special ones as they are spelled; empty for one that does not exist.
    pub fn token_bytes(&self, token: u32) -> Vec<u8> {
        let spelled = || self.pieces.tokenizer.id_to_token(token).unwrap_or_default().into_bytes();
        self.pieces.bytes(token).unwrap_or_else(spelled)
    }

    /// [`Self::token_bytes`] as text.
    pub fn token_text(&self, token: u32) -> String {
        String::from_utf8_lossy(&self.token_bytes(token)).into_owned()
    }
}
