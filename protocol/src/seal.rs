//! Sealing a share to one party: HPKE base mode (RFC 9180) with X25519, HKDF-SHA256 and AES-256-GCM.
//!
//! Sealed bytes are the encapsulated key (32 bytes) and the ciphertext with its tag. The context is bound through
//! HPKE's `info`, so bytes sealed for one session, party, role, model or program open under no other.

use std::fmt;

use hpke::aead::AesGcm256;
use hpke::kdf::HkdfSha256;
use hpke::kem::X25519HkdfSha256;
use hpke::{Deserializable, Kem, OpModeR, OpModeS, Serializable};
use zeroize::{Zeroize, Zeroizing};

use crate::{Error, Role};

type PublicKey = <X25519HkdfSha256 as Kem>::PublicKey;
type PrivateKey = <X25519HkdfSha256 as Kem>::PrivateKey;
type Encapsulated = <X25519HkdfSha256 as Kem>::EncappedKey;

const ENCAPSULATED: usize = 32;
const TAG: usize = 16;

/// What [`seal`] adds to the length of its plaintext.
pub const OVERHEAD: usize = ENCAPSULATED + TAG;

/// What a sealed share is for. Both ends must agree on every field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SealContext {
    /// The client's session id.
    pub session: [u8; 16],
    /// Name of the party that may open.
    pub party: String,
    /// Its role in this lane.
    pub role: Role,
    /// Digest of the model that will run.
    pub model_digest: [u8; 32],
    /// Digest of the program that will run.
    pub program_digest: [u8; 32],
}

impl SealContext {
    /// Injective: every field but the last has a fixed length.
    fn info(&self) -> Vec<u8> {
        let role = match self.role {
            Role::E1 => 1,
            Role::E2 => 2,
            Role::Dealer => 3,
        };
        let mut info = b"tacet seal v1".to_vec();
        info.extend_from_slice(&self.session);
        info.push(role);
        info.extend_from_slice(&self.model_digest);
        info.extend_from_slice(&self.program_digest);
        info.extend_from_slice(self.party.as_bytes());
        info
    }
}

/// A party's long-lived key for opening what is sealed to it.
pub struct SealKeyPair {
    secret: PrivateKey,
    public: [u8; 32],
}

impl SealKeyPair {
    /// A fresh key pair.
    pub fn generate() -> SealKeyPair {
        let mut secret = [0; 32];
        // Without randomness nothing here is safe, and there is no caller that could go on.
        getrandom::fill(&mut secret).expect("the operating system gives randomness");
        SealKeyPair::from_secret(secret)
    }

    /// The key pair of a stored secret.
    pub fn from_secret(mut bytes: [u8; 32]) -> SealKeyPair {
        let secret = PrivateKey::from_bytes(&bytes).expect("any 32 bytes are an X25519 secret");
        bytes.zeroize();
        let public = X25519HkdfSha256::sk_to_pk(&secret).to_bytes().into();
        SealKeyPair { secret, public }
    }

    /// The key to publish.
    pub fn public(&self) -> [u8; 32] {
        self.public
    }

    /// The secret, for storing it.
    pub fn secret(&self) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(self.secret.to_bytes().into())
    }
}

impl fmt::Debug for SealKeyPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SealKeyPair(..)")
    }
}

/// Seals `plaintext` to the holder of `public`.
pub fn seal(public: &[u8; 32], ctx: &SealContext, plaintext: &[u8]) -> Result<Vec<u8>, Error> {
    let public = PublicKey::from_bytes(public).map_err(|_| Error::Sealed("not a public key"))?;
    let (encapsulated, ciphertext) = hpke::single_shot_seal::<AesGcm256, HkdfSha256, X25519HkdfSha256>(
        &OpModeS::Base,
        &public,
        &ctx.info(),
        plaintext,
        b"",
    )
    .map_err(|_| Error::Sealed("the public key cannot be sealed to"))?;
    let mut sealed = encapsulated.to_bytes().to_vec();
    sealed.extend_from_slice(&ciphertext);
    Ok(sealed)
}

