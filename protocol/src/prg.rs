//! Where randomness comes from: key agreement, session keys, and the mask generator.
//!
//! Two ends that hold the same [`SessionKey`] draw the same words for the same `(step, slot)`. A mask that served two
//! openings would reveal their difference, so a [`Prg`] never goes back. Where steps are computed side by side, each takes a
//! generator of its own from it, in the steps' order: a [`StepPrg`] knows no other step, and goes through its slots in order.

use std::fmt;

use crate::wipe::{Wiped, wipe};
use aes::Aes128;
use ctr::Ctr64BE;
use ctr::cipher::{KeyIvInit, StreamCipher, StreamCipherSeek};
use hkdf::Hkdf;
use sha2::Sha256;
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use crate::Error;
use crate::ring::mask;
use crate::vector::{self, Kernel};

/// Keystream bytes made at a time: small enough to stay in the first-level cache while they are widened.
const CHUNK: usize = 4096;

/// A secret that two parties share for one session.
#[derive(Zeroize, ZeroizeOnDrop)]
pub struct SessionKey([u8; 32]);

impl SessionKey {
    /// Derives the key of one session between two parties. Fresh nonces of both ends go in, so that a process that
    /// restarts cannot be made to repeat a mask.
    pub fn derive(
        shared: &[u8; 32],
        label: &str,
        session: &[u8; 16],
        nonce_a: &[u8; 16],
        nonce_b: &[u8; 16],
    ) -> SessionKey {
        let salt = [&nonce_a[..], &nonce_b[..]].concat();
        let label_len = (label.len() as u64).to_le_bytes();
        let mut key = SessionKey([0; 32]);
        expand(Some(&salt), shared, &[b"tacet session v1", session, &label_len, label.as_bytes()], &mut key.0);
        key
    }

    /// The key that a seed stands for, when a share is sent as the seed it expands from.
    pub fn from_seed(mut seed: [u8; 32]) -> SessionKey {
        let key = SessionKey(seed);
        seed.zeroize();
        key
    }
}

impl fmt::Debug for SessionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionKey(..)")
    }
}

/// HKDF-SHA256 to at most 32 bytes.
fn expand(salt: Option<&[u8]>, secret: &[u8], info: &[&[u8]], out: &mut [u8]) {
    Hkdf::<Sha256>::new(salt, secret).expand_multi_info(info, out).expect("32 bytes are within HKDF's limit");
}

/// AES-128-CTR over the index `(step, slot)`; both parties to a [`SessionKey`] get the same words.
pub struct Prg {
    key: Zeroizing<[u8; 16]>,
    last: Option<(u32, u32)>,
}

impl Prg {
    /// A generator at its start. One session key makes one generator at each end.
    pub fn new(key: &SessionKey) -> Prg {
        let mut aes_key = Zeroizing::new([0; 16]);
        expand(None, &key.0, &[b"tacet prg v1"], aes_key.as_mut());
        Prg { key: aes_key, last: None }
    }

    /// The words of one index, uniform mod `2^bits`. Each `(step, slot)` must be greater than the one before.
    pub fn words(&mut self, step: u32, slot: u32, bits: u32) -> Result<Words, Error> {
        if self.last.is_some_and(|last| last >= (step, slot)) {
            return Err(Error::MaskReuse { step, slot });
        }
        self.last = Some((step, slot));
        Ok(Words::new(&self.key, (step, slot), bits))
    }

    /// The generator of all slots of one step, which must be greater than every step before; this one then goes on after it.
    pub fn step(&mut self, step: u32) -> Result<StepPrg, Error> {
        if self.last.is_some_and(|last| last >= (step, 0)) {
            return Err(Error::MaskReuse { step, slot: 0 });
        }
        self.last = Some((step, u32::MAX));
        Ok(StepPrg { key: self.key.clone(), step, last: None })
    }

    /// Fills `out` with the first words of an index; see [`Self::words`].
    pub fn fill(&mut self, step: u32, slot: u32, bits: u32, out: &mut [u64]) -> Result<(), Error> {
        self.words(step, slot, bits)?.next(out);
        Ok(())
    }
}

impl fmt::Debug for Prg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Prg").field("last", &self.last).finish_non_exhaustive()
    }
}

