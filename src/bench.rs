//! `tacet bench`: what a model takes on this machine, measured over three real parties, beside what was predicted.

mod report;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Args as ClapArgs;
use tacet_client::generate::{Decoder, Positions};
use tacet_client::{Client, Generator};
use tacet_party::config::{BackendKind, Limits, Pool};
use tacet_party::plans::Plans;
use tacet_protocol::plan::Keep;
use tacet_protocol::program::{Cost, Program};
use tacet_protocol::query::padded;
use tacet_protocol::ring::packed_len;

use self::report::{Found, Generation, Prediction, Query, Report, Sample, Setting};
use crate::exchange::Exchange;
use crate::local::{Lane, PartyReport};
use crate::parties::linked;
use crate::plan::{bandwidth, duration, step};
use crate::rates::{Network, Next, Rates, SAMPLE, next};
use crate::relay::{self, Link};
use crate::shape::{Checkpoint, Shape};
use crate::{fetch, plain, planning, print};

pub const EXAMPLES: &str = "\
Examples:
  tacet bench --tokens 128                                    # all-MiniLM-L6-v2
  tacet bench --shape gpt2 --tokens 32 --decode 32 --json
  tacet bench --tokens 32 --rtt 40ms --bandwidth 100Mbit      # three parties far apart

Three parties, each a process of its own, and the client share this machine. `dealt beside` is a query whose randomness is
dealt while it runs, `dealt ahead` one that found it there: the online time; `from disk` one that found it in the
evaluators' spools. A decoder is always dealt beside, but runs ahead:
`step` is one token after another, `step, ahead` comes when its dealing is there. Shapes have random weights.

Predictions are of rates that are measured before the queries, between their kinds and after them: what else a machine does
comes and goes. Where the time went is what the parties say.";

/// Seconds of queries that a median is taken of: what else a machine does comes and goes in shorter ones.
const LONG: f64 = 3.0;

#[derive(ClapArgs)]
pub struct Args {
    /// Model directory or name; all-MiniLM-L6-v2 if absent
    #[arg(long, value_name = "DIR", conflicts_with = "shape")]
    model: Option<String>,
    /// A known shape with random weights
    #[arg(long, value_enum)]
    shape: Option<Shape>,
    /// Of a Llama's shape, weights of -1, 0 and 1 times one magnitude
    #[arg(long, requires = "shape")]
    ternary: bool,
    /// Tokens of a text or prompt
    #[arg(long, value_name = "N", default_value_t = 128)]
    tokens: usize,
    /// Of a decoder, tokens to add
    #[arg(long, value_name = "N", default_value_t = 32)]
    decode: usize,
    /// Queries of each kind, more where they are over in less than three seconds, or prompts; the median is reported
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    repeat: u16,
    /// Of an encoder, measure what is dealt ahead from disk too
    #[arg(long)]
    spool: bool,
    /// Start three parties on this machine for the run, as is done in any case
    #[arg(long = "local")]
    _local: bool,
    /// Where the parties compute: auto, cpu or gpu
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

/// Measures and prints.
pub async fn run(args: Args) -> Result<()> {
    let link = link(&args)?;
    let (_checkpoint, dir, name) = match args.shape {
        Some(s) => {
            if args.ternary && !matches!(s, Shape::Tinyllama | Shape::Llama7b) {
                bail!("--ternary goes with the shapes tinyllama and llama-7b");
            }
            eprintln!("writing random weights");
            let c = Checkpoint::write(s, args.ternary)?;
            let kind = if args.ternary { "ternary" } else { "random" };
            let (dir, name) = (c.dir().to_path_buf(), format!("{s:?} shape, {kind} weights"));
            (Some(c), dir, name)
        }
        None => {
            let dir = fetch::model_dir(args.model.as_deref()).await?;
            let name = dir.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
            (None, dir, name)
        }
    };
    let Some(length) = padded(args.tokens) else { bail!("--tokens {} is more than a text may have", args.tokens) };
    let (setting, costs, before, kept) = apart(|| {
        let plans = planned(&dir)?;
        let (setting, costs) = described(&args, &dir, name, length, (&plans, link))?;
        let before = measured(&plans, length)?;
        // A decoder's may be as large as what the parties have left.
        let kept = costs.step.is_none().then_some(plans);
        Ok((setting, costs, before, kept))
    })?;
    let again = || {
        apart(|| match &kept {
            Some(plans) => measured(plans, length),
            None => measured(&planned(&dir)?, length),
        })
    };
    let (mut rates, mut found) = (vec![before], Found::default());
    let repeat = usize::from(args.repeat);
    if costs.step.is_none() {
        let (beside, _) = embed(&dir, args.tokens, repeat, (link, args.backend), Dealt::Beside).await?;
        rates.push(again()?);
        let (ahead, parties) = embed(&dir, args.tokens, repeat, (link, args.backend), Dealt::Ahead).await?;
        (found.dealt_beside, found.dealt_ahead, found.parties) = (Some(beside), Some(ahead), parties);
        if args.spool {
            let (disk, _) = embed(&dir, args.tokens, repeat, (link, args.backend), Dealt::FromDisk).await?;
            found.dealt_ahead_from_disk = Some(disk);
        }
    } else {
        let lengths = [args.tokens, args.decode, repeat];
        let (generation, parties) = generate(&dir, lengths, (link, args.backend)).await?;
        (found.generation, found.parties) = (Some(generation), parties);
    }
    rates.push(again()?);
    let r = Report { setting, prediction: costs.predict(&rates), found };
    if args.json {
        return print(&format!("{}\n", serde_json::to_string(&r)?));
    }
    print(&r.text()?)
}

/// On a thread of its own, whose memory is given back before parties start: a plan with its weights is large.
fn apart<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let done = std::thread::scope(|s| s.spawn(work).join().unwrap_or_else(|_| bail!("planning stopped")));
    give_back();
    done
}

