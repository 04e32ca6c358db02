// Words of rings up to 32 bits: one u32 each, wrapping; the host drops bits above the ring.

alias Word = u32;
// Four words as they lie in memory.
alias Group = vec4<u32>;
// Four words as they are computed with.
alias Four = vec4<u32>;

fn load(g: Group) -> Four {
    return g;
}

fn weigh(sum: Four, x: Four, w: vec4<i32>) -> Four {
    return sum + x * bitcast<vec4<u32>>(w);
}

fn multiply(sum: Four, x: Four, y: Four) -> Four {
    return sum + x * y;
}

fn total(sum: Four) -> Word {
    return sum.x + sum.y + sum.z + sum.w;
}

fn group(a: Word, b: Word, c: Word, d: Word) -> Group {
    return vec4(a, b, c, d);
}

fn plus(a: Group, b: Group) -> Group {
    return a + b;
}
