// Words above 32 bits as pairs of u32, for adapters without 64-bit integers.

alias Word = vec2<u32>;
alias Four = Group;

fn load(g: Group) -> Four {
    return g;
}

// A weight has 16 bits, so that its product with half of a lower word is exact in 32.
fn weigh(sum: Four, x: Four, w: vec4<i32>) -> Four {
    let p = vec4<i32>(x.lower & vec4(0xffffu)) * w;
    let q = vec4<i32>(x.lower >> vec4(16u)) * w;
    let first = sum.lower + bitcast<vec4<u32>>(p);
    let shifted = bitcast<vec4<u32>>(q) << vec4(16u);
    let lower = first + shifted;
    let carries = select(vec4(0u), vec4(1u), first < sum.lower) + select(vec4(0u), vec4(1u), lower < first);
    let upper = bitcast<vec4<u32>>((p >> vec4(31u)) + (q >> vec4(16u))) + x.upper * bitcast<vec4<u32>>(w);
    return Group(lower, sum.upper + upper + carries);
}

fn multiply(sum: Four, x: Four, y: Four) -> Four {
    let half = vec4(0xffffu);
    let x0 = x.lower & half;
    let x1 = x.lower >> vec4(16u);
    let y0 = y.lower & half;
    let y1 = y.lower >> vec4(16u);
    let low = x0 * y0;
    // Below 2^32: the product of two halves leaves room for the upper half of another.
    let middle = x1 * y0 + (low >> vec4(16u));
    let other = x0 * y1 + (middle & half);
    let lower = sum.lower + x.lower * y.lower;
    let upper = x1 * y1 + (middle >> vec4(16u)) + (other >> vec4(16u)) + x.lower * y.upper + x.upper * y.lower;
    return Group(lower, sum.upper + upper + select(vec4(0u), vec4(1u), lower < sum.lower));
}

fn add(a: Word, b: Word) -> Word {
    let lower = a.x + b.x;
    return vec2(lower, a.y + b.y + select(0u, 1u, lower < a.x));
}

fn total(sum: Four) -> Word {
    let first = add(vec2(sum.lower.x, sum.upper.x), vec2(sum.lower.y, sum.upper.y));
    let second = add(vec2(sum.lower.z, sum.upper.z), vec2(sum.lower.w, sum.upper.w));
    return add(first, second);
}

fn group(a: Word, b: Word, c: Word, d: Word) -> Group {
    return Group(vec4(a.x, b.x, c.x, d.x), vec4(a.y, b.y, c.y, d.y));
}
