//! Laying down operations: values with their bounds, openings, and the small compositions that every family uses.

use std::sync::Arc;

use super::activation::Curves;
use super::factors::Factors;
use super::{Layer, pow2};
use crate::gates::cosine::Cosine;
use crate::gates::join::Join;
use crate::gates::local::Truncate;
use crate::gates::rescale::Rescale;
use crate::gates::residual::Residual;
use crate::gates::spline::{STRIDE, Scales, Spline, largest};
use crate::gates::tails::Tails;
use crate::program::{Id, Kind, Op, Value};

/// A program in the making.
#[derive(Default)]
pub struct Build {
    pub values: Vec<Value>,
    pub ops: Vec<Op>,
    /// Where the operations belong; starts the names of values.
    pub layer: String,
}

/// A nonlinearity of a masked value.
pub struct Activated<'a> {
    /// Where the value is, half of whose ring is what the curves were made for.
    pub h: Id,
    pub curves: &'a Curves,
    /// Per column, from units to those of the result.
    pub scale: &'a Factors,
    /// Scales of the result and of its series, at least that.
    pub f: i32,
    pub f_series: u32,
    /// Ring of the result.
    pub k: u32,
    /// Bound on the result.
    pub bound: f64,
}

/// A masked layer's output, the factor of every column to the residual's unit, and the bound of the product.
pub struct Part<'a> {
    pub x: Id,
    pub scale: &'a Factors,
    pub bound: f64,
}

/// Bits below a unit that a share keeps which is rounded to it when it is opened: truncation adds a tenth to what rounding is off
/// by.
pub const SPARE: i32 = 2;

pub fn log2_ceil(x: f64) -> u32 {
    libm::ceil(libm::log2(x.max(1.0))) as u32
}

/// Scales of polynomials of this degree for a positive value up to `hi` units, of use down to `lo`, which has so many windows
/// of the finest scale.
pub fn scales(hi: f64, lo: f64, windows_at_lo: f64, degree: usize) -> Scales {
    let finest = libm::log2((lo / windows_at_lo).max(1.0));
    let top = log2_ceil(hi / largest(0));
    // Of twice the width asked for at most.
    let n = 1 + libm::ceil((f64::from(top) - finest - 1.0).max(0.0) / f64::from(STRIDE)) as u32;
    let n = n.min(1 + top / STRIDE);
    Scales { drop: top - STRIDE * (n - 1), count: n as usize, degree }
}

impl Build {
    /// `bound` is in units.
    pub fn value(&mut self, name: &str, shape: &[usize], bits: u32, ulp: f64, bound: f64) -> Id {
        let name = format!("{}{name}", self.layer);
        self.values.push(Value { name, shape: shape.to_vec(), bits, xor: false, ulp, bound });
        self.values.len() - 1
    }

    pub fn bits(&mut self, name: &str, shape: &[usize]) -> Id {
        let v = self.value(name, shape, 64, 0.0, 0.0);
        self.values[v].xor = true;
        v
    }

    pub fn op(&mut self, kind: Kind, inputs: &[Id], outputs: &[Id]) {
        self.ops.push(Op { kind, inputs: inputs.to_vec(), outputs: outputs.to_vec() });
    }

    /// One round for all of `shares`.
    pub fn open<const N: usize>(&mut self, shares: [Id; N]) -> [Id; N] {
        let out = self.open_all(&shares);
        std::array::from_fn(|i| out[i])
    }

    /// As [`Self::open`].
    pub fn open_all(&mut self, shares: &[Id]) -> Vec<Id> {
        let first = self.values.len();
        shares.iter().for_each(|s| self.values.push(self.values[*s].clone()));
        let out: Vec<Id> = (first..self.values.len()).collect();
        self.op(Kind::Open, shares, &out);
        out
    }

    /// Accumulators of a public linear layer on a share of `rows` rows.
    pub fn linear(&mut self, name: &str, x: Id, rows: usize, l: &Layer, bits: u32) -> Id {
        let out = self.value(name, &[rows, l.ulp.len()], bits, 0.0, l.units);
        self.op(Kind::Linear { rows, layer: Arc::clone(&l.linear) }, &[x], &[out]);
        out
    }

    #[allow(clippy::too_many_arguments)]
    pub fn rescale(
        &mut self,
        name: &str,
        x: Id,
        first: usize,
        stride: usize,
        scale: &Factors,
        bias: &[f64],
        k_out: u32,
        ulp: f64,
        bound: f64,
    ) -> Id {
        let (mult, shift) = scale.fixed();
        let k_in = self.values[x].bits;
        let bias = bias.iter().map(|b| libm::round(*b) as i64).collect();
        let rows = self.values[x].len() / stride;
        let out = self.value(name, &[rows, mult.len()], k_out, ulp, bound + 3.0);
        self.op(Kind::Rescale(Rescale { rows, stride, first, mult, shift, k_in, k_out, bias }), &[x], &[out]);
        out
    }

