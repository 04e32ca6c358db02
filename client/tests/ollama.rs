//! The endpoint's Ollama interface, over HTTP and a toy model.

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use common::endpoint::{ANSWER, CONTEXT, Served, serve, serve_with};
use common::http::{Reply, get, post, post_raw};
use serde_json::{Value, json};
use tacet_client::generate::Boxed;
use tacet_client::serve::{Config, Progress, PullError, Puller};
use tokio::sync::mpsc;

async fn ask(s: &Served, path: &str, mut body: Value, more: Value) -> Reply {
    more.as_object().unwrap().iter().for_each(|(k, x)| body[k] = x.clone());
    post(s.addr, path, &body).await
}

async fn chat(s: &Served, more: Value) -> Reply {
    let greedy = json!({"temperature": 0});
    ask(
        s,
        "/api/chat",
        json!({"model": "toy", "messages": [{"role": "user", "content": "hi"}], "options": greedy}),
        more,
    )
    .await
}

async fn generate(s: &Served, more: Value) -> Reply {
    ask(s, "/api/generate", json!({"model": "toy", "prompt": "hi", "options": {"temperature": 0}}), more).await
}

fn finished(v: &Value, reason: &str) {
    assert_eq!((&v["done"], &v["done_reason"]), (&json!(true), &json!(reason)));
    for name in ["total_duration", "load_duration", "prompt_eval_duration", "eval_duration"] {
        assert!(v[name].is_u64(), "{name}: {v}");
    }
    assert!(v["total_duration"].as_u64() >= v["eval_duration"].as_u64());
    assert!(v["prompt_eval_count"].as_u64().unwrap() > 0 && v["eval_count"].as_u64().unwrap() > 0);
}

#[tokio::test]
async fn a_chat_streams_lines_and_ends_with_counts() {
    // A heartbeat would break its clients, however long the silence is.
    let s = serve(Config { heartbeat: Duration::from_millis(5), ..Config::default() }).await;
    s.watch.slow.store(20, SeqCst);
    let r = chat(&s, json!({"keep_alive": "5m", "tools": [], "format": null, "think": false})).await;
    assert_eq!((r.status, r.header("content-type")), (200, Some("application/x-ndjson")));
    let lines = r.lines();
    let (last, text) = lines.split_last().unwrap();
    finished(last, "stop");
    assert_eq!(last["message"], json!({"role": "assistant", "content": ""}));
    assert!(text.iter().all(|l| l["done"] == false && l["model"] == "toy"));
    assert!(text[0]["created_at"].as_str().unwrap().ends_with('Z'));
    assert_eq!(text.iter().map(|l| l["message"]["content"].as_str().unwrap()).collect::<String>(), ANSWER);
    s.watch.slow.store(0, SeqCst);
    let v = chat(&s, json!({"stream": false, "model": "toy:latest"})).await.json();
    finished(&v, "stop");
    assert_eq!((&v["message"]["content"], &v["model"]), (&json!(ANSWER), &json!("toy:latest")));
    let options = json!({"temperature": 0, "num_predict": 5, "num_ctx": 4096, "num_thread": 8, "mirostat": 0});
    let v = chat(&s, json!({"stream": false, "options": options})).await.json();
    finished(&v, "length");
    assert_eq!(v["message"]["content"], "Hello");
    let v = chat(&s, json!({"stream": false, "logprobs": true, "top_logprobs": 1})).await.json();
    assert_eq!(v["logprobs"][0]["top_logprobs"][0]["token"], "H");
}

#[tokio::test]
async fn generate_uses_the_template_unless_told_not_to() {
    let s = serve(Config::default()).await;
    let lines = generate(&s, json!({"system": "x"})).await.lines();
    finished(lines.last().unwrap(), "stop");
    assert_eq!(lines.iter().map(|l| l["response"].as_str().unwrap()).collect::<String>(), ANSWER);
    let raw = json!({"prompt": "Once upon", "stream": false});
    for more in [json!({"raw": true}), json!({"model": "org/bare"})] {
        let mut body = raw.clone();
        more.as_object().unwrap().iter().for_each(|(k, x)| body[k] = x.clone());
        let v = generate(&s, body).await.json();
        assert_eq!(v["response"], " a time the caf\u{e9} opened, and the rain stopped.");
    }
    let stop = json!({"temperature": 0, "stop": ["there"]});
    assert_eq!(generate(&s, json!({"stream": false, "options": stop})).await.json()["response"], "Hello ");
}

