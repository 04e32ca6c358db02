//! What `tacet bench` found, as JSON and as text.

use std::fmt::Write;

use anyhow::Result;
use serde::Serialize;
use tacet_client::{Phases, Spent};
use tacet_protocol::program::Cost;

use crate::local::PartyReport;
use crate::rates::{Rates, Times};

/// Medians of several queries or steps, in seconds.
#[derive(Serialize)]
pub struct Query {
    /// At the client.
    pub total_s: f64,
    /// At the slower evaluator.
    pub online_s: f64,
    /// At the dealer, waiting for room included.
    pub dealing_s: f64,
    /// Where the time went, as the parties say.
    pub phases: Phases,
    /// Of a round, what the slower evaluator waits for the other: the way there, the other's being behind, and the turns that
    /// threads take on the processors.
    pub peer_wait_per_round_s: f64,
    /// Processor seconds of each party's process, E1, E2 and the dealer, for each query: the mean. Where it is dealt ahead
    /// the next query's dealing is in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub processor_s: Option<[f64; 3]>,
    /// The mean, where it is of steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mean_total_s: Option<f64>,
    /// `total_s` over that of the same matrices in f32 in the clear, on one thread.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub over_plain: Option<f64>,
}

/// One measured query or step.
pub struct Sample {
    pub total_s: f64,
    pub online_s: f64,
    pub dealing_s: f64,
    pub rounds: u64,
    pub phases: Phases,
}

pub fn median(mut v: Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    v[v.len() / 2]
}

impl Query {
    /// Medians of at least one sample.
    pub fn of(samples: &[Sample]) -> Query {
        let of = |f: &dyn Fn(&Sample) -> f64| median(samples.iter().map(f).collect());
        let phases = Phases {
            computing_s: of(&|s| s.phases.computing_s),
            computing_processor_s: of(&|s| s.phases.computing_processor_s),
            dealer_wait_s: of(&|s| s.phases.dealer_wait_s),
            peer_wait_s: of(&|s| s.phases.peer_wait_s),
            dealing_s: of(&|s| s.phases.dealing_s),
            dealing_processor_s: of(&|s| s.phases.dealing_processor_s),
            room_wait_s: of(&|s| s.phases.room_wait_s),
        };
        Query {
            total_s: of(&|s| s.total_s),
            online_s: of(&|s| s.online_s),
            dealing_s: of(&|s| s.dealing_s),
            phases,
            peer_wait_per_round_s: of(&|s| s.phases.peer_wait_s / s.rounds.max(1) as f64),
            processor_s: None,
            mean_total_s: None,
            over_plain: None,
        }
    }

    /// With the mean of the totals.
    pub fn steps(samples: &[Sample]) -> Query {
        let mean = samples.iter().map(|s| s.total_s).sum::<f64>() / samples.len() as f64;
        Query { mean_total_s: Some(mean), ..Query::of(samples) }
    }
}

/// What a decoder does.
#[derive(Serialize)]
pub struct Generation {
    /// From the prompt's tokens to the first logits.
    pub prefill_s: f64,
    /// One after another.
    pub tokens_per_s: f64,
    pub prefill: Query,
    /// Steps of one token after another: dealt beside, as far as the dealer is not ahead by itself.
    pub step: Query,
    /// Steps that come later than the dealing of theirs.
    pub step_ahead: Query,
    pub rounds_per_step: u64,
    /// Of the prompt and the steps one after another, by kind: opened each way, dealt to both, and announced.
    pub opened_bytes: u64,
    pub dealt_bytes: u64,
    pub announced_bytes: u64,
    /// Of prompt and steps.
    pub spent: Spent,
}

/// What is run, on what.
#[derive(Serialize)]
pub struct Setting {
    pub model: String,
    pub tokens: usize,
    pub padded: usize,
    pub processor: String,
    pub cores: usize,
    /// Of the processor, each party's.
    pub threads: usize,
    /// What else ran here before: the mean number of threads that wanted a processor in the last minute.
    pub load: Option<f64>,
    pub rtt_s: Option<f64>,
    pub bandwidth_bytes_per_s: Option<f64>,
    pub loss: Option<f64>,
    pub cost: Cost,
    pub mtu: Option<usize>,
    /// One forward pass of the same matrices in f32, in the clear, on one thread.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plain_f32_s: Option<f64>,
    /// Of a decoder, such a pass of one row after as many others as the predicted step has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plain_f32_step_s: Option<f64>,
}

/// What it should take, by means of the rates that were measured before, between and after.
#[derive(Serialize)]
pub struct Prediction {
    /// Of the first program; a round that is measured without a network is its `round_s`.
    pub rates: Rates,
    pub predicted: Times,
    /// Of a decoder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub predicted_step: Option<Times>,
}

/// What it took.
#[derive(Default, Serialize)]
pub struct Found {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dealt_beside: Option<Query>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dealt_ahead: Option<Query>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dealt_ahead_from_disk: Option<Query>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation: Option<Generation>,
    pub parties: Vec<PartyReport>,
}

impl Found {
    /// Sets the ratios to the times in the clear.
    pub fn over(&mut self, s: &Setting) {
        let prompts = [&mut self.dealt_beside, &mut self.dealt_ahead, &mut self.dealt_ahead_from_disk];
        for q in prompts.into_iter().flatten() {
            q.over_plain = s.plain_f32_s.map(|plain| q.total_s / plain);
        }
        if let Some(g) = &mut self.generation {
            for (q, plain) in [
                (&mut g.prefill, s.plain_f32_s),
                (&mut g.step, s.plain_f32_step_s),
                (&mut g.step_ahead, s.plain_f32_step_s),
            ] {
                q.over_plain = plain.map(|plain| q.total_s / plain);
            }
        }
    }
}

