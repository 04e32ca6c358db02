//! Planning a decoder: quantised weights and proven ranges, from which [`super::decode`] lays down a program for any number
//! of new rows after any number of past ones.
//!
//! A pre-norm block reads the residual stream `x` through norms only, so linear layers act on `y = x / rms(x)` with
//! `||y|| = sqrt(d)` (and `sum y = 0` for layer norms), whatever `x` is; gains are folded into weights, shifts into biases.
//! Rotation keeps norms, hence `|q . k| <= (sigma(Q) sqrt(d) + |c_q|)(sigma(K) sqrt(d) + |c_k|)`. Attention's outputs are
//! convex combinations of values; `|silu(g)| <= |g|` and `|gelu(h)| <= |h|`. The residual's own bound is the embedding's
//! plus what every block can add, and decides the ring in which its square is summed.

use std::sync::Arc;

use super::attention::attention_ring;
use super::linalg::{Matrix, eigenvalue_bound, norm};
use super::{Layer, SLACK, dot, max, pow2, quantise, refuse};
use crate::Error;
use crate::gates::cosine::fit_even;
use crate::gates::exp::Head;
use crate::gates::pad;
use crate::gates::piecewise::STRIDE;
use crate::gates::rowmax::LONGEST;
use crate::model::decoder::{Activation, Config, DecoderLayer, DecoderModel, Mlp, NormKind};
use crate::model::{Dense, Norm};
use crate::program::Program;

/// Scales of heads before and after a norm of their own.
pub const F_HEAD: i32 = 14;
pub const F_HEAD_NORMED: i32 = 32;
/// Ring of scores: wide, since proven ranges are far wider than what real texts use.
pub const K_SCORE: u32 = 36;
/// Largest magnitude of a quantised weight.
const WEIGHT: f64 = 4095.0;
/// Scales of exponentials, of the weighted values and of the reciprocal of attention, and at most those of the
/// nonlinearity and of what it multiplies.
pub const F_EXP: i32 = 20;
pub const F_OUT: i32 = 14;
pub const F_RECIP: i32 = 20;
const F_ACTIVATED: i32 = 24;
const F_UP: i32 = 13;
/// Largest ring that the kernels' rescales take.
const WIDEST: u32 = 62;
/// Multiply-accumulates up to which the spectral norm of the MLPs is bounded closely (some ten seconds); above, by the
/// Frobenius norm.
const CLOSE: usize = 25_000_000_000;
/// Smallest mean square that a norm resolves.
const SMALLEST: f64 = 1e-3;

/// A public linear layer and the ring of its accumulators.
pub struct Wide {
    pub layer: Layer,
    pub k: u32,
}

/// A norm before its gain: its input's bound, and the scale of what it gives.
pub struct PreNorm {
    /// Bound on the norm of a row.
    pub input: f64,
    /// Fraction bits of the normalised row.
    pub f: i32,
    /// Ring of the normalised row: that of the widest layer that reads it.
    pub k: u32,
}

/// The MLP: its first layers, each channel's series, and the last layer.
pub struct MlpPlan {
    /// What the nonlinearity is applied to; its period is `2^(k - 1)` units.
    pub act: Wide,
    pub series: Arc<Vec<Vec<f64>>>,
    /// Scale of its result.
    pub f_activated: i32,
    /// What multiplies it, and its scale.
    pub times: Option<Wide>,
    pub f_up: i32,
    pub down: Wide,
}

/// Norms of each head of queries and keys, before rotation.
pub struct HeadNorm {
    /// Bound on the norm of a head's row.
    pub input: f64,
    /// Gain of every column, queries then keys.
    pub gain: Vec<f64>,
}

/// One block.
pub struct BlockPlan {
    pub attention_norm: PreNorm,
    pub qkv: Wide,
    pub head_norm: Option<HeadNorm>,
    /// Factor from real query channels, and from real key channels, to units whose product is a score's.
    pub q_scale: Vec<f64>,
    pub k_scale: Vec<f64>,
    pub heads: Vec<Head>,
    /// Bound of each head's scores in units, before padding.
    pub score_units: Vec<f64>,
    pub value_bound: f64,
    pub k_av: u32,
    pub output: Wide,
    pub mlp_norm: PreNorm,
    pub mlp: MlpPlan,
}

