//! `tacet embed`: texts in, unit vectors out.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args as ClapArgs;
use tacet_client::{Client, Parties};
use tacet_party::config::Limits;

use crate::fetch;
use crate::local::Lane;

#[derive(ClapArgs)]
pub struct Args {
    /// Model directory or name
    #[arg(long)]
    model: Option<String>,
    /// A text; may be given several times
    #[arg(long)]
    text: Vec<String>,
    /// A .csv or .jsonl file of texts
    #[arg(long, conflicts_with = "text")]
    input: Option<PathBuf>,
    /// Column or key that holds the text
    #[arg(long, default_value = "text")]
    column: String,
    /// Where one JSON line a text goes; standard output if absent
    #[arg(long)]
    output: Option<PathBuf>,
    /// The parties to ask
    #[arg(long, conflicts_with = "local")]
    parties: Option<PathBuf>,
    /// Start three parties on this machine for the run
    #[arg(long)]
    local: bool,
    /// Also compute in the clear and report the cosine
    #[arg(long)]
    check: bool,
    /// At most this many texts
    #[arg(long)]
    limit: Option<usize>,
}

fn read(path: &Path, column: &str) -> Result<Vec<String>> {
    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    let text = String::from_utf8(bytes)
        .map_err(|e| anyhow::anyhow!("{}: byte {} is not UTF-8", path.display(), e.utf8_error().valid_up_to()))?;
    if path.extension().is_some_and(|e| e == "csv") {
        let mut r = csv::Reader::from_reader(text.as_bytes());
        let at = r.headers()?.iter().position(|h| h == column);
        let at = at.with_context(|| format!("{}: no column {column:?}", path.display()))?;
        return r.records().map(|r| Ok(r?.get(at).unwrap_or_default().to_string())).collect();
    }
    let line = |(i, l): (usize, &str)| {
        let v: serde_json::Value =
            serde_json::from_str(l).with_context(|| format!("{}: line {}", path.display(), i + 1))?;
        let t = v.get(column).and_then(|t| t.as_str());
        Ok(t.with_context(|| format!("{}: line {} has no text under {column:?}", path.display(), i + 1))?.to_string())
    };
    text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()).map(line).collect()
}

/// Embeds and writes.
pub async fn run(args: Args) -> Result<()> {
    let mut texts = match &args.input {
        Some(p) => read(p, &args.column)?,
        None => args.text,
    };
    texts.truncate(args.limit.unwrap_or(usize::MAX));
    if texts.is_empty() {
        bail!("nothing to embed: give --text or --input");
    }
    let model = fetch::model_dir(args.model.as_deref())?;
    let (_lane, parties) = match (&args.parties, args.local) {
        (Some(p), _) => (None, Parties::load(p)?),
        (None, true) => {
            let lane = Lane::start(&std::env::current_exe()?, &model, Limits::default())?;
            let parties = lane.parties.clone();
            (Some(lane), parties)
        }
        (None, false) => bail!("give --parties parties.toml, or --local to start three parties on this machine"),
    };
    let client = Client::builder().parties(parties).model(&model).connect().await?;
    let mut out: Box<dyn Write> = match &args.output {
        Some(p) => {
            Box::new(std::io::BufWriter::new(std::fs::File::create(p).with_context(|| p.display().to_string())?))
        }
        None => Box::new(std::io::stdout().lock()),
    };
    let show = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let mut worst = 1.0f64;
    for (i, t) in texts.iter().enumerate() {
        let ids = client.tokens(i, t)?;
        let e = client.embed_ids(&ids).await.with_context(|| format!("text {i}"))?;
        let mut v = serde_json::json!({
            "index": i, "tokens": ids.len(), "embedding": e.vector, "total_s": e.stats.total_s, "online_s": e.stats.online_s,
            "dealing_s": e.stats.dealing_s, "rounds": e.stats.rounds,
            "opened_bytes": e.stats.opened_bytes, "dealt_bytes": e.stats.dealt_bytes,
        });
        if args.check {
            let c = tacet_client::cosine(&e.vector, &client.model().plaintext(&ids)?);
            worst = worst.min(c);
            v["cosine"] = c.into();
        }
        serde_json::to_writer(&mut out, &v)?;
        out.write_all(b"\n")?;
        if show {
            eprint!("\r{} of {}", i + 1, texts.len());
        }
    }
    out.flush()?;
    if show {
        eprintln!();
    }
    if args.check {
        eprintln!("smallest cosine to plaintext over {} texts: {worst:.6}", texts.len());
    }
    Ok(())
}
