// Values at another scale, in another ring, or zero where they are flagged.

struct Gate {
    n: u32,
    m: u32,
    l: u32,
    // Masked flags, 64 to a word.
    flags: u32,
    y: u32,
    k_in: u32,
    k_out: u32,
    shift: u32,
    leads: u32,
    // Carries and top bits of masks, masks of flags, and what these times what is made of the mask are.
    carry_at: u32,
    carry_form: u32,
    top_at: u32,
    top_form: u32,
    flag_at: u32,
    flag_form: u32,
    flagged_at: u32,
    flagged_form: u32,
    flagged_top_at: u32,
    flagged_top_form: u32,
}
@group(0) @binding(0) var<uniform> g: Gate;

fn round_off(v: Word) -> Word {
    return right_by(plus(v, right_by(power(g.shift), 1u)), g.shift);
}

fn run(e: u32) {
    let quarter = power(g.k_in - 2u);
    // What is added where a sum left its ring.
    var wrap = word(0u);
    if g.k_in - g.shift < 64u {
        wrap = power(g.k_in - g.shift);
    }
    let m = keep(plus(load(g.m + e), quarter), g.k_in);
    let wrapped = bit_and(wrap, spread(1u - bit(m, g.k_in - 1u)));
    let public_part = minus(round_off(m), right_by(quarter, g.shift));
    let flag = half(g.flag_at, g.flag_form, e);
    let flagged = half(g.flagged_at, g.flagged_form, e);
    let flagged_top = half(g.flagged_top_at, g.flagged_top_form, e);
    var y = plus(minus(times(flag, public_part), flagged), times(wrapped, flagged_top));
    if bit(load(g.flags + e / 64u), e % 64u) == 0u {
        let own = minus(round_off(load(g.l + e)), times(wrap, half(g.carry_at, g.carry_form, e)));
        let kept = minus(bit_and(spread(g.leads), public_part), own);
        y = minus(plus(kept, times(wrapped, half(g.top_at, g.top_form, e))), y);
    }
    store(g.y + e, keep(y, g.k_out));
}
