//! A client's query: padding, splitting into two halves, and what becomes of the result.
//!
//! A text of `n` tokens runs as a program for the next padded length `T`; parties learn `T` only. Rows `n..T` are copies
//! of the first row, so that each computes what the first does, and a second input has a bit per row, 0 for these, by
//! which the program gives them no weight in attention (see [`crate::gates::pad`]) and leaves them out of the mean. A
//! decoder's padding comes first, since what follows a text has to lie next to its end; only differences of positions
//! matter to it, or the client adds positions itself. Padding of a later turn lies between what was there and what is new:
//! where positions rotate, the keys of what was there move up to the new rows, by a number that only the client knows (see
//! [`crate::gates::turn`]).
//!
//! The first evaluator's half is the seed it expands from; the second's is the input less that expansion. Each alone is
//! uniform, and both have a length that depends on `T` only.

use sha2::{Digest, Sha256};
use zeroize::{Zeroize, Zeroizing};

use crate::prg::{Prg, SessionKey};
use crate::program::{Kind, Outcome, Program};
use crate::ring::{mask, pack, packed_len, signed, unpack};
use crate::{Error, Role};

/// Lengths that texts are padded to: steps of a half to a third, so that a length says little and costs little.
pub const LENGTHS: [usize; 12] = [8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512];

/// The shortest of [`LENGTHS`] that holds `tokens`.
pub fn padded(tokens: usize) -> Option<usize> {
    LENGTHS.into_iter().find(|l| tokens <= *l)
}

/// What the input of a later program of a sequence is sealed for, in place of a digest of its own: the `turn`-th that its
/// client feeds, `rows` positions after `past`. No input serves two programs, whatever was taken back in between.
pub fn step_digest(first: &[u8; 32], turn: u32, past: usize, rows: usize) -> [u8; 32] {
    let mut h = Sha256::new();
    h.update(b"tacet step 2");
    h.update(first);
    [u64::from(turn), past as u64, rows as u64].iter().for_each(|v| h.update(v.to_le_bytes()));
    h.finalize().into()
}

/// What the two evaluators are sent.
pub struct Halves {
    /// Seed of the first evaluator's half.
    pub seed: Zeroizing<[u8; 32]>,
    /// Packed words of the second's.
    pub packed: Zeroizing<Vec<u8>>,
}

impl Program {
    /// Embedded rows (`n x hidden`, row-major, `1 <= n <= tokens`) to the ring words of every input.
    ///
    /// # Errors
    /// More rows than the program holds, none, a part of one, or a value that is not finite.
    pub fn encode_input(&self, rows: &[f64]) -> Result<Vec<Zeroizing<Vec<u64>>>, Error> {
        self.encode_moving(rows, 0)
    }

    /// As [`Self::encode_input`], where the keys of past positions move by `positions` first, so that padding leaves no gap
    /// between past rows and new ones.
    ///
    /// # Errors
    /// Those of [`Self::encode_input`], and a move in a program that makes none.
    pub fn encode_moving(&self, rows: &[f64], positions: i64) -> Result<Vec<Zeroizing<Vec<u64>>>, Error> {
        let turn = self.ops.iter().find_map(|o| if let Kind::Turn(g) = &o.kind { Some(g) } else { None });
        let turn: Zeroizing<Vec<u64>> = match turn {
            Some(g) => Zeroizing::new(g.by(positions).map(|v| v as u64 & mask(g.k)).collect()),
            None if positions != 0 => {
                let reason = "this program does not move past keys: feed more than one row".into();
                return Err(Error::Malformed { what: "input", reason });
            }
            None => Zeroizing::default(),
        };
        let x = &self.values[self.inputs[0]];
        let cols = x.len() / self.tokens;
        let n = rows.len() / cols;
        let least = if self.inputs.len() == 1 { self.tokens } else { 1 };
        let whole = rows.len() == n * cols && rows.iter().all(|v| v.is_finite());
        if n < least || n > self.tokens || !whole {
            let count = rows.len();
            let reason = format!("{count} values, but {least} to {} rows of {cols} finite ones are due", self.tokens);
            return Err(Error::Malformed { what: "input", reason });
        }
        let word = |v: &f64| libm::round(v / x.ulp) as i64 as u64 & mask(x.bits);
        let mut words: Zeroizing<Vec<u64>> = Zeroizing::new(Vec::with_capacity(x.len()));
        words.extend(rows.iter().map(word));
        for _ in n..self.tokens {
            words.extend_from_within(..cols);
        }
        let mut keep: Zeroizing<Vec<u64>> = Zeroizing::new((0..self.tokens).map(|i| u64::from(i < n)).collect());
        if self.result == Outcome::Logits {
            words.rotate_right((self.tokens - n) * cols);
            keep.reverse();
        }
        Ok([words, keep, turn].into_iter().take(self.inputs.len()).collect())
    }

