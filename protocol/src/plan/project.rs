//! From a decoder's residual to masked queries and keys, and to values' accumulators.
//!
//! Several rows take them of the normalised rows `y = r x`, for the inverse root `r` of the norm: `W y` is opened, and opened
//! again when it is scaled, or turned, to scores' units: two rounds after that of `r`. But `W`, the scale and the turn `T` are linear
//! and `r` is a scalar of a row, so a single row takes queries and keys of the residual: `q = r T (W x)`. `W x` is a linear
//! map of a share, opened beside `x`; `T (W x)` is opened beside `r`; and `q` one round later.
//! That is a round less, for openings of `W x` and in wider rings, which a single row has few of. Heads with norms of their own
//! are taken of the residual either way, since such a norm undoes any factor of its input; for them `r` is the head's.
//!
//! What the evaluators see more is `W x` and `T (W x)`, each under fresh masks of their own; the dealer needs no weights. A
//! layer's constants are added to the product, turned to the row's position, which is public.

use std::sync::Arc;

use super::decode::{Emit, Residual};
use super::decoder::{K_SCORE, RHO};
use super::factors::Factors;
use super::layer::{BlockPlan, Projection};
use super::norm::{F_RESIDUAL, HeadNorm, K_SQUARES, LARGEST};
use super::pow2;
use super::rows::WIDEST;
use crate::gates::broadcast::Broadcast;
use crate::gates::local::Gain;
use crate::gates::rotate::Rotate;
use crate::gates::squares::Squares;
use crate::program::{Id, Kind, Value};

/// Most and fewest bits below scores' units that a projection of the residual is turned with, for rows with a mean square of one.
const F_TURNED: (i32, i32) = (10, 2);
/// Bits above the fewest that the inverse roots of a single row's heads have.
const F_SPARE: i32 = 3;

/// Queries and keys, masked; the residual, masked; accumulators of values, masked, and the factors of their columns.
pub struct Projected {
    pub query: Id,
    pub key: Id,
    pub x: Id,
    pub values: Id,
    pub to_values: Factors,
}

/// How a projection of the residual becomes queries or keys.
struct Direct {
    /// Fraction bits of the inverse root.
    root: i32,
    /// Fraction bits of its product with what is turned, in scores' units.
    product: i32,
    /// Factors of accumulators to what is turned.
    scale: Factors,
}

impl Direct {
    /// Ring of the product.
    fn ring(&self) -> u32 {
        K_SCORE + self.product as u32
    }
}

/// Factors of accumulators, and the ring that they are turned into.
type Turn = (Factors, u32);

impl Projection {
    /// Whether the layer adds constants.
    fn biased(&self) -> bool {
        self.wide.layer.linear.bias.iter().any(|b| *b != 0)
    }
}

/// What a row's norm and its heads' give, masked.
struct Roots {
    x: Id,
    /// Accumulators of queries and keys, of the residual.
    acc: [Id; 2],
    /// Inverse roots of rows, and those by which queries and keys are multiplied: their heads' or their rows'.
    row: Id,
    of: [Id; 2],
    /// Turned accumulators.
    turned: Vec<Id>,
}

