//! `tacet serve`: the endpoint on the client's machine that existing applications use unchanged.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args as ClapArgs;
use tacet_client::generate::Codec;
use tacet_client::serve::{About, Config, Endpoint, Model, Registry, TextModel};
use tacet_client::{Client, Parties};
use tacet_party::config::{BackendKind, Limits, Pool, hex};
use zeroize::Zeroizing;

use crate::fetch;
use crate::keys;
use crate::local::Lane;

pub const EXAMPLES: &str = "\
Examples:
  tacet serve --local --model models/SmolLM2-135M-Instruct
  tacet serve --parties parties.toml --model models/SmolLM2-135M-Instruct --listen 127.0.0.1:11434 --no-token

Point a client of OpenAI's API at http://127.0.0.1:8420/v1, or one of Ollama's at http://127.0.0.1:8420. Text exists on this
machine only. Each model needs parties of its own: --parties is for the one --model.";

#[derive(ClapArgs)]
pub struct Args {
    /// Model directory or name: a decoder generates, an encoder embeds
    #[arg(long)]
    model: String,
    /// Name under which clients ask for it; the directory's if absent
    #[arg(long)]
    name: Option<String>,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1:8420")]
    listen: SocketAddr,
    /// Bearer token that clients must bring; one is made and printed if absent
    #[arg(long, env = "TACET_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// Ask for no token; on loopback only
    #[arg(long, conflicts_with = "token")]
    no_token: bool,
    /// Host name under which clients may address this endpoint, besides localhost
    #[arg(long)]
    host: Vec<String>,
    /// Web origin whose pages may call this endpoint
    #[arg(long)]
    origin: Vec<String>,
    /// Requests at a time; more are told to come back
    #[arg(long, default_value_t = 4)]
    running: usize,
    /// The parties to ask
    #[arg(long, conflicts_with = "local", required_unless_present = "local")]
    parties: Option<PathBuf>,
    /// Start three parties on this machine
    #[arg(long)]
    local: bool,
    /// Where the parties of this machine compute products: auto, cpu or gpu
    #[arg(long, default_value = "auto", conflicts_with = "parties")]
    backend: BackendKind,
}

fn about(dir: &Path, family: &str, digest: [u8; 32]) -> About {
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let bytes = files.filter_map(|f| f.metadata().ok()).map(|m| m.len()).sum();
    About { bytes, digest: hex(&digest), family: family.into(), ..About::default() }
}

/// Serves until told to stop.
pub async fn run(args: Args) -> Result<()> {
    let dir = fetch::model_dir(Some(&args.model))?;
    let name = match (&args.name, dir.file_name()) {
        (Some(n), _) => n.clone(),
        (None, Some(n)) => n.to_string_lossy().rsplit("--").next().unwrap_or_default().to_string(),
        (None, None) => bail!("--name is needed for this directory"),
    };
    let (_lane, parties) = match &args.parties {
        Some(p) => (None, Parties::load(p)?),
        None => {
            let lane =
                Lane::start_on(&std::env::current_exe()?, &dir, Limits::default(), Pool::default(), args.backend)?;
            let parties = lane.parties.clone();
            (Some(lane), parties)
        }
    };
    let builder = Client::builder().parties(parties).model(&dir).deadline(Duration::from_secs(300));
    let model = if tacet_protocol::model::is_encoder(&dir) {
        let client = builder.connect().await?;
        let about = about(&dir, "bert", client.model().digest());
        Model { name: name.clone(), about, text: None, embedder: Some(Arc::new(client)) }
    } else {
        let generator = builder.generator().await?;
        let about = about(&dir, generator.model().config.family, generator.model().digest());
        let text = TextModel { codec: Arc::new(Codec::load(&dir)?), open: Arc::new(generator) };
        Model { name: name.clone(), about, text: Some(text), embedder: None }
    };
    let token = match (args.token, args.no_token) {
        (_, true) => None,
        (Some(t), _) => Some(t),
        (None, false) => Some(hex(&keys::random::<24>()?)),
    };
    let listener = tokio::net::TcpListener::bind(args.listen).await.with_context(|| args.listen.to_string())?;
    let at = listener.local_addr()?;
    println!("model      {name}\nOpenAI     http://{at}/v1\nOllama     http://{at}");
    println!("token      {}", token.as_deref().unwrap_or("none asked for"));
    let config = Config {
        token: token.map(Zeroizing::new),
        hosts: args.host,
        origins: args.origin,
        running: args.running,
        ..Config::default()
    };
    Ok(Endpoint::new(config, Registry::new([model])).serve(listener).await?)
}