/// Everything about a decoder that does not depend on how many tokens there are.
pub struct DecoderPlanner {
    pub(super) config: Config,
    /// Longest sequence: the model's, or what the row maximum takes.
    pub(super) longest: usize,
    pub(super) blocks: Vec<BlockPlan>,
    pub(super) last_norm: PreNorm,
    pub(super) head: Wide,
    /// Ring of the residual stream.
    pub(super) k: u32,
    /// Bound on an element of an embedded token.
    pub(super) embedded: f64,
    pub(super) model: [u8; 32],
}

impl DecoderPlanner {
    /// Quantises the weights and proves the ranges.
    ///
    /// # Errors
    /// [`Error::Plan`] names the operation that cannot be bounded within its ring.
    pub fn new(model: &DecoderModel) -> Result<DecoderPlanner, Error> {
        let c = &model.config;
        let longest = c.max_positions.min(LONGEST);
        let row = |table: &[f32]| table.chunks_exact(c.hidden).map(|r| norm(&super::wide(r))).fold(0.0, f64::max);
        let element = |table: &[f32]| table.iter().fold(0f64, |m, v| m.max(f64::from(v.abs())));
        let positions = model.positions.as_deref().unwrap_or(&[]);
        let mut residual = row(model.embedding()) + row(positions);
        let mut blocks = Vec::with_capacity(c.layers);
        for (i, layer) in model.layers.iter().enumerate() {
            blocks.push(block(&format!("layer {i}"), c, layer, longest, &mut residual)?);
        }
        let (rows, bias) = on_normalised(&model.head, &model.final_norm);
        let mut last_norm = pre_norm(c, residual);
        let bounds = row_bounds(c, &rows, &bias);
        let largest = rows.iter().flatten().fold(0f64, |m, w| m.max(w.abs())).max(1e-30);
        last_norm.spare(c, "final norm", ring_of(&bounds, &vec![largest / WEIGHT; bounds.len()], 0))?;
        let head = wide_with("head", &rows, &bias, &bounds, last_norm.f, |_| largest / WEIGHT)?;
        last_norm.k = head.k;
        let norms = blocks.iter().flat_map(|b| [&b.attention_norm, &b.mlp_norm]).chain([&last_norm]);
        let k = norms.map(|n| n.k.max(variance_ring(c, n))).fold(0, u32::max);
        if k > WIDEST {
            return Err(refuse(
                "residual stream",
                format!("proven up to {residual:.0}, which needs a ring of {k} bits"),
            ));
        }
        let embedded = element(model.embedding()) + element(positions);
        Ok(DecoderPlanner { config: c.clone(), longest, blocks, last_norm, head, k, embedded, model: model.digest() })
    }

    /// Most positions of a sequence, prompt and answer together.
    pub fn longest(&self) -> usize {
        self.longest
    }

    /// Logits of a position.
    pub fn vocab(&self) -> usize {
        self.config.vocab
    }

    /// The program for `rows` new positions after `past` ones: logits of the last position, or of all new ones if `every`.
    /// Where positions are `marked`, all but the last row of several may be padding, and so may past ones; a single later row
    /// never is.
    ///
    /// The first program of a sequence carries the digest over the model that all later ones follow from; theirs is zero,
    /// since spelling out every parameter would take longer than to run them.
    ///
    /// # Errors
    /// [`Error::Plan`] for a sequence that is too long.
    pub fn program(&self, marked: bool, past: usize, rows: usize, every: bool) -> Result<Program, Error> {
        if rows == 0 || past + rows > self.longest {
            let reason = format!("{rows} positions after {past}, but the model takes {}", self.longest);
            return Err(refuse("input", reason));
        }
        super::decode::program(self, marked, past, rows, every)
    }
}

/// Levels by which a padded key is lowered where scores may be anything in their range: the range itself, and what makes
/// an exponential vanish.
pub fn hidden_levels(level_bits: u32) -> u32 {
    ((1 << level_bits) - 9 - pad::LEVELS) / 2 + pad::LEVELS
}

/// Bits in which the sum of squares of a row fits, with the windows of its inverse root.
fn variance_ring(c: &Config, n: &PreNorm) -> u32 {
    let (drop, scales) = norm_scales(c, n);
    drop + STRIDE * (scales as u32 - 1) + 7
}

