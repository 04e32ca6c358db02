//! Splitting an input into the evaluators' halves, and adding up what comes back.
//!
//! Seed and randomness are new for every attempt, so no half is ever sent twice.

use tacet_protocol::Role;
use tacet_protocol::model::BertModel;
use tacet_protocol::program::Program;
use tacet_protocol::query::Halves;
use tacet_protocol::ring::unpack;
use zeroize::{Zeroize, Zeroizing};

use crate::ClientError;

/// Embeds the tokens in the clear, here, and splits the result.
pub(crate) fn split(model: &BertModel, p: &Program, ids: &[u32]) -> Result<Halves, ClientError> {
    let embedded = Zeroizing::new(model.embed_tokens(ids)?);
    Ok(p.split(&p.encode_input(&embedded)?)?)
}

/// Adds the evaluators' packed shares of the result for a text of `tokens` tokens; a unit vector.
pub(crate) fn join(p: &Program, shares: &[Zeroizing<Vec<u8>>], tokens: usize) -> Result<Vec<f64>, ClientError> {
    let unpacked = |s: &Zeroizing<Vec<u8>>| Ok(Zeroizing::new(unpack(s, p.output_len(), p.output_bits())?));
    let words = shares.iter().map(unpacked).collect::<Result<Vec<_>, ClientError>>()?;
    let [a, b] = &words[..] else {
        return Err(ClientError::Config("parties.toml needs two evaluators".into()));
    };
    let mut vector = p.decode_output(a, b, tokens)?;
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
    let words = |role, half: &[u8]| -> Result<Zeroizing<Vec<u64>>, ClientError> {
        let all = Zeroizing::new(p.expand(role, half)?);
        Ok(Zeroizing::new(all.first().map_or(Vec::new(), |x| x[..n.min(x.len())].to_vec())))
    };
    let (e1, e2) = (words(Role::E1, halves.seed.as_slice())?, words(Role::E2, &halves.packed)?);
    let bits = p.inputs().next().map_or(0, |v| p.values[v].bits);
    let n = e1.len().min(embedded.len());
    Ok(Glimpse { values: embedded[..n].to_vec(), e1: e1[..n].to_vec(), e2: e2[..n].to_vec(), bits })
}
