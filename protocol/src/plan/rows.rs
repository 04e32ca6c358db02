//! Rows of public linear layers as the evaluators apply them, made one at a time: no copy of a layer in f64 is ever held.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::linalg::{Matrix, nearest, norm};
use super::{Layer, SLACK, TRUNCATED, blocks, dot, max, pow2, refuse};
use crate::Error;
use crate::gemm::Packing;
use crate::model::decoder::{Config, NormKind, centre};
use crate::model::{Dense, Norm};
use crate::program::Linear;

/// Largest magnitude of a quantised weight.
pub const WEIGHT: f64 = 4095.0;
/// The same where a model is so large that reading and holding its weights is what it takes: a byte each.
const NARROW: f64 = 127.0;
/// How much longer a row may be rounded: half of the bounds' slack.
const GROWN: f64 = 1.01;
/// Weights in blocks above which a model is that large; they would take 4 GB.
const LARGE: usize = 1 << 31;
/// Largest ring that the kernels' rescales take.
pub const WIDEST: u32 = 62;

/// Layers side by side on one input.
pub struct Rows<'a> {
    layers: Vec<&'a Dense>,
    /// The norm whose gain and shift the rows take in.
    norm: Option<&'a Norm>,
    /// Whether each row is made to sum to zero, and what every row is made less by.
    centred: bool,
    mean: Option<Vec<f64>>,
    /// Largest magnitude of a quantised weight, and whether rows are rounded to the units of that before anything is
    /// proven of them.
    limit: f64,
    rounded: bool,
    /// Constants of the outputs.
    pub bias: Vec<f64>,
    pub len: usize,
    pub cols: usize,
}

/// What bounds and units are made of, for one row.
#[derive(Clone, Copy)]
pub struct Fact {
    /// Euclidean norm.
    pub norm: f64,
    /// Largest magnitude of a weight.
    pub largest: f64,
    /// Largest unit of quantised weights.
    pub unit: f64,
}

fn wide(v: &[f32]) -> impl Iterator<Item = f64> + '_ {
    v.iter().map(|v| f64::from(*v))
}

impl<'a> Rows<'a> {
    /// Layers that read a row which `n` normalised, before its gain and shift. Such a row sums to zero after a layer norm, so
    /// that what is equal in all of a layer's columns may be left out.
    pub fn reading(c: &Config, layers: &[&'a Dense], n: &'a Norm) -> Rows<'a> {
        let shift: Vec<f64> = wide(&n.bias).collect();
        let constant = |(r, b): (&[f32], &f32)| dot(&super::wide(r), &shift) + f64::from(*b);
        let bias = layers.iter().flat_map(|d| d.weight.chunks_exact(d.inp).zip(&d.bias)).map(constant).collect();
        let (len, cols) = (layers.iter().map(|d| d.out).sum(), layers[0].inp);
        let centred = c.norm == NormKind::Layer;
        let limit = limit(c);
        Rows { layers: layers.to_vec(), norm: Some(n), centred, mean: None, limit, rounded: false, bias, len, cols }
    }

    /// A layer that writes to the residual: every reader of it takes the mean of its row out where norms do, so what is
    /// written is made to have none.
    pub fn writing(c: &Config, layer: &'a Dense) -> Rows<'a> {
        let mut bias: Vec<f64> = wide(&layer.bias).collect();
        let mean = (c.norm == NormKind::Layer).then(|| {
            centre(&mut bias);
            let mut sum = vec![0.0; layer.inp];
            for row in layer.weight.chunks_exact(layer.inp) {
                sum.iter_mut().zip(wide(row)).for_each(|(s, v)| *s += v);
            }
            sum.iter_mut().for_each(|s| *s /= layer.out as f64);
            sum
        });
        let (limit, len, cols) = (limit(c), layer.out, layer.inp);
        Rows { layers: vec![layer], norm: None, centred: false, mean, limit, rounded: false, bias, len, cols }
    }

    /// The same rounded to units of the smallest weights, where the slack of bounds does not cover that: what is proven of them
    /// is then proven of what is applied.
    pub fn rounded(mut self) -> Rows<'a> {
        self.rounded = self.limit == NARROW;
        self
    }

    /// Row `j`.
    pub fn row(&self, mut j: usize) -> Vec<f64> {
        let mut layers = self.layers.iter();
        let layer = loop {
            match layers.next() {
                Some(d) if j >= d.out => j -= d.out,
                Some(d) => break d,
                None => return vec![0.0; self.cols],
            }
        };
        let mut row: Vec<f64> = wide(&layer.weight[j * self.cols..][..self.cols]).collect();
        if let Some(n) = self.norm {
            row.iter_mut().zip(&n.weight).for_each(|(v, g)| *v *= f64::from(*g));
        }
        if self.centred {
            centre(&mut row);
        }
        if let Some(mean) = &self.mean {
            row.iter_mut().zip(mean).for_each(|(v, m)| *v -= m);
        }
        if self.rounded {
            let unit = self.unit(largest(&row));
            row.iter_mut().for_each(|v| *v = nearest(*v / unit) * unit);
        }
        row
    }

