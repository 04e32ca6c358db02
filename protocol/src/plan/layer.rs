//! Planning one block of a decoder: its quantised layers, the bound of every accumulator and score, and what it can add to
//! the residual.
//!
//! What takes long, the bounds on matrices, depends on the block's weights alone ([`bounded`]); scales and rings depend on the
//! residual before it too ([`Bounded::plan`]). So blocks are planned side by side, and only the sum of what they add goes from
//! one to the next.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::activation::{Activation as Pieces, Curves, half_ring};
use super::attention::{STEP, attention_ring, depth};
use super::build::log2_ceil;
use super::decoder::{F_LARGEST, F_OUT, F_RECIP, K_SCORE, hidden_levels};
use super::factors::Factors;
use super::linalg::{Matrix, dot, eigenvalue_bound, norm};
use super::norm::{F_INPUT, F_RESIDUAL, HeadNorm, PreNorm};
use super::rows::{Fact, Rows, WIDEST, Wide, finest, quantise, ring_of};
use super::{SLACK, max, pow2, refuse};
use crate::Error;
use crate::gates::exp::Head;
use crate::gates::pad;
use crate::gates::rowmax::Levels;
use crate::model::Norm;
use crate::model::decoder::{Activation, Config, DecoderLayer, Mlp};

/// Most scales of the nonlinearity, finer than what its pieces are off by, and of what multiplies it, and the fewest that are
/// of use.
const F_ACTIVATED: (i32, i32) = (16, 12);
const F_UP: (i32, i32) = (13, 6);
/// Bits of the largest value that attention averages, point included, and most and fewest fraction bits of it.
const VALUE: u32 = 22;
const F_VALUE: (i32, i32) = (18, 14);
/// The fewest where the ring has no more room.
const F_VALUE_LEAST: i32 = 12;
/// Most fraction bits of what the MLP's last layer reads.
const F_DOWN: i32 = 18;
/// Bits of what multiplies the nonlinearity that are worth as many of the last layer's weights.
const F_UP_WORTH: i32 = 10;
/// Most multiply-accumulates for which spectral norms are bounded closely (minutes); above, by the Frobenius norm.
const CLOSE: usize = 10_000_000_000_000;
/// What a nonlinearity's pieces may be off by: about what roundings add to a series at 20 bits. A quarter of it takes a third more
/// harmonics.
const TOLERANCE: f64 = 1e-3;
/// log2 of the number of levels that a head's scores may take.
const LEVEL_BITS: std::ops::RangeInclusive<u32> = 6..=14;

/// The MLP: its first layers, each channel's series, and the last layer.
#[derive(Serialize, Deserialize)]
pub struct MlpPlan {
    /// What the nonlinearity is applied to.
    pub act: Wide,
    pub curves: Curves,
    /// Scale of its result.
    pub f_activated: i32,
    /// What multiplies it, and its scale.
    pub times: Option<Wide>,
    pub f_up: i32,
    /// Scale of what the last layer reads.
    pub f_down: i32,
    pub down: Wide,
}

impl MlpPlan {
    /// Ring of what is truncated for the last layer.
    pub fn ring(&self) -> u32 {
        self.down.k + (self.f_activated + self.f_up - self.f_down) as u32
    }
}

/// Queries or keys.
#[derive(Serialize, Deserialize)]
pub struct Projection {
    /// Of the normalised row; of the residual where heads have norms of their own.
    pub wide: Wide,
    pub norm: Option<HeadNorm>,
    /// From accumulators, or from normalised heads without fraction bits, to units; a product of a query's and a key's is a score's.
    pub to_scores: Factors,
    /// Bound on the norm of a pair of values, in units, which rotations keep.
    pub reach: f64,
    /// Of the residual itself, without constants: ring of the accumulators, and bound on them in units.
    pub direct: (u32, f64),
}

/// One block.
#[derive(Serialize, Deserialize)]
pub struct BlockPlan {
    pub attention_norm: PreNorm,
    pub query: Projection,
    pub key: Projection,
    pub values: Wide,
    pub heads: Vec<Head>,
    /// Bound of each head's scores in units, before padding.
    pub score_units: Vec<f64>,
    pub value_bound: f64,
    pub f_value: i32,
    pub k_av: u32,
    /// Scale of the weighted values.
    pub f_out: i32,
    pub output: Wide,
    pub mlp_norm: PreNorm,
    pub mlp: MlpPlan,
}

