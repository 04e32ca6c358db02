//! Where a party computes, over real processes: what is asked for is what is taken, or the party says why not.
#![cfg(feature = "gpu")]

#[allow(dead_code)]
mod common;
#[path = "../src/keys.rs"]
#[allow(dead_code)]
mod keys;
#[path = "../src/local.rs"]
#[allow(dead_code)]
mod local;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{World, embed, on_one_thread};
use local::Lane;
use tacet_client::{Client, cosine};
use tacet_party::config::{BackendKind, Limits, Pool};

#[test]
fn a_party_without_an_adapter_runs_unless_it_must_have_one() {
    let world = World::start(1, Limits::default());
    if !tacet_shaders::adapters().iter().any(|a| a.hardware) {
        for party in 0..3 {
            assert!(world.log(party).contains("backend=\"cpu\""), "{}", world.log(party));
        }
    }
    // As on a machine without a driver: it ends before it takes the address that the running party has.
    let config = world.dir().join("alpha.toml");
    let party = |backend: &str| {
        let mut party = Command::new(env!("CARGO_BIN_EXE_tacet"));
        party.args(["party", "--config"]).arg(&config).args(["--backend", backend]);
        party.env("VK_DRIVER_FILES", "/nonexistent").env("VK_ICD_FILENAMES", "/nonexistent");
        let out = party.output().unwrap();
        (out.status.code(), String::from_utf8(out.stderr).unwrap())
    };
    let (code, text) = party("gpu");
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("no graphics adapter") && text.contains("--backend cpu"), "{text}");
    let (code, text) = party("auto");
    assert!(code == Some(1) && text.contains("in use") && !text.contains("adapter"), "{text}");
    let (code, text) = party("tpu");
    assert!(code == Some(2) && text.contains("auto, cpu or gpu"), "{text}");
    on_one_thread(async { world.check(&embed(&world.client().await).await.unwrap()) });
}

#[test]
fn evaluators_on_an_adapter_answer_as_in_the_clear() {
    let Some(model) = std::env::var_os("TACET_MODEL_DIR").map(PathBuf::from) else {
        println!("skipped: TACET_MODEL_DIR does not name a directory with all-MiniLM-L6-v2");
        return;
    };
    if tacet_shaders::adapters().is_empty() {
        println!("skipped: this machine has no graphics adapter, nor lavapipe");
        return;
    }
    let exe = Path::new(env!("CARGO_BIN_EXE_tacet"));
    let lane = Lane::start_on(exe, &model, Limits::default(), Pool::default(), BackendKind::Gpu).unwrap();
    on_one_thread(async {
        let client = Client::builder().parties(lane.parties.clone()).model(&model).connect().await.unwrap();
        let question = [101, 2129, 2079, 1045, 13184, 2026, 4003, 1029, 102];
        // Padded to 16 rows, whose scores are too few for a whole evaluation, and to 32.
        for (ids, whole) in [(question.to_vec(), 0), (question.repeat(3), 1)] {
            let before = [0, 1].map(|e| lane.metric(e, "tacet_gpu_products_total").unwrap());
            let got = client.embed_ids(&ids).await.unwrap();
            let same = cosine(&got.vector, &client.model().plaintext(&ids).unwrap());
            assert!(same >= 0.999, "cosine {same}");
            for (evaluator, before) in before.into_iter().enumerate() {
                let products = lane.metric(evaluator, "tacet_gpu_products_total").unwrap() - before;
                // Of the shorter text those of the four wide layers a block that are worth a device.
                assert!(products >= 12, "{products}");
                assert_eq!(lane.metric(evaluator, "tacet_gpu_evaluations_total"), Some(whole));
            }
        }
    });
}

#[test]
fn doctor_lists_what_a_party_would_see() {
    let out = Command::new(env!("CARGO_BIN_EXE_tacet")).args(["doctor", "--json"]).output().unwrap();
    let seen: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let details = |name: &str| -> Vec<String> {
        let findings = seen["findings"].as_array().unwrap().iter().filter(|f| f["name"] == name);
        findings.map(|f| f["detail"].as_str().unwrap().to_string()).collect()
    };
    let all = tacet_shaders::adapters();
    for adapter in &all {
        assert!(details("GPU").iter().any(|d| d.starts_with(&adapter.to_string()) && d.contains("MiB")), "{adapter}");
    }
    let backend = details("backend");
    assert!(backend.len() == 1 && backend[0].starts_with("auto takes "), "{backend:?}");
    assert!(all.iter().any(|a| a.hardware) || backend == ["auto takes the CPU"], "{backend:?}");
}
