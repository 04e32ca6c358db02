//! Gates of decoders: levels that few rows reach, moved and rotated positions, and products word by word.

use tacet_protocol::gates::hadamard::Hadamard;
use tacet_protocol::gates::reached::Reached;
use tacet_protocol::gates::rotate::Rotate;
use tacet_protocol::gates::turn::Turn;

use super::bits::{joined, rows};
use super::{At, Lowered, Unfit};
use crate::evaluation::gate::Gate;

pub(super) fn reached(to: &mut Lowered, at: &At, g: &Reached) {
    let parts = joined(&g.segments);
    let (members, count) = (g.members as u32, parts.len() as u32);
    let table = to.table32(parts.into_iter().flatten());
    let [half, form] = at.half(0);
    let params = [at.masked(0), at.out(0), members, g.k, at.lead(), count, table, half, form];
    to.gate(Gate::Reached, rows(&g.segments), &params);
}

/// Pairs of a head, of which the kernels leave no value as it is.
fn pairs(dim: usize, frequencies: usize) -> Result<u32, Unfit> {
    if dim == 2 * frequencies { Ok(frequencies as u32) } else { Err(Unfit) }
}

pub(super) fn turn(to: &mut Lowered, at: &At, g: &Turn) -> Result<(), Unfit> {
    let pairs = pairs(g.dim, at.len_in(1) / 2)?;
    let [half, form] = at.half(0);
    let [m, l, turn_m, turn_l] = [at.masked(0), at.mask(0), at.masked(1), at.mask(1)];
    let params = [m, l, turn_m, turn_l, at.out(0), pairs, g.k, at.lead(), half, form];
    to.gate(Gate::Turn, g.rows * g.cols / 2, &params);
    Ok(())
}

pub(super) fn rotate(to: &mut Lowered, at: &At, g: &Rotate) -> Result<(), Unfit> {
    let pairs = pairs(g.dim, g.frequencies.len())?;
    let heads = g.scale.len() / g.dim;
    let all = g.multipliers();
    // By row: where heads have the same scales, the first head's serve all.
    let head = pairs as usize;
    let by_row = || all.chunks_exact(heads * head);
    let by_head = by_row().any(|row| row[head..] != row[..row.len() - head]);
    let kept = by_row().flat_map(|row| &row[..if by_head { row.len() } else { head }]);
    let narrow = |mult: &i64| i32::try_from(*mult).map(|mult| mult as u32);
    let mults: Vec<u32> = kept.flatten().map(narrow).collect::<Result<_, _>>().map_err(|_| Unfit)?;
    let mults = to.table32(mults);
    let ([carry, carry_form], [top, top_form]) = (at.half(0), at.half(1));
    let params = [
        at.masked(0),
        at.mask(0),
        at.out(0),
        heads as u32,
        pairs,
        g.stride as u32,
        g.first as u32,
        g.k_in,
        g.k_out,
        g.shift(),
        at.lead(),
        mults,
        u32::from(by_head),
        carry,
        carry_form,
        top,
        top_form,
    ];
    to.gate(Gate::Rotate, all.len(), &params);
    Ok(())
}

pub(super) fn hadamard(to: &mut Lowered, at: &At, g: &Hadamard) {
    let [half, form] = at.half(0);
    let [m, l, by_m, by_l] = [at.masked(0), at.mask(0), at.masked(1), at.mask(1)];
    to.gate(Gate::Hadamard, g.len, &[m, l, by_m, by_l, at.out(0), g.k, at.lead(), half, form]);
}
