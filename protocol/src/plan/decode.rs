//! A decoder as a list of operations, for some new rows after some past ones: prefill and single steps alike.
//!
//! 19 rounds a block with a gated MLP, 18 without, one more where heads have norms of their own, and 3 more in all, 2 with such heads;
//! two a block fewer for a single row. Linear layers read the product of the residual and its norm's inverse root directly, truncated as
//! shares are ([`crate::gates::local`]), so neither normalised rows nor attention's outputs nor the MLP's products are opened for
//! a rescale of their own; and the sum of squares that a norm begins with is taken before the residual is opened
//! ([`crate::gates::residual`]), all but the first. A single row has its queries and keys a round earlier ([`super::project`]), and
//! few rows spend dealt bytes to count the maximum's levels in one round less.
//!
//! Heads with norms of their own take one round more, since theirs begin with an opening, beside which the row's own norm runs.
//! Their epsilon is left out, since it belongs to heads of normalised rows: that changes a head whose mean square there is `s` by
//! `eps / (2 s)` of itself.
//!
//! Keys and values of past rows stay masked at the evaluators from the step that opened them; the dealer keeps their
//! masks. A masked value may be read by any number of products, so nothing is opened again. Bits that say which rows are
//! padding stay as shares.
//!
//! Several rows after past ones come with padding in front of them, that is, between what a text was and how it goes on. Where
//! positions rotate, past keys first move up to the new rows, by a number of positions that is an input ([`Turn`]): they are
//! multiplied, scaled back and opened again under fresh masks, in three rounds for all blocks at once. Scores depend on
//! differences of positions only, so that those of real rows are what they would be without padding. Every move rounds a key
//! to a unit of its ring, as making it did, and keeps its norm to a part in 2^12 or, with the 15 fraction bits that there mostly
//! are, in 2^15; the keys' proven bound is 1.4 times their norm, room for more than a thousand moves of one key.

use super::attention::{Attend, depth, level_bits};
use super::build::{Activated, Build, Part};
use super::decoder::{DEGREE, DecoderPlanner, F_LARGEST, F_RECIP, K_SCORE, RHO, hidden_levels};
use super::factors::Factors;
use super::layer::{BlockPlan, MlpPlan};
use super::norm::{F_INPUT, F_RESIDUAL, K_SQUARES, PreNorm};
use super::project::Projected;
use super::prove::prove;
use super::rows::Wide;
use super::{SLACK, pow2, refuse};
use crate::Error;
use crate::gates::broadcast::{Broadcast, Variance};
use crate::gates::grid::Grid;
use crate::gates::hadamard::Hadamard;
use crate::gates::pad::PadKeys;
use crate::gates::product::{HeadProduct, Side};
use crate::gates::rowmax::Levels;
use crate::gates::squares::Squares;
use crate::gates::turn::Turn;
use crate::program::{Id, Kind, Outcome, Program, Value};

/// Rows up to which a round is worth more than the dealt bytes of a row.
const FEW_ROWS: usize = 4;
/// Ring of the bits that mark rows.
const K_KEEP: u32 = 32;
/// Fewest bits of the nonlinearity's even part, and of one whose result is multiplied. Its roundings are about `2^(-f / 2)`,
/// since both factors of a harmonic have half of the bits.
const F_SERIES: i32 = 20;
const F_SERIES_GATED: i32 = 22;
/// Most fraction bits of the cosines and sines by which past keys move, and the fewest that keep them as they are.
const F_TURN: i32 = 20;
const F_TURN_LEAST: i32 = 12;

/// A share of the residual, and one of its rows' sums of squares, but for what a program starts with.
#[derive(Clone, Copy)]
pub struct Residual {
    pub x: Id,
    pub square: Option<Id>,
}

/// A program in the making: `rows` after `past` ones.
pub struct Emit<'a> {
    pub p: &'a DecoderPlanner,
    pub past: usize,
    pub rows: usize,
    pub b: Build,
}

