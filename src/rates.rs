//! How fast this machine computes: measured, so that a plan predicts seconds.
//!
//! What an evaluator and a dealer do depends on shapes only, never on values; so a short program that runs on made-up
//! messages takes the time that a real one takes. What a message costs besides is measured between two endpoints
//! ([`Exchange`]).
//!
//! With `r` rounds, `o` bytes opened each way, `d` dealt to both and `d1` to the one that is dealt more, `m`
//! multiply-accumulates, and a network of round-trip time `t` and `b` bytes a second:
//!
//! ```text
//! computing = m / macs + d / gates                                    of the slower evaluator, round by round
//! dealing   = d / dealing
//! ahead     = computing + r (round + t / 2) + o max(byte, 1 / b)      both send at once and wait for each other: one way
//! beside    = max(ahead, dealing, d1 / b, d dealt_processor / 2)
//! total     = online + t + 2 round + answer byte                      the parties meet, the client is one more party
//! ```
//!
//! Where all three share `n` processors of one machine, one evaluator still computes while the other's opening is carried, and
//! what carries messages takes its part from those who compute; so does the dealing. A small message's part is in its round,
//! which is measured between two who compute.
//!
//! ```text
//! ahead   = computing + r (round + t / 2) + o max(byte, 1 / b) + 2 o byte_processor / n
//! ahead  >= (2 computing + r round_processor + 2 o byte_processor) / n + r t / 2
//! beside >= ahead + (dealing + d dealt_processor) / n
//! ```
//!
//! The dealer of a text or prompt is busy at its beginning, when the evaluators wait for it. That of a sequence goes on to the
//! next step ([`Next`]) while the evaluators wait for each other, hence for whoever shares a processor with it: of
//! two processors it leaves them one if nothing moves, and one and a half at the best. That counts half again its part.
//!
//! There the rates are those of threads that compute side by side, of a step also beside one that deals: weights that no cache
//! holds come from memory that all share.

use std::collections::VecDeque;
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use serde::Serialize;
use tacet_party::clock::processor;
use tacet_party::config::Limits;
use tacet_protocol::backend::{Backend, Cpu};
use tacet_protocol::gates::product::HeadProduct;
use tacet_protocol::prg::{Prg, SessionKey};
use tacet_protocol::program::{Cost, Kind, Linear, Op, Program};
use tacet_protocol::run::{DealerState, EvaluatorState};
use tacet_protocol::{DealerSink, Error, EvaluatorIo, Role, run};

use crate::exchange::Exchange;

/// How long the rates of one program are measured.
const PATIENCE: Duration = Duration::from_millis(700);

/// Most tokens of a program that rates are measured on.
pub const SAMPLE: usize = 128;

/// Most threads that rates are measured of side by side: one an evaluator.
const SIDE_BY_SIDE: usize = 2;

/// Rates of one thread of this machine.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Work {
    /// Multiply-accumulates a second of the public linear layers.
    pub macs: f64,
    /// Dealt bytes a second that a dealer makes.
    pub dealing: f64,
    /// Dealt bytes a second that an evaluator's gates use up, linear layers aside.
    pub gates: f64,
}

/// What is measured of this machine.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Rates {
    /// Of a thread while the others rest.
    #[serde(flatten)]
    pub alone: Work,
    /// Of each of those that compute side by side.
    pub beside: Work,
    /// What messages cost.
    #[serde(flatten)]
    pub exchange: Exchange,
}

/// What lies between the parties.
#[derive(Clone, Copy, Debug)]
pub struct Network {
    /// Seconds there and back.
    pub rtt: f64,
    /// Bytes a second, each way.
    pub bandwidth: f64,
    /// Where all three parties share so many processors of this machine.
    pub cores: Option<usize>,
    /// What the dealer does meanwhile, besides.
    pub next: Next,
}

/// What a dealer deals of programs that come next.
#[derive(Clone, Copy, Debug)]
pub enum Next {
    /// There are none.
    Nothing,
    /// After this one's, so many bytes of them: what evaluators have room for.
    Room(f64),
    /// As much as of this one, all the time.
    AsMuch,
}

