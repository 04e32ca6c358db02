//! Private against plaintext on real texts, through three real processes: `cargo bench --bench accuracy -- --help`.
//!
//! Plaintext is the original weights in float64. Cosines are of a text's two vectors. An intent is the nearest centroid of
//! plaintext training vectors; both kinds of vector meet the same centroids.

#[path = "../src/fetch.rs"]
#[allow(dead_code)]
mod fetch;
#[path = "../src/hub.rs"]
#[allow(dead_code)]
mod hub;
#[path = "../src/keys.rs"]
#[allow(dead_code)]
mod keys;
#[path = "../src/local.rs"]
#[allow(dead_code)]
mod local;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Parser;
use futures_util::StreamExt;
use indicatif::ProgressBar;
use serde::Serialize;
use tacet_client::{Client, cosine};
use tacet_party::config::Limits;

/// Texts whose cosines are taken, from the start of each file.
const COSINES: [usize; 2] = [200, 100];

#[derive(Parser)]
#[command(about = "Cosine and intent accuracy, private against plaintext")]
struct Args {
    /// Folder with banking77/ and medquad/; data/ in TACET_SHARED if absent
    #[arg(long)]
    data: Option<PathBuf>,
    /// Model directory or name; TACET_MODEL_DIR if absent
    #[arg(long)]
    model: Option<String>,
    /// Test rows to classify, spread evenly over the file
    #[arg(long, default_value_t = 400)]
    rows: usize,
    /// Training rows of each intent that its centroid is made of
    #[arg(long, default_value_t = 20)]
    per_intent: usize,
    /// Texts at once
    #[arg(long, default_value_t = 2)]
    concurrency: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// What `cargo bench` adds
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Serialize)]
struct Cosines {
    texts: usize,
    min: f64,
    mean: f64,
    seconds: f64,
}

#[derive(Serialize)]
struct Intents {
    rows: usize,
    intents: usize,
    per_intent: usize,
    plaintext_accuracy: f64,
    private_accuracy: f64,
    /// Private minus plaintext.
    difference: f64,
    /// Share of rows with the same intent either way.
    agreement: f64,
}

/// `(text, intent)` of every row.
fn rows(file: &Path) -> Result<Vec<(String, String)>> {
    let mut r = csv::Reader::from_path(file).with_context(|| file.display().to_string())?;
    let row = |r: csv::Result<csv::StringRecord>| {
        let r = r?;
        let at = |i: usize| r.get(i).map(str::to_string).with_context(|| format!("{}: two columns", file.display()));
        Ok((at(0)?, at(1)?))
    };
    r.records().map(row).collect()
}

fn questions(file: &Path, n: usize) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let question = |l: &str| {
        let v: serde_json::Value = serde_json::from_str(l)?;
        Ok(v["question"].as_str().context("a line without question")?.to_string())
    };
    text.lines().take(n).map(question).collect()
}

/// Vectors in the clear, on two threads beside the network's.
async fn plaintext(client: &Client, texts: &[String], what: &str) -> Result<Vec<Vec<f64>>> {
    eprintln!("{what}: {} texts in the clear", texts.len());
    let bar = ProgressBar::new(texts.len() as u64);
    let ids = texts.iter().enumerate().map(|(i, t)| Ok(client.tokens(i, t)?)).collect::<Result<Vec<_>>>()?;
    let halves = ids.chunks(ids.len().div_ceil(2).max(1)).map(|half| {
        let (model, half, bar) = (Arc::clone(client.model()), half.to_vec(), bar.clone());
        tokio::task::spawn_blocking(move || {
            half.iter().map(|i| model.plaintext(i)).inspect(|_| bar.inc(1)).collect::<Result<Vec<_>, _>>()
        })
    });
    let mut all = Vec::with_capacity(ids.len());
    for half in halves.collect::<Vec<_>>() {
        all.extend(half.await??);
    }
    bar.finish_and_clear();
    for v in &mut all {
        let norm = v.iter().map(|x| x * x).sum::<f64>().sqrt();
        v.iter_mut().for_each(|x| *x /= norm);
    }
    Ok(all)
}

async fn private(client: &Client, texts: &[String], what: &str) -> Result<Vec<Vec<f64>>> {
    eprintln!("{what}: {} texts privately", texts.len());
    let bar = ProgressBar::new(texts.len() as u64);
    let mut out = Vec::with_capacity(texts.len());
    let mut results = pin!(client.embed_each(texts));
    while let Some(e) = results.next().await {
        out.push(e?.vector);
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(out)
}

async fn cosines(client: &Client, texts: &[String], what: &str) -> Result<Cosines> {
    let started = Instant::now();
    let a = private(client, texts, what).await?;
    let seconds = started.elapsed().as_secs_f64();
    let b = plaintext(client, texts, what).await?;
    let all: Vec<f64> = a.iter().zip(&b).map(|(a, b)| cosine(a, b)).collect();
    let mean = all.iter().sum::<f64>() / all.len() as f64;
    Ok(Cosines { texts: texts.len(), min: all.iter().copied().fold(1.0, f64::min), mean, seconds })
}

fn nearest<'a>(centroids: &'a BTreeMap<String, Vec<f64>>, v: &[f64]) -> &'a str {
    let best = centroids.iter().max_by(|a, b| cosine(a.1, v).total_cmp(&cosine(b.1, v)));
    best.map_or("", |b| b.0)
}

