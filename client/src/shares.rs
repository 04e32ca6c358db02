//! Splitting an input into the evaluators' halves, and adding up what comes back.
//!
//! E1's half is the expansion of a fresh seed, E2's is the input minus it: each alone is uniform, whatever the text. Seed
//! and randomness are new for every attempt, so no half is ever sent twice.

use tacet_protocol::model::BertModel;
use tacet_protocol::prg::{Prg, SessionKey};
use tacet_protocol::program::Program;
use tacet_protocol::ring::{mask, pack, unpack};
use zeroize::{Zeroize, Zeroizing};

use crate::{ClientError, random};

/// What is sealed to the evaluators; the dealer receives nothing.
pub(crate) struct Halves {
    /// To E1: 32 bytes.
    pub seed: Zeroizing<[u8; 32]>,
    /// To E2: packed words.
    pub words: Zeroizing<Vec<u8>>,
}

/// Embeds the tokens in the clear, here, and splits the result.
pub(crate) fn split(model: &BertModel, p: &Program, ids: &[u32]) -> Result<Halves, ClientError> {
    let bits = p.input_bits();
    let embedded = Zeroizing::new(model.embed_tokens(ids)?);
    let mut input = Zeroizing::new(p.encode_input(&embedded)?);
    let seed = Zeroizing::new(random::<32>()?);
    let half = expand(p, &seed)?;
    input.iter_mut().zip(half.iter()).for_each(|(x, h)| *x = x.wrapping_sub(*h) & mask(bits));
    Ok(Halves { words: Zeroizing::new(pack(&input, bits)), seed })
}

/// The words that E1 expands its seed to.
fn expand(p: &Program, seed: &[u8; 32]) -> Result<Zeroizing<Vec<u64>>, ClientError> {
    let mut half = Zeroizing::new(vec![0; p.input_len()]);
    Prg::new(&SessionKey::from_seed(*seed)).fill(0, 0, p.input_bits(), &mut half)?;
    Ok(half)
}

/// Adds the evaluators' packed shares of the result; a unit vector.
pub(crate) fn join(p: &Program, shares: &[Zeroizing<Vec<u8>>]) -> Result<Vec<f64>, ClientError> {
    let mut sum = Zeroizing::new(vec![0u64; p.output_len()]);
    for s in shares {
        let words = Zeroizing::new(unpack(s, p.output_len(), p.output_bits())?);
        sum.iter_mut().zip(words.iter()).for_each(|(s, w)| *s = s.wrapping_add(*w));
    }
    let mut vector = p.decode_output(&sum);
    let norm = vector.iter().map(|v| v * v).sum::<f64>().sqrt().max(1e-12);
    vector.iter_mut().for_each(|v| *v /= norm);
    Ok(vector)
}

/// The first values of one input beside what the evaluators hold of them once they have opened their halves; for
/// demonstrations, since it holds a secret and both of its shares.
pub struct Glimpse {
    /// True values of the embedded text, which only the client has.
    pub values: Vec<f64>,
    /// E1's words for them.
    pub e1: Vec<u64>,
    /// E2's words for them.
    pub e2: Vec<u64>,
    /// Bits of a word.
    pub bits: u32,
}

impl Drop for Glimpse {
    fn drop(&mut self) {
        self.values.zeroize();
        self.e1.zeroize();
        self.e2.zeroize();
    }
}

/// Opens the halves as the evaluators do, for their first `n` words.
pub(crate) fn glimpse(
    model: &BertModel,
    p: &Program,
    ids: &[u32],
    halves: &Halves,
    n: usize,
) -> Result<Glimpse, ClientError> {
    let embedded = Zeroizing::new(model.embed_tokens(ids)?);
    let e1 = expand(p, &halves.seed)?;
    let e2 = Zeroizing::new(unpack(&halves.words, p.input_len(), p.input_bits())?);
    let n = n.min(e1.len());
    Ok(Glimpse { values: embedded[..n].to_vec(), e1: e1[..n].to_vec(), e2: e2[..n].to_vec(), bits: p.input_bits() })
}
