//! The public embedding and the whole model in float64.
//!
//! Sums run in a fixed order and transcendental functions come from `libm`, so every machine gives the same bits.

use super::{BertModel, Dense, Layer, Norm, Pooling};
use crate::Error;

/// Outputs and rows that one tile of [`dense`] accumulates in registers.
const TILE: usize = 4;

impl BertModel {
    /// What a client shares: the normalised sum of word, position and first segment row, before the norm's gain and shift,
    /// `tokens x hidden_size`.
    pub fn embed_tokens(&self, tokens: &[u32]) -> Result<Vec<f64>, Error> {
        let (h, longest) = (self.config.hidden_size, self.config.max_position_embeddings);
        if tokens.is_empty() {
            return Err(Error::Model("no tokens to embed".into()));
        }
        if tokens.len() > longest {
            let n = tokens.len();
            return Err(Error::Model(format!("{n} tokens, but the model has {longest} positions")));
        }
        let e = &self.embeddings;
        let mut x = Vec::with_capacity(tokens.len() * h);
        for (at, &token) in tokens.iter().enumerate() {
            // The id itself is the client's secret and stays out of the text.
            let Some(word) = usize::try_from(token).ok().filter(|id| *id < self.config.vocab_size) else {
                return Err(Error::Model(format!("token {at} is outside the vocabulary")));
            };
            let word = &e.word[word * h..][..h];
            let position = &e.position[at * h..][..h];
            x.extend(
                word.iter()
                    .zip(position)
                    .zip(&e.token_type[..h])
                    .map(|((w, p), t)| f64::from(*w) + f64::from(*p) + f64::from(*t)),
            );
        }
        self.normalise(&mut x);
        Ok(x)
    }

    /// The model's pooled output, not normalised.
    pub fn plaintext(&self, tokens: &[u32]) -> Result<Vec<f64>, Error> {
        let hidden = self.plaintext_hidden(tokens)?;
        let h = self.config.hidden_size;
        Ok(match self.pooling {
            Pooling::Cls => hidden[..h].to_vec(),
            Pooling::Mean => {
                let mut mean = vec![0.0; h];
                for row in hidden.chunks_exact(h) {
                    mean.iter_mut().zip(row).for_each(|(m, v)| *m += v);
                }
                mean.iter_mut().for_each(|m| *m /= tokens.len() as f64);
                mean
            }
        })
    }

    /// The last hidden state, `tokens x hidden_size`.
    pub fn plaintext_hidden(&self, tokens: &[u32]) -> Result<Vec<f64>, Error> {
        let mut x = self.embed_tokens(tokens)?;
        gain(&mut x, &self.embeddings.norm);
        for layer in &self.layers {
            let mixed = dense(&self.attention(&x, layer), &layer.attention_output);
            add(&mut x, &mixed);
            self.normalise(&mut x);
            gain(&mut x, &layer.attention_norm);
            let mut inner = dense(&x, &layer.intermediate);
            inner.iter_mut().for_each(|v| *v = gelu(*v));
            add(&mut x, &dense(&inner, &layer.output));
            self.normalise(&mut x);
            gain(&mut x, &layer.output_norm);
        }
        Ok(x)
    }

    fn attention(&self, x: &[f64], layer: &Layer) -> Vec<f64> {
        let (h, width) = (self.config.hidden_size, self.config.head_size());
        let (q, k, v) = (dense(x, &layer.query), dense(x, &layer.key), dense(x, &layer.value));
        let scale = 1.0 / libm::sqrt(width as f64);
        let n = x.len() / h;
        let mut out = vec![0.0; n * h];
        let mut weights = vec![0.0; n];
        for head in (0..h).step_by(width) {
            let row = |m: &[f64], t: usize| -> std::ops::Range<usize> {
                debug_assert_eq!(m.len(), n * h);
                t * h + head..t * h + head + width
            };
            for t in 0..n {
                let query = &q[row(&q, t)];
                for (s, w) in weights.iter_mut().enumerate() {
                    let key = &k[row(&k, s)];
                    *w = scale * query.iter().zip(key).map(|(a, b)| a * b).sum::<f64>();
                }
                let top = weights.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                weights.iter_mut().for_each(|w| *w = libm::exp(*w - top));
                let total: f64 = weights.iter().sum();
                let range = row(&out, t);
                let mixed = &mut out[range];
                for (s, w) in weights.iter().enumerate() {
                    let p = w / total;
                    mixed.iter_mut().zip(&v[row(&v, s)]).for_each(|(m, value)| *m += p * value);
                }
            }
        }
        out
    }

    /// Layer normalisation of every row, in place, before gain and shift.
    fn normalise(&self, x: &mut [f64]) {
        let h = self.config.hidden_size;
        for row in x.chunks_exact_mut(h) {
            let mean = row.iter().sum::<f64>() / h as f64;
            let variance = row.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / h as f64;
            let inverse = 1.0 / libm::sqrt(variance + self.config.layer_norm_eps);
            row.iter_mut().for_each(|v| *v = (*v - mean) * inverse);
        }
    }
}

fn gain(x: &mut [f64], norm: &Norm) {
    for row in x.chunks_exact_mut(norm.weight.len()) {
        for ((v, w), b) in row.iter_mut().zip(&norm.weight).zip(&norm.bias) {
            *v = *v * f64::from(*w) + f64::from(*b);
        }
    }
}

pub(super) fn add(x: &mut [f64], y: &[f64]) {
    x.iter_mut().zip(y).for_each(|(a, b)| *a += b);
}

fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + libm::erf(x * std::f64::consts::FRAC_1_SQRT_2))
}

/// `rows x inp` to `rows x out`. Both operands are repacked so that a tile's inner loop reads two contiguous streams.
pub(super) fn dense(x: &[f64], layer: &Dense) -> Vec<f64> {
    let (inp, out) = (layer.inp, layer.out);
    let rows = x.len() / inp;
    let panels: Vec<[f64; TILE]> = (0..rows)
        .step_by(TILE)
        .flat_map(|r| {
            (0..inp).map(move |i| std::array::from_fn(|j| if r + j < rows { x[(r + j) * inp + i] } else { 0.0 }))
        })
        .collect();
    let mut y = vec![0.0; rows * out];
    let mut weights = vec![[0.0; TILE]; inp];
    for o in (0..out).step_by(TILE) {
        let wide = TILE.min(out - o);
        for (j, row) in layer.weight[o * inp..(o + wide) * inp].chunks_exact(inp).enumerate() {
            weights.iter_mut().zip(row).for_each(|(w, v)| w[j] = f64::from(*v));
        }
        for (panel, r) in panels.chunks_exact(inp).zip((0..rows).step_by(TILE)) {
            let mut tile = [[0.0; TILE]; TILE];
            for (xs, ws) in panel.iter().zip(&weights) {
                for (acc, w) in tile.iter_mut().zip(ws) {
                    acc.iter_mut().zip(xs).for_each(|(a, v)| *a += w * v);
                }
            }
            for (j, acc) in tile.iter().enumerate().take(wide) {
                let bias = f64::from(layer.bias[o + j]);
                for (i, a) in acc.iter().enumerate().take(rows - r) {
                    y[(r + i) * out + o + j] = a + bias;
                }
            }
        }
    }
    y
}