impl Emit<'_> {
    /// Ring of the residual's sums of squares.
    fn k_squares(&self, n: &PreNorm) -> u32 {
        if n.shift == 0 { self.p.k } else { K_SQUARES }
    }

    /// Sum of squares of the masked residual's rows.
    pub fn square(&mut self, name: &str, x: Id, n: &PreNorm) -> Id {
        let (rows, d, k) = (self.rows, self.p.config.hidden, self.k_squares(n));
        let v = self.b.value(&format!("{name} square"), &[rows], k, 0.0, n.largest());
        if n.shift == 0 {
            self.b.op(Kind::Variance(Variance { rows, cols: d, centre: false, k }), &[x], &[v]);
        } else {
            let (shift, k_in) = (vec![n.shift; d], self.p.k);
            self.b.op(Kind::Squares(Squares { rows, dim: d, shift, k_in, k_out: k }), &[x], &[v]);
        }
        v
    }

    /// The residual, and the sum of squares of its rows, masked: one round, but for the first of all two.
    fn opened(&mut self, name: &str, r: Residual, n: &PreNorm) -> [Id; 2] {
        if let Some(square) = r.square {
            return self.b.open([r.x, square]);
        }
        let [x] = self.b.open([r.x]);
        let v = self.square(name, x, n);
        let [v] = self.b.open([v]);
        [x, v]
    }

    /// A share of the inverse root of a masked sum of squares, for the ring `k`, at least the norm's.
    pub fn root(&mut self, name: &str, v: Id, n: &PreNorm, k: u32) -> Id {
        let c = &self.p.config;
        let scales = n.scales(c);
        let (floor, eps) = (pow2(scales.drop as i32 - 1), c.eps * n.unit(c));
        // In units of the residual: x times this is x / rms(x) at 2^-f.
        let one = pow2(n.f - n.shift as i32) * libm::sqrt(c.hidden as f64);
        let f = move |v: f64| one / libm::sqrt(v.max(floor) + eps);
        self.b.row_function(&format!("{name} inverse root"), v, (scales, RHO), k, f)
    }

    /// The masked residual times the masked inverse root, as a share at `2^-`[`F_INPUT`].
    pub fn times_root(&mut self, name: &str, x: Id, r: Id, n: &PreNorm) -> Id {
        let (rows, d) = (self.rows, self.p.config.hidden);
        let bound = libm::sqrt(d as f64) * SLACK * pow2(n.f);
        let y = self.b.value(&format!("{name} normalised"), &[rows, d], n.k, pow2(-n.f), bound);
        self.b.op(
            Kind::Broadcast(Broadcast { rows, cols: d, dim: d, k_x: self.b.values[x].bits, k: n.k }),
            &[x, r],
            &[y],
        );
        self.b.truncate(y, (n.f - F_INPUT) as u32)
    }

    /// `x / rms(x)` as a share at `2^-`[`F_INPUT`], and the masked residual; two rounds, the last of which opens the inverse root, but
    /// for the first of all three.
    pub fn normalised(&mut self, name: &str, r: Residual, n: &PreNorm) -> [Id; 2] {
        let [x, v] = self.opened(name, r, n);
        let r = self.root(name, v, n, n.k);
        let [r] = self.b.open([r]);
        [self.times_root(name, x, r, n), x]
    }

    /// A value's last row of `cols` elements.
    fn last(&mut self, x: Id, cols: usize) -> Id {
        let Value { name, shape, bits, ulp, bound, .. } = self.b.values[x].clone();
        let shape: Vec<usize> = [1].into_iter().chain(shape.into_iter().skip(1)).collect();
        let last = self.b.value(&format!("{name}, last row"), &shape, bits, ulp, bound);
        self.b.op(Kind::Last { cols }, &[x], &[last]);
        last
    }

    pub fn linear(&mut self, name: &str, x: Id, w: &Wide) -> Id {
        self.b.linear(name, x, self.rows, &w.layer, w.k)
    }

    /// New rows after those of the program before.
    fn append(&mut self, name: &str, past: Option<Id>, new: Id) -> Id {
        let Some(past) = past else { return new };
        let v = self.b.values[new].clone();
        let all = self.b.value(name, &[self.past + self.rows, v.shape[1]], v.bits, v.ulp, v.bound);
        self.b.op(Kind::Append, &[past, new], &[all]);
        all
    }

    /// The past keys of all blocks, masked, moved by as many positions as the input `turn` says. Three rounds.
    fn moved(&mut self, turn: Id, f: i32, keys: &[Id]) -> Vec<Id> {
        let c = &self.p.config;
        let (dim, cols) = (c.head_dim, c.kv_heads * c.head_dim);
        let frequencies = c.rope.as_ref().map_or(&[][..], |r| &r.inverse_frequencies);
        let [turn] = self.b.open([turn]);
        let of_all = |e: &mut Self, from: &[Id], make: &dyn Fn(&mut Build, Id) -> Id| -> Vec<Id> {
            let shares = from.iter().enumerate().map(|(i, x)| {
                e.b.layer = format!("layer {i}: ");
                make(&mut e.b, *x)
            });
            let shares: Vec<Id> = shares.collect();
            e.b.open_all(&shares)
        };
        let rows = self.past;
        let turned = of_all(self, keys, &|b, x| {
            let Value { shape, bits: k, bound, .. } = b.values[x].clone();
            let y = b.value("turned keys", &shape, k, 0.0, bound * pow2(f));
            b.op(Kind::Turn(Turn { rows, dim, cols, frequencies: frequencies.to_vec(), f, k }), &[x, turn], &[y]);
            y
        });
        of_all(self, &turned, &|b, y| {
            let (k, bound) = (b.values[y].bits, b.values[y].bound * pow2(-f));
            b.rescale("moved keys", y, 0, cols, &Factors::even(pow2(-f), cols), &[], k, 0.0, bound)
        })
    }

    /// The residual after attention; `cache` is past keys and values, and becomes all.
    fn attention(&mut self, r: Residual, keep: Option<Id>, b: &BlockPlan, cache: &mut Option<[Id; 2]>) -> Residual {
        let c = &self.p.config;
        let (dim, kv_heads) = (c.head_dim, c.kv_heads);
        let grid = Grid::causal(self.past, self.rows);
        let Projected { query: q, key: k, x, values: acc, to_values } = self.projected(r, b);
        let k = self.append("keys", cache.map(|c| c[0]), k);
        let shape = [c.heads, grid.len()];
        let largest = b.score_units.iter().copied().fold(0.0, f64::max);
        let s = self.b.value("scores (log2)", &shape, K_SCORE, 0.0, largest);
        self.b.op(
            Kind::Product(HeadProduct { side: Side::Scores, grid, heads: c.heads, kv_heads, dim, k: K_SCORE }),
            &[q, k],
            &[s],
        );
        let (bits, mut heads) = (level_bits(&b.heads), b.heads.clone());
        let hidden = bits.iter().map(|b| hidden_levels(*b)).collect();
        let hide = PadKeys { grid, levels: hidden, level_bits: bits, k: K_SCORE };
        for (i, (head, units)) in heads.iter_mut().zip(&b.score_units).enumerate() {
            // A row's maximum is a real key's, and those are raised by half of what tells them from padded ones.
            let raised = if keep.is_some() { hide.shift(i) as f64 / 2.0 } else { 0.0 };
            head.levels = maxima(head.levels.bits, *units, raised);
        }
        let s = keep.map_or(s, |keep| self.b.hide_padding(s, keep, hide, &b.score_units));
        let (s, scored) = self.b.scored(s, &heads);
        let (one, width) = (pow2(b.f_value), kv_heads * dim);
        let bound = b.value_bound * one;
        let v = self.b.rescale("value", acc, 0, width, &to_values, &[], b.k_av, 1.0 / one, bound);
        let [s, v] = self.b.open([s, v]);
        let v = self.append("values", cache.map(|c| c[1]), v);
        *cache = Some([k, v]);
        let depth = depth(&b.heads, K_SCORE);
        let attend = Attend {
            grid,
            heads: &scored,
            kv_heads,
            dim,
            value_bound: b.value_bound,
            f_value: b.f_value,
            k_av: b.k_av,
            k: self.b.values[s].bits,
            f_exp: F_LARGEST + depth,
            f_pub: 12,
            f_sum: depth + 3,
            f_out: b.f_out,
            f_recip: F_RECIP,
            k_out: b.output.k,
            f_result: F_INPUT,
            degree: DEGREE,
            rho: RHO,
            wide: false,
            few_rows: self.rows <= FEW_ROWS,
        };
        let a = self.b.attend(s, v, &attend);
        self.onto("attention output", a, &b.output, x, &b.mlp_norm)
    }

    /// The masked residual `x` and a linear layer's output at its scale, for a norm to read.
    fn onto(&mut self, name: &str, y: Id, w: &Wide, x: Id, n: &PreNorm) -> Residual {
        let acc = self.linear(&format!("{name} accumulators"), y, w);
        let (acc, scale) = self.b.resolved(acc, &w.layer.ulp.times(F_RESIDUAL));
        let [acc] = self.b.open([acc]);
        let (bound, before) = (w.layer.bound * pow2(F_RESIDUAL), self.b.values[x].clone());
        let squares = (n.shift, self.k_squares(n), n.largest());
        let layer = Part { x: acc, scale: &scale, bound };
        let residual = (before.bits, before.ulp);
        let [x, square] = self.b.residual(name, layer, (x, None, before.bound), residual, squares);
        Residual { x, square: Some(square) }
    }

    /// The residual after the MLP, for the norm `next`.
    fn mlp(&mut self, r: Residual, n: &PreNorm, m: &MlpPlan, next: &PreNorm) -> Residual {
        let (rows, width) = (self.rows, m.act.layer.ulp.len());
        let [y, x] = self.normalised("MLP norm", r, n);
        let h = self.linear("nonlinearity's input", y, &m.act);
        let (h, scale) = self.b.resolved(h, &m.act.layer.ulp.times(m.f_activated));
        let k = m.ring();
        let (h, times) = match &m.times {
            None => (self.b.open([h])[0], None),
            Some(up) => {
                let u = self.linear("up accumulators", y, up);
                let (u, s) = self.b.resolved(u, &up.layer.ulp.times(m.f_up));
                let [h, u] = self.b.open([h, u]);
                let bound = up.layer.bound * pow2(m.f_up);
                let u = self.b.rescale("up", u, 0, width, &s, &[], k, pow2(-m.f_up), bound);
                (h, Some((u, up.layer.bound)))
            }
        };
        let least = if m.times.is_some() { F_SERIES_GATED } else { F_SERIES };
        let (f, f_series) = (m.f_activated, m.f_activated.max(least) as u32);
        let act = Activated { h, curves: &m.curves, scale: &scale, f, f_series, k, bound: m.act.layer.bound };
        let mut g = self.b.activated("activated", act);
        if let Some((u, up)) = times {
            let [a, u] = self.b.open([g, u]);
            let bound = m.act.layer.bound * up * pow2(m.f_activated + m.f_up);
            g = self.b.value("gated", &[rows, width], k, pow2(-m.f_activated - m.f_up), bound);
            self.b.op(Kind::Hadamard(Hadamard { len: rows * width, k }), &[a, u], &[g]);
        }
        let g = self.b.truncate(g, (m.f_activated + m.f_up - m.f_down) as u32);
        self.onto("MLP output", g, &m.down, x, next)
    }
}

