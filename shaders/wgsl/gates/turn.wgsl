// Pairs of a head's values turned by masked cosines and sines. A thread makes both values of a pair.

struct Gate {
    n: u32,
    m: u32,
    l: u32,
    // Masked cosines, then as many sines.
    turn_m: u32,
    turn_l: u32,
    y: u32,
    // Pairs of a head.
    pairs: u32,
    k: u32,
    leads: u32,
    half_at: u32,
    half_form: u32,
}
@group(0) @binding(0) var<uniform> g: Gate;

// Of the product of a value and a cosine or sine, what is not dealt.
fn crossed(at: u32, i: u32) -> Word {
    let turn = load(g.turn_m + i);
    let own = minus(bit_and(spread(g.leads), turn), load(g.turn_l + i));
    return minus(times(load(g.m + at), own), times(load(g.l + at), turn));
}

fn run(e: u32) {
    let i = e % g.pairs;
    let first = e / g.pairs * 2u * g.pairs + i;
    let second = first + g.pairs;
    let cos = i;
    let sin = i + g.pairs;
    let y0 = minus(crossed(first, cos), crossed(second, sin));
    let y1 = plus(crossed(first, sin), crossed(second, cos));
    store(g.y + first, keep(plus(half(g.half_at, g.half_form, first), y0), g.k));
    store(g.y + second, keep(plus(half(g.half_at, g.half_form, second), y1), g.k));
}
