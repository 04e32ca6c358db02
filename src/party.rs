//! `tacet party`: one party of a lane, until it is told to stop.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args as ClapArgs;
use tacet_party::config::{BackendKind, Config};

use crate::planning;

pub const EXAMPLES: &str = "\
Examples:
  tacet party --config alpha/party.toml
  tacet party --config alpha/party.toml --backend cpu

SIGTERM and Ctrl-C let running sessions finish. /readyz at the configured http address says whether the lane is linked.";

#[derive(ClapArgs)]
pub struct Args {
    /// The party's configuration; paths in it are relative to its folder
    #[arg(long)]
    config: PathBuf,
    /// Where products are computed, in place of the configuration's word: auto, cpu or gpu. `auto` takes a graphics adapter
    /// in hardware if there is one that is faster than the processor; `gpu` takes any, and fails without one
    #[arg(long)]
    backend: Option<BackendKind>,
    /// Threads that products on the processor are divided among, in place of the configuration's; 0 for one a core
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(0..=1024))]
    threads: Option<u16>,
}

/// Serves.
pub async fn run(args: Args) -> Result<()> {
    let mut config = Config::load(&args.config)?;
    config.backend = args.backend.unwrap_or(config.backend);
    config.threads = args.threads.map_or(config.threads, usize::from);
    files(&config).with_context(|| args.config.display().to_string())?;
    config.plans = config.plans.or_else(planning::dir);
    Ok(tacet_party::serve(config, planning::told).await?)
}

/// Every file that the configuration names can be opened: the error says which field names one that cannot.
fn files(c: &Config) -> Result<()> {
    let opens = |field: &str, path: &Path| -> Result<()> {
        File::open(path).with_context(|| format!("{field} = {:?}", path.display().to_string()))?;
        Ok(())
    };
    opens("model", &c.model)?;
    opens("certificate", &c.certificate)?;
    opens("key", &c.key)?;
    opens("seal_key", &c.seal_key)?;
    opens("clients", &c.clients)?;
    c.peer.iter().try_for_each(|p| opens(&format!("certificate of peer {}", p.name), &p.certificate))
}
