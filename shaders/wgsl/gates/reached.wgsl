// The number of positions of each row at which not all members' bits are set. A workgroup serves a row, a thread one position
// of each word.

struct Gate {
    n: u32,
    m: u32,
    y: u32,
    members: u32,
    k: u32,
    leads: u32,
    // Of so many parts: the first row, the words of a member, and words of one member in the rows before.
    count: u32,
    parts: u32,
    half_at: u32,
    half_form: u32,
}
@group(0) @binding(0) var<uniform> g: Gate;

fn run(row: u32, i: u32) {
    let part = part_of(row, g.parts, g.count, 3u);
    let words = tables[part + 1u];
    let start = tables[part + 2u] + (row - tables[part]) * words;
    var sum = word(0u);
    for (var w = 0u; w < words; w++) {
        var c = 0u;
        for (var member = 0u; member < g.members; member++) {
            c |= bit(load(g.m + start * g.members + member * words + w), i) << member;
        }
        // The entry that is one where all bits are set.
        let entry = ((64u * (start + w) + i) << g.members) + c;
        sum = plus(sum, minus(word(g.leads), half(g.half_at, g.half_form, entry)));
    }
    let all = total(i, sum);
    if i == 0u {
        store(g.y + row, keep(all, g.k));
    }
}
