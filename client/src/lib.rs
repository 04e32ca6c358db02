//! The client SDK: text to tokens to shares, sealed to each party; the only place where prompt and answer exist in the clear.
//!
//! ```no_run
//! # async fn f() -> Result<(), tacet_client::ClientError> {
//! let client = tacet_client::Client::builder()
//!     .parties_file("parties.toml")
//!     .model("models/all-MiniLM-L6-v2")
//!     .connect()
//!     .await?;
//! let vectors = client.embed(&["How do I freeze my card?", "My card was stolen"]).await?;
//! println!("{:.3}", tacet_client::cosine(&vectors[0].vector, &vectors[1].vector));
//! # Ok(()) }
//! ```
//!
//! Tokens, shares and the bearer token are wiped when they are no longer needed; what the tokeniser and QUIC keep of them
//! inside while they work is out of reach.
#![forbid(unsafe_code)]

mod builder;
mod config;
mod embedder;
mod error;
mod examine;
pub mod generate;
mod phases;
mod private;
pub mod serve;
mod session;
mod shares;
mod slots;
mod target;

use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, Stream, StreamExt, TryStreamExt};
use serde::Serialize;
use tacet_protocol::model::BertModel;
use tacet_protocol::plan::Planner;
use tacet_protocol::program::Program;
use tacet_protocol::programs::Programs;
use tacet_protocol::query::padded;
use tokenizers::Tokenizer;
use zeroize::Zeroizing;

pub use builder::ClientBuilder;
pub use config::{Parties, Party};
pub use error::ClientError;
pub use examine::{Examined, Verdict};
pub use phases::Phases;
pub use private::{Generator, Sequence, Spent};
pub use shares::Glimpse;
pub use tacet_protocol::plan::Progress;
use target::Target;

/// One embedded text.
#[derive(Clone, Serialize)]
pub struct Embedding {
    /// Unit vector.
    pub vector: Vec<f64>,
    /// What it took.
    pub stats: Stats,
}

impl std::fmt::Debug for Embedding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The vector is the client's secret.
        f.debug_struct("Embedding").field("stats", &self.stats).finish_non_exhaustive()
    }
}

/// Costs of one query as the parties counted them.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Stats {
    /// Tokens of the text.
    pub tokens: usize,
    /// Rounds between the evaluators.
    pub rounds: u32,
    /// Opened payload bytes, each way.
    pub opened_bytes: u64,
    /// Dealt payload bytes, to both evaluators.
    pub dealt_bytes: u64,
    /// Time of the slower evaluator.
    pub online_s: f64,
    /// Time of the dealer: beside the evaluators' own, or before the query where it was dealt ahead.
    pub dealing_s: f64,
    /// Whether the dealing began before the query.
    pub dealt_ahead: bool,
    /// Where the time went.
    pub phases: Phases,
    /// From text to vector.
    pub total_s: f64,
}

/// A connected client with its model's public parts.
pub struct Client {
    targets: Vec<Target>,
    token: Zeroizing<String>,
    model: Arc<BertModel>,
    planner: Planner,
    tokenizer: Tokenizer,
    programs: Programs,
    deadline: Duration,
    concurrency: usize,
    retry_busy: bool,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let parties: Vec<&Party> = self.targets.iter().map(|t| &t.party).collect();
        f.debug_struct("Client").field("parties", &parties).field("model", &self.model).finish_non_exhaustive()
    }
}

fn random<const N: usize>() -> Result<[u8; N], ClientError> {
    let mut b = [0; N];
    getrandom::fill(&mut b).map_err(|e| ClientError::Config(format!("no randomness: {e}")))?;
    Ok(b)
}

/// Cosine of the angle between two vectors of one length.
pub fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

impl Client {
    /// How to make a client.
    pub fn builder() -> ClientBuilder {
        ClientBuilder::default()
    }

    /// The model in use, for comparisons in the clear.
    pub fn model(&self) -> &Arc<BertModel> {
        &self.model
    }

    /// Token ids of a text; `index` is for the error. The ids are as secret as the text.
    ///
    /// # Errors
    /// [`ClientError::TooLong`].
    pub fn tokens(&self, index: usize, text: &str) -> Result<Vec<u32>, ClientError> {
        let e = self.tokenizer.encode(text, true).map_err(|e| ClientError::Config(format!("text {index}: {e}")))?;
        let limit = self.planner.max_tokens();
        if e.get_ids().len() > limit {
            return Err(ClientError::TooLong { index, tokens: e.get_ids().len(), limit });
        }
        Ok(e.get_ids().to_vec())
    }

    /// The program for a text of so many tokens, padded, which also predicts its cost.
    ///
    /// # Errors
    /// A length the model does not take.
    pub fn program(&self, tokens: usize) -> Result<Arc<Program>, ClientError> {
        let tokens = padded(tokens).unwrap_or(tokens);
        Ok(self.programs.get(tokens, || self.planner.program(tokens))?)
    }

    /// Embeds texts, several sessions at once, results in order.
    ///
    /// # Errors
    /// A text that is too long fails the call before any is sent; otherwise the first text that fails ends it, and the error
    /// names its index. Dropping the future cancels its sessions at all parties.
    pub async fn embed<T: AsRef<str>>(&self, texts: &[T]) -> Result<Vec<Embedding>, ClientError> {
        for (i, t) in texts.iter().enumerate() {
            drop(Zeroizing::new(self.tokens(i, t.as_ref())?));
        }
        self.embed_each(texts).try_collect().await
    }

    /// As [`Self::embed`], each result as soon as it and those before it are there. Sessions run only while the stream is
    /// polled; after an error it may be polled on for the other texts.
    pub fn embed_each<T: AsRef<str>>(&self, texts: &[T]) -> impl Stream<Item = Result<Embedding, ClientError>> {
        stream::iter(texts.iter().enumerate().map(|(i, t)| self.embed_text(i, t.as_ref()))).buffered(self.concurrency)
    }

    async fn embed_text(&self, index: usize, text: &str) -> Result<Embedding, ClientError> {
        let ids = Zeroizing::new(self.tokens(index, text)?);
        self.embed_ids(&ids).await.map_err(|e| e.of_text(index))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_may_run_on_any_thread() {
        fn send<T: Send>(_: impl Fn(&'static Client) -> T) {}
        send(|c| c.embed(&["x"]));
        send(|c| c.embed_ids(&[1]));
        send(|_| Client::builder().connect());
        send(|_| Client::builder().examine());
    }
}
