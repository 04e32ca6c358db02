// A row by scalars of its own, each for a group of columns.
//
// A workgroup makes a row, or any 64 words where rows are not centred.

struct Gate {
    n: u32,
    // Of the whole tensor.
    len: u32,
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
    centre: u32,
    k: u32,
    leads: u32,
    product_at: u32,
    product_form: u32,
}
@group(0) @binding(0) var<uniform> g: Gate;

fn write(e: u32, row: u32, c: u32, m: Word, l: Word) {
    let j = c / g.dim * g.rows + row;
    let r = load(g.scalar_m + j);
    let own = minus(bit_and(spread(g.leads), r), load(g.scalar_l + j));
    let dealt = half(g.product_at, g.product_form, e);
    store(g.y + e, keep(minus(plus(dealt, times(m, own)), times(l, r)), g.k));
}

fn run(row: u32, i: u32) {
    if g.centre == 0u {
        let e = row * THREADS + i;
        if e < g.len {
            write(e, e / g.cols, e % g.cols, load(g.m + e), load(g.l + e));
        }
    } else {
        let start = row * g.cols;
        var m = word(0u);
        var l = word(0u);
        for (var c = i; c < g.cols; c += THREADS) {
            m = plus(m, load(g.m + start + c));
            l = plus(l, load(g.l + start + c));
        }
        m = total(i, m);
        l = total(i, l);
        let cols = word(g.cols);
        for (var c = i; c < g.cols; c += THREADS) {
            let e = start + c;
            write(e, row, c, minus(times(load(g.m + e), cols), m), minus(times(load(g.l + e), cols), l));
        }
    }
}