async fn intents(client: &Client, args: &Args, folder: &Path) -> Result<Intents> {
    let mut train: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (text, intent) in rows(&folder.join("train.csv"))? {
        let of = train.entry(intent).or_default();
        if of.len() < args.per_intent {
            of.push(text);
        }
    }
    let test = rows(&folder.join("test.csv"))?;
    let n = args.rows.min(test.len());
    // The file is sorted by intent.
    let test: Vec<&(String, String)> = (0..n).map(|i| &test[i * test.len() / n]).collect();
    let texts: Vec<String> = test.iter().map(|t| t.0.clone()).collect();
    let flat: Vec<String> = train.values().flatten().cloned().collect();
    let mut vectors = plaintext(client, &flat, "training rows").await?.into_iter();
    let mut centroids = BTreeMap::new();
    for (intent, texts) in &train {
        let mut sum = vec![0.0; client.model().config.hidden_size];
        for v in vectors.by_ref().take(texts.len()) {
            sum.iter_mut().zip(v).for_each(|(s, v)| *s += v);
        }
        centroids.insert(intent.clone(), sum);
    }
    let found = |v: &[Vec<f64>]| v.iter().map(|v| nearest(&centroids, v)).collect::<Vec<_>>();
    let plain = plaintext(client, &texts, "test rows").await?;
    let secret = private(client, &texts, "test rows").await?;
    let (plain, secret) = (found(&plain), found(&secret));
    let share = |hits: usize| hits as f64 / n as f64;
    let right = |f: &[&str]| share(f.iter().zip(&test).filter(|(f, t)| **f == t.1).count());
    let (p, s) = (right(&plain), right(&secret));
    Ok(Intents {
        rows: n,
        intents: centroids.len(),
        per_intent: args.per_intent,
        plaintext_accuracy: p,
        private_accuracy: s,
        difference: s - p,
        agreement: share(plain.iter().zip(&secret).filter(|(a, b)| a == b).count()),
    })
}

async fn run(args: Args) -> Result<()> {
    let shared = || Some(PathBuf::from(std::env::var_os("TACET_SHARED")?).join("data"));
    let Some(data) = args.data.clone().or_else(shared) else {
        println!("skipped: neither --data nor TACET_SHARED names a folder with texts");
        return Ok(());
    };
    let (banking, medical) = (data.join("banking77"), data.join("medquad/medquad_sample.jsonl"));
    if !banking.join("test.csv").is_file() || !medical.is_file() {
        println!("skipped: {} has no banking77/test.csv and medquad/medquad_sample.jsonl: --data", data.display());
        return Ok(());
    }
    let name = args.model.clone().or_else(|| std::env::var("TACET_MODEL_DIR").ok());
    let model = fetch::model_dir(name.as_deref()).await?;
    let lane = local::Lane::start(Path::new(env!("CARGO_BIN_EXE_tacet")), &model, Limits::default())?;
    let client = Client::builder().parties(lane.parties.clone()).model(&model).concurrency(args.concurrency);
    let client = client.connect().await?;

    let texts: Vec<String> = rows(&banking.join("test.csv"))?.into_iter().take(COSINES[0]).map(|r| r.0).collect();
    let bank = cosines(&client, &texts, "banking questions").await?;
    let med = cosines(&client, &questions(&medical, COSINES[1])?, "medical questions").await?;
    let intents = intents(&client, &args, &banking).await?;
    if args.json {
        let v = serde_json::json!({ "banking77": bank, "medquad": med, "intents": intents });
        println!("{}", serde_json::to_string(&v)?);
        return Ok(());
    }
    for (name, c) in [("BANKING77", &bank), ("MedQuAD", &med)] {
        println!(
            "{name:<10} cosine to plaintext: smallest {:.6}, mean {:.6} over {} texts, {:.2} s a text",
            c.min,
            c.mean,
            c.texts,
            c.seconds / c.texts as f64
        );
    }
    println!(
        "BANKING77  accuracy over {} rows and {} intents ({} rows a centroid): private {:.4}, plaintext {:.4}, difference {:+.4}, agreement {:.4}",
        intents.rows,
        intents.intents,
        intents.per_intent,
        intents.private_accuracy,
        intents.plaintext_accuracy,
        intents.difference,
        intents.agreement
    );
    Ok(())
}

fn main() -> Result<()> {
    let args = Args::parse();
    if args.rows == 0 || args.per_intent == 0 {
        bail!("--rows and --per-intent are at least 1");
    }
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(run(args))
}