/// Levels in which scores lie, and so the maximum of a row with a key that is not padding: scores of at most `units` of their ring
/// on either side of `raised`, with two levels for the low bits' borrow and for truncation.
fn maxima(bits: u32, units: f64, raised: f64) -> Levels {
    let level = |units: f64| (units * pow2(bits as i32 - K_SCORE as i32) + pow2(bits as i32 - 1)) / 64.0;
    let all = Levels::all(bits);
    let first = libm::floor(level(raised - units) - 2.0 / 64.0).max(0.0) as u32;
    let last = (libm::ceil(level(raised + units) + 2.0 / 64.0) as u32).min(all.words);
    let words = (last - first).next_power_of_two().min(all.words);
    Levels { first: first.min(all.words - words), words, ..all }
}

/// See [`DecoderPlanner::program`].
pub fn program(p: &DecoderPlanner, marked: bool, past: usize, rows: usize, every: bool) -> Result<Program, Error> {
    let c = &p.config;
    let mut e = Emit { p, past, rows, b: Build::default() };
    let input = e.b.value("embedded tokens", &[rows, c.hidden], p.k, pow2(-F_RESIDUAL), p.embedded * pow2(F_RESIDUAL));
    let first = past == 0;
    let mut inputs = vec![input];
    let mut carried = [Vec::new(), Vec::new()];
    let marks = |e: &mut Emit, n: usize| e.b.value("rows that are not padding", &[n], K_KEEP, 1.0, 1.0);
    let (several, rotates) = (marked && (rows > 1 || first), c.rope.is_some());
    let new = several.then(|| marks(&mut e, rows));
    let old = (marked && !first).then(|| marks(&mut e, past));
    inputs.extend(new);
    carried[0].extend(old);
    // Past keys have to fit beside the cosines' fraction bits.
    let widest = p.blocks.iter().map(|b| b.key.reach).fold(1.0, f64::max);
    let f = (K_SCORE as i32 - 2 - libm::ceil(libm::log2(widest)) as i32).min(F_TURN);
    let turn = (several && !first && rotates)
        .then(|| e.b.value("how far past keys move", &[c.head_dim], K_SCORE, pow2(-f), pow2(f)));
    if turn.is_some() && f < F_TURN_LEAST {
        return Err(refuse("turned keys", format!("{F_TURN_LEAST} fraction bits of a turn do not fit beside keys")));
    }
    inputs.extend(turn);
    e.b.op(Kind::Input, &[], &inputs);
    let mut caches = vec![None; p.blocks.len()];
    if !first {
        for (i, (cache, b)) in caches.iter_mut().zip(&p.blocks).enumerate() {
            let width = c.kv_heads * c.head_dim;
            e.b.layer = format!("layer {i}: ");
            let bound = b.key.reach;
            let k = e.b.value("past keys", &[past, width], K_SCORE, 0.0, bound);
            let bound = b.value_bound * pow2(b.f_value);
            let v = e.b.value("past values", &[past, width], b.k_av, pow2(-b.f_value), bound);
            carried[0].extend([k, v]);
            *cache = Some([k, v]);
        }
    }
    e.b.layer = String::new();
    let keep = match (old, new) {
        (None, new) => new,
        (Some(old), new) => {
            let all = marks(&mut e, past + rows);
            e.b.op(Kind::Marks { rows }, &[Some(old), new].into_iter().flatten().collect::<Vec<_>>(), &[all]);
            Some(all)
        }
    };
    carried[1].extend(keep);
    if let Some(turn) = turn {
        let keys: Vec<Id> = caches.iter().flatten().map(|[k, _]| *k).collect();
        let moved = e.moved(turn, f, &keys);
        caches.iter_mut().flatten().zip(moved).for_each(|(c, k)| c[0] = k);
    }
    let mut x = Residual { x: input, square: None };
    let later = p.blocks.iter().skip(1).map(|b| &b.attention_norm).chain([&p.last_norm]);
    for (i, ((b, next), cache)) in p.blocks.iter().zip(later).zip(&mut caches).enumerate() {
        e.b.layer = format!("layer {i}: ");
        x = e.attention(x, keep, b, cache);
        x = e.mlp(x, &b.mlp_norm, &b.mlp, next);
        carried[1].extend(cache.iter().flatten());
    }
    e.b.layer = String::new();
    if !every && rows > 1 {
        x = Residual { x: e.last(x.x, c.hidden), square: x.square.map(|v| e.last(v, 1)) };
        e.rows = 1;
    }
    let [y, _] = e.normalised("final norm", x, &p.last_norm);
    let logits = e.linear("logits", y, &p.head);
    e.b.values[logits].ulp = p.head.layer.ulp.largest();
    let program = Program {
        values: e.b.values,
        ops: e.b.ops,
        past,
        tokens: rows,
        inputs,
        output: logits,
        carried,
        result: Outcome::Logits,
        digest: [0; 32],
    };
    prove(&program)?;
    Ok(if first { program.seal(&p.model) } else { program })
}
