//! The `tacet` command.
#![forbid(unsafe_code)]

mod bench;
mod chat;
mod demo;
mod doctor;
mod embed;
mod exchange;
mod fetch;
mod generate;
mod hub;
mod keys;
mod local;
mod parties;
mod party;
mod plain;
mod plan;
mod planning;
mod rates;
mod relay;
mod serve;
mod shape;

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};

/// Tensors of megabytes come and go every round: memory that stays with the process for a while costs no page faults.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const EXAMPLES: &str = "\
Start here:
  tacet demo                                       # fetches a small model, runs three parties on this machine
  tacet embed --local --text \"How do I freeze my card?\"

Exit status: 0 if all went well, 1 if something failed, 2 if the command line is wrong.";

/// Private transformer inference: three servers that do not trust each other compute on shares of your text.
#[derive(Parser)]
#[command(version, about, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start three parties on this machine and embed a few questions privately
    #[command(after_help = demo::EXAMPLES)]
    Demo(demo::Args),
    /// Run one party of a lane
    #[command(after_help = party::EXAMPLES)]
    Party(party::Args),
    /// Embed texts privately
    #[command(after_help = embed::EXAMPLES)]
    Embed(embed::Args),
    /// Continue a text privately
    #[command(after_help = generate::EXAMPLES)]
    Generate(generate::Args),
    /// Talk to a model privately
    #[command(after_help = chat::EXAMPLES)]
    Chat(chat::Args),
    /// Serve OpenAI's and Ollama's APIs on this machine, so that existing applications become private
    #[command(after_help = serve::EXAMPLES)]
    Serve(serve::Args),
    /// Show what a model costs: every operation with shape, ring, rounds, bytes, and a predicted time
    #[command(after_help = plan::EXAMPLES)]
    Plan(plan::Args),
    /// Measure a model over three parties of this machine, also as if they were far apart
    #[command(after_help = bench::EXAMPLES)]
    Bench(bench::Args),
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

const KEYS_PARTY: &str = "\
Example:
  tacet keys party --name alpha --dir alpha

Makes alpha.crt, alpha.key and alpha.seal. Hand the certificate and the printed seal_public to the other parties and to clients;
the two other files never leave this machine. Existing files are not overwritten.";

const KEYS_CLIENT: &str = "\
Example:
  tacet keys client --name clinic --clients alpha/clients.toml

All three parties need the same entry: copy the [[client]] lines, which hold a hash only, to their clients files.";

#[derive(Subcommand)]
enum Keys {
    /// Make a party's certificate, private key and sealing key
    #[command(after_help = KEYS_PARTY)]
    Party {
        /// Name of the organisation
        #[arg(long)]
        name: String,
        /// Where the files go
        #[arg(long, default_value = ".")]
        dir: PathBuf,
    },
    /// Issue a client's token, printed once; its hash goes into the clients file
    #[command(after_help = KEYS_CLIENT)]
    Client {
        /// Name of the client, not used before
        #[arg(long)]
        name: String,
        /// The party's clients file
        #[arg(long, default_value = "clients.toml")]
        clients: PathBuf,
    },
}

const MODEL_PULL: &str = "\
Examples:
  tacet model pull
  tacet model pull HuggingFaceTB/SmolLM2-135M-Instruct
  TACET_CACHE=/srv/tacet HF_ENDPOINT=https://hub.example tacet model pull OWNER/MODEL

Models go to TACET_CACHE (~/.cache/tacet if not set), from HF_ENDPOINT (the Hugging Face hub if not set). Every command's --model
takes the name as well. The weights' SHA-256 is checked where the hub tells it.";

#[derive(Subcommand)]
enum Model {
    /// Fetch a model into the cache and print its directory
    #[command(after_help = MODEL_PULL)]
    Pull {
        /// Name on the hub, OWNER/MODEL; all-MiniLM-L6-v2 if absent
        name: Option<String>,
        /// Print the directory in a JSON object
        #[arg(long)]
        json: bool,
    },
}

fn main() {
    if let Err(e) = run(Cli::parse().command) {
        eprintln!("error: {e:#}");
        std::process::exit(1);
    }
}

/// Prints a table; a reader that has seen enough of it is no failure.
fn print(text: &str) -> Result<()> {
    match std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(e.into()),
        _ => Ok(()),
    }
}

/// One thread for all network work: a round is a few tens of microseconds there, a millisecond on a pool.
fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// Runs to the end, or until it is told to end; either way what was started is ended and cleaned up on the way out.
fn terminable(work: impl Future<Output = Result<()>>) -> Result<()> {
    runtime()?.block_on(async {
        let mut term = signal(SignalKind::terminate())?;
        // Under nohup the end of the terminal means nothing.
        let mut hangup = if ignored(SignalKind::hangup()) { None } else { Some(signal(SignalKind::hangup())?) };
        let gone = async {
            match &mut hangup {
                Some(h) => h.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            r = work => r,
            _ = term.recv() => bail!("terminated"),
            _ = gone => bail!("the terminal is gone"),
        }
    })
}

/// Whether whoever started this process had it ignore a signal, as far as the system tells.
fn ignored(kind: SignalKind) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|l| u64::from_str_radix(l.strip_prefix("SigIgn:")?.trim(), 16).ok());
    mask.is_some_and(|m| m >> (kind.as_raw_value() - 1) & 1 == 1)
}

/// As [`terminable`], and Ctrl-C ends it too.
fn interruptible(work: impl Future<Output = Result<()>>) -> Result<()> {
    terminable(async {
        tokio::select! {
            r = work => r,
            _ = tokio::signal::ctrl_c() => bail!("interrupted"),
        }
    })
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Demo(args) => interruptible(demo::run(args)),
        Command::Party(args) => {
            party::settle();
            runtime()?.block_on(party::run(args))
        }
        Command::Embed(args) => interruptible(embed::run(args)),
        Command::Generate(args) => interruptible(generate::run(args)),
        Command::Chat(args) => terminable(chat::run(args)),
        Command::Serve(args) => interruptible(serve::run(args)),
        Command::Plan(args) => interruptible(plan::run(args)),
        Command::Bench(args) => interruptible(bench::run(args)),
        Command::Doctor(args) => interruptible(doctor::run(args)),
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
        Command::Model(Model::Pull { name, json }) => interruptible(async {
            let dir = fetch::model_dir(name.as_deref()).await?;
            match json {
                true => {
                    println!("{}", serde_json::json!({"model": name.as_deref().unwrap_or(fetch::DEFAULT), "dir": dir}))
                }
                false => println!("{}", dir.display()),
            }
            Ok(())
        }),
    }
}
