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
use tokio::sync::oneshot;

use self::report::{Found, Generation, Prediction, Query, Report, Sample, Setting};
use crate::exchange::Exchange;
use crate::local::{Folder, Lane, PartyReport, threads};
use crate::parties::linked;
use crate::plain::Plain;
use crate::plan::{BANDWIDTH, MTU, RTT, bandwidth, duration, step};
use crate::rates::{Network, Next, Rates, SAMPLE, next};
use crate::relay::{self, Link};
use crate::shape::{self, Shape};
use crate::{fetch, planning, print};

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
comes and goes. They are for parties that compute on one thread of the processor each. Where the time went is what the parties
say. `over plain` is the time over that of the same matrices in f32 in the clear, on one thread.

An emulated network carries packets of 1500 bytes, as most do; a jumbo one carries --mtu 9000. Without one, packets on loopback
are as large as parties make them.";

/// Seconds of queries that a median is taken of: what else a machine does comes and goes in shorter ones.
const LONG: f64 = 3.0;

#[derive(Clone, ClapArgs)]
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
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    tokens: u32,
    /// Of a decoder, tokens to add; two at least
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(2..=1 << 20))]
    decode: u32,
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
    /// Bytes of the largest packet that an emulated network carries
    #[arg(long, value_name = "BYTES", default_value_t = MTU, value_parser = clap::value_parser!(u16).range(1280..))]
    mtu: u16,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Measures and prints.
pub async fn run(args: Args) -> Result<()> {
    let load = load();
    let link = link(&args)?;
    let (_checkpoint, dir, name) = match args.shape {
        Some(s) => {
            if args.ternary && !matches!(s, Shape::Tinyllama | Shape::Llama7b) {
                bail!("--ternary goes with the shapes tinyllama and llama-7b");
            }
            eprintln!("writing random weights");
            let (folder, ternary) = (Folder::make("tacet-shape")?, args.ternary);
            let dir = folder.0.clone();
            apart({
                let dir = dir.clone();
                move || shape::write(&dir, s, ternary)
            })
            .await?;
            let kind = if args.ternary { "ternary" } else { "random" };
            (Some(folder), dir, format!("{s:?} shape, {kind} weights"))
        }
        None => {
            let dir = fetch::model_dir(args.model.as_deref()).await?;
            let name = dir.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
            (None, dir, name)
        }
    };
    let tokens = args.tokens as usize;
    let Some(length) = padded(tokens) else { bail!("--tokens {tokens} is more than a text may have") };
    let mtu = link.map(|l| l.mtu);
    let (setting, costs, before, kept) = {
        let (args, dir) = (args.clone(), dir.clone());
        apart(move || {
            let plans = planned(&dir)?;
            let (setting, costs) = described(&args, &dir, (name, load), length, (&plans, link))?;
            let before = measured(&plans, length, mtu)?;
            // A decoder's may be as large as what the parties have left.
            let kept = costs.step.is_none().then_some(plans);
            Ok((setting, costs, before, kept))
        })
        .await?
    };
    let again = || {
        let (kept, dir) = (kept.clone(), dir.clone());
        apart(move || match &kept {
            Some(plans) => measured(plans, length, mtu),
            None => measured(&planned(&dir)?, length, mtu),
        })
    };
    let at = Asked { dir: &dir, link, backend: args.backend, patience: costs.patience(&before) };
    let (mut rates, mut found) = (vec![before], Found::default());
    let repeat = usize::from(args.repeat);
    if costs.step.is_none() {
        // As many bytes as either evaluator has of two queries.
        let room = 2 * costs.first.0.dealt_bytes.into_iter().max().unwrap_or(0) as usize / 1_000_000 + 1;
        let (beside, _) = embed(&at, tokens, repeat, room, Dealt::Beside).await?;
        rates.push(again().await?);
        let (ahead, parties) = embed(&at, tokens, repeat, room, Dealt::Ahead).await?;
        (found.dealt_beside, found.dealt_ahead, found.parties) = (Some(beside), Some(ahead), parties);
        if args.spool {
            let (disk, _) = embed(&at, tokens, repeat, room, Dealt::FromDisk).await?;
            found.dealt_ahead_from_disk = Some(disk);
        }
    } else {
        if args.spool {
            eprintln!("--spool is for encoders: a decoder's dealing runs ahead in memory");
        }
        let (generation, parties) = generate(&at, [tokens, args.decode as usize, repeat]).await?;
        (found.generation, found.parties) = (Some(generation), parties);
    }
    rates.push(again().await?);
    found.over(&setting);
    let r = Report { setting, prediction: costs.predict(&rates), found };
    if args.json {
        return print(&format!("{}\n", serde_json::to_string(&r)?));
    }
    print(&r.text()?)
}

/// On a thread of its own, so that this one hears of signals; one that is interrupted ends with the process.
async fn apart<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let (done, told) = oneshot::channel();
    std::thread::Builder::new().name("bench".into()).spawn(move || drop(done.send(work())))?;
    told.await.unwrap_or_else(|_| bail!("planning stopped"))
}

fn planned(dir: &Path) -> Result<Plans> {
    eprintln!("planning");
    Ok(Plans::load(dir, Keep::Weights, planning::shelf().as_ref(), &planning::told)?.0)
}

/// Rates of a text or prompt, and of a decoder's step.
type Measured = (Rates, Option<Rates>);

