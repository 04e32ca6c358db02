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

/// Adds a client to a clients file, which stays readable by its owner only; returns its token, which is stored nowhere.
pub fn client(file: &Path, name: &str) -> Result<String> {
    let at = || file.display().to_string();
    let text = match std::fs::read_to_string(file) {
        Ok(t) => t,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(e) => return Err(e).with_context(at),
    };
    let token = hex(&random::<32>()?);
    let text = with_client(&text, Client { name: name.into(), token_sha256: token_hash(&token) }).with_context(at)?;
    // A party that starts meanwhile sees the old file or the new one.
    let mut new = file.as_os_str().to_owned();
    new.push(format!(".{}", hex(&random::<4>()?)));
    let new = PathBuf::from(new);
    let written = secret_file(&new, &text).and_then(|()| std::fs::rename(&new, file).with_context(at));
    if written.is_err() {
        let _ = std::fs::remove_file(&new);
    }
    written.map(|()| token)
}

/// A clients file with one more client; what people wrote into it stays, hashes become lower case.
fn with_client(text: &str, new: Client) -> Result<String> {
    if new.name.is_empty() || new.name.chars().any(char::is_control) {
        bail!("a client's name has at least one letter and no control characters");
    }
    let mut all: Clients = toml::from_str(text)?;
    let mut text = text.to_string();
    for c in &mut all.client {
        if c.name == new.name {
            bail!("client {:?} has a token already: remove its entry first if it lost it", c.name);
        }
        if tacet_party::config::unhex(&c.token_sha256).is_none() {
            bail!("token_sha256 of client {:?}: 64 hex digits expected", c.name);
        }
        let lower = c.token_sha256.to_ascii_lowercase();
        text = text.replace(&c.token_sha256, &lower);
        c.token_sha256 = lower;
    }
    let entry = toml::to_string(&Clients { client: vec![new.clone()] })?;
    if !text.is_empty() {
        text.truncate(text.trim_end().len());
        text.push_str("\n\n");
    }
    text.push_str(&entry);
    all.client.push(new);
    // Entries in another notation than ours cannot be appended to.
    if toml::from_str::<Clients>(&text).is_ok_and(|c| c.client.len() == all.client.len()) {
        return Ok(text);
    }
    Ok(toml::to_string(&all)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str) -> Client {
        Client { name: name.into(), token_sha256: token_hash(name) }
    }

    #[test]
    fn clients_are_added_and_nothing_is_lost() {
        let one = with_client("", entry("clinic")).unwrap();
        let by_hand =
            format!("# our clients\n{}", one.replace(&token_hash("clinic"), &token_hash("clinic").to_uppercase()));
        let two = with_client(&by_hand, entry("bank")).unwrap();
        assert!(two.starts_with("# our clients\n"), "{two}");
        let all: Clients = toml::from_str(&two).unwrap();
        assert_eq!(all.client.iter().map(|c| c.name.as_str()).collect::<Vec<_>>(), ["clinic", "bank"]);
        assert!(all.knows("clinic") && all.knows("bank") && !all.knows("other"));
        let inline = format!("client = [{{ name = \"clinic\", token_sha256 = {:?} }}]", token_hash("clinic"));
        let all: Clients = toml::from_str(&with_client(&inline, entry("bank")).unwrap()).unwrap();
        assert!(all.knows("clinic") && all.knows("bank"));
    }

    #[test]
    fn names_and_hashes_that_cannot_be_meant_are_refused() {
        let one = with_client("", entry("clinic")).unwrap();
        let said = |text: &str, name: &str| with_client(text, entry(name)).unwrap_err().to_string();
        assert!(said(&one, "clinic").contains("\"clinic\" has a token already"));
        assert!(
            said(&one.replace(&token_hash("clinic"), "beef"), "bank").contains("token_sha256 of client \"clinic\"")
        );
        assert!(said("", "").contains("name"));
        assert!(said("client = 7", "bank").contains("line 1"));
    }
}
