//! Row-wise functions of wide dynamic range (reciprocal, inverse square root): cubics or quartics over windows whose width grows
//! with the input, picked by a distributed point function ([`super::dpf`]).
//!
//! At scale `s` a window is `h = 2^drop` wide, `x = i h + r` with `i = m_hi - l_hi` and `r = m_lo - l_lo` in `(-h, h)`: a borrow
//! only means that a window's polynomial is used a little past it. The windows at a scale are nodes of one level of a binary tree
//! over the mask's top bits, `l_hi`, and a window of the next wider scale is the parent, some levels up, of those that it holds.
//! For the opened `m`, windows from number [`Scales::low`] on are used as they are, those below are taken apart into finer ones,
//! down to the finest scale: the nodes that are used are then disjoint and leave none out, so that the mask's path goes
//! through exactly one of them whatever `x` is.
//!
//! The path carries at every scale the powers `1, l, l^2, ...` of the mask's place in its window. A polynomial in `p - l`, for the
//! public place `p`, is a public combination of these. So either evaluator adds up, over all nodes that are used, public factors times its halves
//! of the powers, and has a share of the function's value: no other opening picks among scales.
//!
//! At every scale values have the same few bits and a unit of their own; units differ by powers of two, so the powers are
//! dealt in rings that are narrower by as many bits, and shares are shifted to one unit. What is finer than the result's is
//! truncated as in [`super::local`].
//!
//! Who sees what: `m`, and what [`super::dpf`] says. Which nodes are read depends on `m` only.

use super::dpf::{self, Hash, Paths, children, corrected, joined, root};
use super::{Deal, Dealt, Take, rounded, to_both};
use crate::Error;
use crate::prg::Words;
use crate::vector::{self, Kernel};
use crate::wipe::Wiped;

/// Scales of one function, from the finest on, and their windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scales {
    /// log2 of the finest window.
    pub drop: u32,
    /// Number of scales.
    pub count: usize,
    /// Degree of a window's polynomial: three or four.
    pub degree: usize,
}

/// Bits by which each scale's windows are wider than those of the one before.
pub const STRIDE: u32 = 2;
/// log2 of the number of the first window that is used of every scale but the finest.
const LOW_BITS: u32 = 2;
const LOW: usize = 1 << LOW_BITS;
/// Windows of a scale that are used, and those below them.
const WINDOWS: usize = LOW << STRIDE;
/// Levels of the tree down to the widest scale.
const TOP: u32 = LOW_BITS + STRIDE;
/// Most coefficients of a window's polynomial.
const TERMS: usize = 5;
/// Rows at a time.
const GROUP: usize = 16;
const DEALT_GROUP: usize = 64;

/// A window's polynomial, lowest coefficient first.
pub type Polynomial = [f64; TERMS];

impl Scales {
    fn drop_of(&self, s: usize) -> u32 {
        self.drop + STRIDE * s as u32
    }

    /// Exclusive bound on the input.
    pub fn largest(&self) -> f64 {
        largest(self.drop_of(self.count - 1))
    }

    /// Bits of a ring that has room for every window.
    pub fn ring(&self) -> u32 {
        self.drop_of(self.count - 1) + TOP
    }

    /// Levels of the tree.
    fn levels(&self) -> usize {
        (self.ring() - self.drop) as usize
    }
}

/// Exclusive bound on inputs where the widest windows have so many bits.
pub fn largest(drop: u32) -> f64 {
    (WINDOWS - 1) as f64 * libm::exp2(f64::from(drop))
}

/// Polynomials of one scalar per row.
#[derive(Clone, Debug)]
pub struct Spline {
    /// Rows.
    pub rows: usize,
    /// Ring of the input, at least [`Scales::ring`]; `0 <= x <` [`Scales::largest`].
    pub k_in: u32,
    /// Scales and windows.
    pub scales: Scales,
    /// Per scale and window, in units of the scale and of the window.
    pub coef: Vec<Vec<Polynomial>>,
    /// Per scale, log2 of its unit in units of the result divided by `2^spare`.
    pub shifts: Vec<u32>,
    /// Bits below the result's unit that are truncated.
    pub spare: u32,
    /// Bits of the position in a window that are used, where there are as many.
    pub rho: u32,
    /// Ring of the result.
    pub k_out: u32,
}