/// What all blocks are planned with.
pub struct Context<'a> {
    pub c: &'a Config,
    pub longest: usize,
    /// Smallest mean square that norms resolve.
    pub smallest: f64,
    /// Whether quantised weights are kept.
    pub keep: bool,
}

/// A head's rows on a normalised row, with their constants, and what its bounds need.
struct HeadRows {
    m: Matrix,
    constant: Vec<f64>,
    gram: Matrix,
    root: f64,
}

impl HeadRows {
    fn new(rows: &Rows, bias: &[f64], at: usize, dim: usize) -> HeadRows {
        let m = rows.matrix(at, dim);
        let gram = m.gram();
        HeadRows { root: libm::sqrt(m.cols as f64), m, constant: bias[at..][..dim].to_vec(), gram }
    }

    /// Bound on the norm of the head's values, each times its factor.
    fn reach(&self, factor: &[f64]) -> f64 {
        let n = factor.len();
        let mut g = self.gram.clone();
        g.data.iter_mut().enumerate().for_each(|(i, v)| *v *= factor[i / n] * factor[i % n]);
        let constant: Vec<f64> = self.constant.iter().zip(factor).map(|(c, f)| c * f).collect();
        libm::sqrt(eigenvalue_bound(&g, 6)) * self.root + norm(&constant)
    }
}

/// Bound on `|q . k|` over all pairs of normalised rows.
///
/// Without rotation the form is bilinear, `k` without a constant part: `sigma(Q^T K) d + |K^T c_q| sqrt(d)`. A rotation turns
/// value `i` with value `i + dim / 2`, so it commutes with one factor for each such pair: `|q . k| <= reach(D Q) reach(K / D)`
/// for any positive `D`, of which two are tried.
fn score_bound(q: &HeadRows, k: &HeadRows, rotates: bool) -> f64 {
    let dim = q.constant.len();
    let even = vec![1.0; dim];
    let mut bound = q.reach(&even) * k.reach(&even);
    if !rotates {
        let sigma = libm::sqrt(eigenvalue_bound(&q.gram.times(&k.gram), 7));
        return bound.min((sigma * q.root + norm(&k.m.transpose_times(&q.constant))) * q.root);
    }
    let weight = |h: &HeadRows, i: usize| {
        let one = |i: usize| h.gram.data[i * dim + i] * h.root * h.root + h.constant[i] * h.constant[i];
        libm::sqrt(one(i) + one(i + dim / 2)).max(1e-9)
    };
    let factor: Vec<f64> = (0..dim).map(|i| libm::sqrt(weight(k, i % (dim / 2)) / weight(q, i % (dim / 2)))).collect();
    let inverse: Vec<f64> = factor.iter().map(|f| 1.0 / f).collect();
    bound = bound.min(q.reach(&factor) * k.reach(&inverse));
    bound
}

/// Rows, what bounds and units are made of, and the bound of each.
struct Limited<'a> {
    rows: Rows<'a>,
    facts: Vec<Fact>,
    bounds: Vec<f64>,
}

impl<'a> Limited<'a> {
    /// Rows of a normalised row of `root` at most.
    fn reading(rows: Rows<'a>, root: f64) -> Limited<'a> {
        let facts = rows.facts();
        let bounds = facts.iter().zip(&rows.bias).map(|(f, b)| f.norm * root + b.abs()).collect();
        Limited { rows, facts, bounds }
    }
}

/// The MLP's part of [`Bounded`].
struct Feed<'a> {
    act: Limited<'a>,
    /// What half a ring of each input is worth, and its pieces.
    halves: Vec<f64>,
    curves: Curves,
    up: Option<Limited<'a>>,
    /// Bound on the norm of what the last layer reads.
    given: f64,
    down: Limited<'a>,
}

/// A block's bounds as far as they do not depend on the residual before it.
pub struct Bounded<'a> {
    l: &'a DecoderLayer,
    qkv: Limited<'a>,
    heads: Vec<Head>,
    score_units: Vec<f64>,
    q_scale: Vec<f64>,
    k_scale: Vec<f64>,
    value_bound: f64,
    output: Limited<'a>,
    mlp: Feed<'a>,
    /// What attention and the MLP can add to the residual's norm.
    adds: [f64; 2],
}

