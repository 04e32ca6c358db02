//! `tacet chat`: a private conversation on a terminal, or one line after another from a pipe.

use std::io::{BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use clap::Args as ClapArgs;
use serde_json::{Map, Value, json};
use tacet_client::generate::{ChatTemplate, Codec, Conversation, Finish, GenerateError, Message, Request};
use tacet_client::serve::OpenDecoder;
use tacet_client::{Generator, Spent};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use crate::generate::{Choice, decoder, figures, rate, show};
use crate::parties::Asked;
use crate::planning;

pub const EXAMPLES: &str = "\
Examples:
  tacet chat --local --model models/SmolLM2-135M-Instruct
  tacet chat --parties parties.toml --model models/Qwen3-0.6B --system \"Answer in one sentence.\" --stats
  printf 'Hello\\nAnd then?\\n' | tacet chat --local --model models/SmolLM2-135M-Instruct

Ctrl-C stops an answer and keeps the conversation; a second one, Ctrl-D or /exit ends it. /help lists the commands. Text
exists on this machine only, and is written to disk by /save alone. From a pipe each line is a message, and the first error
ends the chat with status 1.";

const COMMANDS: &str = "\
/retry          answer the last message again
/reset          forget the conversation; the system message stays
/system TEXT    set the system message; without TEXT, take it away
/stats          what the last answer took
/save FILE      write the conversation to a new file, as JSON
/exit           end, as Ctrl-D does
A line that ends in \\ goes on in the next one. A message that begins with / has a space before it.";

#[derive(ClapArgs)]
pub struct Args {
    /// Directory or name of a decoder that was trained to chat
    #[arg(long, value_name = "DIR")]
    model: String,
    /// What the model is told before the first message
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Chat template (Jinja) in place of the model's own
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// Most tokens of an answer; what the model's context leaves if absent
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    #[command(flatten)]
    choice: Choice,
    #[command(flatten)]
    asked: Asked,
    /// Say after each answer what it took
    #[arg(long)]
    stats: bool,
    /// Print each answer as a JSON object on a line of its own, when it is whole
    #[arg(long)]
    json: bool,
}

/// Talks until the input ends or the user has enough.
pub async fn run(args: Args) -> Result<()> {
    let mut interrupts = signal(SignalKind::interrupt())?;
    let ready = async {
        let model = decoder(&args.model).await?;
        let codec = codec(&model, args.chat_template.as_deref())?;
        let (lane, parties) = args.asked.parties(&model).await?;
        let builder = planning::client().parties(parties).model(&model).deadline(Duration::from_secs(300));
        let generator = builder.generator().await?;
        anyhow::Ok((lane, codec.within(generator.longest()), generator))
    };
    let (_lane, codec, generator) = tokio::select! {
        r = ready => r?,
        _ = interrupts.recv() => bail!("interrupted"),
    };
    let request = Request { max_tokens: args.max_tokens, ..args.choice.request(0.7) };
    let system = args.system.map(|s| Message::new("system", s));
    let mut chat = Chat {
        codec,
        generator,
        request,
        system,
        messages: Vec::new(),
        conversation: None,
        last: None,
        json: args.json,
    };
    let terminal = std::io::stdin().is_terminal();
    let mut lines = lines();
    if terminal {
        eprintln!("{}: /help lists the commands", args.model);
    }
    let mut stopped = false;
    loop {
        if terminal {
            eprint!(">>> ");
        }
        let line = tokio::select! {
            line = message(&mut lines, terminal) => line?,
            _ = interrupts.recv() => {
                if stopped {
                    return Ok(());
                }
                stopped = true;
                eprintln!("\nCtrl-C again, Ctrl-D or /exit ends the chat");
                continue;
            }
        };
        let Some(line) = line else {
            if terminal {
                eprintln!();
            }
            return Ok(());
        };
        stopped = false;
        let done = match chat.obey(&line) {
            Ok(Next::Read) => continue,
            Ok(Next::End) => return Ok(()),
            Ok(Next::Answer) => chat.answer(&mut interrupts).await,
            Err(e) => Err(e),
        };
        match done {
            Ok(Ended::Whole) => {}
            Ok(Ended::Stopped) => {
                stopped = true;
                eprintln!("stopped: Ctrl-C again, Ctrl-D or /exit ends the chat");
            }
            Ok(Ended::Enough) => return Ok(()),
            Err(e) if terminal => eprintln!("error: {e:#}"),
            Err(e) => return Err(e),
        }
        if let (true, Some(last)) = (args.stats && !args.json, &chat.last) {
            eprintln!("{}", last.line());
        }
    }
}

/// # Errors
/// A model that was not made to chat, and what to do with it.
fn codec(dir: &Path, template: Option<&Path>) -> Result<Codec> {
    let codec = Codec::load(dir)?;
    match template {
        Some(file) => Ok(codec.with_template(ChatTemplate::from_file(file, dir)?)),
        None if codec.template().is_some() => Ok(codec),
        None => bail!(
            "{} has no chat template, so it was not made to chat: complete texts with tacet generate, or give a template \
             with --chat-template FILE",
            dir.display()
        ),
    }
}

/// Lines of standard input, read where waiting for them holds up nothing.
fn lines() -> mpsc::Receiver<std::io::Result<String>> {
    let (tx, rx) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            if tx.blocking_send(line).is_err() {
                return;
            }
        }
    });
    rx
}