/// A [`Prg`] of the slots of one step, which no other generator of the key has.
pub struct StepPrg {
    key: Zeroizing<[u8; 16]>,
    step: u32,
    last: Option<u32>,
}

impl StepPrg {
    /// The step.
    pub fn step(&self) -> u32 {
        self.step
    }

    /// The words of one slot, uniform mod `2^bits`. Each slot must be greater than the one before.
    pub fn words(&mut self, slot: u32, bits: u32) -> Result<Words, Error> {
        if self.last.is_some_and(|last| last >= slot) {
            return Err(Error::MaskReuse { step: self.step, slot });
        }
        self.last = Some(slot);
        Ok(Words::new(&self.key, (self.step, slot), bits))
    }
}

impl fmt::Debug for StepPrg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StepPrg").field("step", &self.step).field("last", &self.last).finish_non_exhaustive()
    }
}

/// The words of one index of a [`Prg`].
pub struct Words {
    key: Zeroizing<[u8; 16]>,
    index: (u32, u32),
    stream: Ctr64BE<Aes128>,
    bits: u32,
    keystream: Wiped<u8>,
}

impl Words {
    fn new(key: &Zeroizing<[u8; 16]>, index: (u32, u32), bits: u32) -> Words {
        assert!((1..=64).contains(&bits), "a ring has 1 to 64 bits");
        let (step, slot) = index;
        let mut iv = [0; 16];
        iv[..4].copy_from_slice(&step.to_be_bytes());
        iv[4..8].copy_from_slice(&slot.to_be_bytes());
        let stream = Ctr64BE::<Aes128>::new((&**key).into(), &iv.into());
        Words { key: key.clone(), index, stream, bits, keystream: Wiped::new(Vec::new()) }
    }

    /// The same words from word `at` on.
    pub(crate) fn from(&self, at: usize) -> Words {
        let mut words = Words::new(&self.key, self.index, self.bits);
        words.seek(at);
        words
    }

    /// The next words, in order.
    pub fn next(&mut self, out: &mut [u64]) {
        match self.bits {
            1..=8 => self.widen::<1>(out),
            9..=16 => self.widen::<2>(out),
            17..=32 => self.widen::<4>(out),
            _ => self.widen::<8>(out),
        }
    }

    /// Goes to word `at`.
    pub fn seek(&mut self, at: usize) {
        self.stream.seek(at as u64 * Words::width(self.bits) as u64);
    }

    /// Bytes of the keystream that a word mod `2^bits` is read from: little-endian, less the bits above.
    pub fn width(bits: u32) -> usize {
        bits.div_ceil(8).next_power_of_two() as usize
    }

    /// The keystream that the next words are read from, [`Self::width`] bytes for each.
    pub fn bytes(&mut self, out: &mut [u8]) {
        self.stream.write_keystream(out);
    }

    fn widen<const B: usize>(&mut self, out: &mut [u64]) {
        let longest = (out.len() * B).min(CHUNK);
        if self.keystream.len() < longest {
            wipe(&mut self.keystream);
            self.keystream.resize(longest, 0);
        }
        for words in out.chunks_mut(CHUNK / B) {
            let bytes = &mut self.keystream[..words.len() * B];
            self.stream.write_keystream(bytes);
            vector::run(Widen::<B> { bytes, bits: self.bits, words });
        }
    }
}

struct Widen<'a, const B: usize> {
    bytes: &'a [u8],
    bits: u32,
    words: &'a mut [u64],
}

impl<const B: usize> Kernel for Widen<'_, B> {
    #[inline(always)]
    fn run(self) {
        let keep = mask(self.bits);
        for (word, from) in self.words.iter_mut().zip(self.bytes.as_chunks::<B>().0) {
            let mut le = [0; 8];
            le[..B].copy_from_slice(from);
            *word = u64::from_le_bytes(le) & keep;
        }
    }
}

/// An X25519 secret for one key agreement.
pub struct Ephemeral(StaticSecret);