/// The same for a program of a model, which is a decoder or not, and a step of it or the prompt.
pub fn next(decoder: bool, step: bool) -> Next {
    match (decoder, step) {
        (false, _) => Next::Nothing,
        (true, false) => Next::Room(2e6 * Limits::default().buffer_mb as f64),
        (true, true) => Next::AsMuch,
    }
}

/// Seconds that a program is predicted to take.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Times {
    /// Linear layers and gates of an evaluator; both work at once.
    pub compute_s: f64,
    /// The dealer's work.
    pub dealing_s: f64,
    /// Rounds and openings.
    pub online_network_s: f64,
    /// Corrections on the longer of the dealer's two links.
    pub dealing_network_s: f64,
    /// The evaluators' part of a query whose dealing is there already.
    pub dealt_ahead_s: f64,
    /// Of one that is dealt while it runs.
    pub dealt_beside_s: f64,
    /// The first at the client.
    pub total_ahead_s: f64,
    /// The second at the client.
    pub total_beside_s: f64,
}

impl Rates {
    /// Measures on a short program of the model, or on `then`, which goes on after it; `macs` replaces the first rate.
    ///
    /// # Errors
    /// Programs that do not follow on one another, no sockets.
    pub fn measure(first: &Program, then: Option<&Program>, exchange: Exchange, macs: Option<f64>) -> Result<Rates> {
        let of = then.unwrap_or(first);
        let cost = of.cost();
        let dealt = cost.dealt_bytes.iter().sum::<u64>() as f64;
        ensure!(dealt > 0.0, "a program without gates has no rates");
        let work = |[dealing, linear, gates]: [f64; 3]| Work {
            macs: macs.unwrap_or(cost.multiplications as f64 / linear.max(1e-9)),
            dealing: dealt / dealing,
            gates: dealt / gates.max(1e-9),
        };
        let alone = work(median(|| whole(first, then))?);
        let beside = || {
            let [dealing, _, gates] = side_by_side(|_| median(|| whole(first, then)))?;
            let [linear] = side_by_side(|part| median(|| layers(of, part)))?;
            Ok(work([dealing, linear, gates]))
        };
        let beside = if then.is_some() { while_dealing(first, then, beside)? } else { beside()? };
        Ok(Rates { alone, beside, exchange })
    }

    /// Of several measurements, at least one: those at which work takes its mean time.
    pub fn mean<'a>(all: impl Iterator<Item = &'a Rates> + Clone) -> Rates {
        let n = all.clone().count() as f64;
        let seconds = |f: &dyn Fn(&Rates) -> f64| all.clone().map(f).sum::<f64>() / n;
        let work = |of: fn(&Rates) -> &Work| Work {
            macs: 1.0 / seconds(&|r| 1.0 / of(r).macs),
            dealing: 1.0 / seconds(&|r| 1.0 / of(r).dealing),
            gates: 1.0 / seconds(&|r| 1.0 / of(r).gates),
        };
        let exchange = Exchange::each(|f| seconds(&|r| f(&r.exchange)));
        Rates { alone: work(|r| &r.alone), beside: work(|r| &r.beside), exchange }
    }

    /// What a program of this cost takes, whose answer has so many bytes from each evaluator.
    pub fn predict(&self, cost: &Cost, answer: usize, net: Network) -> Times {
        let x = &self.exchange;
        let work = if net.cores.is_some() { &self.beside } else { &self.alone };
        let dealt = cost.dealt_bytes.iter().sum::<u64>() as f64;
        let (opened, rounds) = (cost.opened_bytes as f64, f64::from(cost.rounds));
        let compute_s = cost.multiplications as f64 / work.macs + dealt / work.gates;
        let dealing_s = dealt / work.dealing;
        let way_s = rounds * (net.rtt / 2.0);
        let online_network_s = way_s + rounds * x.round_s + opened * x.byte_s.max(1.0 / net.bandwidth);
        let dealing_network_s = cost.dealt_bytes[0].max(cost.dealt_bytes[1]) as f64 / net.bandwidth;
        let online_processor_s = 2.0 * (compute_s + opened * x.byte_processor_s) + rounds * x.round_processor_s;
        let dealing_processor_s = dealing_s + dealt * x.dealt_processor_s;
        let part = |processor_s: f64, n: f64| net.cores.map_or(0.0, |cores| processor_s * (n / cores as f64).min(1.0));
        let carried_s = part(2.0 * opened * x.byte_processor_s, 1.0);
        let dealt_ahead_s = (compute_s + online_network_s + carried_s).max(part(online_processor_s, 1.0) + way_s);
        let dealer_s = dealing_s.max(dealing_network_s).max(dealt * x.dealt_processor_s / 2.0);
        let taken_s = match net.next {
            Next::Nothing => part(dealing_processor_s, 1.0),
            Next::Room(bytes) => part(dealing_processor_s, 1.0) + part(dealing_processor_s * bytes / dealt, 1.5),
            Next::AsMuch => part(dealing_processor_s, 1.5),
        };
        let dealt_beside_s = (dealt_ahead_s + taken_s).max(dealer_s);
        let client_s = net.rtt + 2.0 * x.round_s + answer as f64 * x.byte_s;
        Times {
            compute_s,
            dealing_s,
            online_network_s,
            dealing_network_s,
            dealt_ahead_s,
            dealt_beside_s,
            total_ahead_s: dealt_ahead_s + client_s,
            total_beside_s: dealt_beside_s + client_s,
        }
    }
}

