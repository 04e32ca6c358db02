// Exponentials: the dealt power of a score's window times the public one of its place there. A workgroup for each row.

fn run(at: u32, i: u32) {
    let head = at / g.rows;
    let row = at % g.rows;
    let by = offset(head, row);
    let start = row_start(g.causal, g.keys, row);
    let bits = fact(head, WINDOW_BITS);
    let fine = fact(head, FINE_BITS);
    for (var j = i; j < row_len(g.causal, g.keys, row); j += THREADS) {
        let score = start + j;
        let x = below_bound(head, score, by);
        let window = lower(right_by(x, bits)) & (g.windows - 1u);
        let dealt = half(fact(head, POWERS_AT), fact(head, POWERS_FORM), score * g.windows + window);
        let place = lower(right_by(keep(x, bits), bits - 8u - fine));
        let coarse = fact(head, COARSE) + 2u * ((place >> fine) & 255u);
        let p = product(tables[coarse], tables[fact(head, FINE) + (place & ((1u << fine) - 1u))]);
        // Half up, with one shift that is not known.
        let factor = right_by(plus(right_by(join(p.x, p.y), tables[coarse + 1u] - 1u), word(1u)), 1u);
        store(g.y + head * g.len + score, keep(times(left_by(dealt, fact(head, SPARED)), factor), g.k_out));
    }
}
