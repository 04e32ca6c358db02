//! How long the same matrices take in the clear: one forward pass in f32, of which only the time is of interest.

use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

use ndarray::{Array2, Axis, Slice};
use serde_json::Value;

/// The sizes of a transformer, whatever its family calls them.
struct Sizes {
    layers: usize,
    hidden: usize,
    heads: usize,
    /// Columns of queries, and of keys or values.
    query: usize,
    key: usize,
    mlp: usize,
    gated: bool,
    /// Outputs of the head; none for an encoder.
    vocab: usize,
}

/// `None` where no `config.json` tells them all: a GGUF file has its own.
fn sizes(dir: &Path) -> Option<Sizes> {
    let v: Value = serde_json::from_str(&std::fs::read_to_string(dir.join("config.json")).ok()?).ok()?;
    let find = |names: &[&str]| names.iter().find_map(|n| v.get(n)?.as_u64()).map(|n| n as usize);
    let (hidden, heads) = (find(&["hidden_size", "n_embd"])?, find(&["num_attention_heads", "n_head"])?);
    let dim = find(&["head_dim"]).unwrap_or(hidden / heads.max(1));
    let family = v.get("model_type").and_then(Value::as_str).unwrap_or_default();
    let decoder = !tacet_protocol::model::is_encoder(dir);
    Some(Sizes {
        layers: find(&["num_hidden_layers", "n_layer"])?,
        hidden,
        heads,
        query: heads * dim,
        key: find(&["num_key_value_heads"]).unwrap_or(heads) * dim,
        mlp: find(&["intermediate_size", "n_inner"]).unwrap_or(4 * hidden),
        gated: decoder && family != "gpt2",
        vocab: if decoder { find(&["vocab_size"])? } else { 0 },
    })
}

/// Seconds of one pass over `rows` rows on one thread: the best of three. All layers use one layer's weights. `None` for a GGUF
/// file, whose sizes are not in a `config.json`.
pub fn forward(dir: &Path, rows: usize) -> Option<f64> {
    let s = sizes(dir)?;
    let weights = |r: usize, c: usize| Array2::from_shape_fn((r, c), |(i, j)| ((i * 31 + j * 17) % 64) as f32 / 1000.0);
    let qkv = weights(s.hidden, s.query + 2 * s.key);
    let (out, up, down) = (weights(s.query, s.hidden), weights(s.hidden, s.mlp), weights(s.mlp, s.hidden));
    let head = weights(s.hidden, s.vocab);
    let pass = || {
        let mut x = weights(rows, s.hidden);
        for _ in 0..s.layers {
            let a = attention(&s, &normalised(&x).dot(&qkv));
            x += &a.dot(&out);
            let y = normalised(&x);
            let mut h = y.dot(&up);
            h.mapv_inplace(|v| v / (1.0 + (-1.702 * v).exp()));
            if s.gated {
                h *= &y.dot(&up);
            }
            x += &h.dot(&down);
        }
        if s.vocab > 0 {
            black_box(x.slice_axis(Axis(0), Slice::from(rows - 1..rows)).dot(&head));
        }
        black_box(x);
    };
    let best = (0..3).map(|_| {
        let start = Instant::now();
        pass();
        start.elapsed().as_secs_f64()
    });
    Some(best.fold(f64::INFINITY, f64::min))
}

fn normalised(x: &Array2<f32>) -> Array2<f32> {
    let d = x.ncols() as f32;
    let mut y = x.clone();
    for mut row in y.axis_iter_mut(Axis(0)) {
        let mean = row.sum() / d;
        row -= mean;
        let deviation = (row.dot(&row) / d + 1e-6).sqrt();
        row /= deviation;
    }
    y
}

fn attention(s: &Sizes, qkv: &Array2<f32>) -> Array2<f32> {
    let rows = qkv.nrows();
    let (dim, group) = (s.query / s.heads, s.query / s.key);
    let mut out = Array2::zeros((rows, s.query));
    for h in 0..s.heads {
        let columns = |at: usize| qkv.slice_axis(Axis(1), Slice::from(at..at + dim));
        let kv = h / group * dim;
        let mut p = columns(h * dim).dot(&columns(s.query + kv).t());
        for mut row in p.axis_iter_mut(Axis(0)) {
            let top = row.fold(f32::MIN, |m, v| m.max(*v));
            row.mapv_inplace(|v| (v - top).exp());
            let sum = row.sum();
            row /= sum;
        }
        out.slice_axis_mut(Axis(1), Slice::from(h * dim..(h + 1) * dim)).assign(&p.dot(&columns(s.query + s.key + kv)));
    }
    out
}
