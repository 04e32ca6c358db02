//! The generation loop over a [`Decoder`], and the cache between turns.

use zeroize::{Zeroize, Zeroizing};

use super::sampling::logprob;
use super::{
    Codec, Decoder, Detokeniser, GenerateError, Positions, Sampler, Sampling, StopMatcher, TokenLogprob, parameter,
};

/// Prompt tokens scored at a time: their logits are all in memory at once, `[128, vocab]`.
const SCORED: usize = 128;
/// Most alternatives of a [`TokenLogprob`], OpenAI's limit.
const MOST_LOGPROBS: usize = 20;

/// What to generate after a prompt.
#[derive(Clone, Default)]
pub struct Request {
    /// How to choose tokens.
    pub sampling: Sampling,
    /// Most tokens of the answer; `None` is what the context leaves. 0 only evaluates the prompt.
    pub max_tokens: Option<usize>,
    /// Texts that end the answer and are not part of it.
    pub stop: Vec<String>,
    /// Tokens that end the answer, besides the model's own.
    pub stop_tokens: Vec<u32>,
    /// Whether to go on after the model's end token.
    pub ignore_eos: bool,
    /// Log-probabilities of the answer's tokens, with that many alternatives.
    pub logprobs: Option<usize>,
    /// Log-probabilities of the prompt's tokens too ([`Generation::prefill`]); the whole prompt is evaluated again.
    pub prompt_logprobs: bool,
    /// Whether the answer's text continues the prompt's (a completion) or begins anew (a chat). It decides about a
    /// leading space and about a code point that the prompt left unfinished.
    pub continues: bool,
}

impl Request {
    /// Whether the request can be served after `prompt`; needs no decoder.
    ///
    /// # Errors
    /// A parameter outside its range, an empty prompt, or one that leaves no room in the context.
    pub fn check(&self, codec: &Codec, prompt: &[u32]) -> Result<(), GenerateError> {
        if prompt.is_empty() {
            return Err(parameter("prompt", "the model needs at least one token to begin with"));
        }
        codec.check(prompt)?;
        self.sampling.validate()?;
        codec.check_bias(&self.sampling.logit_bias)?;
        StopMatcher::new(self.stop.clone())?;
        if let Some(n) = self.logprobs.filter(|n| *n > MOST_LOGPROBS) {
            return Err(parameter("top_logprobs", format!("at most {MOST_LOGPROBS}, not {n}")));
        }
        let limit = codec.context();
        if prompt.len() > limit || (prompt.len() == limit && self.max_tokens != Some(0)) {
            return Err(GenerateError::TooLong { tokens: prompt.len(), limit });
        }
        Ok(())
    }
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// By a stop string or an end token.
    Stop,
    /// By `max_tokens` or the context.
    Length,
}

/// One generated token.
pub struct Step {
    /// The token.
    pub token: u32,
    /// The text that became certain with it; may be empty.
    pub text: String,
    /// If asked for.
    pub logprob: Option<TokenLogprob>,
    /// Set on the last step.
    pub finish: Option<Finish>,
}

/// A decoder with the tokens in its cache. The next turn's common beginning is not evaluated again.
pub struct Conversation {
    decoder: Box<dyn Decoder>,
    tokens: Zeroizing<Vec<u32>>,
}

impl Conversation {
    /// An empty conversation.
    pub fn new(decoder: Box<dyn Decoder>) -> Conversation {
        Conversation { decoder, tokens: Zeroizing::default() }
    }

    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether the cache is empty.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// How many of the prompt's first tokens are in the cache.
    pub fn common(&self, prompt: &[u32]) -> usize {
        self.tokens.iter().zip(prompt).take_while(|(a, b)| a == b).count().min(self.decoder.len())
    }

    /// Begins an answer. Nothing is evaluated before [`Generation::prefill`] or [`Generation::next`].
    ///
    /// # Errors
    /// As [`Request::check`], or no randomness.
    pub fn generate<'a>(
        &'a mut self,
        codec: &'a Codec,
        prompt: &[u32],
        request: Request,
    ) -> Result<Generation<'a>, GenerateError> {
        request.check(codec, prompt)?;
        let room = codec.context() - prompt.len();
        let mut detokeniser = codec.detokeniser();
        if request.continues {
            prompt.iter().for_each(|t| _ = detokeniser.push(*t));
        }
        Ok(Generation {
            left: request.max_tokens.map_or(room, |m| m.min(room)),
            sampler: Sampler::new(request.sampling.clone())?,
            stop: StopMatcher::new(request.stop.clone())?,
            conversation: self,
            codec,
            detokeniser,
            request,
            prompt: Zeroizing::new(prompt.to_vec()),
            answer: Zeroizing::default(),
            logits: Zeroizing::default(),
            reused: 0,
            fed: 0,
            done: false,
        })
    }
}

