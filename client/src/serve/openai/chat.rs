//! `/v1/chat/completions`.

use std::sync::Arc;
use std::time::SystemTime;

use axum::extract::{self, State};
use serde_json::{Map, Value, json};

use super::super::Endpoint;
use super::super::error::{ApiError, Dialect, json_response};
use super::super::fields::Fields;
use super::super::job::{Job, Prompt, blocking, find, generator, now};
use super::super::logprobs::entry;
use super::super::stream::{self, Sink, Stop};
use super::params::{reason, request, streaming};
use super::{Answered, fields, id, usage};
use crate::generate::Message;

pub async fn chat(State(e): State<Arc<Endpoint>>, body: extract::Request) -> Answered {
    let mut f = fields(&e, body).await?;
    let name = f.required("model")?;
    let messages = messages(f.take("messages"), "messages")?;
    let (streams, with_usage) = streaming(&mut f)?;
    let mut r = request(&mut f)?;
    let limit = f.count("max_completion_tokens")?;
    r.max_tokens = f.count("max_tokens")?.or(limit);
    if r.max_tokens == Some(0) {
        return Err(ApiError::field("max_tokens", "must be at least 1"));
    }
    let top = f.count("top_logprobs")?;
    match (f.boolean("logprobs")?.unwrap_or(false), top) {
        (true, top) => r.logprobs = Some(top.unwrap_or(0)),
        (false, None | Some(0)) => {}
        (false, Some(_)) => return Err(ApiError::field("top_logprobs", "needs logprobs to be true")),
    }
    let variables = f.object("chat_template_kwargs")?.unwrap_or_default();
    let answer = f.boolean("add_generation_prompt")?.unwrap_or(true);
    f.neutral(&[
        ("tools", &[]),
        ("tool_choice", &[json!("none"), json!("auto")]),
        ("functions", &[]),
        ("function_call", &[json!("none"), json!("auto")]),
        ("modalities", &[json!(["text"])]),
        ("audio", &[]),
        ("reasoning_effort", &[json!("none")]),
        ("verbosity", &[json!("medium")]),
        ("web_search_options", &[]),
        ("documents", &[]),
        ("echo", &[]),
    ])?;
    f.finish()?;

    let model = find(&e, &name)?;
    let codec = Arc::clone(&generator(&model)?.codec);
    let checked = move || {
        let tokens = codec.encode_chat(&messages, answer, &variables, SystemTime::now())?;
        r.check(&codec, &tokens).map(|()| Prompt { tokens, request: Arc::new(r) })
    };
    let (permit, prompt) = blocking(e.permit()?, checked).await.map_err(|e| e.at("messages"))?;
    let (id, created) = (id("chatcmpl-")?, now());
    let job = Job::open(&e, &model, prompt, e.config.keep_alive).await?;
    let head = json!({"id": id, "created": created, "model": name, "system_fingerprint": null});
    if streams {
        return Ok(stream::respond(Dialect::OpenAi, e.config.heartbeat, |sink| async move {
            let _permit = permit;
            events(job, head, with_usage, sink).await
        }));
    }
    let codec = Arc::clone(&job.codec);
    let wanted = job.logprobs();
    let a = job.collect().await?;
    let logprobs: Vec<Value> = a.logprobs.iter().map(|l| entry(&codec, l)).collect();
    let mut v = head;
    v["object"] = json!("chat.completion");
    v["choices"] = json!([{
        "index": 0,
        "message": {"role": "assistant", "content": a.text, "refusal": null},
        "logprobs": wanted.then(|| json!({"content": logprobs, "refusal": null})),
        "finish_reason": reason(a.finish),
    }]);
    v["usage"] = usage(&a.usage);
    Ok(json_response(&v))
}

/// Role, text, reason, usage, end: the order that clients rely on.
async fn events(mut job: Job, mut head: Value, with_usage: bool, sink: Sink) -> Result<(), Stop> {
    head["object"] = json!("chat.completion.chunk");
    if with_usage {
        head["usage"] = Value::Null;
    }
    let chunk = |delta: Value, logprobs: Value, finish: Option<&str>| {
        let mut v = head.clone();
        v["choices"] = json!([{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}]);
        v
    };
    sink.send(&chunk(json!({"role": "assistant", "content": ""}), Value::Null, None)).await?;
    let codec = Arc::clone(&job.codec);
    let (mut running, _) = job.begin().await?;
    let mut finish = None;
    while let Some(step) = running.next().await? {
        if !step.text.is_empty() || step.logprob.is_some() {
            let l = step.logprob.map(|l| json!({"content": [entry(&codec, &l)], "refusal": null}));
            sink.send(&chunk(json!({"content": step.text}), json!(l), None)).await?;
        }
        finish = step.finish;
    }
    let u = running.usage;
    job.end(&u);
    sink.send(&chunk(json!({}), Value::Null, finish.map(reason))).await?;
    if with_usage {
        head["choices"] = json!([]);
        head["usage"] = usage(&u);
        sink.send(&head).await?;
    }
    Ok(sink.done().await?)
}

/// The messages of a chat, for both dialects; `field` is their name in errors.
pub fn messages(v: Option<Value>, field: &str) -> Result<Vec<Message>, ApiError> {
    let list = match v {
        None => return Err(ApiError::field(field, "is required")),
        Some(Value::Array(a)) if !a.is_empty() => a,
        Some(_) => return Err(ApiError::field(field, "must be a list of at least one message")),
    };
    let each = list.into_iter().enumerate().map(|(i, v)| {
        let Value::Object(m) = v else { return Err(ApiError::field(&format!("{field}[{i}]"), "must be an object")) };
        message(m).map_err(|e| e.inside(&format!("{field}[{i}]")))
    });
    each.collect()
}

fn message(m: Map<String, Value>) -> Result<Message, ApiError> {
    let mut f = Fields::of(m);
    let role = match f.required("role")?.as_str() {
        // Templates know the older name only.
        "developer" | "system" => "system",
        "user" => "user",
        "assistant" => "assistant",
        _ => return Err(ApiError::unsupported("role", "must be system, developer, user or assistant")),
    };
    let content = match f.take("content") {
        Some(Value::String(s)) => s,
        Some(Value::Array(parts)) => {
            let texts: Result<Vec<String>, ApiError> = parts.into_iter().map(part).collect();
            texts?.join("\n")
        }
        None if role == "assistant" => String::new(),
        None => return Err(ApiError::field("content", "is required")),
        Some(_) => return Err(ApiError::field("content", "must be a string or a list of text parts")),
    };
    let name = f.string("name")?;
    f.ignore(&["annotations", "refusal"]);
    f.neutral(&[("tool_calls", &[]), ("function_call", &[]), ("audio", &[]), ("images", &[]), ("thinking", &[])])?;
    f.finish()?;
    Ok(Message { role: role.into(), content, name })
}

fn part(v: Value) -> Result<String, ApiError> {
    match (v["type"].as_str(), v["text"].as_str()) {
        (Some("text"), Some(t)) => Ok(t.into()),
        _ => Err(ApiError::unsupported("content", "only parts of type \"text\" are supported")),
    }
}
