//! What every request passes first, and where errors get their dialect.
//!
//! A web page can make a browser call loopback. Its `Origin` gives away a foreign page; a page that rebinds its own name
//! to 127.0.0.1 (DNS rebinding) sends that name as `Host`. Both are checked before anything else is read.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use axum::middleware::Next;
use subtle::ConstantTimeEq;

use super::error::{ApiError, Dialect};
use super::{Config, Endpoint};

/// Paths that tell nothing but that the endpoint is there.
const OPEN: [&str; 6] = ["/", "/health", "/healthz", "/livez", "/readyz", "/v1/cluster/auth"];

pub async fn guard(State(endpoint): State<Arc<Endpoint>>, request: Request<Body>, next: Next) -> Response<Body> {
    let dialect = Dialect::of(request.uri().path());
    let origin = request.headers().get(header::ORIGIN).cloned();
    let mut response = match admit(&endpoint.config, &request) {
        Err(e) => e.render(dialect),
        Ok(()) if origin.is_some() && request.method() == Method::OPTIONS => preflight(request.headers()),
        Ok(()) => {
            endpoint.count(|c| &c.requests, 1);
            let mut r = next.run(request).await;
            if let Some(e) = r.extensions_mut().remove::<ApiError>() {
                r = e.render(dialect);
            }
            r
        }
    };
    let status = response.status();
    if status.is_client_error() || status.is_server_error() {
        endpoint.count(|c| &c.failed, 1);
    }
    if let Some(o) = origin.filter(|o| allowed_origin(&endpoint.config, o)) {
        response.headers_mut().insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, o);
        response.headers_mut().insert(header::VARY, HeaderValue::from_static("origin"));
    }
    response
}

fn admit(config: &Config, request: &Request<Body>) -> Result<(), ApiError> {
    let named = request.headers().get(header::HOST).and_then(|h| h.to_str().ok());
    // A request line with a full address overrides the header (RFC 9112, 3.2.2).
    let host = request.uri().authority().map(|a| a.as_str()).or(named);
    if !host.is_some_and(|h| allowed_host(config, h)) {
        return Err(ApiError::new(
            403,
            "this Host is not served: call localhost, or add the name to the endpoint's hosts",
        ));
    }
    if request.headers().get(header::ORIGIN).is_some_and(|o| !allowed_origin(config, o)) {
        return Err(ApiError::new(403, "web pages of this Origin may not call: add it to the endpoint's origins"));
    }
    let open = OPEN.contains(&request.uri().path()) || request.method() == Method::OPTIONS;
    match &config.token {
        Some(token) if !open && !bearer(request.headers(), token) => Err(ApiError::unauthorised()),
        _ => Ok(()),
    }
}

fn bearer(headers: &HeaderMap, token: &str) -> bool {
    let Some(given) = headers.get(header::AUTHORIZATION).and_then(|v| v.to_str().ok()) else { return false };
    let Some((scheme, given)) = given.split_once(' ') else { return false };
    scheme.eq_ignore_ascii_case("bearer") && bool::from(given.trim().as_bytes().ct_eq(token.as_bytes()))
}

/// Name without port.
fn name(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((n, port)) if port.bytes().all(|b| b.is_ascii_digit()) => n,
        _ => host,
    }
}

fn allowed_host(config: &Config, host: &str) -> bool {
    let own = ["localhost", "127.0.0.1", "[::1]"];
    let own = own.into_iter().chain(config.hosts.iter().map(String::as_str));
    own.into_iter().any(|h| name(host).eq_ignore_ascii_case(h))
}

fn allowed_origin(config: &Config, origin: &HeaderValue) -> bool {
    let Ok(origin) = origin.to_str() else { return false };
    let local = origin.strip_prefix("http://").or(origin.strip_prefix("https://"));
    let local = local.is_some_and(|o| ["localhost", "127.0.0.1", "[::1]"].contains(&name(o)));
    local || config.origins.iter().any(|o| o == origin)
}

fn preflight(asked: &HeaderMap) -> Response<Body> {
    let mut r = Response::new(Body::empty());
    *r.status_mut() = StatusCode::NO_CONTENT;
    let h = r.headers_mut();
    h.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, HEAD, POST, OPTIONS"));
    if let Some(names) = asked.get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
        h.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, names.clone());
    }
    h.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
    r
}