/// Bounds of the block called `name`.
pub fn bounded<'a>(name: &str, x: &Context, l: &'a DecoderLayer) -> Result<Bounded<'a>, Error> {
    let c = x.c;
    let (dim, root) = (c.head_dim, libm::sqrt(c.hidden as f64));
    let (group, rotates) = (c.heads / c.kv_heads, c.rope.is_some());

    // Queries, keys and values in one product.
    let mut rows = Rows::reading(c, &[&l.query, &l.key, &l.value], &l.attention_norm).rounded();
    let (keys_at, values_at) = (c.heads * dim, (c.heads + c.kv_heads) * dim);
    if !rotates {
        // What a key adds equally to every score of a row leaves softmax unchanged, where keys are not rotated.
        rows.bias[keys_at..values_at].fill(0.0);
    }
    let qkv = Limited::reading(rows, root);
    let head = |at: usize| HeadRows::new(&qkv.rows, &qkv.rows.bias, at, dim);
    let per_log2 = std::f64::consts::LOG2_E * c.score_scale();

    let (mut heads, mut score_units) = (Vec::new(), Vec::new());
    let (mut q_scale, mut k_scale) = (Vec::new(), Vec::new());
    // A head that is normalised has the norm sqrt(dim) before its gain.
    let normed = |n: &Norm| {
        let gain = n.weight.iter().fold(1e-30, |m: f64, g| m.max(f64::from(g.abs())));
        libm::sqrt(dim as f64) * gain * SLACK
    };
    for g in 0..c.kv_heads {
        let key = head(keys_at + g * dim);
        let mut key_scale = 0.0;
        for h in g * group..(g + 1) * group {
            let (bound, query_norm, key_norm) = match &l.query_key_norm {
                Some((q, k)) => (normed(q) * normed(k), normed(q), normed(k)),
                None => {
                    let query = head(h * dim);
                    (score_bound(&query, &key, rotates), norm(&query.m.data), norm(&key.m.data))
                }
            };
            let bound = bound * per_log2 * SLACK;
            // Scores take a half of the ring, padded keys the other, whatever their content is; eight levels of headroom.
            let levels = |b: u32| f64::from(hidden_levels(b) - pad::LEVELS) / 2.0;
            let level_bits = LEVEL_BITS.into_iter().find(|b| bound / levels(*b) <= STEP).ok_or_else(|| {
                refuse(&format!("{name} scores of head {h}"), format!("proven range {bound:.0} is too wide"))
            })?;
            let step = (bound / levels(level_bits)).max(STEP / 2.0);
            let ulp = step * pow2(level_bits as i32 - K_SCORE as i32);
            heads.push(Head { levels: Levels::all(level_bits), ulp });
            score_units.push(bound / ulp);
            if h == g * group {
                key_scale = libm::sqrt(per_log2 / ulp * query_norm.max(1e-30) / key_norm.max(1e-30));
            }
            q_scale.extend(std::iter::repeat_n(per_log2 / ulp / key_scale, dim));
        }
        k_scale.extend(std::iter::repeat_n(key_scale, dim));
    }

    // Attention output: per head a convex combination of value rows.
    let value_bound = max(&qkv.bounds[values_at..]) * SLACK;
    let values: Vec<HeadRows> = (0..c.kv_heads).map(|g| head(values_at + g * dim)).collect();
    let even = vec![1.0; dim];
    let reaches: Vec<f64> = values.iter().map(|v| v.reach(&even)).collect();
    let rows = Rows::writing(c, &l.output).rounded();
    let mixed = |j: usize| {
        let parts = rows.row(j);
        let heads = parts.chunks_exact(dim).enumerate().map(|(h, w)| norm(w) * reaches[h / group]);
        heads.sum::<f64>() * SLACK + rows.bias[j].abs()
    };
    let bounds: Vec<f64> = (0..rows.len).map(mixed).collect();
    let attention_adds = attention_adds(&rows, &values, &reaches, group, close(c)) * SLACK;
    let output = Limited { facts: rows.facts(), rows, bounds };
    drop(values);

    let (act, up, down) = match &l.mlp {
        Mlp::Gated { gate, up, down } => (gate, Some(up), down),
        Mlp::Plain { up, down } => (up, None, down),
    };
    let act = Limited::reading(Rows::reading(c, &[act], &l.mlp_norm), root);
    let up = up.map(|up| Limited::reading(Rows::reading(c, &[up], &l.mlp_norm).rounded(), root));
    let (halves, curves) = curves(name, c, &act.bounds)?;
    // `|f(a)| <= |a| <= alpha` for each channel, so the products' norm is at most that of `diag(alpha) (U y + c)`.
    let given = match &up {
        None => act.rows.sigma(&|_| 1.0, close(c)) * root + norm(&act.rows.bias),
        Some(up) => {
            let products: Vec<f64> = act.bounds.iter().zip(&up.bounds).map(|(a, b)| a * b).collect();
            let constants: Vec<f64> = up.rows.bias.iter().zip(&act.bounds).map(|(c, a)| c * a).collect();
            let spread = up.rows.sigma(&|j| act.bounds[j], close(c)) * root + norm(&constants);
            norm(&products).min(spread)
        }
    };
    let rows = Rows::writing(c, down).rounded();
    let facts = rows.facts();
    let bounds: Vec<f64> = facts.iter().zip(&rows.bias).map(|(f, b)| f.norm * given * SLACK + b.abs()).collect();
    let added = (rows.sigma(&|_| 1.0, close(c)) * given).min(norm(&bounds)) + norm(&rows.bias);
    let down = Limited { rows, facts, bounds };
    let adds = [attention_adds, added * SLACK];
    let mlp = Feed { act, halves, curves, up, given, down };
    Ok(Bounded { l, qkv, heads, score_units, q_scale, k_scale, value_bound, output, mlp, adds })
}

