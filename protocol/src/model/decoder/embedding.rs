//! What a client keeps of a decoder: the public tables that it embeds its tokens with.

use super::{Config, NormKind, refuse};
use crate::Error;

/// The tables of a checkpoint, with its shape.
pub struct Embedding {
    /// The shape and the constants.
    pub config: Config,
    pub(crate) tokens: Vec<f32>,
    pub(crate) positions: Option<Vec<f32>>,
    pub(crate) digest: [u8; 32],
}

impl std::fmt::Debug for Embedding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Embedding").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Embedding {
    /// What a client shares: each token's row of the table, plus the row of its position where positions are learned, less
    /// the mean where norms take it out. The first token is at position `first`. `tokens x hidden`.
    ///
    /// # Errors
    /// No tokens, one outside the vocabulary, or more than the model has positions for.
    pub fn embed_tokens(&self, tokens: &[u32], first: usize) -> Result<Vec<f64>, Error> {
        embed(&self.config, &self.tokens, self.positions.as_deref(), tokens, first)
    }

    /// See [`super::DecoderModel::digest`].
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }
}

pub(super) fn embed(
    c: &Config,
    table: &[f32],
    positions: Option<&[f32]>,
    tokens: &[u32],
    first: usize,
) -> Result<Vec<f64>, Error> {
    let (h, longest) = (c.hidden, c.max_positions);
    if tokens.is_empty() {
        return refuse("no tokens to embed".into());
    }
    if tokens.len() > longest.saturating_sub(first) {
        return refuse(format!("{} tokens after {first}, but the model has {longest} positions", tokens.len()));
    }
    let mut x = Vec::with_capacity(tokens.len() * h);
    for (at, &token) in tokens.iter().enumerate() {
        // The id itself is the client's secret and stays out of the text.
        let Some(row) = usize::try_from(token).ok().and_then(|id| table.chunks_exact(h).nth(id)) else {
            return refuse(format!("token {at} is outside the vocabulary"));
        };
        x.extend(row.iter().map(|v| f64::from(*v)));
    }
    if let Some(positions) = positions {
        x.iter_mut().zip(&positions[first * h..]).for_each(|(v, p)| *v += f64::from(*p));
    }
    if c.norm == NormKind::Layer {
        x.chunks_exact_mut(h).for_each(centre);
    }
    Ok(x)
}

/// Takes the mean out: every reader of the residual is a norm that does so, and what is written to it has none.
pub(crate) fn centre(row: &mut [f64]) {
    let mean = row.iter().sum::<f64>() / row.len() as f64;
    row.iter_mut().for_each(|v| *v -= mean);
}
