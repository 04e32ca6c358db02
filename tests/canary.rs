//! No party and no endpoint writes down what a client said or was told: texts, tokens and vectors that cannot be there by
//! chance go through real processes, also where something fails, and are then looked for in all that was written.

#[path = "common/canary.rs"]
mod canary;
#[path = "common/processes.rs"]
#[allow(dead_code)]
mod processes;
#[path = "common/tiny.rs"]
#[allow(dead_code)]
mod tiny;

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;

use canary::Secrets;
use processes::{Home, Lane, Reply, Served, TOKEN, decoder, until};
use serde_json::{Value, json};
use tacet_client::generate::Codec;
use tacet_client::{Client, Parties};
use tacet_party::config::Limits;
use tacet_protocol::model::BertModel;
use tacet_protocol::model::decoder::DecoderModel;
use tiny::Tiny;

/// Values of an input and of its shares that are looked for.
const VALUES: usize = 32;

/// What a caller says, and what an attacker might put where it does not belong.
const SAID: [&str; 3] =
    ["Zebulon's quaffing xylophones", "Ingeborg mislaid fourteen bassoons", "Wilhelmina juggles marzipan"];
const MISPLACED: &str = "Kunigunde-overslept-yesterday";

/// A lane's pages, kept beside the logs.
fn keep_metrics(home: &Home, lane: &Lane, name: &str) {
    for party in 0..3 {
        for page in ["/metrics", "/readyz", "/healthz"] {
            let file = home.dir.join("log").join(format!("{name}-{party}{}", page.replace('/', "-")));
            std::fs::write(file, lane.page(party, page)).unwrap();
        }
    }
}

/// A process holds no regular file outside the folder open for writing.
fn writes_only_under(home: &Path, pid: u32) {
    let writable = |fd: &OsStr| {
        let info = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("fdinfo").join(fd));
        let info = info.unwrap_or_default();
        let flags = info.lines().find_map(|l| u32::from_str_radix(l.strip_prefix("flags:")?.trim(), 8).ok());
        flags.is_some_and(|f| f & 3 != 0)
    };
    for fd in std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().filter_map(Result::ok) {
        let Ok(at) = std::fs::read_link(fd.path()) else { continue };
        let elsewhere = at.is_file() && !at.starts_with(home) && writable(&fd.file_name());
        assert!(!elsewhere, "process {pid} writes to {}", at.display());
    }
}

