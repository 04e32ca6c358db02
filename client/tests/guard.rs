//! Who may call the endpoint, and that nothing a client sends brings it down.

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use common::endpoint::{Served, serve};
use common::http::{Reply, post_raw, send};
use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde_json::{Value, json};
use tacet_client::serve::{Config, Endpoint, Registry};
use tokio::net::TcpListener;
use zeroize::Zeroizing;

async fn get(s: &Served, path: &str, headers: &str) -> Reply {
    send(s.addr, &format!("GET {path} HTTP/1.1\r\nconnection: close\r\n{headers}\r\n"), b"").await
}

#[tokio::test]
async fn only_loopback_and_configured_names_are_served() {
    let s = serve(Config { hosts: vec!["box.lan".into()], ..Config::default() }).await;
    for host in ["localhost", "LOCALHOST:11434", "127.0.0.1:80", "[::1]:9", "[::1]", "box.lan:1"] {
        assert_eq!(get(&s, "/v1/models", &format!("host: {host}\r\n")).await.status, 200, "{host}");
    }
    for host in [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example:80",
        "evil.example:localhost",
        "",
        "10.0.0.1",
    ] {
        let r = get(&s, "/api/tags", &format!("host: {host}\r\n")).await;
        assert_eq!(r.status, 403, "{host}");
        assert!(r.json()["error"].is_string());
    }
    assert_eq!(get(&s, "/v1/models", "").await.status, 403);
    // A full address in the request line counts, whatever the header says.
    assert_eq!(get(&s, "http://evil.example/v1/models", "host: localhost\r\n").await.status, 403);
}

#[tokio::test]
async fn foreign_web_pages_are_refused_and_own_ones_get_their_headers() {
    let s = serve(Config { origins: vec!["https://chat.example".into()], ..Config::default() }).await;
    for origin in ["http://localhost:3000", "https://127.0.0.1", "http://[::1]:8", "https://chat.example"] {
        let r = get(&s, "/v1/models", &format!("host: localhost\r\norigin: {origin}\r\n")).await;
        assert_eq!((r.status, r.header("access-control-allow-origin")), (200, Some(origin)));
        let ask = format!("host: localhost\r\norigin: {origin}\r\naccess-control-request-headers: authorization\r\n");
        let r = send(s.addr, &format!("OPTIONS /v1/chat/completions HTTP/1.1\r\nconnection: close\r\n{ask}\r\n"), b"")
            .await;
        assert_eq!((r.status, r.header("access-control-allow-headers")), (204, Some("authorization")));
    }
    for origin in
        ["https://evil.example", "null", "http://localhost.evil.example", "https://chat.example.evil", "file://"]
    {
        let r = get(&s, "/v1/models", &format!("host: localhost\r\norigin: {origin}\r\n")).await;
        assert_eq!((r.status, r.header("access-control-allow-origin")), (403, None), "{origin}");
    }
}

#[tokio::test]
async fn a_token_is_asked_for_in_both_dialects() {
    let s = serve(Config { token: Some(Zeroizing::new("s3cret".into())), ..Config::default() }).await;
    for path in ["/v1/models", "/api/tags", "/nothing", "/api/version"] {
        for header in [
            "",
            "authorization: Bearer s3cre\r\n",
            "authorization: Bearer s3cret2\r\n",
            "authorization: s3cret\r\n",
            "authorization: Basic s3cret\r\n",
            "authorization: Bearer \r\n",
        ] {
            let r = get(&s, path, &format!("host: localhost\r\n{header}")).await;
            assert_eq!((r.status, r.header("www-authenticate")), (401, Some("Bearer")), "{path} {header}");
            assert!(!r.text().contains("s3cret"));
        }
    }
    assert_eq!(get(&s, "/v1/models", "host: localhost\r\nauthorization: bearer s3cret\r\n").await.status, 200);
    assert_eq!(get(&s, "/v1/cluster/auth", "host: localhost\r\n").await.json()["auth"], true);
    assert_eq!(get(&s, "/", "host: localhost\r\n").await.status, 200);
    let counters = s.endpoint.counters();
    assert_eq!((counters.failed.load(SeqCst), counters.requests.load(SeqCst)), (24, 3));
}

