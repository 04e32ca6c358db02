//! Residuals and their squares.

use tacet_protocol::gates::rescale::Rescale;
use tacet_protocol::gates::residual::Residual;

use super::{At, Lowered};
use crate::evaluation::gate::Gate;

/// The shift of a rescaling, and tables of what a wrap adds and of what is public.
fn terms(to: &mut Lowered, g: &Rescale) -> [u32; 3] {
    [g.shift, to.table(g.wraps()), to.table(g.constants())]
}

pub(super) fn residual(to: &mut Lowered, at: &At, g: &Residual) {
    let parts = g.parts();
    let mults = parts.each_ref().map(|part| to.table(part.mult.iter().map(|m| *m as u64)));
    let squared = parts.each_ref().map(|part| terms(to, part));
    let apart = g.shift > 0;
    let whole = if apart { terms(to, &g.scale) } else { [0; 3] };
    let scaled = g.before.as_ref().filter(|_| apart);
    let before = scaled.map_or([0; 3], |before| terms(to, before));
    let mut params = vec![
        g.scale.mult.len() as u32,
        at.masked(0),
        at.mask(0),
        at.masked(1),
        at.mask(1),
        at.out(0),
        at.out(1),
        at.lead(),
        parts[0].k_in,
        parts[1].k_in,
        g.scale.k_out,
        g.k_squares,
    ];
    params.extend(mults);
    params.extend(squared.concat());
    params.push(u32::from(apart));
    params.extend(whole);
    params.push(u32::from(scaled.is_some()));
    params.extend(before);
    params.extend([u32::from(g.rounds_before()), u32::from(at.dealt.len() == 8)]);
    params.extend((0..at.dealt.len()).flat_map(|slot| at.half(slot)));
    to.gate(Gate::Residual, g.scale.rows, &params);
}