/// Fraction bits of the residual stream. Rows of real models start small, hence many; centring costs bits of its own.
pub fn residual_bits(c: &Config) -> i32 {
    if c.norm == NormKind::Layer { 12 } else { 16 }
}

/// Units of a sum of squares: of `sum x^2`, or of `d sum (x - mean)^2`, for a mean square of one.
pub fn norm_unit(c: &Config) -> f64 {
    let d = c.hidden as f64;
    pow2(2 * residual_bits(c)) * if c.norm == NormKind::Layer { d * d } else { d }
}

impl HeadNorm {
    /// Widest window and number of scales of the inverse root of a head's sum of squares at `2^-2 F_HEAD`.
    pub fn scales(&self, dim: usize) -> (u32, usize) {
        let unit = pow2(2 * F_HEAD);
        super::build::scales(self.input * self.input * unit, SMALLEST * dim as f64 * unit, 12.0)
    }

    /// Ring of heads, their sums of squares and their normalised values.
    pub fn ring(&self, dim: usize) -> u32 {
        let (drop, scales) = self.scales(dim);
        let normed = libm::ceil(libm::log2(dim as f64) / 2.0) as u32 + F_HEAD_NORMED as u32 + 3;
        normed.max(drop + STRIDE * (scales as u32 - 1) + 7)
    }
}

/// Widest window and number of scales of a norm's inverse root.
pub fn norm_scales(c: &Config, n: &PreNorm) -> (u32, usize) {
    let hi = n.input * n.input * norm_unit(c) / c.hidden as f64;
    super::build::scales(hi, SMALLEST * norm_unit(c), 12.0)
}

impl PreNorm {
    /// Gives up fraction bits where what reads the rows needs `needed` bits above them: the proven norm is far above what
    /// rows have, and twelve bits of an inverse root of one are enough.
    fn spare(&mut self, c: &Config, op: &str, needed: u32) -> Result<(), Error> {
        self.f = self.f.min(WIDEST as i32 - needed as i32);
        let least = residual_bits(c) + centred_bits(c) + 12;
        if self.f < least {
            return Err(refuse(op, format!("{least} fraction bits and {needed} above them are more than {WIDEST}")));
        }
        Ok(())
    }
}

/// Bits by which centring scales a row.
fn centred_bits(c: &Config) -> i32 {
    if c.norm == NormKind::Layer { libm::ceil(libm::log2(c.hidden as f64)) as i32 } else { 0 }
}

fn pre_norm(c: &Config, input: f64) -> PreNorm {
    // Sixteen bits of the inverse root for rows of an eighth of the proven norm, more for smaller ones.
    let rms = input / libm::sqrt(c.hidden as f64);
    let f = residual_bits(c) + centred_bits(c) + 16 + libm::ceil(libm::log2((rms / 8.0).max(1.0))) as i32;
    PreNorm { input, f, k: 0 }
}

/// Rows that act on the normalised input, and their constants.
fn on_normalised(d: &Dense, n: &Norm) -> (Vec<Vec<f64>>, Vec<f64>) {
    let shift = super::wide(&n.bias);
    let rows = super::rows(d);
    let bias = rows.iter().zip(&d.bias).map(|(r, b)| dot(&super::wide(r), &shift) + f64::from(*b)).collect();
    let gained = |r: &&[f32]| r.iter().zip(&n.weight).map(|(w, g)| f64::from(*w) * f64::from(*g)).collect();
    (rows.iter().map(gained).collect(), bias)
}

/// What acts on a normalised row: centred for layer norms, whose rows sum to zero.
fn acting(c: &Config, rows: &[Vec<f64>]) -> Matrix {
    let cols = rows[0].len();
    let centre = |r: &Vec<f64>| {
        let mean = if c.norm == NormKind::Layer { r.iter().sum::<f64>() / cols as f64 } else { 0.0 };
        r.iter().map(|v| v - mean).collect::<Vec<f64>>()
    };
    Matrix { rows: rows.len(), cols, data: rows.iter().flat_map(centre).collect() }
}

fn row_bounds(c: &Config, rows: &[Vec<f64>], bias: &[f64]) -> Vec<f64> {
    let (m, root) = (acting(c, rows), libm::sqrt(rows[0].len() as f64));
    (0..m.rows).map(|j| norm(m.row(j)) * root + bias[j].abs()).collect()
}