fn planned(dir: &Path) -> Result<Plans> {
    eprintln!("planning");
    Ok(Plans::load(dir, Keep::Weights, planning::shelf().as_ref(), &planning::told)?.0)
}

/// Rates of a text or prompt, and of a decoder's step.
type Measured = (Rates, Option<Rates>);

fn measured(plans: &Plans, length: usize) -> Result<Measured> {
    eprintln!("measuring rates");
    let exchange = Exchange::measure()?;
    let first = Rates::measure(&plans.first(length.min(SAMPLE))?, None, exchange, None)?;
    let then = match plans {
        Plans::Encoder(_) => None,
        Plans::Decoder(p) => Some(step(p, exchange, None)?),
    };
    Ok((first, then))
}

/// What predictions are made of, rates aside: a program's cost and the bytes of its answer.
struct Costs {
    first: (Cost, usize),
    step: Option<(Cost, usize)>,
    net: Network,
}

impl Costs {
    fn predict(&self, measured: &[Measured]) -> Prediction {
        let rates = Rates::mean(measured.iter().map(|m| &m.0));
        let of = |rates: &Rates, (cost, answer): &(Cost, usize), step: bool| {
            rates.predict(cost, *answer, Network { next: next(self.step.is_some(), step), ..self.net })
        };
        Prediction {
            predicted: of(&rates, &self.first, false),
            predicted_step: self.step.as_ref().map(|s| {
                let rates = Rates::mean(measured.iter().filter_map(|m| m.1.as_ref()));
                of(&rates, s, true)
            }),
            rates,
        }
    }
}

/// All that is known before anything runs.
fn described(
    args: &Args,
    dir: &Path,
    model: String,
    length: usize,
    (plans, link): (&Plans, Option<Link>),
) -> Result<(Setting, Costs)> {
    let load = load();
    let first = plans.first(length)?;
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    // What parties on one machine and no emulated network have between them.
    let (rtt, bandwidth) = link.map_or((0.0, f64::INFINITY), |l| (l.rtt.as_secs_f64(), l.bandwidth));
    let net = Network { rtt, bandwidth, cores: Some(cores), next: Next::Nothing };
    let of = |p: &Program| (p.cost(), answer(p));
    let step = match plans {
        Plans::Encoder(_) => None,
        // The one in the middle of all.
        Plans::Decoder(p) => Some(of(&p.program(true, length + args.decode / 2, 1, false)?)),
    };
    let setting = Setting {
        model,
        tokens: args.tokens,
        padded: length,
        processor: processor(),
        cores,
        load,
        rtt_s: link.map(|l| l.rtt.as_secs_f64()),
        bandwidth_bytes_per_s: link.map(|l| l.bandwidth),
        loss: link.map(|l| l.loss),
        cost: first.cost(),
        plain_f32_s: plain::forward(dir, length),
    };
    Ok((setting, Costs { first: of(&first), step, net }))
}

