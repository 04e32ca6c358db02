//! `tacet demo`: three local parties, real sentences, and what each party saw.

use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use tacet_client::Client;
use tacet_party::config::{Limits, hex};

use crate::local::Lane;

const TEXTS: [&str; 6] = [
    "What are the symptoms of diabetes?",
    "How is high blood sugar treated in adults?",
    "My child has had a fever for three days, should I worry?",
    "I lost my credit card, how do I block it?",
    "Please freeze my bank card, it was stolen.",
    "Why was my transfer declined yesterday?",
];

/// Cosine of two vectors.
pub fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// Runs the demonstration.
pub async fn run(model: &Path, json: bool) -> Result<()> {
    if !json {
        println!("Starting three party processes on loopback; each has its own identity and sees only its share.\n");
    }
    let lane = Lane::start(&std::env::current_exe()?, model, Limits::default())?;
    let client = Client::connect(&lane.parties, model).await?;
    let started = Instant::now();
    let private = client.embed(&TEXTS).await?;
    let total_s = started.elapsed().as_secs_f64();
    let plain: Vec<Vec<f64>> = TEXTS
        .iter()
        .enumerate()
        .map(|(i, t)| Ok(client.model().plaintext(&client.tokens(i, t)?)?))
        .collect::<Result<_>>()?;
    let cosine_min = private.iter().zip(&plain).map(|(a, b)| cosine(&a.vector, b)).fold(1.0, f64::min);
    let sum = |f: fn(&tacet_client::Stats) -> f64| private.iter().map(|e| f(&e.stats)).sum::<f64>();
    let (online_s, dealing_s) = (sum(|s| s.online_s), sum(|s| s.dealing_s));
    let (opened, dealt, tokens) =
        (sum(|s| s.opened_bytes as f64), sum(|s| s.dealt_bytes as f64), sum(|s| s.tokens as f64));
    let rounds = private.iter().map(|e| e.stats.rounds).max().unwrap_or(0);
    let parties = lane.report();
    if json {
        let v = serde_json::json!({
            "cosine_min": cosine_min, "sentences": TEXTS.len(), "tokens": tokens as u64, "rounds": rounds,
            "opened_bytes": opened as u64, "dealt_bytes": dealt as u64, "total_s": total_s, "online_s": online_s,
            "dealing_s": dealing_s, "parties": parties,
        });
        println!("{}", serde_json::to_string(&v)?);
        return Ok(());
    }
    println!("Cosine similarity of each pair, private (plaintext):");
    for (i, a) in private.iter().enumerate() {
        let row: Vec<String> = (0..i)
            .map(|j| format!("{:6.3} ({:6.3})", cosine(&a.vector, &private[j].vector), cosine(&plain[i], &plain[j])))
            .collect();
        println!("  {}  {}\n     {}", i + 1, TEXTS[i], row.join("  "));
    }
    println!("\nSmallest cosine of a private vector to its plaintext: {cosine_min:.6}");
    println!("\nWhat each party received of the first text (sealed; the dealer receives nothing of it):");
    for (name, bytes) in &private[0].stats.seen {
        println!("  {name:<6} {}", if bytes.is_empty() { "-".into() } else { format!("{} ..", hex(bytes)) });
    }
    println!(
        "\n{} texts, {tokens} tokens, {rounds} rounds each; {:.1} MB opened each way, {:.1} MB dealt",
        TEXTS.len(),
        opened / 1e6,
        dealt / 1e6
    );
    println!("{total_s:.2} s in total: evaluators {online_s:.2} s, the dealer beside them {dealing_s:.2} s");
    for p in parties {
        println!("  party {:?}: process {}, {:.0} MB", p.role, p.pid, p.rss_mb);
    }
    Ok(())
}
