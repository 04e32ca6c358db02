//! `/api/embed` and its predecessor `/api/embeddings`.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{self, State};
use serde_json::json;

use super::super::Endpoint;
use super::super::error::{ApiError, json_response};
use super::super::fields::Fields;
use super::super::job::{self, blocking, bounded, embedder, find};
use super::super::registry::Embedder;
use super::options::{keep_alive, request};
use super::{Answered, fields, nanos};

pub async fn embed(State(e): State<Arc<Endpoint>>, body: extract::Request) -> Answered {
    let started = Instant::now();
    let mut f = fields(&e, body).await?;
    let name = f.required("model")?;
    let texts = f.strings("input")?.ok_or_else(|| ApiError::field("input", "is required"))?;
    bounded("input", texts.len())?;
    let truncate = f.boolean("truncate")?.unwrap_or(true);
    let dimensions = f.count("dimensions")?;
    let (vectors, tokens) = vectors(&e, f, &name, texts, truncate, dimensions).await?;
    let vectors: Vec<Vec<f32>> = vectors.iter().map(|v| v.iter().map(|x| *x as f32).collect()).collect();
    Ok(json_response(&json!({
        "model": name, "embeddings": vectors, "total_duration": nanos(started.elapsed()), "load_duration": 0,
        "prompt_eval_count": tokens,
    })))
}

pub async fn embeddings(State(e): State<Arc<Endpoint>>, body: extract::Request) -> Answered {
    let mut f = fields(&e, body).await?;
    let name = f.required("model")?;
    let text = f.required("prompt")?;
    let (mut vectors, _) = vectors(&e, f, &name, vec![text], true, None).await?;
    Ok(json_response(&json!({"embedding": vectors.pop()})))
}

/// Vectors and the number of tokens that they were computed from.
async fn vectors(
    e: &Endpoint,
    mut f: Fields,
    name: &str,
    texts: Vec<String>,
    truncate: bool,
    dimensions: Option<usize>,
) -> Result<(Vec<Vec<f64>>, usize), ApiError> {
    // Read for their errors: no option changes a vector.
    request(&mut f)?;
    keep_alive(&mut f, e.config.keep_alive)?;
    f.finish()?;
    let model = find(e, name)?;
    let embedder = Arc::clone(embedder(&model)?);
    if dimensions.is_some_and(|d| d != 0 && d != embedder.width()) {
        let text = format!("the model's vectors have {} dimensions and are not shortened", embedder.width());
        return Err(ApiError::unsupported("dimensions", &text));
    }
    let by = Arc::clone(&embedder);
    let all = move || texts.iter().enumerate().map(|(i, t)| ids(&*by, i, t, truncate)).collect::<Result<Vec<_>, _>>();
    let (permit, tokens) = blocking(e.permit()?, all).await?;
    let vectors = job::embed(e, &*embedder, &tokens, &permit).await?;
    Ok((vectors, tokens.iter().map(Vec::len).sum()))
}

fn ids(by: &dyn Embedder, index: usize, text: &str, truncate: bool) -> Result<Vec<u32>, ApiError> {
    let mut tokens = by.tokens(text)?;
    let limit = by.limit();
    if tokens.len() > limit {
        if !truncate {
            return Err(crate::ClientError::TooLong { index, tokens: tokens.len(), limit }.into());
        }
        // The end mark stays last, as tokenizers truncate.
        if let Some(last) = tokens.pop() {
            tokens.truncate(limit.saturating_sub(1));
            tokens.push(last);
        }
    }
    Ok(tokens)
}
