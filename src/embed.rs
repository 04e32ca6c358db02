//! `tacet embed`: texts in, unit vectors out.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args as ClapArgs;
use futures_util::StreamExt;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tacet_client::{Client, Embedding, cosine};

use crate::fetch;
use crate::parties::Asked;

pub const EXAMPLES: &str = "\
Examples:
  tacet embed --local --text \"How do I freeze my card?\"
  tacet embed --parties parties.toml --input questions.csv --column text --output vectors.jsonl
  tacet embed --local --check --input questions.jsonl --limit 100 --output vectors.jsonl --json

One JSON line a text: index, tokens, embedding (a unit vector), times in seconds, rounds, bytes. Lines come in the order of
the texts and are written as they come; a text that fails ends the run, is named by its index, and leaves the lines before it.";

#[derive(ClapArgs)]
#[command(group = clap::ArgGroup::new("texts").required(true).args(["text", "input"]))]
pub struct Args {
    /// A text; may be given several times
    #[arg(long)]
    text: Vec<String>,
    /// A .csv file with a header, or a .jsonl file of objects
    #[arg(long)]
    input: Option<PathBuf>,
    /// Column or key that holds the text
    #[arg(long, default_value = "text")]
    column: String,
    /// At most this many texts
    #[arg(long)]
    limit: Option<usize>,
    /// Where the lines go; standard output if absent
    #[arg(long)]
    output: Option<PathBuf>,
    #[command(flatten)]
    asked: Asked,
    /// Model directory or name, the same as the parties'
    #[arg(long)]
    model: Option<String>,
    /// Texts at once
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=256))]
    concurrency: u16,
    /// Seconds that one text may take
    #[arg(long, default_value_t = 90, value_parser = clap::value_parser!(u64).range(1..))]
    deadline: u64,
    /// Also compute in the clear, on this machine, and report the cosine
    #[arg(long)]
    check: bool,
    /// Print a summary as JSON in the end
    #[arg(long, requires = "output")]
    json: bool,
}

/// Reads the texts of a file.
fn read(path: &Path, column: &str) -> Result<Vec<String>> {
    let file = path.display();
    let bytes = std::fs::read(path).with_context(|| file.to_string())?;
    let text = String::from_utf8(bytes)
        .map_err(|e| anyhow!("{file}: byte {} is not UTF-8: convert the file first", e.utf8_error().valid_up_to()))?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    match path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase).as_deref() {
        Some("csv") => from_csv(text, column).with_context(|| file.to_string()),
        Some("jsonl" | "ndjson") => from_jsonl(text, column).with_context(|| file.to_string()),
        _ => bail!("{file}: a .csv or .jsonl file is expected"),
    }
}

fn from_csv(text: &str, column: &str) -> Result<Vec<String>> {
    let mut r = csv::Reader::from_reader(text.as_bytes());
    let head = r.headers()?;
    let at = head.iter().position(|h| h == column).ok_or_else(|| {
        let all: Vec<&str> = head.iter().collect();
        anyhow!("no column {column:?} among {all:?}: name it with --column")
    })?;
    r.records().map(|r| Ok(r?.get(at).unwrap_or_default().to_string())).collect()
}

