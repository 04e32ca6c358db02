// Words above 32 bits as u64, for adapters that have them (SHADER_INT64).

alias Word = u64;
alias Four = vec4<u64>;

fn load(g: Group) -> Four {
    return vec4<u64>(g.lower) | (vec4<u64>(g.upper) << vec4(32u));
}

fn weigh(sum: Four, x: Four, w: vec4<i32>) -> Four {
    return sum + x * bitcast<vec4<u64>>(vec4<i64>(w));
}

fn multiply(sum: Four, x: Four, y: Four) -> Four {
    return sum + x * y;
}

fn total(sum: Four) -> Word {
    return sum.x + sum.y + sum.z + sum.w;
}

fn group(a: Word, b: Word, c: Word, d: Word) -> Group {
    return Group(vec4(u32(a), u32(b), u32(c), u32(d)), vec4(u32(a >> 32u), u32(b >> 32u), u32(c >> 32u), u32(d >> 32u)));
}
