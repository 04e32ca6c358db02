//! `tacet plan`: what a model costs before anything runs.

use std::fmt::Write;

use anyhow::{Context, Result, bail};
use clap::Args as ClapArgs;
use tacet_party::plans::Plans;
use tacet_protocol::plan::{DecoderPlanner, Keep};
use tacet_protocol::query::padded;

use crate::bench::answer;
use crate::exchange::Exchange;
use crate::rates::{Network, Rates, SAMPLE, next};
use crate::{fetch, planning};

pub const EXAMPLES: &str = "\
Examples:
  tacet plan --tokens 128 --rtt 1ms --bandwidth 1Gbit
  tacet plan models/SmolLM2-135M --tokens 64 --step
  tacet plan sentence-transformers/all-MiniLM-L6-v2 --tokens 32 --gmacs 40 --json

Rounds and bytes are exact. Seconds are predicted: rounds times half the round trip, bytes over the bandwidth, and the work and
what a message costs at rates that are measured on this machine when the command starts. Of parties apart they are for 100us
and 8Gbit where nothing else is said; of parties that share this machine for loopback then, otherwise for a network such as
`tacet bench` emulates, whose emulation takes its part of the processors.";

#[derive(ClapArgs)]
pub struct Args {
    /// Model directory or name
    model: Option<String>,
    /// Tokens of a text; padded to the next of the lengths that parties see
    #[arg(long, default_value_t = 128)]
    tokens: usize,
    /// Of a decoder, the step that adds one token after so many, in place of the prompt
    #[arg(long)]
    step: bool,
    /// Round-trip time between parties, such as 1ms or 200us
    #[arg(long, value_name = "TIME")]
    rtt: Option<String>,
    /// Bandwidth between parties, such as 1Gbit or 100Mbit
    #[arg(long, value_name = "RATE")]
    bandwidth: Option<String>,
    /// Rate of the linear layers in 10^9 multiply-accumulates a second; measured on this machine if absent
    #[arg(long)]
    gmacs: Option<f64>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Seconds there and back where a command line does not say.
pub const RTT: f64 = 100e-6;
/// Bytes a second, likewise.
pub const BANDWIDTH: f64 = 1e9;
/// Bytes of most networks' largest packet, likewise.
pub const MTU: u16 = 1500;

fn number(text: &str, units: &[(&str, f64)], within: [f64; 2]) -> Result<f64> {
    for (unit, factor) in units {
        if let Some(n) = text.strip_suffix(unit) {
            let v: f64 = n.trim().parse().with_context(|| format!("{text:?} is not a number with a unit"))?;
            if !(within[0]..=within[1]).contains(&(v * factor)) {
                let [least, most] = within.map(|v| v / factor);
                bail!("{text:?} is not within {least}{unit} and {most}{unit}");
            }
            return Ok(v * factor);
        }
    }
    bail!("{text:?}: a unit is missing, one of {}", units.iter().map(|u| u.0).collect::<Vec<_>>().join(", "))
}

/// Seconds, up to a minute.
pub fn duration(text: &str) -> Result<f64> {
    number(text, &[("us", 1e-6), ("ms", 1e-3), ("s", 1.0)], [0.0, 60.0])
}

/// Bytes a second, of 64 kbit or more.
pub fn bandwidth(text: &str) -> Result<f64> {
    number(text, &[("Gbit", 1e9 / 8.0), ("Mbit", 1e6 / 8.0), ("kbit", 1e3 / 8.0)], [8e3, 1e12])
}

/// Rates of a decoder's step, measured on one that follows a short prompt.
pub fn step(p: &DecoderPlanner, exchange: Exchange, macs: Option<f64>) -> Result<Rates> {
    Rates::measure(&p.program(true, 0, 8, false)?, Some(&p.program(true, 8, 1, false)?), exchange, macs)
}

/// Prints the plan.
pub async fn run(args: Args) -> Result<()> {
    let rtt = args.rtt.as_deref().map(duration).transpose()?;
    let bandwidth = args.bandwidth.as_deref().map(bandwidth).transpose()?;
    let emulated = rtt.is_some() || bandwidth.is_some();
    let (rtt, bandwidth) = (rtt.unwrap_or(RTT), bandwidth.unwrap_or(BANDWIDTH));
    if args.gmacs.is_some_and(|g| !(g.is_finite() && g > 0.0)) {
        bail!("--gmacs is not positive");
    }
    let (plans, _) = Plans::load(
        &fetch::model_dir(args.model.as_deref()).await?,
        Keep::Weights,
        planning::shelf().as_ref(),
        &planning::told,
    )?;
    let program = match (&plans, args.step) {
        (Plans::Decoder(p), true) => p.program(true, args.tokens, 1, false)?,
        (Plans::Encoder(_), true) => bail!("--step is for decoders: an encoder takes a text at once"),
        (_, false) => plans.first(padded(args.tokens).unwrap_or(args.tokens))?,
    };
    let (cost, lines) = (program.cost(), program.describe());
    let exchange = Exchange::measure(None)?;
    let macs = args.gmacs.map(|g| g * 1e9);
    let (rates, sample) = match (&plans, args.step) {
        (Plans::Decoder(p), true) => (step(p, exchange, macs)?, 1),
        _ => {
            let sample = program.tokens().min(SAMPLE);
            (Rates::measure(&plans.first(sample)?, None, exchange, macs)?, sample)
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let next = next(matches!(plans, Plans::Decoder(_)), args.step);
    let apart = Network { rtt, bandwidth, cores: None, next };
    let here = match emulated {
        true => Network { cores: Some(cores), ..apart },
        false => Network { rtt: 0.0, bandwidth: f64::INFINITY, cores: Some(cores), next },
    };
    let times = rates.predict(&cost, answer(&program), apart);
    let emulating = if emulated { Exchange::measure(Some(MTU.into()))? } else { exchange };
    let shared = Rates { exchange: emulating, ..rates }.predict(&cost, answer(&program), here);
    if args.json {
        let v = serde_json::json!({
            "tokens": program.tokens(), "cost": cost, "rates": rates, "times": times, "times_shared": shared,
            "operations": lines,
        });
        return crate::print(&format!("{v}\n"));
    }
    let mut out = String::new();
    writeln!(
        out,
        "{:>4}  {:<14}{:>12}{:>5}{:>10}{:>9}{:>7}{:>11}{:>12}  makes",
        "step", "operation", "shape", "ring", "unit", "bound", "rounds", "opened", "dealt"
    )?;
    for l in lines {
        let show = |v: f64| if v == 0.0 { "-".to_string() } else { format!("{v:.1e}") };
        writeln!(
            out,
            "{:>4}  {:<14}{:>12}{:>5}{:>10}{:>9}{:>7}{:>11}{:>12}  {}",
            l.index,
            l.op,
            l.shape.iter().map(|n| n.to_string()).collect::<Vec<_>>().join("x"),
            l.bits,
            show(l.scale),
            show(l.bound),
            l.rounds,
            l.opened_bytes,
            l.dealt_bytes,
            l.detail
        )?;
    }
    let dealt: u64 = cost.dealt_bytes.iter().sum();
    writeln!(
        out,
        "\n{} rounds, {:.1} MB opened each way, {:.1} MB dealt, {:.2} G multiply-accumulates an evaluator",
        cost.rounds,
        cost.opened_bytes as f64 / 1e6,
        dealt as f64 / 1e6,
        cost.multiplications as f64 / 1e9,
    )?;
    let (a, b) = (&rates.alone, &rates.beside);
    let from = if args.gmacs.is_some() { "as given" } else { "measured here" };
    writeln!(out, "rates of a thread alone / beside another (measured on {sample} tokens):")?;
    writeln!(out, "  linear layers {:.1} / {:.1} GMAC/s ({from})", a.macs / 1e9, b.macs / 1e9)?;
    let megabytes = [a.dealing, b.dealing, a.gates, b.gates].map(|r| r / 1e6);
    let [deal, deal_beside, gates, gates_beside] = megabytes;
    writeln!(out, "  dealing {deal:.0} / {deal_beside:.0} MB/s, gates {gates:.0} / {gates_beside:.0} MB/s dealt")?;
    let x = &rates.exchange;
    writeln!(
        out,
        "a round {:.0} us, of processors {:.0} us; a byte opened {:.2} ns, of processors {:.2} ns, dealt {:.2} ns (measured here)",
        x.round_s * 1e6,
        x.round_processor_s * 1e6,
        x.byte_s * 1e9,
        x.byte_processor_s * 1e9,
        x.dealt_processor_s * 1e9
    )?;
    let (ms, mbit) = (rtt * 1e3, bandwidth * 8e-6);
    writeln!(
        out,
        "predicted at {ms} ms there and back and {mbit} Mbit a second, each party on a machine like this one:"
    )?;
    writeln!(out, "  evaluators {:.3} s, their network {:.3} s", times.compute_s, times.online_network_s)?;
    writeln!(out, "  dealer {:.3} s, its network {:.3} s", times.dealing_s, times.dealing_network_s)?;
    let over = if emulated { "over such a network, emulated" } else { "over loopback" };
    let here = format!("all three on this one, {cores} cores, {over}");
    for (t, where_) in [(&times, "apart"), (&shared, here.as_str())] {
        writeln!(
            out,
            "  a query: {:.3} s dealt ahead, {:.3} s dealt while it runs; {:.3} s and {:.3} s at the client ({where_})",
            t.dealt_ahead_s, t.dealt_beside_s, t.total_ahead_s, t.total_beside_s
        )?;
    }
    crate::print(&out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_units() {
        let units = [("us", 1e-6), ("ms", 1e-3), ("s", 1.0)];
        let number = |text| number(text, &units, [0.0, 60.0]);
        assert_eq!(number("200us").unwrap(), 200.0 * 1e-6);
        assert_eq!(number("1.5 s").unwrap(), 1.5);
        for bad in ["5", "ms", "-1ms", "61s", "1e300s", "infs", "NaNs"] {
            assert!(number(bad).is_err(), "{bad}");
        }
        assert!(bandwidth("63kbit").unwrap_err().to_string().contains("64kbit"));
    }
}
