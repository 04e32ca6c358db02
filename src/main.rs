//! The `tacet` command.
#![forbid(unsafe_code)]

mod demo;
mod doctor;
mod embed;
mod fetch;
mod keys;
mod local;
mod plan;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Private transformer inference: three servers that do not trust each other compute on shares of your text.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start three parties on this machine and embed a few questions privately
    Demo(demo::Args),
    /// Run one party of a lane
    Party {
        /// The party's configuration
        #[arg(long)]
        config: PathBuf,
    },
    /// Embed texts privately
    #[command(after_help = embed::EXAMPLES)]
    Embed(embed::Args),
    /// Show what a model costs: every operation with shape, ring, rounds, bytes, and a predicted time
    Plan(plan::Args),
    /// Check this machine, the model's digests, and the parties
    #[command(after_help = doctor::EXAMPLES)]
    Doctor(doctor::Args),
    /// Make identities and client tokens
    #[command(subcommand)]
    Keys(Keys),
    /// Fetch models
    #[command(subcommand)]
    Model(Model),
}

#[derive(Subcommand)]
enum Keys {
    /// Make a party's certificate, private key and sealing key
    Party {
        /// Name of the organisation
        #[arg(long)]
        name: String,
        /// Where the files go
        #[arg(long, default_value = ".")]
        dir: PathBuf,
    },
    /// Issue a client's token, printed once; its hash goes into the clients file
    Client {
        /// Name of the client
        #[arg(long)]
        name: String,
        /// The party's clients file
        #[arg(long, default_value = "clients.toml")]
        clients: PathBuf,
    },
}

#[derive(Subcommand)]
enum Model {
    /// Fetch a model into the cache and print its directory
    Pull {
        /// Name on the hub
        name: Option<String>,
    },
}

fn main() {
    if let Err(e) = run(Cli::parse().command) {
        eprintln!("error: {e:#}");
        std::process::exit(1);
    }
}

/// One thread for all network work: a round is a few tens of microseconds there, a millisecond on a pool.
fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Demo(args) => runtime()?.block_on(demo::run(args)),
        Command::Party { config } => {
            let config = tacet_party::config::Config::load(&config)?;
            Ok(runtime()?.block_on(tacet_party::serve(config))?)
        }
        Command::Embed(args) => runtime()?.block_on(embed::run(args)),
        Command::Plan(args) => plan::run(args),
        Command::Doctor(args) => runtime()?.block_on(doctor::run(args)),
        Command::Keys(Keys::Party { name, dir }) => {
            std::fs::create_dir_all(&dir)?;
            let made = keys::make(&dir, &name)?;
            println!(
                "certificate = {:?}\nseal_public = {:?}",
                made.certificate.display().to_string(),
                made.seal_public
            );
            Ok(())
        }
        Command::Keys(Keys::Client { name, clients }) => {
            println!("{}", keys::client(&clients, &name)?);
            Ok(())
        }
        Command::Model(Model::Pull { name }) => {
            println!("{}", fetch::model_dir(name.as_deref())?.display());
            Ok(())
        }
    }
}
