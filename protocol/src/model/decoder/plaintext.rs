//! The public embedding and the whole decoder in float64, with or without a cache of keys and values.
//!
//! Sums run in a fixed order and transcendental functions come from `libm`, so every machine gives the same bits, and a
//! token's logits are the same bits whether its predecessors came with it or before it.

use super::embedding::embed;
use super::{Activation, DecoderLayer, DecoderModel, Mlp, NormKind};
use crate::Error;
use crate::model::plaintext::{add, dense};
use crate::model::{Dense, Norm};

/// A sequence that is being extended: rotated keys and values of every layer so far.
pub struct Cache<'m> {
    model: &'m DecoderModel,
    /// For each layer, `positions x kv_heads x head_dim`.
    keys: Vec<Vec<f64>>,
    values: Vec<Vec<f64>>,
    positions: usize,
}

impl DecoderModel {
    /// See [`super::Embedding::embed_tokens`].
    pub fn embed_tokens(&self, tokens: &[u32], first: usize) -> Result<Vec<f64>, Error> {
        embed(&self.config, self.embedding(), self.positions.as_deref(), tokens, first)
    }

    /// The logits at every position, `tokens x vocab`.
    pub fn logits(&self, tokens: &[u32]) -> Result<Vec<f64>, Error> {
        self.cache().extend(tokens)
    }

    /// An empty sequence.
    pub fn cache(&self) -> Cache<'_> {
        let empty = vec![Vec::new(); self.config.layers];
        Cache { model: self, keys: empty.clone(), values: empty, positions: 0 }
    }

    /// Every row of `x`, in place; `x` may hold rows of any width, which is the norm's.
    fn normalise(&self, x: &mut [f64], norm: &Norm, kind: NormKind) {
        let width = norm.weight.len();
        for row in x.chunks_exact_mut(width) {
            let mean = match kind {
                NormKind::Rms => 0.0,
                NormKind::Layer => row.iter().sum::<f64>() / width as f64,
            };
            let square = row.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / width as f64;
            let inverse = 1.0 / libm::sqrt(square + self.config.eps);
            for ((v, w), b) in row.iter_mut().zip(&norm.weight).zip(&norm.bias) {
                *v = (*v - mean) * inverse * f64::from(*w) + f64::from(*b);
            }
        }
    }

    fn normalised(&self, x: &[f64], norm: &Norm) -> Vec<f64> {
        let mut y = x.to_vec();
        self.normalise(&mut y, norm, self.config.norm);
        y
    }

    /// Queries or keys of rows that begin at position `first`: normalised and rotated head by head.
    fn heads(&self, x: &[f64], layer: &Dense, norm: Option<&Norm>, first: usize) -> Vec<f64> {
        let mut y = dense(x, layer);
        if let Some(norm) = norm {
            self.normalise(&mut y, norm, NormKind::Rms);
        }
        if let Some(rope) = &self.config.rope {
            for (row, position) in y.chunks_exact_mut(layer.out).zip(first..) {
                row.chunks_exact_mut(self.config.head_dim).for_each(|head| rope.rotate(head, position));
            }
        }
        y
    }

    fn mlp(&self, x: &[f64], mlp: &Mlp) -> Vec<f64> {
        let activated = |layer: &Dense| {
            let mut y = dense(x, layer);
            let f = match self.config.activation {
                Activation::Silu => silu,
                Activation::GeluNew => gelu_new,
            };
            y.iter_mut().for_each(|v| *v = f(*v));
            y
        };
        match mlp {
            Mlp::Plain { up, down } => dense(&activated(up), down),
            Mlp::Gated { gate, up, down } => {
                let mut inner = activated(gate);
                inner.iter_mut().zip(dense(x, up)).for_each(|(g, u)| *g *= u);
                dense(&inner, down)
            }
        }
    }
}

impl Cache<'_> {
    /// Tokens so far.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Appends tokens; the logits after each of them, `tokens x vocab`. An error leaves the sequence as it was.
    pub fn extend(&mut self, tokens: &[u32]) -> Result<Vec<f64>, Error> {
        let model = self.model;
        let mut x = model.embed_tokens(tokens, self.positions)?;
        for (at, layer) in model.layers.iter().enumerate() {
            let mixed = self.attention(&model.normalised(&x, &layer.attention_norm), at, layer);
            add(&mut x, &dense(&mixed, &layer.output));
            let inner = model.mlp(&model.normalised(&x, &layer.mlp_norm), &layer.mlp);
            add(&mut x, &inner);
        }
        self.positions += tokens.len();
        Ok(dense(&model.normalised(&x, &model.final_norm), &model.head))
    }

    /// Each row attends to all before it and to itself: `rows x hidden` to `rows x heads x head_dim`.
    fn attention(&mut self, x: &[f64], at: usize, layer: &DecoderLayer) -> Vec<f64> {
        let (model, c) = (self.model, &self.model.config);
        let norms = layer.query_key_norm.as_ref();
        let queries = model.heads(x, &layer.query, norms.map(|n| &n.0), self.positions);
        self.keys[at].extend(model.heads(x, &layer.key, norms.map(|n| &n.1), self.positions));
        self.values[at].extend(dense(x, &layer.value));
        let (keys, values) = (&self.keys[at], &self.values[at]);

        let (scale, width, group) = (c.score_scale(), c.head_dim, c.heads / c.kv_heads);
        let mut out = vec![0.0; queries.len()];
        for (i, (query, mixed)) in queries.chunks_exact(width).zip(out.chunks_exact_mut(width)).enumerate() {
            let (row, head) = (i / c.heads, i % c.heads / group);
            let seen = self.positions + row + 1;
            let of_head = |s: usize| (s * c.kv_heads + head) * width..(s * c.kv_heads + head + 1) * width;
            let mut weights: Vec<f64> = (0..seen)
                .map(|s| scale * query.iter().zip(&keys[of_head(s)]).map(|(a, b)| a * b).sum::<f64>())
                .collect();
            let top = weights.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            weights.iter_mut().for_each(|w| *w = libm::exp(*w - top));
            let total: f64 = weights.iter().sum();
            for (s, w) in weights.iter().enumerate() {
                let p = w / total;
                mixed.iter_mut().zip(&values[of_head(s)]).for_each(|(m, v)| *m += p * v);
            }
        }
        out
    }
}

fn silu(x: f64) -> f64 {
    x / (1.0 + libm::exp(-x))
}

fn gelu_new(x: f64) -> f64 {
    let inner = libm::sqrt(2.0 / std::f64::consts::PI) * (x + 0.044715 * x * x * x);
    0.5 * x * (1.0 + libm::tanh(inner))
}