impl Bounded<'_> {
    /// A bound on the norm of what the residual is between attention and the MLP, and after them, from one on what it was
    /// before.
    pub fn residuals(&self, before: f64) -> [f64; 2] {
        let between = before + self.adds[0];
        [between, between + self.adds[1]]
    }

    /// The block called `name` on a residual of at most this norm.
    pub fn plan(self, name: &str, x: &Context, before: f64) -> Result<BlockPlan, Error> {
        let c = x.c;
        let [between, _] = self.residuals(before);
        let mut attention_norm = PreNorm::new(c, before, x.smallest);
        let Limited { rows, facts, bounds } = &self.qkv;
        let keys_at = c.heads * c.head_dim;
        let values_at = keys_at + c.kv_heads * c.head_dim;
        let values = values_at..rows.len;
        let units_of = |range: Range<usize>, scale: &[f64]| match c.rope {
            None => rows.units(&facts[range], scale),
            // What a rotation reads is scaled by sines.
            Some(_) => finest(&facts[range]),
        };
        let heads = [(0..keys_at, self.q_scale), (keys_at..values_at, self.k_scale)];
        let value_units = rows.units(&facts[values.clone()], &vec![1.0; values.len()]);
        let mut needed = ring_of(&bounds[values.clone()], &value_units, 0);
        if self.l.query_key_norm.is_none() {
            for (range, scale) in &heads {
                needed = needed.max(ring_of(&bounds[range.clone()], &units_of(range.clone(), scale), 0));
            }
        }
        attention_norm.spare(&format!("{name} attention norm"), needed)?;
        let projection = |part: &str, range: Range<usize>, scale: Vec<f64>, norm: Option<&Norm>| {
            let op = format!("{name} {part}");
            if let Some(n) = norm {
                let (norm, wide) = HeadNorm::new(&op, c, rows, range, n, (before, x.smallest), x.keep)?;
                let direct = (wide.k, wide.layer.units);
                let to_scores: Factors = times(&norm.unit(), &scale).into();
                // A head has this norm before its gain.
                let gained = times(&norm.gain, &scale).iter().fold(0f64, |m, s| m.max(s.abs()));
                let reach = 2.0 * libm::sqrt(c.head_dim as f64) * SLACK * gained;
                return Ok(Projection { wide, norm: Some(norm), to_scores, reach, direct });
            }
            let units = units_of(range.clone(), &scale);
            let wide = quantise(&op, rows, range.clone(), &units, &bounds[range.clone()], F_INPUT, x.keep)?;
            let reach: Vec<f64> = facts[range].iter().map(|f| f.norm * before).collect();
            let most = reach.iter().zip(&units).fold(0f64, |m, (r, u)| m.max(r * SLACK / u)) * pow2(F_RESIDUAL);
            let direct = (ring_of(&reach, &units, F_RESIDUAL), most);
            let to_scores: Factors = times(&Vec::from(wide.layer.ulp.clone()), &scale).into();
            let reach = 2.0 * wide.layer.units * to_scores.largest();
            Ok::<_, Error>(Projection { wide, norm: None, to_scores, reach, direct })
        };
        let [(queries, q_scale), (keys, k_scale)] = heads;
        let norms = self.l.query_key_norm.as_ref();
        let query = projection("query", queries, q_scale, norms.map(|n| &n.0))?;
        let key = projection("key", keys, k_scale, norms.map(|n| &n.1))?;
        let op = format!("{name} value");
        let values = quantise(&op, rows, values.clone(), &value_units, &bounds[values], F_INPUT, x.keep)?;
        let of_row = [&query, &key].into_iter().filter(|p| p.norm.is_none()).map(|p| p.wide.k);
        attention_norm.read_in(of_row.fold(values.k, u32::max));

        let Limited { rows, facts, bounds } = &self.output;
        let op = format!("{name} attention output");
        let units = rows.units(facts, &vec![1.0; rows.len]);
        let room = WIDEST as i32 - ring_of(bounds, &units, 0) as i32;
        let f_out = (room - F_RECIP).min(F_OUT.0);
        if f_out < F_OUT.1 {
            let reason = format!("accumulators proven up to {:.0} leave {f_out} bits for their scale", max(bounds));
            return Err(refuse(&op, reason));
        }
        let output = quantise(&op, rows, 0..rows.len, &units, bounds, F_INPUT, x.keep)?;

        let mut mlp_norm = PreNorm::new(c, between, x.smallest);
        let f_exp = F_LARGEST + depth(&self.heads, K_SCORE);
        let room = WIDEST as i32 - attention_ring(x.longest, self.value_bound, f_exp) as i32;
        let f_value = (VALUE as i32 - log2_ceil(self.value_bound) as i32).clamp(F_VALUE.1, F_VALUE.0).min(room);
        if f_value < F_VALUE_LEAST {
            let reason = format!("values proven up to {:.0} leave {f_value} bits for their scale", self.value_bound);
            return Err(refuse(&format!("{name} attention"), reason));
        }
        let k_av = attention_ring(x.longest, self.value_bound, f_exp + f_value);
        let mlp = self.mlp.plan(name, x, &mut mlp_norm)?;
        mlp_norm.read_in(mlp.act.k.max(mlp.times.as_ref().map_or(0, |w| w.k)));
        Ok(BlockPlan {
            attention_norm,
            query,
            key,
            values,
            heads: self.heads,
            score_units: self.score_units,
            value_bound: self.value_bound,
            f_value,
            k_av,
            f_out,
            output,
            mlp_norm,
            mlp,
        })
    }
}

