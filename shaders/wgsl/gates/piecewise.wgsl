// A row's polynomials at every scale, and its flags. A workgroup serves a row, a thread a scale: there are 64 at most.

struct Gate {
    n: u32,
    m: u32,
    y: u32,
    flags: u32,
    // Scales; log2 of the finest window, and by how much those of the next scale are wider; windows.
    count: u32,
    drop: u32,
    stride: u32,
    windows: u32,
    // Coefficients of a polynomial, and bits of the position that it takes.
    terms: u32,
    rho_bits: u32,
    k_out: u32,
    coef_at: u32,
    coef_form: u32,
    // A table, by scale but for the last: where its flags are dealt, their form, log2 of the windows that have a bit.
    dealt: u32,
}
@group(0) @binding(0) var<uniform> g: Gate;

// The flag of a scale.
fn flag(row: u32, s: u32, m: Word) -> u32 {
    let t = g.dealt + 3u * s;
    let bits = tables[t + 2u];
    let at = lower(keep(right_by(m, g.drop + g.stride * (s + 1u)), bits));
    let words = 1u << (max(bits, 6u) - 6u);
    return bit(half(tables[t], tables[t + 1u], row * words + at / 64u), at % 64u);
}

fn value(row: u32, s: u32, m: Word) -> Word {
    let drop = g.drop + g.stride * s;
    let window = lower(right_by(m, drop)) % g.windows;
    let first = ((row * g.count + s) * g.windows + window) * g.terms;
    // Powers keep as many bits as the position, so that no rounded coefficient is multiplied by more.
    let p = right_by(keep(m, drop), drop - g.rho_bits);
    let square = right_by(times(p, p), g.rho_bits);
    var y = plus(
        half(g.coef_at, g.coef_form, first),
        times(half(g.coef_at, g.coef_form, first + 1u), p),
    );
    y = plus(y, times(half(g.coef_at, g.coef_form, first + 2u), square));
    let cube = right_by(times(square, p), g.rho_bits);
    y = plus(y, times(half(g.coef_at, g.coef_form, first + 3u), cube));
    if g.terms == 5u {
        let fourth = right_by(times(square, square), g.rho_bits);
        y = plus(y, times(half(g.coef_at, g.coef_form, first + 4u), fourth));
    }
    return keep(y, g.k_out);
}

fn run(row: u32, i: u32) {
    let m = load(g.m + row);
    var flags = word(0u);
    if i < g.count {
        store(g.y + row * g.count + i, value(row, i, m));
        if i + 1u < g.count {
            flags = left_by(word(flag(row, i, m)), i);
        }
    }
    // Every thread's is another bit.
    let all = total(i, flags);
    if i == 0u {
        store(g.flags + row, all);
    }
}
