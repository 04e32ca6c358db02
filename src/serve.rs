//! `tacet serve`: the endpoint on the client's machine that existing applications use unchanged.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use clap::Args as ClapArgs;
use futures_util::future::try_join_all;
use serde_json::json;
use tacet_client::Parties;
use tacet_client::generate::{Boxed, ChatTemplate, Codec};
use tacet_client::serve::{About, Config, Endpoint, Model, Progress, PullError, Puller, Registry, TextModel};
use tacet_party::config::{BackendKind, hex};
use tacet_protocol::model::is_encoder;
use tokio::sync::mpsc;
use zeroize::Zeroizing;

use crate::{fetch, keys, parties, planning};

pub const EXAMPLES: &str = "\
Examples:
  tacet serve --local --model models/SmolLM2-135M-Instruct
  tacet serve --local --model models/SmolLM2-135M-Instruct --model all-MiniLM-L6-v2
  tacet serve --model models/Qwen3-0.6B --parties chat.toml --model all-MiniLM-L6-v2 --parties embed.toml
  tacet serve --parties parties.toml --model models/Qwen3-0.6B --listen 127.0.0.1:11434 --no-token

Point a client of OpenAI's API at http://127.0.0.1:8420/v1, or one of Ollama's at http://127.0.0.1:8420. Text exists on this
machine only. Each model has parties of its own: the first --parties belongs to the first --model, and so on.";

#[derive(ClapArgs)]
pub struct Args {
    /// Model directory or name, may be given several times: a decoder generates, an encoder embeds
    #[arg(long, value_name = "DIR", required = true)]
    model: Vec<String>,
    /// The parties to ask, once for each --model and in the same order
    #[arg(long, value_name = "FILE", conflicts_with = "local", required_unless_present = "local")]
    parties: Vec<PathBuf>,
    /// Start three parties on this machine for each model
    #[arg(long)]
    local: bool,
    /// Name under which clients ask for a model, once for each --model; the directory's if absent
    #[arg(long)]
    name: Vec<String>,
    /// Chat template (Jinja) in place of the decoder's own
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// Address to listen on
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8420")]
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
    #[arg(long, value_name = "N", default_value_t = 4)]
    running: usize,
    /// Say where it listens as one JSON object
    #[arg(long)]
    json: bool,
    /// Where the parties of this machine compute: auto, cpu or gpu
    #[arg(long, default_value = "auto", conflicts_with = "parties")]
    backend: BackendKind,
}

/// A model as the command line names it.
struct Wanted {
    name: String,
    dir: PathBuf,
    /// If it generates.
    codec: Option<Codec>,
}

impl Wanted {
    /// Connects to its parties.
    async fn model(self, parties: Parties) -> Result<Model> {
        let builder = planning::client().parties(parties).model(&self.dir).deadline(Duration::from_secs(300));
        let (name, dir) = (self.name, &self.dir);
        Ok(match self.codec {
            None => {
                let client = builder.connect().await?;
                let about = about(dir, "bert", client.model().digest());
                Model { name, about, text: None, embedder: Some(Arc::new(client)) }
            }
            Some(codec) => {
                let generator = builder.generator().await?;
                let about = about(dir, generator.model().config.family, generator.model().digest());
                let codec = Arc::new(codec.within(generator.longest()));
                let text = TextModel { codec, open: Arc::new(generator) };
                Model { name, about, text: Some(text), embedder: None }
            }
        })
    }
}

fn about(dir: &Path, family: &str, digest: [u8; 32]) -> About {
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let files: Vec<_> = files.filter_map(|f| f.metadata().ok()).collect();
    let made = files.iter().filter_map(|m| m.modified().ok()?.duration_since(UNIX_EPOCH).ok()).max();
    About {
        created: made.map_or(0, |t| t.as_secs()),
        bytes: files.iter().map(|m| m.len()).sum(),
        digest: hex(&digest),
        family: family.into(),
        ..About::default()
    }
}

