// Sums of squares of each row, of what it differs from its mean or of itself.

struct Gate {
    n: u32,
    m: u32,
    l: u32,
    y: u32,
    cols: u32,
    centre: u32,
    k: u32,
    leads: u32,
    square_at: u32,
    square_form: u32,
}
@group(0) @binding(0) var<uniform> g: Gate;

// m (m - 2 l), or what of it the evaluator has that does not lead.
fn term(m: Word, l: Word) -> Word {
    return times(m, minus(bit_and(spread(g.leads), m), plus(l, l)));
}

fn run(row: u32, i: u32) {
    let start = row * g.cols;
    var terms = word(0u);
    var m = word(0u);
    var l = word(0u);
    for (var c = i; c < g.cols; c += THREADS) {
        let x = load(g.m + start + c);
        let mask = load(g.l + start + c);
        terms = plus(terms, term(x, mask));
        m = plus(m, x);
        l = plus(l, mask);
    }
    terms = total(i, terms);
    if g.centre == 1u {
        m = total(i, m);
        l = total(i, l);
        terms = minus(times(word(g.cols), terms), term(m, l));
    }
    if i == 0u {
        store(g.y + row, keep(plus(half(g.square_at, g.square_form, row), terms), g.k));
    }
}
