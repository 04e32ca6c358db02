//! The encoder as a list of operations; reads like the table of a transformer block.

use std::sync::Arc;

use super::prove::prove;
use super::{Block, F, F_GELU, F_GELU_OUT, F_VALUE, K_GELU_IN, K_SCORE, Layer, NormPlan, Planner, pow2, refuse};
use crate::Error;
use crate::gates::bits::{And, CountClear};
use crate::gates::broadcast::{Broadcast, Variance};
use crate::gates::cosine::Cosine;
use crate::gates::exp::{Exp, FlagRescale};
use crate::gates::grid::Grid;
use crate::gates::pad::{self, PadKeys};
use crate::gates::piecewise::{Piecewise, STRIDE, Select, fit_quadratics};
use crate::gates::product::{HeadProduct, Side};
use crate::gates::rescale::Rescale;
use crate::gates::rowmax::RowMax;
use crate::program::{Id, Kind, Op, Program, Value};

/// Scale of the inverse square root, of the reciprocal, of exponentials, and of unnormalised attention outputs.
const F_RSQRT: i32 = 50;
const F_RECIP: i32 = 28;
const F_EXP: i32 = 16;
const F_OUT: i32 = 16;
/// Ring of level counts.
const K_LEVEL: u32 = 12;
/// Ring of the last rows and of their pooling.
const K_POOL: u32 = 32;

struct Emit<'a> {
    p: &'a Planner,
    t: usize,
    values: Vec<Value>,
    ops: Vec<Op>,
    layer: String,
    /// Ring of the residual stream and of everything in a norm.
    k_norm: u32,
}

/// Integer multipliers and their common exponent for real scales.
fn fixed(c: &[f64]) -> (Vec<i64>, u32) {
    let top = c.iter().fold(0f64, |m, c| m.max(c.abs())).max(1e-30);
    let shift = (26 - libm::ceil(libm::log2(top)) as i32).clamp(0, 100);
    (c.iter().map(|c| libm::round(c * pow2(shift)) as i64).collect(), shift as u32)
}

fn log2_ceil(x: f64) -> u32 {
    libm::ceil(libm::log2(x.max(1.0))) as u32
}

/// Widest window's exponent and number of scales for a positive value up to `hi` units, of use down to `lo`.
fn scales(hi: f64, lo: f64, windows_at_lo: f64) -> (u32, usize) {
    let top = log2_ceil(hi / 63.0);
    let finest = libm::log2((lo / windows_at_lo).max(1.0));
    let n = 1 + libm::round((top as f64 - finest).max(0.0) / STRIDE as f64) as u32;
    let n = n.clamp(1, 8).min(1 + top / STRIDE);
    (top - STRIDE * (n - 1), n as usize)
}