    /// The residual in the ring `k` at `ulp`: a masked layer's output and what it was before, masked too, times factors unless it
    /// has that unit, of a bound in units; and the sums of its rows' squares in units of `2^(2 shift)`, for `squares` of that shift, their ring and their bound.
    pub fn residual(
        &mut self,
        name: &str,
        layer: Part,
        (before, scale, bound): (Id, Option<&Factors>, f64),
        (k_out, ulp): (u32, f64),
        (shift, k_squares, largest): (u32, u32, f64),
    ) -> [Id; 2] {
        let shape = self.values[before].shape.clone();
        let rescale = |x: Id, scale: &Factors| {
            let ((mult, shift), k_in) = (scale.fixed(), self.values[x].bits);
            Rescale { rows: shape[0], stride: shape[1], first: 0, mult, shift, k_in, k_out, bias: Vec::new() }
        };
        let scaled = scale.map(|scale| rescale(before, scale));
        let gate = Residual { scale: rescale(layer.x, layer.scale), before: scaled, shift, k_squares };
        let sum = bound + layer.bound + 6.0;
        let after = self.value(&format!("residual after {name}"), &shape, k_out, ulp, sum);
        let square = self.value(&format!("residual after {name}, squares"), &[shape[0]], k_squares, 0.0, largest);
        self.op(Kind::Residual(gate), &[layer.x, before], &[after, square]);
        [after, square]
    }

    /// A share without its last `shift` bits, in a ring of as many fewer.
    pub fn truncate(&mut self, x: Id, shift: u32) -> Id {
        self.truncated(x, shift, false)
    }

    /// As [`Self::truncate`], raised for what is opened and rescaled by a power of two.
    pub fn truncated(&mut self, x: Id, shift: u32, raise: bool) -> Id {
        if shift == 0 {
            return x;
        }
        let v = self.values[x].clone();
        let (bits, unit) = (v.bits - shift, pow2(shift as i32));
        let g = Truncate { k: v.bits, shift, raise };
        self.values.push(Value { bits, ulp: v.ulp * unit, bound: v.bound / unit + 1.5, ..v });
        let y = self.values.len() - 1;
        self.op(Kind::Truncate(g), &[x], &[y]);
        y
    }

    /// A share without the bits that `scale` brings below a fraction of a unit ([`SPARE`]), and the factors from its unit.
    pub fn resolved(&mut self, x: Id, scale: &Factors) -> (Id, Factors) {
        let largest = scale.largest();
        let spare = (libm::floor(-libm::log2(largest)) as i32).saturating_sub(SPARE);
        let shift = spare.clamp(0, self.values[x].bits as i32 - 4);
        (self.truncated(x, shift as u32, scale.by_shifts()), scale.times(shift))
    }

    /// A share of `f` of a masked positive scalar per row, for positions in windows of `rho` bits.
    pub fn row_function(
        &mut self,
        name: &str,
        x: Id,
        (scales, rho): (Scales, u32),
        k_out: u32,
        f: impl Fn(f64) -> f64,
    ) -> Id {
        let rows = self.values[x].len();
        let g = Spline::new(f, rows, scales, rho, [self.values[x].bits, k_out]);
        let y = self.value(name, &[rows], k_out, 0.0, g.bound());
        self.op(Kind::Spline(g), &[x], &[y]);
        y
    }

    /// A nonlinearity, whose opening between is the round that it takes: a share at `2^-f` in the ring `k`.
    pub fn activated(&mut self, name: &str, a: Activated) -> Id {
        let Activated { h, curves, scale, f, f_series, k, bound } = a;
        let (shape, k_in) = (self.values[h].shape.clone(), self.values[h].bits);
        let len = self.values[h].len();
        let k_series = curves.ring(f_series);
        let most = curves.bound * pow2(f_series as i32);
        let s = self.value(&format!("{name} even part"), &shape, k_series, pow2(-(f_series as i32)), most);
        let columns = Arc::clone(&curves.columns);
        let series = Cosine { rows: shape[0], columns, period: k_in - 1, f_out: f_series, k_out: k_series };
        self.op(Kind::Cosine(series), &[h], &[s]);
        let tails = Tails { len, inner: Arc::clone(&curves.inner), k: k_in };
        let above = self.bits(&format!("{name} above"), &[tails.out_len()]);
        let inside = self.bits(&format!("{name} inside"), &[tails.out_len()]);
        self.op(Kind::Tails(tails), &[h], &[above, inside]);
        let below = SPARE.min(f_series as i32 - f);
        let s = self.truncated(s, (f_series as i32 - f - below) as u32, true);
        let k_series = self.values[s].bits;
        let [s, above, inside] = self.open([s, above, inside]);
        let (mult, shift) = scale.fixed();
        let g = self.value(name, &shape, k, pow2(-f), bound * pow2(f) + 5.0);
        let join = Join { len, mult, shift, k_in, k_series, drop: below as u32, k_out: k };
        self.op(Kind::Join(join), &[h, s, above, inside], &[g]);
        g
    }
}