/// Medians of what runs take, for a while: neither the best that a busy machine has to offer nor its worst.
fn median<const N: usize>(mut run: impl FnMut() -> Result<[f64; N]>) -> Result<[f64; N]> {
    let until = Instant::now() + PATIENCE;
    let mut runs = Vec::new();
    while runs.is_empty() || Instant::now() < until {
        runs.push(run()?);
    }
    Ok(std::array::from_fn(|i| {
        runs.sort_by(|a, b| a[i].total_cmp(&b[i]));
        runs[runs.len() / 2][i]
    }))
}

/// What threads measure side by side, each of its part of the whole: the means.
fn side_by_side<const N: usize>(measure: impl Fn(f64) -> Result<[f64; N]> + Sync) -> Result<[f64; N]> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(SIDE_BY_SIDE);
    std::thread::scope(|s| {
        let measure = &measure;
        let all: Vec<_> = (0..threads).map(|i| s.spawn(move || measure(i as f64 / threads as f64))).collect();
        let mut mean = [0.0; N];
        for thread in all {
            let took = thread.join().map_err(|_| anyhow!("a thread that measures rates panicked"))??;
            mean.iter_mut().zip(took).for_each(|(m, t)| *m += t / threads as f64);
        }
        Ok(mean)
    })
}

/// Measures while another thread deals: a sequence's dealer goes on to what comes next, and leaves the evaluators less of the
/// caches that all share.
fn while_dealing<T>(first: &Program, then: Option<&Program>, measure: impl FnOnce() -> Result<T>) -> Result<T> {
    struct Ends<'a>(&'a AtomicBool);
    impl Drop for Ends<'_> {
        fn drop(&mut self) {
            self.0.store(true, Relaxed);
        }
    }
    let ended = AtomicBool::new(false);
    std::thread::scope(|s| {
        let ends = Ends(&ended);
        let dealing = s.spawn(|| -> Result<()> {
            while !ended.load(Relaxed) {
                let mut state = DealerState::default();
                for p in std::iter::once(first).chain(then) {
                    run::deal_next(p, prg(1), prg(2), &mut state, &mut Gone)?;
                }
            }
            Ok(())
        });
        let measured = measure();
        drop(ends);
        dealing.join().map_err(|_| anyhow!("a thread that deals meanwhile panicked"))??;
        measured
    })
}