/// Opens what [`seal`] made for this key and this context; anything else is refused without saying what differs.
pub fn open(keys: &SealKeyPair, ctx: &SealContext, bytes: &[u8]) -> Result<Zeroizing<Vec<u8>>, Error> {
    if bytes.len() < OVERHEAD {
        return Err(Error::Sealed("too short"));
    }
    let (encapsulated, ciphertext) = bytes.split_at(ENCAPSULATED);
    let encapsulated = Encapsulated::from_bytes(encapsulated).map_err(|_| Error::Sealed("bad encapsulated key"))?;
    hpke::single_shot_open::<AesGcm256, HkdfSha256, X25519HkdfSha256>(
        &OpModeR::Base,
        &keys.secret,
        &encapsulated,
        &ctx.info(),
        ciphertext,
        b"",
    )
    .map(Zeroizing::new)
    .map_err(|_| Error::Sealed("wrong key or context, or tampered bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context() -> SealContext {
        SealContext {
            session: [7; 16],
            party: "north".into(),
            role: Role::E2,
            model_digest: [8; 32],
            program_digest: [9; 32],
        }
    }

    #[test]
    fn opens_what_was_sealed() {
        let keys = SealKeyPair::generate();
        for plaintext in [&b""[..], b"half of a prompt", &[0; 70_000]] {
            let sealed = seal(&keys.public(), &context(), plaintext).unwrap();
            assert_eq!(sealed.len(), plaintext.len() + OVERHEAD);
            assert_eq!(&open(&keys, &context(), &sealed).unwrap()[..], plaintext);
        }
        let again = |_| seal(&keys.public(), &context(), b"x").unwrap();
        assert_ne!(again(0), again(1), "each sealing has its own key");
    }

    #[test]
    fn stored_secret_gives_the_same_keys() {
        let keys = SealKeyPair::generate();
        let stored = SealKeyPair::from_secret(*keys.secret());
        let sealed = seal(&stored.public(), &context(), b"x").unwrap();
        assert_eq!(&open(&keys, &context(), &sealed).unwrap()[..], b"x");
    }

    #[test]
    fn every_field_of_the_context_is_bound() {
        let keys = SealKeyPair::generate();
        let sealed = seal(&keys.public(), &context(), b"x").unwrap();
        let change: [fn(&mut SealContext); 6] = [
            |c| c.session[15] ^= 1,
            |c| c.party.push('x'),
            |c| c.party.clear(),
            |c| c.role = Role::E1,
            |c| c.model_digest[0] ^= 1,
            |c| c.program_digest[31] ^= 1,
        ];
        for change in change {
            let mut other = context();
            change(&mut other);
            assert!(matches!(open(&keys, &other, &sealed), Err(Error::Sealed(_))), "{other:?}");
        }
    }

    #[test]
    fn tampered_short_and_misdirected_bytes_are_refused() {
        let keys = SealKeyPair::generate();
        let sealed = seal(&keys.public(), &context(), b"half of a prompt").unwrap();
        for at in 0..sealed.len() {
            let mut bad = sealed.clone();
            bad[at] ^= 1;
            assert!(matches!(open(&keys, &context(), &bad), Err(Error::Sealed(_))), "byte {at}");
            assert!(open(&keys, &context(), &sealed[..at]).is_err(), "cut at {at}");
        }
        assert!(open(&keys, &context(), &[&sealed[..], &[0]].concat()).is_err());
        assert!(open(&SealKeyPair::generate(), &context(), &sealed).is_err());
    }

    #[test]
    fn degenerate_public_keys_are_refused() {
        assert!(matches!(seal(&[0; 32], &context(), b"x"), Err(Error::Sealed(_))));
        let zero_point = [0; 64];
        assert!(open(&SealKeyPair::generate(), &context(), &zero_point).is_err());
    }

    #[test]
    fn context_encoding_is_frozen() {
        let mut expected = b"tacet seal v1".to_vec();
        expected.extend([7; 16]);
        expected.push(2);
        expected.extend([8; 32]);
        expected.extend([9; 32]);
        expected.extend(b"north");
        assert_eq!(context().info(), expected);
    }

    /// Sealed by another implementation of RFC 9180, straight from its text.
    #[test]
    fn frozen_sealed_bytes_open() {
        let keys = SealKeyPair::from_secret([5; 32]);
        let sealed = hex(FROZEN);
        assert_eq!(&open(&keys, &context(), &sealed).unwrap()[..], b"half of a prompt");
    }

    const FROZEN: &str = concat!(
        "f5b2d6e60f9477e310c2982daaa6c9136c108a1777c5947e448fa37d68174557",
        "046d2a564239aedafc85f70ded2a1310ab608f44b8d91c5cd6617b03544bbaa9",
    );

    fn hex(text: &str) -> Vec<u8> {
        let digit = |c: u8| (c as char).to_digit(16).unwrap() as u8;
        text.as_bytes().chunks(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect()
    }

    #[test]
    fn secrets_do_not_print() {
        assert_eq!(format!("{:?}", SealKeyPair::from_secret([5; 32])), "SealKeyPair(..)");
    }
}
