//! Text generation on the client's machine: templates, sampling and detokenising, all in the clear and nowhere else.
//!
//! The parties turn tokens into shares of logits; everything that depends on the *value* of a logit or a token happens
//! here, so no sampler setting, stop string or template reaches them. What they do see is each fed length (the prompt's
//! new part, then one token at a time) and that a later turn continues an earlier one when its cache is reused.
//!
//! Tokens and logits are zeroized when they are dropped; text is the caller's.
//!
//! [`Codec`] holds a model's tokenizer files, [`Conversation`] a cache, [`Generation`] one answer.

mod codec;
mod conversation;
mod detokenise;
mod python;
mod sampling;
mod stop;
mod template;

use std::future::Future;
use std::pin::Pin;

use crate::ClientError;

pub use codec::Codec;
pub use conversation::{Conversation, Finish, Generation, Request, Step};
pub use detokenise::Detokeniser;
pub use sampling::{Sampler, Sampling, TokenLogprob, logprob};
pub use stop::StopMatcher;
pub use template::{ChatTemplate, Message};

pub(crate) use python::civil;

/// Which positions of a feed come back as logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Positions {
    /// The last only: what the next token needs.
    Last,
    /// Every fed position, in order: for scoring a text.
    All,
}

/// A boxed future, so that the traits can be objects.
pub type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Whoever turns tokens into logits; holds the conversation's cache. The private engine implements it.
pub trait Decoder: Send {
    /// Appends tokens to the cache; returns `[vocab]` logits of the positions asked for.
    ///
    /// Dropping the future cancels. After that, or after an error, the decoder is not fed again: it is dropped.
    ///
    /// # Errors
    /// What the parties or the link to them said.
    fn feed<'a>(&'a mut self, tokens: &'a [u32], positions: Positions)
    -> Boxed<'a, Result<Vec<Vec<f32>>, ClientError>>;

    /// Tokens in the cache.
    fn len(&self) -> usize;

    /// Whether the cache is empty.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets all but the first `len` tokens; nothing if there are fewer.
    fn truncate(&mut self, len: usize);
}

/// Why there is no text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// A parameter outside its range; named as OpenAI's API names it.
    #[error("{name}: {reason}")]
    Parameter { name: &'static str, reason: String },
    /// The prompt leaves no room in the model's context.
    #[error("the prompt has {tokens} tokens, but the model's context is {limit}: shorten it or ask for fewer tokens")]
    TooLong { tokens: usize, limit: usize },
    /// The model has no chat template, or it refused the messages.
    #[error("chat template: {0}")]
    Template(String),
    /// A tokenizer file that cannot be used, or a text that it cannot encode.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The decoder returned logits that cannot be used.
    #[error("logits: {0}; the answer ends here")]
    Logits(String),
    /// The decoder failed.
    #[error(transparent)]
    Client(#[from] ClientError),
}

fn parameter(name: &'static str, reason: impl Into<String>) -> GenerateError {
    GenerateError::Parameter { name, reason: reason.into() }
}
