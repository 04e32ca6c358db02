//! How long the same matrices take in the clear: forward passes in f32, of which only the time is of interest.

use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

use ndarray::{Array2, Axis, Slice};
use tacet_protocol::model::decoder::{Checkpoint, Config};
use tacet_protocol::model::{BertConfig, is_encoder};

/// Bytes of weights past which layers share them: more than any cache holds.
const DISTINCT: usize = 1 << 30;

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

impl Sizes {
    fn of(dir: &Path) -> Option<Sizes> {
        if !is_encoder(dir) {
            return Some(Sizes::decoder(Checkpoint::open(dir).ok()?.config()));
        }
        let c: BertConfig = serde_json::from_slice(&std::fs::read(dir.join("config.json")).ok()?).ok()?;
        Some(Sizes {
            layers: c.num_hidden_layers,
            hidden: c.hidden_size,
            heads: c.num_attention_heads,
            query: c.hidden_size,
            key: c.hidden_size,
            mlp: c.intermediate_size,
            gated: false,
            vocab: 0,
        })
    }

    fn decoder(c: &Config) -> Sizes {
        Sizes {
            layers: c.layers,
            hidden: c.hidden,
            heads: c.heads,
            query: c.heads * c.head_dim,
            key: c.kv_heads * c.head_dim,
            mlp: c.intermediate,
            gated: c.family != "gpt2",
            vocab: c.vocab,
        }
    }
}

/// Weights of a layer, a row for each output.
struct Layer {
    qkv: Array2<f32>,
    out: Array2<f32>,
    up: Array2<f32>,
    gate: Option<Array2<f32>>,
    down: Array2<f32>,
}

impl Layer {
    fn new(s: &Sizes) -> Layer {
        Layer {
            qkv: made(s.query + 2 * s.key, s.hidden),
            out: made(s.hidden, s.query),
            up: made(s.mlp, s.hidden),
            gate: s.gated.then(|| made(s.mlp, s.hidden)),
            down: made(s.hidden, s.mlp),
        }
    }

    fn bytes(&self) -> usize {
        let all = [&self.qkv, &self.out, &self.up, &self.down].into_iter().chain(&self.gate);
        all.map(|w| size_of::<f32>() * w.len()).sum()
    }
}

/// A model of some checkpoint's sizes with made-up weights.
pub struct Plain {
    sizes: Sizes,
    layers: Vec<Layer>,
    head: Array2<f32>,
}

impl Plain {
    /// `None` for a checkpoint that cannot be read.
    pub fn of(dir: &Path) -> Option<Plain> {
        let sizes = Sizes::of(dir)?;
        let mut layers = vec![Layer::new(&sizes)];
        let distinct = (DISTINCT / layers[0].bytes().max(1)).min(sizes.layers);
        layers.extend((1..distinct).map(|_| Layer::new(&sizes)));
        Some(Plain { layers, head: made(sizes.vocab, sizes.hidden), sizes })
    }

    /// Seconds of one pass over `rows` rows after `past` others, on one thread: the best of three.
    pub fn pass(&self, past: usize, rows: usize) -> f64 {
        let mut kept: Vec<_> = self.layers.iter().map(|_| made(past + rows, 2 * self.sizes.key)).collect();
        let best = (0..3).map(|_| {
            let start = Instant::now();
            self.forward(&mut kept, rows);
            start.elapsed().as_secs_f64()
        });
        best.fold(f64::INFINITY, f64::min)
    }

    /// Rows whose keys and values are the last ones of those kept.
    fn forward(&self, kept: &mut [Array2<f32>], rows: usize) {
        let s = &self.sizes;
        let mut x = made(rows, s.hidden);
        for i in 0..s.layers {
            let (l, kept) = (&self.layers[i % self.layers.len()], &mut kept[i % self.layers.len()]);
            let a = attention(s, kept, &apply(&normalised(&x), &l.qkv));
            x += &apply(&a, &l.out);
            let y = normalised(&x);
            let mut h = apply(&y, &l.up);
            h.mapv_inplace(|v| v / (1.0 + (-1.702 * v).exp()));
            if let Some(gate) = &l.gate {
                h *= &apply(&y, gate);
            }
            x += &apply(&h, &l.down);
        }
        if s.vocab > 0 {
            black_box(apply(&x.slice_axis(Axis(0), Slice::from(rows - 1..rows)).to_owned(), &self.head));
        }
        black_box(x);
    }
}

/// Elements of some size; which ones makes no difference.
fn made(rows: usize, columns: usize) -> Array2<f32> {
    Array2::from_shape_fn((rows, columns), |(i, j)| ((i * 31 + j * 17) % 64) as f32 / 1000.0)
}

/// `x w^T`. One row is a product of a matrix and a vector, which reads the matrix where it lies.
fn apply(x: &Array2<f32>, w: &Array2<f32>) -> Array2<f32> {
    match x.nrows() {
        1 => w.dot(&x.row(0)).insert_axis(Axis(0)),
        _ => x.dot(&w.t()),
    }
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

/// Of new rows over all keys and values that are kept, theirs among them.
fn attention(s: &Sizes, kept: &mut Array2<f32>, qkv: &Array2<f32>) -> Array2<f32> {
    let rows = qkv.nrows();
    let past = kept.nrows() - rows;
    let (dim, group) = (s.query / s.heads, s.query / s.key);
    kept.slice_axis_mut(Axis(0), Slice::from(past..)).assign(&columns(qkv, s.query, 2 * s.key));
    let mut out = Array2::zeros((rows, s.query));
    for h in 0..s.heads {
        let kv = h / group * dim;
        let mut p = columns(qkv, h * dim, dim).dot(&columns(kept, kv, dim).t());
        for mut row in p.axis_iter_mut(Axis(0)) {
            let top = row.fold(f32::MIN, |m, v| m.max(*v));
            row.mapv_inplace(|v| (v - top).exp());
            let sum = row.sum();
            row /= sum;
        }
        out.slice_axis_mut(Axis(1), Slice::from(h * dim..(h + 1) * dim)).assign(&p.dot(&columns(
            kept,
            s.key + kv,
            dim,
        )));
    }
    out
}

fn columns(x: &Array2<f32>, at: usize, n: usize) -> ndarray::ArrayView2<'_, f32> {
    x.slice_axis(Axis(1), Slice::from(at..at + n))
}
