//! The encoder as a list of operations; reads like the table of a transformer block.
//!
//! 25 rounds a block. Attention's output layer reads the product of weighted values and reciprocals as the share that it is, in a ring
//! wide enough for their scales and the weights; only its accumulators are opened.

use super::attention::{Attend, attention_ring, depth, level_bits};
use super::build::{Activated, Build, log2_ceil, scales};
use super::prove::prove;
use super::{
    Block, F, F_GELU, F_LARGEST, F_RECIP, F_SERIES, F_VALUE, K_GELU_IN, K_SCORE, Layer, NormPlan, Planner, pow2, refuse,
};
use crate::Error;
use crate::gates::broadcast::{Broadcast, Variance};
use crate::gates::grid::Grid;
use crate::gates::pad::{self, PadKeys};
use crate::gates::piecewise::Scales;
use crate::gates::product::{HeadProduct, Side};
use crate::program::{Id, Kind, Outcome, Program};

/// Scale of the inverse square root.
const F_RSQRT: i32 = 50;
/// Ring of the last rows and of their pooling.
const K_POOL: u32 = 32;

struct Emit<'a> {
    p: &'a Planner,
    t: usize,
    b: Build,
    /// Ring of the residual stream and of everything in a norm.
    k_norm: u32,
}

impl Emit<'_> {
    /// Layer norm of a share at `2^-F`: five rounds.
    fn norm(&mut self, name: &str, x: Id, n: &NormPlan, k_out: u32) -> Result<Id, Error> {
        let (t, d, k) = (self.t, self.p.hidden, self.k_norm);
        let [x] = self.b.open([x]);
        let v = self.b.value(&format!("{name} variance"), &[t], k, 0.0, d as f64 * n.input * n.input * pow2(2 * F));
        self.b.op(Kind::Variance(Variance { rows: t, cols: d, centre: true, k }), &[x], &[v]);
        let [v] = self.b.open([v]);
        // The variance term is d ||x - mean||^2 = d^2 var, in units of 2^-2F.
        let unit = (d * d) as f64 * pow2(2 * F);
        let scales = norm_scales(n, d);
        let floor = pow2(scales.drop as i32 - 1);
        let eps = self.p.eps * unit;
        let f = move |v: f64| pow2(F_RSQRT) / libm::sqrt(v.max(floor) + eps);
        let (r, _) = self.b.row_function(&format!("{name} rsqrt"), v, scales, k, 7, f, None);
        let [r] = self.b.open([r]);
        let bound = libm::sqrt(d as f64) * super::SLACK;
        let y = self.b.value(&format!("{name} normalised"), &[t, d], k, pow2(-F_RSQRT), bound * pow2(F_RSQRT));
        self.b.op(Kind::Broadcast(Broadcast { rows: t, cols: d, dim: d, centre: true, k }), &[x, r], &[y]);
        let [y] = self.b.open([y]);
        let scale: Vec<f64> = n.gain.iter().map(|g| g * pow2(F - F_RSQRT)).collect();
        let bias: Vec<f64> = n.bias.iter().map(|b| b * pow2(F)).collect();
        Ok(self.b.rescale(name, y, 0, d, &scale, &bias, k_out, pow2(-F), n.output() * pow2(F)))
    }

    fn attention(&mut self, x: Id, keep: Id, b: &Block) -> Id {
        let (t, d, heads) = (self.t, self.p.hidden, self.p.heads);
        let (dim, grid) = (d / heads, Grid::square(t));
        let acc = self.b.linear("query, key, value accumulators", x, t, &b.qkv, 32);
        let [acc] = self.b.open([acc]);
        let depth = depth(&b.heads, K_SCORE);
        let f_exp = F_LARGEST + depth;
        let k_av = attention_ring(t, b.value_bound, f_exp + F_VALUE);
        let s: Vec<f64> = b.qkv.ulp.iter().zip(&b.qk_scale).map(|(u, s)| u * s).collect();
        let widest = |s: &[f64]| s.iter().fold(0f64, |m, s| m.max(*s)) * b.qkv.units;
        let q = self.b.rescale("query", acc, 0, 3 * d, &s[..d], &[], K_SCORE, 0.0, widest(&s[..d]));
        let k = self.b.rescale("key", acc, d, 3 * d, &s[d..], &[], K_SCORE, 0.0, widest(&s[d..]));
        let sv: Vec<f64> = b.qkv.ulp[2 * d..].iter().map(|u| u * pow2(F_VALUE)).collect();
        let value = b.value_bound * pow2(F_VALUE);
        let v = self.b.rescale("value", acc, 2 * d, 3 * d, &sv, &[], k_av, pow2(-F_VALUE), value);
        let [q, k, v] = self.b.open([q, k, v]);
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
        let padded = self.b.hide_padding(s, keep, hide, &b.score_units);
        let [s] = self.b.open([padded]);
        let attend = Attend {
            grid,
            heads: &b.heads,
            kv_heads: heads,
            dim,
            value_bound: b.value_bound,
            f_value: F_VALUE,
            k_av,
            k: K_SCORE,
            f_exp,
            f_pub: 6,
            f_sum: depth + 1,
            // As fine as the exponentials.
            f_out: f_exp,
            f_recip: F_RECIP,
            k_out: b.k_attention,
            windows: 16,
            degree: 3,
            rho: 7,
            few_rows: false,
        };
        let a = self.b.attend(s, v, &attend);
        let acc = self.b.linear("attention output accumulators", a, t, &b.attention_out, b.k_attention);
        self.back_to_residual("attention output", acc, &b.attention_out)
    }

    fn back_to_residual(&mut self, name: &str, acc: Id, l: &Layer) -> Id {
        let [acc] = self.b.open([acc]);
        let s: Vec<f64> = l.ulp.iter().map(|u| u * pow2(F)).collect();
        self.b.rescale(name, acc, 0, self.p.hidden, &s, &[], self.k_norm, pow2(-F), l.bound * pow2(F))
    }

    fn mlp(&mut self, x: Id, b: &Block) -> Id {
        let t = self.t;
        let h = self.b.linear("GELU input", x, t, &b.up, K_GELU_IN);
        let [h] = self.b.open([h]);
        let to_g: Vec<f64> = b.up.ulp.iter().map(|u| u * pow2(F_GELU)).collect();
        let act =
            Activated { h, curves: &b.gelu, scale: &to_g, f: F_GELU, f_series: F_SERIES, k: 32, bound: b.up.bound };
        let g = self.b.activated("GELU", act);
        let acc = self.b.linear("output accumulators", g, t, &b.down, 32);
        self.back_to_residual("output", acc, &b.down)
    }
}

