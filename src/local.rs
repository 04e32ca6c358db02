//! Three parties as processes of this machine, with identities of their own in a private temporary folder.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use tacet_client::Parties;
use tacet_party::config::{BackendKind, Client, Clients, Config, Limits, Peer, Pool, hex};
use tacet_protocol::Role;

use crate::keys;

/// Names of the three organisations of a local lane.
const LANE: [(&str, Role); 3] = [("alpha", Role::E1), ("beta", Role::E2), ("gamma", Role::Dealer)];

/// How long linking may take: planning a large model takes its time, and three do it at once.
pub const PATIENCE: Duration = Duration::from_secs(3600);

/// How long a party may take to answer over HTTP; it shares its cores with the others.
const LONG: Duration = Duration::from_secs(5);

/// A private temporary folder, removed when dropped.
pub struct Folder(pub PathBuf);

impl Folder {
    /// Makes an empty one, whose name begins so.
    pub fn make(name: &str) -> Result<Folder> {
        let dir = std::env::temp_dir().join(format!("{name}-{}", hex(&keys::random::<8>()?)));
        let mut b = std::fs::DirBuilder::new();
        std::os::unix::fs::DirBuilderExt::mode(&mut b, 0o700);
        b.create(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(Folder(dir))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A running local lane; processes are ended on drop, before the folder is removed.
pub struct Lane {
    exe: PathBuf,
    dir: Folder,
    children: Vec<Child>,
    http: Vec<SocketAddr>,
    /// How to reach it.
    pub parties: Parties,
}

/// What is reported of a party.
#[derive(Serialize)]
pub struct PartyReport {
    /// Name.
    pub name: &'static str,
    /// Process.
    pub pid: u32,
    /// Role.
    pub role: Role,
    /// Resident memory.
    pub rss_mb: f64,
    /// Most that was ever resident.
    pub peak_mb: f64,
    /// What it computes on, as it says itself.
    pub backend: Option<String>,
}

/// Threads of each party: the three share this machine's cores.
pub fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get() / LANE.len()).max(1)
}

impl Lane {
    /// Makes identities, starts three `tacet party` processes and waits until they are linked.
    #[allow(dead_code)] // for tests
    pub fn start(exe: &Path, model: &Path, limits: Limits) -> Result<Lane> {
        Lane::start_with(exe, model, limits, Pool::default())
    }

    /// As [`Lane::start`], with a choice of what is dealt ahead.
    #[allow(dead_code)] // for tests
    pub fn start_with(exe: &Path, model: &Path, limits: Limits, pool: Pool) -> Result<Lane> {
        Lane::start_on(exe, model, limits, pool, BackendKind::default())
    }

    /// As [`Lane::start_with`], with a choice of where products are computed.
    #[allow(dead_code)] // for tests
    pub fn start_on(exe: &Path, model: &Path, limits: Limits, pool: Pool, backend: BackendKind) -> Result<Lane> {
        let mut lane = Lane::launch(exe, model, limits, pool, backend)?;
        lane.wait()?;
        Ok(lane)
    }

    /// Makes identities and starts three `tacet party` processes; [`Lane::linked`] says when they can be asked.
    pub fn launch(exe: &Path, model: &Path, limits: Limits, pool: Pool, backend: BackendKind) -> Result<Lane> {
        Lane::launch_over(exe, model, limits, pool, backend, Ok)
    }

    /// As [`Lane::launch`], with a choice of the address by which the parties reach each of them.
    pub fn launch_over(
        exe: &Path,
        model: &Path,
        limits: Limits,
        pool: Pool,
        backend: BackendKind,
        via: impl Fn(SocketAddr) -> std::io::Result<SocketAddr>,
    ) -> Result<Lane> {
        let folder = Folder::make("tacet")?;
        let dir = folder.0.clone();
        let token = hex(&keys::random::<32>()?);
        let clients = Clients { client: vec![Client { name: "local".into(), token_sha256: keys::token_hash(&token) }] };
        let mut lane = Lane {
            exe: exe.to_path_buf(),
            dir: folder,
            children: Vec::new(),
            http: Vec::new(),
            parties: Parties { token, party: Vec::new() },
        };
        let threads = threads();
        let mut addrs = Vec::new();
        let mut held = Vec::new();
        for (name, role) in LANE {
            let made = keys::make(&dir, name)?;
            let (udp, tcp) = (UdpSocket::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?);
            addrs.push(udp.local_addr()?);
            lane.http.push(tcp.local_addr()?);
            held.push((udp, tcp));
            lane.parties.party.push(tacet_client::Party {
                name: name.into(),
                role,
                addr: addrs[addrs.len() - 1],
                certificate: made.certificate,
                seal_public: made.seal_public,
            });
        }
        let reached = addrs.iter().map(|a| via(*a)).collect::<std::io::Result<Vec<_>>>()?;
        // Only now, so that a relay's socket has none of these ports.
        drop(held);
        std::fs::write(dir.join("clients.toml"), toml::to_string(&clients)?)?;
        for (i, (name, role)) in LANE.into_iter().enumerate() {
            let peer = |j: usize| Peer {
                name: LANE[j].0.into(),
                role: LANE[j].1,
                addr: reached[j],
                certificate: format!("{}.crt", LANE[j].0).into(),
            };
            let config = Config {
                name: name.into(),
                role,
                listen: addrs[i],
                http: Some(lane.http[i]),
                model: std::path::absolute(model)?,
                certificate: format!("{name}.crt").into(),
                key: format!("{name}.key").into(),
                seal_key: format!("{name}.seal").into(),
                clients: "clients.toml".into(),
                peer: (0..3).filter(|j| *j != i).map(peer).collect(),
                limits: limits.clone(),
                plans: None,
                pool: pool.clone(),
                backend,
                threads,
            };
            std::fs::write(dir.join(format!("{name}.toml")), toml::to_string(&config)?)?;
            let child = lane.spawn(name)?;
            lane.children.push(child);
        }
        Ok(lane)
    }