#[tokio::test]
async fn without_a_token_it_listens_on_loopback_only() {
    let endpoint = Endpoint::new(Config::default(), Registry::default());
    let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
    let e = Arc::clone(&endpoint).serve(listener).await.unwrap_err();
    assert!(e.to_string().contains("token"));
}

#[tokio::test]
async fn what_is_not_http_is_dropped_and_others_go_on() {
    let s = serve(Config::default()).await;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    for bytes in [&b"\x16\x03\x01\x02\x00"[..], b"GET / HTTP/9\r\n\r\n", &[b'A'; 200_000]] {
        let mut c = tokio::net::TcpStream::connect(s.addr).await.unwrap();
        let _ = c.write_all(bytes).await;
        let _ = c.shutdown().await;
        let mut out = Vec::new();
        let _ = c.read_to_end(&mut out).await;
        assert!(out.is_empty() || out.starts_with(b"HTTP/1.1 4"), "{:?}", String::from_utf8_lossy(&out));
    }
    assert_eq!(get(&s, "/v1/models", "host: localhost\r\n").await.status, 200);
}

/// Valid requests with one value replaced, one field added, or cut anywhere: answered or refused, never 5xx.
#[tokio::test]
async fn damaged_requests_are_answered_or_refused() {
    let s = serve(Config::default()).await;
    let messages = json!([{"role": "user", "content": [{"type": "text", "text": "a"}], "name": "n"}]);
    let options = json!({"temperature": 0.5, "num_predict": 2, "stop": ["x"], "seed": 1});
    let routes = [
        (
            "/v1/chat/completions",
            json!({"model": "toy", "messages": messages, "max_tokens": 2, "stream": false, "stop": "a",
            "logit_bias": {"1": 1}, "stream_options": {}, "temperature": 1, "top_k": 3, "logprobs": true, "seed": 2}),
        ),
        ("/v1/completions", json!({"model": "toy", "prompt": [[1, 2]], "max_tokens": 2, "logprobs": 1, "echo": true})),
        (
            "/v1/embeddings",
            json!({"model": "counts", "input": ["a", "b"], "encoding_format": "float", "dimensions": 4}),
        ),
        ("/api/chat", json!({"model": "toy", "messages": [{"role": "user", "content": "a"}], "options": options})),
        (
            "/api/generate",
            json!({"model": "toy", "prompt": "a", "options": options, "keep_alive": "1s", "stream": true}),
        ),
        ("/api/embed", json!({"model": "counts", "input": "a", "truncate": true})),
        ("/api/show", json!({"model": "toy"})),
        ("/api/pull", json!({"model": "toy", "stream": false})),
    ];
    let values = [
        json!(null),
        json!(true),
        json!(-1),
        json!(0),
        json!(1e308),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(0.1),
        json!(""),
        json!("\u{0}\u{FFFD}\u{202E}"),
        json!([]),
        json!({}),
        json!([[[]]]),
        json!([null]),
        json!({"": {"": null}}),
        json!("x".repeat(3000)),
        json!(vec![1; 300]),
        json!([4294967296u64]),
        json!([-1]),
        json!(["a", 1]),
    ];
    let mut rng = ChaCha20Rng::from_seed([3; 32]);
    let mut any = |n: usize| rng.next_u64() as usize % n;
    for _ in 0..1500 {
        let (path, base) = &routes[any(routes.len())];
        let mut body = base.clone();
        damage(&mut body, &values, &mut any);
        let mut bytes = body.to_string().into_bytes();
        if any(4) == 0 {
            bytes.truncate(any(bytes.len()));
        }
        let r = post_raw(s.addr, path, "", &bytes).await;
        assert!((200..500).contains(&r.status), "{} {path} {body}: {}", r.status, r.text());
    }
}

/// Replaces a random value somewhere inside, or adds a field.
fn damage(v: &mut Value, values: &[Value], any: &mut impl FnMut(usize) -> usize) {
    let new = values[any(values.len())].clone();
    match v {
        Value::Object(m) if any(6) == 0 => _ = m.insert("extra".into(), new),
        Value::Object(m) if !m.is_empty() && any(8) > 0 => {
            let at = any(m.len());
            let inner = m.values_mut().nth(at).unwrap();
            damage(inner, values, any);
        }
        Value::Array(a) if !a.is_empty() && any(3) > 0 => {
            let at = any(a.len());
            damage(&mut a[at], values, any);
        }
        v => *v = new,
    }
}
