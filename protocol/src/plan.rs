//! Planning: from a checkpoint to quantised weights, proven ranges and a [`Program`] per number of tokens.
//!
//! After a layer norm the input of every linear layer is `g * y + b` with `sum y = 0` and `||y|| = sqrt(d)`, so
//! `|w . x| <= ||centred(w g)|| sqrt(d) + |w . b|` holds for every prompt, and a score of one head is at most the spectral
//! norm of its bilinear form times `d`. It is `y` that layers read: their weights are `centred(w g)`, their biases take `w . b` in.
//! Attention outputs are convex combinations of value rows; `|GELU(h)| <= |h|`. Every accumulator's unit is chosen so that
//! its bound fits its ring; a tensor that cannot be bounded refuses the model.

mod activation;
mod attention;
mod blocks;
mod build;
mod decode;
mod decoder;
mod emit;
mod factors;
mod kept;
mod layer;
mod linalg;
mod norm;
mod project;
mod prove;
mod rows;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::Error;
use crate::gates::exp::Head;
use crate::gates::pad;
use crate::gates::rowmax::Levels;
use crate::gemm::Weights;
use crate::model::{BertModel, Dense, Norm, Pooling};
use crate::program::{Linear, Program};
use crate::query::LENGTHS;
use activation::{Activation, Curve, Curves, half_ring, half_rings};
use attention::{LEAST_STEP, STEP, depth, levels_cost};
pub use decoder::{DecoderPlanner, Keep};
use factors::Factors;
pub use kept::{Progress, Shelf};
pub(crate) use linalg::dot;
use linalg::{Matrix, eigenvalue_bound, norm};
use rows::{WIDEST, aligned, largest};

/// Room for the rounding of weights and fixed point in every bound.
const SLACK: f64 = 1.02;
/// Fraction bits of activations, values, and GELU outputs.
const F: i32 = 12;
/// The same of a normalised row as the product of a row and its inverse root, of which the root has those above [`F`].
const F_NORMALISED: i32 = 30;
const F_VALUE: i32 = 10;
const F_GELU: i32 = 10;
/// Fraction bits of what attention's output layer reads: those that it leaves are its weights'.
const F_ATTENTION: i32 = 11;
/// Bits of a row's largest exponential, as small as it may be, and of the reciprocal of attention.
const F_LARGEST: i32 = 6;
const F_RECIP: i32 = 18;
/// Fraction bits of exponentials' public factor.
const F_PUBLIC: i32 = 6;
/// Ring of scores, of the GELU input's accumulators, and of those of values and of what goes to the residual.
const K_SCORE: u32 = 28;
const K_GELU_IN: u32 = 31;
const K_LAYER: u32 = 32;
/// Bits that accumulators of queries and keys have below the units that scores are products of, at most.
const DROP: i32 = 16;
/// Largest magnitude of a quantised weight.
const LARGEST: f64 = 32766.0;
/// Scale of GELU's even part.
const F_SERIES: u32 = 16;
/// Levels of the row maximum that scores themselves do not use: eight of headroom, and the range of padded keys.
const RESERVED: f64 = 8.0 + pad::LEVELS as f64;

/// A linear layer with what one unit of each accumulator is worth.
#[derive(Serialize, Deserialize)]
struct Layer {
    linear: Arc<Linear>,
    ulp: Factors,
    /// Largest bound of an output, and largest bound in units.
    bound: f64,
    units: f64,
}

/// Queries or keys: a layer, and the bits that its accumulators have below the units that scores are products of.
struct Operand {
    layer: Layer,
    drop: u32,
}

struct Block {
    query: Operand,
    key: Operand,
    value: Layer,
    heads: Vec<Head>,
    /// Bound of each head's scores in units, before padding.
    score_units: Vec<f64>,
    value_bound: f64,
    attention_out: Layer,
    /// Scale of attention's reciprocal.
    f_recip: i32,
    attention_norm: NormPlan,
    up: Layer,
    gelu: Curves,
    down: Layer,
    output_norm: NormPlan,
}

struct NormPlan {
    gain: Vec<f64>,
    bias: Vec<f64>,
    /// Bound on the norm of what is normalised.
    input: f64,
}

