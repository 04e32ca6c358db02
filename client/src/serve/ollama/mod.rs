//! Ollama's interface, for its own clients and the many programs that speak it.

mod embed;
mod manage;
mod options;
mod text;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::Response;
use axum::routing::{get, post};
use serde_json::json;

use super::Endpoint;
use super::error::{ApiError, json_response};
use super::fields::Fields;
use crate::generate::civil;

/// The release of Ollama whose interface this follows; clients look whether it is new enough for them.
const VERSION: &str = "0.12.11";

type Answered = Result<Response<Body>, ApiError>;

pub fn routes() -> Router<Arc<Endpoint>> {
    Router::new()
        .route("/", get(|| async { "Ollama is running" }))
        .route("/api/version", get(|| async { json_response(&json!({"version": VERSION})) }))
        .route("/api/tags", get(manage::tags))
        .route("/api/ps", get(manage::ps))
        .route("/api/show", post(manage::show))
        .route("/api/pull", post(manage::pull))
        .route("/api/generate", post(text::generate))
        .route("/api/chat", post(text::chat))
        .route("/api/embed", post(embed::embed))
        .route("/api/embeddings", post(embed::embeddings))
}

async fn fields(endpoint: &Endpoint, request: Request) -> Result<Fields, ApiError> {
    Fields::read(request, endpoint.config.body_limit).await
}

/// RFC 3339 in UTC, to the microsecond.
fn time(t: SystemTime) -> String {
    let (y, m, d, s) = civil(t);
    let us = t.duration_since(UNIX_EPOCH).map_or(0, |d| d.subsec_micros());
    format!("{y:04}-{m:02}-{d:02}T{:02}:{:02}:{:02}.{us:06}Z", s / 3600, s / 60 % 60, s % 60)
}

fn nanos(d: Duration) -> u64 {
    u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)
}
