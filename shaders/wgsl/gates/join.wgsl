// A function from its series inside an interval and its asymptotes beyond: above x + inside (x / 2 + s).

struct Gate {
    n: u32,
    // Masked words and halves of masks: of x, of the series; masked bits.
    x_m: u32,
    x_l: u32,
    s_m: u32,
    s_l: u32,
    above: u32,
    inside: u32,
    y: u32,
    leads: u32,
    k_in: u32,
    k_series: u32,
    k_out: u32,
    drop: u32,
    // Columns: their multipliers, and of x and of x / 2 what a quarter of the ring makes and what a wrap adds.
    cols: u32,
    mult: u32,
    shift: u32,
    quarter: u32,
    half_quarter: u32,
    wrap: u32,
    half_wrap: u32,
    // What a wrap adds to the series, a single word.
    series_wrap: u32,
    // Carries and top bits of both masks.
    carry_at: u32,
    carry_form: u32,
    series_carry_at: u32,
    series_carry_form: u32,
    top_at: u32,
    top_form: u32,
    series_top_at: u32,
    series_top_form: u32,
    // The bit of "above", and its products with what masks make and with the top bit.
    r_at: u32,
    r_form: u32,
    ra_at: u32,
    ra_form: u32,
    rb_at: u32,
    rb_form: u32,
    // That of "inside", and its products with what masks make and with both top bits.
    q_at: u32,
    q_form: u32,
    qu_at: u32,
    qu_form: u32,
    qb_at: u32,
    qb_form: u32,
    qs_at: u32,
    qs_form: u32,
}
@group(0) @binding(0) var<uniform> g: Gate;

fn dropped(s: Word) -> Word {
    return right_by(plus(s, right_by(power(g.drop), 1u)), g.drop);
}

// What a bit times a value is, of which one share is given, and one of the mask's bit times it: where the bit is opened as one,
// the latter counts negative.
fn chosen(opened: u32, share: Word, gated: Word) -> Word {
    let one = spread(opened);
    return plus(bit_and(one, share), minus(bit_xor(gated, one), one));
}

fn run(e: u32) {
    let c = e % g.cols;
    let mult = constant(g.mult, c);
    let wrap = constant(g.wrap, c);
    let half_wrap = constant(g.half_wrap, c);
    let series_wrap = constant(g.series_wrap, 0u);
    let raised = keep(plus(load(g.x_m + e), power(g.k_in - 2u)), g.k_in);
    let l = load(g.x_l + e);
    let series = keep(plus(load(g.s_m + e), power(g.k_series - 2u)), g.k_series);
    // What is added where a mask's top bit is set.
    let wrapped = spread(1u - bit(raised, g.k_in - 1u));
    let wx = bit_and(wrapped, wrap);
    let wu = bit_and(wrapped, half_wrap);
    let ws = bit_and(spread(1u - bit(series, g.k_series - 1u)), series_wrap);
    // What is public of x and of x / 2 + s.
    let x = minus(scaled(raised, mult, g.shift), constant(g.quarter, c));
    let u = plus(
        minus(scaled(raised, mult, g.shift + 1u), constant(g.half_quarter, c)),
        minus(dropped(series), right_by(power(g.k_series - 2u), g.drop)),
    );

    let carry = half(g.carry_at, g.carry_form, e);
    let top = half(g.top_at, g.top_form, e);
    let leads = spread(g.leads);
    var share = minus(bit_and(leads, x), scaled(l, mult, g.shift));
    share = plus(share, plus(times(wrap, carry), times(wx, top)));
    var share_u = minus(bit_and(leads, u), plus(scaled(l, mult, g.shift + 1u), dropped(load(g.s_l + e))));
    share_u = plus(share_u, plus(times(half_wrap, carry), times(wu, top)));
    share_u = plus(share_u, times(series_wrap, half(g.series_carry_at, g.series_carry_form, e)));
    share_u = plus(share_u, times(ws, half(g.series_top_at, g.series_top_form, e)));
    var gated = minus(times(half(g.r_at, g.r_form, e), x), half(g.ra_at, g.ra_form, e));
    gated = plus(gated, times(wx, half(g.rb_at, g.rb_form, e)));
    var gated_u = minus(times(half(g.q_at, g.q_form, e), u), half(g.qu_at, g.qu_form, e));
    gated_u = plus(gated_u, times(wu, half(g.qb_at, g.qb_form, e)));
    gated_u = plus(gated_u, times(ws, half(g.qs_at, g.qs_form, e)));
    let above = chosen(bit(load(g.above + e / 64u), e % 64u), share, gated);
    let inside = chosen(bit(load(g.inside + e / 64u), e % 64u), share_u, gated_u);
    store(g.y + e, keep(plus(above, inside), g.k_out));
}
