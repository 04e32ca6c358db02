//! Fetching models from a hub, by `/api/pull` and by `tacet model pull`. The model that is generated with comes from
//! `TACET_SHARED`; without it that test says that it was skipped.

#[path = "common/hub.rs"]
mod hub;
#[path = "common/serving.rs"]
mod serving;
#[path = "common/stories.rs"]
mod stories;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use hub::{COMMIT, Files, Hub, sha256};
use serde_json::{Value, json};
use serving::Serving;
use stories::{Folder, stories};

/// Files that nobody loads, with 2 MB of weights.
fn small() -> Files {
    let mut files: Files = ["config.json", "tokenizer.json"].map(|f| (f.into(), b"{}".to_vec())).into();
    files.insert("model.safetensors".into(), (0..2u32 << 20).map(|i| (i.wrapping_mul(i) >> 7) as u8).collect());
    files
}

fn names(dir: &Path) -> Vec<String> {
    let all = std::fs::read_dir(dir).into_iter().flatten();
    let mut names: Vec<String> = all.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn tacet(cache: &Folder, hub: &Hub, args: &[&str]) -> Output {
    let mut c = Command::new(env!("CARGO_BIN_EXE_tacet"));
    c.args(args).env("TACET_CACHE", &cache.0).env("HF_ENDPOINT", hub.url()).output().unwrap()
}

#[test]
fn a_model_is_pulled_over_the_endpoint_and_then_used_by_its_name() {
    let Some(model) = stories("pull") else { return };
    let files: Files =
        names(&model.0).into_iter().map(|n| (n.clone(), std::fs::read(model.0.join(n)).unwrap())).collect();
    let special = ["owner/damaged", "owner/slow", "owner/short"].map(|n| (n, small()));
    let hub = Hub::start(&[&[("owner/tale", files.clone())], &special[..]].concat());
    let cache = Folder::new("pull-cache");
    let (url, at) = (hub.url(), cache.0.to_str().unwrap());
    let s = Serving::start(
        &["--local", "--model", model.0.to_str().unwrap(), "--name", "served", "--json"],
        &[("HF_ENDPOINT", &url), ("TACET_CACHE", at)],
    );

    // 1. Lines as Ollama's clients expect them.
    let r = s.post("/api/pull", &json!({"model": "hf.co/owner/tale:latest"}));
    let lines: Vec<Value> = r.body.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let weights = &files["model.safetensors"];
    let digest = format!("sha256:{}", sha256(weights));
    assert_eq!((r.status, &lines[0]), (200, &json!({"status": "pulling manifest"})));
    let at: Vec<&Value> = lines.iter().filter(|l| l["digest"] == json!(digest)).collect();
    let done = at.last().expect("the weights are told of");
    assert!(at.iter().all(|l| l["total"] == json!(weights.len()) && l["completed"].as_u64() <= l["total"].as_u64()));
    assert_eq!((&done["completed"], &done["status"]), (&done["total"], &json!(format!("pulling {}", &digest[7..19]))));
    assert!(lines[lines.len() - 2]["status"].as_str().unwrap().contains("tacet serve with --model"), "{}", r.body);
    assert_eq!(lines[lines.len() - 1], json!({"status": "success"}));

    // 2. All of what a decoder needs is there, of one revision.
    let dir = cache.0.join("models/owner--tale");
    let kept =
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
    assert_eq!(names(&dir), kept);
    assert!(kept.iter().all(|f| std::fs::read(dir.join(f)).unwrap() == files[*f]));
    let asked = std::mem::take(&mut *hub.asked.lock().unwrap());
    // But for the first, which asks for it.
    assert!(asked.iter().skip(1).all(|l| l.contains(COMMIT) || l.contains("/elsewhere/")), "{asked:?}");

    // 3. From the cache, whoever asks.
    assert_eq!(
        s.post("/api/pull", &json!({"model": "owner/tale", "stream": false})).json(),
        json!({"status": "success"})
    );
    let generate =
        ["generate", "--local", "--prompt", "Once upon a time", "--max-tokens", "8", "--model", "owner/tale"];
    let out = tacet(&cache, &hub, &generate);
    assert_eq!(String::from_utf8_lossy(&out.stdout), ", there was a little girl\n", "{out:?}");
    assert!(hub.asked.lock().unwrap().is_empty());

    // 4. What goes wrong, in the dialect's shape.
    for (name, status, said) in [
        ("owner/nothing", 404, "no public model"),
        ("owner/damaged", 502, "has sha256"),
        ("owner/short", 502, "model.safetensors"),
        ("../owner", 400, "neither a directory nor a model name"),
        (model.0.to_str().unwrap(), 400, "neither a directory nor a model name"),
    ] {
        let r = s.post("/api/pull", &json!({"model": name, "stream": false}));
        assert!(r.status == status && r.json()["error"].as_str().unwrap().contains(said), "{name}: {}", r.body);
        let r = s.post("/api/pull", &json!({"model": name}));
        let last: Value = serde_json::from_str(r.body.lines().last().unwrap()).unwrap();
        assert!(last["error"].as_str().unwrap().contains(said), "{name}: {}", r.body);
    }

    // 5. A client that leaves ends its download, which would go on for hours.
    let mut lines = BufReader::new(s.open("POST /api/pull", &json!({"model": "owner/slow"}).to_string())).lines();
    while !lines.next().expect("more lines").unwrap().contains("sha256:") {}
    assert_eq!(names(&cache.0.join("models")).len(), 2);
    drop(lines);
    let end = Instant::now() + Duration::from_secs(60);
    while names(&cache.0.join("models")) != ["owner--tale"] {
        assert!(Instant::now() < end, "{:?}", names(&cache.0.join("models")));
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn weights_in_several_files_are_fetched_whole_or_not_at_all() {
    let mut files = small();
    let weights = files.remove("model.safetensors").unwrap();
    for shard in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] {
        files.insert(shard.into(), [shard.as_bytes(), &weights].concat());
    }
    let map = json!({"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"});
    files.insert("model.safetensors.index.json".into(), json!({"weight_map": map}).to_string().into_bytes());
    let mut half = files.clone();
    half.remove("model-00002-of-00002.safetensors");
    let hub = Hub::start(&[("owner/shards", files.clone()), ("owner/half", half)]);
    let cache = Folder::new("pull-shards");
    let out = tacet(&cache, &hub, &["model", "pull", "owner/shards", "--json"]);
    let dir = cache.0.join("models/owner--shards");
    let said: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(said, json!({"model": "owner/shards", "dir": dir}));
    assert!(
        names(&dir).iter().eq(files.keys()) && files.iter().all(|(n, f)| std::fs::read(dir.join(n)).unwrap() == *f)
    );

    let out = tacet(&cache, &hub, &["model", "pull", "owner/half"]);
    let error = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.code() == Some(1) && error.contains("no model-00002-of-00002.safetensors"), "{error}");
    assert_eq!(names(&cache.0.join("models")), ["owner--shards"]);
}
