//! Gates on packed bits: levels that a row reaches, conjunctions, counts, and rescaling by flags.

use tacet_protocol::gates::bits::{And, CountClear, Segment};
use tacet_protocol::gates::exp::FlagRescale;
use tacet_protocol::gates::rowmax::{RowMax, TESTS};

use super::{At, Lowered, Unfit, causal};
use crate::evaluation::gate::{Gate, THREADS};

/// The kernel holds its tests four by four.
const _: () = assert!(TESTS == 20);

/// Segments that are not empty, each with the rows and the words of one member before it.
pub(super) fn parts(segments: &[Segment]) -> impl Iterator<Item = (Segment, [u32; 2])> {
    let before = segments.iter().scan([0, 0], |next, s| {
        let at = *next;
        *next = [at[0] + s.rows as u32, at[1] + (s.rows * s.words) as u32];
        Some((*s, at))
    });
    before.filter(|(s, _)| s.rows * s.words > 0)
}

/// The same, segments of the same words joined: the first row, words, and words before.
pub(super) fn joined(segments: &[Segment]) -> Vec<[u32; 3]> {
    let mut all: Vec<_> = parts(segments).map(|(s, [row, word])| [row, s.words as u32, word]).collect();
    all.dedup_by_key(|part| part[1]);
    all
}

/// Rows of all segments.
pub(super) fn rows(segments: &[Segment]) -> usize {
    segments.iter().map(|s| s.rows).sum()
}

pub(super) fn row_max(to: &mut Lowered, at: &At, g: &RowMax) -> Result<(), Unfit> {
    let heads = g.levels.len();
    // A workgroup's threads are divided among a row's words.
    if (0..heads).any(|h| g.words(h) > THREADS || !g.words(h).is_power_of_two()) {
        return Err(Unfit);
    }
    let mut first = 0;
    let about = (0..heads).flat_map(|h| {
        let ([half, form], words) = (at.half(h), g.words(h));
        let start = first;
        first += (g.grid.rows * TESTS * words) as u32;
        let levels = g.levels[h];
        [half, form, words as u32, g.k - levels.bits, start, levels.first, levels.of_ring() as u32]
    });
    let (about, sets) = (to.table32(about), to.table32(g.subsets()));
    let [rows, keys, scores] = [g.grid.rows, g.grid.keys, g.grid.len()].map(|n| n as u32);
    let params = [at.masked(0), at.out(0), rows, keys, scores, causal(&g.grid), g.k, at.lead(), about, sets];
    to.gate(Gate::RowMax, heads * g.grid.rows, &params);
    Ok(())
}

pub(super) fn and(to: &mut Lowered, at: &At, g: &And) {
    let parts = joined(&g.segments);
    let (count, table) = (parts.len(), to.table32(parts.into_iter().flat_map(|[_, words, before]| [before, words])));
    let (total, products) = (g.segments.iter().map(|s| s.rows * s.words).sum(), (1 << g.members) - 1 - g.members);
    let [half, form] = at.half(0);
    let [members, products, count] = [g.members, products, count].map(|n| n as u32);
    let (m, l, y) = (at.masked(0), at.mask(0), at.out(0));
    to.gate(Gate::And, total, &[m, l, y, members, products, at.lead(), count, table, half, form]);
}

pub(super) fn count_clear(to: &mut Lowered, at: &At, g: &CountClear) -> Result<(), Unfit> {
    if g.rings.iter().any(|k| *k > 32) {
        return Err(Unfit);
    }
    // Halves belong to segments, of which those that are empty have one too.
    let slots = (0..).zip(&g.segments).filter(|(_, s)| s.rows * s.words > 0).map(|(slot, _)| at.half(slot));
    let parts = parts(&g.segments).zip(slots);
    let about: Vec<_> = parts.map(|((s, [row, word]), [half, form])| [row, s.words as u32, word, half, form]).collect();
    let count = about.len() as u32;
    let table = to.table32(about.into_iter().flatten());
    to.gate(Gate::CountClear, rows(&g.segments), &[at.masked(0), at.out(0), at.lead(), count, table]);
    Ok(())
}

pub(super) fn flag_rescale(to: &mut Lowered, at: &At, g: &FlagRescale) {
    let own = [at.masked(0), at.mask(0), at.masked(1), at.out(0), g.k_in, g.k_out, g.shift, at.lead()];
    let halves = (0..5).flat_map(|slot| at.half(slot));
    let params: Vec<u32> = own.into_iter().chain(halves).collect();
    to.gate(Gate::FlagRescale, g.len, &params);
}
