// Parities of a row's levels over public subsets, as thermometers. A workgroup serves a row of a head: a thread adds one word of
// the levels over a slice of the keys.

struct Gate {
    n: u32,
    m: u32,
    y: u32,
    // Rows of a head, keys of a row, and scores of a head.
    rows: u32,
    keys: u32,
    scores: u32,
    causal: u32,
    k: u32,
    leads: u32,
    // Of each head: its half, the words of the levels that its maximum may be in, bits of a score below a level, the first word
    // that it makes, the first of those words and how many all levels have, a power of two.
    heads: u32,
    // Of each key, the tests that it counts in.
    sets: u32,
}
@group(0) @binding(0) var<uniform> g: Gate;

const TESTS: u32 = 20u;

// By test, then by thread.
var<workgroup> parities: array<vec2<u32>, TESTS * THREADS>;

// All ones for those of four tests that are in the set.
fn picked(tests: u32, first: u32) -> vec4<u32> {
    return vec4(0u) - ((vec4(tests >> first) >> vec4(0u, 1u, 2u, 3u)) & vec4(1u));
}

fn put(first: u32, i: u32, low: vec4<u32>, high: vec4<u32>) {
    parities[first * THREADS + i] = vec2(low.x, high.x);
    parities[(first + 1u) * THREADS + i] = vec2(low.y, high.y);
    parities[(first + 2u) * THREADS + i] = vec2(low.z, high.z);
    parities[(first + 3u) * THREADS + i] = vec2(low.w, high.w);
}

// Bit `j` becomes the sum of bits `j` and above.
fn suffixes(x: u32) -> u32 {
    var v = x;
    v ^= v >> 1u;
    v ^= v >> 2u;
    v ^= v >> 4u;
    v ^= v >> 8u;
    return v ^ (v >> 16u);
}

fn run(row: u32, i: u32) {
    let r = row % g.rows;
    let head = row / g.rows;
    let start = row_start(g.causal, g.keys, r);
    let len = row_len(g.causal, g.keys, r);
    let about = g.heads + 7u * head;
    let at = tables[about];
    let form = tables[about + 1u];
    let words = tables[about + 2u];
    let drop = tables[about + 3u];
    let first_word = tables[about + 5u];
    let of_ring = tables[about + 6u];
    let w = first_word + i % words;
    // Named and not an array, so that they stay in registers.
    var low0 = vec4(0u);
    var low1 = vec4(0u);
    var low2 = vec4(0u);
    var low3 = vec4(0u);
    var low4 = vec4(0u);
    var high0 = vec4(0u);
    var high1 = vec4(0u);
    var high2 = vec4(0u);
    var high3 = vec4(0u);
    var high4 = vec4(0u);
    for (var j = i / words; j < len; j += THREADS / words) {
        let m = load(g.m + head * g.scores + start + j);
        let level = lower(right_by(keep(plus(m, power(g.k - 1u)), g.k), drop));
        // This word of the one-hot, rotated by the level.
        let one = (start + j) * of_ring;
        let above = (w - level / 64u) & (of_ring - 1u);
        let below = (above - 1u) & (of_ring - 1u);
        let by = level % 64u;
        let over = right_by(right_by(half(at, form, one + below), 1u), 63u - by);
        let x = bit_or(left_by(half(at, form, one + above), by), over);
        let low = vec4(lower(x));
        let high = vec4(upper(x));
        let tests = tables[g.sets + j];
        let in0 = picked(tests, 0u);
        let in1 = picked(tests, 4u);
        let in2 = picked(tests, 8u);
        let in3 = picked(tests, 12u);
        let in4 = picked(tests, 16u);
        low0 ^= low & in0;
        low1 ^= low & in1;
        low2 ^= low & in2;
        low3 ^= low & in3;
        low4 ^= low & in4;
        high0 ^= high & in0;
        high1 ^= high & in1;
        high2 ^= high & in2;
        high3 ^= high & in3;
        high4 ^= high & in4;
    }
    put(0u, i, low0, high0);
    put(4u, i, low1, high1);
    put(8u, i, low2, high2);
    put(12u, i, low3, high3);
    put(16u, i, low4, high4);
    workgroupBarrier();
    // The slices of one word of a test are read by one thread only, which leaves their sum in the first.
    for (var o = i; o < TESTS * words; o += THREADS) {
        let first = o / words * THREADS;
        var sum = vec2(0u);
        for (var slice = o % words; slice < THREADS; slice += words) {
            sum ^= parities[first + slice];
        }
        parities[first + o % words] = sum;
    }
    workgroupBarrier();
    let y = g.y + tables[about + 4u] + r * TESTS * words;
    for (var o = i; o < TESTS * words; o += THREADS) {
        let first = o / words * THREADS;
        let own = parities[first + o % words];
        var above = 0u;
        for (var j = o % words + 1u; j < words; j++) {
            let p = parities[first + j];
            above ^= p.x ^ p.y;
        }
        // What carries from above, and the complement.
        let all = 0u - ((countOneBits(above) ^ g.leads) & 1u);
        let upper_half = suffixes(own.y);
        let lower_half = suffixes(own.x) ^ (0u - (upper_half & 1u));
        arena[y + o] = vec2(lower_half, upper_half) ^ vec2(all);
    }
}
