//! Norms of a decoder's rows and of its heads: which scale resolves what a proven bound allows.

use serde::{Deserialize, Serialize};

use super::build::scales;
use super::decoder::DEGREE;
use super::linalg::{eigenvalue_bound, norm};
use super::rows::{Rows, WEIGHT, WIDEST, Wide, largest, quantise};
use super::{SLACK, pow2, refuse};
use crate::Error;
use crate::gates::spline::Scales;
use crate::model::Norm;
use crate::model::decoder::{Config, NormKind};

/// Fraction bits of the residual stream: rows of real models start small.
pub const F_RESIDUAL: i32 = 16;
/// Fraction bits of what linear layers read of normalised rows, and of attention's outputs: the products that these are have
/// more, which truncation takes off with as many of the ring's.
pub const F_INPUT: i32 = 16;
/// Ring of sums of squares that are scaled down, which are then at most [`LARGEST`].
pub const K_SQUARES: u32 = 62;
pub const LARGEST: f64 = (1u64 << 60) as f64;
/// Smallest mean square that every norm resolves.
pub const SMALLEST: f64 = 1e-3;
/// Largest epsilon of norms of heads: left out, it changes a head whose mean square is one by half of it.
const LARGEST_EPS: f64 = 1e-3;

/// A norm before its gain: its input's bound, and the scale of what it gives.
#[derive(Serialize, Deserialize)]
pub struct PreNorm {
    /// Bound on the norm of a row.
    pub input: f64,
    /// Fraction bits of the normalised row as a product.
    pub f: i32,
    /// Ring of that: of the widest layer that reads it at `2^-`[`F_INPUT`], and what truncation takes off.
    pub k: u32,
    /// Bits that squares are taken without; none where they fit the residual's ring.
    pub shift: u32,
    /// Smallest mean square that is resolved.
    pub smallest: f64,
}

/// Bits by which values up to `largest` units are scaled down for squares of at most [`LARGEST`] in sum.
fn shift(largest: f64) -> u32 {
    (libm::ceil(libm::log2(largest.max(1.0))) as u32).saturating_sub(30)
}

impl PreNorm {
    pub fn new(c: &Config, input: f64, smallest: f64) -> PreNorm {
        // Sixteen bits of the inverse root for rows of an eighth of the proven norm, more for smaller ones.
        let rms = input / libm::sqrt(c.hidden as f64);
        let f = F_RESIDUAL + 16 + libm::ceil(libm::log2((rms / 8.0).max(1.0))) as i32;
        PreNorm { input, f, k: 0, shift: shift(input * pow2(F_RESIDUAL)), smallest }
    }

    /// Gives up fraction bits where what reads the rows needs `needed` bits above them: the proven norm is far above what
    /// rows have, and twelve bits of an inverse root of one are enough.
    pub fn spare(&mut self, op: &str, needed: u32) -> Result<(), Error> {
        self.f = self.f.min(WIDEST as i32 - needed as i32);
        let least = F_RESIDUAL + 12;
        if self.f < least {
            return Err(refuse(op, format!("{least} fraction bits and {needed} above them are more than {WIDEST}")));
        }
        Ok(())
    }

    /// Layers of rings of up to `k` bits read it.
    pub fn read_in(&mut self, k: u32) {
        self.k = k + (self.f - F_INPUT) as u32;
    }

    /// A sum of squares in units, for a mean square of one.
    pub fn unit(&self, c: &Config) -> f64 {
        c.hidden as f64 * pow2(2 * (F_RESIDUAL - self.shift as i32))
    }

    /// Bound on a sum of squares in units.
    pub fn largest(&self) -> f64 {
        let norm = self.input * pow2(F_RESIDUAL - self.shift as i32);
        norm * norm
    }

    /// Scales of the inverse root.
    pub fn scales(&self, c: &Config) -> Scales {
        scales(self.largest(), self.smallest * self.unit(c), 6.0, DEGREE)
    }

    /// Bits of the residual's ring that this norm needs.
    pub fn ring(&self, c: &Config) -> u32 {
        let element = libm::ceil(libm::log2(self.input.max(1.0))) as u32 + F_RESIDUAL as u32 + 3;
        let squares = if self.shift == 0 { self.scales(c).ring() } else { 0 };
        self.k.max(element).max(squares)
    }
}

