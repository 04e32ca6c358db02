//! What the tests over real processes share: a lane on a tiny checkpoint, its processes, and what they report.

pub mod raw;
pub mod rogue;
pub mod tiny;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tacet_client::{Client, ClientError, Embedding};
use tacet_party::config::{Config, Limits};
use tacet_protocol::model::BertModel;

use crate::local::Lane;
use tiny::Tiny;

/// Names of a local lane's parties, by index: E1, E2, dealer.
pub const NAMES: [&str; 3] = ["alpha", "beta", "gamma"];

/// One lane at a time: three parties, a client and their deadlines share the machine's cores.
static ALONE: Mutex<()> = Mutex::new(());

/// Three parties as processes on a tiny checkpoint, each of which can be stopped, killed, configured and started again.
pub struct World {
    pub model: Tiny,
    pub lane: Lane,
    restarted: [Option<Child>; 3],
    _alone: MutexGuard<'static, ()>,
}

impl World {
    pub fn start(layers: usize, limits: Limits) -> World {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let model = Tiny::new(layers);
        let lane = Lane::start(Path::new(env!("CARGO_BIN_EXE_tacet")), &model.dir, limits).unwrap();
        World { model, lane, restarted: [None, None, None], _alone: alone }
    }

    /// The lane's folder: identities, configurations, logs.
    pub fn dir(&self) -> PathBuf {
        self.lane.parties.party[0].certificate.parent().unwrap().to_path_buf()
    }

    fn file(&self, party: usize) -> PathBuf {
        self.dir().join(format!("{}.toml", NAMES[party]))
    }

    pub fn config(&self, party: usize) -> Config {
        Config::load(&self.file(party)).unwrap()
    }

    /// Changes a party's configuration; it takes effect with [`World::restart`].
    pub fn configure(&self, party: usize, change: impl FnOnce(&mut Config)) {
        let mut config = self.config(party);
        change(&mut config);
        std::fs::write(self.file(party), toml::to_string(&config).unwrap()).unwrap();
    }

    /// What a party wrote to its log since the lane started.
    pub fn log(&self, party: usize) -> String {
        std::fs::read_to_string(self.dir().join(format!("{}.log", NAMES[party]))).unwrap()
    }

    pub fn pid(&self, party: usize) -> u32 {
        self.restarted[party].as_ref().map_or_else(|| self.lane.report()[party].pid, Child::id)
    }

