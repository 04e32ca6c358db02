// Words as u64, for adapters that have them (SHADER_INT64).

alias Word = u64;

fn join(low: u32, high: u32) -> Word {
    return u64(low) | (u64(high) << 32u);
}

fn lower(a: Word) -> u32 {
    return u32(a);
}

fn upper(a: Word) -> u32 {
    return u32(a >> 32u);
}

fn plus(a: Word, b: Word) -> Word {
    return a + b;
}

fn minus(a: Word, b: Word) -> Word {
    return a - b;
}

fn times(a: Word, b: Word) -> Word {
    return a * b;
}

// By up to 63 bits, as below.
fn left_by(a: Word, n: u32) -> Word {
    return a << n;
}

fn right_by(a: Word, n: u32) -> Word {
    return a >> n;
}