/// Polynomials through `f` at the Chebyshev points of a window and its neighbours' halves, one more than their degree (input
/// in units, output in units of the result).
pub fn fit(f: impl Fn(f64) -> f64, scales: Scales) -> Vec<Vec<Polynomial>> {
    let points = 2.0 * (scales.degree + 1) as f64;
    let points = [1.0, 3.0].map(|i| libm::cos(i * std::f64::consts::PI / points));
    let [a2, b2] = points.map(|r| r * r);
    let window = |s: usize, i: usize| {
        let h = 2f64.powi(scales.drop_of(s) as i32);
        let at = |r: f64| f((i as f64 + r).max(0.0) * h);
        // Even and odd parts at either point.
        let [e, g] = points.map(|r| (at(r) + at(-r)) / 2.0);
        let [o, q] = points.map(|r| (at(r) - at(-r)) / (2.0 * r));
        let c3 = (o - q) / (a2 - b2);
        let c1 = q - c3 * b2;
        if scales.degree == 3 {
            let c2 = (e - g) / (a2 - b2);
            return [g - c2 * b2, c1, c2, c3, 0.0];
        }
        let middle = at(0.0);
        let [e, g] = [(e - middle) / a2, (g - middle) / b2];
        let c4 = (e - g) / (a2 - b2);
        [middle, c1, g - c4 * b2, c3, c4]
    };
    (0..scales.count).map(|s| (0..WINDOWS).map(|i| window(s, i)).collect()).collect()
}

/// Bits that values have at every scale, for positions of so many: a part in 2^12 is lost where a coefficient that is
/// rounded to a unit is multiplied by a position, since over the windows of a scale a function falls by up to its width.
fn bits_of(rho_bits: u32) -> u32 {
    rho_bits + 13 + STRIDE
}

impl Spline {
    /// The function `f` of `rows` scalars in the ring `k_in`, both in units, in the ring `k_out`.
    pub fn new(f: impl Fn(f64) -> f64, rows: usize, scales: Scales, rho: u32, [k_in, k_out]: [u32; 2]) -> Spline {
        let mut coef = fit(f, scales);
        let unit = |windows: &Vec<Polynomial>| {
            // Of windows below, only those of the finest scale are used, where a function is some sixteen times as large at most.
            let largest =
                windows[LOW..].iter().map(|c| c.iter().map(|c| c.abs()).sum()).fold(f64::MIN_POSITIVE, f64::max);
            libm::ceil(libm::log2(largest)) as i32 - bits_of(rho) as i32
        };
        let units: Vec<i32> = coef.iter().map(unit).collect();
        // Roundings are then below a unit of the result, however small values are.
        let finest = units.iter().fold(0, |m, u| m.min(*u)).max(-(rho as i32) - 2);
        let shifts: Vec<u32> = units.iter().map(|u| (u.max(&finest) - finest) as u32).collect();
        for (windows, shift) in coef.iter_mut().zip(&shifts) {
            let by = libm::exp2(-f64::from(*shift as i32 + finest));
            windows.iter_mut().flatten().for_each(|c| *c *= by);
        }
        Spline { rows, k_in, scales, coef, shifts, spare: finest.unsigned_abs(), rho, k_out }
    }

    /// Largest value of the finest window, in units of the result.
    pub fn bound(&self) -> f64 {
        let unit = libm::exp2(f64::from(self.shifts[0]) - f64::from(self.spare));
        self.coef[0][0].iter().map(|c| c.abs()).sum::<f64>() * unit
    }

    fn terms(&self) -> usize {
        self.scales.degree + 1
    }

