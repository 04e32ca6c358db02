//! The encoder as a list of operations; reads like the table of a transformer block.
//!
//! 17 rounds a block. What passes from one half of a block to the next is the normalised row before its gain and shift, a share: the
//! product of a row and its inverse root, truncated to [`F`] bits. All that reads it is linear, so the next layer's weights take
//! gain and shift in, and so does the row that the residual goes on with ([`Gain`]), which is opened beside a later layer's
//! accumulators. Queries and keys are their accumulators truncated, in a ring that has the scores' bits left then. No
//! norm takes a mean out: what is added to the residual has none.

use super::attention::{Attend, attention_ring, depth, level_bits};
use super::build::{Activated, Build, Part, log2_ceil, scales};
use super::factors::Factors;
use super::prove::prove;
use super::{
    Block, F, F_ATTENTION, F_GELU, F_LARGEST, F_NORMALISED, F_PUBLIC, F_SERIES, F_VALUE, K_GELU_IN, K_LAYER, K_SCORE,
    Layer, NormPlan, Planner, pow2, refuse,
};
use crate::Error;
use crate::gates::broadcast::Broadcast;
use crate::gates::grid::Grid;
use crate::gates::local::Gain;
use crate::gates::pad::{self, PadKeys};
use crate::gates::product::{HeadProduct, Side};
use crate::gates::spline::Scales;
use crate::program::{Id, Kind, Outcome, Program, Value};

/// Ring of the last rows' pooling, and the most that theirs may have.
const K_POOL: u32 = 32;

/// Rings of a normalised row at `2^-F`: of one that the MLP reads, and of the last, from which its gain is taken as it is. Where
/// attention reads it, queries and keys need what scores do and the bits that they drop.
const K_MLP: u32 = 34;
const K_LAST: u32 = 44;
/// Most fraction bits of gains.
const F_GAIN: i32 = 14;
/// Bits below a unit that the residual's part and the last rows are kept with.
const F_BELOW: i32 = 2;

/// A row's values before its norm, and its sum of squares; shares.
struct Residual {
    x: Id,
    square: Id,
}

struct Emit<'a> {
    p: &'a Planner,
    t: usize,
    b: Build,
}

/// Ring in which a block's attention reads.
fn ring_of(b: &Block) -> u32 {
    (K_SCORE + b.query.drop.max(b.key.drop)).max(K_MLP)
}

/// Ring of a row before its norm, and of everything in it, where what the norm gives is read in the ring `k`.
fn norm_ring(n: &NormPlan, d: usize, k: u32) -> Result<u32, Error> {
    let ring = norm_scales(n, d).ring().max(product_ring(k));
    match ring {
        ..=62 => Ok(ring),
        _ => Err(refuse("layer norm", format!("the proven sum of squares needs a ring of {ring} bits"))),
    }
}

/// Ring of the product of a row and its inverse root, which truncation makes one of `k` bits.
fn product_ring(k: u32) -> u32 {
    k + (F_NORMALISED - F) as u32
}

