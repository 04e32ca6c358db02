//! What chat and completion requests have in common.

use serde_json::{Value, json};

use super::super::error::ApiError;
use super::super::fields::Fields;
use super::super::job::{at_most, bounded};
use crate::generate::{Finish, Request, Sampling};

/// No effect on the answer here: bookkeeping, speed hints, and tool settings that matter only with tools.
const IGNORED: [&str; 15] = [
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prediction",
    "parallel_tool_calls",
    "request_id",
    "priority",
    "cache_salt",
    "spaces_between_special_tokens",
    "session_id",
    "keep_alive",
];

/// Most entries of `stop_token_ids` and of `logit_bias`: each token that is drawn goes through all of them.
const MOST_ENTRIES: usize = 1024;

/// The sampling fields of OpenAI and vLLM. Whatever is left in `f` after this and the caller's own is refused.
pub fn request(f: &mut Fields) -> Result<Request, ApiError> {
    let d = Sampling::default();
    let top_k = f.integer("top_k")?.unwrap_or(0);
    let sampling = Sampling {
        temperature: f.number("temperature")?.unwrap_or(d.temperature),
        top_p: f.number("top_p")?.unwrap_or(d.top_p),
        // vLLM writes -1 for "off".
        top_k: if top_k == -1 {
            0
        } else {
            usize::try_from(top_k).map_err(|_| ApiError::field("top_k", "must be -1, 0 or more"))?
        },
        min_p: f.number("min_p")?.unwrap_or(d.min_p),
        repetition_penalty: f.number("repetition_penalty")?.unwrap_or(d.repetition_penalty),
        repetition_window: None,
        presence_penalty: f.number("presence_penalty")?.unwrap_or(d.presence_penalty),
        frequency_penalty: f.number("frequency_penalty")?.unwrap_or(d.frequency_penalty),
        logit_bias: bias(f)?,
        seed: f.integer("seed")?.map(|s| s as u64),
    };
    if f.integer("n")?.is_some_and(|n| n != 1) {
        return Err(ApiError::unsupported("n", "one answer a request: send the request again for another"));
    }
    let stop_tokens = match f.take("stop_token_ids") {
        None => Vec::new(),
        Some(v) => {
            few("stop_token_ids", v.as_array().map_or(0, Vec::len))?;
            tokens(&v).ok_or_else(|| ApiError::field("stop_token_ids", "must be a list of token ids"))?
        }
    };
    f.ignore(&IGNORED);
    f.neutral(&[
        ("best_of", &[json!(1)]),
        ("use_beam_search", &[]),
        ("length_penalty", &[json!(1)]),
        ("early_stopping", &[]),
        ("min_tokens", &[json!(0)]),
        ("typical_p", &[json!(1)]),
        ("tfs_z", &[json!(1)]),
        ("skip_special_tokens", &[json!(true)]),
        ("include_stop_str_in_output", &[]),
        ("add_special_tokens", &[]),
        ("continue_final_message", &[]),
        ("prompt_logprobs", &[]),
        ("return_token_ids", &[]),
        ("response_format", &[json!({"type": "text"})]),
    ])?;
    Ok(Request {
        sampling,
        stop: f.strings("stop")?.unwrap_or_default(),
        stop_tokens,
        ignore_eos: f.boolean("ignore_eos")?.unwrap_or(false),
        ..Request::default()
    })
}

fn few(name: &str, entries: usize) -> Result<(), ApiError> {
    at_most(name, entries, MOST_ENTRIES, "entries")
}

fn bias(f: &mut Fields) -> Result<Vec<(u32, f64)>, ApiError> {
    let map = f.object("logit_bias")?.unwrap_or_default();
    few("logit_bias", map.len())?;
    let one = |(k, v): (&String, &Value)| Some((k.parse().ok()?, v.as_f64()?));
    let all: Option<Vec<_>> = map.iter().map(one).collect();
    all.ok_or_else(|| ApiError::field("logit_bias", "must map token ids to numbers"))
}

/// `stream` and `stream_options`: whether to stream, and whether to end with a usage chunk.
pub fn streaming(f: &mut Fields) -> Result<(bool, bool), ApiError> {
    let stream = f.boolean("stream")?.unwrap_or(false);
    let inner = |e: ApiError| e.inside("stream_options");
    let mut o = Fields::of(f.object("stream_options")?.unwrap_or_default());
    let usage = o.boolean("include_usage").map_err(inner)?.unwrap_or(false);
    o.ignore(&["include_obfuscation"]);
    o.neutral(&[("continuous_usage_stats", &[])]).map_err(inner)?;
    o.finish().map_err(inner)?;
    Ok((stream, usage))
}

/// A text, or the tokens of one.
pub enum Input {
    Text(String),
    Tokens(Vec<u32>),
}

/// A string, a list of strings, a list of tokens, or a list of lists of tokens.
pub fn inputs(name: &str, v: Value) -> Result<Vec<Input>, ApiError> {
    let bad =
        || ApiError::field(name, "must be a string, a list of strings, a list of tokens, or a list of such lists");
    let list = match v {
        Value::String(s) => return Ok(vec![Input::Text(s)]),
        Value::Array(a) if a.is_empty() => return Err(ApiError::field(name, "must not be empty")),
        Value::Array(a) => a,
        _ => return Err(bad()),
    };
    if list[0].is_number() {
        return Ok(vec![Input::Tokens(tokens(&Value::Array(list)).ok_or_else(bad)?)]);
    }
    bounded(name, list.len())?;
    let one = |v: Value| match v {
        Value::String(s) => Ok(Input::Text(s)),
        v => match tokens(&v) {
            Some(t) if t.is_empty() => Err(ApiError::field(name, "must not have an empty list of tokens")),
            Some(t) => Ok(Input::Tokens(t)),
            None => Err(bad()),
        },
    };
    list.into_iter().map(one).collect()
}

fn tokens(v: &Value) -> Option<Vec<u32>> {
    v.as_array()?.iter().map(|t| u32::try_from(t.as_u64()?).ok()).collect()
}

pub fn reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
    }
}