/// Everything about a model that does not depend on the number of tokens.
pub struct Planner {
    hidden: usize,
    heads: usize,
    max_tokens: usize,
    eps: f64,
    mean: bool,
    /// The norm of an embedded text: what a client shares is normalised by it, its gain and shift left out.
    embedded: NormPlan,
    blocks: Vec<Block>,
    model: [u8; 32],
}

fn refuse(op: &str, reason: String) -> Error {
    Error::Plan { op: op.to_string(), reason }
}

fn wide(v: &[f32]) -> Vec<f64> {
    v.iter().map(|v| *v as f64).collect()
}

/// Quantises row `j` with weight unit `unit[j]`; inputs carry `f` fraction bits.
fn quantise(op: &str, rows: &[&[f64]], bias: &[f64], unit: Vec<f64>, f: i32, bounds: &[f64]) -> Result<Layer, Error> {
    let cols = rows[0].len();
    let mut ints = Vec::with_capacity(rows.len() * cols);
    let mut hash = Sha256::new();
    for (row, s) in rows.iter().zip(&unit) {
        for w in row.iter() {
            let v = libm::round(w / s);
            if !(-32768.0..=32767.0).contains(&v) {
                return Err(refuse(op, format!("a weight needs {v} units, more than 16 bits hold")));
            }
            ints.push(v as i16);
        }
    }
    let ulp: Vec<f64> = unit.iter().map(|s| s * pow2(-f)).collect();
    let bias: Vec<i64> = bias.iter().zip(&ulp).map(|(b, u)| libm::round(b / u) as i64).collect();
    ints.iter().for_each(|v| hash.update(v.to_le_bytes()));
    bias.iter().for_each(|v| hash.update(v.to_le_bytes()));
    let weights = Weights::new(rows.len(), cols, &ints);
    let linear =
        Arc::new(Linear { weights: Some(weights), bias, macs: rows.len() * cols, digest: hash.finalize().into() });
    let units = bounds.iter().zip(&ulp).fold(0f64, |m, (b, u)| m.max(b * SLACK / u));
    Ok(Layer { linear, ulp: ulp.into(), bound: max(bounds) * SLACK, units })
}

fn pow2(e: i32) -> f64 {
    libm::exp2(e as f64)
}

/// Room for the unit that a truncation is off by, in rings of sixteen bits and more.
const TRUNCATED: f64 = 1.0 + 1e-4;

/// Weight units that bring each row's bound just under a quarter of the ring, and no weight over 16 bits; rescales of these
/// rows to a unit of one are by powers of two.
fn units(rows: &Matrix, bounds: &[f64], f: i32, k: u32) -> Vec<f64> {
    let quarter = SLACK * TRUNCATED * pow2(f - k as i32 + 2);
    let of = |(r, b): (&[f64], &f64)| (b * quarter).max(largest(r) / LARGEST).max(1e-30);
    let finest: Vec<f64> = rows.each().into_iter().zip(bounds).map(of).collect();
    aligned(&finest, &vec![1.0; rows.rows])
}

fn constant(d: &Dense, beta: &[f64]) -> Vec<f64> {
    d.weight.chunks_exact(d.inp).zip(&d.bias).map(|(r, b)| dot(&wide(r), beta) + f64::from(*b)).collect()
}

/// A layer that writes to the residual, whose mean no norm reads: its weights and bias, less that.
fn without_mean(d: &Dense) -> (Matrix, Vec<f64>) {
    let mut m = Matrix { rows: d.out, cols: d.inp, data: wide(&d.weight) };
    let mut mean = vec![0.0; d.inp];
    for row in m.data.chunks_exact(d.inp) {
        mean.iter_mut().zip(row).for_each(|(m, w)| *m += w / d.out as f64);
    }
    m.data.chunks_exact_mut(d.inp).for_each(|row| row.iter_mut().zip(&mean).for_each(|(w, m)| *w -= m));
    let bias = wide(&d.bias);
    let mean = bias.iter().sum::<f64>() / d.out as f64;
    (m, bias.iter().map(|b| b - mean).collect())
}