impl Emit<'_> {
    /// A normalised row before its gain, a share at `2^-F` in the ring `k`: two rounds.
    fn norm(&mut self, name: &str, r: Residual, n: &NormPlan, k: u32) -> Id {
        let (t, d) = (self.t, self.p.hidden);
        let [x, v] = self.b.open([r.x, r.square]);
        let unit = d as f64 * pow2(2 * F);
        let scales = norm_scales(n, d);
        let (floor, eps) = (pow2(scales.drop as i32 - 1), self.p.eps * unit);
        let one = pow2(F_NORMALISED) * libm::sqrt(d as f64);
        let f = move |v: f64| one / libm::sqrt(v.max(floor) + eps);
        let k_product = product_ring(k);
        let r = self.b.row_function(&format!("{name} rsqrt"), v, (scales, 7), k_product, f);
        let [r] = self.b.open([r]);
        let bound = libm::sqrt(d as f64) * super::SLACK * pow2(F_NORMALISED);
        let y = self.b.value(&format!("{name} normalised"), &[t, d], k_product, pow2(-F_NORMALISED), bound);
        self.b.op(
            Kind::Broadcast(Broadcast { rows: t, cols: d, dim: d, k_x: self.b.values[x].bits, k: k_product }),
            &[x, r],
            &[y],
        );
        self.b.truncate(y, (F_NORMALISED - F) as u32)
    }

    /// A normalised row with its gain and shift, in a ring narrower than its own, a share at `2^-(F + F_BELOW)`.
    fn gained(&mut self, name: &str, y: Id, n: &NormPlan, centred: bool) -> Result<Id, Error> {
        let (k, d) = (self.b.values[y].bits, n.gain.len() as f64);
        let bound = if centred { n.output_without_mean() } else { n.output() };
        let f = F_GAIN.min(k as i32 - 2 - F - log2_ceil(bound) as i32);
        if f < F_BELOW + 6 {
            return Err(refuse(name, format!("a gain that gives up to {bound:.0} leaves {f} bits for its scale")));
        }
        let ints = |v: &[f64], by: f64| v.iter().map(|v| libm::round(v * by) as i64).collect::<Vec<_>>();
        let mean = if centred { ints(&n.gain, pow2(f) / d) } else { Vec::new() };
        let shift = if centred { n.bias.iter().sum::<f64>() / d } else { 0.0 };
        let bias: Vec<f64> = n.bias.iter().map(|b| b - shift).collect();
        let g = Gain { k, gain: ints(&n.gain, pow2(f)), mean, bias: ints(&bias, pow2(F + f)) };
        let x = self.b.value(name, &[self.t, n.gain.len()], k, pow2(-F - f), bound * pow2(F + f));
        self.b.op(Kind::Gain(g), &[y], &[x]);
        // The residual's part is rescaled by a power of two.
        Ok(self.b.truncated(x, (f - F_BELOW) as u32, centred))
    }

    /// The next residual in the ring `k`, of a layer that reads `y` and the row before, which are opened here.
    fn onto(&mut self, name: &str, y: Id, l: &Layer, before: (Id, f64), n: &NormPlan, k: u32) -> Residual {
        let acc = self.b.linear(&format!("{name} accumulators"), y, self.t, l, K_LAYER);
        let (acc, scale) = self.b.resolved(acc, &l.ulp.times(F));
        let [acc, x] = self.b.open([acc, before.0]);
        let unit = Factors::even(pow2(-F_BELOW), scale.len());
        let layer = Part { x: acc, scale: &scale, bound: l.bound * pow2(F) };
        let before = (x, Some(&unit), before.1 * pow2(F));
        let largest = n.input * n.input * pow2(2 * F);
        let [x, square] = self.b.residual(name, layer, before, (k, pow2(-F)), (0, k, largest));
        Residual { x, square }
    }

    /// The share that attention's output layer reads, at `2^-F_ATTENTION`: ten rounds, the last of which is the caller's.
    fn attention(&mut self, y: Id, keep: Id, b: &Block) -> Id {
        let (t, d, heads) = (self.t, self.p.hidden, self.p.heads);
        let (dim, grid) = (d / heads, Grid::square(t));
        let f_exp = F_LARGEST + depth(&b.heads, K_SCORE);
        let k_av = attention_ring(t, b.value_bound, f_exp + F_VALUE);
        let [q, k] = [("query", &b.query), ("key", &b.key)].map(|(name, o)| {
            let acc = self.b.linear(name, y, t, &o.layer, K_SCORE + o.drop);
            self.b.truncate(acc, o.drop)
        });
        let acc = self.b.linear("value accumulators", y, t, &b.value, K_LAYER);
        let (acc, scale) = self.b.resolved(acc, &b.value.ulp.times(F_VALUE));
        let [q, k, acc] = self.b.open([q, k, acc]);
        let value = b.value_bound * pow2(F_VALUE);
        let v = self.b.rescale("value", acc, 0, d, &scale, &[], k_av, pow2(-F_VALUE), value);
        let s = self.b.value(
            "scores (log2)",
            &[heads, t, t],
            K_SCORE,
            0.0,
            b.score_units.iter().copied().fold(0.0, f64::max),
        );
        let product = HeadProduct { side: Side::Scores, grid, heads, kv_heads: heads, dim, k: K_SCORE };
        self.b.op(Kind::Product(product), &[q, k], &[s]);
        let levels = vec![pad::LEVELS; heads];
        let hide = PadKeys { grid, levels, level_bits: level_bits(&b.heads), k: K_SCORE };
        let s = self.b.hide_padding(s, keep, hide, &b.score_units);
        let (s, scored) = self.b.scored(s, &b.heads);
        let [s, v] = self.b.open([s, v]);
        let attend = Attend {
            grid,
            heads: &scored,
            kv_heads: heads,
            dim,
            value_bound: b.value_bound,
            f_value: F_VALUE,
            k_av,
            k: self.b.values[s].bits,
            f_exp,
            f_pub: F_PUBLIC,
            f_sum: depth(&b.heads, K_SCORE) + 1,
            // As fine as the exponentials.
            f_out: f_exp,
            f_recip: b.f_recip,
            k_out: K_LAYER,
            f_result: F_ATTENTION,
            degree: 3,
            rho: 7,
            wide: true,
            few_rows: false,
        };
        self.b.attend(s, v, &attend)
    }

    /// The share that the MLP's last layer reads: three rounds, the last of which is the caller's.
    fn activated(&mut self, y: Id, b: &Block) -> Id {
        let h = self.b.linear("GELU input", y, self.t, &b.up, K_GELU_IN);
        let (h, scale) = self.b.resolved(h, &b.up.ulp.times(F_GELU));
        let [h] = self.b.open([h]);
        let act = Activated {
            h,
            curves: &b.gelu,
            scale: &scale,
            f: F_GELU,
            f_series: F_SERIES,
            k: K_LAYER,
            bound: b.up.bound,
        };
        self.b.activated("GELU", act)
    }
}

