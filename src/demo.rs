//! `tacet demo`: three local parties, real sentences, and what each party saw.

use std::time::Instant;

use anyhow::Result;
use clap::Args as ClapArgs;
use serde_json::json;
use tacet_client::{Client, Embedding, Glimpse, Stats, cosine};
use tacet_party::config::BackendKind;

use crate::fetch;
use crate::local::PartyReport;
use crate::parties;

const TEXTS: [&str; 6] = [
    "What are the symptoms of diabetes?",
    "How is high blood sugar treated in adults?",
    "My child has had a fever for three days, should I worry?",
    "I lost my credit card, how do I block it?",
    "Please freeze my bank card, it was stolen.",
    "Why was my transfer declined yesterday?",
];

/// Values of the first text that are shown beside their shares.
const SHOWN: usize = 4;

pub const EXAMPLES: &str = "\
Examples:
  tacet demo
  tacet demo --text \"My card was stolen\" --text \"How is diabetes treated?\"
  tacet demo --json";

#[derive(ClapArgs)]
pub struct Args {
    /// A text of your own; may be given several times. Without it, six questions
    #[arg(long)]
    text: Vec<String>,
    /// Model directory or name
    #[arg(long)]
    model: Option<String>,
    /// Where the parties of this machine compute: auto, cpu or gpu
    #[arg(long, default_value = "auto")]
    backend: BackendKind,
    /// Print one JSON object instead of tables
    #[arg(long)]
    json: bool,
}

/// Sums over all texts.
struct Totals {
    cosine_min: f64,
    tokens: usize,
    rounds: u32,
    opened_bytes: u64,
    dealt_bytes: u64,
    total_s: f64,
    online_s: f64,
    dealing_s: f64,
    /// Texts whose dealing began before their query.
    dealt_ahead: usize,
}

/// Runs the demonstration.
pub async fn run(args: Args) -> Result<()> {
    let model = fetch::model_dir(args.model.as_deref()).await?;
    let texts: Vec<String> = if args.text.is_empty() { TEXTS.map(String::from).to_vec() } else { args.text };
    if !args.json {
        println!("Starting three party processes on loopback; each has its own identity and sees only its share.\n");
    }
    let lane = parties::linked(parties::launch(&model, args.backend)?).await?;
    let client = Client::builder().parties(lane.parties.clone()).model(&model).connect().await?;
    let ids = texts.iter().enumerate().map(|(i, t)| Ok(client.tokens(i, t)?)).collect::<Result<Vec<_>>>()?;
    // One after another, so that times of different texts do not overlap.
    let started = Instant::now();
    let (first, glimpse) = client.embed_ids_shown(&ids[0], SHOWN).await?;
    let mut private = vec![first];
    for ids in &ids[1..] {
        private.push(client.embed_ids(ids).await?);
    }
    let total_s = started.elapsed().as_secs_f64();
    let plain = ids.iter().map(|i| Ok(client.model().plaintext(i)?)).collect::<Result<Vec<_>>>()?;
    let sum = |f: fn(&Stats) -> f64| private.iter().map(|e| f(&e.stats)).sum::<f64>();
    let count = |f: fn(&Stats) -> u64| private.iter().map(|e| f(&e.stats)).sum::<u64>();
    let totals = Totals {
        cosine_min: private.iter().zip(&plain).map(|(a, b)| cosine(&a.vector, b)).fold(1.0, f64::min),
        tokens: ids.iter().map(Vec::len).sum(),
        rounds: private.iter().map(|e| e.stats.rounds).max().unwrap_or(0),
        opened_bytes: count(|s| s.opened_bytes),
        dealt_bytes: count(|s| s.dealt_bytes),
        total_s,
        online_s: sum(|s| s.online_s),
        dealing_s: sum(|s| s.dealing_s),
        dealt_ahead: private.iter().filter(|e| e.stats.dealt_ahead).count(),
    };
    let parties = lane.report();
    if args.json {
        let t = &totals;
        let v = json!({
            "cosine_min": t.cosine_min, "sentences": texts.len(), "tokens": t.tokens, "rounds": t.rounds,
            "opened_bytes": t.opened_bytes, "dealt_bytes": t.dealt_bytes, "total_s": t.total_s, "online_s": t.online_s,
            "dealing_s": t.dealing_s, "dealt_ahead": t.dealt_ahead, "parties": parties,
        });
        crate::print(&format!("{}\n", serde_json::to_string(&v)?))?;
        return Ok(());
    }
    similarities(&texts, &private, &plain);
    println!("\nSmallest cosine of a private vector to its plaintext: {:.6}\n", totals.cosine_min);
    shares(&glimpse, &parties);
    costs(&texts, &totals, &parties);
    Ok(())
}

fn similarities(texts: &[String], private: &[Embedding], plain: &[Vec<f64>]) {
    println!("Cosine similarity to each text before, private (plaintext):");
    for (i, a) in private.iter().enumerate() {
        let pair =
            |j: usize| format!("{:6.3} ({:6.3})", cosine(&a.vector, &private[j].vector), cosine(&plain[i], &plain[j]));
        println!("  {}  {}", i + 1, texts[i]);
        if i > 0 {
            println!("     {}", (0..i).map(pair).collect::<Vec<_>>().join("  "));
        }
    }
}

fn shares(g: &Glimpse, parties: &[PartyReport]) {
    let digits = g.bits.div_ceil(4) as usize;
    let words = |w: &[u64]| w.iter().map(|w| format!("{w:0digits$x}")).collect::<Vec<_>>().join(" ");
    let values: Vec<String> = g.values.iter().map(|v| format!("{v:>digits$.4}")).collect();
    println!("The first {} values of text 1 as it enters the model, and what each party decrypts of them:", SHOWN);
    println!("  {:<16}{}   true values", "client", values.join(" "));
    for (p, held) in parties.iter().zip([words(&g.e1), words(&g.e2), "nothing".into()]) {
        println!("  {:<16}{held}", format!("{} ({:?})", p.name, p.role));
    }
    println!("Each row of words is uniform by itself; the value is the sum of both rows modulo 2^{}.", g.bits);
}

fn costs(texts: &[String], t: &Totals, parties: &[PartyReport]) {
    println!(
        "\n{} texts, {} tokens, {} rounds each; {:.1} MB opened each way, {:.1} MB dealt",
        texts.len(),
        t.tokens,
        t.rounds,
        t.opened_bytes as f64 / 1e6,
        t.dealt_bytes as f64 / 1e6
    );
    println!(
        "{:.2} s in total: online {:.2} s (evaluators); dealing {:.2} s: {} texts ahead of the query, {} while it ran",
        t.total_s,
        t.online_s,
        t.dealing_s,
        t.dealt_ahead,
        texts.len() - t.dealt_ahead
    );
    for p in parties {
        println!("  {} ({:?}): process {}, {:.0} MB", p.name, p.role, p.pid, p.rss_mb);
    }
}