fn largest(row: &[f64]) -> f64 {
    row.iter().fold(1e-30, |m, w| m.max(w.abs()))
}

/// Units that give each row's largest weight [`WEIGHT`].
fn finest(rows: &[Vec<f64>]) -> Vec<f64> {
    rows.iter().map(|r| largest(r) / WEIGHT).collect()
}

/// Bits that hold accumulators of these bounds, in units of weights times `2^-f`, four times over.
fn ring_of(bounds: &[f64], units: &[f64], f: i32) -> u32 {
    let needed = |(b, u): (&f64, &f64)| libm::log2((b * SLACK / u).max(1.0)) + f64::from(f);
    libm::ceil(bounds.iter().zip(units).map(needed).fold(8.0, f64::max)) as u32 + 2
}

/// Weights in units of `unit`, and the narrowest ring that holds every proven accumulator four times over.
fn wide_with(
    op: &str,
    rows: &[Vec<f64>],
    bias: &[f64],
    bounds: &[f64],
    f: i32,
    unit: impl Fn(usize) -> f64,
) -> Result<Wide, Error> {
    let units: Vec<f64> = (0..rows.len()).map(unit).collect();
    let k = ring_of(bounds, &units, f);
    if k > WIDEST {
        return Err(refuse(op, format!("accumulators proven up to {:.0} need a ring of {k} bits", max(bounds))));
    }
    Ok(Wide { layer: quantise(op, &super::slices(rows), bias, units, f, bounds)?, k })
}

/// [`wide_with`] the unit that gives each row's largest weight [`WEIGHT`].
fn wide(op: &str, rows: &[Vec<f64>], bias: &[f64], bounds: &[f64], f: i32) -> Result<Wide, Error> {
    wide_with(op, rows, bias, bounds, f, |j| largest(&rows[j]) / WEIGHT)
}

fn plain_rows(d: &Dense) -> Vec<Vec<f64>> {
    super::wide_rows(&super::rows(d))
}