    pub fn resident_mb(&self, party: usize) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid(party))).unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap();
        line.split_whitespace().next().unwrap().parse::<f64>().unwrap() / 1024.0
    }

    /// `STOP` freezes a process, `CONT` thaws it, `TERM` asks it to end, `KILL` ends it.
    pub fn signal(&self, party: usize, name: &str) {
        signal(self.pid(party), name);
    }

    /// Ends a party with a signal and waits until its sockets are free.
    pub fn end(&mut self, party: usize, name: &str) {
        self.signal(party, name);
        match self.restarted[party].take() {
            Some(mut child) => drop(child.wait()),
            // The lane reaps its own children later; a zombie holds no sockets.
            None => {
                let stat = format!("/proc/{}/stat", self.pid(party));
                until("a party to end", || std::fs::read_to_string(&stat).map_or(true, |s| s.contains(") Z ")));
            }
        }
    }

    /// Starts a party that has ended, from its configuration; its working folder is the lane's.
    pub fn restart(&mut self, party: usize) {
        let log = self.dir().join(format!("{}.log", NAMES[party]));
        let child = Command::new(env!("CARGO_BIN_EXE_tacet"))
            .args(["party", "--config"])
            .arg(self.file(party))
            .current_dir(self.dir())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::OpenOptions::new().append(true).open(log).unwrap())
            .spawn();
        self.restarted[party] = Some(child.unwrap());
    }

    /// Waits for a party that [`World::restart`] started to end by itself.
    pub fn wait(&mut self, party: usize) -> ExitStatus {
        let mut child = self.restarted[party].take().expect("a restarted party");
        let mut status = None;
        until("a party to end", || {
            status = child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    /// Body of a page of a party's HTTP address; empty if it does not answer.
    pub fn page(&self, party: usize, path: &str) -> String {
        let addr = self.config(party).http.unwrap();
        let ask = || -> std::io::Result<String> {
            let mut s = TcpStream::connect_timeout(&addr, Duration::from_secs(5))?;
            s.set_read_timeout(Some(Duration::from_secs(5)))?;
            s.write_all(format!("GET {path} HTTP/1.1\r\n\r\n").as_bytes())?;
            let mut out = String::new();
            s.read_to_string(&mut out)?;
            Ok(out)
        };
        ask().unwrap_or_default().split_once("\r\n\r\n").map_or_else(String::new, |(_, body)| body.to_string())
    }

    /// A counter or gauge of a party; nothing if it does not answer.
    pub fn metric(&self, party: usize, name: &str) -> Option<u64> {
        let page = self.page(party, "/metrics");
        page.lines().find_map(|l| l.strip_prefix(name)?.trim().parse().ok())
    }

    pub fn until_ready(&self) {
        until("all parties to be linked", || (0..3).all(|i| self.page(i, "/readyz") == "ready\n"));
    }

    /// Waits until `/readyz` of a party names a peer and a reason.
    pub fn until_reason(&self, party: usize, peer: &str, reason: &str) {
        let mut page = String::new();
        let named = |page: &str| page.lines().any(|l| l.starts_with(&format!("{peer}: ")) && l.contains(reason));
        let done = || {
            page = self.page(party, "/readyz");
            named(&page)
        };
        if !within(Duration::from_secs(30), done) {
            panic!("{} does not say {reason:?} of {peer}: {page:?}\n{}", NAMES[party], self.log(party));
        }
    }

    pub async fn client(&self) -> Client {
        // A refusal for lack of room is to be seen, not waited out.
        let builder = Client::builder().parties(self.lane.parties.clone()).model(&self.model.dir);
        builder.retry_busy(false).connect().await.unwrap()
    }

    /// A session gives what the plaintext model gives.
    pub async fn works(&self, c: &Client) {
        let e = embed(c).await.unwrap_or_else(|e| panic!("{e}"));
        self.check(&e);
    }

    pub fn check(&self, e: &Embedding) {
        let want = BertModel::load(&self.model.dir).unwrap().plaintext(&IDS).unwrap();
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
        let cosine = dot(&e.vector, &want) / dot(&want, &want).sqrt();
        assert!(cosine > 0.99, "cosine {cosine}");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for child in self.restarted.iter_mut().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The prompt of these tests.
pub const IDS: [u32; 3] = [7, 3, 12];

/// One session with it.
pub async fn embed(c: &Client) -> Result<Embedding, ClientError> {
    in_time("a session", c.embed_ids(&IDS)).await
}

/// Fails the test where it would hang.
pub async fn in_time<F: Future>(what: &str, f: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(60), f).await.unwrap_or_else(|_| panic!("{what} takes too long"))
}

pub fn signal(pid: u32, name: &str) {
    let done = Command::new("sh").args(["-c", &format!("kill -{name} {pid}")]).status().unwrap();
    assert!(done.success(), "kill -{name}");
}

/// Polls for up to the given time.
pub fn within(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + limit;
    loop {
        if done() {
            return true;
        }
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Polls until something that has to happen has happened; the limit only tells a hang from a slow machine.
pub fn until(what: &str, done: impl FnMut() -> bool) {
    assert!(within(Duration::from_secs(40), done), "waited too long for {what}");
}

/// [`until`] beside futures of this thread.
pub async fn until_async(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(40);
    while !done() {
        assert!(Instant::now() < end, "waited too long for {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub fn on_one_thread<F: Future>(f: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(f)
}

/// Runs futures side by side; their results in order.
pub async fn join_all<F: Future>(all: impl IntoIterator<Item = F>) -> Vec<F::Output> {
    let mut all: Vec<_> = all.into_iter().map(Box::pin).collect();
    let mut out: Vec<Option<F::Output>> = all.iter().map(|_| None).collect();
    std::future::poll_fn(|cx| {
        for (f, o) in all.iter_mut().zip(&mut out) {
            if o.is_none()
                && let std::task::Poll::Ready(v) = f.as_mut().poll(cx)
            {
                *o = Some(v);
            }
        }
        if out.iter().all(Option::is_some) { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
    out.into_iter().flatten().collect()
}
