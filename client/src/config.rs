//! `parties.toml`: the three parties of a lane as a client sees them, and its token.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tacet_protocol::Role;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use crate::ClientError;

/// `parties.toml`: whom to ask, and this client's token, which is wiped on drop and never printed.
#[derive(Clone, Deserialize, Serialize, Zeroize, ZeroizeOnDrop)]
#[serde(deny_unknown_fields)]
pub struct Parties {
    /// Bearer token, known to all three parties by its hash.
    pub token: String,
    /// The three parties of a lane.
    #[zeroize(skip)]
    pub party: Vec<Party>,
}

impl std::fmt::Debug for Parties {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Parties").field("party", &self.party).finish_non_exhaustive()
    }
}

/// One party as a client sees it.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Party {
    /// Name of the organisation.
    pub name: String,
    /// Its role.
    pub role: Role,
    /// Its QUIC address.
    pub addr: SocketAddr,
    /// Its certificate (PEM), pinned; relative to the file.
    pub certificate: PathBuf,
    /// Public key that inputs are sealed to, hex.
    pub seal_public: String,
}

impl Parties {
    /// Reads `parties.toml`.
    ///
    /// # Errors
    /// Names the file and what is wrong with it.
    pub fn load(path: &Path) -> Result<Parties, ClientError> {
        let bad = |e: String| ClientError::Config(format!("{}: {e}", path.display()));
        let text = Zeroizing::new(std::fs::read_to_string(path).map_err(|e| bad(e.to_string()))?);
        // The parser's own rendering shows the line at fault, which may be the token's.
        let mut p: Parties = toml::from_str(&text).map_err(|e| {
            let line = e.span().map(|s| text[..s.start.min(text.len())].lines().count().max(1));
            bad(format!("{}{}", line.map(|l| format!("line {l}: ")).unwrap_or_default(), e.message()))
        })?;
        let base = path.parent().unwrap_or(Path::new("."));
        p.party.iter_mut().for_each(|p| p.certificate = base.join(&p.certificate));
        p.check().map_err(|e| bad(e.to_string()))?;
        Ok(p)
    }

    /// Three roles, three names, keys that are keys.
    pub(crate) fn check(&self) -> Result<(), ClientError> {
        let bad = |e: String| Err(ClientError::Config(e));
        let once = |r: &Role| self.party.iter().filter(|p| p.role == *r).count() == 1;
        if self.party.len() != 3 || ![Role::E1, Role::E2, Role::Dealer].iter().all(once) {
            return bad("three [[party]] entries are needed: e1, e2 and dealer".into());
        }
        for (i, p) in self.party.iter().enumerate() {
            if self.party[..i].iter().any(|q| q.name == p.name) {
                return bad(format!("name {:?} is used twice: each party is another organisation", p.name));
            }
            if unhex(&p.seal_public).is_none() {
                return bad(format!("seal_public of party {}: 64 hex digits expected", p.name));
            }
        }
        Ok(())
    }
}

/// 32 bytes from 64 hex digits of either case.
pub(crate) fn unhex(s: &str) -> Option<[u8; 32]> {
    let digit = |c: u8| char::from(c).to_digit(16).map(|d| d as u8);
    let mut out = [0; 32];
    if s.len() != 64 {
        return None;
    }
    for (o, pair) in out.iter_mut().zip(s.as_bytes().chunks_exact(2)) {
        *o = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parties() -> Parties {
        let party = |name: &str, role| Party {
            name: name.into(),
            role,
            addr: ([127, 0, 0, 1], 1).into(),
            certificate: "x.crt".into(),
            seal_public: "aB".repeat(32),
        };
        Parties {
            token: "not to be seen".into(),
            party: vec![party("alpha", Role::E1), party("beta", Role::E2), party("gamma", Role::Dealer)],
        }
    }

    fn loaded(text: &str) -> Result<Parties, ClientError> {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let n = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let file = std::env::temp_dir().join(format!("tacet-parties-{}-{n}.toml", std::process::id()));
        std::fs::write(&file, text).unwrap();
        let r = Parties::load(&file);
        std::fs::remove_file(&file).unwrap();
        r
    }

    #[test]
    fn the_token_does_not_print() {
        assert!(!format!("{:?}", parties()).contains("not to be seen"));
        let text = toml::to_string(&parties()).unwrap();
        assert_eq!(loaded(&text).unwrap().token, "not to be seen");
        for bad in [text.replace("token =", "tokem ="), text.replace("\"not", "not"), text.replace("seen\"", "seen")] {
            let e = loaded(&bad).unwrap_err().to_string();
            assert!(e.contains("line 1") && e.contains(".toml") && !e.contains("not to be"), "{e}");
        }
    }

    #[test]
    fn lanes_that_are_none_are_refused() {
        let refused = |change: fn(&mut Parties), want: &str| {
            let mut p = parties();
            change(&mut p);
            let e = p.check().unwrap_err().to_string();
            assert!(e.contains(want), "{e}");
        };
        refused(|p| p.party.truncate(2), "e1, e2 and dealer");
        refused(|p| p.party[2].role = Role::E1, "e1, e2 and dealer");
        refused(|p| p.party[2].name = "beta".into(), "\"beta\" is used twice");
        refused(|p| p.party[1].seal_public = "é".repeat(32), "seal_public of party beta");
    }

    #[test]
    fn hex_of_either_case() {
        assert_eq!(unhex(&"aB".repeat(32)), Some([0xab; 32]));
        assert_eq!(unhex(&"+1".repeat(32)), None);
        assert_eq!(unhex("ab"), None);
    }
}