fn block(name: &str, c: &Config, l: &DecoderLayer, longest: usize, residual: &mut f64) -> Result<BlockPlan, Error> {
    let (dim, root) = (c.head_dim, libm::sqrt(c.hidden as f64));
    let group = c.heads / c.kv_heads;
    let mut attention_norm = pre_norm(c, *residual);

    // Queries, keys and values in one product.
    let [(q, cq), (k, mut ck), (v, cv)] = [&l.query, &l.key, &l.value].map(|d| on_normalised(d, &l.attention_norm));
    if c.rope.is_none() {
        // What a key adds equally to every score of a row leaves softmax unchanged, where keys are not rotated.
        ck.fill(0.0);
    }
    let all: Vec<Vec<f64>> = [q, k, v].concat();
    let bias: Vec<f64> = [cq, ck, cv].concat();
    let bounds = row_bounds(c, &all, &bias);
    attention_norm.spare(c, &format!("{name} attention norm"), ring_of(&bounds, &finest(&all), 0))?;
    let qkv = wide(&format!("{name} query/key/value"), &all, &bias, &bounds, attention_norm.f)?;
    attention_norm.k = qkv.k;
    let acts = acting(c, &all);
    let head = |at: usize| (acts.slice(at, dim), &bias[at..][..dim]);
    let (keys_at, values_at) = (c.heads * dim, (c.heads + c.kv_heads) * dim);
    // Largest norm of a head's row.
    let reach = |at: usize| {
        let (m, constant) = head(at);
        libm::sqrt(eigenvalue_bound(&m.gram(), 6)) * root + norm(constant)
    };
    let per_log2 = std::f64::consts::LOG2_E * c.score_scale();

    let (mut heads, mut score_units) = (Vec::new(), Vec::new());
    let (mut q_scale, mut k_scale) = (Vec::new(), Vec::new());
    // A head that is normalised has the norm sqrt(dim) before its gain.
    let head_norm = l.query_key_norm.as_ref().map(|(q, k)| {
        let gain = |n: &Norm, heads: usize| super::wide(&n.weight).repeat(heads);
        let input = (0..c.heads + c.kv_heads).map(|h| reach(h * dim)).fold(0.0, f64::max) * SLACK;
        HeadNorm { input, gain: [gain(q, c.heads), gain(k, c.kv_heads)].concat() }
    });
    let normed = |n: &Norm| libm::sqrt(dim as f64) * largest(&super::wide(&n.weight)) * SLACK;
    for g in 0..c.kv_heads {
        let (key, key_norm) = match &l.query_key_norm {
            Some((_, k)) => (normed(k), normed(k)),
            None => (reach(keys_at + g * dim), norm(&head(keys_at + g * dim).0.data)),
        };
        let mut key_scale = 0.0;
        for h in g * group..(g + 1) * group {
            let (query, query_norm) = match &l.query_key_norm {
                Some((q, _)) => (normed(q), normed(q)),
                None => (reach(h * dim), norm(&head(h * dim).0.data)),
            };
            let bound = query * key * per_log2 * SLACK;
            // Scores take a half of the ring, padded keys the other, whatever their content is; eight levels of headroom.
            let levels = |b: u32| f64::from(hidden_levels(b) - pad::LEVELS) / 2.0;
            let level_bits = (7..=12).find(|b| bound / levels(*b) <= 3.0).ok_or_else(|| {
                refuse(&format!("{name} scores of head {h}"), format!("proven range {bound:.0} is too wide"))
            })?;
            // Steps of at least 1.5 powers of two, so that the exponentials cover ten or more.
            let step = (bound / levels(level_bits)).max(1.5);
            let ulp = step * pow2(level_bits as i32 - K_SCORE as i32);
            heads.push(Head { level_bits, ulp });
            score_units.push(bound / ulp);
            if h == g * group {
                key_scale = libm::sqrt(per_log2 / ulp * query_norm / key_norm.max(1e-30));
            }
            q_scale.extend(std::iter::repeat_n(per_log2 / ulp / key_scale, dim));
        }
        k_scale.extend(std::iter::repeat_n(key_scale, dim));
    }

    // Attention output: per head a convex combination of value rows.
    let value_bound = max(&bounds[values_at..]) * SLACK;
    let reaches: Vec<f64> = (0..c.heads).map(|h| reach(values_at + h / group * dim)).collect();
    let rows = plain_rows(&l.output);
    let bias = super::wide(&l.output.bias);
    let mixed = |(r, b): (&Vec<f64>, &f64)| {
        r.chunks_exact(dim).zip(&reaches).map(|(w, n)| norm(w) * n).sum::<f64>() * SLACK + b.abs()
    };
    let bounds: Vec<f64> = rows.iter().zip(&bias).map(mixed).collect();
    let output = wide(&format!("{name} attention output"), &rows, &bias, &bounds, F_OUT + F_RECIP)?;
    *residual += norm(&bounds) * SLACK;

    let mut mlp_norm = pre_norm(c, *residual);
    let (mlp, added) = mlp(name, c, l, &mut mlp_norm)?;
    mlp_norm.k = mlp.act.k.max(mlp.times.as_ref().map_or(0, |w| w.k));
    *residual += added;
    let k_av = attention_ring(longest, value_bound, F_EXP);
    Ok(BlockPlan {
        attention_norm,
        qkv,
        head_norm,
        q_scale,
        k_scale,
        heads,
        score_units,
        value_bound,
        k_av,
        output,
        mlp_norm,
        mlp,
    })
}

