//! The endpoint's OpenAI interface, over HTTP and a toy model.

mod common;

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use common::endpoint::{ANSWER, CONTEXT, Served, serve, until};
use common::http::{Reply, get, post, post_raw};
use serde_json::{Value, json};
use tacet_client::serve::Config;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Milliseconds of an evaluation that no test waits for.
const HANGS: usize = 3_600_000;

/// With what every request here has, unless it says otherwise.
fn chat(more: Value) -> Value {
    let mut v = json!({"model": "toy", "messages": [{"role": "user", "content": "hi"}], "temperature": 0});
    more.as_object().unwrap().iter().for_each(|(k, x)| v[k] = x.clone());
    v
}

async fn ask(s: &Served, more: Value) -> Reply {
    post(s.addr, "/v1/chat/completions", &chat(more)).await
}

#[tokio::test]
async fn a_chat_is_answered_whole() {
    let s = serve(Config::default()).await;
    let r = ask(&s, json!({})).await;
    assert_eq!((r.status, r.header("content-type")), (200, Some("application/json")));
    let v = r.json();
    assert_eq!(v["object"], "chat.completion");
    assert!(v["id"].as_str().unwrap().starts_with("chatcmpl-"));
    let c = &v["choices"][0];
    assert_eq!((&c["message"]["content"], &c["message"]["role"]), (&json!(ANSWER), &json!("assistant")));
    assert_eq!((&c["finish_reason"], &c["logprobs"], &c["index"]), (&json!("stop"), &Value::Null, &json!(0)));
    let u = &v["usage"];
    assert_eq!(
        u["total_tokens"],
        json!(u["prompt_tokens"].as_u64().unwrap() + u["completion_tokens"].as_u64().unwrap())
    );
    // Parts of text, an older role's newer name, null fields and those without effect.
    let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
    let messages = json!([{"role": "developer", "content": "x"}, {"role": "user", "content": parts, "name": "n"},
        {"role": "assistant", "content": null, "refusal": null, "tool_calls": []}, {"role": "user", "content": "c"}]);
    let r = ask(
        &s,
        json!({"messages": messages, "user": "u", "metadata": {}, "tools": [], "tool_choice": "auto", "n": 1,
        "response_format": {"type": "text"}, "stop": null, "logit_bias": {}, "seed": 1, "store": false, "max_tokens": null,
        "top_k": -1, "service_tier": "auto", "parallel_tool_calls": true, "stream_options": null}),
    );
    assert_eq!(r.await.json()["choices"][0]["message"]["content"], ANSWER);
}

