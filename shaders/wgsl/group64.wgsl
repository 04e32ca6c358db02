// Words of rings above 32 bits in memory: the lower halves of four words, then their upper halves.

struct Group {
    lower: vec4<u32>,
    upper: vec4<u32>,
}

fn plus(a: Group, b: Group) -> Group {
    let lower = a.lower + b.lower;
    return Group(lower, a.upper + b.upper + select(vec4(0u), vec4(1u), lower < a.lower));
}