impl Planner {
    /// Quantises the weights and proves the ranges.
    ///
    /// # Errors
    /// [`Error::Plan`] names the operation that cannot be bounded within its ring.
    pub fn new(model: &BertModel) -> Result<Planner, Error> {
        let c = &model.config;
        let mut blocks = Vec::new();
        let mut norm_in = &model.embeddings.norm;
        for (i, l) in model.layers.iter().enumerate() {
            blocks.push(block(&format!("layer {i}"), l, norm_in, c.num_attention_heads)?);
            norm_in = &l.output_norm;
        }
        Ok(Planner {
            hidden: c.hidden_size,
            heads: c.num_attention_heads,
            max_tokens: c.max_position_embeddings.min(512),
            eps: c.layer_norm_eps,
            mean: matches!(model.pooling, Pooling::Mean),
            embedded: norm_plan(&model.embeddings.norm, 0.0),
            blocks,
            model: model.digest(),
        })
    }

    /// Padded lengths that the model takes.
    pub fn lengths(&self) -> impl Iterator<Item = usize> {
        let most = self.max_tokens;
        // The last one may exceed what the model has positions for: padding is a copy of the first row and needs none.
        LENGTHS.into_iter().scan(false, move |done, l| {
            let before = std::mem::replace(done, l >= most);
            (!before).then_some(l)
        })
    }

    /// Most tokens of a text.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// The program for texts padded to `tokens` tokens, one of [`Self::lengths`].
    ///
    /// # Errors
    /// [`Error::Plan`] for another length, or a range that does not fit at this length.
    pub fn program(&self, tokens: usize) -> Result<Program, Error> {
        if !self.lengths().any(|l| l == tokens) {
            let lengths: Vec<String> = self.lengths().map(|l| l.to_string()).collect();
            return Err(refuse("input", format!("{tokens} is not a padded length: {}", lengths.join(", "))));
        }
        emit::program(self, tokens)
    }
}

fn norm_plan(n: &Norm, input: f64) -> NormPlan {
    NormPlan { gain: wide(&n.weight), bias: wide(&n.bias), input }
}

impl NormPlan {
    /// Bound on an element of what the norm gives.
    fn output(&self) -> f64 {
        let root = libm::sqrt(self.gain.len() as f64);
        self.gain.iter().zip(&self.bias).fold(0f64, |m, (g, b)| m.max(g.abs() * root + b.abs())) * SLACK
    }

    /// The same less its row's mean.
    fn output_without_mean(&self) -> f64 {
        let n = self.gain.len() as f64;
        let (mean, all) = (self.bias.iter().sum::<f64>() / n, dot(&self.gain, &self.gain) / n);
        let column = |(g, b): (&f64, &f64)| libm::sqrt(g * g * (n - 2.0) + all) + (b - mean).abs();
        self.gain.iter().zip(&self.bias).map(column).fold(0.0, f64::max) * SLACK
    }
}

/// GELU's error against the published one, at most.
const GELU_TOLERANCE: f64 = 4e-3;

/// Each channel's pieces of GELU, and the unit of its weights.
fn gelu(name: &str, rows: &Matrix, bounds: &[f64]) -> Result<(Vec<Curve>, Vec<f64>), Error> {
    let mut known = Activation::new(|x| x * libm::erf(x / std::f64::consts::SQRT_2) / 2.0, GELU_TOLERANCE);
    let of = |(r, b): (&[f64], &f64)| {
        let largest = largest(r);
        // Half of the ring is what the series' periods are parts of.
        let unit_of = |half: f64| half * pow2(F + 1 - K_GELU_IN as i32);
        let none = || refuse(&format!("{name} GELU"), format!("no series for inputs up to {b:.0}"));
        let least = half_rings(half_ring(*b)).find(|half| largest / unit_of(*half) <= LARGEST);
        let (half, curve) = least.and_then(|half| known.curve(half)).ok_or_else(none)?;
        Ok((curve, unit_of(half)))
    };
    rows.each().into_iter().zip(bounds).map(of).collect()
}

/// Channels in the order of their series' lengths.
fn by_length(curves: &[Curve]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..curves.len()).collect();
    order.sort_by_key(|i| curves[*i].harmonics());
    order
}