/// Norms of each head of queries, or of keys, taken of the residual itself, before rotation.
#[derive(Serialize, Deserialize)]
pub struct HeadNorm {
    /// Of each column, the bits that its square is taken without.
    pub shift: Vec<u32>,
    /// Fraction bits of a normalised head, less its shift, and how many leave twelve bits for the inverse root of rows
    /// thirty-two times as large as one.
    pub f: i32,
    pub f_least: i32,
    /// Smallest sum of squares that is resolved.
    pub smallest: f64,
    /// Gain of every column.
    pub gain: Vec<f64>,
}

impl HeadNorm {
    /// Of the heads that are `range` of `rows`, whose units differ by powers of two in a head, where the residual's norm is at
    /// most `residual`; and the layer.
    pub fn new(
        op: &str,
        c: &Config,
        rows: &Rows,
        range: std::ops::Range<usize>,
        gain: &Norm,
        (residual, smallest): (f64, f64),
        keep: bool,
    ) -> Result<(HeadNorm, Wide), Error> {
        let (dim, heads) = (c.head_dim, range.len() / c.head_dim);
        if c.norm != NormKind::Rms || rows.bias[range.clone()].iter().any(|b| *b != 0.0) {
            return Err(refuse(
                op,
                "heads with norms of their own are planned without biases and centring only".into(),
            ));
        }
        if c.eps > LARGEST_EPS {
            let reason = format!("norms of heads leave out their epsilon, and {} is more than {LARGEST_EPS}", c.eps);
            return Err(refuse(op, reason));
        }
        let (mut units, mut bounds, mut shifts) = (Vec::new(), Vec::new(), Vec::new());
        // Of heads of rows with a mean square of one, in a direction like any other: the smallest and largest norm.
        let mut typical = [f64::INFINITY, 0.0];
        for h in 0..heads {
            let m = rows.matrix(range.start + h * dim, dim);
            let unit = largest(&m.data) / WEIGHT;
            let one = unit * pow2(-F_RESIDUAL);
            let s = shift(libm::sqrt(eigenvalue_bound(&m.gram(), 6)) * SLACK * residual / one);
            for j in 0..dim {
                // As fine as a power of two below the head's allows, and not so fine that a row of zeros asks for more.
                let finer = libm::floor(libm::log2(unit * WEIGHT / largest(m.row(j)))).clamp(0.0, 6.0) as u32;
                units.push(unit * pow2(-(finer as i32)));
                bounds.push(norm(m.row(j)) * residual);
                shifts.push(s + finer);
            }
            let n = norm(&m.data) * pow2(-(s as i32)) / one;
            typical = [typical[0].min(n), typical[1].max(n)];
        }
        let mut wide = quantise(op, rows, range, &units, &bounds, F_RESIDUAL, keep)?;
        let most = shifts.iter().fold(0, |m, s| m.max(*s)) as i32;
        let reach = libm::ceil(libm::log2(libm::sqrt(dim as f64) * SLACK)) as i32 + 2;
        // Sixteen bits of the inverse root for heads of an eighth of the proven norm, more for smaller ones.
        let f = (16 + 27).min(WIDEST as i32 - reach - most);
        // Twelve bits for those of rows thirty-two times as large as one, if they can be.
        let largest = (32.0 * typical[1]).min(libm::sqrt(LARGEST));
        let f_least = 12 + libm::ceil(libm::log2(largest / libm::sqrt(dim as f64)).max(0.0)) as i32;
        if f < f_least {
            let reason =
                format!("heads proven up to 2^{} units leave {f} bits for their norms of {f_least}", most + 30);
            return Err(refuse(op, reason));
        }
        wide.k = wide.k.max((f + most + reach) as u32);
        let gain = super::wide(&gain.weight).repeat(heads);
        let smallest = (typical[0] * typical[0] * smallest).clamp(1.0, LARGEST);
        Ok((HeadNorm { shift: shifts, f, f_least, smallest, gain }, wide))
    }

    /// Scales of the inverse root of a sum of squares.
    pub fn scales(&self) -> Scales {
        scales(LARGEST, self.smallest, 6.0, DEGREE)
    }

    /// What a unit of every column is worth, gain included, once a head is normalised without fraction bits.
    pub fn unit(&self) -> Vec<f64> {
        self.shift.iter().zip(&self.gain).map(|(s, gain)| gain * pow2(-(*s as i32))).collect()
    }

    /// Bound on a normalised head's values, in units of the finest column.
    pub fn bound(&self, dim: usize) -> f64 {
        let most = self.shift.iter().fold(0, |m, s| m.max(*s)) as i32;
        libm::sqrt(dim as f64) * SLACK * pow2(self.f + most)
    }
}