/// Processor seconds that a program's linear layers take one after another, from the one on that has this part of them before
/// it: parties have weights of their own, which threads that read the same ones at once would find in a shared cache.
fn layers(p: &Program, part: f64) -> Result<[f64; 1]> {
    let linear = |op: &Op| match &op.kind {
        Kind::Linear { rows, layer } => Some((*rows, Arc::clone(layer), p.values[op.outputs[0]].bits)),
        _ => None,
    };
    let all: Vec<_> = p.ops.iter().filter_map(linear).collect();
    let first = (part * all.len() as f64) as usize;
    let mut took = Duration::ZERO;
    for (rows, layer, bits) in all.iter().cycle().skip(first).take(all.len()) {
        let x = vec![0; rows * layer.weights()?.cols_in()];
        let start = processor();
        black_box(Cpu.linear(layer, &x, *rows, *bits)?);
        took += processor() - start;
    }
    Ok([took.as_secs_f64()])
}

/// What [`all`] says of a program, or of the one after it.
fn whole(first: &Program, then: Option<&Program>) -> Result<[f64; 3]> {
    let (mut dealers, mut evaluators) = <([DealerState; 2], [[EvaluatorState; 2]; 2])>::default();
    let mut took = [0.0; 3];
    for p in std::iter::once(first).chain(then) {
        took = all(p, &mut dealers, &mut evaluators)?;
    }
    Ok(took)
}

/// Processor seconds of dealing, of an evaluator's linear layers, and of the rest of the evaluator that is slower in a round:
/// of what one draws the other unpacks, and neither opens before both are there.
fn all(p: &Program, dealers: &mut [DealerState; 2], evaluators: &mut [[EvaluatorState; 2]; 2]) -> Result<[f64; 3]> {
    let mut messages = Messages::default();
    run::deal_next(p, prg(1), prg(2), &mut dealers[0], &mut messages)?;
    // Again for the time: who keeps nothing, as one that sends, need not find fresh memory.
    let start = processor();
    run::deal_next(p, prg(1), prg(2), &mut dealers[1], &mut Gone)?;
    let dealing = (processor() - start).as_secs_f64();
    let Messages { dealt } = messages;
    let mut rounds = Vec::new();
    let mut linear = 0.0f64;
    for ((dealt, states), (role, seed)) in dealt.into_iter().zip(evaluators).zip([(Role::E1, 1), (Role::E2, 2)]) {
        let evaluate = |dealt, state| -> Result<Alone> {
            let input = p.inputs().map(|v| vec![0; p.values[v].len()]).collect();
            let mut io = Alone { dealt, backend: Clocked::default(), since: processor(), rounds: Vec::new() };
            black_box(run::evaluate_next(p, role, prg(seed), input, state, &mut io)?);
            io.ends();
            Ok(io)
        };
        // For the time, again, as of dealing.
        let [first, again] = states;
        evaluate(dealt.clone(), first)?;
        let io = evaluate(dealt, again)?;
        linear = linear.max(io.backend.linear_ns.into_inner() as f64 / 1e9);
        rounds.push(io.rounds);
    }
    let slower: f64 = rounds[0].iter().zip(&rounds[1]).map(|(a, b)| a.max(*b)).sum();
    Ok([dealing, linear, slower - linear])
}

/// The calling thread, which looks at the clock.
#[derive(Default)]
struct Clocked {
    linear_ns: AtomicU64,
}

impl Backend for Clocked {
    fn linear(&self, layer: &Arc<Linear>, x: &[u64], rows: usize, bits: u32) -> Result<Vec<u64>, Error> {
        let start = processor();
        let out = Cpu.linear(layer, x, rows, bits);
        self.linear_ns.fetch_add((processor() - start).as_nanos() as u64, Relaxed);
        out
    }

    fn product(&self, g: &HeadProduct, pairs: &[(&[u64], &[u64])]) -> Result<Vec<u64>, Error> {
        Cpu.product(g, pairs)
    }
}

fn prg(seed: u8) -> Prg {
    Prg::new(&SessionKey::from_seed([seed; 32]))
}

/// Keeps the corrections for E1 and E2.
#[derive(Default)]
struct Messages {
    dealt: [VecDeque<Vec<u8>>; 2],
}

/// An evaluator without another: all that it gets is zero.
struct Alone {
    dealt: VecDeque<Vec<u8>>,
    backend: Clocked,
    /// When the round began, and what those before took.
    since: Duration,
    rounds: Vec<f64>,
}

