// The number of clear bits of each row, in a ring of at most 32 bits. A workgroup serves a row, a thread one bit of each word.

struct Gate {
    n: u32,
    m: u32,
    y: u32,
    leads: u32,
    // Of so many parts: the first row, the words of a row, the words before, and the half.
    count: u32,
    parts: u32,
}
@group(0) @binding(0) var<uniform> g: Gate;

fn run(row: u32, i: u32) {
    let part = part_of(row, g.parts, g.count, 5u);
    let words = tables[part + 1u];
    let start = (row - tables[part]) * words;
    let m = g.m + tables[part + 2u] + start;
    let form = tables[part + 4u];
    var sum = 0u;
    for (var w = 0u; w < words; w++) {
        let c = bit(load(m + w), i);
        let r = lower(half(tables[part + 3u], form, 64u * (start + w) + i));
        sum += select(0u - r, r, c == 1u) + (g.leads & (1u - c));
    }
    let all = total(i, word(sum));
    if i == 0u {
        store(g.y + row, keep(all, form >> 8u));
    }
}
