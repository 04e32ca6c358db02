// Sums of squares of columns at another scale. A workgroup makes a sum.

struct Gate {
    n: u32,
    m: u32,
    y: u32,
    // Sums of a row, and columns of each.
    groups: u32,
    dim: u32,
    k_in: u32,
    k_out: u32,
    leads: u32,
    // Of each column.
    shifts: u32,
    square_at: u32,
    square_form: u32,
    large_at: u32,
    large_form: u32,
    top_at: u32,
    top_form: u32,
    both_at: u32,
    both_form: u32,
}
@group(0) @binding(0) var<uniform> g: Gate;

fn twice(a: Word) -> Word {
    return plus(a, a);
}

fn run(group: u32, i: u32) {
    let quarter = power(g.k_in - 2u);
    var own = word(0u);
    for (var c = i; c < g.dim; c += THREADS) {
        let e = group * g.dim + c;
        let shift = tables[g.shifts + group % g.groups * g.dim + c];
        // What a wrap adds, which may be nothing of 64 bits.
        let w = twice(power(g.k_in - shift - 1u));
        let m = keep(plus(load(g.m + e), quarter), g.k_in);
        let rounded = right_by(plus(m, right_by(power(shift), 1u)), shift);
        let p = minus(rounded, right_by(quarter, shift));
        let wrapped = bit_and(w, spread(1u - bit(m, g.k_in - 1u)));
        own = plus(own, bit_and(spread(g.leads), times(p, p)));
        let top = half(g.top_at, g.top_form, e);
        own = plus(own, times(times(wrapped, plus(w, twice(p))), top));
        own = minus(own, times(twice(p), half(g.large_at, g.large_form, e)));
        own = minus(own, times(twice(wrapped), half(g.both_at, g.both_form, e)));
    }
    let sum = total(i, own);
    if i == 0u {
        store(g.y + group, keep(plus(half(g.square_at, g.square_form, group), sum), g.k_out));
    }
}