#[tokio::test]
async fn an_empty_request_loads_or_unloads() {
    let s = serve(Config::default()).await;
    let v = generate(&s, json!({"prompt": ""})).await.json();
    assert_eq!((&v["done_reason"], &v["response"]), (&json!("load"), &json!("")));
    assert_eq!(chat(&s, json!({"messages": []})).await.json()["done_reason"], "load");
    chat(&s, json!({"stream": false})).await;
    assert_eq!(chat(&s, json!({"messages": [], "keep_alive": 0})).await.json()["done_reason"], "unload");
    assert_eq!(s.watch.dropped.load(SeqCst), 1);
    chat(&s, json!({"stream": false, "keep_alive": 0})).await;
    assert_eq!(s.watch.dropped.load(SeqCst), 2);
}

#[tokio::test]
async fn models_are_listed_and_shown() {
    let s = serve(Config::default()).await;
    assert_eq!(get(s.addr, "/").await.text(), "Ollama is running");
    assert!(get(s.addr, "/api/version").await.json()["version"].is_string());
    let v = get(s.addr, "/api/tags").await.json();
    assert_eq!(v["models"].as_array().unwrap().len(), 3);
    let loaded = get(s.addr, "/api/ps").await.json();
    let names = |v: &Value| v["models"].as_array().unwrap().iter().map(|m| m["name"].clone()).collect::<Vec<_>>();
    assert_eq!(names(&v), ["counts:latest", "org/bare:latest", "toy:latest"]);
    assert_eq!(names(&loaded), names(&v));
    assert_eq!(
        (&loaded["models"][0]["context_length"], &loaded["models"][2]["context_length"]),
        (&json!(16), &json!(CONTEXT))
    );
    let toy = &v["models"][2];
    assert_eq!((&toy["name"], &toy["model"], &toy["size"]), (&json!("toy:latest"), &json!("toy:latest"), &json!(1234)));
    assert_eq!(toy["modified_at"], "2023-11-14T22:13:20.000000Z");
    assert_eq!(toy["details"]["quantization_level"], "Q8_0");
    for key in ["model", "name"] {
        let v = post(s.addr, "/api/show", &json!({key: "toy:latest", "verbose": true})).await.json();
        assert_eq!(
            (&v["capabilities"], &v["model_info"]["llama.context_length"]),
            (&json!(["completion"]), &json!(CONTEXT))
        );
        assert!(v["template"].as_str().unwrap().contains("im_start"));
    }
    let v = post(s.addr, "/api/show", &json!({"model": "counts"})).await.json();
    assert_eq!((&v["capabilities"], &v["model_info"]["bert.embedding_length"]), (&json!(["embedding"]), &json!(4)));
    let r = post(s.addr, "/api/show", &json!({"model": "none"})).await;
    assert!(r.status == 404 && r.json()["error"].is_string());
}

#[tokio::test]
async fn texts_are_embedded_and_cut_to_the_models_length() {
    let s = serve(Config::default()).await;
    let v = post(s.addr, "/api/embed", &json!({"model": "counts", "input": ["abc", "x"]})).await.json();
    assert_eq!((v["embeddings"].as_array().unwrap().len(), &v["prompt_eval_count"]), (2, &json!(6)));
    let old = post(s.addr, "/api/embeddings", &json!({"model": "counts", "prompt": "abc"})).await.json();
    let new: Vec<f32> = serde_json::from_value(v["embeddings"][0].clone()).unwrap();
    let old: Vec<f32> = serde_json::from_value(old["embedding"].clone()).unwrap();
    assert_eq!(new, old);
    let long = json!({"model": "counts", "input": "a".repeat(50)});
    assert_eq!(post(s.addr, "/api/embed", &long).await.json()["prompt_eval_count"], 16);
    let r = ask(&s, "/api/embed", long, json!({"truncate": false})).await;
    assert!(r.status == 400 && r.json()["error"].as_str().unwrap().contains("50") || r.text().contains("51"));
    let r = post(s.addr, "/api/embed", &json!({"model": "toy", "input": "x"})).await;
    assert_eq!(r.status, 400);
    let r = post(s.addr, "/api/embed", &json!({"model": "counts", "input": vec!["x"; 2049]})).await;
    assert!(r.status == 400 && r.text().contains("at most 2048 inputs"), "{}", r.text());
}