/// Searches all that was written, and shows that there was something to search.
fn nothing_was_written(home: &Home, secrets: &Secrets, least: usize) {
    let (found, read) = secrets.under(&home.dir);
    println!("searched {read} bytes");
    assert!(read > least, "only {read} bytes to search");
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn what_is_generated_from_and_to_is_not_written_down() {
    let home = Home::new();
    let Some(dir) = decoder() else { return };
    let (codec, model) = (Codec::load(&dir).unwrap(), DecoderModel::load(&dir).unwrap());
    let mut lane = Lane::start(&home, "lane", &dir, Limits::default());
    let s = Served::start(&home, "story", &dir, &["--parties", lane.parties.to_str().unwrap(), "--running", "8"]);
    let mut secrets = Secrets::default();
    let mut prompt = |text: &str| {
        let tokens = codec.encode(text, true).unwrap();
        secrets.text(text);
        secrets.tokens(&tokens);
        secrets.numbers("embedding", &model.embed_tokens(&tokens, 0).unwrap()[..VALUES]);
    };
    SAID.into_iter().for_each(&mut prompt);
    prompt(MISPLACED);
    let mut answers = Vec::new();

    // Answers, whole and in pieces, in both dialects.
    let [a, b, c] = SAID;
    let body = |prompt: &str, stream: bool| json!({"model": "story", "prompt": prompt, "max_tokens": 16, "stream": stream, "logprobs": 1});
    let whole = s.post("/v1/completions", body(a, false).to_string()).json();
    answers.push(whole["choices"][0]["text"].as_str().unwrap().to_string());
    let pieces = s.post("/v1/completions", body(b, true).to_string()).body;
    let texts = pieces.lines().filter_map(|l| serde_json::from_str::<Value>(l.strip_prefix("data: ")?).ok());
    answers.push(texts.filter_map(|v| v["choices"][0]["text"].as_str().map(str::to_string)).collect());
    let body = json!({"model": "story", "prompt": c, "raw": true, "options": {"num_predict": 16}});
    let lines = s.post("/api/generate", body.to_string()).body;
    let texts = lines
        .lines()
        .filter_map(|l| serde_json::from_str::<Value>(l).unwrap()["response"].as_str().map(str::to_string));
    answers.push(texts.collect());

    // From the command line, which answers on its own output.
    let args = ["generate", "--parties", lane.parties.to_str().unwrap(), "--model", dir.to_str().unwrap()];
    let o = home.command(&[&args[..], &["--prompt", b, "--max-tokens", "16", "--json"]].concat()).output().unwrap();
    std::fs::write(home.dir.join("log/generate.err"), &o.stderr).unwrap();
    let v: Value = serde_json::from_slice(&o.stdout).unwrap();
    let ids = |key: &str| v[key].as_array().unwrap().iter().map(|t| t.as_u64().unwrap() as u32).collect::<Vec<_>>();
    assert_eq!(ids("prompt_tokens"), codec.encode(b, true).unwrap());
    secrets.tokens(&ids("tokens"));
    answers.push(v["text"].as_str().unwrap().to_string());
    // The search knows them where they belong.
    assert!(secrets.within(&o.stdout).iter().any(|what| what.starts_with("tokens")));

    // Requests that fail, with what was said in every place where an error could repeat it.
    let bad = [
        json!({"model": MISPLACED, "prompt": a}).to_string(),
        json!({"model": "story", "prompt": a, MISPLACED: 1}).to_string(),
        json!({"model": "story", "prompt": a, "temperature": MISPLACED}).to_string(),
        json!({"model": "story", "prompt": {MISPLACED: a}}).to_string(),
        json!({"model": "story", "prompt": a, "stop": ["", MISPLACED]}).to_string(),
        json!({"model": "story", "prompt": a.repeat(100)}).to_string(),
        json!({"model": "story", "messages": [{"role": MISPLACED, "content": a}]}).to_string(),
        json!({"model": "story", "messages": [{"role": "user", "content": a}]}).to_string(),
        json!({"model": "story", "input": a}).to_string(),
        format!("{{\"model\": \"story\", \"prompt\": \"{a}"),
        format!("{MISPLACED} {a}"),
    ];
    for path in
        ["/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/api/generate", "/api/chat", "/api/embed"]
    {
        for body in &bad {
            let r = s.post(path, body);
            // Some are fine on some paths: a field that another path needs.
            assert!([200, 400, 404].contains(&r.status), "{path} {body}: {r:?}");
        }
    }
    for head in [
        format!("GET /v1/models/{MISPLACED} HTTP/1.0\r\nhost: localhost\r\nauthorization: Bearer {TOKEN}\r\n\r\n"),
        format!("GET /{MISPLACED} HTTP/1.0\r\nhost: localhost\r\nauthorization: Bearer {TOKEN}\r\n\r\n"),
        format!("GET /v1/models HTTP/1.0\r\nhost: {MISPLACED}\r\n\r\n"),
        format!("GET /v1/models HTTP/1.0\r\nhost: localhost\r\nauthorization: Bearer {MISPLACED}\r\n\r\n"),
        format!("GET /v1/models HTTP/1.0\r\nhost: localhost\r\norigin: http://{MISPLACED}.example\r\n\r\n"),
        format!("{MISPLACED}\r\n\r\n"),
    ] {
        let mut stream = TcpStream::connect(s.at).unwrap();
        stream.write_all(head.as_bytes()).unwrap();
        assert!((400..500).contains(&Reply::read(stream).status), "{head}");
    }
    keep_metrics(&home, &lane, "before");

    // A party dies while it works on it.
    let body = json!({"model": "story", "prompt": c, "max_tokens": 500, "stream": true, "ignore_eos": true});
    let mut stream = BufReader::new(s.open("/v1/completions", body.to_string().as_bytes()));
    let mut line = String::new();
    while !line.starts_with("data: ") {
        line.clear();
        assert!(stream.read_line(&mut line).unwrap() > 0, "the stream ended early");
    }
    for party in 0..3 {
        writes_only_under(&home.dir, lane.pid(party));
    }
    writes_only_under(&home.dir, s.pid());
    lane.kill(1);
    stream.read_to_string(&mut line).unwrap();
    assert!(line.contains("server_error"), "{line}");
    until("the other evaluator to say so", || home.log("lane-alpha.err").contains("session failed"));
    keep_metrics(&home, &lane, "after");
    drop(s);

    for answer in &answers {
        assert!(answer.len() >= 16, "{answers:?}");
        secrets.text(answer.trim());
    }
    nothing_was_written(&home, &secrets, 8_000);
}

#[test]
fn what_is_embedded_and_its_shares_are_not_written_down() {
    let home = Home::new();
    let tiny = Tiny::new(2);
    let (text, other) = ("w41 w17 w59 w23 w61 w5 w47 w13", "w53 w19 w43 w31 w37 w11");
    let mut lane = Lane::start(&home, "lane", &tiny.dir, Limits::default());
    let parties = lane.parties.to_str().unwrap().to_string();
    let s = Served::start(&home, "tiny", &tiny.dir, &["--parties", &parties]);
    let mut secrets = Secrets::default();
    let model = BertModel::load(&tiny.dir).unwrap();
    for (text, tokens) in [(text, &[41, 17, 59, 23, 61, 5, 47, 13][..]), (other, &[53, 19, 43, 31, 37, 11])] {
        secrets.text(text);
        secrets.tokens(tokens);
        secrets.numbers("embedding", &model.embed_tokens(tokens).unwrap()[..VALUES]);
        secrets.numbers("vector", &model.plaintext(tokens).unwrap());
    }
    let mut found = |vector: &Value| {
        let vector: Vec<f64> = vector.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
        assert_eq!(vector.len(), tiny::HIDDEN);
        secrets.numbers("vector", &vector);
    };

    let body = json!({"model": "tiny", "input": text}).to_string();
    found(&s.post("/v1/embeddings", &body).json()["data"][0]["embedding"]);
    found(&s.post("/api/embed", &body).json()["embeddings"][0]);
    let body = json!({"model": "tiny", "input": [[53, 19, 43, 31, 37, 11]]}).to_string();
    found(&s.post("/v1/embeddings", &body).json()["data"][0]["embedding"]);
    let args = ["embed", "--parties", &parties, "--model", tiny.dir.to_str().unwrap(), "--text", text, "--text", other];
    let o = home.command(&args).output().unwrap();
    std::fs::write(home.dir.join("log/embed.err"), &o.stderr).unwrap();
    let lines = String::from_utf8(o.stdout).unwrap();
    assert_eq!(lines.lines().count(), 2, "{lines}");
    lines.lines().for_each(|l| found(&serde_json::from_str::<Value>(l).unwrap()["embedding"]));
    // The search knows them where they belong.
    assert!(secrets.within(lines.as_bytes()).iter().any(|what| what.starts_with("vector")));
    // Requests that fail.
    let long = format!("{text} ").repeat(50);
    for body in [json!({"model": "tiny", "input": long}), json!({"model": text, "input": other})] {
        assert!((400..500).contains(&s.post("/v1/embeddings", body.to_string()).status));
    }
    let o = home.command(&[&args[..6], &[long.as_str()]].concat()).output().unwrap();
    assert!(!o.status.success());
    std::fs::write(home.dir.join("log/embed-long.err"), &o.stderr).unwrap();

    // The client's own shares, which its SDK shows for demonstrations.
    let shown = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
        let client = Client::builder().parties(Parties::load(&lane.parties).unwrap()).model(&tiny.dir);
        client.connect().await.unwrap().embed_ids_shown(&[41, 17, 59, 23, 61, 5, 47, 13], VALUES).await.unwrap().1
    });
    assert_eq!((shown.e1.len(), shown.e2.len()), (VALUES, VALUES));
    secrets.share(&shown.e1, shown.bits);
    secrets.share(&shown.e2, shown.bits);
    for party in 0..3 {
        writes_only_under(&home.dir, lane.pid(party));
    }
    keep_metrics(&home, &lane, "before");
    // And where a party is not there.
    lane.kill(0);
    assert!(s.post("/v1/embeddings", json!({"model": "tiny", "input": text}).to_string()).status >= 500);
    keep_metrics(&home, &lane, "after");
    drop(s);
    nothing_was_written(&home, &secrets, 4_000);
}
