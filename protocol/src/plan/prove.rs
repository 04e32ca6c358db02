//! Proof obligations of a program: what enters a gate that is not linear must fit the range where the gate is right.
//!
//! Linear operations and products are exact in their ring whatever they hold, so a value may wrap as long as what is
//! read from it does not. Bounds hold for the embedding of every text; a client that shares other words can only spoil
//! its own answer, since ranges decide correctness and never what a party sees.

use super::refuse;
use crate::Error;
use crate::gates::tails::REACH;
use crate::program::{Kind, Program};

fn pow2(e: u32) -> f64 {
    libm::exp2(f64::from(e))
}

/// Checks every operation; names the value that is too wide.
pub fn prove(p: &Program) -> Result<(), Error> {
    for op in &p.ops {
        let largest = match &op.kind {
            Kind::Rescale(g) => pow2(g.k_in - 2),
            Kind::Rotate(g) => pow2(g.k_in - 2),
            Kind::FlagRescale(g) => pow2(g.k_in - 2),
            Kind::Squares(g) => pow2(g.k_in - 2),
            Kind::Residual(g) => pow2(g.scale.k_in - 2),
            Kind::Broadcast(g) if g.k_x < g.k => pow2(g.k_x - 2),
            Kind::Spline(g) if g.k_in < g.scales.ring() => 0.0,
            Kind::Spline(g) => g.scales.largest(),
            // Four levels of headroom at each end, of the finest head; the planner chooses each head's unit to leave them.
            Kind::RowMax(g) => {
                pow2(g.k - 1) - 4.0 * g.levels.iter().map(|l| pow2(g.k - l.bits)).fold(f64::MAX, f64::min)
            }
            Kind::Tails(g) => f64::from(REACH) * pow2(g.k - 7),
            Kind::Join(g) => pow2(g.k_in - 2),
            Kind::Truncate(g) => pow2(g.k - 1),
            _ => continue,
        };
        let beside = match &op.kind {
            Kind::Residual(g) => {
                Some((op.inputs[1], pow2(g.before.as_ref().map_or(g.scale.k_out, |before| before.k_in) - 2)))
            }
            _ => None,
        };
        for (v, largest) in [(op.inputs[0], largest)].into_iter().chain(beside) {
            let v = &p.values[v];
            if !(v.bound > 0.0 && v.bound <= largest * (1.0 + 1e-9)) {
                let (op_name, name, bound) = (op.kind.name(), &v.name, v.bound);
                let reason = format!("{op_name} reads {name}, proven up to {bound:.3e} units, {largest:.3e} fit");
                return Err(refuse(&p.values[op.outputs[0]].name, reason));
            }
        }
    }
    let out = &p.values[p.output];
    if out.bound >= pow2(out.bits - 1) {
        return Err(refuse(
            &out.name,
            format!("proven up to {:.3e} units, more than {} bits hold", out.bound, out.bits),
        ));
    }
    Ok(())
}