    fn spawn(&self, name: &str) -> Result<Child> {
        let log = std::fs::File::create(self.dir.0.join(format!("{name}.log")))?;
        let mut party = Command::new(&self.exe);
        party.args(["party", "--config"]).arg(self.dir.0.join(format!("{name}.toml")));
        // A terminal's Ctrl-C is for whoever started the lane, who ends it when it is no longer needed.
        std::os::unix::process::CommandExt::process_group(&mut party, 0);
        Ok(party.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn()?)
    }

    #[allow(dead_code)] // for tests
    fn wait(&mut self) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        while !self.linked(until)? {
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Whether all three are linked by now.
    ///
    /// # Errors
    /// A party that has ended, with its log, or `until` has passed.
    pub fn linked(&mut self, until: Instant) -> Result<bool> {
        if self.http.iter().all(|a| ready(*a)) {
            return Ok(true);
        }
        for (c, (name, _)) in self.children.iter_mut().zip(LANE) {
            if let Some(status) = c.try_wait()? {
                let log = std::fs::read_to_string(self.dir.0.join(format!("{name}.log"))).unwrap_or_default();
                bail!("party {name} ended ({status}):\n{log}");
            }
        }
        if Instant::now() > until {
            bail!("the parties were not linked within {} s", PATIENCE.as_secs());
        }
        Ok(false)
    }

    /// Ends one party's process at once; 0, 1 and 2 are E1, E2 and the dealer.
    #[allow(dead_code)] // for the tests of faults
    pub fn kill(&mut self, party: usize) {
        let _ = self.children[party].kill();
    }

    /// Starts a killed party again and waits until the lane is linked.
    #[allow(dead_code)] // for the tests of faults
    pub fn restart(&mut self, party: usize) -> Result<()> {
        self.children[party].wait()?;
        self.children[party] = self.spawn(LANE[party].0)?;
        self.wait()
    }

    /// One of a party's metrics, as `/metrics` names it.
    #[allow(dead_code)] // for the tests of faults
    pub fn metric(&self, party: usize, name: &str) -> Option<u64> {
        let text = get(self.http[party], "/metrics").ok()?;
        text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
    }

    /// Processes with their memory.
    pub fn report(&self) -> Vec<PartyReport> {
        let report = |(c, (name, role)): (&Child, (&'static str, Role))| {
            let status = std::fs::read_to_string(format!("/proc/{}/status", c.id())).unwrap_or_default();
            let mb = |key: &str| {
                let kb =
                    status.lines().find_map(|l| l.strip_prefix(key)?.split_whitespace().next()?.parse::<f64>().ok());
                kb.unwrap_or(0.0) / 1024.0
            };
            PartyReport { name, pid: c.id(), role, rss_mb: mb("VmRSS:"), peak_mb: mb("VmHWM:"), backend: None }
        };
        let all = self.children.iter().zip(LANE).map(report);
        all.zip(&self.http).map(|(r, at)| PartyReport { backend: backend(*at), ..r }).collect()
    }

    /// Why parties are not ready: the names of peers, and what keeps them.
    pub fn reasons(&self) -> String {
        let why = |at: &SocketAddr| get(*at, "/readyz").ok()?.split_once("\r\n\r\n").map(|(_, body)| body.to_string());
        let all = self.http.iter().zip(LANE).map(|(at, (name, _))| match why(at) {
            None => format!("{name}: plans the model, or has not started"),
            Some(body) => format!("{name}: {}", body.trim_end().replace('\n', "; ")),
        });
        all.collect::<Vec<_>>().join("\n")
    }
}

fn get(addr: SocketAddr, path: &str) -> std::io::Result<String> {
    let mut s = TcpStream::connect_timeout(&addr, LONG)?;
    s.set_read_timeout(Some(LONG))?;
    s.write_all(format!("GET {path} HTTP/1.1\r\n\r\n").as_bytes())?;
    let mut out = String::new();
    s.read_to_string(&mut out)?;
    Ok(out)
}

fn backend(addr: SocketAddr) -> Option<String> {
    let text = get(addr, "/metrics").ok()?;
    text.lines().find_map(|l| Some(l.strip_prefix("tacet_backend{name=\"")?.rsplit_once("\"} 1")?.0.to_string()))
}

fn ready(addr: SocketAddr) -> bool {
    get(addr, "/readyz").is_ok_and(|out| out.starts_with("HTTP/1.1 200"))
}

impl Drop for Lane {
    fn drop(&mut self) {
        for c in &mut self.children {
            let _ = c.kill();
            let _ = c.wait();
        }
    }
}