impl Emit<'_> {
    /// See the module: four rounds, five where heads have norms of their own; a round less for a single row.
    pub fn projected(&mut self, r: Residual, b: &BlockPlan) -> Projected {
        let direct = [&b.query, &b.key].map(|p| (self.rows == 1).then(|| self.direct(b, p)).flatten());
        match direct {
            [Some(q), Some(k)] => self.of_residual(r, b, &[q, k]),
            _ if b.query.norm.is_some() => self.of_heads(r, b),
            _ => self.of_rows(r, b),
        }
    }

    /// `None` where no ring is wide enough.
    fn direct(&self, b: &BlockPlan, p: &Projection) -> Option<Direct> {
        let room = WIDEST as i32 - K_SCORE as i32;
        if let Some(n) = &p.norm {
            let root = n.f.min(n.f_least + F_SPARE);
            let scale = p.to_scores.times(room - root);
            return Some(Direct { root, product: room, scale });
        }
        let root = b.attention_norm.f - F_RESIDUAL;
        let turned = (room - root).min(F_TURNED.0);
        let scale = p.to_scores.times(turned);
        let fits = turned >= F_TURNED.1 && p.direct.0 <= self.p.k;
        fits.then_some(Direct { root, product: root + turned, scale })
    }

    /// Of normalised rows.
    fn of_rows(&mut self, r: Residual, b: &BlockPlan) -> Projected {
        let [y, x] = self.normalised("attention norm", r, &b.attention_norm);
        let heads = [("query", &b.query), ("key", &b.key)].map(|(name, p)| {
            let acc = self.linear(&format!("{name} accumulators"), y, &p.wide);
            self.b.resolved(acc, &p.to_scores)
        });
        self.opened_and_turned(heads, y, x, b)
    }

    /// Of normalised heads.
    fn of_heads(&mut self, r: Residual, b: &BlockPlan) -> Projected {
        let parts = [("query", &b.query), ("key", &b.key)];
        let acc = parts.map(|(name, p)| self.linear(&format!("{name} accumulators"), r.x, &p.wide));
        let f = parts.map(|(_, p)| p.norm.as_ref().map_or(0, |n| n.f));
        let roots = self.roots(r, b, acc, f, None);
        let y = self.times_root("attention norm", roots.x, roots.row, &b.attention_norm);
        let heads = [0, 1].map(|i| {
            let ((name, p), k) = (parts[i], parts[i].1.wide.k);
            let bound = p.norm.as_ref().map_or(0.0, |n| n.bound(self.p.config.head_dim));
            let head = self.times(&format!("{name} normalised"), roots.acc[i], roots.of[i], k, bound);
            self.b.resolved(head, &p.to_scores.times(-f[i]))
        });
        self.opened_and_turned(heads, y, roots.x, b)
    }

    /// Accumulators of queries and keys, and the factors of their columns, with values of the normalised row: two rounds.
    fn opened_and_turned(&mut self, heads: [(Id, Factors); 2], y: Id, x: Id, b: &BlockPlan) -> Projected {
        let [(q, to_query), (k, to_key)] = heads;
        let (v, to_values) = self.values(y, b);
        let [q, k, values] = self.b.open([q, k, v]);
        let q = self.turned("query", q, &to_query, K_SCORE);
        let k = self.turned("key", k, &to_key, K_SCORE);
        let [query, key] = self.b.open([q, k]);
        Projected { query, key, x, values, to_values }
    }

    /// Of the residual.
    fn of_residual(&mut self, r: Residual, b: &BlockPlan, direct: &[Direct; 2]) -> Projected {
        let parts = [("query", &b.query), ("key", &b.key)];
        let [(q, to_query), (k, to_key)] = [0, 1].map(|i| {
            let ((name, p), (k, bound)) = (parts[i], parts[i].1.direct);
            let acc = self.b.value(&format!("{name} of the residual"), &[1, p.to_scores.len()], k, 0.0, bound);
            let linear = &p.wide.layer.linear;
            self.b.op(Kind::Linear { rows: 1, layer: Arc::clone(linear) }, &[r.x], &[acc]);
            let acc = if p.biased() { self.plus(acc, linear.bias.iter().map(|b| -b).collect()) } else { acc };
            match p.norm {
                // Squares are taken of it as it is.
                Some(_) => (acc, direct[i].scale.clone()),
                None => self.b.resolved(acc, &direct[i].scale),
            }
        });
        let turn = [(to_query, direct[0].ring()), (to_key, direct[1].ring())];
        let roots = self.roots(r, b, [q, k], direct.each_ref().map(|d| d.root), Some(&turn));
        let y = self.times_root("attention norm", roots.x, roots.row, &b.attention_norm);
        let [q, k] = [0, 1].map(|i| {
            let ((name, p), d) = (parts[i], &direct[i]);
            let bound = p.reach * pow2(d.product);
            let product = self.times(name, roots.turned[i], roots.of[i], d.ring(), bound);
            let product = self.b.truncate(product, d.product as u32);
            if p.biased() { self.plus(product, self.turned_constant(p)) } else { product }
        });
        let (v, to_values) = self.values(y, b);
        let [query, key, values] = self.b.open([q, k, v]);
        Projected { query, key, x: roots.x, values, to_values }
    }

    /// Inverse roots of rows and of their heads, and what comes with them: three rounds, the first of which opens the residual
    /// and `acc`; two where only rows are normalised and their sums of squares are there. `f` are the heads' fraction bits;
    /// accumulators are turned by factors to rings, if these are given.
    fn roots(&mut self, r: Residual, b: &BlockPlan, acc: [Id; 2], f: [i32; 2], turn: Option<&[Turn; 2]>) -> Roots {
        let n = &b.attention_norm;
        let norms = [("query", &b.query.norm), ("key", &b.key.norm)];
        let opened = self.b.open_all(&[r.x, acc[0], acc[1]].into_iter().chain(r.square).collect::<Vec<_>>());
        let (x, acc) = (opened[0], [opened[1], opened[2]]);
        let mut squares: Vec<Id> = Vec::new();
        if r.square.is_none() {
            squares.push(self.square("attention norm", x, n));
        }
        for ((name, norm), acc) in norms.into_iter().zip(acc) {
            squares.extend(norm.as_ref().map(|h| self.head_squares(name, acc, h)));
        }
        let mut masked = opened[3..].to_vec();
        if !squares.is_empty() {
            masked.extend(self.b.open_all(&squares));
        }

        // Every root, and beside them what is turned.
        let turned = turn.into_iter().flatten().zip(norms).zip(acc);
        let turned: Vec<Id> = turned
            .map(|(((scale, k), (name, _)), acc)| {
                self.turned(&format!("{name} of the residual, turned"), acc, scale, *k)
            })
            .collect();
        // A row's root multiplies what is turned, unless heads have theirs.
        let of_row = turn.into_iter().flatten().zip(norms).filter(|(_, (_, norm))| norm.is_none());
        let k = of_row.fold(n.k, |most, ((_, k), _)| most.max(*k));
        let mut roots = vec![self.root("attention norm", masked[0], n, k)];
        let heads = norms.into_iter().enumerate().filter_map(|(i, (name, norm))| Some((i, name, norm.as_ref()?)));
        for ((i, name, h), w) in heads.zip(&masked[1..]) {
            let k = turn.map_or([&b.query, &b.key][i].wide.k, |turn| turn[i].1);
            roots.push(self.head_root(&format!("{name} heads"), *w, h, f[i], k));
        }
        let shares: Vec<Id> = roots.iter().copied().chain(turned).collect();
        let opened = self.b.open_all(&shares);
        let (roots, turned) = opened.split_at(roots.len());
        let of = [1, 2].map(|i| roots.get(i).copied().unwrap_or(roots[0]));
        Roots { x, acc, row: roots[0], of, turned: turned.to_vec() }
    }

    /// Sums of the squares of masked heads.
    fn head_squares(&mut self, name: &str, acc: Id, h: &HeadNorm) -> Id {
        let (rows, dim, k_in) = (self.rows, self.p.config.head_dim, self.b.values[acc].bits);
        let w = self.b.value(&format!("{name} squares"), &[rows, h.shift.len() / dim], K_SQUARES, 0.0, LARGEST);
        self.b.op(Kind::Squares(Squares { rows, dim, shift: h.shift.clone(), k_in, k_out: K_SQUARES }), &[acc], &[w]);
        w
    }

    /// A share of the inverse root of heads' masked sums of squares.
    fn head_root(&mut self, name: &str, w: Id, h: &HeadNorm, f: i32, k: u32) -> Id {
        let scales = h.scales();
        // Of scaled heads; the product with a head is scaled back by its columns' gains.
        let (floor, one) = (pow2(scales.drop as i32 - 1), pow2(f) * libm::sqrt(self.p.config.head_dim as f64));
        let f = move |v: f64| one / libm::sqrt(v.max(floor));
        self.b.row_function(&format!("{name}, inverse root"), w, (scales, RHO), k, f)
    }

    /// Masked heads times their masked inverse roots, or their rows', a share.
    fn times(&mut self, name: &str, heads: Id, roots: Id, k: u32, bound: f64) -> Id {
        let (shape, rows) = (self.b.values[heads].shape.clone(), self.b.values[roots].len());
        let cols = self.b.values[heads].len() / rows;
        let y = self.b.value(name, &shape, k, 0.0, bound);
        self.b.op(
            Kind::Broadcast(Broadcast { rows, cols, dim: cols, k_x: self.b.values[heads].bits, k }),
            &[heads, roots],
            &[y],
        );
        y
    }

    /// A share of values' accumulators, and the factors of their columns.
    fn values(&mut self, y: Id, b: &BlockPlan) -> (Id, Factors) {
        let acc = self.linear("value accumulators", y, &b.values);
        self.b.resolved(acc, &b.values.layer.ulp.times(b.f_value))
    }

    /// Masked heads times their columns' scales, turned where the model rotates.
    fn turned(&mut self, name: &str, acc: Id, scale: &Factors, k: u32) -> Id {
        let (k_in, cols) = (self.b.values[acc].bits, scale.len());
        let bound = scale.largest() * self.b.values[acc].bound * 2.0;
        let Some(rope) = &self.p.config.rope else {
            return self.b.rescale(name, acc, 0, cols, scale, &[], k, 0.0, bound);
        };
        let out = self.b.value(name, &[self.rows, cols], k, 0.0, bound);
        let (scale, power) = scale.parts();
        let rotate = Rotate {
            rows: self.rows,
            position: self.past,
            stride: cols,
            first: 0,
            dim: self.p.config.head_dim,
            frequencies: rope.inverse_frequencies.clone(),
            scale,
            power,
            k_in,
            k_out: k,
        };
        self.b.op(Kind::Rotate(rotate), &[acc], &[out]);
        out
    }

    /// A layer's constants in scores' units, turned to the position of a single row.
    fn turned_constant(&self, p: &Projection) -> Vec<i64> {
        let bias = p.wide.layer.linear.bias.iter().zip(Vec::from(p.to_scores.clone()));
        let mut c: Vec<f64> = bias.map(|(b, s)| *b as f64 * s).collect();
        if let Some(rope) = &self.p.config.rope {
            c.chunks_exact_mut(self.p.config.head_dim).for_each(|head| rope.rotate(head, self.past));
        }
        c.into_iter().map(|c| libm::round(c) as i64).collect()
    }

    /// A share plus a constant for every column.
    fn plus(&mut self, x: Id, constant: Vec<i64>) -> Id {
        let Value { name, shape, bits, ulp, bound, .. } = self.b.values[x].clone();
        let bound = bound + constant.iter().fold(0u64, |m, c| m.max(c.unsigned_abs())) as f64;
        self.b.values.push(Value { name, shape, bits, xor: false, ulp, bound });
        let y = self.b.values.len() - 1;
        let gain = Gain { k: bits, gain: vec![1; constant.len()], mean: Vec::new(), bias: constant };
        self.b.op(Kind::Gain(gain), &[x], &[y]);
        y
    }
}