impl Emit<'_> {
    /// `bound` is in units.
    fn value(&mut self, name: &str, shape: &[usize], bits: u32, ulp: f64, bound: f64) -> Id {
        let name = format!("{}{name}", self.layer);
        self.values.push(Value { name, shape: shape.to_vec(), bits, xor: false, ulp, bound });
        self.values.len() - 1
    }

    fn bits(&mut self, name: &str, shape: &[usize]) -> Id {
        let v = self.value(name, shape, 64, 0.0, 0.0);
        self.values[v].xor = true;
        v
    }

    fn op(&mut self, kind: Kind, inputs: &[Id], outputs: &[Id]) {
        self.ops.push(Op { kind, inputs: inputs.to_vec(), outputs: outputs.to_vec() });
    }

    /// One round for all of `shares`.
    fn open<const N: usize>(&mut self, shares: [Id; N]) -> [Id; N] {
        let out = shares.map(|s| {
            self.values.push(self.values[s].clone());
            self.values.len() - 1
        });
        self.op(Kind::Open, &shares, &out);
        out
    }

    fn linear(&mut self, name: &str, x: Id, l: &Layer, bits: u32) -> Id {
        let out = self.value(name, &[self.t, l.ulp.len()], bits, 0.0, l.units);
        self.op(Kind::Linear { rows: self.t, layer: Arc::clone(&l.linear) }, &[x], &[out]);
        out
    }

    #[allow(clippy::too_many_arguments)]
    fn rescale(
        &mut self,
        name: &str,
        x: Id,
        first: usize,
        stride: usize,
        scale: &[f64],
        bias: &[f64],
        k_out: u32,
        ulp: f64,
        bound: f64,
    ) -> Id {
        let (mult, shift) = fixed(scale);
        let k_in = self.values[x].bits;
        let bias = bias.iter().map(|b| libm::round(*b) as i64).collect();
        let rows = self.values[x].len() / stride;
        let out = self.value(name, &[rows, mult.len()], k_out, ulp, bound + 2.0);
        self.op(Kind::Rescale(Rescale { rows, stride, first, mult, shift, k_in, k_out, bias }), &[x], &[out]);
        out
    }

    /// `f` of a masked positive scalar per row: two rounds; the last opening is the caller's.
    #[allow(clippy::too_many_arguments)]
    fn row_function(
        &mut self,
        name: &str,
        x: Id,
        drop: u32,
        scales: usize,
        k_out: u32,
        rho: u32,
        f: impl Fn(f64) -> f64,
        beside: Option<Id>,
    ) -> (Id, Option<Id>) {
        let rows = self.values[x].len();
        let coef = fit_quadratics(f, drop, scales);
        // A scale outside its range may give anything; what is chosen is at most what the first window gives.
        let bound = coef[0][0].iter().map(|c| c.abs()).sum::<f64>();
        let anything = libm::exp2(f64::from(k_out - 1));
        let gate = Piecewise { rows, k_in: self.values[x].bits, drop, scales, coef, rho_bits: rho.min(drop), k_out };
        let v = self.value(&format!("{name} at {scales} scales"), &[rows, scales], k_out, 0.0, anything);
        let b = self.bits(&format!("{name} flags"), &[rows]);
        self.op(Kind::Piecewise(gate), &[x], &[v, b]);
        let (v, b, beside) = match beside {
            Some(o) => {
                let [v, b, o] = self.open([v, b, o]);
                (v, b, Some(o))
            }
            None => {
                let [v, b] = self.open([v, b]);
                (v, b, None)
            }
        };
        let r = self.value(name, &[rows], k_out, 0.0, bound);
        self.op(Kind::Select(Select { rows, scales, k: k_out }), &[v, b], &[r]);
        (r, beside)
    }

    /// Layer norm of a share at `2^-F`: five rounds.
    fn norm(&mut self, name: &str, x: Id, n: &NormPlan, k_out: u32) -> Result<Id, Error> {
        let (t, d, k) = (self.t, self.p.hidden, self.k_norm);
        let [x] = self.open([x]);
        let v = self.value(&format!("{name} variance"), &[t], k, 0.0, d as f64 * n.input * n.input * pow2(2 * F));
        self.op(Kind::Variance(Variance { rows: t, cols: d, centre: true, k }), &[x], &[v]);
        let [v] = self.open([v]);
        // The variance term is d ||x - mean||^2 = d^2 var, in units of 2^-2F.
        let unit = (d * d) as f64 * pow2(2 * F);
        let (drop, scales) = norm_scales(n, d);
        let floor = pow2(drop as i32 - 1);
        let eps = self.p.eps * unit;
        let f = move |v: f64| pow2(F_RSQRT) / libm::sqrt(v.max(floor) + eps);
        let (r, _) = self.row_function(&format!("{name} rsqrt"), v, drop, scales, k, 7, f, None);
        let [r] = self.open([r]);
        let bound = libm::sqrt(d as f64) * super::SLACK;
        let y = self.value(&format!("{name} normalised"), &[t, d], k, pow2(-F_RSQRT), bound * pow2(F_RSQRT));
        self.op(Kind::Broadcast(Broadcast { rows: t, cols: d, dim: d, centre: true, k }), &[x, r], &[y]);
        let [y] = self.open([y]);
        let scale: Vec<f64> = n.gain.iter().map(|g| g * pow2(F - F_RSQRT)).collect();
        let bias: Vec<f64> = n.bias.iter().map(|b| b * pow2(F)).collect();
        Ok(self.rescale(name, y, 0, d, &scale, &bias, k_out, pow2(-F), n.output() * pow2(F)))
    }

    fn attention(&mut self, x: Id, keep: Id, b: &Block) -> Id {
        let (t, d, heads) = (self.t, self.p.hidden, self.p.heads);
        let (dim, grid) = (d / heads, Grid::square(t));
        let acc = self.linear("query, key, value accumulators", x, &b.qkv, 32);
        let [acc] = self.open([acc]);
        // Ring in which sum_j e_j v_j fits: e_j <= 1 at 2^-F_EXP, |v| <= value_bound at 2^-F_VALUE.
        let k_av = log2_ceil(t as f64 * b.value_bound * super::SLACK) + (F_EXP + F_VALUE) as u32 + 2;
        let s: Vec<f64> = b.qkv.ulp.iter().zip(&b.qk_scale).map(|(u, s)| u * s).collect();
        let widest = |s: &[f64]| s.iter().fold(0f64, |m, s| m.max(*s)) * b.qkv.units;
        let q = self.rescale("query", acc, 0, 3 * d, &s[..d], &[], K_SCORE, 0.0, widest(&s[..d]));
        let k = self.rescale("key", acc, d, 3 * d, &s[d..], &[], K_SCORE, 0.0, widest(&s[d..]));
        let sv: Vec<f64> = b.qkv.ulp[2 * d..].iter().map(|u| u * pow2(F_VALUE)).collect();
        let value = b.value_bound * pow2(F_VALUE);
        let v = self.rescale("value", acc, 2 * d, 3 * d, &sv, &[], k_av, pow2(-F_VALUE), value);
        let [q, k, v] = self.open([q, k, v]);
        let s = self.value(
            "scores (log2)",
            &[heads, t, t],
            K_SCORE,
            0.0,
            b.score_units.iter().copied().fold(0.0, f64::max),
        );
        let product = HeadProduct { side: Side::Scores, grid, heads, kv_heads: heads, dim, k: K_SCORE };
        self.op(Kind::Product(product), &[q, k], &[s]);
        let level_bits: Vec<u32> = b.heads.iter().map(|h| h.level_bits).collect();
        let hide = PadKeys { grid, levels: pad::LEVELS, level_bits: level_bits.clone(), k: K_SCORE };
        let bound = b.score_units.iter().enumerate().fold(0f64, |m, (h, s)| m.max(s + hide.shift(h) as f64 / 2.0));
        let padded = self.value("scores without padding", &[heads, t, t], K_SCORE, 0.0, bound);
        self.op(Kind::PadKeys(hide), &[s, keep], &[padded]);
        let [s] = self.open([padded]);

        // Coarse bound of each row's maximum: parities, their AND in two rounds, and the count of levels reached.
        let most = level_bits.iter().fold(0, |m, b| m.max(1 << b)) as f64;
        let max = RowMax { grid, level_bits, k: K_SCORE };
        let (four, five, rows, len) = (max.segments(4), max.segments(20), max.rows(), max.out_len());
        let parity = self.bits("maximum parities", &[len]);
        self.op(Kind::RowMax(max), &[s], &[parity]);
        let [parity] = self.open([parity]);
        let a4 = self.bits("maximum tests", &[len / 4]);
        self.op(Kind::And(And { segments: four, members: 4 }), &[parity], &[a4]);
        let [a4] = self.open([a4]);
        let unreached = self.bits("levels not reached", &[len / 20]);
        self.op(Kind::And(And { segments: five, members: 5 }), &[a4], &[unreached]);
        let [unreached] = self.open([unreached]);
        let level = self.value("maximum level", &[heads, t], K_LEVEL, 0.0, most);
        self.op(Kind::CountClear(CountClear { segments: rows, k: K_LEVEL }), &[unreached], &[level]);
        let [level] = self.open([level]);

        // Exponentials below the bound, zeroed where the windows alias.
        let exp = Exp { grid, heads: b.heads.clone(), k: K_SCORE, k_out: 30, f_pub: 8, f_deal: 20 };
        // Scores lie at least a step below the bound; where the windows alias the flag is set and nothing is kept.
        let largest = pow2(28) * (1.0 - 1e-6);
        let e = self.value("exponentials", &[heads, t, t], 30, pow2(-28), largest);
        let flags = self.bits("zero flags", &[exp.flag_len()]);
        self.op(Kind::Exp(exp), &[s, level], &[e, flags]);
        let [e, flags] = self.open([e, flags]);
        let kept = self.value("kept exponentials", &[heads, t, t], k_av, pow2(-F_EXP), pow2(F_EXP) + 2.0);
        self.op(
            Kind::FlagRescale(FlagRescale { len: heads * t * t, shift: 28 - F_EXP as u32, k_in: 30, k_out: k_av }),
            &[e, flags],
            &[kept],
        );

        // Row sums and unnormalised outputs; the reciprocal's rounds run beside the outputs' own.
        let one = pow2(F_EXP);
        let (drop, n) = scales_of_sum(t);
        let k_sum = drop + STRIDE * (n as u32 - 1) + 7;
        let sum = self.value("row sums", &[heads, t], k_sum, pow2(-F_EXP), t as f64 * (pow2(F_EXP) + 2.0));
        self.op(Kind::RowSum(grid), &[kept], &[sum]);
        let [kept, sum] = self.open([kept, sum]);
        let summed = t as f64 * b.value_bound * pow2(F_EXP + F_VALUE);
        let o = self.value("weighted values", &[t, d], k_av, pow2(-F_EXP - F_VALUE), summed);
        let product = HeadProduct { side: Side::Attend, grid, heads, kv_heads: heads, dim, k: k_av };
        self.op(Kind::Product(product), &[kept, v], &[o]);
        let k_o = log2_ceil(b.value_bound * super::SLACK) + (F_OUT + F_RECIP) as u32 + 2;
        let floor = pow2(drop as i32 - 1);
        let f = move |v: f64| pow2(F_RECIP) * one / v.max(floor);
        let (r, o) = self.row_function("reciprocal", sum, drop, n, k_o, 6, f, Some(o));
        let o = o.unwrap_or(r);
        let to_out = vec![pow2(F_OUT - F_EXP - F_VALUE); d];
        let summed = t as f64 * b.value_bound * pow2(F_OUT);
        let o = self.rescale("weighted values", o, 0, d, &to_out, &[], k_o, pow2(-F_OUT), summed);
        let [o, r] = self.open([o, r]);
        let bound = b.value_bound * super::SLACK;
        let a = self.value("attention", &[t, d], k_o, pow2(-F_OUT - F_RECIP), bound * pow2(F_OUT + F_RECIP));
        self.op(Kind::Broadcast(Broadcast { rows: t, cols: d, dim, centre: false, k: k_o }), &[o, r], &[a]);
        let [a] = self.open([a]);
        let to_f = vec![pow2(F - F_OUT - F_RECIP); d];
        let a = self.rescale("attention", a, 0, d, &to_f, &[], 32, pow2(-F), bound * pow2(F));
        let acc = self.linear("attention output accumulators", a, &b.attention_out, 32);
        self.back_to_residual("attention output", acc, &b.attention_out)
    }

    fn back_to_residual(&mut self, name: &str, acc: Id, l: &Layer) -> Id {
        let [acc] = self.open([acc]);
        let s: Vec<f64> = l.ulp.iter().map(|u| u * pow2(F)).collect();
        self.rescale(name, acc, 0, self.p.hidden, &s, &[], self.k_norm, pow2(-F), l.bound * pow2(F))
    }

    fn mlp(&mut self, x: Id, b: &Block) -> Id {
        let t = self.t;
        let h = self.linear("GELU input", x, &b.up, K_GELU_IN);
        let [h] = self.open([h]);
        let width = b.up.ulp.len();
        let half: Vec<f64> = b.up.ulp.iter().map(|u| 0.5 * u * pow2(F_GELU_OUT as i32)).collect();
        let (unit, bound) = (pow2(-(F_GELU_OUT as i32)), b.up.bound * pow2(F_GELU_OUT as i32) / 2.0);
        let lin = self.rescale("GELU linear part", h, 0, width, &half, &[], b.k_gelu, unit, bound);
        let even = self.value("GELU even part", &[t, width], b.k_gelu, unit, bound);
        let series = Cosine {
            rows: t,
            coef: b.gelu.clone(),
            period: K_GELU_IN - 1,
            f_out: F_GELU_OUT,
            f_deal: 10,
            k_out: b.k_gelu,
        };
        self.op(Kind::Cosine(series), &[h], &[even]);
        let g = self.add("GELU", lin, even);
        let [g] = self.open([g]);
        let s = vec![pow2(F_GELU - F_GELU_OUT as i32); width];
        let g = self.rescale("GELU", g, 0, width, &s, &[], 32, pow2(-F_GELU), b.up.bound * pow2(F_GELU));
        let acc = self.linear("output accumulators", g, &b.down, 32);
        self.back_to_residual("output", acc, &b.down)
    }

    fn add(&mut self, name: &str, a: Id, b: Id) -> Id {
        let v = self.values[a].clone();
        let out = self.value(name, &v.shape, v.bits, v.ulp, v.bound + self.values[b].bound);
        self.op(Kind::Add, &[a, b], &[out]);
        out
    }
}

