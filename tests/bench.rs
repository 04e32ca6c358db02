//! `tacet bench` reports every figure that it promises, and counts what the plan says.

#[path = "common/processes.rs"]
#[allow(dead_code)]
mod processes;
#[path = "common/tiny.rs"]
#[allow(dead_code)]
mod tiny;

use std::path::Path;

use processes::{Home, decoder};
use serde_json::Value;
use tacet_protocol::wire::announced;
use tiny::Tiny;

const PHASES: [&str; 7] = [
    "computing_s",
    "computing_processor_s",
    "dealer_wait_s",
    "peer_wait_s",
    "dealing_s",
    "dealing_processor_s",
    "room_wait_s",
];
const TIMES: [&str; 8] = [
    "compute_s",
    "dealing_s",
    "online_network_s",
    "dealing_network_s",
    "dealt_ahead_s",
    "dealt_beside_s",
    "total_ahead_s",
    "total_beside_s",
];
const RATES: [&str; 8] =
    ["macs", "dealing", "gates", "round_s", "round_processor_s", "byte_s", "byte_processor_s", "dealt_processor_s"];

fn tacet(home: &Home, args: &[&str]) -> String {
    let o = home.command(args).output().unwrap();
    assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
    String::from_utf8(o.stdout).unwrap()
}

fn json(home: &Home, args: &[&str]) -> Value {
    serde_json::from_str(&tacet(home, &[args, &["--json"]].concat())).unwrap()
}

fn numbers(v: &Value, keys: &[&str]) {
    for key in keys {
        assert!(v[key].as_f64().is_some_and(|n| n.is_finite() && n >= 0.0), "{key} of {v}");
    }
}

fn query(v: &Value) {
    numbers(v, &["total_s", "online_s", "dealing_s", "peer_wait_per_round_s", "over_plain"]);
    numbers(&v["phases"], &PHASES);
    let at = |key: &str| v["phases"][key].as_f64().unwrap();
    assert!(at("computing_s") > 0.0 && at("computing_processor_s") > 0.0 && at("peer_wait_s") > 0.0, "{v}");
    assert!(at("dealing_s") > 0.0 && at("dealing_processor_s") > 0.0, "{v}");
}

fn planned(home: &Home, dir: &Path, more: &[&str]) -> Value {
    json(home, &[&["plan", dir.to_str().unwrap()], more].concat())
}

#[test]
fn an_encoders_figures_are_all_there() {
    let (home, tiny) = (Home::new(), Tiny::new(1));
    let dir = tiny.dir.to_str().unwrap();
    let v = json(&home, &["bench", "--model", dir, "--tokens", "5", "--repeat", "2", "--rtt", "2ms"]);
    numbers(&v, &["tokens", "padded", "cores", "rtt_s", "bandwidth_bytes_per_s", "loss", "mtu", "plain_f32_s"]);
    numbers(&v["predicted"], &TIMES);
    numbers(&v["rates"], &RATES);
    for key in ["dealt_beside", "dealt_ahead"] {
        query(&v[key]);
        // The emulated way is in what an evaluator waits for: it cannot be shorter.
        assert!(v[key]["peer_wait_per_round_s"].as_f64().unwrap() >= 0.0005, "{v}");
        if cfg!(target_os = "linux") {
            let processes = v[key]["processor_s"].as_array().unwrap();
            assert!(processes.len() == 3 && processes.iter().all(|s| s.as_f64().unwrap() > 0.0), "{v}");
        }
    }
    let plan = planned(&home, &tiny.dir, &["--tokens", "8"]);
    assert_eq!((&v["cost"], &v["padded"]), (&plan["cost"], &8.into()));
    let far = planned(&home, &tiny.dir, &["--tokens", "8", "--rtt", "40ms", "--bandwidth", "100Mbit"]);
    for (plan, least) in [(&plan, 0.0), (&far, 0.02 * plan["cost"]["rounds"].as_f64().unwrap())] {
        for key in ["times", "times_shared"] {
            numbers(&plan[key], &TIMES);
            assert!(plan[key]["total_ahead_s"].as_f64().unwrap() > least, "{plan}");
        }
    }
    for party in v["parties"].as_array().unwrap() {
        assert!(party["backend"].as_str().is_some_and(|b| !b.is_empty()), "{party}");
    }
}

#[test]
fn a_decoders_figures_are_all_there_and_bytes_are_counted_by_kind() {
    let home = Home::new();
    let Some(dir) = decoder() else { return };
    let model = dir.to_str().unwrap();
    let v = json(&home, &["bench", "--model", model, "--tokens", "8", "--decode", "3", "--repeat", "1"]);
    let g = &v["generation"];
    numbers(g, &["prefill_s", "tokens_per_s", "rounds_per_step"]);
    numbers(&v, &["plain_f32_s", "plain_f32_step_s"]);
    numbers(&v["predicted_step"], &TIMES);
    for key in ["prefill", "step", "step_ahead"] {
        query(&g[key]);
    }
    numbers(&g["step"], &["mean_total_s"]);
    // The prompt, a step that tells what its dealing took, and three more.
    let prompt = planned(&home, &dir, &["--tokens", "8"]);
    let steps = [8, 9, 10, 11].map(|past| planned(&home, &dir, &["--step", "--tokens", &past.to_string()]));
    let sum = |of: &dyn Fn(&Value) -> u64| of(&prompt) + steps.iter().map(of).sum::<u64>();
    let dealt = |p: &Value| p["cost"]["dealt_bytes"].as_array().unwrap().iter().map(|b| b.as_u64().unwrap()).sum();
    assert_eq!(g["opened_bytes"], sum(&|p| p["cost"]["opened_bytes"].as_u64().unwrap()));
    assert_eq!(g["dealt_bytes"], sum(&dealt));
    assert_eq!((&g["announced_bytes"], &g["spent"]["steps"]), (&(5 * announced()).into(), &5.into()));
    assert_eq!(g["rounds_per_step"], steps[1]["cost"]["rounds"]);
    let text = tacet(&home, &["bench", "--model", model, "--tokens", "8", "--decode", "3", "--repeat", "1"]);
    for word in [
        "prompt",
        "step, ahead",
        "computing",
        "for room",
        "bytes announced",
        "tokens/s (predicted",
        "over plain",
        "computes on",
    ] {
        assert!(text.contains(word), "{word} in {text}");
    }
}