    /// Ring of a scale's powers.
    fn ring(&self, s: usize) -> u32 {
        (self.k_out + self.spare).saturating_sub(self.shifts[s]).max(1)
    }

    /// Words that codes take, the gate's key before them.
    fn codes(&self) -> usize {
        2 + 2 * self.rows * self.scales.levels()
    }

    /// The tensors of a scale's corrections: what fits words, and the bits above.
    fn corrections(&self, s: usize) -> impl Iterator<Item = Dealt> {
        let (n, k) = (self.rows * self.terms(), self.ring(s));
        [(n, k.min(64)), (n, k.saturating_sub(64))].into_iter().filter(|(_, k)| *k > 0)
    }

    /// What is dealt: seeds that either evaluator draws, and to both the codes and each scale's corrections, widest first.
    pub fn dealt(&self) -> Vec<Dealt> {
        let corrections = (0..self.scales.count).rev().flat_map(|s| self.corrections(s));
        let both = [(self.codes(), 64)].into_iter().chain(corrections);
        [(0, 64)].into_iter().chain(both.flat_map(|(n, k)| to_both(n, k))).collect()
    }

    /// Bits of a position at a scale.
    fn rho_of(&self, s: usize) -> u32 {
        self.rho.min(self.scales.drop_of(s))
    }

    fn low(&self, x: u64, s: usize) -> u64 {
        let drop = self.scales.drop_of(s);
        (x & ((1 << drop) - 1)) >> (drop - self.rho_of(s))
    }

    /// Dealer.
    pub fn deal(&self, d: &mut Deal, lam: &[u64]) -> Result<(), Error> {
        let (levels, top, terms) = (self.scales.levels(), self.scales.ring(), self.terms());
        let mut drawn = d.own()?;
        let key = drawn.each_mut().map(pair)[0];
        let mut hash = Hash::new(key);
        let mut codes = vec![0; self.codes()];
        codes[..2].copy_from_slice(&key);
        let mut corrections: Vec<Vec<u128>> = vec![vec![0; self.rows * terms]; self.scales.count];
        for (group, lam) in lam.chunks(DEALT_GROUP).enumerate() {
            let first = group * DEALT_GROUP;
            let [e1, e2] = &mut drawn;
            let mut paths = Paths::new(seeds(e1, lam.len(), 0).chain(seeds(e2, lam.len(), 1)));
            for level in 0..levels {
                let at = top - 1 - level as u32;
                paths.down(
                    &mut hash,
                    |row| lam[row] >> at & 1 == 1,
                    |row, c| {
                        let to = 2 + 2 * ((first + row) * levels + level);
                        codes[to..to + 2].copy_from_slice(&dpf::halved(c));
                    },
                );
                let Some(s) = self.scale_at(at) else { continue };
                let powers = lam.iter().flat_map(|l| powers(self.low(*l, s), self.rho_of(s)));
                let powers = Wiped::new(powers.collect());
                paths.correct(
                    &mut hash,
                    (terms, self.ring(s)),
                    |row, j| powers[row * TERMS + j].into(),
                    |row, j, c| corrections[s][(first + row) * terms + j] = c,
                );
            }
        }
        d.both(64, &codes);
        for s in (0..self.scales.count).rev() {
            for (i, (_, k)) in self.corrections(s).enumerate() {
                let part: Vec<u64> = corrections[s].iter().map(|c| (c >> (64 * i)) as u64).collect();
                d.both(k, &part);
            }
        }
        Ok(())
    }

    /// The scale whose windows have so many bits.
    fn scale_at(&self, drop: u32) -> Option<usize> {
        let s = (drop.checked_sub(self.scales.drop)? / STRIDE) as usize;
        (s < self.scales.count && self.scales.drop_of(s) == drop).then_some(s)
    }