fn measured(plans: &Plans, length: usize, mtu: Option<usize>) -> Result<Measured> {
    eprintln!("measuring rates");
    let exchange = Exchange::measure(mtu)?;
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
    /// Long enough for any query or step, going by the rates before; ten minutes at least.
    fn patience(&self, before: &Measured) -> Duration {
        let p = self.predict(std::slice::from_ref(before));
        let longest = p.predicted.total_beside_s.max(p.predicted_step.map_or(0.0, |s| s.total_beside_s));
        Duration::from_secs(600.0f64.max(10.0 * longest) as u64)
    }

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
    (model, load): (String, Option<f64>),
    length: usize,
    (plans, link): (&Plans, Option<Link>),
) -> Result<(Setting, Costs)> {
    let first = plans.first(length)?;
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    // What parties on one machine and no emulated network have between them.
    let (rtt, bandwidth) = link.map_or((0.0, f64::INFINITY), |l| (l.rtt.as_secs_f64(), l.bandwidth));
    let net = Network { rtt, bandwidth, cores: Some(cores), next: Next::Nothing };
    let of = |p: &Program| (p.cost(), answer(p));
    // A prompt, a step that tells what its dealing took, and those of both kinds.
    let decode = args.decode as usize;
    let last = length + 1 + decode + usize::from(args.repeat);
    let step = match plans {
        Plans::Encoder(_) => None,
        Plans::Decoder(p) if last >= p.longest() => bail!(
            "{length} tokens, {decode} more and {} after pauses are more than the {} that fit: lower --tokens, --decode or \
             --repeat",
            args.repeat,
            p.longest()
        ),
        // The one in the middle of all.
        Plans::Decoder(p) => Some(p.program(true, length + decode / 2, 1, false)?),
    };
    eprintln!("measuring the same matrices in the clear");
    let plain = Plain::of(dir);
    let setting = Setting {
        model,
        tokens: args.tokens as usize,
        padded: length,
        processor: processor(),
        cores,
        threads: threads(),
        load,
        rtt_s: link.map(|l| l.rtt.as_secs_f64()),
        bandwidth_bytes_per_s: link.map(|l| l.bandwidth),
        loss: link.map(|l| l.loss),
        mtu: link.map(|l| l.mtu),
        cost: first.cost(),
        plain_f32_s: plain.as_ref().map(|m| m.pass(0, length)),
        plain_f32_step_s: plain.as_ref().filter(|_| step.is_some()).map(|m| m.pass(length + decode / 2, 1)),
    };
    Ok((setting, Costs { first: of(&first), step: step.as_ref().map(of), net }))
}

/// Has the allocator return what has been free for a second: it does so when something large is freed later than that. Plans
/// with their weights are large, and this process only waits from now on.
async fn give_back() {
    tokio::time::sleep(Duration::from_millis(1200)).await;
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
    let rtt = Duration::from_secs_f64(args.rtt.as_deref().map_or(Ok(RTT), duration)?);
    let bandwidth = args.bandwidth.as_deref().map_or(Ok(BANDWIDTH), bandwidth)?;
    Ok(Some(Link { rtt, bandwidth, loss: args.loss, mtu: args.mtu.into() }))
}

/// Whom queries go to.
struct Asked<'a> {
    dir: &'a Path,
    link: Option<Link>,
    backend: BackendKind,
    /// How long a query may take: a slow network is no reason to give up.
    patience: Duration,
}

impl Asked<'_> {
    async fn lane(&self, pool: Pool) -> Result<Lane> {
        give_back().await;
        eprintln!("starting three parties");
        let exe = std::env::current_exe()?;
        let limits = Limits { session_s: self.patience.as_secs(), join_s: 30, ..Limits::default() };
        let via = |to| self.link.map_or(Ok(to), |link| relay::start(to, link));
        linked(Lane::launch_over(&exe, self.dir, limits, pool, self.backend, via)?).await
    }
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
    at: &Asked<'_>,
    tokens: usize,
    repeat: usize,
    room_mb: usize,
    dealt: Dealt,
) -> Result<(Query, Vec<PartyReport>)> {
    let prefill = vec![padded(tokens).unwrap_or(tokens)];
    let pool = match dealt {
        Dealt::Beside => Pool { depth: 0, ..Pool::default() },
        // One at a time: the next bundle is not on its way while a query runs.
        Dealt::Ahead => Pool { memory_mb: room_mb, depth: 1, prefill, ..Pool::default() },
        // In the lane's own folder.
        Dealt::FromDisk => {
            let spool_dir = Some("spool".into());
            Pool { memory_mb: 0, spool_mb: room_mb, spool_dir, depth: 1, prefill, ..Pool::default() }
        }
    };
    let ahead = dealt != Dealt::Beside;
    let lane = at.lane(pool).await?;
    let client = Client::builder().parties(lane.parties.clone()).model(at.dir).deadline(at.patience).connect().await?;
    let ids: Vec<u32> = (0..tokens as u32).map(token).collect();
    let mut all: Vec<Sample> = Vec::new();
    eprintln!("queries, dealt {}", if ahead { "ahead" } else { "beside" });
    // The first finds cold caches and is not counted.
    let mut first = true;
    let (mut queries, mut before) = (0, None);
    let until = Instant::now() + 2 * at.patience;
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
            bail!("{} s were enough for {} queries only", 2 * at.patience.as_secs(), all.len());
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

async fn generate(at: &Asked<'_>, [tokens, decode, repeat]: [usize; 3]) -> Result<(Generation, Vec<PartyReport>)> {
    let lane = at.lane(Pool::default()).await?;
    let generator =
        planning::client().parties(lane.parties.clone()).model(at.dir).deadline(at.patience).generator().await?;
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
        for i in 0..decode as u32 {
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
