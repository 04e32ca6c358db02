// Words as pairs of u32, for adapters without 64-bit integers.

alias Word = vec2<u32>;

fn join(low: u32, high: u32) -> Word {
    return vec2(low, high);
}

fn lower(a: Word) -> u32 {
    return a.x;
}

fn upper(a: Word) -> u32 {
    return a.y;
}

fn plus(a: Word, b: Word) -> Word {
    let low = a.x + b.x;
    return vec2(low, a.y + b.y + select(0u, 1u, low < a.x));
}

fn minus(a: Word, b: Word) -> Word {
    return vec2(a.x - b.x, a.y - b.y - select(0u, 1u, a.x < b.x));
}

fn times(a: Word, b: Word) -> Word {
    let p = product(a.x, b.x);
    return vec2(p.x, p.y + a.x * b.y + a.y * b.x);
}

// By up to 63 bits, as below.
fn left_by(a: Word, n: u32) -> Word {
    if n == 0u {
        return a;
    }
    if n >= 32u {
        return vec2(0u, a.x << (n - 32u));
    }
    return vec2(a.x << n, (a.y << n) | (a.x >> (32u - n)));
}

fn right_by(a: Word, n: u32) -> Word {
    if n == 0u {
        return a;
    }
    if n >= 32u {
        return vec2(a.y >> (n - 32u), 0u);
    }
    return vec2((a.x >> n) | (a.y << (32u - n)), a.y >> n);
}
