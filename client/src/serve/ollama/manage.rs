//! Which models there are: `/api/tags`, `/api/show`, `/api/ps`, `/api/pull`.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::body::Body;
use axum::extract::{self, State};
use axum::http::Response;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::super::Endpoint;
use super::super::error::{ApiError, Dialect, json_response};
use super::super::fields::Fields;
use super::super::job::find;
use super::super::registry::{Model, Progress};
use super::super::stream::{self, Sink, Stop};
use super::{Answered, fields, time};

/// What Ollama's clients show as "forever".
const FOREVER: Duration = Duration::from_secs(100 * 365 * 86_400);

/// Ollama's names always have a tag.
fn tagged(name: &str) -> String {
    if name.contains(':') { name.into() } else { format!("{name}:latest") }
}

fn details(m: &Model) -> Value {
    json!({
        "parent_model": "", "format": "safetensors", "family": m.about.family, "families": [m.about.family],
        "parameter_size": m.about.parameters, "quantization_level": m.about.quantisation,
    })
}

fn modified(m: &Model) -> String {
    time(UNIX_EPOCH + Duration::from_secs(m.about.created))
}

fn listed(m: &Model) -> Value {
    let name = tagged(&m.name);
    json!({"name": name, "model": name, "size": m.about.bytes, "digest": m.about.digest, "details": details(m)})
}

pub async fn tags(State(e): State<Arc<Endpoint>>) -> Response<Body> {
    let one = |m: &Arc<Model>| {
        let mut v = listed(m);
        v["modified_at"] = json!(modified(m));
        v
    };
    json_response(&json!({"models": e.registry.all().map(one).collect::<Vec<Value>>()}))
}

/// All of them: a model stays loaded as long as the endpoint runs.
pub async fn ps(State(e): State<Arc<Endpoint>>) -> Response<Body> {
    let end = time(SystemTime::now() + FOREVER);
    let one = |m: &Arc<Model>| {
        let mut v = listed(m);
        v["expires_at"] = json!(end);
        v["size_vram"] = json!(0);
        v["context_length"] = json!(context(m));
        v
    };
    json_response(&json!({"models": e.registry.all().map(one).collect::<Vec<Value>>()}))
}

/// Most tokens of a text, or of a prompt and its answer.
fn context(m: &Model) -> Option<usize> {
    m.text.as_ref().map(|t| t.codec.context()).or_else(|| m.embedder.as_ref().map(|e| e.limit()))
}

/// `model`, or `name` as it was called before.
fn name(f: &mut Fields) -> Result<String, ApiError> {
    let old = f.string("name")?;
    f.string("model")?.or(old).ok_or_else(|| ApiError::field("model", "is required"))
}

pub async fn show(State(e): State<Arc<Endpoint>>, body: extract::Request) -> Answered {
    let mut f = fields(&e, body).await?;
    let m = find(&e, &name(&mut f)?)?;
    f.ignore(&["verbose", "options"]);
    f.neutral(&[("system", &[]), ("template", &[])])?;
    f.finish()?;
    let family = &m.about.family;
    let mut info = json!({"general.architecture": family, "general.basename": m.name});
    let mut capabilities = Vec::new();
    info[format!("{family}.context_length")] = json!(context(&m));
    if m.text.is_some() {
        capabilities.push("completion");
    }
    if let Some(e) = &m.embedder {
        info[format!("{family}.embedding_length")] = json!(e.width());
        capabilities.push("embedding");
    }
    let template = m.text.as_ref().and_then(|t| t.codec.template()).map_or("", |t| t.source());
    Ok(json_response(&json!({
        "modelfile": "", "parameters": "", "license": "", "template": template, "details": details(&m), "model_info": info,
        "capabilities": capabilities, "modified_at": modified(&m),
    })))
}

pub async fn pull(State(e): State<Arc<Endpoint>>, body: extract::Request) -> Answered {
    let mut f = fields(&e, body).await?;
    let (name, streams) = (name(&mut f)?, f.boolean("stream")?.unwrap_or(true));
    f.ignore(&["insecure", "username", "password"]);
    f.finish()?;
    let permit = e.permit()?;
    if streams {
        let period = e.config.heartbeat;
        return Ok(stream::respond(Dialect::Ollama, period, |sink| async move {
            let _permit = permit;
            sink.send(&json!({"status": "pulling manifest"})).await?;
            fetch(&e, &name, Some(&sink)).await?;
            Ok(sink.send(&json!({"status": "success"})).await?)
        }));
    }
    match fetch(&e, &name, None).await {
        Ok(()) => Ok(json_response(&json!({"status": "success"}))),
        Err(Stop::Failed(e)) => Err(e),
        Err(Stop::Gone) => Err(ApiError::new(500, "the pull was interrupted")),
    }
}

/// Fetches a model that is not served, telling how far it is and in the end how to serve it.
async fn fetch(e: &Endpoint, name: &str, sink: Option<&Sink>) -> Result<(), Stop> {
    if e.registry.find(name).is_some() {
        return Ok(());
    }
    let puller = e.registry.puller.as_ref().ok_or_else(|| ApiError::no_model(name))?;
    let (tx, mut rx) = mpsc::channel::<Progress>(16);
    let pulled = async { Ok(puller.pull(name.strip_suffix(":latest").unwrap_or(name), tx).await?) };
    let told = async {
        while let Some(p) = rx.recv().await {
            let Some(sink) = sink else { continue };
            // As Ollama's own says it: the beginning of the digest.
            let short = p.digest.strip_prefix("sha256:").map(|hex| hex.chars().take(12).collect::<String>());
            let status = format!("pulling {}", short.as_ref().unwrap_or(&p.digest));
            let line = json!({"status": status, "digest": p.digest, "total": p.total, "completed": p.completed});
            sink.send(&line).await?;
        }
        Ok::<(), Stop>(())
    };
    let (next, ()) = tokio::try_join!(pulled, told)?;
    if let Some(sink) = sink {
        sink.send(&json!({"status": next})).await?;
    }
    Ok(())
}