/// The MLP, and a bound on the norm of what it adds.
fn mlp(name: &str, c: &Config, l: &DecoderLayer, n: &mut PreNorm) -> Result<(MlpPlan, f64), Error> {
    let root = libm::sqrt(c.hidden as f64);
    let (act, up, down) = match &l.mlp {
        Mlp::Gated { gate, up, down } => (gate, Some(up), down),
        Mlp::Plain { up, down } => (up, None, down),
    };
    let (rows, bias) = on_normalised(act, &l.mlp_norm);
    let bounds = row_bounds(c, &rows, &bias);
    let gated = up.map(|up| {
        let (rows, bias) = on_normalised(up, &l.mlp_norm);
        let bounds = row_bounds(c, &rows, &bias);
        (rows, bias, bounds)
    });
    let needed = gated.as_ref().map_or(0, |(rows, _, bounds)| ring_of(bounds, &finest(rows), 0));
    n.spare(c, &format!("{name} MLP norm"), needed.max(period(&rows, &ranges(&bounds), 0)))?;
    let f = n.f;
    let (act, series) = activation(&format!("{name} nonlinearity"), c, &rows, &bias, &bounds, f)?;
    // Norm of what a layer gives, closely where that is affordable.
    let spread = |rows: &[Vec<f64>], bias: &[f64]| {
        let m = acting(c, rows);
        let sigma = if m.rows * m.cols * m.cols * c.layers <= CLOSE {
            libm::sqrt(eigenvalue_bound(&m.gram_columns(), 4))
        } else {
            norm(&m.data)
        };
        sigma * root + norm(bias)
    };
    let (times, given) = match gated {
        None => (None, spread(&rows, &bias)),
        Some((up_rows, up_bias, up_bounds)) => {
            let products: Vec<f64> = bounds.iter().zip(&up_bounds).map(|(a, b)| a * b).collect();
            let given = norm(&products).min(max(&bounds) * spread(&up_rows, &up_bias));
            (Some(wide(&format!("{name} up"), &up_rows, &up_bias, &up_bounds, f)?), given)
        }
    };
    let rows = plain_rows(down);
    let bias = super::wide(&down.bias);
    let bounds: Vec<f64> = rows.iter().zip(&bias).map(|(r, b)| norm(r) * given * SLACK + b.abs()).collect();
    // As many bits as the ring has room for, and two of either at a time fewer.
    let units = finest(&rows);
    let mut scales = (0..3).map(|less| (F_ACTIVATED - 2 * less, if times.is_some() { F_UP - 2 * less } else { 0 }));
    let (f_activated, f_up) = scales
        .clone()
        .find(|(a, u)| ring_of(&bounds, &units, a + u) <= WIDEST)
        .or(scales.next_back())
        .unwrap_or((0, 0));
    let down = wide(&format!("{name} down"), &rows, &bias, &bounds, f_activated + f_up)?;
    let series = Arc::new(series);
    Ok((MlpPlan { act, series, f_activated, times, f_up, down }, norm(&bounds) * SLACK))
}

/// Ranges of a nonlinearity's inputs, in steps of two, so that few different series are fitted.
fn ranges(bounds: &[f64]) -> Vec<f64> {
    bounds.iter().map(|b| 2.0 * libm::ceil(b * SLACK / 2.0).max(1.0)).collect()
}

/// Ring of a nonlinearity's input, of which a series' period is half.
fn period(rows: &[Vec<f64>], ranges: &[f64], f: i32) -> u32 {
    let needed = |(r, range): (&Vec<f64>, &f64)| libm::log2(2.3 * range * WEIGHT / largest(r)) + f64::from(f + 1);
    libm::floor(rows.iter().zip(ranges).map(needed).fold(f64::INFINITY, f64::min)).max(1.0) as u32
}

/// The layer before the nonlinearity: its units make each channel's series have the period `2^(k - 1)`.
fn activation(
    op: &str,
    c: &Config,
    rows: &[Vec<f64>],
    bias: &[f64],
    bounds: &[f64],
    f: i32,
) -> Result<(Wide, Vec<Vec<f64>>), Error> {
    let ranges = ranges(bounds);
    let k = period(rows, &ranges, f);
    if k > WIDEST {
        return Err(refuse(op, format!("inputs proven up to {:.0} need a ring of {k} bits", max(bounds))));
    }
    let units: Vec<f64> = ranges.iter().map(|r| 2.3 * r * pow2(f + 1 - k as i32)).collect();
    let even: fn(f64) -> f64 = match c.activation {
        Activation::Silu => |x| x * libm::tanh(x / 2.0) / 2.0,
        Activation::GeluNew => |x| {
            let inner = libm::sqrt(2.0 / std::f64::consts::PI) * (x + 0.044715 * x * x * x);
            x * libm::tanh(inner) / 2.0
        },
    };
    let mut fits = std::collections::BTreeMap::new();
    let mut series = Vec::with_capacity(rows.len());
    for range in &ranges {
        let fit = fits.entry(*range as u64).or_insert_with(|| fit_even(even, *range, 2.3 * range, 1e-3));
        let fit = fit.clone().ok_or_else(|| refuse(op, format!("no series for inputs up to {range}")))?;
        series.push(fit);
    }
    Ok((Wide { layer: quantise(op, &super::slices(rows), bias, units, f, bounds)?, k }, series))
}
