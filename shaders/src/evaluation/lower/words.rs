//! Gates that are computed word by word.

use tacet_protocol::gates::local::Truncate;
use tacet_protocol::gates::rescale::Rescale;

use super::{At, Lowered};
use crate::evaluation::gate::Gate;

pub(super) fn truncate(to: &mut Lowered, at: &At, g: &Truncate) {
    let offset = g.shift - 1 + u32::from(at.leads && g.raise);
    to.gate(Gate::Truncate, at.len_in(0), &[at.share(0), at.out(0), g.k, g.shift, offset]);
}

pub(super) fn rescale(to: &mut Lowered, at: &At, g: &Rescale) {
    let mult = to.table(g.mult.iter().map(|m| *m as u64));
    let (wrap, constants) = (to.table(g.wraps()), to.table(g.constants()));
    let ([carry, carry_form], [top, top_form]) = (at.half(0), at.half(1));
    let (cols, stride, first) = (g.mult.len() as u32, g.stride as u32, g.first as u32);
    let params = [
        at.masked(0),
        at.mask(0),
        at.out(0),
        cols,
        stride,
        first,
        g.k_in,
        g.k_out,
        g.shift,
        at.lead(),
        mult,
        wrap,
        constants,
        carry,
        carry_form,
        top,
        top_form,
    ];
    to.gate(Gate::Rescale, g.len(), &params);
}
