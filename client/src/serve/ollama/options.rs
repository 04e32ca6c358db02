//! `options` and `keep_alive`.

use std::time::Duration;

use serde_json::{Value, json};

use super::super::error::ApiError;
use super::super::fields::Fields;
use crate::generate::{Request, Sampling};

/// Settings of Ollama's own engine, without effect on the answer here. `num_ctx` is one: the model's context is fixed.
const IGNORED: [&str; 14] = [
    "num_ctx",
    "num_keep",
    "num_batch",
    "num_gpu",
    "main_gpu",
    "num_thread",
    "numa",
    "low_vram",
    "f16_kv",
    "vocab_only",
    "use_mmap",
    "use_mlock",
    "logits_all",
    "penalize_newline",
];

/// Sampling by Ollama's names and defaults (`DefaultOptions` in its api/types.go).
pub fn request(f: &mut Fields) -> Result<Request, ApiError> {
    let mut o = Fields::of(f.object("options")?.unwrap_or_default());
    options(&mut o).and_then(|r| o.finish().map(|()| r)).map_err(|e| e.inside("options"))
}

fn options(o: &mut Fields) -> Result<Request, ApiError> {
    let seed = o.integer("seed")?.filter(|s| *s >= 0);
    let window = o.integer("repeat_last_n")?.unwrap_or(64);
    let predict = o.integer("num_predict")?.unwrap_or(-1);
    let sampling = Sampling {
        temperature: o.number("temperature")?.unwrap_or(0.8),
        top_p: o.number("top_p")?.unwrap_or(0.9),
        top_k: o.count("top_k")?.unwrap_or(40),
        min_p: o.number("min_p")?.unwrap_or(0.0),
        repetition_penalty: o.number("repeat_penalty")?.unwrap_or(1.1),
        // -1 is the whole context.
        repetition_window: usize::try_from(window).ok(),
        presence_penalty: o.number("presence_penalty")?.unwrap_or(0.0),
        frequency_penalty: o.number("frequency_penalty")?.unwrap_or(0.0),
        logit_bias: Vec::new(),
        seed: seed.map(|s| s as u64),
    };
    o.ignore(&IGNORED);
    o.neutral(&[
        ("mirostat", &[json!(0)]),
        ("mirostat_tau", &[json!(5)]),
        ("mirostat_eta", &[json!(0.1)]),
        ("tfs_z", &[json!(1)]),
        ("typical_p", &[json!(1)]),
    ])?;
    Ok(Request {
        sampling,
        // -1 and -2: until the model or its context ends.
        max_tokens: usize::try_from(predict).ok().filter(|n| *n > 0),
        stop: o.strings("stop")?.unwrap_or_default(),
        ..Request::default()
    })
}

/// Seconds, or Go's notation (`1h30m`, `500ms`); negative is for ever.
pub fn keep_alive(f: &mut Fields, default: Duration) -> Result<Duration, ApiError> {
    let seconds = match f.take("keep_alive") {
        None => return Ok(default),
        Some(Value::Number(n)) => n.as_f64(),
        Some(Value::String(s)) => s.parse::<f64>().ok().or_else(|| go_duration(&s)),
        Some(_) => None,
    };
    match seconds {
        Some(s) if s.is_finite() && s >= 0.0 => Ok(Duration::try_from_secs_f64(s).unwrap_or(Duration::MAX)),
        Some(s) if s < 0.0 => Ok(Duration::MAX),
        _ => Err(ApiError::field("keep_alive", "must be a number of seconds or a duration such as \"5m\"")),
    }
}

fn go_duration(text: &str) -> Option<f64> {
    let (sign, mut rest) = text.strip_prefix('-').map_or((1.0, text), |t| (-1.0, t));
    let mut total = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| c != '.' && !c.is_ascii_digit())?;
        let n: f64 = rest[..digits].parse().ok()?;
        let unit = &rest[digits..];
        let end = unit.find(|c: char| c == '.' || c.is_ascii_digit()).unwrap_or(unit.len());
        total += n * match &unit[..end] {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        rest = &unit[end..];
    }
    (!text.is_empty()).then_some(sign * total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keep_alive_takes_seconds_and_go_durations() {
        let read = |v: Value| {
            let mut f = Fields::of([("keep_alive".to_string(), v)].into_iter().collect());
            keep_alive(&mut f, Duration::from_secs(7))
        };
        for (v, s) in [
            (json!(null), 7.0),
            (json!(0), 0.0),
            (json!(300), 300.0),
            (json!("300"), 300.0),
            (json!("1h30m"), 5400.0),
            (json!("1.5s"), 1.5),
            (json!("500ms"), 0.5),
        ] {
            assert_eq!(read(v.clone()).unwrap().as_secs_f64(), s, "{v}");
        }
        assert_eq!(read(json!(-1)).unwrap(), Duration::MAX);
        assert_eq!(read(json!("-5m")).unwrap(), Duration::MAX);
        assert_eq!(read(json!(1e300)).unwrap(), Duration::MAX);
        for bad in [json!("5x"), json!(""), json!("m"), json!("é"), json!([]), json!("5é"), json!("inf"), json!("nan")]
        {
            assert!(read(bad.clone()).is_err(), "{bad}");
        }
    }
}
