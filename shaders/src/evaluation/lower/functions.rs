//! Functions of one value: tails and joins, and what the processor makes.

use tacet_protocol::gates::join::Join;
use tacet_protocol::gates::spline::Spline;
use tacet_protocol::gates::tails::{REACH, Tails};

use super::{At, Lowered};
use crate::evaluation::gate::Gate;

pub(super) fn join(to: &mut Lowered, at: &At, g: &Join) {
    let mult = to.table(g.mult.iter().map(|m| *m as u64));
    let quarters = g.quarters().map(|q| to.table(q));
    let wraps = g.wraps().map(|w| to.table(w));
    let mut params = vec![
        at.masked(0),
        at.mask(0),
        at.masked(1),
        at.mask(1),
        at.masked(2),
        at.masked(3),
        at.out(0),
        at.lead(),
        g.k_in,
        g.k_series,
        g.k_out,
        g.drop,
        g.mult.len() as u32,
        mult,
        g.shift,
    ];
    params.extend([quarters, wraps].concat());
    params.push(to.table([g.series_wrap()]));
    params.extend((0..at.dealt.len()).flat_map(|slot| at.half(slot)));
    to.gate(Gate::Join, g.len, &params);
}

pub(super) fn tails(to: &mut Lowered, at: &At, g: &Tails) {
    let between = to.table32(g.inner.iter().map(|inner| REACH + inner));
    let (len, cols, [half, form]) = (g.len as u32, g.inner.len() as u32, at.half(0));
    let params = [len, at.masked(0), at.out(0), at.out(1), at.lead(), g.k - 7, cols, between, half, form];
    to.gate(Gate::Tails, g.out_len(), &params);
}

/// The share that the processor made.
pub(super) fn spline(to: &mut Lowered, at: &At, g: &Spline) {
    let ([fed, form], y) = (at.half(0), at.out(0));
    to.gate(Gate::Copy, g.rows, &[1, 0, 0, y]);
    to.gate(Gate::Unmask, g.rows, &[y, g.k_out, 0, fed, form]);
}