    /// Whether rows are whole multiples of their units.
    pub fn is_rounded(&self) -> bool {
        self.rounded
    }

    fn unit(&self, largest: f64) -> f64 {
        largest / self.limit
    }

    /// Of every row.
    pub fn facts(&self) -> Vec<Fact> {
        let fact = |j| {
            let row = self.row(j);
            let largest = largest(&row);
            Fact { norm: norm(&row), largest, unit: self.unit(largest) }
        };
        (0..self.len).map(fact).collect()
    }

    /// Units for rows of these facts, [`aligned`] by `scale` where weights have the bits to spare.
    pub fn units(&self, facts: &[Fact], scale: &[f64]) -> Vec<f64> {
        let finest = finest(facts);
        if self.limit == NARROW { finest } else { aligned(&finest, scale) }
    }

    /// Rows `at .. at + n`.
    pub fn matrix(&self, at: usize, n: usize) -> Matrix {
        Matrix { rows: n, cols: self.cols, data: (at..at + n).flat_map(|j| self.row(j)).collect() }
    }

    /// Upper bound on the spectral norm with each row times its factor, closely where `close`.
    pub fn sigma(&self, factor: &dyn Fn(usize) -> f64, close: bool) -> f64 {
        let mut row = |j: usize| {
            let mut row = self.row(j);
            let by = factor(j);
            row.iter_mut().for_each(|v| *v *= by);
            row
        };
        if close {
            return super::linalg::spectral_bound(self.len, self.cols, &mut row);
        }
        libm::sqrt((0..self.len).map(row).map(|r| dot(&r, &r)).sum())
    }
}

/// See [`NARROW`]. Means that are taken out of rows leave no room for it.
fn limit(c: &Config) -> f64 {
    if c.norm == NormKind::Rms && weights_in_blocks(c) > LARGE { NARROW } else { WEIGHT }
}

/// As many as blocks with a gated MLP have.
pub fn weights_in_blocks(c: &Config) -> usize {
    // Sizes that no file has vouched for yet.
    let attention = c.heads.saturating_add(c.kv_heads).saturating_mul(2).saturating_mul(c.head_dim);
    let each = attention.saturating_add(c.intermediate.saturating_mul(3));
    c.layers.saturating_mul(c.hidden).saturating_mul(each)
}

/// Largest magnitude of a row's weights, above zero.
pub fn largest(row: &[f64]) -> f64 {
    row.iter().fold(1e-30, |m, w| m.max(w.abs()))
}

/// Bits that the units of a layer's rows may differ by where they are [`aligned`].
const SPREAD: i32 = 5;

/// Units, from the finest on, that `scale` takes to powers of two: the bits that a rescale deals are then in a ring as much
/// narrower than its result's as its input's is wider than what is rounded away.
pub fn aligned(finest: &[f64], scale: &[f64]) -> Vec<f64> {
    let exponents = finest.iter().zip(scale).map(|(u, s)| libm::ceil(libm::log2(u * s)) as i32);
    let top = exponents.clone().fold(i32::MIN, i32::max);
    exponents.zip(scale).map(|(e, s)| pow2(e.max(top.saturating_sub(SPREAD))) / s).collect()
}

/// Units of the finest weights.
pub fn finest(facts: &[Fact]) -> Vec<f64> {
    facts.iter().map(|f| f.unit).collect()
}

/// Bits that hold accumulators of these bounds, in units of weights times `2^-f`, four times over.
pub fn ring_of(bounds: &[f64], units: &[f64], f: i32) -> u32 {
    let needed = |(b, u): (&f64, &f64)| libm::log2((b * SLACK * TRUNCATED / u).max(1.0)) + f64::from(f);
    libm::ceil(bounds.iter().zip(units).map(needed).fold(8.0, f64::max)) as u32 + 2
}

/// A public linear layer and the ring of its accumulators.
#[derive(Serialize, Deserialize)]
pub struct Wide {
    pub layer: Layer,
    pub k: u32,
}