/// The models, each under a name of its own, and what of them can be wrong before anything is started.
async fn wanted(args: &Args) -> Result<Vec<Wanted>> {
    let many = args.model.len();
    for (flag, given, needed) in
        [("--parties", args.parties.len(), !args.local), ("--name", args.name.len(), !args.name.is_empty())]
    {
        if needed && given != many {
            bail!("{many} models and {given} of {flag}: give one for each --model, in the same order");
        }
    }
    let mut all: Vec<Wanted> = Vec::new();
    for (i, model) in args.model.iter().enumerate() {
        let dir = fetch::model_dir(Some(model)).await?;
        let name = match (args.name.get(i), std::path::absolute(&dir)?.file_name()) {
            (Some(name), _) => name.clone(),
            (None, Some(n)) => n.to_string_lossy().rsplit("--").next().unwrap_or_default().to_string(),
            (None, None) => bail!("{model}: give it a --name"),
        };
        if all.iter().any(|a| a.name == name) {
            bail!("two models are called {name}: tell them apart with a --name for each");
        }
        let codec = if is_encoder(&dir) { None } else { Some(Codec::load(&dir).with_context(|| model.clone())?) };
        all.push(Wanted { name, dir, codec });
    }
    let Some(file) = &args.chat_template else { return Ok(all) };
    let mut decoders: Vec<&mut Wanted> = all.iter_mut().filter(|a| a.codec.is_some()).collect();
    let [a] = &mut decoders[..] else {
        bail!(
            "--chat-template is for one decoder: put it as chat_template.jinja into the directory of each that needs one"
        );
    };
    let template = ChatTemplate::from_file(file, &a.dir)?;
    a.codec = a.codec.take().map(|c| c.with_template(template));
    Ok(all)
}

/// Fetches into the cache of `tacet model pull`.
struct Shelf;

impl Puller for Shelf {
    fn pull<'a>(&'a self, name: &'a str, progress: mpsc::Sender<Progress>) -> Boxed<'a, Result<String, PullError>> {
        Box::pin(async move {
            fetch::pull(name, progress).await?;
            Ok(format!(
                "{name} is fetched, not served: it needs parties of its own. Start tacet serve with --model {name}"
            ))
        })
    }
}

/// Serves until told to stop.
pub async fn run(args: Args) -> Result<()> {
    let wanted = wanted(&args).await?;
    let listener = tokio::net::TcpListener::bind(args.listen)
        .await
        .with_context(|| format!("cannot listen on {}", args.listen))?;
    let at = listener.local_addr()?;
    let mut lanes = Vec::new();
    let mut parties: Vec<Parties> = args.parties.iter().map(|p| Parties::load(p)).collect::<Result<_, _>>()?;
    if args.local {
        let launched = wanted.iter().map(|a| parties::launch(&a.dir, args.backend)).collect::<Result<Vec<_>>>()?;
        lanes = try_join_all(launched.into_iter().map(parties::linked)).await?;
        parties = lanes.iter().map(|l| l.parties.clone()).collect();
    }
    let mut models = Vec::new();
    for (a, parties) in wanted.into_iter().zip(parties) {
        let name = a.name.clone();
        models.push(a.model(parties).await.context(name)?);
    }
    let names: Vec<String> = models.iter().map(|m| m.name.clone()).collect();
    let token = match (args.token, args.no_token) {
        (_, true) => None,
        (Some(t), _) => Some(t),
        (None, false) => Some(hex(&keys::random::<24>()?)),
    };
    let (openai, ollama) = (format!("http://{at}/v1"), format!("http://{at}"));
    if args.json {
        println!("{}", json!({"models": names, "openai": openai, "ollama": ollama, "token": token}));
    } else {
        names.iter().for_each(|n| println!("model      {n}"));
        println!("OpenAI     {openai}\nOllama     {ollama}");
        println!("token      {}", token.as_deref().unwrap_or("none asked for"));
    }
    let config = Config {
        token: token.map(Zeroizing::new),
        hosts: args.host,
        origins: args.origin,
        running: args.running,
        ..Config::default()
    };
    let served = Endpoint::new(config, Registry::new(models).with_puller(Arc::new(Shelf))).serve(listener).await;
    drop(lanes);
    Ok(served?)
}
