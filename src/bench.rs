//! `tacet bench`: what a model takes on this machine, measured over three real parties, beside what was predicted.

use std::fmt::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Args as ClapArgs;
use serde::Serialize;
use tacet_client::generate::{Decoder, Positions};
use tacet_client::{Client, Spent, Stats};
use tacet_party::config::{BackendKind, Limits, Pool};
use tacet_party::plans::Plans;
use tacet_protocol::model::is_encoder;
use tacet_protocol::plan::Keep;
use tacet_protocol::program::Cost;
use tacet_protocol::query::padded;

use crate::local::{Lane, PartyReport};
use crate::parties::linked;
use crate::plain;
use crate::plan::{bandwidth, duration};
use crate::rates::{Rates, Times};
use crate::relay::{self, Link};
use crate::shape::{Checkpoint, Shape};
use crate::{fetch, print};

pub const EXAMPLES: &str = "\
Examples:
  tacet bench --tokens 128                                    # all-MiniLM-L6-v2
  tacet bench --shape gpt2 --tokens 32 --decode 32 --json
  tacet bench --tokens 32 --rtt 40ms --bandwidth 100Mbit      # three parties far apart

Three parties, each a process of its own, and the client share this machine. `dealt beside` is a query whose randomness is
dealt while it runs, `dealt ahead` one that found it there: the online time; `from disk` one that found it in the evaluators'
spools. Shapes have random weights.";

