//! The models that the endpoint offers, and how it reaches them.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::mpsc;

use crate::ClientError;
use crate::generate::{Boxed, Codec, Decoder};

/// Opens conversations with a model; the private engine implements it.
pub trait OpenDecoder: Send + Sync {
    /// A decoder with an empty cache.
    ///
    /// # Errors
    /// Parties that cannot be reached or do not take another session.
    fn open(&self) -> Boxed<'_, Result<Box<dyn Decoder>, ClientError>>;
}

/// Embeds texts with a model; the private engine implements it.
pub trait Embedder: Send + Sync {
    /// Most tokens of a text.
    fn limit(&self) -> usize;

    /// Tokens that the model knows are below this.
    fn vocab(&self) -> usize;

    /// Dimensions of a vector.
    fn width(&self) -> usize;

    /// Tokens of a text of any length, with those that the tokenizer puts around it.
    ///
    /// # Errors
    /// A text that the tokenizer cannot encode.
    fn tokens(&self, text: &str) -> Result<Vec<u32>, ClientError>;

    /// Unit vector of `width` of one token sequence, not longer than the limit.
    ///
    /// # Errors
    /// What the parties or the link to them said.
    fn embed<'a>(&'a self, tokens: &'a [u32]) -> Boxed<'a, Result<Vec<f64>, ClientError>>;
}

/// Fetches models by name. What it fetches is not served: a model needs parties of its own.
pub trait Puller: Send + Sync {
    /// Fetches a model, telling how far it is; ends early once nobody listens. Returns what to do to have it served.
    ///
    /// # Errors
    /// No such model, or it cannot be fetched.
    fn pull<'a>(&'a self, name: &'a str, progress: mpsc::Sender<Progress>) -> Boxed<'a, Result<String, PullError>>;
}

/// Why a model is not fetched.
#[derive(Clone, Debug, thiserror::Error)]
pub enum PullError {
    /// What was asked for cannot be a model's name.
    #[error("{0}")]
    Name(String),
    /// There is none of that name.
    #[error("{0}")]
    Absent(String),
    /// It could not be fetched.
    #[error("{0}")]
    Failed(String),
}

/// How far a file is.
#[derive(Clone, Debug)]
pub struct Progress {
    /// `sha256:` and the file's digest in hex, or its name where the source does not tell.
    pub digest: String,
    /// Bytes in all.
    pub total: u64,
    /// Bytes that are there.
    pub completed: u64,
}

/// What clients are told about a model.
#[derive(Clone, Debug, Default)]
pub struct About {
    /// Seconds since 1970 at which the files were made.
    pub created: u64,
    /// Size of the files.
    pub bytes: u64,
    /// SHA-256 of the weights, hex.
    pub digest: String,
    /// Architecture: `llama`, `bert`.
    pub family: String,
    /// Number of parameters as people write it: `22.7M`.
    pub parameters: String,
    /// Form of the weights: `Q8_0`.
    pub quantisation: String,
}

/// What a generating model needs.
pub struct TextModel {
    /// Its tokenizer files.
    pub codec: Arc<Codec>,
    /// Its engine.
    pub open: Arc<dyn OpenDecoder>,
}

/// A model with what it can do.
pub struct Model {
    /// Its name in requests.
    pub name: String,
    /// For listings.
    pub about: About,
    /// If it generates.
    pub text: Option<TextModel>,
    /// If it embeds.
    pub embedder: Option<Arc<dyn Embedder>>,
}

/// The models by name.
#[derive(Default)]
pub struct Registry {
    models: BTreeMap<String, Arc<Model>>,
    pub(super) puller: Option<Arc<dyn Puller>>,
}

impl Registry {
    /// A registry of these models; of two with one name the last counts.
    pub fn new(models: impl IntoIterator<Item = Model>) -> Registry {
        let models = models.into_iter().map(|m| (m.name.clone(), Arc::new(m))).collect();
        Registry { models, puller: None }
    }

    /// With somewhere to fetch more models from.
    pub fn with_puller(self, puller: Arc<dyn Puller>) -> Registry {
        Registry { puller: Some(puller), ..self }
    }

    /// A model by its name; Ollama's `:latest` may follow it.
    pub fn find(&self, name: &str) -> Option<&Arc<Model>> {
        self.models.get(name).or_else(|| self.models.get(name.strip_suffix(":latest")?))
    }

    /// All models, by name.
    pub fn all(&self) -> impl Iterator<Item = &Arc<Model>> {
        self.models.values()
    }
}
