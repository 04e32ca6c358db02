//! One error, two spellings: OpenAI's object and Ollama's string.

use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use axum::response::IntoResponse;
use serde_json::{Value, json};

use super::registry::PullError;
use crate::ClientError;
use crate::generate::GenerateError;

/// Which interface a request speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    OpenAi,
    Ollama,
}

impl Dialect {
    pub fn of(path: &str) -> Dialect {
        if path.starts_with("/api/") { Dialect::Ollama } else { Dialect::OpenAi }
    }
}

/// An error as a client is told.
#[derive(Clone, Debug)]
pub struct ApiError {
    status: StatusCode,
    message: String,
    param: Option<String>,
    code: Option<&'static str>,
    /// Shares of the request were sent: a client's automatic retry would send them again.
    sent: bool,
}

impl ApiError {
    pub fn new(status: u16, message: impl Into<String>) -> ApiError {
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        ApiError { status, message: message.into(), param: None, code: None, sent: false }
    }

    /// A field that cannot be used, by name.
    pub fn field(name: &str, reason: impl std::fmt::Display) -> ApiError {
        ApiError { param: Some(name.into()), ..ApiError::new(400, format!("{name}: {reason}")) }
    }

    /// A field that would change the answer in a way that is not supported.
    pub fn unsupported(name: &str, reason: &str) -> ApiError {
        ApiError { code: Some("unsupported_parameter"), ..ApiError::field(name, reason) }
    }

    pub fn no_model(name: &str) -> ApiError {
        let message = format!("model {name:?} not found: /v1/models and /api/tags list those that are");
        ApiError { param: Some("model".into()), code: Some("model_not_found"), ..ApiError::new(404, message) }
    }

    pub fn busy() -> ApiError {
        let message = "as many requests run as the endpoint allows: try again when one has ended";
        ApiError { code: Some("rate_limit_exceeded"), ..ApiError::new(429, message) }
    }

    pub fn unauthorised() -> ApiError {
        let message = "missing or wrong bearer token: send \"Authorization: Bearer TOKEN\"";
        ApiError { code: Some("invalid_api_key"), ..ApiError::new(401, message) }
    }

    /// With the field that the error is about, where the source does not know it.
    pub fn at(self, name: &str) -> ApiError {
        ApiError { param: self.param.or(Some(name.into())), ..self }
    }

    /// The same for a field inside another: `messages[2]`.
    pub fn inside(self, outer: &str) -> ApiError {
        let param = self.param.map_or(outer.to_string(), |p| format!("{outer}.{p}"));
        ApiError { message: format!("{outer}: {}", self.message), param: Some(param), ..self }
    }

    /// The body in a dialect.
    pub fn body(&self, dialect: Dialect) -> Value {
        match dialect {
            Dialect::Ollama => json!({"error": self.message}),
            Dialect::OpenAi => {
                let kind = match self.status.as_u16() {
                    401 | 403 => "authentication_error",
                    429 => "rate_limit_error",
                    500.. => "server_error",
                    _ => "invalid_request_error",
                };
                json!({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})
            }
        }
    }

    pub fn render(&self, dialect: Dialect) -> Response<Body> {
        let mut r = json_response(&self.body(dialect));
        *r.status_mut() = self.status;
        let h = r.headers_mut();
        if self.sent {
            h.insert("x-should-retry", HeaderValue::from_static("false"));
        }
        match self.status {
            StatusCode::TOO_MANY_REQUESTS => _ = h.insert(header::RETRY_AFTER, HeaderValue::from_static("1")),
            StatusCode::UNAUTHORIZED => _ = h.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer")),
            _ => {}
        }
        r
    }
}

/// Carries the error to the guard, which knows the dialect.
impl IntoResponse for ApiError {
    fn into_response(self) -> Response<Body> {
        let mut r = Response::new(Body::empty());
        *r.status_mut() = self.status;
        r.extensions_mut().insert(self);
        r
    }
}

impl From<GenerateError> for ApiError {
    fn from(e: GenerateError) -> ApiError {
        let text = e.to_string();
        match e {
            GenerateError::Parameter { name, .. } => ApiError { param: Some(name.into()), ..ApiError::new(400, text) },
            GenerateError::TooLong { .. } => {
                ApiError { code: Some("context_length_exceeded"), ..ApiError::new(400, text) }
            }
            GenerateError::Template(_) => ApiError::new(400, text),
            GenerateError::Tokenizer(_) => ApiError::new(500, text),
            GenerateError::Logits(_) => ApiError { sent: true, ..ApiError::new(502, text) },
            GenerateError::Client(e) => e.into(),
        }
    }
}

impl From<ClientError> for ApiError {
    fn from(e: ClientError) -> ApiError {
        let (status, sent) = match &e {
            ClientError::TooLong { .. } => (400, false),
            ClientError::Unreachable { .. } => (503, false),
            ClientError::Refused { .. } | ClientError::Failed { .. } => (502, true),
            ClientError::Deadline(_) => (504, true),
            _ => (500, false),
        };
        let code = (status == 400).then_some("context_length_exceeded");
        ApiError { sent, code, ..ApiError::new(status, e.to_string()) }
    }
}

impl From<PullError> for ApiError {
    fn from(e: PullError) -> ApiError {
        let status = match &e {
            PullError::Name(_) => 400,
            PullError::Absent(_) => 404,
            PullError::Failed(_) => 502,
        };
        ApiError::new(status, e.to_string()).at("model")
    }
}

/// 200 with a JSON body.
pub fn json_response(v: &Value) -> Response<Body> {
    let mut r = Response::new(Body::from(v.to_string()));
    r.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    r
}
