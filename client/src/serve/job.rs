//! One generation of either dialect, from admission to the conversation's return to the pool.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::OwnedSemaphorePermit;

use super::error::ApiError;
use super::registry::{Model, TextModel};
use super::{Embedder, Endpoint};
use crate::generate::{Codec, Conversation, Finish, Generation, Request, Step, TokenLogprob};

/// Most inputs of a request, OpenAI's limit for embeddings. Completions of a request run one after another, so that more
/// of them are no faster than several requests.
const MOST_INPUTS: usize = 2048;

/// Refuses more inputs of a field than a request may have.
pub fn bounded(name: &str, inputs: usize) -> Result<(), ApiError> {
    at_most(name, inputs, MOST_INPUTS, "inputs a request")
}

/// Refuses more of a field than there may be.
pub fn at_most(name: &str, n: usize, most: usize, what: &str) -> Result<(), ApiError> {
    if n > most {
        return Err(ApiError::field(name, format!("at most {most} {what}, not {n}")));
    }
    Ok(())
}

/// A prompt and what to do after it, checked.
pub struct Prompt {
    pub tokens: Vec<u32>,
    /// Shared by all prompts of an HTTP request.
    pub request: Arc<Request>,
}

/// Tokens and times of one generation.
#[derive(Clone, Copy, Default)]
pub struct Usage {
    pub prompt: usize,
    pub reused: usize,
    pub answer: usize,
    pub load: Duration,
    pub prefill: Duration,
    pub answering: Duration,
}

/// An admitted generation with its decoder.
pub struct Job {
    pub model: Arc<Model>,
    pub codec: Arc<Codec>,
    endpoint: Arc<Endpoint>,
    conversation: Conversation,
    prompt: Prompt,
    keep: Duration,
    load: Duration,
}

/// A whole answer.
pub struct Answer {
    pub text: String,
    /// Of the prompt's tokens but the first, if asked for.
    pub scores: Vec<TokenLogprob>,
    /// Of the answer's tokens, if asked for.
    pub logprobs: Vec<TokenLogprob>,
    pub finish: Finish,
    pub usage: Usage,
}

impl Job {
    /// Takes the conversation that the prompt continues, or opens one.
    ///
    /// # Errors
    /// Parties that cannot be reached; nothing of the prompt was sent.
    pub async fn open(
        endpoint: &Arc<Endpoint>,
        model: &Arc<Model>,
        prompt: Prompt,
        keep: Duration,
    ) -> Result<Job, ApiError> {
        let started = Instant::now();
        let text = generator(model)?;
        let conversation = match endpoint.pool.take(&model.name, &prompt.tokens) {
            Some(c) => c,
            None => Conversation::new(text.open.open().await?),
        };
        let (endpoint, codec, model) = (Arc::clone(endpoint), Arc::clone(&text.codec), Arc::clone(model));
        Ok(Job { model, codec, endpoint, conversation, prompt, keep, load: started.elapsed() })
    }

    /// The tokens of the prompt.
    pub fn tokens(&self) -> &[u32] {
        &self.prompt.tokens
    }

    /// Whether log-probabilities were asked for.
    pub fn logprobs(&self) -> bool {
        self.prompt.request.logprobs.is_some()
    }

    /// Evaluates the prompt.
    ///
    /// # Errors
    /// The decoder's.
    pub async fn begin(&mut self) -> Result<(Running<'_>, Vec<TokenLogprob>), ApiError> {
        let started = Instant::now();
        let usage = Usage { prompt: self.prompt.tokens.len(), load: self.load, ..Usage::default() };
        let request = Request::clone(&self.prompt.request);
        let mut generation = self.conversation.generate(&self.codec, &self.prompt.tokens, request)?;
        let scores = generation.prefill().await?;
        let usage = Usage { reused: generation.reused(), prefill: started.elapsed(), ..usage };
        Ok((Running { generation, usage, since: Instant::now() }, scores))
    }

    /// Counts, and keeps the conversation for a next turn. A job that is dropped instead ends its session.
    pub fn end(self, usage: &Usage) {
        let e = &self.endpoint;
        e.count(|c| &c.prompt_tokens, (usage.prompt - usage.reused) as u64);
        e.count(|c| &c.answer_tokens, usage.answer as u64);
        e.count(|c| &c.busy_ms, (usage.prefill + usage.answering).as_millis() as u64);
        e.pool.put(&self.model.name, self.conversation, self.keep);
    }

    /// Runs to the end.
    ///
    /// # Errors
    /// The decoder's.
    pub async fn collect(mut self) -> Result<Answer, ApiError> {
        let (mut running, scores) = self.begin().await?;
        let (mut text, mut logprobs, mut finish) = (String::new(), Vec::new(), Finish::Length);
        while let Some(step) = running.next().await? {
            text.push_str(&step.text);
            logprobs.extend(step.logprob);
            finish = step.finish.unwrap_or(finish);
        }
        let usage = running.usage;
        self.end(&usage);
        Ok(Answer { text, scores, logprobs, finish, usage })
    }
}

/// A generation past its prefill.
pub struct Running<'a> {
    generation: Generation<'a>,
    since: Instant,
    pub usage: Usage,
}

impl Running<'_> {
    pub async fn next(&mut self) -> Result<Option<Step>, ApiError> {
        let step = self.generation.next().await?;
        self.usage.answer += usize::from(step.is_some());
        self.usage.answering = self.since.elapsed();
        Ok(step)
    }
}

/// The model of a request.
pub fn find(endpoint: &Endpoint, name: &str) -> Result<Arc<Model>, ApiError> {
    endpoint.registry.find(name).cloned().ok_or_else(|| ApiError::no_model(name))
}

pub fn generator(model: &Model) -> Result<&TextModel, ApiError> {
    let no = || {
        ApiError::field("model", format!("{:?} embeds and does not generate: ask another of /v1/models", model.name))
    };
    model.text.as_ref().ok_or_else(no)
}

pub fn embedder(model: &Model) -> Result<&Arc<dyn Embedder>, ApiError> {
    let no = || {
        ApiError::field("model", format!("{:?} generates and does not embed: ask another of /v1/models", model.name))
    };
    model.embedder.as_ref().ok_or_else(no)
}

/// Runs tokenising where it does not hold up other requests. The permit goes with it and comes back with its result: the
/// work does not end when its client leaves, and holds its slot until it does.
pub async fn blocking<T, E>(
    permit: OwnedSemaphorePermit,
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<(OwnedSemaphorePermit, T), ApiError>
where
    T: Send + 'static,
    E: Into<ApiError> + Send + 'static,
{
    match tokio::task::spawn_blocking(move || work().map(|done| (permit, done))).await {
        Ok(r) => r.map_err(Into::into),
        Err(_) => Err(ApiError::new(500, "tokenising failed on this text")),
    }
}

/// Embeds token sequences one after another.
///
/// # Errors
/// The first that fails.
pub async fn embed(
    endpoint: &Endpoint,
    embedder: &dyn Embedder,
    inputs: &[Vec<u32>],
    _permit: &OwnedSemaphorePermit,
) -> Result<Vec<Vec<f64>>, ApiError> {
    let started = Instant::now();
    let mut out = Vec::with_capacity(inputs.len());
    for tokens in inputs {
        out.push(embedder.embed(tokens).await?);
        endpoint.count(|c| &c.embedded, 1);
        endpoint.count(|c| &c.prompt_tokens, tokens.len() as u64);
    }
    endpoint.count(|c| &c.busy_ms, started.elapsed().as_millis() as u64);
    Ok(out)
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
