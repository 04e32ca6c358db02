//! The plaintext twin: a [`Program`] in the clear and in f64, without masks, rings or rounding.
//!
//! It is the oracle of the masked evaluation: both run the same quantised weights, series and windows, so what differs is
//! fixed-point rounding alone; what the twin differs from the published model is approximation alone.

use crate::Error;
use crate::plan::dot;
use crate::program::{Kind, Op, Program};

/// A value in the clear: reals in units of its scale, or packed bits.
#[derive(Clone, Debug)]
pub enum Plain {
    /// Numbers, in units.
    Real(Vec<f64>),
    /// Bits, 64 a word.
    Bits(Vec<u64>),
}

impl Plain {
    fn real(&self) -> Result<&[f64], Error> {
        match self {
            Plain::Real(v) => Ok(v),
            Plain::Bits(_) => Err(Error::Plan { op: "twin".into(), reason: "bits where numbers are due".into() }),
        }
    }

    fn bits(&self) -> Result<&[u64], Error> {
        match self {
            Plain::Bits(v) => Ok(v),
            Plain::Real(_) => Err(Error::Plan { op: "twin".into(), reason: "numbers where bits are due".into() }),
        }
    }
}

/// Runs a program on its inputs in units, from what the program before it kept; `see` is shown every value as it is
/// made. Returns the output in units.
///
/// # Errors
/// Inputs of another number or length than the program's, or a state that is not the one it starts from.
pub fn evaluate(
    p: &Program,
    inputs: &[Vec<f64>],
    state: &mut Vec<Vec<f64>>,
    mut see: impl FnMut(usize, &Plain),
) -> Result<Vec<f64>, Error> {
    let lens = || p.inputs().map(|v| p.values[v].len());
    if !inputs.iter().map(Vec::len).eq(lens()) {
        let reason = format!("lengths {:?} are due", lens().collect::<Vec<_>>());
        return Err(Error::Malformed { what: "input", reason });
    }
    let mut values = vec![Plain::Bits(Vec::new()); p.values.len()];
    if !state.iter().map(Vec::len).eq(p.carried[0].iter().map(|v| p.values[*v].len())) {
        return Err(Error::Malformed { what: "state", reason: "not the one the program starts from".into() });
    }
    for (v, kept) in p.carried[0].iter().zip(std::mem::take(state)) {
        values[*v] = Plain::Real(kept);
    }
    for op in &p.ops {
        let made = match op.kind {
            Kind::Input => inputs.iter().cloned().map(Plain::Real).collect(),
            _ => operation(op, &values)?,
        };
        for (v, made) in op.outputs.iter().zip(made) {
            see(*v, &made);
            values[*v] = made;
        }
    }
    *state = p.carried[1].iter().map(|v| values[*v].real().map(<[f64]>::to_vec)).collect::<Result<_, _>>()?;
    values[p.output()].real().map(<[f64]>::to_vec)
}

fn operation(op: &Op, values: &[Plain]) -> Result<Vec<Plain>, Error> {
    let x = |n: usize| values[op.inputs[n]].real();
    let b = |n: usize| values[op.inputs[n]].bits();
    let real = |v: Vec<f64>| vec![Plain::Real(v)];
    let bits = |v: Vec<u64>| vec![Plain::Bits(v)];
    let two = |(v, w): (Vec<f64>, Vec<f64>)| vec![Plain::Real(v), Plain::Real(w)];
    let both = |(v, b): (Vec<f64>, Vec<u64>)| vec![Plain::Real(v), Plain::Bits(b)];
    Ok(match &op.kind {
        Kind::Input => Vec::new(),
        Kind::Open => op.inputs.iter().map(|v| values[*v].clone()).collect(),
        Kind::Rescale(g) => real(g.plain(x(0)?)),
        Kind::Residual(g) => two(g.plain(x(0)?, x(1)?)),
        Kind::Product(g) => real(g.plain(x(0)?, x(1)?)),
        Kind::PadKeys(g) => real(g.plain(x(0)?, x(1)?)),
        Kind::RowMax(g) => bits(g.plain(x(0)?)),
        Kind::And(g) => bits(g.plain(b(0)?)),
        Kind::CountClear(g) => real(g.plain(b(0)?)),
        Kind::Exp(g) => both(g.plain(x(0)?, x(1)?)),
        Kind::FlagRescale(g) => real(g.plain(x(0)?, b(1)?)),
        Kind::Spline(g) => real(g.plain(x(0)?)),
        Kind::Variance(g) => real(g.plain(x(0)?)),
        Kind::Squares(g) => real(g.plain(x(0)?)),
        Kind::Broadcast(g) => real(g.plain(x(0)?, x(1)?)),
        Kind::Cosine(g) => real(g.plain(x(0)?)),
        Kind::Tails(g) => {
            let (above, inside) = g.plain(x(0)?);
            vec![Plain::Bits(above), Plain::Bits(inside)]
        }
        Kind::Join(g) => real(g.plain(x(0)?, x(1)?, b(2)?, b(3)?)),
        Kind::Linear { layer, .. } => {
            let weights = layer.weights()?;
            let (out, inp) = (weights.rows_out(), weights.cols_in());
            let x = x(0)?;
            let mut y = vec![0.0; x.len() / inp * out];
            for o in 0..out {
                let w: Vec<f64> = (0..inp).map(|i| f64::from(weights.at(o, i))).collect();
                for (row, y) in x.chunks_exact(inp).zip(y.chunks_exact_mut(out)) {
                    y[o] = dot(row, &w) + layer.bias[o] as f64;
                }
            }
            real(y)
        }
        Kind::Truncate(g) => real(g.plain(x(0)?)),
        Kind::Gain(g) => real(g.plain(x(0)?)),
        Kind::RowSum(grid) => {
            let heads = x(0)?.chunks_exact(grid.len());
            real(heads.flat_map(|head| grid.split(head).map(|(_, row)| row.iter().sum())).collect())
        }
        Kind::First { cols } => real(x(0)?[..*cols].to_vec()),
        Kind::Last { cols } => real(x(0)?[x(0)?.len() - cols..].to_vec()),
        Kind::Append => real([x(0)?, x(1)?].concat()),
        Kind::Marks { rows } => real(match op.inputs.len() {
            1 => [x(0)?, &vec![1.0; *rows]].concat(),
            _ => [x(0)?, x(1)?].concat(),
        }),
        Kind::Turn(g) => real(g.plain(x(0)?, x(1)?)),
        Kind::Rotate(g) => real(g.plain(x(0)?)),
        Kind::Hadamard(g) => real(g.plain(x(0)?, x(1)?)),
        Kind::Reached(g) => real(g.plain(b(0)?)),
    })
}
