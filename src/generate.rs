//! `tacet generate`: a private continuation of a text, token by token.

use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args as ClapArgs;
use tacet_client::generate::{Codec, Conversation, Finish, Request, Sampling};
use tacet_client::serve::OpenDecoder;
use tacet_client::{Client, Parties};
use tacet_party::config::{BackendKind, Limits, Pool};

use crate::fetch;
use crate::local::Lane;

pub const EXAMPLES: &str = "\
Examples:
  tacet generate --local --model models/SmolLM2-135M --prompt \"Once upon a time\" --max-tokens 40
  tacet generate --parties parties.toml --model models/SmolLM2-135M --prompt \"The\" --temperature 0 --json

Text exists on this machine only: the parties work on shares of embeddings and of logits. They see the prompt's padded length
and the number of tokens that follow.";

#[derive(ClapArgs)]
pub struct Args {
    /// Directory of a decoder model: Llama, Mistral, SmolLM2, Qwen2, Qwen3 or GPT-2, or a Llama GGUF file
    #[arg(long)]
    model: String,
    /// Text to continue; the model's begin token is put before it where the tokenizer has one
    #[arg(long, default_value = "")]
    prompt: String,
    /// Most tokens to add
    #[arg(long, default_value_t = 64)]
    max_tokens: usize,
    /// Randomness of the choice; 0 takes the most probable token
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Keep the most probable tokens that make up this much
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Keep this many of the most probable tokens; 0 keeps all
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Make the choices repeatable
    #[arg(long)]
    seed: Option<u64>,
    /// End at this text; may be given several times
    #[arg(long)]
    stop: Vec<String>,
    /// The parties to ask
    #[arg(long, conflicts_with = "local", required_unless_present = "local")]
    parties: Option<PathBuf>,
    /// Start three parties on this machine for the run
    #[arg(long)]
    local: bool,
    /// Where the parties of this machine compute products: auto, cpu or gpu
    #[arg(long, default_value = "auto", conflicts_with = "parties")]
    backend: BackendKind,
    /// Print one JSON object in the end instead of the text as it comes
    #[arg(long)]
    json: bool,
}

/// Generates and prints.
pub async fn run(args: Args) -> Result<()> {
    let model = fetch::model_dir(Some(&args.model))?;
    let (lane, parties) = match &args.parties {
        Some(p) => (None, Parties::load(p)?),
        None => {
            let lane =
                Lane::start_on(&std::env::current_exe()?, &model, Limits::default(), Pool::default(), args.backend)?;
            let parties = lane.parties.clone();
            (Some(lane), parties)
        }
    };
    let codec = Codec::load(&model)?;
    let generator =
        Client::builder().parties(parties).model(&model).deadline(Duration::from_secs(300)).generator().await?;
    let mut prompt = codec.encode(&args.prompt, true)?;
    if let (true, Some(bos)) = (prompt.is_empty(), generator.model().config.bos) {
        prompt.push(bos);
    }
    let sampling = Sampling {
        temperature: args.temperature,
        top_p: args.top_p,
        top_k: args.top_k,
        seed: args.seed,
        ..Sampling::default()
    };
    let request =
        Request { sampling, max_tokens: Some(args.max_tokens), stop: args.stop, continues: true, ..Request::default() };
    let mut conversation = Conversation::new(generator.open().await?);
    let started = Instant::now();
    let mut answer = conversation.generate(&codec, &prompt, request)?;
    answer.prefill().await?;
    let prefill_s = started.elapsed().as_secs_f64();
    let (mut text, mut tokens, mut finish) = (String::new(), Vec::new(), "length");
    let mut out = std::io::stdout();
    while let Some(step) = answer.next().await? {
        tokens.push(step.token);
        if let Some(Finish::Stop) = step.finish {
            finish = "stop";
        }
        if !args.json {
            out.write_all(step.text.as_bytes())?;
            out.flush()?;
        }
        text.push_str(&step.text);
    }
    let total_s = started.elapsed().as_secs_f64();
    let rate = tokens.len().saturating_sub(1) as f64 / (total_s - prefill_s).max(1e-9);
    let spent = generator.spent();
    if args.json {
        let v = serde_json::json!({
            "text": text, "prompt_tokens": prompt, "tokens": tokens, "finish": finish,
            "prefill_s": prefill_s, "total_s": total_s, "tokens_per_s": rate, "spent": spent,
            "parties": lane.map(|l| l.report()),
        });
        println!("{}", serde_json::to_string(&v)?);
        return Ok(());
    }
    println!();
    eprintln!(
        "{} tokens, {prefill_s:.2} s to the first, then {rate:.1} a second; {} rounds, {:.1} MB opened each way, {:.1} MB dealt",
        tokens.len(),
        spent.rounds,
        spent.opened_bytes as f64 / 1e6,
        spent.dealt_bytes as f64 / 1e6
    );
    Ok(())
}
