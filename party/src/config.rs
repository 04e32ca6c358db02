//! `party.toml`, and the list of clients a party serves.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tacet_protocol::Role;
pub use tacet_protocol::hex;

use crate::PartyError;

/// One party of a lane. Paths are relative to the file's folder.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Name of the organisation.
    pub name: String,
    /// Role in this lane.
    pub role: Role,
    /// UDP address for QUIC.
    pub listen: SocketAddr,
    /// TCP address for `/healthz`, `/readyz` and `/metrics`; none if absent.
    pub http: Option<SocketAddr>,
    /// Hugging Face model directory.
    pub model: PathBuf,
    /// Own certificate (PEM).
    pub certificate: PathBuf,
    /// Its private key (PEM).
    pub key: PathBuf,
    /// Private key for sealed inputs (hex).
    pub seal_key: PathBuf,
    /// Clients file; nobody is served without it.
    pub clients: PathBuf,
    /// Where products are computed.
    #[serde(default)]
    pub backend: BackendKind,
    /// Threads that what the processor computes is divided among, for all sessions together: products, dealing, and the large
    /// gates and openings of an evaluator; 0 for one a core of the machine. With 1 each session computes by itself. Lower it
    /// where others share the machine.
    #[serde(default)]
    pub threads: usize,
    /// Folder that plans of large models are kept in between starts; in the user's cache if absent, and empty for none.
    pub plans: Option<PathBuf>,
    /// The two other parties.
    pub peer: Vec<Peer>,
    /// Limits.
    #[serde(default)]
    pub limits: Limits,
    /// Dealing ahead.
    #[serde(default)]
    pub pool: Pool,
}

/// Where a party computes products.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendKind {
    /// On a graphics adapter if the machine has one in hardware that is faster than a thread of its processor, else there.
    #[default]
    Auto,
    /// On the processor.
    Cpu,
    /// On a graphics adapter, be it one in software; without any the party does not start.
    Gpu,
}

impl std::str::FromStr for BackendKind {
    type Err = &'static str;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        match s {
            "auto" => Ok(BackendKind::Auto),
            "cpu" => Ok(BackendKind::Cpu),
            "gpu" => Ok(BackendKind::Gpu),
            _ => Err("auto, cpu or gpu is expected"),
        }
    }
}

/// Another party.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// Its name.
    pub name: String,
    /// Its role.
    pub role: Role,
    /// Its QUIC address.
    pub addr: SocketAddr,
    /// Its certificate (PEM), pinned.
    pub certificate: PathBuf,
}

/// Largest number that a limit may be.
const LIMIT: usize = 1 << 16;

/// Bounds on what clients may ask for, and deadlines.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Sessions at once.
    pub sessions: usize,
    /// Connections of clients at once.
    pub connections: usize,
    /// Tokens a prompt.
    pub tokens: usize,
    /// Megabytes (10^6 bytes) that wait between one stream of a session and its arithmetic, or one message if that is
    /// larger: an evaluator has two such streams, a dealer two.
    pub buffer_mb: usize,
    /// Seconds a party waits for the others to join a session, for a request, and for a connection's first known token.
    pub join_s: u64,
    /// Seconds a session may take.
    pub session_s: u64,
    /// Seconds that a sequence may wait for its client's next token.
    pub idle_s: u64,
    /// Seconds that running sessions get when the party is told to stop.
    pub drain_s: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            sessions: 16,
            connections: 256,
            tokens: 512,
            buffer_mb: 32,
            join_s: 5,
            session_s: 60,
            idle_s: 300,
            drain_s: 30,
        }
    }
}

impl Limits {
    pub(crate) fn buffer(&self) -> usize {
        self.buffer_mb * 1_000_000
    }
}

