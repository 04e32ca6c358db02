// The conjunction of several members' bits. A thread makes one word.

struct Gate {
    n: u32,
    m: u32,
    l: u32,
    y: u32,
    // Members, of which there are 2 to 5, and products of two or more of them.
    members: u32,
    products: u32,
    leads: u32,
    // Of so many parts: the first word that is made, and the words of a member.
    count: u32,
    parts: u32,
    half_at: u32,
    half_form: u32,
}
@group(0) @binding(0) var<uniform> g: Gate;

// Masked words of a member; all ones where there is none.
fn member(i: u32, first: u32, words: u32) -> Word {
    if i < g.members {
        return load(g.m + first + i * words);
    }
    return spread(1u);
}

fn run(e: u32) {
    let part = part_of(e, g.parts, g.count, 2u);
    let words = tables[part + 1u];
    let w = (e - tables[part]) % words;
    let first = (e - w) * g.members + w;
    let m0 = member(0u, first, words);
    let m1 = member(1u, first, words);
    let m2 = member(2u, first, words);
    let m3 = member(3u, first, words);
    let m4 = member(4u, first, words);
    // Products are dealt for up to four words of a row at a time.
    var together = 1u;
    if words % 4u == 0u {
        together = 4u;
    } else if words % 4u == 2u {
        together = 2u;
    }
    let apart = w % together;
    var dealt = (e - apart) * g.products + apart;
    var sum = word(0u);
    for (var s = 0u; s < 1u << g.members; s++) {
        // Masks of the set, times masked words of the others.
        var term: Word;
        if s == 0u {
            term = spread(g.leads);
        } else if (s & (s - 1u)) == 0u {
            term = load(g.l + first + firstTrailingBit(s) * words);
        } else {
            term = half(g.half_at, g.half_form, dealt);
            dealt += together;
        }
        term = bit_and(term, bit_or(m0, spread(s & 1u)));
        term = bit_and(term, bit_or(m1, spread((s >> 1u) & 1u)));
        term = bit_and(term, bit_or(m2, spread((s >> 2u) & 1u)));
        term = bit_and(term, bit_or(m3, spread((s >> 3u) & 1u)));
        term = bit_and(term, bit_or(m4, spread((s >> 4u) & 1u)));
        sum = bit_xor(sum, term);
    }
    store(g.y + e, sum);
}
