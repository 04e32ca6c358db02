// Which of 64 values lie above an interval and which inside it. A thread makes a word of either's bits.

struct Gate {
    n: u32,
    // Values there are.
    len: u32,
    m: u32,
    above: u32,
    inside: u32,
    leads: u32,
    // The lowest bit of a value's window.
    top: u32,
    cols: u32,
    // By column, places from the bit "above" to the bit "below".
    between: u32,
    half_at: u32,
    half_form: u32,
}
@group(0) @binding(0) var<uniform> g: Gate;

fn run(e: u32) {
    var above = vec2(0u);
    var inside = vec2(0u);
    let first = 64u * e;
    for (var j = 0u; j < min(64u, g.len - first); j++) {
        let at = first + j;
        let window = lower(right_by(load(g.m + at), g.top));
        let dealt = half(g.half_at, g.half_form, at);
        let up = bit(dealt, window % 64u);
        let below = bit(dealt, (window + tables[g.between + at % g.cols]) % 64u);
        above[j / 32u] |= up << (j % 32u);
        inside[j / 32u] |= (up ^ below ^ g.leads) << (j % 32u);
    }
    arena[g.above + e] = above;
    arena[g.inside + e] = inside;
}
