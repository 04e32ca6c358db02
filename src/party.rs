//! `tacet party`: one party of a lane, until it is told to stop.

use std::fs::File;
use std::os::unix::process::CommandExt;
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
    /// Threads that what the processor computes is divided among, in place of the configuration's; 0 for one a core
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(0..=1024))]
    threads: Option<u16>,
}

/// How long the allocator keeps what was freed, in milliseconds, and its name for that.
///
/// A party under load frees and takes gigabytes a second. The allocator's own second of patience had the system clear fresh
/// pages all the time: a tenth of a short query's time, a fifth of a long prompt's.
const PATIENCE: (&str, &str) = ("MIMALLOC_PURGE_DELAY", "30000");

/// Starts this program over, as the same process, with an allocator that keeps memory for longer: it reads its settings
/// before `main`. A setting that is there stays as it is.
pub fn settle() {
    let (name, value) = PATIENCE;
    if std::env::var_os(name).is_none()
        && let Ok(program) = std::env::current_exe()
    {
        let mut args = std::env::args_os();
        let mut again = std::process::Command::new(program);
        args.next().map(|own| again.arg0(own));
        // Comes back only where it cannot: then the process goes on as it is.
        let _ = again.args(args).env(name, value).exec();
    }
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