/// The next line, with those that it goes on in; `None` at the end of the input. Cancelling it drops what was read.
async fn message(lines: &mut mpsc::Receiver<std::io::Result<String>>, terminal: bool) -> Result<Option<String>> {
    let mut whole = String::new();
    while let Some(line) = lines.recv().await {
        whole += &line.context("standard input")?;
        if whole.ends_with('\\') {
            whole.pop();
            whole.push('\n');
            if terminal {
                eprint!("... ");
            }
            continue;
        }
        return Ok(Some(whole));
    }
    Ok(if whole.is_empty() { None } else { Some(whole) })
}

/// What a line asks for.
enum Next {
    Read,
    Answer,
    End,
}

/// How an answer ended, where it did not fail.
enum Ended {
    Whole,
    /// By Ctrl-C.
    Stopped,
    /// By a second one.
    Enough,
}

/// What the last answer took.
struct Took {
    prompt: usize,
    reused: usize,
    tokens: usize,
    prefill_s: f64,
    total_s: f64,
    spent: Spent,
}

impl Took {
    fn line(&self) -> String {
        let all = figures(self.tokens, self.prefill_s, self.total_s, &self.spent);
        format!("{all}; {} of the prompt's {} tokens were kept from before", self.reused, self.prompt)
    }

    fn json(&self, text: &str, finish: Option<Finish>) -> Value {
        let finish = match finish {
            Some(Finish::Stop) => "stop",
            Some(Finish::Length) => "length",
            None => "interrupted",
        };
        json!({
            "text": text, "finish": finish, "prompt_tokens": self.prompt, "reused_tokens": self.reused,
            "tokens": self.tokens, "prefill_s": self.prefill_s, "total_s": self.total_s,
            "tokens_per_s": rate(self.tokens, self.prefill_s, self.total_s), "spent": self.spent,
        })
    }
}

/// Why there is no answer, or no more of it.
enum Broken {
    Before(anyhow::Error),
    After(anyhow::Error),
}

impl From<Broken> for anyhow::Error {
    fn from(b: Broken) -> anyhow::Error {
        match b {
            Broken::Before(e) => e.context("there is no answer, /retry asks again"),
            Broken::After(e) => e.context("the answer ends here, /retry asks again"),
        }
    }
}

struct Chat {
    codec: Codec,
    generator: Generator,
    request: Request,
    system: Option<Message>,
    /// Of user and assistant in turn; the last one may wait for its answer.
    messages: Vec<Message>,
    /// The parties' sequence, with what it has evaluated.
    conversation: Option<Conversation>,
    last: Option<Took>,
    json: bool,
}

