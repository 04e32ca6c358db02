//! End to end: real processes, real QUIC, real weights, and what happens when something goes wrong.
//!
//! The model comes from `TACET_MODEL_DIR`; without it every test says that it was skipped.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

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
    ]);
    assert!(o.status.success(), "{}", stderr(&o));
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
    let o = tacet(&["embed", "--model", text(&model), "--local", "--input", text(&bad), "--column", "nope"]);
    assert!(!o.status.success());
    let o = tacet(&["embed", "--model", text(&model), "--text", "x"]);
    assert!(!o.status.success() && stderr(&o).contains("--parties"), "{}", stderr(&o));
}

#[test]
fn the_demonstration_reports_every_key() {
    let Some(model) = model() else { return };
    let o = tacet(&["demo", "--model", text(&model), "--json"]);
    assert!(o.status.success(), "{}", stderr(&o));
    let v: serde_json::Value = serde_json::from_slice(&o.stdout).unwrap();
    for key in ["cosine_min", "sentences", "tokens", "rounds", "opened_bytes", "dealt_bytes", "total_s", "online_s"] {
        assert!(v[key].is_number(), "{key}");
    }
    assert!(v["cosine_min"].as_f64().unwrap() >= 0.999);
    let mut pids: Vec<u64> = v["parties"].as_array().unwrap().iter().map(|p| p["pid"].as_u64().unwrap()).collect();
    pids.dedup();
    assert_eq!(pids.len(), 3);
    assert_eq!(v["rounds"], 157);
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
}
