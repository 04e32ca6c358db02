//! The command's processes as people start them: three parties set up with `tacet keys`, and `tacet serve`. All that they
//! write goes to one fresh folder, which is their home, their temporary and their working folder.

#[path = "trained.rs"]
mod trained;

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tacet_party::config::{Config, Limits, Peer, Pool};
use tacet_protocol::Role;

pub use trained::trained as decoder;

/// Names and roles of a lane's parties.
pub const LANE: [(&str, Role); 3] = [("alpha", Role::E1), ("beta", Role::E2), ("gamma", Role::Dealer)];

/// Bounds what may take time, to tell a hang from a slow machine.
const LONG: Duration = Duration::from_secs(120);

/// Polls until something that has to happen has happened.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < end, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A folder for one test's processes, removed when it is dropped; one test of a program at a time has one.
pub struct Home {
    pub dir: PathBuf,
    _alone: MutexGuard<'static, ()>,
}

impl Home {
    pub fn new() -> Home {
        static ALONE: Mutex<()> = Mutex::new(());
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("tacet-home-{}-{n}", std::process::id()));
        for part in ["home", "tmp", "work", "log"] {
            std::fs::create_dir_all(dir.join(part)).unwrap();
        }
        Home { dir, _alone: alone }
    }

    /// The command in this folder, asked to say all that it can.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut c = Command::new(env!("CARGO_BIN_EXE_tacet"));
        c.args(args).stdin(Stdio::null()).current_dir(self.dir.join("work"));
        c.env("HOME", self.dir.join("home")).env("TMPDIR", self.dir.join("tmp"));
        c.env("RUST_LOG", "trace").env("RUST_BACKTRACE", "full");
        c
    }

    /// What a command printed that ended well.
    fn output(&self, args: &[&str]) -> String {
        let o = self.command(args).output().unwrap();
        assert!(o.status.success(), "{args:?}: {}", String::from_utf8_lossy(&o.stderr));
        String::from_utf8(o.stdout).unwrap()
    }

    /// A process whose output goes to `log/NAME.out` and `log/NAME.err`.
    fn spawn(&self, name: &str, args: &[&str]) -> Child {
        let log = |end: &str| File::create(self.dir.join(format!("log/{name}.{end}"))).unwrap();
        self.command(args).stdout(log("out")).stderr(log("err")).spawn().unwrap()
    }

    pub fn log(&self, file: &str) -> String {
        std::fs::read_to_string(self.dir.join("log").join(file)).unwrap()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Three parties as three organisations set them up.
pub struct Lane {
    /// What clients are given.
    pub parties: PathBuf,
    pub configs: Vec<Config>,
    children: Vec<Child>,
}

impl Lane {
    /// Makes keys and configurations under `NAME/` and starts the parties, logging to `NAME-PARTY`.
    pub fn start(home: &Home, name: &str, model: &Path, limits: Limits) -> Lane {
        let dir = home.dir.join(name);
        let text = |p: PathBuf| p.to_str().unwrap().to_string();
        std::fs::create_dir(&dir).unwrap();
        let clients = dir.join("clients.toml");
        let token = home.output(&["keys", "client", "--name", "tests", "--clients", &text(clients.clone())]);
        let mut parties = tacet_client::Parties { token: token.trim().into(), party: Vec::new() };
        let mut held = Vec::new();
        for (party, role) in LANE {
            let made = home.output(&["keys", "party", "--name", party, "--dir", &text(dir.clone())]);
            let made: toml::Table = toml::from_str(&made).unwrap();
            let (udp, tcp) = (UdpSocket::bind("127.0.0.1:0").unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
            parties.party.push(tacet_client::Party {
                name: party.into(),
                role,
                addr: udp.local_addr().unwrap(),
                certificate: made["certificate"].as_str().unwrap().into(),
                seal_public: made["seal_public"].as_str().unwrap().into(),
            });
            held.push((udp, tcp));
        }
        let http: Vec<SocketAddr> = held.iter().map(|(_, tcp)| tcp.local_addr().unwrap()).collect();
        drop(held);
        let (mut configs, mut children) = (Vec::new(), Vec::new());
        for (i, p) in parties.party.iter().enumerate() {
            let peer = |p: &tacet_client::Party| Peer {
                name: p.name.clone(),
                role: p.role,
                addr: p.addr,
                certificate: p.certificate.clone(),
            };
            let config = Config {
                name: p.name.clone(),
                role: p.role,
                listen: p.addr,
                http: Some(http[i]),
                model: std::path::absolute(model).unwrap(),
                certificate: p.certificate.clone(),
                key: dir.join(format!("{}.key", p.name)),
                seal_key: dir.join(format!("{}.seal", p.name)),
                backend: tacet_party::config::BackendKind::default(),
                threads: 1,
                clients: clients.clone(),
                peer: parties.party.iter().filter(|o| o.name != p.name).map(peer).collect(),
                limits: limits.clone(),
                plans: None,
                pool: Pool { depth: 0, ..Pool::default() },
            };
            let file = dir.join(format!("{}.toml", p.name));
            std::fs::write(&file, toml::to_string(&config).unwrap()).unwrap();
            children.push(home.spawn(&format!("{name}-{}", p.name), &["party", "--config", &text(file)]));
            configs.push(config);
        }
        let file = dir.join("parties.toml");
        std::fs::write(&file, toml::to_string(&parties).unwrap()).unwrap();
        let lane = Lane { parties: file, configs, children };
        until("the parties to be linked", || (0..3).all(|i| lane.page(i, "/readyz") == "ready\n"));
        lane
    }

    pub fn pid(&self, party: usize) -> u32 {
        self.children[party].id()
    }

    /// Ends a party at once.
    pub fn kill(&mut self, party: usize) {
        self.children[party].kill().unwrap();
        self.children[party].wait().unwrap();
    }

    /// Body of a page of a party's HTTP address; empty if it does not answer.
    pub fn page(&self, party: usize, path: &str) -> String {
        let addr = self.configs[party].http.unwrap();
        let ask = || -> std::io::Result<String> {
            let mut s = TcpStream::connect_timeout(&addr, Duration::from_secs(1))?;
            s.set_read_timeout(Some(Duration::from_secs(5)))?;
            s.write_all(format!("GET {path} HTTP/1.1\r\n\r\n").as_bytes())?;
            let mut out = String::new();
            s.read_to_string(&mut out)?;
            Ok(out)
        };
        ask().unwrap_or_default().split_once("\r\n\r\n").map_or_else(String::new, |(_, body)| body.to_string())
    }

    /// A counter or gauge of a party.
    pub fn metric(&self, party: usize, name: &str) -> u64 {
        let page = self.page(party, "/metrics");
        let value = page.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
        value.unwrap_or_else(|| panic!("no {name} in {page:?}"))
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        for c in &mut self.children {
            let _ = c.kill();
            let _ = c.wait();
        }
    }
}

/// A running `tacet serve`.
pub struct Served {
    pub at: SocketAddr,
    child: Child,
}

/// The token that clients of the endpoint bring.
pub const TOKEN: &str = "a-token-of-these-tests";

impl Served {
    /// Serves `model` as `name`, logging to `serve-NAME`; `more` says by which parties.
    pub fn start(home: &Home, name: &str, model: &Path, more: &[&str]) -> Served {
        let model = std::path::absolute(model).unwrap();
        let args = ["serve", "--listen", "127.0.0.1:0", "--token", TOKEN, "--name", name, "--model"];
        let child = home.spawn(&format!("serve-{name}"), &[&args[..], &[model.to_str().unwrap()], more].concat());
        let mut served = Served { at: ([127, 0, 0, 1], 0).into(), child };
        until("the endpoint to listen", || {
            let out = home.log(&format!("serve-{name}.out"));
            let ended = served.child.try_wait().unwrap();
            assert!(ended.is_none(), "{ended:?}: {}", home.log(&format!("serve-{name}.err")));
            let whole = out.lines().any(|l| l.starts_with("token"));
            let at = out.split_whitespace().find_map(|w| w.strip_prefix("http://")?.parse().ok());
            at.filter(|_| whole).is_some_and(|at| {
                served.at = at;
                true
            })
        });
        served
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a request and does not wait for its answer. HTTP/1.0, so that the answer has no chunks and ends the connection.
    pub fn open(&self, path: &str, body: &[u8]) -> TcpStream {
        let mut s = TcpStream::connect(self.at).unwrap();
        s.set_read_timeout(Some(LONG)).unwrap();
        let head = format!(
            "POST {path} HTTP/1.0\r\nhost: {}\r\nauthorization: Bearer {TOKEN}\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n",
            self.at,
            body.len()
        );
        s.write_all(&[head.as_bytes(), body].concat()).unwrap();
        s
    }

    /// The whole answer to a request.
    pub fn post(&self, path: &str, body: impl AsRef<[u8]>) -> Reply {
        Reply::read(self.open(path, body.as_ref()))
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // Asked to end, it ends the parties that it started.
        let _ = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status();
        let _ = self.child.wait();
    }
}

#[derive(Clone, Debug)]
pub struct Reply {
    pub status: u16,
    /// Lower-case lines.
    pub head: String,
    pub body: String,
}

impl Reply {
    pub fn read(mut from: TcpStream) -> Reply {
        let mut text = String::new();
        from.read_to_string(&mut text).expect("an answer and its end");
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text:?}"));
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok());
        Reply { status: status.unwrap_or(0), head: head.to_ascii_lowercase(), body: body.into() }
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}
