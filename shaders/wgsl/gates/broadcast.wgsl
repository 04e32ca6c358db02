// A row by scalars of its own, each for a group of columns.

struct Gate {
    n: u32,
    m: u32,
    l: u32,
    // The scalars, all rows' of one group after another.
    scalar_m: u32,
    scalar_l: u32,
    y: u32,
    rows: u32,
    cols: u32,
    // Columns of a group.
    dim: u32,
    k_x: u32,
    k: u32,
    leads: u32,
    product_at: u32,
    product_form: u32,
    // Where the rows' ring is narrower than the output's.
    carry_at: u32,
    carry_form: u32,
    top_at: u32,
    top_form: u32,
    top_product_at: u32,
    top_product_form: u32,
}
@group(0) @binding(0) var<uniform> g: Gate;

fn run(e: u32) {
    let j = e % g.cols / g.dim * g.rows + e / g.cols;
    let r = load(g.scalar_m + j);
    let own = minus(bit_and(spread(g.leads), r), load(g.scalar_l + j));
    var m = load(g.m + e);
    var y = minus(half(g.product_at, g.product_form, e), times(load(g.l + e), r));
    if g.k_x < g.k {
        let quarter = power(g.k_x - 2u);
        m = keep(plus(m, quarter), g.k_x);
        let wrapped = spread(1u - bit(m, g.k_x - 1u));
        m = minus(m, quarter);
        let count = plus(half(g.carry_at, g.carry_form, e), bit_and(wrapped, half(g.top_at, g.top_form, e)));
        let crossed = bit_and(wrapped, half(g.top_product_at, g.top_product_form, e));
        y = plus(y, left_by(minus(times(r, count), crossed), g.k_x));
    }
    store(g.y + e, keep(plus(y, times(m, own)), g.k));
}
