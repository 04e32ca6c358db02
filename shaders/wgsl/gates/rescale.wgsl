// Columns at another scale, in another ring.

struct Gate {
    n: u32,
    m: u32,
    l: u32,
    y: u32,
    // Columns of the result, and of what is read, and the first of those.
    cols: u32,
    stride: u32,
    first: u32,
    k_in: u32,
    k_out: u32,
    shift: u32,
    leads: u32,
    // Of each column: the multiplier, what a wrap adds, what is public.
    mult: u32,
    wrap: u32,
    constants: u32,
    carry_at: u32,
    carry_form: u32,
    top_at: u32,
    top_form: u32,
}
@group(0) @binding(0) var<uniform> g: Gate;

fn run(e: u32) {
    let c = e % g.cols;
    let start = e / g.cols * g.stride + g.first + c;
    let mult = constant(g.mult, c);
    let m = keep(plus(load(g.m + start), power(g.k_in - 2u)), g.k_in);
    var y = negative(scaled(load(g.l + start), mult, g.shift));
    if g.leads == 1u {
        y = plus(y, plus(scaled(m, mult, g.shift), constant(g.constants, c)));
    }
    let wrapped = spread(1u - bit(m, g.k_in - 1u));
    let count = plus(bit_and(wrapped, half(g.top_at, g.top_form, e)), half(g.carry_at, g.carry_form, e));
    store(g.y + e, keep(plus(y, times(count, constant(g.wrap, c))), g.k_out));
}
