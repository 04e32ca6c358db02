//! A request's JSON object, read field by field, so that every error names its field and nothing is overlooked.

use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, header};
use http_body_util::BodyExt;
use serde_json::{Map, Value};

use super::error::ApiError;

/// A client must have sent its whole body by then.
const BODY_TIME: Duration = Duration::from_secs(60);
/// An overlong body is read and dropped up to here, so that its sender sees the answer and not a reset.
const DRAINED: usize = 64 << 20;

/// The fields not read yet.
pub struct Fields(Map<String, Value>);

impl Fields {
    /// Reads the body.
    ///
    /// # Errors
    /// 413, 408, or 400 for what is not a JSON object.
    pub async fn read(request: Request<Body>, limit: usize) -> Result<Fields, ApiError> {
        let bytes = tokio::time::timeout(BODY_TIME, body(request, limit));
        let bytes = bytes.await.map_err(|_| ApiError::new(408, "the body did not arrive in time"))??;
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(map)) => Ok(Fields(map)),
            Ok(_) => Err(ApiError::new(400, "the body must be a JSON object")),
            // serde's text has line and column, and at most a type or field name of the body.
            Err(e) => Err(ApiError::new(400, format!("the body is not valid JSON: {e}"))),
        }
    }

    /// Of a nested object.
    pub fn of(map: Map<String, Value>) -> Fields {
        Fields(map)
    }

    /// A field as it is; null counts as absent.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name).filter(|v| !v.is_null())
    }

    pub fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(_) => Err(ApiError::field(name, "must be a string")),
        }
    }

    pub fn required(&mut self, name: &str) -> Result<String, ApiError> {
        self.string(name)?.ok_or_else(|| ApiError::field(name, "is required"))
    }

    pub fn boolean(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(b)),
            Some(_) => Err(ApiError::field(name, "must be true or false")),
        }
    }

    pub fn number(&mut self, name: &str) -> Result<Option<f64>, ApiError> {
        let Some(v) = self.take(name) else { return Ok(None) };
        v.as_f64().map(Some).ok_or_else(|| ApiError::field(name, "must be a number"))
    }

    /// A whole number; clients that write 5.0 mean 5.
    pub fn integer(&mut self, name: &str) -> Result<Option<i64>, ApiError> {
        let Some(v) = self.take(name) else { return Ok(None) };
        let whole = |f: f64| (f.fract() == 0.0 && f.abs() < 9e15).then_some(f as i64);
        let i = v.as_i64().or_else(|| v.as_f64().and_then(whole));
        i.map(Some).ok_or_else(|| ApiError::field(name, "must be a whole number"))
    }

    /// A whole number of at least zero.
    pub fn count(&mut self, name: &str) -> Result<Option<usize>, ApiError> {
        let n = self.integer(name)?;
        n.map(|n| usize::try_from(n).map_err(|_| ApiError::field(name, "must not be negative"))).transpose()
    }

    pub fn object(&mut self, name: &str) -> Result<Option<Map<String, Value>>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Object(m)) => Ok(Some(m)),
            Some(_) => Err(ApiError::field(name, "must be an object")),
        }
    }

    /// A string or a list of strings.
    pub fn strings(&mut self, name: &str) -> Result<Option<Vec<String>>, ApiError> {
        let bad = || ApiError::field(name, "must be a string or a list of strings");
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(vec![s])),
            Some(Value::Array(a)) => {
                let all = a.into_iter().map(|v| v.as_str().map(str::to_string).ok_or_else(bad));
                all.collect::<Result<_, _>>().map(Some)
            }
            Some(_) => Err(bad()),
        }
    }

    /// Drops fields that have no effect on the answer.
    pub fn ignore(&mut self, names: &[&str]) {
        names.iter().for_each(|n| _ = self.0.remove(*n));
    }

    /// Drops fields whose value has no effect, and refuses the others: each name with the values that change nothing.
    ///
    /// # Errors
    /// 400 that names the first one.
    pub fn neutral(&mut self, names: &[(&str, &[Value])]) -> Result<(), ApiError> {
        for (name, values) in names {
            let Some(v) = self.take(name) else { continue };
            let empty = v.as_array().is_some_and(Vec::is_empty) || v == "" || v == false;
            let same = |w: &Value| *w == v || (w.is_number() && w.as_f64() == v.as_f64());
            if !empty && !values.iter().any(same) {
                return Err(ApiError::unsupported(name, "is not supported by this endpoint: leave it out"));
            }
        }
        Ok(())
    }

    /// # Errors
    /// 400 that names a field which nobody read.
    pub fn finish(self) -> Result<(), ApiError> {
        match self.0.iter().find(|(_, v)| !v.is_null()) {
            None => Ok(()),
            Some((name, _)) => {
                let name: String = name.chars().take(64).collect();
                Err(ApiError::unsupported(&name, "is not known to this endpoint: leave it out"))
            }
        }
    }
}

async fn body(request: Request<Body>, limit: usize) -> Result<Vec<u8>, ApiError> {
    let long = request.headers().get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<usize>().ok());
    let too_large = || ApiError::new(413, format!("the body is longer than {limit} bytes"));
    if long.is_some_and(|l| l > DRAINED) {
        return Err(too_large());
    }
    let mut body = request.into_body();
    let (mut out, mut total) = (Vec::new(), 0);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| ApiError::new(400, "the body ended early"))?;
        let Ok(data) = frame.into_data() else { continue };
        total += data.len();
        match total {
            t if t <= limit => out.extend_from_slice(&data),
            t if t <= DRAINED => out = Vec::new(),
            _ => return Err(too_large()),
        }
    }
    if total > limit { Err(too_large()) } else { Ok(out) }
}