/// Dealing ahead of queries, in bundles of one program's dealing each.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Pool {
    /// Megabytes (10^6 bytes) of dealt payload that an evaluator keeps in memory for queries to come; 0 for none.
    pub memory_mb: usize,
    /// Megabytes on disk, encrypted, for bundles that find no room in memory; 0 for none.
    pub spool_mb: usize,
    /// The folder for them, for its owner alone; made if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spool_dir: Option<PathBuf>,
    /// Bundles that a party keeps, whatever their size.
    pub bundles: usize,
    /// Bundles that the dealer keeps ready of each length asked for lately; 0 for none.
    pub depth: usize,
    /// Numbers of tokens that the dealer deals for before they are asked for.
    pub prefill: Vec<usize>,
}

impl Default for Pool {
    fn default() -> Self {
        Pool { memory_mb: 512, spool_mb: 0, spool_dir: None, bundles: 64, depth: 2, prefill: Vec::new() }
    }
}

/// The clients file.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Clients {
    /// Clients that are served.
    #[serde(default)]
    pub client: Vec<Client>,
}

/// One client.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Client {
    /// Name, for the operator.
    pub name: String,
    /// SHA-256 of the bearer token, hex.
    pub token_sha256: String,
}

impl Clients {
    /// Reads the clients file.
    ///
    /// # Errors
    /// Unreadable files, unknown fields, a hash that is not one.
    pub fn load(path: &Path) -> Result<Clients, PartyError> {
        let c: Clients = parse(path)?;
        match c.client.iter().find(|c| unhex(&c.token_sha256).is_none()) {
            Some(c) => Err(PartyError::Config(format!(
                "{}: token_sha256 of {:?}: 64 hex digits expected, as `tacet keys client` writes them",
                path.display(),
                c.name
            ))),
            None => Ok(c),
        }
    }

    /// Whether a token is known; compares hashes in time independent of where they differ.
    pub fn knows(&self, token: &str) -> bool {
        let hash: [u8; 32] = Sha256::digest(token).into();
        let equal = |h: [u8; 32]| h.iter().zip(hash).fold(0, |d, (a, b)| d | (a ^ b)) == 0;
        self.client.iter().fold(false, |found, c| found | unhex(&c.token_sha256).is_some_and(equal))
    }
}

/// 32 bytes from hex.
pub fn unhex(s: &str) -> Option<[u8; 32]> {
    let s = s.trim();
    let mut out = [0; 32];
    if s.len() != 64 || !s.is_ascii() {
        return None;
    }
    for (i, o) in out.iter_mut().enumerate() {
        *o = u8::from_str_radix(&s[2 * i..2 * i + 2], 16).ok()?;
    }
    Some(out)
}

/// Reads a file, naming it in the error.
pub fn read(path: &Path) -> Result<String, PartyError> {
    std::fs::read_to_string(path).map_err(|e| PartyError::Config(format!("{}: {e}", path.display())))
}

/// Parses a TOML file, naming it in the error.
pub fn parse<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, PartyError> {
    toml::from_str(&read(path)?).map_err(|e| PartyError::Config(format!("{}: {e}", path.display())))
}