    /// Splits input words into one half for each evaluator.
    ///
    /// # Errors
    /// None for words of [`Self::encode_input`].
    pub fn split(&self, input: &[Zeroizing<Vec<u64>>]) -> Result<Halves, Error> {
        let mut seed = Zeroizing::new([0; 32]);
        getrandom::fill(seed.as_mut()).map_err(|e| Error::Malformed { what: "randomness", reason: e.to_string() })?;
        let first = self.expand(Role::E1, seed.as_slice())?;
        let mut packed = Zeroizing::new(Vec::with_capacity(self.half_len(Role::E2)));
        for ((v, x), mut half) in self.inputs().zip(input).zip(first) {
            half.iter_mut().zip(x.iter()).for_each(|(h, x)| *h = x.wrapping_sub(*h));
            packed.extend_from_slice(&Zeroizing::new(pack(&half, self.values[v].bits)));
            half.zeroize();
        }
        Ok(Halves { seed, packed })
    }

    /// Bytes of an evaluator's half.
    pub fn half_len(&self, role: Role) -> usize {
        match role {
            Role::E1 => 32,
            Role::E2 => self.inputs().map(|v| packed_len(self.values[v].len(), self.values[v].bits)).sum(),
            Role::Dealer => 0,
        }
    }

    /// An evaluator's half to words, one vector an input.
    ///
    /// # Errors
    /// Bytes of another length than [`Self::half_len`].
    pub fn expand(&self, role: Role, half: &[u8]) -> Result<Vec<Vec<u64>>, Error> {
        if role == Role::Dealer || half.len() != self.half_len(role) {
            let reason = format!("{} bytes, {} are due", half.len(), self.half_len(role));
            return Err(Error::Malformed { what: "input share", reason });
        }
        if role == Role::E2 {
            let mut rest = half;
            return self
                .inputs()
                .map(|v| {
                    let v = &self.values[v];
                    let (head, tail) = rest.split_at(packed_len(v.len(), v.bits));
                    rest = tail;
                    unpack(head, v.len(), v.bits)
                })
                .collect();
        }
        let mut seed = [0; 32];
        seed.copy_from_slice(half);
        let mut prg = Prg::new(&SessionKey::from_seed(seed));
        seed.zeroize();
        self.inputs()
            .enumerate()
            .map(|(slot, v)| {
                let mut words = vec![0; self.values[v].len()];
                prg.fill(0, slot as u32, self.values[v].bits, &mut words)?;
                Ok(words)
            })
            .collect()
    }

    /// Both result shares to reals: the pooled embedding of a text of `tokens` tokens, not normalised, or logits.
    ///
    /// # Errors
    /// Shares of another length, or more tokens than the program holds.
    pub fn decode_output(&self, a: &[u64], b: &[u64], tokens: usize) -> Result<Vec<f64>, Error> {
        let v = &self.values[self.output];
        if a.len() != v.len() || b.len() != v.len() || tokens == 0 || tokens > self.tokens {
            let reason = format!("{} and {} words, {} are due", a.len(), b.len(), v.len());
            return Err(Error::Malformed { what: "result", reason });
        }
        let divisor = if self.result == Outcome::Sum { tokens as f64 } else { 1.0 };
        let unit = v.ulp / divisor;
        let real = |(a, b): (&u64, &u64)| signed(a.wrapping_add(*b) & mask(v.bits), v.bits) as f64 * unit;
        Ok(a.iter().zip(b).map(real).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_ascend_and_the_shortest_is_taken() {
        assert!(LENGTHS.is_sorted());
        assert_eq!([1, 8, 9, 100, 512, 513].map(padded), [Some(8), Some(8), Some(16), Some(128), Some(512), None]);
    }
}