    /// Meaning in the clear, in units.
    pub fn plain(&self, x: &[f64]) -> Vec<f64> {
        let value = |x: &f64| {
            let at = |s: usize| x / 2f64.powi(self.scales.drop_of(s) as i32);
            let last = self.scales.count - 1;
            let s = (0..last).find(|s| at(*s) < WINDOWS as f64).unwrap_or(last);
            let window = (at(s).floor().max(0.0) as usize).min(WINDOWS - 1);
            let r = at(s) - window as f64;
            let unit = libm::exp2(f64::from(self.shifts[s]) - f64::from(self.spare));
            self.coef[s][window].iter().rev().fold(0.0, |y, c| y * r + c) * unit
        };
        x.iter().map(value).collect()
    }

    /// Evaluator: shares of the values, from masked words.
    pub fn eval(&self, t: &mut Take, m: &[u64]) -> Result<Vec<u64>, Error> {
        let mut drawn = t.own()?;
        let codes = t.both(self.codes(), 64)?;
        let mut corrections = vec![vec![0u128; self.rows * self.terms()]; self.scales.count];
        for s in (0..self.scales.count).rev() {
            for (i, (n, k)) in self.corrections(s).enumerate() {
                let part = t.both(n, k)?;
                corrections[s].iter_mut().zip(part).for_each(|(c, p)| *c |= u128::from(p) << (64 * i));
            }
        }
        // What E1 has of its own before seeds is the key, which is sent.
        pair(&mut drawn);
        let roots = Wiped::new(seeds(&mut drawn, self.rows, t.index()).collect());
        let table: Vec<Table> = self.coef.iter().map(|c| table(c)).collect();
        let (key, codes) = codes.split_at(2);
        let mut out = vec![0; self.rows];
        t.divide(
            self.rows,
            [&mut out],
            |row| [row],
            |rows, [out]| {
                let mut walk = Walk {
                    g: self,
                    table: &table,
                    codes,
                    corrections: &corrections,
                    hash: Hash::new([key[0], key[1]]),
                    hashes: Wiped::new(Vec::new()),
                    nodes: [0; 2].map(|_| Wiped::new(Vec::new())),
                };
                for (group, out) in out.chunks_mut(GROUP).enumerate() {
                    let first = rows.start + group * GROUP;
                    let range = first..first + out.len();
                    walk.group(first, &m[range.clone()], &roots[range], t.leads(), out);
                }
            },
        );
        Ok(out)
    }
}

/// Powers of a position, each of as many bits, so that no rounded coefficient is multiplied by more.
fn powers(p: u64, rho_bits: u32) -> [u64; TERMS] {
    let mut powers = [1, p, 0, 0, 0];
    for j in 2..TERMS {
        powers[j] = (powers[j - 1] * p) >> rho_bits;
    }
    powers
}

/// An evaluator's root seeds of the next rows.
fn seeds(w: &mut Words, rows: usize, evaluator: usize) -> impl Iterator<Item = u128> {
    (0..rows).map(move |_| root(pair(w), evaluator))
}

fn pair(w: &mut Words) -> [u64; 2] {
    let mut out = [0; 2];
    w.next(&mut out);
    out
}

/// Coefficients of a scale's windows, [`LANES`] of them at a time, lowest first.
type Table = [[[f64; LANES]; TERMS]; WINDOWS / LANES];

fn table(windows: &[Polynomial]) -> Table {
    std::array::from_fn(|group| std::array::from_fn(|j| std::array::from_fn(|i| windows[group * LANES + i][j])))
}

/// An evaluator's way down the trees of some rows at a time.
struct Walk<'a> {
    g: &'a Spline,
    table: &'a [Table],
    codes: &'a [u64],
    corrections: &'a [Vec<u128>],
    hash: Hash,
    hashes: Wiped<u128>,
    /// Seeds of nodes, and room for those of the next level.
    nodes: [Wiped<u128>; 2],
}

