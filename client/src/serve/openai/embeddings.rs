//! `/v1/embeddings`.

use std::sync::Arc;

use axum::extract::{self, State};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::super::Endpoint;
use super::super::error::{ApiError, json_response};
use super::super::job::{self, blocking, embedder, find};
use super::super::registry::Embedder;
use super::params::{Input, inputs};
use super::{Answered, fields};

pub async fn embed(State(e): State<Arc<Endpoint>>, body: extract::Request) -> Answered {
    let mut f = fields(&e, body).await?;
    let name = f.required("model")?;
    let given = inputs("input", f.take("input").ok_or_else(|| ApiError::field("input", "is required"))?)?;
    let base64 = match f.string("encoding_format")?.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(_) => return Err(ApiError::field("encoding_format", "must be float or base64")),
    };
    let dimensions = f.count("dimensions")?;
    f.ignore(&["user", "model_uid", "priority", "request_id"]);
    f.finish()?;

    let model = find(&e, &name)?;
    let embedder = Arc::clone(embedder(&model)?);
    if dimensions.is_some_and(|d| d != embedder.width()) {
        let text = format!("the model's vectors have {} dimensions and are not shortened", embedder.width());
        return Err(ApiError::unsupported("dimensions", &text));
    }
    let by = Arc::clone(&embedder);
    let tokens = move || given.into_iter().enumerate().map(|(i, g)| ids(&*by, i, g)).collect::<Result<Vec<_>, _>>();
    let (permit, tokens) = blocking(e.permit()?, tokens).await?;
    let vectors = job::embed(&e, &*embedder, &tokens, &permit).await?;
    let encode = |v: &[f64]| -> Value {
        if !base64 {
            return json!(v.iter().map(|x| *x as f32).collect::<Vec<f32>>());
        }
        let bytes: Vec<u8> = v.iter().flat_map(|x| (*x as f32).to_le_bytes()).collect();
        json!(STANDARD.encode(bytes))
    };
    let one = |(i, v): (usize, &Vec<f64>)| json!({"object": "embedding", "index": i, "embedding": encode(v)});
    let data: Vec<Value> = vectors.iter().enumerate().map(one).collect();
    let n: usize = tokens.iter().map(Vec::len).sum();
    Ok(json_response(&json!({
        "object": "list", "data": data, "model": name, "usage": {"prompt_tokens": n, "total_tokens": n},
    })))
}

fn ids(by: &dyn Embedder, index: usize, input: Input) -> Result<Vec<u32>, ApiError> {
    let tokens = match input {
        Input::Text(t) => by.tokens(&t)?,
        Input::Tokens(t) => t,
    };
    if let Some(t) = tokens.iter().find(|t| **t as usize >= by.vocab()) {
        return Err(ApiError::field("input", format!("item {index}: the model has no token {t}")));
    }
    if tokens.len() > by.limit() {
        let (tokens, limit) = (tokens.len(), by.limit());
        return Err(ApiError::from(crate::ClientError::TooLong { index, tokens, limit }).at("input"));
    }
    Ok(tokens)
}
