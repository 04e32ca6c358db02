//! How fast this machine computes: measured, so that a plan predicts seconds.
//!
//! What an evaluator and a dealer do depends on shapes only, never on values; so a short program that runs on made-up
//! messages takes the time that a real one takes.

use std::collections::VecDeque;
use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::Serialize;
use tacet_protocol::gemm::{Weights, linear};
use tacet_protocol::prg::{Prg, SessionKey};
use tacet_protocol::program::{Cost, Program};
use tacet_protocol::{DealerSink, Error, EvaluatorIo, Role, run};

/// Bytes that one end of a link sends or receives in a second of its processor: encryption, framing and the kernel's part.
const WIRE: f64 = 1.0e9;

/// How long each rate is measured.
const PATIENCE: Duration = Duration::from_millis(40);

/// Rates of one thread of this machine.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Rates {
    /// Multiply-accumulates a second of the public linear layers.
    pub macs: f64,
    /// Dealt bytes a second that a dealer makes.
    pub dealing: f64,
    /// Dealt bytes a second that an evaluator's gates use up, linear layers aside.
    pub gates: f64,
}

/// Seconds that a program is predicted to take.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Times {
    /// Linear layers, gates and openings of an evaluator; both work at once.
    pub compute_s: f64,
    /// The dealer's work.
    pub dealing_s: f64,
    /// Rounds and openings.
    pub online_network_s: f64,
    /// Corrections on the longer of the dealer's two links.
    pub dealing_network_s: f64,
    /// A query whose dealing is there already.
    pub dealt_ahead_s: f64,
    /// A query that is dealt while it runs: it takes as long as the slower of the two.
    pub dealt_beside_s: f64,
}

impl Rates {
    /// Measures; `sample` is a short program of the model, `macs` replaces the first rate.
    pub fn measure(sample: &Program, macs: Option<f64>) -> Result<Rates> {
        let input: Vec<Vec<u64>> = sample.inputs().map(|v| vec![0; sample.values[v].len()]).collect();
        let macs = macs.unwrap_or_else(kernel);
        let cost = sample.cost();
        let dealt = cost.dealt_bytes.iter().sum::<u64>() as f64;
        let (mut dealing, mut evaluation) = (f64::INFINITY, f64::INFINITY);
        let until = Instant::now() + 2 * PATIENCE;
        loop {
            let mut messages = Messages::default();
            let start = Instant::now();
            run::deal(sample, prg(1), prg(2), &mut messages)?;
            dealing = dealing.min(start.elapsed().as_secs_f64());
            let start = Instant::now();
            black_box(run::evaluate(sample, Role::E1, prg(1), input.clone(), &mut messages)?);
            evaluation = evaluation.min(start.elapsed().as_secs_f64());
            if Instant::now() > until {
                break;
            }
        }
        let gates = (evaluation - cost.multiplications as f64 / macs).max(evaluation / 10.0);
        Ok(Rates { macs, dealing: dealt / dealing, gates: dealt / gates })
    }

    /// What a program of this cost takes; `cores` where all three parties share so many of this machine's.
    ///
    /// Both evaluators send at once and then wait for each other, so a round takes one way, half a round trip.
    pub fn predict(&self, cost: &Cost, rtt: f64, bandwidth: f64, cores: Option<usize>) -> Times {
        let dealt = cost.dealt_bytes.iter().sum::<u64>() as f64;
        let longest = cost.dealt_bytes[0].max(cost.dealt_bytes[1]) as f64;
        let opened = cost.opened_bytes as f64;
        let compute_s = cost.multiplications as f64 / self.macs + dealt / self.gates + 2.0 * opened / WIRE;
        let dealing_s = dealt / self.dealing + dealt / WIRE;
        let online_network_s = f64::from(cost.rounds) * (rtt / 2.0) + opened / bandwidth;
        let dealing_network_s = longest / bandwidth;
        let dealt_ahead_s = online_network_s + compute_s;
        let apart_s = dealt_ahead_s.max(rtt + dealing_s.max(dealing_network_s));
        // On few cores all three, and what the evaluators receive, take turns.
        let shared_s = cores.map_or(0.0, |n| (2.0 * compute_s + dealing_s + dealt / WIRE) / n as f64);
        let dealt_beside_s = apart_s.max(shared_s + f64::from(cost.rounds) * (rtt / 2.0));
        Times { compute_s, dealing_s, online_network_s, dealing_network_s, dealt_ahead_s, dealt_beside_s }
    }
}

fn prg(seed: u8) -> Prg {
    Prg::new(&SessionKey::from_seed([seed; 32]))
}

/// The linear kernel on a layer of middling size, in the ring of most layers.
fn kernel() -> f64 {
    let (rows, inp, out) = (32, 768, 768);
    let weights: Vec<i16> = (0..out * inp).map(|i| (i * 7919 % 4096) as i16 - 2048).collect();
    let (w, x) = (Weights::new(out, inp, &weights), vec![0x1234_5678; rows * inp]);
    let mut y = vec![0; rows * out];
    let mut best = f64::INFINITY;
    let until = Instant::now() + PATIENCE;
    while best.is_infinite() || Instant::now() < until {
        let start = Instant::now();
        linear(black_box(&x), rows, &w, 32, &mut y);
        black_box(&y);
        best = best.min(start.elapsed().as_secs_f64());
    }
    (rows * inp * out) as f64 / best
}

/// Keeps E1's corrections and plays an E2 whose openings are zero.
#[derive(Default)]
struct Messages(VecDeque<Vec<u8>>);

impl DealerSink for Messages {
    fn send(&mut self, to: Role, _: u32, bytes: Vec<u8>) -> Result<(), Error> {
        if to == Role::E1 {
            self.0.push_back(bytes);
        }
        Ok(())
    }
}

impl EvaluatorIo for Messages {
    fn dealt(&mut self, _: u32, _: usize) -> Result<Vec<u8>, Error> {
        self.0.pop_front().ok_or_else(|| Error::Transport("nothing was dealt".into()))
    }

    fn exchange(&mut self, _: u32, out: Vec<u8>) -> Result<Vec<u8>, Error> {
        Ok(vec![0; out.len()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_overlaps_counts_once() {
        let rates = Rates { macs: 1e9, dealing: 1e8, gates: 2e8 };
        let cost = Cost {
            rounds: 10,
            opened_bytes: 1_000_000,
            dealt_bytes: [30_000_000, 20_000_000],
            multiplications: 500_000_000,
        };
        let t = rates.predict(&cost, 0.01, 1e7, None);
        let near = |a: f64, b: f64| (a - b).abs() < 1e-12;
        assert!(near(t.compute_s, 0.752) && near(t.dealing_s, 0.55), "{t:?}");
        assert!(near(t.online_network_s, 0.15) && near(t.dealing_network_s, 3.0), "{t:?}");
        assert!(near(t.dealt_ahead_s, 0.902) && near(t.dealt_beside_s, 3.01), "{t:?}");
        let near_by = rates.predict(&cost, 1e-4, 1e10, None);
        assert!(near(near_by.dealt_beside_s, near_by.dealt_ahead_s), "{near_by:?}");
        let shared = rates.predict(&cost, 0.0, 1e10, Some(1));
        assert!(near(shared.dealt_beside_s, 2.0 * 0.752 + 0.55 + 0.05), "{shared:?}");
    }
}
