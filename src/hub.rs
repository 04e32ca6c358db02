//! Public models of the Hugging Face hub, or of a server with the same paths (`HF_ENDPOINT`).
//!
//! Each file is asked for twice. The hub's own word on it names the repository's revision and, for a large file, its length
//! and SHA-256; then the file is read from wherever the hub redirects to. All files are of the revision that the first one
//! named, and one with a digest is that file or none.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use sha2::{Digest, Sha256};
use tacet_client::serve::{Progress, PullError};
use ureq::{Agent, AgentBuilder, Response};

use crate::fetch::{INDEX, LARGEST_FILE, OPTIONAL, REQUIRED, TICK, Told, WEIGHTS, shards};

/// How long the hub may be silent. Downloads may take longer, as long as bytes arrive.
const SILENCE: Duration = Duration::from_secs(6);
/// Between two words on how far a file is.
const PACE: Duration = Duration::from_millis(100);
/// What a download's thread reports.
enum Event {
    Alive,
    At(Progress),
    Done(Result<(), PullError>),
}

/// Puts the files of a model into an empty directory.
pub fn fetch(name: &str, files: &Path, told: &mut Told) -> Result<(), PullError> {
    let (name, files) = (name.to_owned(), files.to_owned());
    let (events, watched) = sync_channel(64);
    // Looking up a host's name has no deadline, hence a thread that can be left behind.
    std::thread::spawn(move || {
        let done = Repository::new(&name, &events).and_then(|mut r| r.download(&files));
        let done = done.map_err(|e| match e.downcast::<PullError>() {
            Ok(e) => e,
            Err(e) => PullError::Failed(format!("{e:#}")),
        });
        let _ = events.send(Event::Done(done));
    });
    let mut heard = Instant::now();
    loop {
        match watched.recv_timeout(TICK) {
            Ok(Event::Alive) => heard = Instant::now(),
            Ok(Event::At(progress)) => {
                told(Some(progress))?;
                // Not counting how long that took.
                heard = Instant::now();
            }
            Ok(Event::Done(done)) => return done,
            Err(RecvTimeoutError::Timeout) if heard.elapsed() < SILENCE => told(None)?,
            Err(RecvTimeoutError::Timeout) => {
                return Err(PullError::Failed(format!("no answer for {} s", SILENCE.as_secs())));
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err(PullError::Failed("the download ended without a result".into()));
            }
        }
    }
}

struct Repository<'a> {
    base: String,
    revision: String,
    /// Follows redirections.
    agent: Agent,
    /// Follows none.
    direct: Agent,
    events: &'a SyncSender<Event>,
}

