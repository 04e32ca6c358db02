// Pairs of a head's values rotated by public angles, at another scale and in another ring. A thread makes both values of a pair.

struct Gate {
    n: u32,
    m: u32,
    l: u32,
    y: u32,
    // Heads of a row, pairs of a head, columns of what is read, and the first of those.
    heads: u32,
    pairs: u32,
    stride: u32,
    first: u32,
    k_in: u32,
    k_out: u32,
    shift: u32,
    leads: u32,
    // Of each pair four multipliers of 32 bits, which differ by head or not.
    mults: u32,
    by_head: u32,
    carry_at: u32,
    carry_form: u32,
    top_at: u32,
    top_form: u32,
}
@group(0) @binding(0) var<uniform> g: Gate;

// An input as far as it does not depend on the multiplier.
struct Input {
    m: Word,
    l: Word,
    wraps: Word,
}

fn input(at: u32, out: u32) -> Input {
    let m = keep(plus(load(g.m + at), power(g.k_in - 2u)), g.k_in);
    let wrapped = spread(1u - bit(m, g.k_in - 1u));
    let wraps = plus(bit_and(wrapped, half(g.top_at, g.top_form, out)), half(g.carry_at, g.carry_form, out));
    return Input(m, load(g.l + at), wraps);
}

// What a wrap around the input's ring adds.
fn wrap(mult: Word) -> Word {
    if g.shift > g.k_in {
        return scaled(word(1u), mult, g.shift - g.k_in);
    }
    return left_by(mult, g.k_in - g.shift);
}

fn part(x: Input, at: u32) -> Word {
    let low = tables[at];
    let mult = join(low, 0u - (low >> 31u));
    let own = minus(times(x.wraps, wrap(mult)), scaled(x.l, mult, g.shift));
    if g.leads == 0u {
        return own;
    }
    return minus(plus(own, scaled(x.m, mult, g.shift)), scaled(power(g.k_in - 2u), mult, g.shift));
}

fn run(e: u32) {
    let i = e % g.pairs;
    let head = e / g.pairs % g.heads;
    let row = e / g.pairs / g.heads;
    let column = head * 2u * g.pairs + i;
    let at = row * g.stride + g.first + column;
    let out = row * g.heads * 2u * g.pairs + column;
    let mults = g.mults + 4u * select(row * g.pairs + i, e, g.by_head == 1u);
    let x0 = input(at, out);
    let x1 = input(at + g.pairs, out + g.pairs);
    store(g.y + out, keep(minus(part(x0, mults), part(x1, mults + 2u)), g.k_out));
    store(g.y + out + g.pairs, keep(plus(part(x0, mults + 1u), part(x1, mults + 3u)), g.k_out));
}