impl Alone {
    fn ends(&mut self) {
        let now = processor();
        self.rounds.push((now - self.since).as_secs_f64());
        self.since = now;
    }
}

/// Keeps nothing.
struct Gone;

impl DealerSink for Gone {
    fn send(&mut self, _: Role, _: u32, _: Vec<u8>) -> Result<(), Error> {
        Ok(())
    }
}

impl DealerSink for Messages {
    fn send(&mut self, to: Role, _: u32, bytes: Vec<u8>) -> Result<(), Error> {
        self.dealt[usize::from(to != Role::E1)].push_back(bytes);
        Ok(())
    }
}

impl EvaluatorIo for Alone {
    fn dealt(&mut self, _: u32, _: usize) -> Result<Vec<u8>, Error> {
        self.dealt.pop_front().ok_or_else(|| Error::Transport("nothing was dealt".into()))
    }

    fn exchange(&mut self, _: u32, out: Vec<u8>) -> Result<Vec<u8>, Error> {
        self.ends();
        Ok(vec![0; out.len()])
    }

    fn backend(&self) -> &dyn Backend {
        &self.backend
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_overlaps_counts_once() {
        let exchange = Exchange {
            round_s: 1e-4,
            round_processor_s: 2e-4,
            byte_s: 1e-9,
            byte_processor_s: 2e-9,
            dealt_processor_s: 2e-9,
        };
        let alone = Work { macs: 1e9, dealing: 1e8, gates: 2e8 };
        let rates = Rates { alone, beside: Work { gates: 1e8, ..alone }, exchange };
        let cost = Cost {
            rounds: 10,
            opened_bytes: 1_000_000,
            dealt_bytes: [30_000_000, 20_000_000],
            multiplications: 500_000_000,
        };
        let near = |a: f64, b: f64| (a - b).abs() < 1e-12;
        let at =
            |rtt, bandwidth, cores| rates.predict(&cost, 1000, Network { rtt, bandwidth, cores, next: Next::Nothing });
        let t = at(0.01, 1e7, None);
        assert!(near(t.compute_s, 0.75) && near(t.dealing_s, 0.5), "{t:?}");
        assert!(near(t.online_network_s, 0.05 + 0.001 + 0.1) && near(t.dealing_network_s, 3.0), "{t:?}");
        assert!(near(t.dealt_ahead_s, 0.901) && near(t.dealt_beside_s, 3.0), "{t:?}");
        assert!(near(t.total_beside_s, 3.0 + 0.01 + 0.0002 + 1e-6), "{t:?}");
        let near_by = at(1e-4, 1e10, None);
        assert!(near(near_by.online_network_s, 0.0005 + 0.001 + 0.001), "a byte's cost bounds what a network carries");
        assert!(near(near_by.dealt_beside_s, near_by.dealt_ahead_s), "{near_by:?}");
        let slower = Rates { alone: Work { macs: 0.5e9, ..alone }, ..rates };
        let mean = Rates::mean([rates, slower].iter());
        assert!(near(mean.alone.macs * 1.5e-9, 1.0) && near(mean.alone.gates * 5e-9, 1.0), "{mean:?}");
        let shared = at(0.0, 1e10, Some(1));
        assert!(near(shared.dealt_ahead_s, 2.0 + 0.002 + 0.004), "{shared:?}");
        assert!(near(shared.dealt_beside_s, 2.0 + 0.002 + 0.004 + 0.5 + 0.1), "{shared:?}");
        let four = at(0.0, 1e10, Some(4));
        assert!(near(four.dealt_ahead_s, 1.0 + 0.001 + 0.001 + 0.001), "{four:?}");
        let beside = |next| rates.predict(&cost, 1000, Network { rtt: 0.0, bandwidth: 1e10, cores: Some(4), next });
        assert!(near(beside(Next::AsMuch).dealt_beside_s, four.dealt_ahead_s + 0.6 * 1.5 / 4.0));
        assert!(near(beside(Next::Room(25e6)).dealt_beside_s, four.dealt_ahead_s + 0.6 / 4.0 + 0.3 * 1.5 / 4.0));
    }
}
