// What exponentials and their flags have in common: a head's facts, and a score less its bound.

struct Gate {
    n: u32,
    // Masked scores and levels, and what is made.
    s: u32,
    level: u32,
    y: u32,
    // The grid of a head, and its scores.
    rows: u32,
    keys: u32,
    causal: u32,
    len: u32,
    heads: u32,
    k: u32,
    k_out: u32,
    // Windows of the dealt powers.
    windows: u32,
    // A table of what follows, of each head.
    facts: u32,
}
@group(0) @binding(0) var<uniform> g: Gate;

// A head's facts, by their place.
const LEVEL_SHIFT: u32 = 0u;
const WINDOW_BITS: u32 = 1u;
const FINE_BITS: u32 = 2u;
const SPARED: u32 = 3u;
const FLAG_WORDS: u32 = 4u;
const POWERS_AT: u32 = 5u;
const POWERS_FORM: u32 = 6u;
const FLAGS_AT: u32 = 7u;
const FLAGS_FORM: u32 = 8u;
const COARSE: u32 = 9u;
const FINE: u32 = 10u;
const HEADROOM: u32 = 11u;
const FACTS: u32 = 13u;

fn fact(head: u32, which: u32) -> u32 {
    return tables[g.facts + head * FACTS + which];
}

// What is added to the scores of a row.
fn offset(head: u32, row: u32) -> Word {
    let level = load(g.level + head * g.rows + row);
    let headroom = constant(g.facts + head * FACTS + HEADROOM, 0u);
    return minus(headroom, left_by(level, fact(head, LEVEL_SHIFT)));
}

fn below_bound(head: u32, score: u32, by: Word) -> Word {
    return keep(plus(load(g.s + head * g.len + score), by), g.k);
}
