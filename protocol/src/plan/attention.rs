//! From masked scores and values to attention's outputs: the maximum, exponentials, weighted values and the reciprocal of
//! the row sums. Eight rounds, the last of which the caller shares; seven with `few_rows`.

use super::build::{Build, SPARE, log2_ceil, scales};
use super::rows::WIDEST;
use super::{SLACK, pow2};
use crate::gates::bits::{And, CountClear};
use crate::gates::broadcast::Broadcast;
use crate::gates::exp::{Exp, FlagRescale, Head, VANISHED, widest};
use crate::gates::grid::Grid;
use crate::gates::pad::PadKeys;
use crate::gates::product::{HeadProduct, Side};
use crate::gates::reached::Reached;
use crate::gates::rowmax::RowMax;
use crate::program::{Id, Kind};

/// Most powers of two that a step of the row maximum is worth; the least is half of it, so that what is not kept of a row
/// is below `2^-18` of its largest exponential.
pub const STEP: f64 = 4.0;
/// Steps that a row's maximum may lie below its bound, the one of headroom included.
const BELOW: f64 = 3.0;
/// Powers of two of a step from which on windows may have eight of them: what is not kept of a row is then below `2^-15` of its
/// largest exponential, little enough for rows of a text and not for those of long answers.
pub const LEAST_STEP: u32 = 3;

/// One layer's attention.
pub struct Attend<'a> {
    pub grid: Grid,
    pub heads: &'a [Head],
    pub kv_heads: usize,
    /// Ring of the scores.
    pub k: u32,
    /// Values in a head.
    pub dim: usize,
    /// Bound on the magnitude of a value, and its scale.
    pub value_bound: f64,
    pub f_value: i32,
    /// Ring of the values, see [`attention_ring`].
    pub k_av: u32,
    /// Scale of exponentials, of which a row's largest is at least `2^-`[`depth`].
    pub f_exp: i32,
    /// Fraction bits of the public factor of exponentials, which is at least one.
    pub f_pub: i32,
    /// The finest window of the row sums' reciprocal, in bits below one.
    pub f_sum: i32,
    /// Scales of the weighted values, at most, and of the reciprocal: their product is in a ring of as many more bits than the
    /// result's as its scale is finer.
    pub f_out: i32,
    pub f_recip: i32,
    /// Ring and scale of the result.
    pub k_out: u32,
    pub f_result: i32,
    /// Degree of the polynomial in one, and bits of a position.
    pub degree: usize,
    pub rho: u32,
    /// Whether windows of exponentials may have eight steps, each worth at least [`LEAST_STEP`].
    pub wide: bool,
    /// Spend dealt bytes a row to save a round.
    pub few_rows: bool,
}

/// Ring in which `sum_j e_j v_j` fits over `keys` keys: `e_j <= 1`, `|v| <= bound`, products at `2^-f`.
pub fn attention_ring(keys: usize, bound: f64, f: i32) -> u32 {
    log2_ceil(keys as f64 * bound * SLACK) + f as u32 + 2
}

/// Powers of two that a step of the row maximum is worth, of the head where it is worth most.
fn largest_step(heads: &[Head], k: u32) -> f64 {
    heads.iter().fold(0.0, |m, h| m.max(h.ulp * pow2(k as i32 - h.levels.bits as i32)))
}

/// Powers of two that a row's largest score may lie below the bound.
pub fn depth(heads: &[Head], k: u32) -> i32 {
    libm::ceil(BELOW * largest_step(heads, k)) as i32
}

/// About how many bytes are dealt of a score for what its head's levels and the layer's steps decide, with windows of so many
/// steps: one-hots, tests and zero flags of every level; powers, in rings that windows widen; and what depth widens or lengthens,
/// in rows of 128.
fn cost(heads: &[Head], k: u32, steps: u32) -> f64 {
    let windows = f64::from(VANISHED >> steps);
    let flags = 0.125 * pow2(-(steps as i32));
    let of =
        |h: &Head| (0.214 + flags) * pow2(h.levels.bits as i32) + windows / 8.0 * f64::from(h.window(k, steps) + 11);
    let mean = heads.iter().map(of).sum::<f64>() / heads.len() as f64;
    mean + (1.15 + windows / 8.0) * f64::from(depth(heads, k))
}

