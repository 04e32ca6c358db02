//! OpenAI's interface, as its SDKs, lm-evaluation-harness, Dify, LocalAI's, vLLM's and Xinference's clients use it.

mod chat;
mod completions;
mod embeddings;
mod params;

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::http::Response;
use axum::routing::{get, post};
use serde_json::{Value, json};

use super::Endpoint;
use super::error::{ApiError, json_response};
use super::fields::Fields;
use super::job::{Usage, find};
use super::registry::Model;

pub use chat::messages;
pub use params::reason;

type Answered = Result<Response<Body>, ApiError>;

pub fn routes() -> Router<Arc<Endpoint>> {
    let mut r = Router::new()
        .route("/v1/cluster/auth", get(cluster_auth))
        .route("/v1/cluster/info", get(|| async { json_response(&json!([])) }));
    // LocalAI's clients leave the version out.
    for prefix in ["/v1", ""] {
        r = r
            .route(&format!("{prefix}/chat/completions"), post(chat::chat))
            .route(&format!("{prefix}/completions"), post(completions::complete))
            .route(&format!("{prefix}/embeddings"), post(embeddings::embed))
            .route(&format!("{prefix}/models"), get(models))
            .route(&format!("{prefix}/models/{{*id}}"), get(one));
    }
    for path in ["/health", "/healthz", "/livez", "/readyz"] {
        r = r.route(path, get(|| async { "ok\n" }));
    }
    r
}

/// Xinference's clients ask first whether they need a token.
async fn cluster_auth(State(e): State<Arc<Endpoint>>) -> Response<Body> {
    json_response(&json!({"auth": e.config.token.is_some()}))
}

async fn models(State(e): State<Arc<Endpoint>>) -> Response<Body> {
    let data: Vec<Value> = e.registry.all().map(|m| describe(m)).collect();
    json_response(&json!({"object": "list", "data": data}))
}

async fn one(State(e): State<Arc<Endpoint>>, id: Result<Path<String>, PathRejection>) -> Answered {
    let Path(id) = id.map_err(|_| ApiError::new(404, "a model's name is UTF-8"))?;
    Ok(json_response(&describe(&*find(&e, &id)?)))
}

/// OpenAI's fields, with vLLM's and Xinference's beside them.
fn describe(m: &Model) -> Value {
    let mut v = json!({
        "id": m.name, "object": "model", "created": m.about.created, "owned_by": "tacet",
        "root": m.name, "parent": null, "permission": [],
        "model_name": m.name, "model_format": "pytorch", "model_family": m.about.family,
        "quantization": m.about.quantisation, "replica": 1,
    });
    if let Some(t) = &m.text {
        let chats = t.codec.template().is_some();
        v["model_type"] = json!("LLM");
        v["model_ability"] = if chats { json!(["generate", "chat"]) } else { json!(["generate"]) };
        v["context_length"] = json!(t.codec.context());
        v["max_model_len"] = json!(t.codec.context());
    } else if let Some(e) = &m.embedder {
        v["model_type"] = json!("embedding");
        v["model_ability"] = json!(["embed"]);
        v["dimensions"] = json!(e.width());
        v["max_tokens"] = json!(e.limit());
        v["context_length"] = json!(e.limit());
        v["max_model_len"] = json!(e.limit());
    }
    v
}

async fn fields(endpoint: &Endpoint, request: Request) -> Result<Fields, ApiError> {
    Fields::read(request, endpoint.config.body_limit).await
}

/// `chatcmpl-` or `cmpl-` and 96 random bits.
fn id(prefix: &str) -> Result<String, ApiError> {
    let mut b = [0u8; 12];
    getrandom::fill(&mut b).map_err(|e| ApiError::new(500, format!("no randomness: {e}")))?;
    Ok(b.iter().fold(prefix.to_string(), |s, b| format!("{s}{b:02x}")))
}

fn usage(u: &Usage) -> Value {
    json!({
        "prompt_tokens": u.prompt, "completion_tokens": u.answer, "total_tokens": u.prompt + u.answer,
        "prompt_tokens_details": {"cached_tokens": u.reused},
    })
}