impl Walk<'_> {
    /// To the children of all nodes, of which each row has `each`, a level down.
    fn down(&mut self, first: usize, each: usize, level: usize) {
        let levels = self.g.scales.levels();
        let [nodes, below] = &mut self.nodes;
        self.hash.of(nodes, &mut self.hashes);
        below.clear();
        let rows = nodes.chunks_exact(each).zip(self.hashes.chunks_exact(each)).enumerate();
        for (row, (nodes, hashes)) in rows {
            let at = 2 * ((first + row) * levels + level);
            let code = joined([self.codes[at], self.codes[at + 1]]);
            below.extend(nodes.iter().zip(hashes).flat_map(|(s, h)| children(*s, *h, code)));
        }
        self.nodes.swap(0, 1);
    }

    fn group(&mut self, first: usize, m: &[u64], roots: &[u128], leads: bool, out: &mut [u64]) {
        let (g, n) = (self.g, m.len());
        self.nodes[0].clear();
        self.nodes[0].extend_from_slice(roots);
        let (mut level, mut each) = (0, 1);
        let mut sums = Wiped::new(vec![0u128; n]);
        let mut used = Wiped::new(Vec::with_capacity(n * WINDOWS));
        for s in (0..g.scales.count).rev() {
            let widest = s + 1 == g.scales.count;
            for _ in 0..if widest { TOP } else { STRIDE } {
                self.down(first, each, level);
                (level, each) = (level + 1, 2 * each);
            }
            // Windows that a row has no node for are at both evaluators as off the path, where halves cancel.
            let least = if s > 0 { LOW } else { 0 };
            let [nodes, narrower] = &mut self.nodes;
            narrower.clear();
            used.clear();
            for (m, nodes) in m.iter().zip(nodes.chunks_exact(WINDOWS)) {
                let m = (m >> g.scales.drop_of(s)) as usize;
                let node = |window: usize| {
                    if widest {
                        return nodes[m.wrapping_sub(window) % WINDOWS];
                    }
                    // Nodes are children of the next scale's windows, from the mask's end on.
                    let within = m % (1 << STRIDE);
                    let of = (window + (1 << STRIDE) - 1 - within) >> STRIDE;
                    let child = (of << STRIDE) + within - window;
                    nodes.get((of << STRIDE) + child).copied().unwrap_or(0)
                };
                narrower.extend((0..least).map(node));
                used.extend((least..WINDOWS).map(node));
            }
            self.nodes.swap(0, 1);
            each = LOW;
            match g.scales.degree {
                3 => self.add::<4>(first, s, m, &used, &mut sums),
                _ => self.add::<TERMS>(first, s, m, &used, &mut sums),
            }
        }
        let half = 1u128 << g.spare >> 1;
        for (out, sum) in out.iter_mut().zip(sums.iter()) {
            let share = if leads { *sum } else { sum.wrapping_neg() };
            *out = ((share.wrapping_add(half) & dpf::mask(g.k_out + g.spare)) >> g.spare) as u64;
        }
    }

    /// Adds what the used nodes of a scale are worth, of as many last windows for each row.
    fn add<const N: usize>(&mut self, first: usize, s: usize, m: &[u64], used: &[u128], sums: &mut [u128]) {
        let (g, k) = (self.g, self.g.ring(s));
        self.hash.words(used, dpf::blocks(N, k), &mut self.hashes);
        let (corrections, _) = self.corrections[s][first * N..].as_chunks::<N>();
        let (used, _) = used.as_chunks::<LANES>();
        let (hashes, _) = self.hashes.as_chunks::<LANES>();
        let low = m.iter().map(|m| g.low(*m, s) as f64 / libm::exp2(f64::from(g.rho_of(s))));
        vector::run(Add {
            table: &self.table[s],
            rho: g.rho_of(s),
            k,
            shift: g.shifts[s],
            low: &low.collect::<Vec<_>>(),
            used,
            hashes,
            corrections,
            sums,
        });
    }
}

/// Nodes at a time; as many as there are windows of a scale that are not used, and a divisor of those that are.
const LANES: usize = LOW;
/// Bits of a word's first part where it does not fit 64: products of these with factors add up in 64 bits, and so do those of the rest,
/// modulo the ring.
const PART: u32 = 24;

