//! `tacet party`: one party of a lane, until it is told to stop.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args as ClapArgs;
use tacet_party::config::Config;

pub const EXAMPLES: &str = "\
Example:
  tacet party --config alpha/party.toml

SIGTERM and Ctrl-C let running sessions finish. /readyz at the configured http address says whether the lane is linked.";

#[derive(ClapArgs)]
pub struct Args {
    /// The party's configuration; paths in it are relative to its folder
    #[arg(long)]
    config: PathBuf,
}

/// Serves.
pub async fn run(args: Args) -> Result<()> {
    let config = Config::load(&args.config)?;
    files(&config).with_context(|| args.config.display().to_string())?;
    Ok(tacet_party::serve(config).await?)
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
