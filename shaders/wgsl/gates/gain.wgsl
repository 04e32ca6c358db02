// Columns by a gain each, less one sum over the row, and a public constant.
//
// A workgroup makes a row, or any 64 words where there is no sum.

struct Gate {
    n: u32,
    // Of the whole tensor.
    len: u32,
    x: u32,
    y: u32,
    cols: u32,
    k: u32,
    leads: u32,
    // Whether a sum is taken off.
    summed: u32,
    // Of each column.
    gain: u32,
    mean: u32,
    bias: u32,
}
@group(0) @binding(0) var<uniform> g: Gate;

fn write(e: u32, c: u32, sum: Word) {
    let scaled = minus(times(load(g.x + e), constant(g.gain, c)), sum);
    let bias = bit_and(spread(g.leads), constant(g.bias, c));
    store(g.y + e, keep(plus(scaled, bias), g.k));
}

fn run(row: u32, i: u32) {
    if g.summed == 0u {
        let e = row * THREADS + i;
        if e < g.len {
            write(e, e % g.cols, word(0u));
        }
    } else {
        let start = row * g.cols;
        var own = word(0u);
        for (var c = i; c < g.cols; c += THREADS) {
            own = plus(own, times(load(g.x + start + c), constant(g.mean, c)));
        }
        let sum = total(i, own);
        for (var c = i; c < g.cols; c += THREADS) {
            write(start + c, c, sum);
        }
    }
}
