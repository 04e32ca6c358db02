//! `tacet serve` with a decoder and an encoder at once, over real parties of both. The decoder comes from `TACET_SHARED`, the
//! encoder from `TACET_MODEL_DIR`; without them the tests say that they were skipped.

#[path = "common/serving.rs"]
mod serving;
#[path = "common/stories.rs"]
mod stories;

use std::process::Command;

use serde_json::{Value, json};
use serving::Serving;
use stories::stories;

const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}";

#[test]
fn a_decoder_and_an_encoder_are_served_side_by_side() {
    let Some(decoder) = stories("serve") else { return };
    let Some(encoder) = std::env::var_os("TACET_MODEL_DIR").and_then(|d| d.into_string().ok()) else {
        println!("skipped: TACET_MODEL_DIR does not name a directory with all-MiniLM-L6-v2");
        return;
    };
    let template = decoder.0.join("own.jinja");
    std::fs::write(&template, TEMPLATE).unwrap();
    let (decoder, template) = (decoder.0.to_str().unwrap(), template.to_str().unwrap());
    let s = Serving::start(
        &[
            ["--model", decoder, "--model", &encoder],
            ["--name", "tale", "--name", "minilm"],
            ["--local", "--chat-template", template, "--json"],
        ]
        .concat(),
        &[],
    );
    assert_eq!(s.head["models"], json!(["tale", "minilm"]));

    let names = |path: &str, list: &str, key: &str| {
        let v = s.get(path).json();
        v[list].as_array().unwrap().iter().map(|m| m[key].clone()).collect::<Vec<Value>>()
    };
    assert_eq!(names("/v1/models", "data", "id"), ["minilm", "tale"]);
    assert_eq!(names("/api/tags", "models", "name"), ["minilm:latest", "tale:latest"]);
    assert_eq!(names("/api/ps", "models", "name"), ["minilm:latest", "tale:latest"]);
    assert_eq!(s.get("/v1/models/minilm").json()["model_type"], "embedding");

    let messages = json!([{"role": "user", "content": "Once upon a time"}]);
    let chat = json!({"model": "tale", "messages": messages, "max_tokens": 8, "temperature": 0});
    let text = s.post("/v1/chat/completions", &chat).json()["choices"][0]["message"]["content"].clone();
    assert_eq!(text, ", there was a little girl");
    let chat = json!({"model": "tale", "messages": messages, "stream": false, "options": {"num_predict": 8, "temperature": 0}});
    assert_eq!(s.post("/api/chat", &chat).json()["message"]["content"], text);

    let texts = ["I lost my credit card.", "My bank card is gone.", "The cat sleeps on the roof."];
    let v = s.post("/v1/embeddings", &json!({"model": "minilm", "input": texts})).json();
    let vectors: Vec<Vec<f64>> =
        (0..3).map(|i| serde_json::from_value(v["data"][i]["embedding"].clone()).unwrap()).collect();
    let cosine = |i: usize, j: usize| tacet_client::cosine(&vectors[i], &vectors[j]);
    assert!(vectors[0].len() == 384 && cosine(0, 1) > 0.5 && cosine(0, 2) < 0.2, "{} {}", cosine(0, 1), cosine(0, 2));
    let v = s.post("/api/embed", &json!({"model": "minilm", "input": texts[0]})).json();
    let again: Vec<f64> = serde_json::from_value(v["embeddings"][0].clone()).unwrap();
    assert!(tacet_client::cosine(&again, &vectors[0]) > 0.999);

    for (path, body, status, said) in [
        ("/v1/chat/completions", json!({"model": "minilm", "messages": messages}), 400, "does not generate"),
        ("/v1/completions", json!({"model": "minilm", "prompt": "x"}), 400, "does not generate"),
        ("/v1/embeddings", json!({"model": "tale", "input": "x"}), 400, "does not embed"),
        ("/api/chat", json!({"model": "minilm", "messages": messages}), 400, "does not generate"),
        ("/api/generate", json!({"model": "minilm", "prompt": "x"}), 400, "does not generate"),
        ("/api/embed", json!({"model": "tale", "input": "x"}), 400, "does not embed"),
        ("/v1/chat/completions", json!({"model": "gpt-4o", "messages": messages}), 404, "gpt-4o"),
        ("/v1/embeddings", json!({"model": "bge-m3", "input": "x"}), 404, "bge-m3"),
        ("/api/chat", json!({"model": "llama3.2", "messages": messages}), 404, "llama3.2"),
        ("/api/embed", json!({"model": "bge-m3", "input": "x"}), 404, "bge-m3"),
    ] {
        let r = s.post(path, &body);
        let error = r.json()["error"].clone();
        let message = if path.starts_with("/api") { &error } else { &error["message"] };
        assert!(
            r.status == status && message.as_str().is_some_and(|m| m.contains(said)),
            "{path}: {} {error}",
            r.status
        );
    }
}

#[test]
fn what_does_not_fit_together_is_told_before_anything_starts() {
    let Some(decoder) = stories("serve-arguments") else { return };
    let model = decoder.0.to_str().unwrap();
    let encoder = decoder.0.join("encoder");
    std::fs::create_dir(&encoder).unwrap();
    std::fs::write(encoder.join("config.json"), r#"{"model_type": "bert"}"#).unwrap();
    let encoder = encoder.to_str().unwrap();
    for (args, said) in [
        (vec!["--local", "--model", model, "--model", model], "--name for each"),
        (vec!["--local", "--model", model, "--model", encoder, "--name", "a"], "2 models and 1 of --name"),
        (vec!["--parties", "a.toml", "--model", model, "--model", encoder], "2 models and 1 of --parties"),
        (vec!["--local", "--model", encoder, "--chat-template", "x"], "--chat-template is for one decoder"),
        (vec!["--local", "--model", model, "--chat-template", "/nonexistent/x"], "/nonexistent/x"),
        (vec!["--parties", "/nonexistent/p.toml", "--model", model], "/nonexistent/p.toml"),
    ] {
        let out = Command::new(env!("CARGO_BIN_EXE_tacet"))
            .args(["serve", "--listen", "127.0.0.1:0"])
            .args(&args)
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.code() == Some(1) && error.contains(said) && out.stdout.is_empty(), "{args:?}: {error}");
    }
}