fn norm_scales(n: &NormPlan, d: usize) -> Scales {
    let unit = (d * d) as f64 * pow2(2 * F);
    scales(d as f64 * n.input * n.input * pow2(2 * F), 0.03 * unit, 3.0, 32, 3)
}

/// See [`Planner::program`].
pub fn program(p: &Planner, t: usize) -> Result<Program, Error> {
    let d = p.hidden;
    let normalised = (F_RSQRT + 2) as u32 + log2_ceil(libm::sqrt(d as f64) * super::SLACK);
    let mut k_norm = normalised;
    for n in p.blocks.iter().flat_map(|b| [&b.attention_norm, &b.output_norm]) {
        k_norm = k_norm.max(norm_scales(n, d).ring());
    }
    if k_norm > 62 {
        return Err(refuse("layer norm", format!("the proven variance needs a ring of {k_norm} bits")));
    }
    let mut e = Emit { p, t, b: Build::default(), k_norm };
    let input = e.b.value("embedded text", &[t, d], k_norm, pow2(-F), p.embedded * pow2(F));
    let keep = e.b.value("rows that are not padding", &[t], K_POOL, 1.0, 1.0);
    e.b.op(Kind::Input, &[], &[input, keep]);
    let mut x = input;
    for (i, b) in p.blocks.iter().enumerate() {
        e.b.layer = format!("layer {i}: ");
        let a = e.attention(x, keep, b);
        x = e.b.add("residual", x, a);
        x = e.norm("attention norm", x, &b.attention_norm, k_norm)?;
        let m = e.mlp(x, b);
        x = e.b.add("residual", x, m);
        let k_out = if i + 1 < p.blocks.len() { k_norm } else { K_POOL };
        x = e.norm("output norm", x, &b.output_norm, k_out)?;
    }
    e.b.layer = String::new();
    let last = e.b.values[x].bound;
    let output = if p.mean {
        let [x, keep] = e.b.open([x, keep]);
        let sum = e.b.value("sum of rows", &[1, d], K_POOL, pow2(-F), t as f64 * last);
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
        let first = e.b.value("first row", &[1, d], K_POOL, pow2(-F), last);
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
