// Masks a share: m = x + l or x ^ l, of which l is kept.

struct Gate {
    n: u32,
    x: u32,
    m: u32,
    l: u32,
    bits: u32,
    exclusive: u32,
    half_at: u32,
    half_form: u32,
}
@group(0) @binding(0) var<uniform> g: Gate;

fn run(e: u32) {
    let l = half(g.half_at, g.half_form, e);
    store(g.l + e, l);
    store(g.m + e, added(load(g.x + e), l, g.exclusive, g.bits));
}
