//! `tacet plan`: what a model costs before anything runs.

use anyhow::{Context, Result, bail};
use clap::Args as ClapArgs;
use tacet_protocol::model::BertModel;
use tacet_protocol::plan::Planner;
use tacet_protocol::query::padded;

use crate::fetch;

#[derive(ClapArgs)]
pub struct Args {
    /// Model directory or name
    model: Option<String>,
    /// Tokens of a text; padded to the next of the lengths that parties see
    #[arg(long, default_value_t = 128)]
    tokens: usize,
    /// Round-trip time between parties, such as 1ms or 200us
    #[arg(long, default_value = "100us")]
    rtt: String,
    /// Bandwidth between parties, such as 1Gbit or 100Mbit
    #[arg(long, default_value = "8Gbit")]
    bandwidth: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn number(text: &str, units: &[(&str, f64)]) -> Result<f64> {
    for (unit, factor) in units {
        if let Some(n) = text.strip_suffix(unit) {
            let v: f64 = n.trim().parse().with_context(|| format!("{text:?} is not a number with a unit"))?;
            if !(v.is_finite() && v > 0.0) {
                bail!("{text:?} is not positive");
            }
            return Ok(v * factor);
        }
    }
    bail!("{text:?}: a unit is missing, one of {}", units.iter().map(|u| u.0).collect::<Vec<_>>().join(", "))
}

/// Prints the plan.
pub fn run(args: Args) -> Result<()> {
    let rtt = number(&args.rtt, &[("us", 1e-6), ("ms", 1e-3), ("s", 1.0)])?;
    let bandwidth = number(&args.bandwidth, &[("Gbit", 1e9 / 8.0), ("Mbit", 1e6 / 8.0), ("kbit", 1e3 / 8.0)])?;
    let model = BertModel::load(&fetch::model_dir(args.model.as_deref())?)?;
    let program = Planner::new(&model)?.program(padded(args.tokens).unwrap_or(args.tokens))?;
    let (cost, lines) = (program.cost(), program.describe());
    // Links are full duplex and the dealer's two run beside the evaluators' one.
    let longest = cost.dealt_bytes[0].max(cost.dealt_bytes[1]) as f64 / bandwidth;
    let network = cost.rounds as f64 * rtt + (cost.opened_bytes as f64 / bandwidth).max(longest);
    if args.json {
        let v =
            serde_json::json!({ "tokens": program.tokens(), "cost": cost, "network_s": network, "operations": lines });
        println!("{}", serde_json::to_string(&v)?);
        return Ok(());
    }
    println!(
        "{:>4}  {:<14}{:>12}{:>5}{:>10}{:>9}{:>7}{:>11}{:>12}  makes",
        "step", "operation", "shape", "ring", "unit", "bound", "rounds", "opened", "dealt"
    );
    for l in lines {
        let show = |v: f64| if v == 0.0 { "-".to_string() } else { format!("{v:.1e}") };
        println!(
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
        );
    }
    let dealt: u64 = cost.dealt_bytes.iter().sum();
    println!(
        "\n{} rounds, {:.1} MB opened each way, {:.1} MB dealt, {:.2} G multiply-accumulates an evaluator\nnetwork time at {} and {}: {network:.3} s",
        cost.rounds,
        cost.opened_bytes as f64 / 1e6,
        dealt as f64 / 1e6,
        cost.multiplications as f64 / 1e9,
        args.rtt,
        args.bandwidth
    );
    Ok(())
}
