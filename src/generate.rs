//! `tacet generate`: a private continuation of a text, token by token.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Args as ClapArgs;
use tacet_client::Spent;
use tacet_client::generate::{Codec, Conversation, Finish, Request, Sampling};
use tacet_client::serve::OpenDecoder;
use tacet_protocol::model::is_encoder;

use crate::fetch;
use crate::parties::Asked;
use crate::planning;

pub const EXAMPLES: &str = "\
Examples:
  tacet generate --local --model models/SmolLM2-135M --prompt \"Once upon a time\" --max-tokens 40
  tacet generate --parties parties.toml --model models/SmolLM2-135M --prompt \"The\" --temperature 0 --json

Text exists on this machine only: the parties work on shares of embeddings and of logits. They see the prompt's padded length
and the number of tokens that follow.";

#[derive(ClapArgs)]
pub struct Args {
    /// Directory or name of a decoder: Llama, Mistral, SmolLM2, Qwen2, Qwen3 or GPT-2; a directory may hold a Llama GGUF file
    #[arg(long, value_name = "DIR")]
    model: String,
    /// Text to continue; the model's begin token is put before it where the tokenizer has one
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    prompt: String,
    /// Most tokens to add
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_tokens: usize,
    #[command(flatten)]
    choice: Choice,
    #[command(flatten)]
    asked: Asked,
    /// Print one JSON object in the end instead of the text as it comes
    #[arg(long)]
    json: bool,
}

/// How tokens are chosen and what ends an answer.
#[derive(ClapArgs)]
pub struct Choice {
    /// Randomness of the choice; 0 takes the most probable token [default: 0; of a chat: 0.7]
    #[arg(long, value_name = "T")]
    pub temperature: Option<f64>,
    /// Keep the most probable tokens that make up this much
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f64,
    /// Keep this many of the most probable tokens; 0 keeps all
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Make the choices repeatable
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// End at this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
}

impl Choice {
    /// A request with these choices; `temperature` where none is given.
    pub fn request(&self, temperature: f64) -> Request {
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(temperature),
            top_p: self.top_p,
            top_k: self.top_k,
            seed: self.seed,
            ..Sampling::default()
        };
        Request { sampling, stop: self.stop.clone(), ..Request::default() }
    }
}

/// A decoder's directory; an encoder is told apart before anything is started.
pub async fn decoder(name: &str) -> Result<PathBuf> {
    let dir = fetch::model_dir(Some(name)).await?;
    if is_encoder(&dir) {
        bail!("{name} embeds texts and does not generate: use tacet embed, or a decoder");
    }
    Ok(dir)
}

/// What an answer took: `spent` is its own, times are in seconds.
pub fn figures(tokens: usize, prefill_s: f64, total_s: f64, spent: &Spent) -> String {
    format!(
        "{tokens} tokens, {prefill_s:.2} s to the first, then {:.1} a second; {} rounds, {:.1} MB opened each way, {:.1} MB dealt",
        rate(tokens, prefill_s, total_s),
        spent.rounds,
        spent.opened_bytes as f64 / 1e6,
        spent.dealt_bytes as f64 / 1e6
    )
}

/// Tokens a second after the first, which the prompt's evaluation gives.
pub fn rate(tokens: usize, prefill_s: f64, total_s: f64) -> f64 {
    tokens.saturating_sub(1) as f64 / (total_s - prefill_s).max(1e-9)
}

/// Writes a piece of an answer at once. A terminal gets no control characters: a text must not steer it.
pub fn show(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout();
    if out.is_terminal() {
        let safe = |c: char| if c.is_control() && c != '\n' && c != '\t' { char::REPLACEMENT_CHARACTER } else { c };
        out.write_all(text.chars().map(safe).collect::<String>().as_bytes())?;
    } else {
        out.write_all(text.as_bytes())?;
    }
    out.flush()
}

/// Generates and prints.
pub async fn run(args: Args) -> Result<()> {
    let model = decoder(&args.model).await?;
    let (lane, parties) = args.asked.parties(&model).await?;
    let generator =
        planning::client().parties(parties).model(&model).deadline(Duration::from_secs(300)).generator().await?;
    let codec = Codec::load(&model)?.within(generator.longest());
    let mut prompt = codec.encode(&args.prompt, true)?;
    if let (true, Some(bos)) = (prompt.is_empty(), generator.model().config.bos) {
        prompt.push(bos);
    }
    let request = Request { max_tokens: Some(args.max_tokens), continues: true, ..args.choice.request(0.0) };
    let mut conversation = Conversation::new(generator.open().await?);
    let started = Instant::now();
    let mut answer = conversation.generate(&codec, &prompt, request)?;
    answer.prefill().await?;
    let prefill_s = started.elapsed().as_secs_f64();
    let (mut text, mut tokens, mut finish) = (String::new(), Vec::new(), "length");
    while let Some(step) = answer.next().await? {
        tokens.push(step.token);
        if let Some(Finish::Stop) = step.finish {
            finish = "stop";
        }
        if !args.json {
            show(&step.text)?;
        }
        text.push_str(&step.text);
    }
    let total_s = started.elapsed().as_secs_f64();
    let spent = generator.spent();
    if args.json {
        let v = serde_json::json!({
            "text": text, "prompt_tokens": prompt, "tokens": tokens, "finish": finish,
            "prefill_s": prefill_s, "total_s": total_s, "tokens_per_s": rate(tokens.len(), prefill_s, total_s), "spent": spent,
            "parties": lane.map(|l| l.report()),
        });
        crate::print(&format!("{}\n", serde_json::to_string(&v)?))?;
        return Ok(());
    }
    println!();
    eprintln!("{}", figures(tokens.len(), prefill_s, total_s, &spent));
    Ok(())
}