fn norm_scales(n: &NormPlan, d: usize) -> Scales {
    let unit = d as f64 * pow2(2 * F);
    scales(n.input * n.input * pow2(2 * F), 0.03 * unit, 3.0, 3)
}

/// See [`Planner::program`].
pub fn program(p: &Planner, t: usize) -> Result<Program, Error> {
    let d = p.hidden;
    let mut e = Emit { p, t, b: Build::default() };
    let first = p.blocks.first().map_or(K_LAST, ring_of);
    let root = libm::sqrt(d as f64) * super::SLACK;
    let input = e.b.value("normalised text", &[t, d], first, pow2(-F), root * pow2(F));
    let keep = e.b.value("rows that are not padding", &[t], K_POOL, 1.0, 1.0);
    e.b.op(Kind::Input, &[], &[input, keep]);
    let (mut y, mut norm) = (input, &p.embedded);
    for (i, b) in p.blocks.iter().enumerate() {
        e.b.layer = format!("layer {i}: ");
        let next = p.blocks.get(i + 1).map_or(K_LAST, ring_of);
        let before = (e.gained("residual before attention", y, norm, true)?, norm.output_without_mean());
        let a = e.attention(y, keep, b);
        let k = norm_ring(&b.attention_norm, d, K_MLP)?;
        let r = e.onto("attention output", a, &b.attention_out, before, &b.attention_norm, k);
        y = e.norm("attention norm", r, &b.attention_norm, K_MLP);
        let before =
            (e.gained("residual before the MLP", y, &b.attention_norm, true)?, b.attention_norm.output_without_mean());
        let g = e.activated(y, b);
        let k = norm_ring(&b.output_norm, d, next)?;
        let r = e.onto("output", g, &b.down, before, &b.output_norm, k);
        y = e.norm("output norm", r, &b.output_norm, next);
        norm = &b.output_norm;
    }
    e.b.layer = String::new();
    let x = e.gained("rows", y, norm, false)?;
    let Value { bits: k, ulp, bound: last, .. } = e.b.values[x].clone();
    let output = if p.mean {
        let [x, keep] = e.b.open([x, keep]);
        let sum = e.b.value("sum of rows", &[1, d], K_POOL, ulp, t as f64 * last);
        let product = HeadProduct {
            side: Side::Attend,
            grid: Grid { rows: 1, keys: t, causal: false },
            heads: 1,
            kv_heads: 1,
            dim: d,
            k: K_POOL,
        };
        e.b.op(Kind::Product(product), &[keep, x], &[sum]);
        sum
    } else {
        let first = e.b.value("first row", &[1, d], k, ulp, last);
        e.b.op(Kind::First { cols: d }, &[x], &[first]);
        first
    };
    let program = Program {
        values: e.b.values,
        ops: e.b.ops,
        past: 0,
        tokens: t,
        inputs: vec![input, keep],
        output,
        carried: [Vec::new(), Vec::new()],
        result: if p.mean { Outcome::Sum } else { Outcome::First },
        digest: [0; 32],
    };
    prove(&program)?;
    Ok(program.seal(&p.model))
}