#[tokio::test]
async fn a_stream_has_role_text_reason_usage_and_end_in_this_order() {
    let s = serve(Config::default()).await;
    let r = ask(&s, json!({"stream": true, "stream_options": {"include_usage": true}})).await;
    assert_eq!((r.status, r.header("content-type")), (200, Some("text/event-stream; charset=utf-8")));
    let mut events = r.events();
    assert_eq!(events.pop().unwrap(), "[DONE]");
    let events: Vec<Value> = events.iter().map(|e| serde_json::from_str(e).unwrap()).collect();
    for e in &events {
        assert_eq!((&e["id"], &e["created"], &e["model"]), (&events[0]["id"], &events[0]["created"], &json!("toy")));
        assert_eq!(e["object"], "chat.completion.chunk");
    }
    let (last, rest) = events.split_last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert!(last["usage"]["completion_tokens"].as_u64().unwrap() > 10);
    let (end, text) = rest.split_last().unwrap();
    assert_eq!((&end["choices"][0]["delta"], &end["choices"][0]["finish_reason"]), (&json!({}), &json!("stop")));
    assert_eq!(text[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert!(rest.iter().all(|e| e.as_object().unwrap().contains_key("usage") && e["usage"].is_null()));
    assert!(text.iter().all(|e| e["choices"][0]["finish_reason"].is_null()));
    let whole: String = text.iter().map(|e| e["choices"][0]["delta"]["content"].as_str().unwrap()).collect();
    assert_eq!(whole, ANSWER);
    // Without stream_options there is no usage at all.
    let r = ask(&s, json!({"stream": true, "max_tokens": 2})).await;
    let events = r.events();
    assert!(!r.text().contains("usage"));
    let end: Value = serde_json::from_str(&events[events.len() - 2]).unwrap();
    assert_eq!(end["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn parameters_reach_the_sampler() {
    let s = serve(Config::default()).await;
    let text = async |more: Value| {
        let r = ask(&s, more).await;
        r.json()["choices"][0].clone()
    };
    assert_eq!(text(json!({"max_tokens": 5})).await["finish_reason"], "length");
    assert_eq!(text(json!({"max_completion_tokens": 5})).await["message"]["content"], "Hello");
    assert_eq!(text(json!({"stop": "there"})).await["message"]["content"], "Hello ");
    assert_eq!(text(json!({"stop": ["zzz", " w"]})).await["message"]["content"], "Hello there,");
    // 33 is the token of "!".
    let banged = text(json!({"logit_bias": {"33": 100}, "max_tokens": 3})).await;
    assert_eq!(banged["message"]["content"], "!!!");
    let drawn = json!({"temperature": 5, "seed": 3, "max_tokens": 20, "ignore_eos": true});
    let (a, b) = (text(drawn.clone()).await, text(drawn).await);
    assert_eq!(a["message"], b["message"]);
    assert_ne!(a["message"]["content"], ANSWER[..20]);

    let c = text(json!({"logprobs": true, "top_logprobs": 2, "max_tokens": 2})).await;
    let content = c["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), 2);
    assert_eq!((&content[0]["token"], &content[0]["bytes"]), (&json!("H"), &json!([72])));
    assert_eq!(content[0]["top_logprobs"].as_array().unwrap().len(), 2);
    assert_eq!(content[0]["top_logprobs"][0]["logprob"], content[0]["logprob"]);
    assert!(content[0]["logprob"].as_f64().unwrap() > -0.01);
}

#[tokio::test]
async fn what_would_change_the_answer_is_refused_by_name() {
    let s = serve(Config::default()).await;
    for (field, value) in [
        ("n", json!(2)),
        ("tools", json!([{"type": "function"}])),
        ("tool_choice", json!("required")),
        ("functions", json!([{}])),
        ("response_format", json!({"type": "json_object"})),
        ("modalities", json!(["audio"])),
        ("reasoning_effort", json!("high")),
        ("web_search_options", json!({})),
        ("guided_json", json!({})),
        ("no_such_field", json!(1)),
        ("temperature", json!("hot")),
        ("temperature", json!(-1)),
        ("temperature", json!(1e300)),
        ("top_p", json!(0)),
        ("top_k", json!(-2)),
        ("min_p", json!(2)),
        ("presence_penalty", json!(3)),
        ("frequency_penalty", json!(-3)),
        ("repetition_penalty", json!(0)),
        ("logit_bias", json!({"x": 1})),
        ("logit_bias", json!({"99999": 1})),
        ("logit_bias", json!({"1": 101})),
        // A hundred tokens, each spelled with more and more zeros.
        ("logit_bias", (0..1025).map(|i| (format!("{:0w$}", i % 100, w = 2 + i / 100), json!(0))).collect()),
        ("stop_token_ids", json!(vec![1; 1025])),
        ("stop_token_ids", json!(["a"])),
        ("seed", json!(1.5)),
        ("stop", json!([1])),
        ("stop", json!("")),
        ("max_tokens", json!(0)),
        ("max_tokens", json!(-1)),
        ("max_completion_tokens", json!("x")),
        ("top_logprobs", json!(3)),
        ("stream", json!("yes")),
        ("messages", json!([])),
        ("messages", json!("hi")),
        ("model", json!(7)),
        ("model", json!(null)),
    ] {
        let r = ask(&s, json!({field: value})).await;
        let v = r.json();
        assert_eq!((r.status, &v["error"]["param"]), (400, &json!(field)), "{field} {value}: {v}");
        assert!(v["error"]["message"].as_str().unwrap().contains(field), "{v}");
        assert_eq!(v["error"]["type"], "invalid_request_error");
    }
    let image = json!([{"type": "image_url", "image_url": {"url": "data:"}}]);
    for (message, param) in [
        (json!({"role": "tool", "content": "x"}), "messages[0].role"),
        (json!({"role": "user", "content": image}), "messages[0].content"),
        (json!({"role": "user"}), "messages[0].content"),
        (json!({"content": "x"}), "messages[0].role"),
        (json!({"role": "user", "content": "x", "mood": 1}), "messages[0].mood"),
        (json!(1), "messages[0]"),
    ] {
        let r = ask(&s, json!({"messages": [message]})).await;
        assert_eq!((r.status, &r.json()["error"]["param"]), (400, &json!(param)));
    }
    let r = ask(&s, json!({"stream_options": {"what": 1}})).await;
    assert_eq!(r.json()["error"]["param"], "stream_options.what");
    let r = ask(&s, json!({"logprobs": true, "top_logprobs": 21})).await;
    assert_eq!(r.json()["error"]["param"], "top_logprobs");
    assert_eq!(s.watch.opened.load(SeqCst), 0);
}

#[tokio::test]
async fn unknown_models_long_prompts_and_broken_bodies_have_their_own_errors() {
    let s = serve(Config { body_limit: 2000, ..Config::default() }).await;
    let r = ask(&s, json!({"model": "other"})).await;
    assert_eq!((r.status, &r.json()["error"]["code"]), (404, &json!("model_not_found")));
    let r = ask(&s, json!({"messages": [{"role": "user", "content": "x".repeat(CONTEXT)}]})).await;
    assert_eq!((r.status, &r.json()["error"]["code"]), (400, &json!("context_length_exceeded")));
    assert_eq!(r.json()["error"]["param"], "messages");
    let r = ask(&s, json!({"model": "counts"})).await;
    assert_eq!((r.status, &r.json()["error"]["param"]), (400, &json!("model")));
    let r = ask(&s, json!({"model": "org/bare"})).await;
    assert!(r.status == 400 && r.text().contains("chat template"), "{}", r.text());
    let raw = async |body: &[u8]| post_raw(s.addr, "/v1/chat/completions", "", body).await;
    for body in [&b"{"[..], b"", b"[]", b"\xff\xfe", b"{\"model\": \"toy\"}x", "[".repeat(1500).as_bytes()] {
        let r = raw(body).await;
        assert_eq!(r.status, 400);
        assert_eq!(r.json()["error"]["type"], "invalid_request_error");
    }
    for n in [2001, 8 << 20] {
        let r = raw(&vec![b' '; n]).await;
        assert_eq!((r.status, &r.json()["error"]["param"]), (413, &Value::Null));
    }
    let r = post_raw(s.addr, "/v1/chat/completions", "", &vec![b' '; 1990]).await;
    assert_eq!(r.status, 400);
    let r = get(s.addr, "/v1/chat/completions").await;
    assert!(r.status == 405 && r.json()["error"]["message"].is_string());
    assert_eq!(get(s.addr, "/v1/nothing").await.json()["error"]["type"], "invalid_request_error");
}

#[tokio::test]
async fn completions_take_texts_and_tokens_and_echo_their_probabilities() {
    let s = serve(Config::default()).await;
    let complete = async |more: Value| {
        let mut v = json!({"model": "org/bare", "temperature": 0});
        more.as_object().unwrap().iter().for_each(|(k, x)| v[k] = x.clone());
        post(s.addr, "/v1/completions", &v).await
    };
    let v = complete(json!({"prompt": "Once upon"})).await.json();
    assert_eq!((&v["object"], &v["choices"][0]["finish_reason"]), (&json!("text_completion"), &json!("length")));
    assert_eq!(v["usage"]["completion_tokens"], 16);
    assert!(v["choices"][0]["text"].as_str().unwrap().starts_with(" a time the caf"));
    let many = json!({"prompt": ["Once upon", "the caf"], "max_tokens": 4, "stop_token_ids": vec![1; 1024]});
    let v = complete(many).await.json();
    assert_eq!((&v["choices"][1]["text"], &v["choices"][1]["index"]), (&json!("\u{e9} o"), &json!(1)));

    // As lm-evaluation-harness asks: the likelihood of a continuation, by tokens.
    let tokens: Vec<u32> = common::codec(CONTEXT).encode("Once upon a time", false).unwrap();
    let ask = json!({"prompt": [tokens], "max_tokens": 1, "logprobs": 1, "echo": true, "seed": 1234});
    let v = complete(ask).await.json();
    let l = &v["choices"][0]["logprobs"];
    assert!(v["choices"][0]["text"].as_str().unwrap().starts_with("Once upon a time"));
    for column in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(l[column].as_array().unwrap().len(), tokens.len() + 1, "{column}");
    }
    assert!(l["token_logprobs"][0].is_null() && l["top_logprobs"][0].is_null());
    assert_eq!(l["text_offset"][3], 3);
    // " a time" follows greedily: each token is the most probable one, and exactly equal to the best alternative.
    for i in 8..tokens.len() {
        let best =
            l["top_logprobs"][i].as_object().unwrap().values().map(|v| v.as_f64().unwrap()).fold(f64::MIN, f64::max);
        assert_eq!(l["token_logprobs"][i].as_f64().unwrap(), best);
    }
    // max_tokens 0 scores only.
    let v = complete(json!({"prompt": "Once", "max_tokens": 0, "logprobs": 0, "echo": true})).await.json();
    assert_eq!((&v["choices"][0]["text"], &v["usage"]["completion_tokens"]), (&json!("Once"), &json!(0)));
    assert_eq!(v["choices"][0]["logprobs"]["tokens"], json!(["O", "n", "c", "e"]));

    let r = complete(json!({"prompt": "Once upon", "stream": true, "echo": true, "max_tokens": 3, "logprobs": 1,
        "stream_options": {"include_usage": true}}));
    let mut events = r.await.events();
    assert_eq!(events.pop().unwrap(), "[DONE]");
    let events: Vec<Value> = events.iter().map(|e| serde_json::from_str(e).unwrap()).collect();
    assert_eq!(events[0]["choices"][0]["text"], "Once upon");
    let text: String = events.iter().filter_map(|e| e["choices"][0]["text"].as_str()).collect();
    assert_eq!(text, "Once upon a ");
    assert_eq!(events[events.len() - 2]["choices"][0]["finish_reason"], "length");
    assert_eq!(events[events.len() - 1]["usage"]["completion_tokens"], 3);

    for (more, param) in [
        (json!({"prompt": [1, "a"]}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": [[]]}), "prompt"),
        (json!({"prompt": ""}), "prompt"),
        (json!({"prompt": [99999]}), "prompt"),
        (json!({"prompt": {"a": 1}}), "prompt"),
        (json!({"prompt": vec!["a"; 2049], "max_tokens": 0, "echo": true}), "prompt"),
        (json!({"prompt": "a", "stop_token_ids": vec![1; 1025]}), "stop_token_ids"),
        (json!({}), "prompt"),
        (json!({"prompt": "a", "suffix": "b"}), "suffix"),
        (json!({"prompt": "a", "best_of": 3}), "best_of"),
        (json!({"prompt": "a", "max_tokens": 0}), "max_tokens"),
        (json!({"prompt": "a", "echo": 1}), "echo"),
    ] {
        let r = complete(more).await;
        assert_eq!((r.status, &r.json()["error"]["param"]), (400, &json!(param)), "{}", r.text());
    }
}

#[tokio::test]
async fn embeddings_take_four_kinds_of_input_and_two_encodings() {
    let s = serve(Config::default()).await;
    let embed = async |more: Value| {
        let mut v = json!({"model": "counts"});
        more.as_object().unwrap().iter().for_each(|(k, x)| v[k] = x.clone());
        post(s.addr, "/v1/embeddings", &v).await
    };
    let v = embed(json!({"input": "abc"})).await.json();
    assert_eq!(
        (&v["object"], &v["data"][0]["object"], &v["model"]),
        (&json!("list"), &json!("embedding"), &json!("counts"))
    );
    assert_eq!(v["usage"], json!({"prompt_tokens": 4, "total_tokens": 4}));
    let one = v["data"][0]["embedding"].clone();
    let end = v["data"][0]["embedding"].as_array().unwrap().len();
    assert_eq!(end, 4);
    let v = embed(json!({"input": ["x", "abc"]})).await.json();
    assert_eq!((&v["data"][1]["embedding"], &v["data"][1]["index"]), (&one, &json!(1)));
    assert_eq!(embed(json!({"input": [0, 0, 1]})).await.json()["data"].as_array().unwrap().len(), 1);
    let v = embed(json!({"input": [[0, 4], [1]], "encoding_format": "base64", "dimensions": 4})).await.json();
    // 1.0 and three zeros, little-endian.
    assert_eq!(v["data"][0]["embedding"], "AACAPwAAAAAAAAAAAAAAAA==");
    for (more, param) in [
        (json!({}), "input"),
        (json!({"input": []}), "input"),
        (json!({"input": [[]]}), "input"),
        (json!({"input": [99999]}), "input"),
        (json!({"input": "x".repeat(40)}), "input"),
        (json!({"input": vec!["x"; 2049]}), "input"),
        (json!({"input": "x", "dimensions": 2}), "dimensions"),
        (json!({"input": "x", "encoding_format": "int8"}), "encoding_format"),
        (json!({"input": "x", "input_type": "query"}), "input_type"),
        (json!({"input": "x", "model": "toy"}), "model"),
    ] {
        let r = embed(more).await;
        assert_eq!((r.status, &r.json()["error"]["param"]), (400, &json!(param)), "{}", r.text());
    }
}

#[tokio::test]
async fn models_are_described_for_every_client() {
    let s = serve(Config::default()).await;
    let v = get(s.addr, "/v1/models").await.json();
    let ids: Vec<&str> = v["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["counts", "org/bare", "toy"]);
    let v = get(s.addr, "/v1/models/toy").await.json();
    assert_eq!((&v["model_type"], &v["model_ability"]), (&json!("LLM"), &json!(["generate", "chat"])));
    assert_eq!((&v["max_model_len"], &v["created"]), (&json!(CONTEXT), &json!(1_700_000_000)));
    assert_eq!(get(s.addr, "/v1/models/org/bare").await.json()["model_ability"], json!(["generate"]));
    let v = get(s.addr, "/v1/models/counts").await.json();
    assert_eq!((&v["model_type"], &v["dimensions"]), (&json!("embedding"), &json!(4)));
    assert_eq!(get(s.addr, "/v1/models/none").await.status, 404);
    assert_eq!(get(s.addr, "/v1/models/%ff").await.json()["error"]["type"], "invalid_request_error");
    assert_eq!(get(s.addr, "/v1/cluster/auth").await.json(), json!({"auth": false}));
    // LocalAI's paths.
    assert_eq!(get(s.addr, "/models").await.json()["object"], "list");
    assert_eq!(get(s.addr, "/readyz").await.status, 200);
    assert_eq!(post(s.addr, "/chat/completions", &chat(json!({}))).await.status, 200);
}

#[tokio::test]
async fn dify_tries_a_model_with_a_ping_of_five_tokens() {
    let s = serve(Config::default()).await;
    let ping =
        json!({"model": "toy", "max_tokens": 5, "messages": [{"role": "user", "content": "ping"}], "stream": false});
    let v = post(s.addr, "/v1/chat/completions", &ping).await.json();
    assert_eq!(v["object"], "chat.completion");
    // Drawn, so the model may end earlier.
    assert!((1..=5).contains(&v["usage"]["completion_tokens"].as_u64().unwrap()));
}

#[tokio::test]
async fn a_next_turn_reuses_the_cache_and_a_stranger_does_not() {
    let s = serve(Config::default()).await;
    ask(&s, json!({})).await;
    let turn = json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": ANSWER}, {"role": "user", "content": "more"}]);
    let v = ask(&s, json!({"messages": turn})).await.json();
    let cached = v["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert!(cached as usize > ANSWER.len(), "{v}");
    assert_eq!(s.watch.opened.load(SeqCst), 1);
    let v = ask(&s, json!({"messages": [{"role": "user", "content": "What else?"}]})).await.json();
    assert_eq!((&v["usage"]["prompt_tokens_details"]["cached_tokens"], s.watch.opened.load(SeqCst)), (&json!(0), 2));
    // Two are kept; they go when their time is over.
    let s = serve(Config { keep_alive: Duration::from_millis(100), ..Config::default() }).await;
    ask(&s, json!({})).await;
    until("the idle conversation is dropped", || s.watch.dropped.load(SeqCst) == 1).await;
}

#[tokio::test]
async fn more_requests_than_allowed_are_told_to_come_back() {
    let s = serve(Config { running: 1, ..Config::default() }).await;
    s.watch.slow.store(HANGS, SeqCst);
    let addr = s.addr;
    let first = tokio::spawn(async move { post(addr, "/v1/chat/completions", &chat(json!({}))).await });
    until("the first runs", || s.watch.opened.load(SeqCst) == 1).await;
    let r = ask(&s, json!({})).await;
    assert_eq!((r.status, r.header("retry-after")), (429, Some("1")));
    assert_eq!(r.json()["error"]["type"], "rate_limit_error");
    // Nor is a prompt looked at that has no slot, which would show that it is too long.
    let long = "x".repeat(CONTEXT);
    let routes = [
        ("/v1/chat/completions", json!({"model": "toy", "messages": [{"role": "user", "content": long}]})),
        ("/v1/completions", json!({"model": "toy", "prompt": long})),
        ("/v1/embeddings", json!({"model": "counts", "input": long})),
        ("/api/chat", json!({"model": "toy", "messages": [{"role": "user", "content": long}]})),
        ("/api/generate", json!({"model": "toy", "prompt": long})),
        ("/api/embed", json!({"model": "counts", "input": long, "truncate": false})),
    ];
    for (path, body) in &routes {
        assert_eq!(post(s.addr, path, body).await.status, 429, "{path}");
    }
    // Its slot is free again once it ended, here because its client left.
    first.abort();
    until("the first ended", || s.watch.dropped.load(SeqCst) == 1).await;
    s.watch.slow.store(0, SeqCst);
    assert_eq!(ask(&s, json!({"max_tokens": 1})).await.status, 200);
    // So it is after a prompt that was refused.
    for (path, body) in &routes {
        assert_eq!(post(s.addr, path, body).await.status, 400, "{path}");
    }
    assert_eq!(ask(&s, json!({"max_tokens": 1})).await.status, 200);
}

#[tokio::test]
async fn a_client_that_leaves_ends_its_generation() {
    for stream in [true, false] {
        let s = serve(Config { running: 1, ..Config::default() }).await;
        s.watch.slow.store(HANGS, SeqCst);
        let body = chat(json!({"stream": stream})).to_string();
        let mut c = TcpStream::connect(s.addr).await.unwrap();
        let head =
            format!("POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n", body.len());
        c.write_all((head + &body).as_bytes()).await.unwrap();
        if stream {
            c.read_u8().await.unwrap();
        }
        until("it runs", || s.watch.opened.load(SeqCst) == 1).await;
        drop(c);
        until("the decoder is dropped", || s.watch.dropped.load(SeqCst) == 1).await;
        // Neither kept for a next turn nor holding the only slot.
        s.watch.slow.store(0, SeqCst);
        assert_eq!(
            ask(&s, json!({"max_tokens": 1})).await.json()["usage"]["prompt_tokens_details"]["cached_tokens"],
            0
        );
    }
}

#[tokio::test]
async fn failures_say_whether_a_retry_would_send_the_shares_again() {
    let s = serve(Config::default()).await;
    s.watch.unreachable.store(true, SeqCst);
    let r = ask(&s, json!({})).await;
    assert_eq!((r.status, r.header("x-should-retry")), (503, None));
    let r = ask(&s, json!({"stream": true})).await;
    assert_eq!((r.status, &r.json()["error"]["type"]), (503, &json!("server_error")));
    s.watch.unreachable.store(false, SeqCst);
    s.watch.fail_after.store(2, SeqCst);
    let r = ask(&s, json!({})).await;
    assert_eq!((r.status, r.header("x-should-retry")), (502, Some("false")));
    assert!(r.json()["error"]["message"].as_str().unwrap().contains("alpha"));
    // In a stream it is the last event, and no end mark follows.
    s.watch.fail_after.store(3, SeqCst);
    let events = ask(&s, json!({"stream": true})).await.events();
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(last["error"]["type"], "server_error");
    assert_eq!(s.watch.dropped.load(SeqCst), 2);
    assert_eq!(ask(&s, json!({})).await.status, 200);
}

#[tokio::test]
async fn a_silent_stream_gets_comments() {
    let s = serve(Config { heartbeat: Duration::from_millis(40), ..Config::default() }).await;
    s.watch.slow.store(HANGS, SeqCst);
    let body = chat(json!({"stream": true})).to_string();
    let mut c = TcpStream::connect(s.addr).await.unwrap();
    let head =
        format!("POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n", body.len());
    c.write_all((head + &body).as_bytes()).await.unwrap();
    let mut seen = String::new();
    while seen.matches(": waiting\n\n").count() < 2 {
        seen.push(char::from(c.read_u8().await.unwrap()));
    }
    assert!(seen.find("\"role\":\"assistant\"") < seen.find(": waiting"), "{seen}");
}