#[derive(Serialize)]
pub struct Report {
    #[serde(flatten)]
    pub setting: Setting,
    #[serde(flatten)]
    pub prediction: Prediction,
    #[serde(flatten)]
    pub found: Found,
}

impl Report {
    pub fn text(&self) -> Result<String> {
        let mut out = String::new();
        let Report { setting: r, prediction: Prediction { rates, predicted: p, predicted_step }, found } = self;
        write!(
            out,
            "{}, {} tokens (padded to {}), on {} ({} cores",
            r.model, r.tokens, r.padded, r.processor, r.cores
        )?;
        writeln!(out, "{})", r.load.map_or_else(String::new, |l| format!(", load {l:.2}")))?;
        if let (Some(rtt), Some(bandwidth), Some(loss), Some(mtu)) = (r.rtt_s, r.bandwidth_bytes_per_s, r.loss, r.mtu) {
            let (ms, mbit, lost) = (rtt * 1e3, bandwidth * 8e-6, loss * 100.0);
            writeln!(
                out,
                "emulated: {ms} ms there and back, {mbit} Mbit/s, packets of {mtu} bytes, {lost} % of them lost"
            )?;
        }
        let dealt = r.cost.dealt_bytes.iter().sum::<u64>() as f64 / 1e6;
        let opened = r.cost.opened_bytes as f64 / 1e6;
        writeln!(out, "{} rounds, {opened:.1} MB opened each way, {dealt:.1} MB dealt", r.cost.rounds)?;
        let mut rows = Vec::new();
        if let (Some(b), Some(a)) = (&found.dealt_beside, &found.dealt_ahead) {
            rows.push(("dealt beside", b, p.total_beside_s, p.dealt_beside_s));
            rows.push(("dealt ahead", a, p.total_ahead_s, p.dealt_ahead_s));
            rows.extend(
                found.dealt_ahead_from_disk.iter().map(|d| ("  from disk", d, p.total_ahead_s, p.dealt_ahead_s)),
            );
        }
        if let (Some(g), Some(s)) = (&found.generation, predicted_step) {
            rows.push(("prompt", &g.prefill, p.total_beside_s, p.dealt_beside_s));
            // The dealer goes on to the next steps while one runs, whether or not that one's dealing was there.
            rows.push(("step", &g.step, s.total_beside_s, s.dealt_beside_s));
            rows.push(("step, ahead", &g.step_ahead, s.total_beside_s, s.dealt_beside_s));
        }
        writeln!(
            out,
            "{:<14}{:>9}{:>10}{:>9}{:>10}{:>11}{:>12}",
            "seconds", "total", "predicted", "online", "predicted", "dealing", "over plain"
        )?;
        for (name, q, total, online) in &rows {
            let (t, o, d) = (q.total_s, q.online_s, q.dealing_s);
            let plain = q.over_plain.map_or("-".into(), |times| format!("{times:.1} x"));
            writeln!(out, "{name:<14}{t:>9.4}{total:>10.4}{o:>9.4}{online:>10.4}{d:>11.4}{plain:>12}")?;
        }
        writeln!(out, "\nof it, at     the slower evaluator                      the dealer")?;
        let heads = ["computing", "for dealer", "for other", "a round", "computing", "for room"];
        writeln!(out, "{:<14}{}", "", heads.map(|h| format!("{h:>11}")).concat())?;
        for (name, q, ..) in &rows {
            let f = &q.phases;
            let all =
                [f.computing_s, f.dealer_wait_s, f.peer_wait_s, q.peer_wait_per_round_s, f.dealing_s, f.room_wait_s];
            writeln!(out, "{name:<14}{}", all.map(|s| format!("{s:>11.5}")).concat())?;
        }
        let elsewhere = found.parties.iter().any(|p| p.backend.as_deref().is_some_and(|b| b != "cpu"));
        if r.threads > 1 || elsewhere {
            let on =
                if elsewhere { "not on the processor alone".into() } else { format!("on {} threads each", r.threads) };
            writeln!(out, "predicted is for parties of one thread of the processor; these compute {on}")?;
        }
        for (name, q, ..) in &rows {
            if let Some([e1, e2, dealer]) = q.processor_s {
                writeln!(out, "processor seconds, {name}: E1 {e1:.3}, E2 {e2:.3}, dealer {dealer:.3}")?;
            }
        }
        let idle = rates.exchange.round_s * 1e6;
        let relay = if r.mtu.is_some() { ", a relay apart that adds no delay of its own" } else { "" };
        writeln!(out, "a round of 1 KB between two endpoints here that do nothing else{relay}: {idle:.0} us\n")?;
        if let Some(plain) = r.plain_f32_s {
            let step = r.plain_f32_step_s.map_or(String::new(), |s| format!(", a step {s:.4} s"));
            writeln!(out, "in the clear, f32, one thread: {plain:.4} s{step}")?;
        }
        if let (Some(g), Some(s)) = (&found.generation, predicted_step) {
            writeln!(out, "{:.1} tokens/s (predicted {:.1})", g.tokens_per_s, 1.0 / s.total_beside_s)?;
            let [opened, dealt] = [g.opened_bytes, g.dealt_bytes].map(|b| b as f64 / 1e6);
            writeln!(
                out,
                "{} rounds a step; with the prompt {opened:.1} MB opened each way, {dealt:.1} MB dealt, {} bytes announced",
                g.rounds_per_step, g.announced_bytes
            )?;
        }
        for p in &found.parties {
            let (name, role, peak) = (p.name, p.role, p.peak_mb);
            let on = p.backend.as_deref().map_or(String::new(), |b| format!(", computes on {b}"));
            writeln!(out, "{name:<6} {role:?}: {peak:.0} MB resident at its peak{on}")?;
        }
        Ok(out)
    }
}