fn norm_scales(n: &NormPlan, d: usize) -> (u32, usize) {
    let unit = (d * d) as f64 * pow2(2 * F);
    scales(d as f64 * n.input * n.input * pow2(2 * F), 0.03 * unit, 6.0)
}

fn scales_of_sum(t: usize) -> (u32, usize) {
    scales(t as f64 * super::SLACK * pow2(F_EXP), pow2(F_EXP - 8), 4.0)
}

/// See [`Planner::program`].
pub fn program(p: &Planner, t: usize) -> Result<Program, Error> {
    let d = p.hidden;
    let normalised = (F_RSQRT + 2) as u32 + log2_ceil(libm::sqrt(d as f64) * super::SLACK);
    let mut k_norm = normalised;
    for n in p.blocks.iter().flat_map(|b| [&b.attention_norm, &b.output_norm]) {
        let (drop, scales) = norm_scales(n, d);
        k_norm = k_norm.max(drop + STRIDE * (scales as u32 - 1) + 7);
    }
    if k_norm > 62 {
        return Err(refuse("layer norm", format!("the proven variance needs a ring of {k_norm} bits")));
    }
    let mut e = Emit { p, t, values: Vec::new(), ops: Vec::new(), layer: String::new(), k_norm };
    let input = e.value("embedded text", &[t, d], k_norm, pow2(-F), p.embedded * pow2(F));
    let keep = e.value("rows that are not padding", &[t], K_POOL, 1.0, 1.0);
    e.op(Kind::Input, &[], &[input, keep]);
    let mut x = input;
    for (i, b) in p.blocks.iter().enumerate() {
        e.layer = format!("layer {i}: ");
        let a = e.attention(x, keep, b);
        x = e.add("residual", x, a);
        x = e.norm("attention norm", x, &b.attention_norm, k_norm)?;
        let m = e.mlp(x, b);
        x = e.add("residual", x, m);
        let k_out = if i + 1 < p.blocks.len() { k_norm } else { K_POOL };
        x = e.norm("output norm", x, &b.output_norm, k_out)?;
    }
    e.layer = String::new();
    let last = e.values[x].bound;
    let output = if p.mean {
        let [x, keep] = e.open([x, keep]);
        let sum = e.value("sum of rows", &[1, d], K_POOL, pow2(-F), t as f64 * last);
        let product = HeadProduct {
            side: Side::Attend,
            grid: Grid { rows: 1, keys: t, causal: false },
            heads: 1,
            kv_heads: 1,
            dim: d,
            k: K_POOL,
        };
        e.op(Kind::Product(product), &[keep, x], &[sum]);
        sum
    } else {
        let first = e.value("first row", &[1, d], K_POOL, pow2(-F), last);
        e.op(Kind::First { cols: d }, &[x], &[first]);
        first
    };
    let program = Program {
        values: e.values,
        ops: e.ops,
        tokens: t,
        inputs: vec![input, keep],
        output,
        carried: [Vec::new(), Vec::new()],
        mean: p.mean,
        digest: [0; 32],
    };
    prove(&program)?;
    Ok(program.seal(&p.model))
}
