//! End to end: real processes, real QUIC, real weights, and what happens when something goes wrong.
//!
//! The model comes from `TACET_MODEL_DIR`; without it every test says that it was skipped.

#[path = "../src/keys.rs"]
#[allow(dead_code)]
mod keys;
#[path = "../src/local.rs"]
#[allow(dead_code)]
mod local;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use local::Lane;
use tacet_client::{Client, ClientBuilder, ClientError, cosine};
use tacet_party::config::Limits;

fn tacet(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tacet")).args(args).output().unwrap()
}

fn model() -> Option<PathBuf> {
    let dir = std::env::var_os("TACET_MODEL_DIR").map(PathBuf::from);
    if dir.is_none() {
        println!("skipped: TACET_MODEL_DIR does not name a directory with all-MiniLM-L6-v2");
    }
    dir
}

fn stderr(o: &Output) -> String {
    String::from_utf8_lossy(&o.stderr).into_owned()
}

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let d = std::env::temp_dir().join(format!("tacet-test-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&d);
        std::fs::create_dir_all(&d).unwrap();
        Folder(d)
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let p = self.0.join(name);
        std::fs::write(&p, bytes).unwrap();
        p
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn text(p: &Path) -> &str {
    p.to_str().unwrap()
}

/// One of these lanes at a time: three parties, a client and their deadlines share the machine's cores.
static ALONE: Mutex<()> = Mutex::new(());

fn lane(model: &Path, limits: Limits) -> (Lane, MutexGuard<'static, ()>) {
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    (Lane::start(Path::new(env!("CARGO_BIN_EXE_tacet")), model, limits).unwrap(), alone)
}

fn on_one_thread<F: Future>(f: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(f)
}

fn client(lane: &Lane, model: &Path) -> ClientBuilder {
    Client::builder().parties(lane.parties.clone()).model(model)
}

fn json(o: &Output) -> serde_json::Value {
    serde_json::from_slice(&o.stdout).unwrap_or_else(|e| panic!("{e}: {}", stderr(o)))
}

#[test]
fn texts_of_a_file_agree_with_plaintext_and_costs_with_the_plan() {
    let Some(model) = model() else { return };
    let dir = Folder::new("file");
    let rows = "id,text\n1,How do I freeze my card?\n2,\"A text, with commas\nand a line break\"\n3,\n4,Привет 世界\n";
    let input = dir.file("in.csv", rows.as_bytes());
    let output = dir.0.join("out.jsonl");
    let o = tacet(&[
        "embed",
        "--model",
        text(&model),
        "--local",
        "--check",
        "--input",
        text(&input),
        "--output",
        text(&output),
        "--json",
    ]);
    assert!(o.status.success(), "{}", stderr(&o));
    let summary = json(&o);
    let lines: Vec<serde_json::Value> =
        std::fs::read_to_string(&output).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines.len(), 4);
    for (i, l) in lines.iter().enumerate() {
        assert_eq!(l["index"], i);
        assert_eq!(l["embedding"].as_array().unwrap().len(), 384);
        assert!(l["cosine"].as_f64().unwrap() >= 0.999, "{}", l["cosine"]);
        let tokens = l["tokens"].to_string();
        let plan = tacet(&["plan", text(&model), "--tokens", &tokens, "--json"]);
        let plan: serde_json::Value = serde_json::from_slice(&plan.stdout).unwrap();
        assert_eq!(plan["cost"]["rounds"], l["rounds"]);
        assert_eq!(plan["cost"]["opened_bytes"], l["opened_bytes"]);
        let dealt: u64 = plan["cost"]["dealt_bytes"].as_array().unwrap().iter().map(|v| v.as_u64().unwrap()).sum();
        assert_eq!(dealt, l["dealt_bytes"].as_u64().unwrap());
    }
    assert_eq!(summary["texts"], 4);
    assert_eq!(summary["tokens"], lines.iter().map(|l| l["tokens"].as_u64().unwrap()).sum::<u64>());
    assert!(summary["cosine_min"].as_f64().unwrap() >= 0.999);
    // The empty text is its two special tokens.
    assert_eq!(lines[2]["tokens"], 2);
}

#[test]
fn unusable_texts_are_named() {
    let Some(model) = model() else { return };
    let dir = Folder::new("bad");
    let bad = dir.file("in.csv", b"text\nfine\n\xff\xfe\n");
    let o = tacet(&["embed", "--model", text(&model), "--local", "--input", text(&bad)]);
    assert!(!o.status.success() && stderr(&o).contains("byte 10 is not UTF-8"), "{}", stderr(&o));
    let long = "word ".repeat(600);
    let o = tacet(&["embed", "--model", text(&model), "--local", "--text", &long]);
    assert!(
        !o.status.success() && stderr(&o).contains("602 tokens, but the model takes at most 512"),
        "{}",
        stderr(&o)
    );
    let rows = dir.file("rows.csv", format!("text\nfine\n{long}\n").as_bytes());
    let o = tacet(&["embed", "--model", text(&model), "--local", "--input", text(&rows)]);
    assert!(stderr(&o).contains("text 1: 602 tokens") && o.stdout.is_empty(), "{}", stderr(&o));
}

#[test]
fn a_file_that_cannot_be_read_is_named_with_what_to_do() {
    let dir = Folder::new("unread");
    for (name, bytes, want) in [
        ("a.csv", &b"id,body\n1,x\n"[..], "no column \"text\""),
        ("b.jsonl", b"{\"text\": \"x\"}\n{\"body\": \"y\"}\n", "line 2 has no text"),
        ("c.txt", b"x\n", ".csv or .jsonl"),
        ("d.csv", b"text\n", "nothing to embed"),
    ] {
        let file = dir.file(name, bytes);
        let o = tacet(&["embed", "--local", "--input", text(&file)]);
        assert_eq!(o.status.code(), Some(1));
        assert!(
            stderr(&o).contains(want) && (want.starts_with("nothing") || stderr(&o).contains(name)),
            "{}",
            stderr(&o)
        );
    }
}

#[test]
fn a_wrong_command_line_has_status_two() {
    for args in [
        &["embed", "--text", "x"][..],
        &["embed", "--local"],
        &["embed", "--local", "--text", "x", "--parties", "p.toml"],
        &["embed", "--local", "--text", "x", "--json"],
        &["embed", "--local", "--text", "x", "--concurrency", "0"],
        &["plan", "--tokens", "many"],
        &["nothing"],
    ] {
        let o = tacet(args);
        assert_eq!(o.status.code(), Some(2), "{args:?}: {}", stderr(&o));
    }
    for command in ["demo", "party", "embed", "plan", "doctor"] {
        let o = tacet(&[command, "--help"]);
        assert!(o.status.success() && String::from_utf8_lossy(&o.stdout).contains(&format!("  tacet {command}")));
    }
}

#[test]
fn the_demonstration_reports_every_key() {
    let Some(model) = model() else { return };
    let o = tacet(&["demo", "--model", text(&model), "--json", "--text", "My card was stolen", "--text", ""]);
    assert!(o.status.success(), "{}", stderr(&o));
    let v = json(&o);
    for key in ["cosine_min", "sentences", "tokens", "rounds", "opened_bytes", "dealt_bytes", "total_s", "online_s"] {
        assert!(v[key].is_number(), "{key}");
    }
    assert!(v["cosine_min"].as_f64().unwrap() >= 0.999);
    assert_eq!((&v["sentences"], &v["tokens"], &v["rounds"]), (&2.into(), &8.into(), &103.into()));
    let parties = v["parties"].as_array().unwrap();
    let mut pids: Vec<u64> = parties.iter().map(|p| p["pid"].as_u64().unwrap()).collect();
    pids.dedup();
    assert_eq!(pids.len(), 3);
    for (p, role) in parties.iter().zip(["e1", "e2", "dealer"]) {
        assert!(p["role"] == role && p["rss_mb"].as_f64().unwrap() > 1.0, "{p}");
    }
}

#[test]
fn a_plan_predicts_seconds() {
    let Some(model) = model() else { return };
    let plan = |rtt: &str| {
        let args =
            ["plan", text(&model), "--tokens", "16", "--rtt", rtt, "--bandwidth", "1Gbit", "--gmacs", "20", "--json"];
        json(&tacet(&args))
    };
    let (near, far) = (plan("1ms"), plan("1s"));
    assert_eq!(near["rates"]["macs"], 20e9);
    let time = |v: &serde_json::Value, key: &str| v["times"][key].as_f64().unwrap();
    for key in ["compute_s", "dealing_s", "online_network_s", "dealing_network_s"] {
        assert!(time(&near, key) > 0.0, "{key}");
    }
    assert!(time(&near, "dealt_beside_s") >= time(&near, "dealt_ahead_s"));
    // All but what messages cost here, which each run measures, is the network's.
    let way = |v: &serde_json::Value| {
        let (rates, cost) = (&v["rates"], &v["cost"]);
        let number = |v: &serde_json::Value| v.as_f64().unwrap();
        let bytes = number(&cost["opened_bytes"]) * number(&rates["byte_s"]).max(8e-9);
        time(v, "online_network_s") - number(&cost["rounds"]) * number(&rates["round_s"]) - bytes
    };
    let rounds = near["cost"]["rounds"].as_f64().unwrap();
    assert!((way(&far) - way(&near) - 0.999 / 2.0 * rounds).abs() < 1e-6);
}

#[test]
fn several_sessions_at_once_keep_their_order_and_wait_for_room() {
    let Some(model) = model() else { return };
    let (lane, _alone) = lane(&model, Limits { sessions: 2, ..Limits::default() });
    // Each party started over with an allocator that keeps memory.
    for party in lane.report() {
        let settings = std::fs::read(format!("/proc/{}/environ", party.pid)).unwrap();
        assert!(settings.split(|b| *b == 0).any(|v| v.starts_with(b"MIMALLOC_PURGE_DELAY=")));
    }
    on_one_thread(async {
        let texts =
            ["the longest of all of these texts by far, so that others overtake it", "b", "", "fourth text", "e e e"];
        let c = client(&lane, &model).concurrency(5).connect().await.unwrap();
        let private = c.embed(&texts).await.unwrap();
        for (i, (t, e)) in texts.iter().zip(&private).enumerate() {
            let plain = c.model().plaintext(&c.tokens(i, t).unwrap()).unwrap();
            assert!(cosine(&e.vector, &plain) >= 0.999, "{i}");
            assert!(!format!("{e:?}").contains(&e.vector[0].to_string()));
        }
        // Without waiting, the refused text is named; the others' sessions end with the call.
        let hasty = client(&lane, &model).concurrency(5).retry_busy(false).connect().await.unwrap();
        let e = hasty.embed(&texts).await.unwrap_err();
        assert!(e.index().is_some() && matches!(e.cause(), ClientError::Refused { code: 2, .. }), "{e}");
        // A deadline bounds the waiting too.
        let short = client(&lane, &model).deadline(Duration::from_millis(1)).connect().await.unwrap();
        let e = short.embed(&["x"]).await.unwrap_err();
        assert!(matches!(e.cause(), ClientError::Deadline(_)), "{e}");
        let long = "word ".repeat(600);
        let e = c.embed(&["fine", &long]).await.unwrap_err();
        assert!(matches!(e, ClientError::TooLong { index: 1, tokens: 602, limit: 512 }), "{e}");
        // What the calls above left behind is cleared away.
        assert_eq!(c.embed(&["last"]).await.unwrap()[0].vector.len(), 384);
    });
}

#[test]
fn a_party_that_dies_is_the_one_that_is_named() {
    let Some(model) = model() else { return };
    for (victim, name) in [(0, "alpha"), (2, "gamma")] {
        let (mut lane, _alone) = lane(&model, Limits::default());
        on_one_thread(async {
            let c = client(&lane, &model).connect().await.unwrap();
            let words = "card ".repeat(120);
            let texts = [words.as_str()];
            let session = c.embed(&texts);
            let kill = async {
                tokio::time::sleep(Duration::from_millis(300)).await;
                lane.kill(victim);
                std::future::pending::<()>().await;
            };
            let e = tokio::select! { r = session => r.unwrap_err(), () = kill => unreachable!() };
            assert_eq!((e.party(), e.index()), (Some(name), Some(0)), "{e}");
        });
    }
}

#[test]
fn doctor_says_of_each_party_what_is_wrong_with_it() {
    let Some(model) = model() else { return };
    let dir = Folder::new("doctor");
    let (lane, _alone) = lane(&model, Limits::default());
    let examine = |name: &str, change: &dyn Fn(&mut tacet_client::Parties)| {
        let mut p = lane.parties.clone();
        change(&mut p);
        let file = dir.file(name, toml::to_string(&p).unwrap().as_bytes());
        let o = tacet(&["doctor", "--model", text(&model), "--parties", text(&file), "--json"]);
        let v = json(&o);
        assert_eq!(v["ok"].as_bool().unwrap(), o.status.success());
        assert!(!String::from_utf8_lossy(&o.stdout).contains(&p.token) && !stderr(&o).contains(&p.token));
        let verdicts: Vec<String> =
            v["parties"].as_array().unwrap().iter().map(|p| p["verdict"].as_str().unwrap().to_string()).collect();
        (o.status.code(), verdicts, v)
    };
    let wide = |v: &serde_json::Value| {
        v["parties"].as_array().unwrap().iter().all(|p| p["packet"].as_u64().is_some_and(|n| n > 1452))
    };
    // How large packets may be is found out within a second, or on a slow machine the next time.
    let end = Instant::now() + Duration::from_secs(60);
    let (status, verdicts, v) = loop {
        let seen = examine("fine.toml", &|_| {});
        if wide(&seen.2) || Instant::now() > end {
            break seen;
        }
    };
    assert_eq!((status, verdicts), (Some(0), vec!["agrees".to_string(); 3]));
    assert!(v["query_s"].is_number());
    assert!(wide(&v), "{}", v["parties"]);

    let (status, verdicts, v) = examine("wrong.toml", &|p| {
        p.party[1].certificate = p.party[0].certificate.clone();
        p.party[2].addr = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    });
    assert_eq!(
        (status, verdicts.iter().map(String::as_str).collect()),
        (Some(1), vec!["agrees", "wrong_certificate", "unreachable"])
    );
    assert!(v["query_s"].is_null());

    let (status, verdicts, v) = examine("token.toml", &|p| p.token = "guess".into());
    assert_eq!((status, verdicts), (Some(1), vec!["refused".to_string(); 3]));
    assert!(v["parties"][0]["detail"].as_str().unwrap().contains("token"), "{v}");
}

#[test]
fn a_partys_configuration_is_refused_by_file_and_field() {
    let dir = Folder::new("party");
    let peer = |name: &str, role: &str| {
        format!("[[peer]]\nname = {name:?}\nrole = {role:?}\naddr = \"127.0.0.1:9\"\ncertificate = \"{name}.crt\"\n")
    };
    let head = "name = \"alpha\"\nrole = \"e1\"\nlisten = \"127.0.0.1:0\"\nmodel = \".\"\ncertificate = \"alpha.crt\"\n\
                key = \"alpha.key\"\nseal_key = \"alpha.seal\"\nclients = \"clients.toml\"\n";
    let whole = format!("{head}{}{}", peer("beta", "e2"), peer("gamma", "dealer"));
    dir.file("alpha.crt", b"");
    for (name, config, want) in [
        ("field.toml", whole.replace("listen", "lisen"), "unknown field `lisen`"),
        ("address.toml", whole.replace("\"127.0.0.1:0\"", "\"here\""), "listen"),
        ("lane.toml", whole.replace("dealer", "e2"), "role"),
        ("key.toml", whole, "key = "),
    ] {
        let o = tacet(&["party", "--config", text(&dir.file(name, config.as_bytes()))]);
        assert_eq!(o.status.code(), Some(1));
        assert!(stderr(&o).contains(name) && stderr(&o).contains(want), "{}", stderr(&o));
    }
}

#[test]
fn keys_are_private_and_tokens_are_stored_as_hashes() {
    use std::os::unix::fs::PermissionsExt;
    let dir = Folder::new("keys");
    let o = tacet(&["keys", "party", "--name", "alpha", "--dir", text(&dir.0)]);
    assert!(o.status.success() && String::from_utf8_lossy(&o.stdout).contains("seal_public = "), "{}", stderr(&o));
    for secret in ["alpha.key", "alpha.seal"] {
        assert_eq!(std::fs::metadata(dir.0.join(secret)).unwrap().permissions().mode() & 0o777, 0o600);
    }
    let again = tacet(&["keys", "party", "--name", "alpha", "--dir", text(&dir.0)]);
    assert!(!again.status.success() && stderr(&again).contains("not overwriting"), "{}", stderr(&again));
    let clients = dir.0.join("clients.toml");
    let o = tacet(&["keys", "client", "--name", "clinic", "--clients", text(&clients)]);
    let token = String::from_utf8(o.stdout).unwrap().trim().to_string();
    let stored = std::fs::read_to_string(&clients).unwrap();
    assert!(token.len() == 64 && stored.contains("clinic") && !stored.contains(&token));
    assert_eq!(std::fs::metadata(&clients).unwrap().permissions().mode() & 0o777, 0o600);
    let o = tacet(&["keys", "client", "--name", "clinic", "--clients", text(&clients)]);
    assert!(o.status.code() == Some(1) && stderr(&o).contains("has a token already"), "{}", stderr(&o));
    assert_eq!(std::fs::read_to_string(&clients).unwrap(), stored);
    std::fs::set_permissions(&clients, std::fs::Permissions::from_mode(0o644)).unwrap();
    let o = tacet(&["keys", "client", "--name", "bank", "--clients", text(&clients)]);
    assert!(o.status.success(), "{}", stderr(&o));
    assert_eq!(std::fs::metadata(&clients).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(std::fs::read_dir(&dir.0).unwrap().count(), 4);
}