/// The sum over each row's used nodes, of its last windows, and over their powers, in a ring of `k` bits and more.
struct Add<'a, const N: usize> {
    table: &'a Table,
    rho: u32,
    k: u32,
    shift: u32,
    /// Public places in windows, as parts of one.
    low: &'a [f64],
    used: &'a [[u128; LANES]],
    hashes: &'a [[u128; LANES]],
    corrections: &'a [[u128; N]],
    sums: &'a mut [u128],
}

/// Factors of the powers of a mask's place `l` in some windows' polynomials in `p - l`. Doubles round alike wherever this runs,
/// one operation at a time.
#[inline(always)]
fn shifted<const N: usize>(coef: &[[f64; LANES]; TERMS], p: f64, unit: f64) -> [[u64; LANES]; N] {
    let mut c: [[f64; LANES]; N] = std::array::from_fn(|j| coef[j]);
    for first in 0..N - 1 {
        for j in (first..N - 1).rev() {
            let next = c[j + 1];
            c[j].iter_mut().zip(next).for_each(|(c, next)| *c += next * p);
        }
    }
    let scale = |j: usize| if j == 0 { 1.0 } else { unit } * if j % 2 == 1 { -1.0 } else { 1.0 };
    std::array::from_fn(|j| std::array::from_fn(|i| rounded(c[j][i] * scale(j))))
}

