// Moves every score by its key's bit. A workgroup makes a row.

struct Gate {
    n: u32,
    x: u32,
    bits: u32,
    y: u32,
    // Scores and rows of a head.
    head: u32,
    rows: u32,
    keys: u32,
    causal: u32,
    k: u32,
    leads: u32,
    // Of each head, what a key's bit raises its scores by; all are lowered by half of it.
    up: u32,
}
@group(0) @binding(0) var<uniform> g: Gate;

fn run(row: u32, i: u32) {
    let r = row % g.rows;
    let h = row / g.rows;
    let start = h * g.head + row_start(g.causal, g.keys, r);
    let len = row_len(g.causal, g.keys, r);
    let up = constant(g.up, h);
    let down = bit_and(spread(g.leads), right_by(up, 1u));
    for (var j = i; j < len; j += THREADS) {
        let by = minus(times(load(g.bits + j), up), down);
        store(g.y + start + j, keep(plus(load(g.x + start + j), by), g.k));
    }
}