#[derive(ClapArgs)]
pub struct Args {
    /// Model directory or name; all-MiniLM-L6-v2 if absent
    #[arg(long, value_name = "DIR", conflicts_with = "shape")]
    model: Option<String>,
    /// A known shape with random weights
    #[arg(long, value_enum)]
    shape: Option<Shape>,
    /// Tokens of a text or prompt
    #[arg(long, value_name = "N", default_value_t = 128)]
    tokens: usize,
    /// Of a decoder, tokens to add
    #[arg(long, value_name = "N", default_value_t = 32)]
    decode: usize,
    /// Queries of each kind; the median is reported
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    repeat: u16,
    /// Of an encoder, measure what is dealt ahead from disk too
    #[arg(long)]
    spool: bool,
    /// Where the parties compute products: auto, cpu or gpu
    #[arg(long, default_value = "auto")]
    backend: BackendKind,
    /// Emulate this round-trip time between the parties, such as 1ms
    #[arg(long, value_name = "TIME")]
    rtt: Option<String>,
    /// Emulate this bandwidth between each two parties, such as 1Gbit
    #[arg(long, value_name = "RATE")]
    bandwidth: Option<String>,
    /// Emulate this share of lost packets
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    loss: f64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Medians of several queries, in seconds.
#[derive(Serialize)]
struct Query {
    /// At the client.
    total_s: f64,
    /// At the slower evaluator.
    online_s: f64,
    /// At the dealer.
    dealing_s: f64,
}

#[derive(Serialize)]
struct Generation {
    /// From the prompt's tokens to the first logits.
    prefill_s: f64,
    tokens_per_s: f64,
    /// Of prompt and steps.
    spent: Spent,
}

#[derive(Serialize)]
struct Report {
    model: String,
    tokens: usize,
    padded: usize,
    processor: String,
    cores: usize,
    rtt_s: Option<f64>,
    bandwidth_bytes_per_s: Option<f64>,
    cost: Cost,
    predicted: Times,
    #[serde(skip_serializing_if = "Option::is_none")]
    dealt_beside: Option<Query>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dealt_ahead: Option<Query>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dealt_ahead_from_disk: Option<Query>,
    #[serde(skip_serializing_if = "Option::is_none")]
    generation: Option<Generation>,
    /// One forward pass of the same matrices in f32, in the clear, on one thread.
    plain_f32_s: f64,
    parties: Vec<PartyReport>,
}

/// Measures and prints.
pub async fn run(args: Args) -> Result<()> {
    let link = link(&args)?;
    let (_checkpoint, dir, name) = match args.shape {
        Some(s) => {
            eprintln!("writing random weights");
            let c = Checkpoint::write(s)?;
            let (dir, name) = (c.dir().to_path_buf(), format!("{s:?} shape, random weights"));
            (Some(c), dir, name)
        }
        None => {
            let dir = fetch::model_dir(args.model.as_deref()).await?;
            let name = dir.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
            (None, dir, name)
        }
    };
    let Some(length) = padded(args.tokens) else { bail!("--tokens {} is more than a text may have", args.tokens) };
    eprintln!("planning");
    let (plans, _) = Plans::load(&dir, Keep::Weights)?;
    let cost = plans.first(length)?.cost();
    let rates = Rates::measure(&plans.first(8)?, None)?;
    // What parties on one machine and no emulated network have between them.
    let between = link.unwrap_or(Link { rtt: Duration::from_micros(100), bandwidth: 1e9, loss: 0.0 });
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let predicted = rates.predict(&cost, between.rtt.as_secs_f64(), between.bandwidth, Some(cores));
    // The weights of a large model leave no room for what follows.
    drop(plans);
    let plain_f32_s = plain::forward(&dir, length)?;
    let mut r = Report {
        model: name,
        tokens: args.tokens,
        padded: length,
        processor: processor(),
        cores,
        rtt_s: link.map(|l| l.rtt.as_secs_f64()),
        bandwidth_bytes_per_s: link.map(|l| l.bandwidth),
        cost,
        predicted,
        dealt_beside: None,
        dealt_ahead: None,
        dealt_ahead_from_disk: None,
        generation: None,
        plain_f32_s,
        parties: Vec::new(),
    };
    let repeat = usize::from(args.repeat);
    if is_encoder(&dir) {
        let (beside, _) = embed(&dir, args.tokens, repeat, (link, args.backend), Dealt::Beside).await?;
        let (ahead, parties) = embed(&dir, args.tokens, repeat, (link, args.backend), Dealt::Ahead).await?;
        (r.dealt_beside, r.dealt_ahead, r.parties) = (Some(beside), Some(ahead), parties);
        if args.spool {
            let (disk, _) = embed(&dir, args.tokens, repeat, (link, args.backend), Dealt::FromDisk).await?;
            r.dealt_ahead_from_disk = Some(disk);
        }
    } else {
        let (generation, parties) = generate(&dir, args.tokens, args.decode, (link, args.backend)).await?;
        (r.generation, r.parties) = (Some(generation), parties);
    }
    if args.json {
        return print(&format!("{}\n", serde_json::to_string(&r)?));
    }
    print(&text(&r)?)
}

fn link(args: &Args) -> Result<Option<Link>> {
    if args.rtt.is_none() && args.bandwidth.is_none() && args.loss == 0.0 {
        return Ok(None);
    }
    if !(0.0..1.0).contains(&args.loss) {
        bail!("--loss {} is not a share", args.loss);
    }
    let rtt = Duration::from_secs_f64(args.rtt.as_deref().map_or(Ok(0.0), duration)?);
    let bandwidth = args.bandwidth.as_deref().map_or(Ok(1e9), bandwidth)?;
    Ok(Some(Link { rtt, bandwidth, loss: args.loss }))
}

/// The network between the parties, and where they compute.
type Between = (Option<Link>, BackendKind);

async fn lane(dir: &Path, pool: Pool, (link, backend): Between) -> Result<Lane> {
    eprintln!("starting three parties");
    let exe = std::env::current_exe()?;
    // A slow network is no reason to give up.
    let limits = Limits { session_s: 600, join_s: 30, ..Limits::default() };
    let via = |to| link.map_or(Ok(to), |link| relay::start(to, link));
    linked(Lane::launch_over(&exe, dir, limits, pool, backend, via)?).await
}

/// When what a query needs is dealt, and where it waits.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Dealt {
    Beside,
    Ahead,
    FromDisk,
}

