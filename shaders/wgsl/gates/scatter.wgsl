// Brings a matrix product back into words, with what is added to it. A thread makes one word.
//
// Word (batch, row, i) of the value is `batch * batch_by + row_start(row) + i`.

struct Gate {
    n: u32,
    rows: u32,
    // Columns that there are, and groups of four.
    cols: u32,
    groups: u32,
    batch_by: u32,
    row_by: u32,
    causal: u32,
    wide: u32,
    bits: u32,
    y: u32,
    // A table of what to add to each column, or none.
    biased: u32,
    bias: u32,
    // A half to add to each word, or none.
    dealt: u32,
    half_at: u32,
    half_form: u32,
}
@group(0) @binding(0) var<uniform> g: Gate;

fn run(e: u32) {
    let c = e % g.cols;
    let row = e / g.cols % g.rows;
    let batch = e / g.cols / g.rows;
    if c >= row_len(g.causal, g.cols, row) {
        return;
    }
    let start = batch * g.batch_by + row_start(g.causal, g.row_by, row);
    let group = (batch * g.rows + row) * g.groups + c / 4u;
    var w: Word;
    if g.wide == 1u {
        w = join(operand[2u * group][c % 4u], operand[2u * group + 1u][c % 4u]);
    } else {
        w = word(operand[group][c % 4u]);
    }
    if g.biased == 1u {
        w = plus(w, constant(g.bias, c));
    }
    if g.dealt == 1u {
        w = plus(w, half(g.half_at, g.half_form, start + c));
    }
    store(g.y + start + c, keep(w, g.bits));
}