/// What stands at each of these places.
fn permuted<T: Clone>(v: &[T], order: &[usize]) -> Vec<T> {
    order.iter().map(|i| v[*i].clone()).collect()
}

/// Most powers of two that a step of a layer's row maxima is worth, of which that is taken of which least is dealt.
const STEPS: [f64; 4] = [STEP - 0.5, STEP, STEP + 1.0, STEP + 2.0];

/// Scales of scores of these bounds, if some have steps of at most so much.
fn score_heads(bounds: &[f64], most: f64) -> Option<Vec<Head>> {
    let head = |bound: &f64| {
        let step = |b: u32| 2.0 * bound * TRUNCATED / ((1u64 << b) as f64 - RESERVED);
        let level_bits = (6..=11).find(|b| step(*b) <= most)?;
        let ulp = step(level_bits).max(f64::from(LEAST_STEP)) * pow2(level_bits as i32 - K_SCORE as i32);
        Some(Head { levels: Levels::all(level_bits), ulp })
    };
    bounds.iter().map(head).collect()
}

fn block(name: &str, l: &crate::model::Layer, before: &Norm, heads: usize) -> Result<Block, Error> {
    let (gain, beta) = (wide(&before.weight), wide(&before.bias));
    let d = gain.len();
    let root = libm::sqrt(d as f64);
    let dim = d / heads;
    let on = |m: &Dense| Matrix::on_normalised(&m.weight, m.out, &gain);
    let (q, k, v) = (on(&l.query), on(&l.key), on(&l.value));
    // What a key adds equally to every score of a row leaves softmax unchanged: keys are made to have no constant part.
    let (cq, ck, cv) = (constant(&l.query, &beta), vec![0.0; d], constant(&l.value, &beta));
    let row_bound =
        |m: &Matrix, c: &[f64]| m.each().iter().zip(c).map(|(r, c)| norm(r) * root + c.abs()).collect::<Vec<f64>>();
    let value_bounds = row_bound(&v, &cv);

    // Scores, head by head.
    let per_log2 = std::f64::consts::LOG2_E / libm::sqrt(dim as f64);
    let bound = |h: usize| {
        let (qh, kh) = (q.slice(h * dim, dim), k.slice(h * dim, dim));
        let sigma = libm::sqrt(eigenvalue_bound(&qh.gram().times(&kh.gram()), 7));
        (sigma * d as f64 + root * norm(&kh.transpose_times(&cq[h * dim..][..dim]))) * per_log2 * SLACK
    };
    let score_bounds: Vec<f64> = (0..heads).map(bound).collect();
    let plan = STEPS.into_iter().filter_map(|step| score_heads(&score_bounds, step));
    let cost = |heads: &[Head]| levels_cost(heads, K_SCORE, F_LARGEST, F_PUBLIC);
    let plan = plan.min_by(|a, b| cost(a).total_cmp(&cost(b))).ok_or_else(|| {
        refuse(&format!("{name} scores"), format!("proven range {:.0} is too wide", max(&score_bounds)))
    })?;
    let score_units: Vec<f64> = score_bounds.iter().zip(&plan).map(|(b, h)| b / h.ulp).collect();
    let mut qk_scale = vec![0.0; 2 * d];
    let mut value_norm = Vec::new();
    for h in 0..heads {
        let (qh, kh, vh) = (q.slice(h * dim, dim), k.slice(h * dim, dim), v.slice(h * dim, dim));
        let (nq, nk) = (norm(&qh.data).max(1e-30), norm(&kh.data).max(1e-30));
        let a = per_log2 / plan[h].ulp;
        let aq = libm::sqrt(a * nk / nq);
        qk_scale[h * dim..][..dim].fill(aq);
        qk_scale[d + h * dim..][..dim].fill(a / aq);
        value_norm.push(libm::sqrt(eigenvalue_bound(&vh.gram(), 6)) * root + norm(&cv[h * dim..][..dim]));
    }

    // Accumulators of queries and keys are truncated to the units that scores are products of.
    let operand = |what: &str, m: &Matrix, c: &[f64], scale: &[f64]| {
        let steepest = m.each().iter().zip(scale).fold(1e-30, |most: f64, (r, s)| most.max(largest(r) * s));
        let drop = (F + libm::floor(libm::log2(LARGEST / steepest)) as i32).min(DROP);
        if drop < 1 {
            return Err(refuse(&format!("{name} {what}"), "weights too large for 16 bits".into()));
        }
        let unit = scale.iter().map(|s| pow2(F - drop) / s).collect();
        let layer = quantise(&format!("{name} {what}"), &m.each(), c, unit, F, &row_bound(m, c))?;
        Ok(Operand { layer, drop: drop as u32 })
    };
    let query = operand("query", &q, &cq, &qk_scale[..d])?;
    let key = operand("key", &k, &ck, &qk_scale[d..])?;
    let unit = units(&v, &value_bounds, F, K_LAYER);
    let value = quantise(&format!("{name} value"), &v.each(), &cv, unit, F, &value_bounds)?;

    // Attention output: per head a convex combination of value rows.
    let (out, out_bias) = without_mean(&l.attention_output);
    let out_bound = |(r, b): (&[f64], &f64)| {
        r.chunks_exact(dim).zip(&value_norm).map(|(w, n)| norm(w) * n).sum::<f64>() * SLACK + b.abs()
    };
    let out_bounds: Vec<f64> = out.each().into_iter().zip(&out_bias).map(out_bound).collect();
    let unit = units(&out, &out_bounds, F_ATTENTION, K_LAYER);
    let attention_out =
        quantise(&format!("{name} attention output"), &out.each(), &out_bias, unit, F_ATTENTION, &out_bounds)?;
    // Attention's scale is in the ring above what the layer reads.
    let f_exp = F_LARGEST + depth(&plan, K_SCORE);
    let f_recip = F_RECIP.min(WIDEST as i32 - K_LAYER as i32 + F_ATTENTION - f_exp);
    if f_recip < F {
        return Err(refuse(&format!("{name} attention"), format!("exponentials need {f_exp} bits")));
    }
    let residual = |n: &Norm| n.weight.iter().fold(0f64, |m, g| m.max((*g as f64).abs())) * root + norm(&wide(&n.bias));
    let attention_norm = norm_plan(&l.attention_norm, (residual(before) + norm(&out_bounds)) * SLACK);

    // MLP.
    let (g1, b1) = (wide(&l.attention_norm.weight), wide(&l.attention_norm.bias));
    let up_m = Matrix::on_normalised(&l.intermediate.weight, l.intermediate.out, &g1);
    let c1 = constant(&l.intermediate, &b1);
    let up_bounds = row_bound(&up_m, &c1);
    let (curves, unit) = gelu(name, &up_m, &up_bounds)?;
    // Channels side by side share a number of harmonics: those of like series stand together.
    let order = by_length(&curves);
    let gelu = Curves::new(&permuted(&curves, &order));
    let up = quantise(
        &format!("{name} intermediate"),
        &permuted(&up_m.each(), &order),
        &permuted(&c1, &order),
        permuted(&unit, &order),
        F,
        &permuted(&up_bounds, &order),
    )?;
    let gelu_norm = libm::sqrt(eigenvalue_bound(&up_m.gram_columns(), 4)) * root + norm(&c1);
    let (mut down, down_bias) = without_mean(&l.output);
    down.data = down.each().into_iter().flat_map(|r| permuted(r, &order)).collect();
    let down_bound = |(r, b): (&[f64], &f64)| norm(r) * gelu_norm * SLACK + b.abs();
    let down_bounds: Vec<f64> = down.each().into_iter().zip(&down_bias).map(down_bound).collect();
    let unit = units(&down, &down_bounds, F_GELU, K_LAYER);
    let down = quantise(&format!("{name} output"), &down.each(), &down_bias, unit, F_GELU, &down_bounds)?;
    let output_norm = norm_plan(&l.output_norm, (residual(&l.attention_norm) + norm(&down_bounds)) * SLACK);

    Ok(Block {
        query,
        key,
        value,
        heads: plan,
        score_units,
        value_bound: max(&value_bounds) * SLACK,
        attention_out,
        f_recip,
        attention_norm,
        up,
        gelu,
        down,
        output_norm,
    })
}

fn max(v: &[f64]) -> f64 {
    v.iter().fold(0.0, |m, x| m.max(*x))
}