impl Ephemeral {
    /// A fresh secret, and the public key to send to the peer.
    pub fn new() -> (Ephemeral, [u8; 32]) {
        let mut bytes = Zeroizing::new([0; 32]);
        // Without randomness nothing here is safe, and there is no caller that could go on.
        getrandom::fill(bytes.as_mut()).expect("the operating system gives randomness");
        let secret = StaticSecret::from(*bytes);
        let public = PublicKey::from(&secret).to_bytes();
        (Ephemeral(secret), public)
    }

    /// The secret shared with the peer. A peer key of small order is refused: it would make the secret known to all.
    pub fn agree(self, peer: [u8; 32]) -> Result<Zeroizing<[u8; 32]>, Error> {
        let shared = self.0.diffie_hellman(&PublicKey::from(peer));
        if !shared.was_contributory() {
            let reason = "a key of small order".into();
            return Err(Error::Malformed { what: "peer public key", reason });
        }
        Ok(Zeroizing::new(shared.to_bytes()))
    }
}

impl fmt::Debug for Ephemeral {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Ephemeral(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn prg() -> Prg {
        Prg::new(&SessionKey::from_seed([3; 32]))
    }

    fn words(step: u32, slot: u32, bits: u32, n: usize) -> Vec<u64> {
        let mut out = vec![0; n];
        prg().fill(step, slot, bits, &mut out).unwrap();
        out
    }

    #[test]
    fn words_are_frozen() {
        // From HKDF and AES-CTR of another implementation.
        assert_eq!(words(0, 0, 32, 2), [0x14e4_01a2, 0x26d3_f459]);
        assert_eq!(words(5, 1, 64, 2), [0x34c2_89a5_9fdd_f861, 0x2cde_fa99_1724_1b68]);
        assert_eq!(words(5, 1, 13, 3), [0x1861, 0x1fdd, 0x09a5]);
        assert_eq!(words(5, 1, 1, 8), [1, 0, 1, 1, 1, 1, 0, 0]);
        assert_eq!(words(5, 1, 32, 5000)[4999], 0xd919_e1bd, "past the first chunk");
    }

    #[test]
    fn session_keys_are_frozen() {
        let key = SessionKey::derive(&[1; 32], "e1-d", &[2; 16], &[3; 16], &[4; 16]);
        assert_eq!(key.0[..8], [0xde, 0xa3, 0x05, 0x43, 0xfe, 0x27, 0x01, 0x5b]);
    }

    #[test]
    fn every_part_of_a_session_key_matters() {
        let base = SessionKey::derive(&[1; 32], "ab", &[2; 16], &[3; 16], &[4; 16]);
        let others = [
            SessionKey::derive(&[9; 32], "ab", &[2; 16], &[3; 16], &[4; 16]),
            SessionKey::derive(&[1; 32], "a", &[2; 16], &[3; 16], &[4; 16]),
            SessionKey::derive(&[1; 32], "ab", &[9; 16], &[3; 16], &[4; 16]),
            SessionKey::derive(&[1; 32], "ab", &[2; 16], &[9; 16], &[4; 16]),
            SessionKey::derive(&[1; 32], "ab", &[2; 16], &[3; 16], &[9; 16]),
            SessionKey::derive(&[1; 32], "ab", &[2; 16], &[4; 16], &[3; 16]),
        ];
        assert!(others.iter().all(|other| other.0 != base.0));
    }

    #[test]
    fn an_index_is_used_once_and_in_order() {
        let mut prg = prg();
        let mut out = [0; 4];
        for (step, slot) in [(0, 0), (0, 1), (2, 0), (2, 7)] {
            prg.fill(step, slot, 32, &mut out).unwrap();
        }
        for (step, slot) in [(2, 7), (2, 6), (2, 0), (1, 9), (0, 0)] {
            let again = prg.fill(step, slot, 8, &mut out);
            assert!(matches!(again, Err(Error::MaskReuse { step: s, slot: t }) if (s, t) == (step, slot)));
        }
        prg.fill(u32::MAX, u32::MAX, 32, &mut out).unwrap();
        assert!(prg.fill(u32::MAX, u32::MAX, 32, &mut out).is_err());
        let mut fresh = Prg::new(&SessionKey::from_seed([3; 32]));
        fresh.fill(0, 0, 32, &mut []).unwrap();
        assert!(fresh.fill(0, 0, 32, &mut out).is_err(), "an empty fill uses its index too");
    }

    #[test]
    fn a_step_is_taken_once_and_in_order() {
        let mut prg = prg();
        let mut out = [0; 4];
        prg.fill(1, 4, 32, &mut out).unwrap();
        assert!(prg.step(1).is_err(), "a slot of it was drawn");
        let (mut two, mut three) = (prg.step(2).unwrap(), prg.step(3).unwrap());
        assert!(prg.step(2).is_err() && prg.step(3).is_err() && prg.fill(3, u32::MAX, 32, &mut out).is_err());
        // Whichever is drawn from first.
        for (prg, step) in [(&mut three, 3), (&mut two, 2)] {
            for slot in [0, 2, u32::MAX] {
                prg.words(slot, 32).unwrap().next(&mut out);
                assert_eq!(words(step, slot, 32, 4), out);
                let again = prg.words(slot, 32).map(drop);
                assert!(matches!(again, Err(Error::MaskReuse { step: s, slot: t }) if (s, t) == (step, slot)));
            }
            assert!(prg.words(1, 32).is_err());
        }
        prg.fill(4, 0, 32, &mut out).unwrap();
    }

    #[test]
    fn indices_and_keys_give_unrelated_words() {
        let mut seen = std::collections::HashSet::new();
        for (step, slot) in [(0, 0), (0, 1), (1, 0), (256, 0), (0, 256)] {
            assert!(words(step, slot, 64, 64).into_iter().all(|word| seen.insert(word)));
        }
        let mut other = [0; 64];
        Prg::new(&SessionKey::from_seed([4; 32])).fill(0, 0, 64, &mut other).unwrap();
        assert!(other.into_iter().all(|word| seen.insert(word)));
    }

    #[test]
    fn every_bit_of_the_ring_is_balanced() {
        for bits in [1, 7, 13, 32, 33, 64] {
            let out = words(1, bits, bits, 20_000);
            assert!(out.iter().all(|&word| word <= mask(bits)));
            for bit in 0..bits {
                let ones = out.iter().filter(|&&word| word >> bit & 1 == 1).count();
                assert!((9_500..10_500).contains(&ones), "bit {bit} of {bits}: {ones}");
            }
        }
    }

    #[test]
    fn key_agreement() {
        let (a, a_public) = Ephemeral::new();
        let (b, b_public) = Ephemeral::new();
        assert_ne!(a_public, b_public);
        assert_eq!(*a.agree(b_public).unwrap(), *b.agree(a_public).unwrap());
        for degenerate in [[0; 32], std::array::from_fn(|i| u8::from(i == 0))] {
            let (fresh, _) = Ephemeral::new();
            assert!(matches!(fresh.agree(degenerate), Err(Error::Malformed { .. })));
        }
    }

    #[test]
    fn secrets_do_not_print() {
        let key = SessionKey::from_seed([0xab; 32]);
        let all =
            format!("{key:?} {:?} {:?} {:?}", Prg::new(&key), Prg::new(&key).step(7).unwrap(), Ephemeral::new().0);
        assert_eq!(all, "SessionKey(..) Prg { last: None, .. } StepPrg { step: 7, last: None, .. } Ephemeral(..)");
    }

    proptest! {
        #[test]
        fn words_come_in_order_from_anywhere(bits in 1u32..=64, parts in prop::collection::vec(0usize..3000, 1..6), at in 0usize..3000) {
            let mut stream = prg().words(1, 2, bits).unwrap();
            let mut got = vec![0; parts.iter().sum()];
            let mut rest = got.as_mut_slice();
            for n in parts {
                let (head, tail) = rest.split_at_mut(n);
                stream.next(head);
                rest = tail;
            }
            prop_assert_eq!(&words(1, 2, bits, got.len()), &got);
            let mut there = [0; 5];
            stream.seek(at);
            stream.next(&mut there);
            prop_assert_eq!(&words(1, 2, bits, at + 5)[at..], &there);
        }

        #[test]
        fn a_longer_draw_starts_with_a_shorter_one(bits in 1u32..=64, long in 0usize..9000, cut in 0usize..9000) {
            let all = words(1, 2, bits, long);
            let short = long.min(cut);
            prop_assert_eq!(&words(1, 2, bits, short), &all[..short]);
        }
    }
}