fn from_jsonl(text: &str, key: &str) -> Result<Vec<String>> {
    let line = |(i, l): (usize, &str)| {
        let v: serde_json::Value = serde_json::from_str(l).with_context(|| format!("line {}", i + 1))?;
        let t = v.get(key).and_then(|t| t.as_str());
        Ok(t.with_context(|| format!("line {} has no text under {key:?}: name the key with --column", i + 1))?
            .to_string())
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
        bail!("nothing to embed: the input has no texts, or --limit is 0");
    }
    let model = fetch::model_dir(args.model.as_deref()).await?;
    let (_lane, parties) = args.asked.parties(&model).await?;
    let client = Client::builder()
        .parties(parties)
        .model(&model)
        .concurrency(args.concurrency.into())
        .deadline(Duration::from_secs(args.deadline))
        .connect()
        .await?;
    // All of them before the first is sent: a text that is too long costs nothing yet.
    let ids = texts.iter().enumerate().map(|(i, t)| Ok(client.tokens(i, t)?)).collect::<Result<Vec<_>>>()?;
    let mut out: Box<dyn Write> = match &args.output {
        Some(p) => Box::new(std::fs::File::create(p).with_context(|| p.display().to_string())?),
        None => Box::new(std::io::stdout()),
    };
    let bar = progress(texts.len(), args.output.is_none());
    let started = Instant::now();
    let mut summary = Summary { cosine_min: args.check.then_some(1.0), ..Summary::default() };
    let mut results = pin!(client.embed_each(&texts));
    for (i, ids) in ids.into_iter().enumerate() {
        let Some(result) = results.next().await else { break };
        let e = result.with_context(|| format!("{i} of {} texts were embedded", texts.len()))?;
        let cosine = match &mut summary.cosine_min {
            Some(least) => {
                let c = cosine(&e.vector, &plaintext(&client, ids).await?);
                *least = least.min(c);
                Some(c)
            }
            None => None,
        };
        summary.add(&e);
        write(&mut out, i, &e, cosine).context("the output cannot be written")?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    summary.total_s = started.elapsed().as_secs_f64();
    if let Some(c) = summary.cosine_min {
        eprintln!("smallest cosine to plaintext over {} texts: {c:.6}", texts.len());
    }
    if args.json {
        crate::print(&format!("{}\n", serde_json::to_string(&summary)?))?;
    }
    Ok(())
}

/// On a terminal only, and not among the lines themselves.
fn progress(texts: usize, lines_on_stdout: bool) -> ProgressBar {
    if !std::io::stderr().is_terminal() || lines_on_stdout && std::io::stdout().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:30} {pos} of {len} texts, {per_sec}, {eta} left");
    let bar = ProgressBar::new(texts as u64);
    style.map(|s| bar.clone().with_style(s)).unwrap_or(bar)
}

/// On a thread of its own: the sessions' network goes on.
async fn plaintext(client: &Client, ids: Vec<u32>) -> Result<Vec<f64>> {
    let model = Arc::clone(client.model());
    Ok(tokio::task::spawn_blocking(move || model.plaintext(&ids)).await??)
}

/// One line, whole before the next text is waited for.
fn write(out: &mut dyn Write, index: usize, e: &Embedding, cosine: Option<f64>) -> Result<()> {
    let s = &e.stats;
    let mut v = json!({
        "index": index, "tokens": s.tokens, "embedding": e.vector, "total_s": s.total_s, "online_s": s.online_s,
        "dealing_s": s.dealing_s, "dealt_ahead": s.dealt_ahead, "rounds": s.rounds,
        "opened_bytes": s.opened_bytes, "dealt_bytes": s.dealt_bytes,
    });
    if let Some(c) = cosine {
        v["cosine"] = c.into();
    }
    let mut line = serde_json::to_vec(&v)?;
    line.push(b'\n');
    out.write_all(&line)?;
    Ok(out.flush()?)
}

/// What a whole run took.
#[derive(Default, serde::Serialize)]
struct Summary {
    texts: usize,
    tokens: usize,
    opened_bytes: u64,
    dealt_bytes: u64,
    total_s: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    cosine_min: Option<f64>,
}

impl Summary {
    fn add(&mut self, e: &Embedding) {
        self.texts += 1;
        self.tokens += e.stats.tokens;
        // Parties count these.
        self.opened_bytes = self.opened_bytes.saturating_add(e.stats.opened_bytes);
        self.dealt_bytes = self.dealt_bytes.saturating_add(e.stats.dealt_bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_and_lines() {
        let rows = from_csv("id,text\n1,a\n2,\"b, with\nbreak\"\n3,\n", "text").unwrap();
        assert_eq!(rows, ["a", "b, with\nbreak", ""]);
        assert_eq!(from_jsonl("{\"q\": \"a\"}\n\n{\"q\": \"b\", \"x\": 1}\n", "q").unwrap(), ["a", "b"]);
    }

    #[test]
    fn what_is_missing_is_named() {
        let said = |r: Result<Vec<String>>| format!("{:#}", r.unwrap_err());
        let e = said(from_csv("id,body\n1,a\n", "text"));
        assert!(e.contains("no column \"text\"") && e.contains("body") && e.contains("--column"), "{e}");
        assert!(said(from_csv("id,text\n1,a\n2\n", "text")).contains("line: 3"));
        assert!(said(from_jsonl("{\"q\": \"a\"}\n{\"q\": 7}", "q")).contains("line 2 has no text under \"q\""));
        assert!(said(from_jsonl("{\"q\": \"a\"}\n{\"q\"", "q")).starts_with("line 2"));
        assert!(said(read("x.parquet".as_ref(), "q")).contains("x.parquet"));
    }
}