/// Rows `from ..` in units of `units`, of an input at `2^-f`; the narrowest ring that holds every proven accumulator four
/// times over. Where all of them are of few levels in each block, integers are too. Weights are kept or only hashed.
pub fn quantise(
    op: &str,
    rows: &Rows,
    range: std::ops::Range<usize>,
    units: &[f64],
    bounds: &[f64],
    f: i32,
    keep: bool,
) -> Result<Wide, Error> {
    let k = ring_of(bounds, units, f);
    if k > WIDEST {
        return Err(refuse(op, format!("accumulators proven up to {:.0} need a ring of {k} bits", max(bounds))));
    }
    let (out, cols) = (range.len(), rows.cols);
    let mut packing = keep.then(|| Packing::new(out, cols));
    let (mut ints, mut words) = (Vec::with_capacity(cols), Vec::with_capacity(cols));
    let (mut hash, mut bytes) = (Sha256::new(), Vec::with_capacity(2 * cols));
    // One row without levels ends this soon, and all of a layer.
    let mut leveled = |(j, unit): (usize, &f64)| blocks::in_units(&rows.row(j), *unit, GROWN, &mut ints);
    let leveled = !rows.is_rounded() && range.clone().zip(units).all(&mut leveled);
    for (j, unit) in range.clone().zip(units) {
        let row = rows.row(j);
        if !leveled || !blocks::in_units(&row, *unit, GROWN, &mut ints) {
            ints.clear();
            ints.extend(row.iter().map(|w| nearest(w / unit)));
            // What is proven of a row holds for one that is hardly longer; no element of one that is cut is larger.
            if norm(&ints) * unit > norm(&row) * GROWN {
                ints.iter_mut().zip(&row).for_each(|(v, w)| *v = (w / unit).trunc());
            }
        }
        if let Some(v) = ints.iter().find(|v| !(-32768.0..=32767.0).contains(*v)) {
            return Err(refuse(op, format!("a weight needs {v} units, more than 16 bits hold")));
        }
        words.clear();
        words.extend(ints.iter().map(|v| *v as i16));
        bytes.clear();
        bytes.extend(words.iter().flat_map(|v| v.to_le_bytes()));
        hash.update(&bytes);
        if let Some(p) = &mut packing {
            p.push(&words);
        }
    }
    let ulp: Vec<f64> = units.iter().map(|u| u * pow2(-f)).collect();
    let bias: Vec<i64> = rows.bias[range].iter().zip(&ulp).map(|(b, u)| libm::round(b / u) as i64).collect();
    bias.iter().for_each(|v| hash.update(v.to_le_bytes()));
    let weights = packing.map(Packing::finish);
    let linear = Arc::new(Linear { weights, bias, macs: out * cols, digest: hash.finalize().into() });
    let units = bounds.iter().zip(&ulp).fold(0f64, |m, (b, u)| m.max(b * SLACK / u));
    Ok(Wide { layer: Layer { linear, ulp: ulp.into(), bound: max(bounds) * SLACK, units }, k })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::decoder::Activation;

    /// As many weights as it takes to be large, or hardly fewer.
    fn config(large: bool) -> Config {
        let intermediate = LARGE / 3 / 64 - if large { 0 } else { 200 };
        Config {
            family: "llama",
            layers: 1,
            hidden: 64,
            heads: 2,
            kv_heads: 1,
            head_dim: 32,
            intermediate,
            vocab: 8,
            max_positions: 8,
            norm: NormKind::Rms,
            eps: 1e-5,
            activation: Activation::Silu,
            rope: None,
            bos: None,
            eos: Vec::new(),
        }
    }

    fn layer() -> Dense {
        let mut state = 1u64;
        let mut noise = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        let (out, inp) = (5, 4096);
        let mut weight: Vec<f32> = (0..out * inp).map(|_| noise()).collect();
        // A row that rounding lengthens by more than its bound has room for: most elements are just above half of a unit.
        weight[inp..2 * inp].fill(0.51 / 127.0);
        weight[inp] = 1.0;
        weight[2 * inp..3 * inp].fill(0.0);
        Dense { weight, bias: vec![0.0; out], out, inp }
    }

    #[test]
    fn weights_of_large_models_take_a_byte_each() {
        let d = layer();
        for (c, bits) in [(config(false), 16), (config(true), 8)] {
            for rows in [Rows::writing(&c, &d), Rows::writing(&c, &d).rounded()] {
                let facts = rows.facts();
                let bounds: Vec<f64> = facts.iter().map(|f| f.norm).collect();
                let wide = quantise("layer", &rows, 0..rows.len, &finest(&facts), &bounds, 12, true).unwrap();
                let w = wide.layer.linear.weights().unwrap();
                assert_eq!(w.bits(), bits);
                for (j, fact) in facts.iter().enumerate() {
                    let applied: Vec<f64> = (0..rows.cols).map(|i| f64::from(w.at(j, i)) * fact.unit).collect();
                    assert!(norm(&applied) <= fact.norm * GROWN + 1e-12, "row {j}");
                    let row = rows.row(j);
                    // Rounded rows are what is applied; others are within a unit of it, one that was cut, or a half.
                    let most = if rows.is_rounded() { 1e-9 } else { 1.0 + 1e-9 };
                    assert!(applied.iter().zip(&row).all(|(a, r)| (a - r).abs() <= most * fact.unit), "row {j}");
                }
            }
        }
    }
}