fn times(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a * b).collect()
}

/// Whether spectral norms of the MLPs are bounded closely.
fn close(c: &Config) -> bool {
    let each = c.hidden.saturating_mul(c.hidden).saturating_mul(c.intermediate);
    c.layers.saturating_mul(each) <= CLOSE
}

/// Bound on the norm of `sum_h O_h a_h + b`, where `a_h` is a convex combination of head values `V_g y + c_g`: the smaller of
/// `sum_h sigma(O_h V_g) sqrt(d) + |O_h c_g|` and `sigma(O)` times the norm of all heads side by side.
fn attention_adds(rows: &Rows, values: &[HeadRows], reaches: &[f64], group: usize, close: bool) -> f64 {
    let dim = values[0].constant.len();
    // O_h^T O_h of every head.
    let heads = rows.cols / dim;
    let mut grams = vec![0.0; heads * dim * dim];
    for j in 0..rows.len {
        let row = rows.row(j);
        for (g, w) in grams.chunks_exact_mut(dim * dim).zip(row.chunks_exact(dim)) {
            for (out, a) in g.chunks_exact_mut(dim).zip(w) {
                out.iter_mut().zip(w).for_each(|(o, b)| *o += a * b);
            }
        }
    }
    let each = grams.chunks_exact(dim * dim).enumerate().map(|(h, g)| {
        let (v, g) = (&values[h / group], Matrix { rows: dim, cols: dim, data: g.to_vec() });
        let moved: Vec<f64> = (0..dim).map(|i| dot(g.row(i), &v.constant)).collect();
        let constant = libm::sqrt(dot(&moved, &v.constant).max(0.0));
        libm::sqrt(eigenvalue_bound(&g.times(&v.gram), 6)) * v.root + constant
    });
    let apart: f64 = each.sum();
    let together = libm::sqrt(reaches.iter().map(|r| r * r).sum::<f64>() * group as f64);
    apart.min(rows.sigma(&|_| 1.0, close) * together) + norm(&rows.bias)
}

