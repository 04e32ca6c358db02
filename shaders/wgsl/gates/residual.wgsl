// A layer's accumulators on a residual, and the sum of squares of each of its rows, for which a workgroup is.
//
// What is squared is the new residual, or both of its parts brought to a coarser unit: then the residual is made apart.

struct Gate {
    n: u32,
    cols: u32,
    // Masked words and halves of masks: of the accumulators, of the residual before.
    acc_m: u32,
    acc_l: u32,
    x_m: u32,
    x_l: u32,
    y: u32,
    sums: u32,
    leads: u32,
    k_acc: u32,
    k_x: u32,
    k_out: u32,
    k_squares: u32,
    // Multipliers of the columns of either part.
    mult: u32,
    own_mult: u32,
    // What is squared, of either part: its shift, and by column what a wrap adds and what is public.
    shift: u32,
    wrap: u32,
    constants: u32,
    own_shift: u32,
    own_wrap: u32,
    own_constants: u32,
    // Whether the residual is made apart, and the same of it.
    apart: u32,
    whole_shift: u32,
    whole_wrap: u32,
    whole_constants: u32,
    // Whether the residual before is scaled for that, and the same of it.
    scales: u32,
    before_shift: u32,
    before_wrap: u32,
    before_constants: u32,
    // Whether its own bits are dealt, and whether their products with the accumulators' are.
    rounds: u32,
    crosses: u32,
    sum_at: u32,
    sum_form: u32,
    carry_at: u32,
    carry_form: u32,
    top_at: u32,
    top_form: u32,
    cross_at: u32,
    cross_form: u32,
    own_carry_at: u32,
    own_carry_form: u32,
    own_top_at: u32,
    own_top_form: u32,
    own_cross_at: u32,
    own_cross_form: u32,
    both_at: u32,
    both_form: u32,
}
@group(0) @binding(0) var<uniform> g: Gate;

// What only the evaluator that leads adds.
fn led(w: Word) -> Word {
    return bit_and(spread(g.leads), w);
}

fn run(row: u32, i: u32) {
    var sum = word(0u);
    for (var c = i; c < g.cols; c += THREADS) {
        let e = row * g.cols + c;
        let acc = keep(plus(load(g.acc_m + e), power(g.k_acc - 2u)), g.k_acc);
        let x_m = load(g.x_m + e);
        let x = keep(plus(x_m, power(g.k_x - 2u)), g.k_x);
        let acc_l = load(g.acc_l + e);
        let x_l = load(g.x_l + e);
        let mult = constant(g.mult, c);
        let own_mult = constant(g.own_mult, c);
        // Where public parts wrapped, and with the carries how often masks did.
        let wrapped = spread(1u - bit(acc, g.k_acc - 1u));
        let own_wrapped = spread(1u - bit(x, g.k_x - 1u));
        let count = plus(
            bit_and(wrapped, half(g.top_at, g.top_form, e)),
            half(g.carry_at, g.carry_form, e),
        );
        var own_count = word(0u);
        if g.rounds == 1u {
            own_count = plus(
                bit_and(own_wrapped, half(g.own_top_at, g.own_top_form, e)),
                half(g.own_carry_at, g.own_carry_form, e),
            );
        }

        let wrap = constant(g.wrap, c);
        let own_wrap = constant(g.own_wrap, c);
        let p = plus(
            plus(scaled(acc, mult, g.shift), constant(g.constants, c)),
            plus(scaled(x, own_mult, g.own_shift), constant(g.own_constants, c)),
        );
        let z = plus(
            minus(minus(led(p), scaled(acc_l, mult, g.shift)), scaled(x_l, own_mult, g.own_shift)),
            plus(times(count, wrap), times(own_count, own_wrap)),
        );
        let w = bit_and(wrapped, wrap);
        let own_w = bit_and(own_wrapped, own_wrap);
        // 2 P z - P^2, less what wraps make of the squares of the dealer's part.
        sum = plus(sum, times(p, minus(left_by(z, 1u), led(p))));
        sum = minus(sum, times(w, half(g.cross_at, g.cross_form, e)));
        if g.rounds == 1u {
            sum = minus(sum, times(own_w, half(g.own_cross_at, g.own_cross_form, e)));
        }
        if g.crosses == 1u {
            sum = plus(sum, times(left_by(times(w, own_w), 1u), half(g.both_at, g.both_form, e)));
        }

        var y = z;
        if g.apart == 1u {
            let made = plus(scaled(acc, mult, g.whole_shift), constant(g.whole_constants, c));
            y = minus(led(made), scaled(acc_l, mult, g.whole_shift));
            y = plus(y, times(count, constant(g.whole_wrap, c)));
            if g.scales == 1u {
                let before = plus(scaled(x, own_mult, g.before_shift), constant(g.before_constants, c));
                y = plus(y, minus(led(before), scaled(x_l, own_mult, g.before_shift)));
                y = plus(y, times(own_count, constant(g.before_wrap, c)));
            } else {
                y = plus(y, minus(led(x_m), x_l));
            }
        }
        store(g.y + e, keep(y, g.k_out));
    }
    let squares = total(i, sum);
    if i == 0u {
        store(g.sums + row, keep(plus(squares, half(g.sum_at, g.sum_form, row)), g.k_squares));
    }
}