/// Medians of queries of one kind, and the parties at their end.
async fn embed(
    dir: &Path,
    tokens: usize,
    repeat: usize,
    between: Between,
    dealt: Dealt,
) -> Result<(Query, Vec<PartyReport>)> {
    let prefill = vec![padded(tokens).unwrap_or(tokens)];
    let pool = match dealt {
        Dealt::Beside => Pool { depth: 0, ..Pool::default() },
        Dealt::Ahead => Pool { memory_mb: 2048, prefill, ..Pool::default() },
        // In the lane's own folder.
        Dealt::FromDisk => {
            Pool { memory_mb: 0, spool_mb: 2048, spool_dir: Some("spool".into()), prefill, ..Pool::default() }
        }
    };
    let ahead = dealt != Dealt::Beside;
    let lane = lane(dir, pool, between).await?;
    let client =
        Client::builder().parties(lane.parties.clone()).model(dir).deadline(Duration::from_secs(600)).connect().await?;
    let ids: Vec<u32> = (0..tokens as u32).map(|i| 1 + i * 37 % 900).collect();
    let mut all: Vec<Stats> = Vec::new();
    eprintln!("{repeat} queries, dealt {}", if ahead { "ahead" } else { "beside" });
    // The first finds cold caches and is not counted.
    let mut first = true;
    let until = Instant::now() + Duration::from_secs(1200);
    while all.len() < repeat {
        if ahead {
            while lane.metric(0, "tacet_bundles{state=\"ready\"}") == Some(0) && Instant::now() < until {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        let stats = client.embed_ids(&ids).await?.stats;
        if !std::mem::take(&mut first) && stats.dealt_ahead == ahead {
            all.push(stats);
        }
        if Instant::now() > until {
            bail!("after 20 minutes there are {} of {repeat} queries", all.len());
        }
    }
    let of = |f: fn(&Stats) -> f64| median(all.iter().map(f).collect());
    let query = Query { total_s: of(|s| s.total_s), online_s: of(|s| s.online_s), dealing_s: of(|s| s.dealing_s) };
    Ok((query, lane.report()))
}

async fn generate(
    dir: &Path,
    tokens: usize,
    decode: usize,
    between: Between,
) -> Result<(Generation, Vec<PartyReport>)> {
    let lane = lane(dir, Pool::default(), between).await?;
    let generator = Client::builder()
        .parties(lane.parties.clone())
        .model(dir)
        .deadline(Duration::from_secs(600))
        .generator()
        .await?;
    generator.connect().await?;
    eprintln!("a prompt of {tokens} tokens, then {decode}");
    let prompt: Vec<u32> = (0..tokens as u32).map(|i| 1 + i * 37 % 900).collect();
    let mut sequence = generator.sequence();
    let started = Instant::now();
    sequence.feed(&prompt, Positions::Last).await?;
    let prefill_s = started.elapsed().as_secs_f64();
    let started = Instant::now();
    for i in 0..decode as u32 {
        sequence.feed(&[1 + i], Positions::Last).await?;
    }
    let tokens_per_s = decode as f64 / started.elapsed().as_secs_f64();
    Ok((Generation { prefill_s, tokens_per_s, spent: generator.spent() }, lane.report()))
}

fn median(mut v: Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    v[v.len() / 2]
}

fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|l| l.strip_prefix("model name")?.split_once(": "));
    name.map_or_else(|| std::env::consts::ARCH.to_string(), |(_, n)| n.to_string())
}

fn text(r: &Report) -> Result<String> {
    let mut out = String::new();
    writeln!(out, "{}, {} tokens (padded to {}), on {} ({} cores)", r.model, r.tokens, r.padded, r.processor, r.cores)?;
    let dealt = r.cost.dealt_bytes.iter().sum::<u64>() as f64 / 1e6;
    let opened = r.cost.opened_bytes as f64 / 1e6;
    writeln!(out, "{} rounds, {opened:.1} MB opened each way, {dealt:.1} MB dealt", r.cost.rounds)?;
    let p = &r.predicted;
    if let (Some(b), Some(a)) = (&r.dealt_beside, &r.dealt_ahead) {
        writeln!(out, "{:<14}{:>10}{:>10}{:>10}{:>12}", "", "total s", "online s", "dealing s", "predicted s")?;
        let disk = r.dealt_ahead_from_disk.as_ref().map(|d| ("  from disk", d, p.dealt_ahead_s));
        let known = [("dealt beside", b, p.dealt_beside_s), ("dealt ahead", a, p.dealt_ahead_s)];
        for (name, q, predicted) in known.into_iter().chain(disk) {
            writeln!(out, "{name:<14}{:>10.3}{:>10.3}{:>10.3}{predicted:>12.3}", q.total_s, q.online_s, q.dealing_s)?;
        }
        writeln!(
            out,
            "in the clear, f32: {:.3} s; privately {:.0} times as long",
            r.plain_f32_s,
            b.total_s / r.plain_f32_s
        )?;
    }
    if let Some(g) = &r.generation {
        writeln!(
            out,
            "prompt {:.3} s (predicted {:.3}), then {:.1} tokens/s",
            g.prefill_s, p.dealt_beside_s, g.tokens_per_s
        )?;
        writeln!(out, "in the clear, f32: prompt {:.3} s", r.plain_f32_s)?;
    }
    for p in &r.parties {
        writeln!(out, "{:<6} {:?}: {:.0} MB resident at its peak", p.name, p.role, p.peak_mb)?;
    }
    Ok(out)
}
