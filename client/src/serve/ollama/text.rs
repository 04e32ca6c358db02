//! `/api/generate` and `/api/chat`.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use axum::body::Body;
use axum::extract::{self, State};
use axum::http::Response;
use serde_json::{Map, Value, json};

use super::super::Endpoint;
use super::super::error::{ApiError, Dialect, json_response};
use super::super::fields::Fields;
use super::super::job::{Job, Prompt, Usage, blocking, find, generator};
use super::super::logprobs::entry;
use super::super::openai::{messages, reason};
use super::super::registry::Model;
use super::super::stream::{self, Sink, Stop};
use super::options::{keep_alive, request};
use super::{Answered, fields, nanos, time};
use crate::generate::{Codec, GenerateError, Message, Request};

/// Where an answer's text goes.
#[derive(Clone, Copy)]
enum Form {
    Generate,
    Chat,
}

impl Form {
    fn line(self, name: &str, text: &str) -> Value {
        let mut v = json!({"model": name, "created_at": time(SystemTime::now()), "done": false});
        match self {
            Form::Generate => v["response"] = json!(text),
            Form::Chat => v["message"] = json!({"role": "assistant", "content": text}),
        }
        v
    }
}

/// What both routes read alike.
struct Common {
    model: Arc<Model>,
    name: String,
    stream: bool,
    keep: Duration,
    request: Request,
    variables: Map<String, Value>,
}

fn common(e: &Endpoint, f: &mut Fields) -> Result<Common, ApiError> {
    let name = f.required("model")?;
    let mut request = request(f)?;
    let top = f.count("top_logprobs")?;
    if f.boolean("logprobs")?.unwrap_or(false) {
        request.logprobs = Some(top.unwrap_or(0));
    }
    let mut variables = Map::new();
    match f.take("think") {
        None => {}
        Some(Value::Bool(false)) => _ = variables.insert("enable_thinking".into(), json!(false)),
        Some(_) => {
            return Err(ApiError::unsupported("think", "thoughts are not told apart from the answer: leave it out"));
        }
    }
    let (stream, keep) = (f.boolean("stream")?.unwrap_or(true), keep_alive(f, e.config.keep_alive)?);
    f.ignore(&["truncate", "shift"]);
    f.neutral(&[("format", &[])])?;
    let model = find(e, &name)?;
    generator(&model)?;
    Ok(Common { model, name, stream, keep, request, variables })
}

pub async fn generate(State(e): State<Arc<Endpoint>>, body: extract::Request) -> Answered {
    let started = Instant::now();
    let mut f = fields(&e, body).await?;
    let c = common(&e, &mut f)?;
    let prompt = f.string("prompt")?.unwrap_or_default();
    let system = f.string("system")?.filter(|s| !s.is_empty());
    let raw = f.boolean("raw")?.unwrap_or(false);
    f.neutral(&[("suffix", &[]), ("template", &[]), ("images", &[]), ("context", &[])])?;
    f.finish()?;
    if prompt.is_empty() {
        return Ok(load(&e, &c, Form::Generate));
    }
    let tokens = move |codec: &Codec, variables: &Map<String, Value>, request: &mut Request| {
        // A model without a template completes texts, as with Ollama's default template.
        if raw || (codec.template().is_none() && system.is_none()) {
            request.continues = true;
            return codec.encode(&prompt, true);
        }
        let system = system.map(|s| Message::new("system", s));
        let messages: Vec<Message> = system.into_iter().chain([Message::new("user", prompt)]).collect();
        codec.encode_chat(&messages, true, variables, SystemTime::now())
    };
    answer(e, c, Form::Generate, started, "prompt", tokens).await
}

pub async fn chat(State(e): State<Arc<Endpoint>>, body: extract::Request) -> Answered {
    let started = Instant::now();
    let mut f = fields(&e, body).await?;
    let c = common(&e, &mut f)?;
    let given = f.take("messages");
    f.neutral(&[("tools", &[])])?;
    f.finish()?;
    if given.as_ref().is_none_or(|v| v.as_array().is_some_and(Vec::is_empty)) {
        return Ok(load(&e, &c, Form::Chat));
    }
    let messages = messages(given, "messages")?;
    let tokens = move |codec: &Codec, variables: &Map<String, Value>, _: &mut Request| {
        codec.encode_chat(&messages, true, variables, SystemTime::now())
    };
    answer(e, c, Form::Chat, started, "messages", tokens).await
}

/// A request without a prompt only loads the model, or unloads it.
fn load(e: &Endpoint, c: &Common, form: Form) -> Response<Body> {
    let mut v = form.line(&c.name, "");
    v["done"] = json!(true);
    v["done_reason"] = json!("load");
    if c.keep.is_zero() {
        e.pool.unload(&c.model.name);
        v["done_reason"] = json!("unload");
    }
    json_response(&v)
}

async fn answer<F>(e: Arc<Endpoint>, c: Common, form: Form, started: Instant, field: &str, tokens: F) -> Answered
where
    F: FnOnce(&Codec, &Map<String, Value>, &mut Request) -> Result<Vec<u32>, GenerateError> + Send + 'static,
{
    let codec = Arc::clone(&generator(&c.model)?.codec);
    let (mut request, variables) = (c.request, c.variables);
    let checked = move || {
        let tokens = tokens(&codec, &variables, &mut request)?;
        request.check(&codec, &tokens).map(|()| Prompt { tokens, request: Arc::new(request) })
    };
    let (permit, prompt) = blocking(e.permit()?, checked).await.map_err(|e| e.at(field))?;
    let job = Job::open(&e, &c.model, prompt, c.keep).await?;
    let name = c.name;
    if c.stream {
        return Ok(stream::respond(Dialect::Ollama, e.config.heartbeat, |sink| async move {
            let _permit = permit;
            lines(job, form, &name, started, sink).await
        }));
    }
    let (codec, wanted) = (Arc::clone(&job.codec), job.logprobs());
    let a = job.collect().await?;
    let mut v = form.line(&name, &a.text);
    if wanted {
        v["logprobs"] = a.logprobs.iter().map(|l| entry(&codec, l)).collect();
    }
    end(&mut v, reason(a.finish), &a.usage, started);
    Ok(json_response(&v))
}

async fn lines(mut job: Job, form: Form, name: &str, started: Instant, sink: Sink) -> Result<(), Stop> {
    let codec = Arc::clone(&job.codec);
    let (mut running, _) = job.begin().await?;
    let mut finish = "length";
    while let Some(step) = running.next().await? {
        if !step.text.is_empty() || step.logprob.is_some() {
            let mut v = form.line(name, &step.text);
            if let Some(l) = &step.logprob {
                v["logprobs"] = json!([entry(&codec, l)]);
            }
            sink.send(&v).await?;
        }
        finish = step.finish.map_or(finish, reason);
    }
    let usage = running.usage;
    job.end(&usage);
    let mut v = form.line(name, "");
    end(&mut v, finish, &usage, started);
    Ok(sink.send(&v).await?)
}

/// What the last line of an answer has besides; times in nanoseconds.
fn end(v: &mut Value, reason: &str, u: &Usage, started: Instant) {
    v["done"] = json!(true);
    v["done_reason"] = json!(reason);
    v["total_duration"] = json!(nanos(started.elapsed()));
    v["load_duration"] = json!(nanos(u.load));
    v["prompt_eval_count"] = json!(u.prompt);
    v["prompt_eval_duration"] = json!(nanos(u.prefill));
    v["eval_count"] = json!(u.answer);
    v["eval_duration"] = json!(nanos(u.answering));
}