#[tokio::test]
async fn errors_are_strings_and_name_the_field() {
    let s = serve(Config { body_limit: 2000, ..Config::default() }).await;
    for (more, name) in [
        (json!({"tools": [{}]}), "tools"),
        (json!({"format": "json"}), "format"),
        (json!({"format": {"type": "object"}}), "format"),
        (json!({"think": true}), "think"),
        (json!({"options": {"temperature": "x"}}), "options"),
        (json!({"options": {"mirostat": 1}}), "mirostat"),
        (json!({"options": {"tempreature": 1}}), "tempreature"),
        (json!({"options": {"top_k": -4}}), "top_k"),
        (json!({"keep_alive": "soon"}), "keep_alive"),
        (json!({"keep_alive": []}), "keep_alive"),
        (json!({"messages": [{"role": "user", "content": "a", "images": ["x"]}]}), "images"),
        (json!({"messages": "x"}), "messages"),
        (json!({"stream": 1}), "stream"),
        (json!({"model": null}), "model"),
        (json!({"whatever": 1}), "whatever"),
        (json!({"messages": [{"role": "user", "content": "x".repeat(CONTEXT)}]}), "context"),
    ] {
        let r = chat(&s, more.clone()).await;
        assert_eq!(r.status, 400, "{more}");
        assert!(r.json()["error"].as_str().unwrap().contains(name), "{}", r.text());
    }
    for (more, name) in [
        (json!({"suffix": "x"}), "suffix"),
        (json!({"template": "x"}), "template"),
        (json!({"images": ["x"]}), "images"),
        (json!({"context": [1]}), "context"),
        (json!({"model": "org/bare", "system": "x"}), "template"),
    ] {
        let r = generate(&s, more).await;
        assert!(r.status == 400 && r.json()["error"].as_str().unwrap().contains(name), "{}", r.text());
    }
    assert_eq!(chat(&s, json!({"model": "none"})).await.status, 404);
    for (status, body) in [(400, &b"{"[..]), (400, b"[1]"), (413, &[b' '; 3000])] {
        let r = post_raw(s.addr, "/api/chat", "", body).await;
        assert!(r.status == status && r.json()["error"].is_string());
    }
    assert_eq!(get(s.addr, "/api/chat").await.status, 405);
    assert!(get(s.addr, "/api/nothing").await.json()["error"].is_string());
    // A failure in the middle of an answer is its last line.
    s.watch.fail_after.store(4, SeqCst);
    let lines = chat(&s, json!({})).await.lines();
    assert!(lines.last().unwrap()["error"].as_str().unwrap().contains("alpha"));
    s.watch.unreachable.store(true, SeqCst);
    assert_eq!(chat(&s, json!({})).await.status, 503);
}

/// Has one model to fetch, and tells of two files.
struct Shelf;

impl Puller for Shelf {
    fn pull<'a>(&'a self, name: &'a str, progress: mpsc::Sender<Progress>) -> Boxed<'a, Result<String, PullError>> {
        Box::pin(async move {
            match name {
                "new" => {}
                "a b" => return Err(PullError::Name("that is no name".into())),
                "broken" => return Err(PullError::Failed("the source is gone".into())),
                _ => return Err(PullError::Absent(format!("no model is called {name}"))),
            }
            for (digest, completed) in [("config.json", 100), ("sha256:0123456789abcdef", 10)] {
                let _ = progress.send(Progress { digest: digest.into(), total: 100, completed }).await;
            }
            Ok("fetched: serve it".into())
        })
    }
}

#[tokio::test]
async fn pulling_tells_how_far_it_is() {
    let s = serve_with(Config::default(), |r| r.with_puller(Arc::new(Shelf))).await;
    let lines = post(s.addr, "/api/pull", &json!({"model": "new:latest"})).await.lines();
    assert_eq!(
        lines,
        [
            json!({"status": "pulling manifest"}),
            json!({"status": "pulling config.json", "digest": "config.json", "total": 100, "completed": 100}),
            json!({"status": "pulling 0123456789ab", "digest": "sha256:0123456789abcdef", "total": 100, "completed": 10}),
            json!({"status": "fetched: serve it"}),
            json!({"status": "success"}),
        ]
    );
    // It has no parties yet.
    assert_eq!(post(s.addr, "/api/embed", &json!({"model": "new", "input": "x"})).await.status, 404);
    // What is served is not fetched.
    let r = post(s.addr, "/api/pull", &json!({"name": "toy", "stream": false, "insecure": true})).await;
    assert_eq!(r.json(), json!({"status": "success"}));
    for (model, status, said) in [("other", 404, "other"), ("a b", 400, "no name"), ("broken", 502, "gone")] {
        let lines = post(s.addr, "/api/pull", &json!({"model": model})).await.lines();
        assert_eq!((lines.len(), &lines[0]["status"]), (2, &json!("pulling manifest")));
        assert!(lines[1]["error"].as_str().unwrap().contains(said), "{}", lines[1]);
        let r = post(s.addr, "/api/pull", &json!({"model": model, "stream": false})).await;
        assert!(r.status == status && r.json()["error"].as_str().unwrap().contains(said), "{}", r.text());
    }
    let s = serve(Config::default()).await;
    assert_eq!(post(s.addr, "/api/pull", &json!({"model": "new", "stream": false})).await.status, 404);
}
