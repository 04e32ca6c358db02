//! Whom a command asks: the parties of a file, or three that run on this machine as long as it does.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args as ClapArgs;
use tacet_client::Parties;
use tacet_party::config::{BackendKind, Limits, Pool};

use crate::local::{Lane, PATIENCE};

#[derive(ClapArgs)]
#[group(skip)]
#[command(group = clap::ArgGroup::new("asked").required(true).args(["parties", "local"]))]
pub struct Asked {
    /// The parties to ask
    #[arg(long, value_name = "FILE")]
    parties: Option<PathBuf>,
    /// Start three parties on this machine for the run
    #[arg(long)]
    local: bool,
    /// Where the parties of this machine compute: auto, cpu or gpu
    #[arg(long, default_value = "auto", conflicts_with = "parties")]
    backend: BackendKind,
}

impl Asked {
    /// The parties, and the lane that has to live as long as they are asked.
    pub async fn parties(&self, model: &Path) -> Result<(Option<Lane>, Parties)> {
        match &self.parties {
            Some(file) => Ok((None, Parties::load(file)?)),
            None => {
                let lane = linked(launch(model, self.backend)?).await?;
                let parties = lane.parties.clone();
                Ok((Some(lane), parties))
            }
        }
    }
}

/// How long nothing is said of parties that are not linked.
const QUIET: Duration = Duration::from_secs(20);

/// Starts three parties of this machine.
pub fn launch(model: &Path, backend: BackendKind) -> Result<Lane> {
    Lane::launch(&std::env::current_exe()?, model, Limits::default(), Pool::default(), backend)
}

/// Waits until they are linked; they end if this is dropped.
pub async fn linked(mut lane: Lane) -> Result<Lane> {
    let until = Instant::now() + PATIENCE;
    let mut told = Instant::now();
    while !lane.linked(until)? {
        if told.elapsed() > QUIET {
            eprintln!("waiting for the parties:\n{}", lane.reasons());
            told = Instant::now();
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(lane)
}