impl Config {
    /// Reads a configuration and makes its paths absolute.
    ///
    /// # Errors
    /// Unreadable files, unknown fields, roles that do not make a lane.
    pub fn load(path: &Path) -> Result<Config, PartyError> {
        let mut c: Config = parse(path)?;
        let base = path.parent().unwrap_or(Path::new(".")).to_path_buf();
        for p in [&mut c.model, &mut c.certificate, &mut c.key, &mut c.seal_key, &mut c.clients] {
            *p = base.join(&*p);
        }
        c.peer.iter_mut().for_each(|p| p.certificate = base.join(&p.certificate));
        c.plans = c.plans.map(|dir| if dir.as_os_str().is_empty() { dir } else { base.join(dir) });
        c.pool.spool_dir = c.pool.spool_dir.map(|dir| base.join(dir));
        let l = &c.limits;
        let within = |name: &str, v: usize, range: std::ops::RangeInclusive<usize>| {
            let text = format!("{name} = {v}: {} to {} are possible", range.start(), range.end());
            if range.contains(&v) { Ok(()) } else { Err(PartyError::Config(text)) }
        };
        within("limits.sessions", l.sessions, 1..=4096)?;
        within("limits.connections", l.connections, 1..=1 << 20)?;
        within("limits.tokens", l.tokens, 1..=1 << 16)?;
        within("limits.buffer_mb", l.buffer_mb, 1..=4096)?;
        for (name, seconds) in
            [("limits.join_s", l.join_s), ("limits.session_s", l.session_s), ("limits.idle_s", l.idle_s)]
        {
            within(name, seconds as usize, 1..=1 << 20)?;
        }
        within("threads", c.threads, 0..=1024)?;
        within("pool.bundles", c.pool.bundles, 0..=4096)?;
        within("pool.spool_mb", c.pool.spool_mb, 0..=1 << 30)?;
        if c.pool.spool_mb > 0 && c.pool.spool_dir.is_none() {
            let text = format!("pool.spool_mb = {}: pool.spool_dir names the folder, and is missing", c.pool.spool_mb);
            return Err(PartyError::Config(text));
        }
        for tokens in &c.pool.prefill {
            within("pool.prefill", *tokens, 1..=l.tokens)?;
        }
        let roles = [Role::E1, Role::E2, Role::Dealer];
        let count = |r: &Role| usize::from(c.role == *r) + c.peer.iter().filter(|p| p.role == *r).count();
        if c.peer.len() != 2 || roles.iter().any(|r| count(r) != 1) {
            return Err(PartyError::Config(format!(
                "{}: role: a lane has one e1, one e2 and one dealer, this party and two [[peer]] entries",
                path.display()
            )));
        }
        for (name, n) in [("sessions", c.limits.sessions), ("tokens", c.limits.tokens)] {
            if !(1..=LIMIT).contains(&n) {
                return Err(PartyError::Config(format!("limits.{name} is {n}: 1 to {LIMIT} are possible")));
            }
        }
        Ok(c)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_known_by_their_hash_in_either_case() {
        let hash = hex(&Sha256::digest("secret"));
        for h in [hash.to_uppercase(), hash] {
            let c = Clients { client: vec![Client { name: "clinic".into(), token_sha256: h }] };
            assert!(c.knows("secret") && !c.knows("Secret") && !c.knows(""));
        }
        assert!(!Clients::default().knows("secret"));
        let c = Clients { client: vec![Client { name: "clinic".into(), token_sha256: "secret".into() }] };
        assert!(!c.knows("secret"));
    }

    #[test]
    fn hex_of_thirty_two_bytes() {
        assert_eq!(unhex(&hex(&[0xa5; 32])), Some([0xa5; 32]));
        for bad in ["", "00", &"g".repeat(64), &"0".repeat(63), &"0".repeat(66), &"\u{e9}".repeat(32)] {
            assert_eq!(unhex(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_spool_needs_a_folder_which_is_beside_the_file() {
        let dir = std::env::temp_dir().join(format!("tacet-config-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let file = dir.join("party.toml");
        let load = |pool: &str| {
            let peer = |n: u8, role: &str| {
                format!("[[peer]]\nname = \"{n}\"\nrole = \"{role}\"\naddr = \"127.0.0.1:{n}\"\ncertificate = \"c\"\n")
            };
            let own = "name = \"a\"\nrole = \"e1\"\nlisten = \"127.0.0.1:1\"\nmodel = \"m\"\ncertificate = \"c\"\n\
                       key = \"k\"\nseal_key = \"s\"\nclients = \"l\"\n";
            let text = format!("{own}{}{}[pool]\n{pool}", peer(2, "e2"), peer(3, "dealer"));
            std::fs::write(&file, text).unwrap();
            Config::load(&file).map(|c| c.pool.spool_dir).map_err(|e| e.to_string())
        };
        assert_eq!(load(""), Ok(None));
        assert_eq!(load("spool_mb = 5\nspool_dir = \"spool\""), Ok(Some(dir.join("spool"))));
        assert!(load("spool_mb = 5").unwrap_err().contains("pool.spool_dir names the folder"));
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