impl Repository<'_> {
    fn new<'a>(name: &str, events: &'a SyncSender<Event>) -> Result<Repository<'a>> {
        let endpoint = std::env::var("HF_ENDPOINT").ok().filter(|e| !e.is_empty());
        let endpoint = endpoint.unwrap_or_else(|| "https://huggingface.co".into());
        let agent = || {
            let a = AgentBuilder::new().try_proxy_from_env(true);
            a.timeout_connect(SILENCE).timeout_read(SILENCE).timeout_write(SILENCE)
        };
        Ok(Repository {
            base: format!("{}/{name}/resolve", endpoint.trim_end_matches('/')),
            revision: "main".into(),
            agent: agent().build(),
            direct: agent().redirects(0).build(),
            events,
        })
    }

    fn download(&mut self, files: &Path) -> Result<()> {
        for file in REQUIRED {
            // The first is there if the repository is.
            let absent = || PullError::Absent(format!("there is no public model of that name with a {file}"));
            ensure!(self.file(file, files)?, absent());
        }
        for file in OPTIONAL {
            self.file(file, files)?;
        }
        if self.file(WEIGHTS, files)? {
            return Ok(());
        }
        ensure!(self.file(INDEX, files)?, "it has neither {WEIGHTS} nor {INDEX}");
        for shard in shards(files)? {
            ensure!(self.file(&shard, files)?, "it has no {shard}, which {INDEX} names");
        }
        Ok(())
    }

    fn url(&self, file: &str) -> String {
        format!("{}/{}/{file}", self.base, self.revision)
    }

    /// Whether there is such a file; then it is in the directory.
    fn file(&mut self, file: &str, files: &Path) -> Result<bool> {
        self.alive()?;
        let Some(word) =
            found(self.direct.head(&self.url(file)).call()).with_context(|| format!("cannot ask for {file}"))?
        else {
            return Ok(false);
        };
        self.alive()?;
        let hex = |v: &str, n: usize| v.len() == n && v.bytes().all(|b| b.is_ascii_hexdigit());
        if let Some(commit) = word.header("x-repo-commit").filter(|c| hex(c, 40)) {
            self.revision = commit.to_owned();
        }
        let digest = word.header("x-linked-etag").map(|t| t.trim_matches('"').to_ascii_lowercase());
        let digest = digest.filter(|d| hex(d, 64));
        let length = |r: &Response, name: &str| r.header(name).and_then(|l| l.parse::<u64>().ok());
        let Some(body) =
            found(self.agent.get(&self.url(file)).call()).with_context(|| format!("cannot fetch {file}"))?
        else {
            bail!("{file} is announced but not there");
        };
        let total = length(&word, "x-linked-size").or(length(&body, "content-length"));
        ensure!(total.is_none_or(|t| t <= LARGEST_FILE), "{file} is larger than {} GB", LARGEST_FILE >> 30);
        let to = files.join(file);
        to.parent().map_or(Ok(()), std::fs::create_dir_all)?;
        let said = digest.as_ref().map_or(file.to_owned(), |d| format!("sha256:{d}"));
        let got = self.copy(&mut body.into_reader(), &mut File::create(to)?, said, total);
        let got = got.with_context(|| format!("cannot fetch {file}"))?;
        match digest {
            Some(d) if d != got => bail!("{file} has sha256 {got}, but the hub says {d}"),
            _ => Ok(true),
        }
    }

    /// Returns the SHA-256.
    fn copy(&self, from: &mut dyn Read, to: &mut File, digest: String, total: Option<u64>) -> Result<String> {
        let (mut hash, mut buffer, mut completed) = (Sha256::new(), vec![0; 256 << 10], 0);
        let at = |completed| Progress { digest: digest.clone(), total: total.unwrap_or(completed), completed };
        let mut next = Instant::now();
        loop {
            let n = from.read(&mut buffer)?;
            if n == 0 {
                break;
            }
            completed += n as u64;
            ensure!(completed <= total.unwrap_or(LARGEST_FILE), "more bytes than announced");
            hash.update(&buffer[..n]);
            to.write_all(&buffer[..n])?;
            if Instant::now() >= next {
                self.event(Event::At(at(completed)))?;
                next = Instant::now() + PACE;
            }
        }
        ensure!(total.is_none_or(|t| t == completed), "it ended after {completed} of {} bytes", total.unwrap_or(0));
        self.events.send(Event::At(at(completed))).map_err(|_| anyhow!("nobody waits for it"))?;
        Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
    }

    fn alive(&self) -> Result<()> {
        self.event(Event::Alive)
    }

    /// One that is too many is lost.
    fn event(&self, e: Event) -> Result<()> {
        match self.events.try_send(e) {
            Err(TrySendError::Disconnected(_)) => bail!("nobody waits for it"),
            _ => Ok(()),
        }
    }
}

/// Anything but a clear "there is no such thing" is a failure: a lost pooling file would change the answers.
fn found(answer: Result<Response, ureq::Error>) -> Result<Option<Response>> {
    match answer {
        Ok(r) => Ok(Some(r)),
        Err(ureq::Error::Status(404, _)) => Ok(None),
        // The hub does not tell what is private from what is not there.
        Err(ureq::Error::Status(401 | 403, _)) => {
            Err(PullError::Absent("there is no public model of that name".into()).into())
        }
        Err(ureq::Error::Status(status, _)) => bail!("the hub answers with status {status}"),
        Err(e) => Err(e.into()),
    }
}
