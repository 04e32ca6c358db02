// Adds what the other evaluator sent to what this one did.

struct Gate {
    n: u32,
    m: u32,
    bits: u32,
    exclusive: u32,
    half_at: u32,
    half_form: u32,
}
@group(0) @binding(0) var<uniform> g: Gate;

fn run(e: u32) {
    let other = half(g.half_at, g.half_form, e);
    store(g.m + e, added(load(g.m + e), other, g.exclusive, g.bits));
}