impl<const N: usize> Kernel for Add<'_, N> {
    #[inline(always)]
    fn run(self) {
        let Add { table, rho, k, shift, low, used, hashes, corrections, sums } = self;
        let each = used.len() / low.len().max(1);
        let table = &table[WINDOWS / LANES - each..];
        let unit = 1.0 / (1u64 << rho) as f64;
        for (row, ((p, corrections), sum)) in low.iter().zip(corrections).zip(sums).enumerate() {
            let (mut parts, mut rests) = ([0u64; LANES], [0u64; LANES]);
            for (group, coef) in table.iter().enumerate() {
                let factors = shifted::<N>(coef, *p, unit);
                let seeds = &used[row * each + group];
                let control: [u64; LANES] = std::array::from_fn(|i| (seeds[i] as u64 & 1).wrapping_neg());
                for j in 0..N {
                    let hashes = &hashes[dpf::block(j, k) * used.len() + row * each + group];
                    let (c, (by, half)) = (corrections[j], dpf::place(j, k));
                    let factors = &factors[j];
                    if let Some(half) = half {
                        for i in 0..LANES {
                            let h = if half == 0 { hashes[i] as u64 } else { (hashes[i] >> 64) as u64 };
                            let power = (h >> by).wrapping_add(control[i] & c as u64);
                            parts[i] = parts[i].wrapping_add(power.wrapping_mul(factors[i]));
                        }
                    } else {
                        for i in 0..LANES {
                            let power = corrected(seeds[i], hashes[i], c);
                            let (part, rest) = (power as u64 & ((1 << PART) - 1), (power >> PART) as u64);
                            parts[i] = parts[i].wrapping_add(part.wrapping_mul(factors[i]));
                            rests[i] = rests[i].wrapping_add(rest.wrapping_mul(factors[i]));
                        }
                    }
                }
            }
            let [part, rest] = [parts, rests].map(|lanes| lanes.into_iter().fold(0, u64::wrapping_add));
            // Of parts the sum is exact, with a sign; alone it is modulo a ring that it fits.
            *sum = sum.wrapping_add((part as i64 as u128).wrapping_add(u128::from(rest) << PART) << shift);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{World, add, masked};
    use super::*;
    use proptest::prelude::*;

    /// A function's ring, windows and range, as the planner sets them.
    struct Case {
        k_in: u32,
        scales: Scales,
        rho: u32,
        k_out: u32,
        range: std::ops::Range<u64>,
        tolerance: f64,
    }

    /// `x` is given by its place in the range, on a logarithmic scale, and a distance from the next window's edge.
    fn check(f: impl Fn(f64) -> f64, c: &Case, places: &[(f64, i64)], seed: u64) {
        let mut w = World::seeded(seed);
        let span = (c.range.end as f64 / c.range.start as f64).log2();
        let mut x = w.edges(c.k_in, places.len());
        for ([x, ..], (place, near)) in x.iter_mut().zip(places) {
            let at = (c.range.start as f64 * (place * span).exp2()) as u64;
            // Bits of the window that holds it, of the coarsest scale at which it is in use.
            let edge = 1u64 << at.ilog2().saturating_sub(TOP);
            let v = if *near == 0 {
                at
            } else {
                (at / edge * edge).saturating_add_signed(near.signum() * (near.abs() - 1))
            };
            *x = v.clamp(c.range.start, c.range.end - 1);
        }
        let (x, lam, e) = masked(&x, c.k_in, false);
        let f = |v: f64| f(v.max(2f64.powi(c.scales.drop as i32 - 1)));
        let g = Spline::new(f, x.len(), c.scales, c.rho, [c.k_in, c.k_out]);
        let s = w.run(&g.dealt(), |d| g.deal(d, &lam), |t, i| g.eval(t, &e[i].m));
        let real: Vec<f64> = x.iter().map(|x| *x as f64).collect();
        for ((x, y), plain) in real.iter().zip(add(&s, c.k_out)).zip(g.plain(&real)) {
            let want = f(*x);
            let most = c.tolerance * want + 1.5;
            assert!((y as f64 - want).abs() < most, "{x}: {y} for {want}, {:?} {:?} {}", g.scales, g.shifts, g.spare);
            assert!((plain - want).abs() < most && want <= g.bound() * (1.0 + c.tolerance), "{x}: {plain} for {want}");
        }
    }

    fn places() -> impl Strategy<Value = Vec<(f64, i64)>> {
        prop::collection::vec((0.0..=1.0, -2i64..=2), 1..30)
    }

    proptest! {
        #[test]
        fn inverse_square_root_over_five_decades(places in places(), degree in 3usize..=4, seed in any::<u64>()) {
            let f = |v: f64| 2f64.powi(50) / v.sqrt();
            let scales = Scales { drop: 31, count: 9, degree };
            let range = 4 << 31..14 << 47;
            check(f, &Case { k_in: 58, scales, rho: 7, k_out: 58, range, tolerance: 0.004 }, &places, seed);
        }

        #[test]
        fn inverse_square_root_over_eleven_decades(places in places(), seed in any::<u64>(), k_in in 60u32..=64) {
            let f = |v: f64| 2f64.powi(58) / v.sqrt();
            let range = 4 << 18..14 << 56;
            let scales = Scales { drop: 18, count: 20, degree: 4 };
            check(f, &Case { k_in, scales, rho: 10, k_out: 64, range, tolerance: 0.001 }, &places, seed);
        }

        #[test]
        fn reciprocal_over_the_softmax_range(
            places in places(),
            (degree, rho, tolerance) in prop_oneof![Just((3, 7, 0.006)), Just((4, 10, 0.0008))],
            (one, count) in (20i32..60, 1usize..8),
            seed in any::<u64>(),
        ) {
            let f = |v: f64| 2f64.powi(one) / v;
            let range = 4 << 7..15 << (7 + STRIDE * (count as u32 - 1));
            let scales = Scales { drop: 7, count, degree };
            check(f, &Case { k_in: 25, scales, rho, k_out: 55, range, tolerance }, &places, seed);
        }

        #[test]
        fn few_bits_are_few_bits(places in places(), drop in 0u32..8, k_out in 1u32..=20, seed in any::<u64>()) {
            // Less than a unit in the end, and positions that windows have no room for.
            let f = |v: f64| 2f64.powi(drop as i32 + k_out as i32) / v / 8.0;
            let scales = Scales { drop, count: 8, degree: 3 };
            let range = 4 << drop..15 << (drop + 14);
            check(f, &Case { k_in: scales.ring(), scales, rho: 7, k_out: k_out + 2, range, tolerance: 0.03 }, &places, seed);
        }
    }
}
