//! `/v1/completions`, with `echo` and `logprobs` for evaluation harnesses.

use std::sync::Arc;

use axum::extract::{self, State};
use serde_json::{Value, json};

use super::super::Endpoint;
use super::super::error::{ApiError, Dialect, json_response};
use super::super::job::{Job, Prompt, Usage, blocking, find, generator, now};
use super::super::logprobs::Columns;
use super::super::registry::Model;
use super::super::stream::{self, Sink, Stop};
use super::params::{Input, inputs, reason, request, streaming};
use super::{Answered, fields, id, usage};
use crate::generate::{Codec, TokenLogprob};

/// What OpenAI generates if nothing is said.
const MAX_TOKENS: usize = 16;

/// A prompt with what an echo of it shows.
struct Item {
    prompt: Prompt,
    echo: Option<String>,
}

pub async fn complete(State(e): State<Arc<Endpoint>>, body: extract::Request) -> Answered {
    let mut f = fields(&e, body).await?;
    let name = f.required("model")?;
    let prompts = inputs("prompt", f.take("prompt").ok_or_else(|| ApiError::field("prompt", "is required"))?)?;
    let (streams, with_usage) = streaming(&mut f)?;
    let mut r = request(&mut f)?;
    r.max_tokens = Some(f.count("max_tokens")?.unwrap_or(MAX_TOKENS));
    r.logprobs = f.count("logprobs")?;
    let echo = f.boolean("echo")?.unwrap_or(false);
    r.prompt_logprobs = echo && r.logprobs.is_some();
    r.continues = true;
    if r.max_tokens == Some(0) && !echo {
        return Err(ApiError::field("max_tokens", "must be at least 1, unless echo is true"));
    }
    f.neutral(&[("suffix", &[])])?;
    f.finish()?;

    let model = find(&e, &name)?;
    let codec = Arc::clone(&generator(&model)?.codec);
    let r = Arc::new(r);
    let checked = move || {
        let one = |input| {
            let (tokens, text) = match input {
                Input::Text(t) => (codec.encode(&t, true)?, Some(t)),
                Input::Tokens(t) => (t, None),
            };
            r.check(&codec, &tokens)?;
            let echo = echo.then(|| text.unwrap_or_else(|| codec.decode(&tokens)));
            Ok(Item { prompt: Prompt { tokens, request: Arc::clone(&r) }, echo })
        };
        prompts.into_iter().map(one).collect::<Result<Vec<Item>, crate::generate::GenerateError>>()
    };
    let (permit, jobs) = blocking(e.permit()?, checked).await.map_err(|e| e.at("prompt"))?;
    let (id, created) = (id("cmpl-")?, now());
    let head = json!({"id": id, "object": "text_completion", "created": created, "model": name});
    if streams {
        let period = e.config.heartbeat;
        return Ok(stream::respond(Dialect::OpenAi, period, |sink| async move {
            let _permit = permit;
            events(&e, &model, jobs, head, with_usage, sink).await
        }));
    }
    let (mut choices, mut total) = (Vec::new(), Usage::default());
    for (index, j) in jobs.into_iter().enumerate() {
        let (tokens, wanted) = (j.prompt.tokens.clone(), j.prompt.request.logprobs.is_some());
        let job = Job::open(&e, &model, j.prompt, e.config.keep_alive).await?;
        let codec = Arc::clone(&job.codec);
        let a = job.collect().await?;
        let mut columns = Columns::default();
        if j.echo.is_some() {
            echoed(&mut columns, &codec, &tokens, &a.scores);
        }
        a.logprobs.iter().for_each(|l| columns.token(&codec, l));
        choices.push(json!({
            "index": index,
            "text": j.echo.unwrap_or_default() + &a.text,
            "logprobs": wanted.then(|| columns.take()),
            "finish_reason": reason(a.finish),
        }));
        add(&mut total, &a.usage);
    }
    let mut v = head;
    v["choices"] = json!(choices);
    v["usage"] = usage(&total);
    Ok(json_response(&v))
}

async fn events(
    e: &Arc<Endpoint>,
    model: &Arc<Model>,
    jobs: Vec<Item>,
    mut head: Value,
    with_usage: bool,
    sink: Sink,
) -> Result<(), Stop> {
    if with_usage {
        head["usage"] = Value::Null;
    }
    let mut total = Usage::default();
    for (index, j) in jobs.into_iter().enumerate() {
        let chunk = |text: &str, logprobs: Value, finish: Option<&str>| {
            let mut v = head.clone();
            v["choices"] = json!([{"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}]);
            v
        };
        let wanted = j.prompt.request.logprobs.is_some();
        let mut job = Job::open(e, model, j.prompt, e.config.keep_alive).await?;
        let (codec, tokens) = (Arc::clone(&job.codec), job.tokens().to_vec());
        let (mut running, scores) = job.begin().await?;
        let mut columns = Columns::default();
        if let Some(text) = &j.echo {
            echoed(&mut columns, &codec, &tokens, &scores);
            sink.send(&chunk(text, json!(wanted.then(|| columns.take())), None)).await?;
        }
        let mut finish = "length";
        while let Some(step) = running.next().await? {
            if !step.text.is_empty() || step.logprob.is_some() {
                step.logprob.iter().for_each(|l| columns.token(&codec, l));
                sink.send(&chunk(&step.text, json!(wanted.then(|| columns.take())), None)).await?;
            }
            finish = step.finish.map_or(finish, reason);
        }
        let u = running.usage;
        job.end(&u);
        add(&mut total, &u);
        sink.send(&chunk("", Value::Null, Some(finish))).await?;
    }
    if with_usage {
        head["choices"] = json!([]);
        head["usage"] = usage(&total);
        sink.send(&head).await?;
    }
    Ok(sink.done().await?)
}

fn echoed(columns: &mut Columns, codec: &Codec, tokens: &[u32], scores: &[TokenLogprob]) {
    columns.first(codec, tokens[0]);
    scores.iter().for_each(|l| columns.token(codec, l));
}

fn add(total: &mut Usage, u: &Usage) {
    total.prompt += u.prompt;
    total.reused += u.reused;
    total.answer += u.answer;
}
