// The sum of each row of scores.

struct Gate {
    n: u32,
    x: u32,
    y: u32,
    // Scores and rows of a head.
    head: u32,
    rows: u32,
    keys: u32,
    causal: u32,
    k: u32,
}
@group(0) @binding(0) var<uniform> g: Gate;

fn run(row: u32, i: u32) {
    let r = row % g.rows;
    let start = g.x + row / g.rows * g.head + row_start(g.causal, g.keys, r);
    let len = row_len(g.causal, g.keys, r);
    var own = word(0u);
    for (var j = i; j < len; j += THREADS) {
        own = plus(own, load(start + j));
    }
    let sum = total(i, own);
    if i == 0u {
        store(g.y + row, keep(sum, g.k));
    }
}