impl Chat {
    /// Takes a line: a command, or a message that is to be answered.
    fn obey(&mut self, line: &str) -> Result<Next> {
        if line.trim().is_empty() {
            return Ok(Next::Read);
        }
        if !line.starts_with('/') {
            self.unanswered();
            self.messages.push(Message::new("user", line.trim()));
            return Ok(Next::Answer);
        }
        let (command, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match (command, rest.trim()) {
            ("/help" | "/?", "") => eprintln!("{COMMANDS}"),
            ("/exit" | "/quit" | "/bye", "") => return Ok(Next::End),
            ("/retry", "") => {
                self.messages.pop_if(|m| m.role == "assistant");
                if self.messages.is_empty() {
                    bail!("there is nothing to answer yet");
                }
                return Ok(Next::Answer);
            }
            ("/reset", "") => {
                self.messages.clear();
                // The parties forget it too.
                self.conversation = None;
            }
            ("/system", text) => self.system = (!text.is_empty()).then(|| Message::new("system", text)),
            ("/stats", "") => match &self.last {
                Some(last) => eprintln!("{}", last.line()),
                None => bail!("there was no answer yet"),
            },
            ("/save", "") => bail!("/save needs a file's name"),
            ("/save", file) => self.save(Path::new(file)).with_context(|| format!("cannot save to {file}"))?,
            _ => {
                bail!("{command} is no command, or takes no more words: /help lists them; put a space before a message")
            }
        }
        Ok(Next::Read)
    }

    /// Drops a message that was never answered: templates want user and assistant in turn.
    fn unanswered(&mut self) {
        self.messages.pop_if(|m| m.role == "user");
    }

    /// For the user's eyes only; a file that exists is left alone.
    fn save(&self, file: &Path) -> Result<()> {
        let mut options = std::fs::OpenOptions::new();
        std::os::unix::fs::OpenOptionsExt::mode(options.write(true).create_new(true), 0o600);
        let all: Vec<&Message> = self.system.iter().chain(&self.messages).collect();
        options.open(file)?.write_all(&serde_json::to_vec_pretty(&json!({"messages": all}))?)?;
        Ok(())
    }

    /// Answers the last message; what there is of the answer when Ctrl-C stops it is kept.
    async fn answer(&mut self, interrupts: &mut Signal) -> Result<Ended> {
        let all: Vec<Message> = self.system.iter().chain(&self.messages).cloned().collect();
        let prompt = self.codec.encode_chat(&all, true, &Map::new(), SystemTime::now())?;
        self.request.check(&self.codec, &prompt).context("the conversation cannot go on: /reset begins a new one")?;
        if let Some(kept) = self.conversation.take() {
            match self.attempt(kept, &prompt, interrupts).await {
                // Parties end a sequence that is idle for long: the next one evaluates the whole conversation.
                Err(Broken::Before(_)) => {}
                r => return Ok(r?),
            }
        }
        let fresh = tokio::select! {
            r = self.generator.open() => Conversation::new(r?),
            _ = interrupts.recv() => return Ok(Ended::Stopped),
        };
        Ok(self.attempt(fresh, &prompt, interrupts).await?)
    }

    /// A sequence that fails, or is left in the middle of its work, is not kept: it is never asked again.
    async fn attempt(
        &mut self,
        mut conversation: Conversation,
        prompt: &[u32],
        interrupts: &mut Signal,
    ) -> Result<Ended, Broken> {
        let (started, before) = (Instant::now(), self.generator.spent());
        let before_text = |e: GenerateError| Broken::Before(e.into());
        let mut answer = conversation.generate(&self.codec, prompt, self.request.clone()).map_err(before_text)?;
        tokio::select! {
            r = answer.prefill() => r.map_err(before_text)?,
            _ = interrupts.recv() => return Ok(Ended::Stopped),
        };
        let (reused, prefill_s) = (answer.reused(), started.elapsed().as_secs_f64());
        let (mut text, mut tokens, mut finish, mut stopped) = (String::new(), 0, None, false);
        while !stopped {
            let mut next = pin!(answer.next());
            let step = loop {
                tokio::select! {
                    r = &mut next => break r,
                    // The token that is under way is waited for, so that the sequence stays whole.
                    _ = interrupts.recv() => match stopped {
                        false => stopped = true,
                        true => return Ok(Ended::Enough),
                    },
                }
            };
            let step = step.map_err(|e| {
                println!();
                Broken::After(e.into())
            })?;
            let Some(step) = step else { break };
            if !self.json {
                show(&step.text).map_err(|e| Broken::After(e.into()))?;
            }
            tokens += 1;
            text += &step.text;
            finish = step.finish;
        }
        self.conversation = Some(conversation);
        let total_s = started.elapsed().as_secs_f64();
        let spent = self.generator.spent().since(&before);
        let took = Took { prompt: prompt.len(), reused, tokens, prefill_s, total_s, spent };
        if self.json {
            println!("{}", took.json(&text, finish));
        } else {
            println!();
        }
        self.last = Some(took);
        self.messages.push(Message::new("assistant", text));
        Ok(if stopped { Ended::Stopped } else { Ended::Whole })
    }
}
