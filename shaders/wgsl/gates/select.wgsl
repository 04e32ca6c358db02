// Of each row's values at several scales, the one that its flags pick. A workgroup serves a row, whose threads share the scales.

struct Gate {
    n: u32,
    m: u32,
    flags: u32,
    y: u32,
    scales: u32,
    // How many scales wider the flag is that one relies on.
    reach: u32,
    k_in: u32,
    k_out: u32,
    // A table, by scale: see `ENTRY`.
    each: u32,
}
@group(0) @binding(0) var<uniform> g: Gate;

// By scale: bits dropped of its unit and bits added to it, log2 of what a wrap adds, how many flags decide, log2 of what the
// products with masks are multiples of; where its four tensors are, and their forms, or zeros.
const ENTRY: u32 = 13u;

// What is dealt for what is opened, of a scale's n-th tensor.
fn dealt(t: u32, n: u32, at: u32) -> Word {
    let form = tables[t + 6u + 2u * n];
    if form == 0u {
        return word(0u);
    }
    return half(tables[t + 5u + 2u * n], form, at);
}

// What is public of a value, at the unit of the result.
fn at_unit(m: Word, t: u32) -> Word {
    let v = minus(m, power(g.k_in - 2u));
    let drop = tables[t];
    let sum = plus(v, right_by(power(drop), 1u));
    // The sign stays.
    let sign = spread(upper(sum) >> 31u);
    return left_by(bit_xor(right_by(bit_xor(sum, sign), drop), sign), tables[t + 1u]);
}

// What a wrap adds to a value whose mask's top bit is dealt, in the n-th tensor of `t`; `own` is the entry of its scale.
fn wrap(m: Word, t: u32, n: u32, at: u32, own: u32) -> Word {
    if tables[t + 6u + 2u * n] == 0u {
        return word(0u);
    }
    let wrapped = spread(1u - bit(m, g.k_in - 1u));
    return left_by(bit_and(wrapped, dealt(t, n, at)), tables[own + 2u]);
}

fn raised(at: u32) -> Word {
    return keep(plus(load(at), power(g.k_in - 2u)), g.k_in);
}

fn run(row: u32, i: u32) {
    let opened = load(g.flags + row);
    var sum = word(0u);
    for (var s = i; s < g.scales; s += THREADS) {
        let t = g.each + ENTRY * s;
        let last = s + 1u == g.scales;
        // Flags that decide, side by side.
        var case_at = row << tables[t + 3u];
        for (var j = 0u; j < tables[t + 3u]; j++) {
            case_at |= bit(opened, s + j * g.reach) << j;
        }
        let m = raised(g.m + row * g.scales + s);
        var step = at_unit(m, t);
        sum = plus(sum, wrap(m, t, 1u, case_at, t));
        if !last {
            let next = raised(g.m + row * g.scales + s + 1u);
            step = minus(step, at_unit(next, t + ENTRY));
            sum = minus(sum, wrap(next, t, 2u, case_at, t + ENTRY));
        }
        sum = plus(sum, times(dealt(t, 0u, case_at), step));
        sum = minus(sum, left_by(dealt(t, 3u, case_at), tables[t + 4u]));
    }
    let picked = total(i, sum);
    if i == 0u {
        store(g.y + row, keep(picked, g.k_out));
    }
}