/// log2 of the steps, each of at least [`LEAST_STEP`], in a window of exponentials at `2^-f_exp`, whose public factors have `f_pub` bits.
fn window_steps(heads: &[Head], k: u32, f_exp: i32, f_pub: i32) -> u32 {
    let wide = widest(heads, k, 3) as i32;
    // A dealt factor is rounded as a double is.
    let fits = f_exp + wide - 3 <= 50 && f_exp + wide + f_pub - 1 <= WIDEST as i32;
    if fits && cost(heads, k, 3) < cost(heads, k, 2) { 3 } else { 2 }
}

/// See [`cost`], for the windows that are taken.
pub fn levels_cost(heads: &[Head], k: u32, f_largest: i32, f_pub: i32) -> f64 {
    cost(heads, k, window_steps(heads, k, f_largest + depth(heads, k), f_pub))
}

/// Of each head.
pub fn level_bits(heads: &[Head]) -> Vec<u32> {
    heads.iter().map(|h| h.levels.bits).collect()
}

impl Build {
    /// A coarse bound of each row's maximum, as a masked number of levels: parities, their AND, and the count.
    fn maximum(&mut self, s: Id, a: &Attend) -> Id {
        // Only a count modulo the number of levels matters: a level is a step of a ring.
        let k = a.heads.iter().fold(1, |m, h| m.max(h.levels.bits));
        let most = pow2(k as i32);
        let max = RowMax { grid: a.grid, levels: a.heads.iter().map(|h| h.levels).collect(), k: a.k };
        let (rows, len) = (max.rows(), max.out_len());
        // All tests of a level in two steps. Four members deal least to the first, five to the second where it is an AND; where
        // it counts, its table grows with the power of the members.
        let (first, second) = if a.few_rows { (5, 4) } else { (4, 5) };
        let (groups, all) = (max.segments(first), max.segments(first * second));
        let parity = self.bits("maximum parities", &[len]);
        self.op(Kind::RowMax(max), &[s], &[parity]);
        let [parity] = self.open([parity]);
        let tests = self.bits("maximum tests", &[len / first]);
        self.op(Kind::And(And { segments: groups, members: first }), &[parity], &[tests]);
        let [tests] = self.open([tests]);
        let level = self.value("maximum level", &[a.heads.len(), a.grid.rows], k, 0.0, most);
        if a.few_rows {
            self.op(Kind::Reached(Reached { segments: all, members: second, k }), &[tests], &[level]);
        } else {
            let unreached = self.bits("levels not reached", &[len / first / second]);
            self.op(Kind::And(And { segments: all, members: second }), &[tests], &[unreached]);
            let [unreached] = self.open([unreached]);
            self.op(
                Kind::CountClear(CountClear { segments: rows, rings: level_bits(a.heads) }),
                &[unreached],
                &[level],
            );
        }
        let [level] = self.open([level]);
        level
    }

    /// Share of scores with padded keys lowered; `units` is each head's bound before.
    pub fn hide_padding(&mut self, s: Id, keep: Id, hide: PadKeys, units: &[f64]) -> Id {
        let bound = units.iter().enumerate().fold(0f64, |m, (h, s)| m.max(s + hide.shift(h) as f64 / 2.0));
        let shape = [units.len(), hide.grid.len()];
        let hidden = self.value("scores without padding", &shape, hide.k, 0.0, bound);
        self.op(Kind::PadKeys(hide), &[s, keep], &[hidden]);
        hidden
    }

    /// Share of scores without the bits that exponentials do not read, and what heads are then.
    pub fn scored(&mut self, s: Id, heads: &[Head]) -> (Id, Vec<Head>) {
        let needed = heads.iter().fold(0, |m, h| m.max(h.least_ring())) + SPARE as u32;
        let shift = self.values[s].bits.saturating_sub(needed);
        let scored = heads.iter().map(|h| Head { ulp: h.ulp * pow2(shift as i32), ..*h }).collect();
        (self.truncate(s, shift), scored)
    }

