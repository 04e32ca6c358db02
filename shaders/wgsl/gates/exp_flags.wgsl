// Flags of exponentials that vanish, 64 scores to a word, which a thread makes.

fn run(e: u32) {
    var head = 64u * e / g.len;
    var score = 64u * e % g.len;
    var row = row_of(g.causal, g.keys, g.rows, score);
    var next = row_start(g.causal, g.keys, row + 1u);
    var by = offset(head, row);
    var flags = word(0u);
    for (var j = 0u; j < 64u && head < g.heads; j++) {
        let window = lower(right_by(below_bound(head, score, by), fact(head, WINDOW_BITS)));
        let dealt = half(fact(head, FLAGS_AT), fact(head, FLAGS_FORM), score * fact(head, FLAG_WORDS) + window / 64u);
        flags = bit_or(flags, left_by(word(bit(dealt, window % 64u)), j));
        score++;
        if score == next {
            row++;
            if score == g.len {
                head++;
                score = 0u;
                row = 0u;
            }
            next = row_start(g.causal, g.keys, row + 1u);
            if head < g.heads {
                by = offset(head, row);
            }
        }
    }
    store(g.y + e, flags);
}
