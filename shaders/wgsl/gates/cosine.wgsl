// Cosine series: of each harmonic the dealt cosine and sine of the mask times those of the masked word.

struct Gate {
    n: u32,
    m: u32,
    y: u32,
    cols: u32,
    // Dealt words of a row.
    words: u32,
    period: u32,
    k_out: u32,
    shift: u32,
    leads: u32,
    // Of each column, its periods; of each block of columns its harmonics, the first of its dealt words, and where its factors
    // are; of each column the constant term; coarse and fine angles' cosines and sines.
    turns: u32,
    blocks: u32,
    constants: u32,
    angles: u32,
    half_at: u32,
    half_form: u32,
}
@group(0) @binding(0) var<uniform> g: Gate;

// Columns of a block, bits of an angle and of the scale of cosines.
const LANES: u32 = 16u;
const PHASE: u32 = 20u;
const UNIT: u32 = 30u;

fn signed_product(a: i32, b: i32) -> Word {
    let p = product(bitcast<u32>(a), bitcast<u32>(b));
    let less = select(0u, bitcast<u32>(b), a < 0) + select(0u, bitcast<u32>(a), b < 0);
    return join(p.x, p.y - less);
}

// round(v / 2^shift), half up, of a signed word; shift from 1 to 63.
fn shifted(v: Word, shift: u32) -> Word {
    let sum = plus(v, power(shift - 1u));
    return bit_or(right_by(sum, shift), left_by(spread(bit(sum, 63u)), 64u - shift));
}

fn half_word(v: Word) -> i32 {
    return bitcast<i32>(lower(shifted(v, UNIT)));
}

// Cosine and sine of the sum of two angles.
fn turned(a: vec2<i32>, b: vec2<i32>) -> vec2<i32> {
    return vec2(
        half_word(minus(signed_product(a.x, b.x), signed_product(a.y, b.y))),
        half_word(plus(signed_product(a.y, b.x), signed_product(a.x, b.y))),
    );
}

fn angle(number: u32) -> vec2<i32> {
    return vec2(bitcast<i32>(tables[g.angles + 2u * number]), bitcast<i32>(tables[g.angles + 2u * number + 1u]));
}

fn run(e: u32) {
    let column = e % g.cols;
    let lane = column % LANES;
    let block = g.blocks + 3u * (column / LANES);
    let harmonics = tables[block];
    let x = keep(times(load(g.m + e), word(tables[g.turns + column])), g.period);
    let at = lower(right_by(left_by(x, PHASE - min(PHASE, g.period)), g.period - min(PHASE, g.period)));
    let first = turned(angle(at >> (PHASE / 2u)), angle((1u << (PHASE / 2u)) + (at & ((1u << (PHASE / 2u)) - 1u))));
    var now = vec2(1i << UNIT, 0i);
    var sum = bit_and(constant(g.constants, column), spread(g.leads));
    var dealt = e / g.cols * g.words + tables[block + 1u] + lane;
    var factor = tables[block + 2u] + lane;
    for (var j = 0u; j < harmonics; j++) {
        now = turned(now, first);
        let a = bitcast<i32>(tables[factor]);
        let cosine = shifted(signed_product(a, now.x), g.shift);
        let sine = shifted(signed_product(a, now.y), g.shift);
        sum = plus(sum, times(cosine, half(g.half_at, g.half_form, dealt)));
        sum = plus(sum, times(sine, half(g.half_at, g.half_form, dealt + LANES)));
        dealt += 2u * LANES;
        factor += LANES;
    }
    store(g.y + e, keep(sum, g.k_out));
}