impl Feed<'_> {
    fn plan(self, name: &str, x: &Context, n: &mut PreNorm) -> Result<MlpPlan, Error> {
        let Limited { rows, facts, bounds } = &self.act;
        let needed = self.up.as_ref().map_or(0, |up| ring_of(&up.bounds, &finest(&up.facts), 0));
        n.spare(&format!("{name} MLP norm"), needed.max(input_ring(facts, &self.halves, 0)))?;
        let f = F_INPUT;
        let op = format!("{name} nonlinearity");
        let k = input_ring(facts, &self.halves, f);
        if k > WIDEST {
            return Err(refuse(&op, format!("inputs proven up to {:.0} need a ring of {k} bits", max(bounds))));
        }
        let units: Vec<f64> = self.halves.iter().map(|h| h * pow2(f + 1 - k as i32)).collect();
        let mut act = quantise(&op, rows, 0..rows.len, &units, bounds, f, x.keep)?;
        act.k = k;
        let quantised = |up: &Limited| {
            quantise(&format!("{name} up"), &up.rows, 0..up.rows.len, &finest(&up.facts), &up.bounds, f, x.keep)
        };
        let times = self.up.as_ref().map(quantised).transpose()?;
        let Limited { rows, facts, bounds } = &self.down;
        // As many bits as the ring has room for, the nonlinearity's before those of what multiplies it: a series adds up
        // roundings of half as many.
        let mut units = rows.units(facts, &vec![1.0; rows.len]);
        let op = format!("{name} down");
        let mut room = WIDEST as i32 - ring_of(bounds, &units, 0) as i32;
        if times.is_some() {
            // Weights of ten bits lose less than products of a few would.
            let less = (F_ACTIVATED.0 + F_UP_WORTH - room).clamp(0, if rows.is_rounded() { 0 } else { 2 });
            units.iter_mut().for_each(|u| *u *= pow2(less));
            room += less;
        }
        let f_up = if times.is_some() { (room - F_ACTIVATED.0).clamp(F_UP.1, F_UP.0) } else { 0 };
        let f_activated = (room - f_up).min(F_ACTIVATED.0);
        if f_activated < F_ACTIVATED.1 {
            let reason = format!("products proven up to {:.0} leave {f_activated} bits for their scale", self.given);
            return Err(refuse(&op, reason));
        }
        let f_down = (f_activated + f_up).min(F_DOWN);
        let down = quantise(&op, rows, 0..rows.len, &units, bounds, f_down, x.keep)?;
        Ok(MlpPlan { act, curves: self.curves, f_activated, times, f_up, f_down, down })
    }
}

/// Ring of a nonlinearity's input, half of which is what each channel's pieces were made for.
fn input_ring(facts: &[Fact], halves: &[f64], f: i32) -> u32 {
    let needed = |(r, half): (&Fact, &f64)| libm::log2(half / r.unit) + f64::from(f + 1);
    libm::floor(facts.iter().zip(halves).map(needed).fold(f64::INFINITY, f64::min)).max(1.0) as u32
}

