// Packs words at their ring's bits each: a thread makes two u32 of the message.

struct Gate {
    n: u32,
    // Words there are.
    words: u32,
    m: u32,
    to: u32,
    bits: u32,
}
@group(0) @binding(0) var<uniform> g: Gate;

// The message's 32 bits from bit `from` on.
fn bits_from(start: u32) -> u32 {
    var made = 0u;
    var e = start / g.bits;
    // Bits of the word that come before.
    var skipped = start % g.bits;
    var have = 0u;
    while have < 32u && e < g.words {
        made |= lower(right_by(load(g.m + e), skipped)) << have;
        have += g.bits - skipped;
        skipped = 0u;
        e++;
    }
    return made;
}

fn run(e: u32) {
    arena[g.to + e] = vec2(bits_from(64u * e), bits_from(64u * e + 32u));
}
