// The product of two values, word by word.

struct Gate {
    n: u32,
    m: u32,
    l: u32,
    by_m: u32,
    by_l: u32,
    y: u32,
    k: u32,
    leads: u32,
    half_at: u32,
    half_form: u32,
}
@group(0) @binding(0) var<uniform> g: Gate;

fn run(e: u32) {
    let by = load(g.by_m + e);
    let own = minus(bit_and(spread(g.leads), by), load(g.by_l + e));
    let crossed = minus(times(load(g.m + e), own), times(load(g.l + e), by));
    store(g.y + e, keep(plus(half(g.half_at, g.half_form, e), crossed), g.k));
}