/// Each channel's pieces of the nonlinearity, and what half a ring is worth for them.
fn curves(name: &str, c: &Config, bounds: &[f64]) -> Result<(Vec<f64>, Curves), Error> {
    let even: fn(f64) -> f64 = match c.activation {
        Activation::Silu => |x| x * libm::tanh(x / 2.0) / 2.0,
        Activation::GeluNew => |x| {
            let inner = libm::sqrt(2.0 / std::f64::consts::PI) * (x + 0.044715 * x * x * x);
            x * libm::tanh(inner) / 2.0
        },
    };
    let mut pieces = Pieces::new(even, TOLERANCE);
    let curve = |b: &f64| {
        let none = || refuse(&format!("{name} nonlinearity"), format!("no series for inputs up to {b:.0}"));
        pieces.curve(half_ring(*b)).ok_or_else(none)
    };
    let (halves, curves): (Vec<f64>, Vec<_>) = bounds.iter().map(curve).collect::<Result<_, _>>()?;
    Ok((halves, Curves::new(&curves)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A head of uneven pairs, as trained ones have, on rows of `cols` values.
    fn head(dim: usize, cols: usize, large: (usize, f64), noise: &mut impl FnMut() -> f64) -> HeadRows {
        let mut m = Matrix { rows: dim, cols, data: (0..dim * cols).map(|_| noise()).collect() };
        m.data[large.0 * cols..][..cols].iter_mut().for_each(|v| *v *= large.1);
        let mut constant: Vec<f64> = (0..dim).map(|_| noise()).collect();
        constant[large.0] *= large.1;
        HeadRows { gram: m.gram(), root: libm::sqrt(cols as f64), m, constant }
    }

    fn rotate(x: &[f64], angle: impl Fn(usize) -> f64) -> Vec<f64> {
        let half = x.len() / 2;
        let turned = |i: usize| {
            let (s, c) = libm::sincos(angle(i % half));
            if i < half { c * x[i] - s * x[i + half] } else { s * x[i - half] + c * x[i] }
        };
        (0..x.len()).map(turned).collect()
    }

    /// The largest score that alternating between both rows and turning pairs onto one another finds, from below.
    fn found(q: &HeadRows, k: &HeadRows, rotates: bool, noise: &mut impl FnMut() -> f64) -> f64 {
        let value = |h: &HeadRows, y: &[f64]| -> Vec<f64> {
            (0..h.constant.len()).map(|i| dot(h.m.row(i), y) + h.constant[i]).collect()
        };
        let unit = |y: Vec<f64>| -> Vec<f64> {
            let by = libm::sqrt(y.len() as f64) / norm(&y);
            y.iter().map(|v| v * by).collect()
        };
        let mut best = 0f64;
        for _ in 0..10 {
            let mut y: [Vec<f64>; 2] = std::array::from_fn(|_| unit((0..q.m.cols).map(|_| noise()).collect()));
            for _ in 0..30 {
                let (a, b) = (value(q, &y[0]), value(k, &y[1]));
                let half = a.len() / 2;
                let angle = |i: usize| libm::atan2(a[i + half], a[i]) - libm::atan2(b[i + half], b[i]);
                let turn = |x: &[f64], sign: f64| if rotates { rotate(x, |i| sign * angle(i)) } else { x.to_vec() };
                best = best.max(dot(&a, &turn(&b, 1.0)));
                y = [unit(q.m.transpose_times(&turn(&b, 1.0))), unit(k.m.transpose_times(&turn(&a, -1.0)))];
            }
        }
        best
    }

    #[test]
    fn scores_are_bounded_and_not_by_far_too_much() {
        let mut state = 1u64;
        let mut noise = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f64 / (1 << 24) as f64 - 0.5
        };
        for (large_q, large_k) in [((0, 1.0), (0, 1.0)), ((3, 20.0), (5, 1.0)), ((2, 0.1), (2, 60.0))] {
            let (q, mut k) = (head(8, 24, large_q, &mut noise), head(8, 24, large_k, &mut noise));
            let (bound, below) = (score_bound(&q, &k, true), found(&q, &k, true, &mut noise));
            assert!(bound >= below && bound < 4.0 * below, "rotated: {bound} for {below}");
            k.constant.fill(0.0);
            let (bound, below) = (score_bound(&q, &k, false), found(&q, &k, false, &mut noise));
            assert!(bound >= below && bound < 4.0 * below, "{bound} for {below}");
        }
    }
}