/// Has the allocator return what has been free for a second: it does so when something large is freed later than that, and
/// this process only waits from now on.
fn give_back() {
    std::thread::sleep(Duration::from_millis(1200));
    drop(std::hint::black_box(vec![1u8; 64 << 20]));
}

/// Bytes of an evaluator's share of a program's result.
pub fn answer(p: &Program) -> usize {
    packed_len(p.output_len(), p.output_bits())
}

/// Threads that wanted a processor in the last minute, where the system says so.
fn load() -> Option<f64> {
    std::fs::read_to_string("/proc/loadavg").ok()?.split(' ').next()?.parse().ok()
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

/// One that is in every vocabulary: which it is makes no difference.
fn token(i: u32) -> u32 {
    1 + i * 7 % 60
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
        // One at a time: the next bundle is not on its way while a query runs.
        Dealt::Ahead => Pool { memory_mb: 2048, depth: 1, prefill, ..Pool::default() },
        // In the lane's own folder.
        Dealt::FromDisk => {
            let spool_dir = Some("spool".into());
            Pool { memory_mb: 0, spool_mb: 2048, spool_dir, depth: 1, prefill, ..Pool::default() }
        }
    };
    let ahead = dealt != Dealt::Beside;
    let lane = lane(dir, pool, between).await?;
    let client =
        Client::builder().parties(lane.parties.clone()).model(dir).deadline(Duration::from_secs(600)).connect().await?;
    let ids: Vec<u32> = (0..tokens as u32).map(token).collect();
    let mut all: Vec<Sample> = Vec::new();
    eprintln!("queries, dealt {}", if ahead { "ahead" } else { "beside" });
    // The first finds cold caches and is not counted.
    let mut first = true;
    let (mut queries, mut before) = (0, None);
    let until = Instant::now() + Duration::from_secs(1200);
    while all.len() < repeat || all.iter().map(|s| s.total_s).sum::<f64>() < LONG {
        if ahead {
            while lane.metric(0, "tacet_bundles{state=\"ready\"}") == Some(0) && Instant::now() < until {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        if queries == 1 {
            before = processors(&lane);
        }
        let stats = client.embed_ids(&ids).await?.stats;
        queries += 1;
        if !std::mem::take(&mut first) && stats.dealt_ahead == ahead {
            all.push(Sample {
                total_s: stats.total_s,
                online_s: stats.online_s,
                dealing_s: stats.dealing_s,
                rounds: u64::from(stats.rounds),
                phases: stats.phases,
            });
        }
        if Instant::now() > until {
            bail!("20 minutes were enough for {} queries only", all.len());
        }
    }
    let each =
        |(before, after): ([f64; 3], [f64; 3])| [0, 1, 2].map(|i| (after[i] - before[i]) / f64::from(queries - 1));
    let processor_s = before.zip(processors(&lane)).map(each);
    Ok((Query { processor_s, ..Query::of(&all) }, lane.report()))
}

/// What each party's process has had of processors, in seconds.
#[cfg(target_os = "linux")]
fn processors(lane: &Lane) -> Option<[f64; 3]> {
    use nix::{time, unistd::Pid};
    let mut all = [0.0; 3];
    for (s, p) in all.iter_mut().zip(lane.report()) {
        let clock = time::clock_getcpuclockid(Pid::from_raw(p.pid as i32)).ok()?;
        *s = Duration::from(time::clock_gettime(clock).ok()?).as_secs_f64();
    }
    Some(all)
}

/// Here no clock says what another process has had.
#[cfg(not(target_os = "linux"))]
fn processors(_: &Lane) -> Option<[f64; 3]> {
    None
}

/// Feeds tokens and says what that took; the dealer's part is of the program before.
async fn fed(generator: &Generator, sequence: &mut impl Decoder, tokens: &[u32]) -> Result<Sample> {
    let (before, started) = (generator.spent(), Instant::now());
    sequence.feed(tokens, Positions::Last).await?;
    let total_s = started.elapsed().as_secs_f64();
    let spent = generator.spent().since(&before);
    let dealing_s = spent.phases.dealing_s + spent.phases.room_wait_s;
    Ok(Sample { total_s, online_s: spent.online_s, dealing_s, rounds: spent.rounds, phases: spent.phases })
}

/// Gives each sample the dealer's part that the one after it has; the last goes without.
fn told_later(samples: &mut Vec<Sample>) {
    for i in 1..samples.len() {
        let later = samples[i].phases;
        samples[i - 1].dealing_s = samples[i].dealing_s;
        let f = &mut samples[i - 1].phases;
        (f.dealing_s, f.dealing_processor_s) = (later.dealing_s, later.dealing_processor_s);
        f.room_wait_s = later.room_wait_s;
    }
    samples.pop();
}

async fn generate(
    dir: &Path,
    [tokens, decode, repeat]: [usize; 3],
    between: Between,
) -> Result<(Generation, Vec<PartyReport>)> {
    let lane = lane(dir, Pool::default(), between).await?;
    let generator = planning::client()
        .parties(lane.parties.clone())
        .model(dir)
        .deadline(Duration::from_secs(600))
        .generator()
        .await?;
    generator.connect().await?;
    let prompt: Vec<u32> = (0..tokens as u32).map(token).collect();
    eprintln!("{repeat} prompts of {tokens} tokens, then {decode} and {repeat} more");
    let mut prefills = Vec::new();
    // The first finds cold caches and is not counted.
    for i in 0..=repeat {
        let mut sequence = generator.sequence();
        let before = generator.spent();
        let mut samples = vec![fed(&generator, &mut sequence, &prompt).await?];
        // The first step tells what the prompt's dealing took.
        samples.push(fed(&generator, &mut sequence, &[token(0)]).await?);
        if i < repeat {
            if i > 0 {
                told_later(&mut samples);
                prefills.append(&mut samples);
            }
            drop(sequence);
            idle(&lane).await?;
            continue;
        }
        let started = Instant::now();
        let mut steps = Vec::new();
        for i in 0..decode.max(2) as u32 {
            steps.push(fed(&generator, &mut sequence, &[token(i)]).await?);
        }
        let tokens_per_s = steps.len() as f64 / started.elapsed().as_secs_f64();
        let spent = generator.spent().since(&before);
        told_later(&mut samples);
        prefills.append(&mut samples);
        let rounds_per_step = steps[0].rounds;
        told_later(&mut steps);
        let step = Query::steps(&steps);
        let mut late = Vec::new();
        for i in 0..=repeat as u32 {
            // As long as several steps take: by then the dealer has gone as far ahead as there is room.
            tokio::time::sleep(Duration::from_secs_f64(0.1 + 4.0 * step.total_s)).await;
            late.push(fed(&generator, &mut sequence, &[token(i)]).await?);
        }
        told_later(&mut late);
        let prefill = Query::of(&prefills);
        let g = Generation {
            prefill_s: prefill.total_s,
            tokens_per_s,
            prefill,
            step,
            step_ahead: Query::steps(&late),
            rounds_per_step,
            opened_bytes: spent.opened_bytes,
            dealt_bytes: spent.dealt_bytes,
            announced_bytes: spent.announced_bytes,
            spent,
        };
        return Ok((g, lane.report()));
    }
    bail!("--repeat has to be at least 1")
}

/// Waits until the parties have ended what the client has left.
async fn idle(lane: &Lane) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(60);
    while (0..3).any(|p| lane.metric(p, "tacet_sessions") != Some(0)) {
        if Instant::now() > until {
            bail!("a party has not ended its session a minute after the client left");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|l| l.strip_prefix("model name")?.split_once(": "));
    name.map_or_else(|| std::env::consts::ARCH.to_string(), |(_, n)| n.to_string())
}