/// An answer in the making. Dropping it ends it; the conversation keeps what was evaluated.
pub struct Generation<'a> {
    conversation: &'a mut Conversation,
    codec: &'a Codec,
    request: Request,
    sampler: Sampler,
    stop: StopMatcher,
    detokeniser: Detokeniser,
    prompt: Zeroizing<Vec<u32>>,
    answer: Zeroizing<Vec<u32>>,
    /// Of the last fed position, `[vocab]`.
    logits: Zeroizing<Vec<f32>>,
    left: usize,
    reused: usize,
    /// How much of prompt and answer went through the decoder or was there.
    fed: usize,
    done: bool,
}

impl Generation<'_> {
    /// How many of the prompt's tokens were in the cache; known after the prefill.
    pub fn reused(&self) -> usize {
        self.reused
    }

    /// Evaluates the prompt, once. Returns, if `prompt_logprobs` asked for them, the log-probabilities of all its tokens
    /// but the first, which has none.
    ///
    /// # Errors
    /// The decoder's; the conversation should then be dropped.
    pub async fn prefill(&mut self) -> Result<Vec<TokenLogprob>, GenerateError> {
        let mut scores = Vec::new();
        if self.fed > 0 {
            return Ok(scores);
        }
        // The last token is always evaluated: its logits are needed.
        let cached = self.conversation.common(&self.prompt).min(self.prompt.len() - 1);
        self.reused = if self.request.prompt_logprobs { 0 } else { cached };
        self.conversation.decoder.truncate(self.reused);
        let kept = self.conversation.decoder.len().min(self.reused);
        self.conversation.tokens.truncate(kept);
        if kept < self.reused {
            return Err(GenerateError::Logits(format!("the decoder kept {kept} of {} tokens", self.reused)));
        }
        self.fed = self.reused;
        if !self.request.prompt_logprobs {
            let rest = self.prompt[self.fed..].to_vec();
            self.feed(&rest, Positions::Last).await?;
            return Ok(scores);
        }
        let top = self.request.logprobs.unwrap_or(0);
        let prompt = self.prompt.clone();
        for part in prompt.chunks(SCORED) {
            let mut rows = self.feed(part, Positions::All).await?;
            let next = &prompt[self.fed + 1 - part.len()..];
            scores.extend(rows.iter().zip(next).map(|(row, t)| logprob(row, *t, top)));
            rows.iter_mut().for_each(Zeroize::zeroize);
        }
        Ok(scores)
    }

    /// The next token; `None` after the last.
    ///
    /// # Errors
    /// The decoder's, or logits that cannot be used; the conversation should then be dropped.
    pub async fn next(&mut self) -> Result<Option<Step>, GenerateError> {
        if self.done {
            return Ok(None);
        }
        self.prefill().await?;
        if self.left == 0 {
            self.done = true;
            return Ok(None);
        }
        // The token before is fed only now: its text was shown first, and the last one's successor is never computed.
        let at = self.fed - self.prompt.len();
        if at < self.answer.len() {
            let rest = self.answer[at..].to_vec();
            self.feed(&rest, Positions::Last).await?;
        }
        let token = self.sampler.sample(&self.logits, &self.prompt, &self.answer)?;
        let logprob = self.request.logprobs.map(|top| logprob(&self.logits, token, top));
        self.answer.push(token);
        self.left -= 1;

        let ends = (self.codec.is_eos(token) && !self.request.ignore_eos) || self.request.stop_tokens.contains(&token);
        let fresh = if ends { String::new() } else { self.detokeniser.push(token) };
        let (mut text, stop) = self.stop.push(&fresh);
        let mut finish = (ends || stop.is_some()).then_some(Finish::Stop);
        if stop.is_none() && (ends || self.left == 0) {
            finish = finish.or(Some(Finish::Length));
            let (more, stop) = self.stop.push(&self.detokeniser.finish());
            text.push_str(&more);
            match stop {
                Some(_) => finish = Some(Finish::Stop),
                None => text.push_str(&self.stop.finish()),
            }
        }
        self.done = finish.is_some();
        Ok(Some(Step { token, text, logprob, finish }))
    }

    /// Feeds `tokens`, keeps the last row of logits, and returns all rows if all were asked for.
    async fn feed(&mut self, tokens: &[u32], positions: Positions) -> Result<Vec<Vec<f32>>, GenerateError> {
        let mut rows = self.conversation.decoder.feed(tokens, positions).await?;
        let expected = if positions == Positions::All { tokens.len() } else { 1 };
        if rows.len() != expected {
            return Err(GenerateError::Logits(format!("{} rows for {expected} positions", rows.len())));
        }
        self.conversation.tokens.extend_from_slice(tokens);
        self.fed += tokens.len();
        self.logits = Zeroizing::new(match positions {
            Positions::Last => rows.pop().unwrap_or_default(),
            Positions::All => rows.last().cloned().unwrap_or_default(),
        });
        Ok(rows)
    }
}