    /// Share of attention's outputs, `rows x heads dim`, from masked scores and values.
    pub fn attend(&mut self, s: Id, v: Id, a: &Attend) -> Id {
        let (heads, rows, keys) = (a.heads.len(), a.grid.rows, a.grid.keys);
        let (width, scores) = (heads * a.dim, [heads, a.grid.len()]);
        let level = self.maximum(s, a);

        // Exponentials below the bound, zeroed where the windows alias.
        // A dealt factor is rounded to a unit and multiplied by a public one of up to a window's width: to some units of the
        // kept exponential.
        let window_steps = if a.wide { window_steps(a.heads, a.k, a.f_exp, a.f_pub) } else { 2 };
        let window = widest(a.heads, a.k, window_steps) as i32;
        let (f_exp, f) = (a.f_exp, a.f_exp + window + a.f_pub - 3);
        let (k, f_pub) = (f as u32 + 2, a.f_pub);
        let heads_of = a.heads.to_vec();
        let exp = Exp { grid: a.grid, heads: heads_of, k: a.k, window_steps, k_out: k, f_pub, f_deal: f - f_pub };
        // Scores lie at least a step below the bound; where the windows alias the flag is set and nothing is kept.
        let largest = pow2(f) * 0.995;
        let e = self.value("exponentials", &scores, k, pow2(-f), largest);
        let flags = self.bits("zero flags", &[exp.flag_len()]);
        self.op(Kind::Exp(exp), &[s, level], &[e, flags]);
        let below = SPARE.min(f - f_exp);
        let e = self.truncated(e, (f - f_exp - below) as u32, true);
        let [e, flags] = self.open([e, flags]);
        let kept = self.value("kept exponentials", &scores, a.k_av, pow2(-f_exp), pow2(f_exp) + 2.0);
        let (shift, k_in) = (below as u32, self.values[e].bits);
        let keep = FlagRescale { len: heads * a.grid.len(), shift, k_in, k_out: a.k_av };
        self.op(Kind::FlagRescale(keep), &[e, flags], &[kept]);

        // Row sums and unnormalised outputs.
        let one = pow2(f_exp);
        let windows = scales(keys as f64 * SLACK * one, pow2(f_exp - a.f_sum), 1.0, a.degree);
        let k_sum = windows.ring();
        let sum = self.value("row sums", &[heads, rows], k_sum, pow2(-f_exp), keys as f64 * (one + 2.0));
        self.op(Kind::RowSum(a.grid), &[kept], &[sum]);
        let [kept, sum] = self.open([kept, sum]);
        let summed = keys as f64 * a.value_bound;
        let bound = summed * pow2(f_exp + a.f_value);
        let o = self.value("weighted values", &[rows, width], a.k_av, pow2(-f_exp - a.f_value), bound);
        let (grid, kv_heads, dim) = (a.grid, a.kv_heads, a.dim);
        let product = HeadProduct { side: Side::Attend, grid, heads, kv_heads, dim, k: a.k_av };
        self.op(Kind::Product(product), &[kept, v], &[o]);
        let floor = pow2(windows.drop as i32 - 1);
        let f_out = a.f_out.min(f_exp + a.f_value);
        let o = self.truncate(o, (f_exp + a.f_value - f_out) as u32);
        let f_recip = a.f_recip;
        let f = move |v: f64| pow2(f_recip) * one / v.max(floor);
        let f_product = f_out + f_recip;
        let k = a.k_out + (f_product - a.f_result) as u32;
        let r = self.row_function("reciprocal", sum, (windows, a.rho), k, f);
        let [o, r] = self.open([o, r]);
        let bound = a.value_bound * SLACK * pow2(f_product);
        let y = self.value("attention", &[rows, width], k, pow2(-f_product), bound);
        let k_x = self.values[o].bits;
        self.op(Kind::Broadcast(Broadcast { rows, cols: width, dim, k_x, k }), &[o, r], &[y]);
        self.truncate(y, (f_product - a.f_result) as u32)
    }
}
