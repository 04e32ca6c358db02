// Drops low bits of value and ring.

struct Gate {
    n: u32,
    x: u32,
    y: u32,
    k: u32,
    shift: u32,
    // Log2 of what is added.
    offset: u32,
}
@group(0) @binding(0) var<uniform> g: Gate;

fn run(e: u32) {
    store(g.y + e, right_by(keep(plus(load(g.x + e), power(g.offset)), g.k), g.shift));
}
