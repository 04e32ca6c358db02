//! Gates of which the public part comes from tables: exponentials and cosine series.

use tacet_protocol::gates::cosine::{Cosine, LANES};
use tacet_protocol::gates::exp::Exp;

use super::{At, Lowered, Unfit, causal};
use crate::evaluation::gate::Gate;

/// The facts of a head are in the order of `wgsl/gates/exp_head.wgsl`.
pub(super) fn exp(to: &mut Lowered, at: &At, g: &Exp) -> Result<(), Unfit> {
    let mut facts = Vec::new();
    for (i, head) in g.heads.iter().enumerate() {
        // Few scores have none.
        let powers = g.public_tables(i).ok_or(Unfit)?;
        let coarse = to.table32(powers.coarse.into_iter().flatten());
        let fine = to.table32(powers.fine);
        let ([powers_at, powers_form], [flags_at, flags_form]) = (at.half(2 * i), at.half(2 * i + 1));
        let words = g.dealt()[2 * i + 1].0 / g.grid.len();
        let headroom = g.headroom(*head);
        facts.extend([g.k - head.levels.bits, powers.bits, powers.fine_bits, g.spared(head), words as u32]);
        facts.extend([powers_at, powers_form, flags_at, flags_form, coarse, fine]);
        facts.extend([headroom as u32, (headroom >> 32) as u32]);
    }
    let facts = to.table32(facts);
    let [rows, keys, len, heads, windows] =
        [g.grid.rows, g.grid.keys, g.grid.len(), g.heads.len(), g.windows()].map(|n| n as u32);
    let params =
        |y| [at.masked(0), at.masked(1), y, rows, keys, causal(&g.grid), len, heads, g.k, g.k_out, windows, facts];
    to.gate(Gate::Exp, g.heads.len() * g.grid.rows, &params(at.out(0)));
    to.gate(Gate::ExpFlags, g.flag_len(), &params(at.out(1)));
    Ok(())
}

pub(super) fn cosine(to: &mut Lowered, at: &At, g: &Cosine) {
    let series = g.series();
    let (mut blocks, mut dealt) = (Vec::new(), 0);
    for block in &series.blocks {
        let factors = block.factors.iter().flatten().map(|a| *a as u32);
        blocks.extend([block.factors.len() as u32, dealt, to.table32(factors)]);
        dealt += (2 * LANES * block.factors.len()) as u32;
    }
    let turns = to.table32(series.blocks.iter().flat_map(|b| b.turns));
    let constants = to.table(series.blocks.iter().flat_map(|b| b.constant));
    let blocks = to.table32(blocks);
    let angles = match to.angles {
        Some(known) => known,
        None => to.table32(Cosine::angles().as_flattened().as_flattened().iter().map(|v| *v as u32)),
    };
    to.angles = Some(angles);
    let ([half, form], cols) = (at.half(0), g.columns.coef.len());
    let params = [
        at.masked(0),
        at.out(0),
        cols as u32,
        dealt,
        g.period,
        g.k_out,
        series.shift,
        at.lead(),
        turns,
        blocks,
        constants,
        angles,
        half,
        form,
    ];
    to.gate(Gate::Cosine, g.rows * cols, &params);
}
