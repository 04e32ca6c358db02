//! Identities of parties and tokens of clients.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};
use tacet_party::config::{Client, Clients, hex};
use tacet_protocol::seal::SealKeyPair;
use tacet_transport::Identity;

/// What a party hands to the others and to clients.
pub struct Made {
    /// Its certificate.
    pub certificate: PathBuf,
    /// The key that clients seal to, hex.
    pub seal_public: String,
}

/// `N` random bytes.
pub fn random<const N: usize>() -> Result<[u8; N]> {
    let mut b = [0; N];
    getrandom::fill(&mut b).map_err(|e| anyhow::anyhow!("no randomness: {e}"))?;
    Ok(b)
}

/// Hash under which a token is stored.
pub fn token_hash(token: &str) -> String {
    hex(&Sha256::digest(token))
}

fn secret_file(path: &Path, text: &str) -> Result<()> {
    let mut o = std::fs::OpenOptions::new();
    o.write(true).create_new(true);
    std::os::unix::fs::OpenOptionsExt::mode(&mut o, 0o600);
    let mut f = o.open(path).with_context(|| format!("{}: not overwriting", path.display()))?;
    f.write_all(text.as_bytes())?;
    Ok(())
}

/// Makes certificate, key and sealing key of a party in `dir`.
pub fn make(dir: &Path, name: &str) -> Result<Made> {
    if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') {
        bail!("a party's name has letters, digits and hyphens");
    }
    let (certificate, key) = Identity::generate(name)?;
    let seal = SealKeyPair::generate();
    secret_file(&dir.join(format!("{name}.key")), &key)?;
    secret_file(&dir.join(format!("{name}.seal")), &hex(seal.secret().as_slice()))?;
    let file = dir.join(format!("{name}.crt"));
    std::fs::write(&file, certificate)?;
    Ok(Made { certificate: file, seal_public: hex(&seal.public()) })
}

/// Adds a client to a clients file; returns its token, which is stored nowhere.
pub fn client(file: &Path, name: &str) -> Result<String> {
    let mut all: Clients = match std::fs::read_to_string(file) {
        Ok(t) => toml::from_str(&t).with_context(|| file.display().to_string())?,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Clients::default(),
        Err(e) => return Err(e).with_context(|| file.display().to_string()),
    };
    let token = hex(&random::<32>()?);
    all.client.push(Client { name: name.into(), token_sha256: token_hash(&token) });
    std::fs::write(file, toml::to_string(&all)?)?;
    Ok(token)
}
