// Brings an operand of a matrix product into groups of four along the inner axis, padded with zeros. A thread makes one group.
//
// Element (batch, row, i) is word `batch * batch_by + row_start(row) + i * by` of a value, or nothing where the row is shorter.

struct Gate {
    n: u32,
    // Rows of a batch, groups of a row.
    rows: u32,
    depth: u32,
    // Rows that there are, and the inputs of each.
    filled: u32,
    inputs: u32,
    batch_by: u32,
    row_by: u32,
    by: u32,
    // Keys that the first row reads where a row reads one more than the one before, else 0.
    causal: u32,
    wide: u32,
    // What the first inputs are made of and what as many after them, if there are twice as many: see `element`.
    form: u32,
    leads: u32,
    // A share, or masked words, and halves of masks.
    m: u32,
    l: u32,
}
@group(0) @binding(0) var<uniform> g: Gate;

fn element(start: u32, second: bool) -> Word {
    switch g.form {
        // A share.
        case 0u: {
            return load(g.m + start);
        }
        // Masked words, then masks.
        case 1u: {
            return load(select(g.m, g.l, second) + start);
        }
        // What an evaluator adds to the other side's masked words, and takes of its masks.
        default: {
            let m = load(g.m + start);
            if second {
                return negative(m);
            }
            return minus(bit_and(spread(g.leads), m), load(g.l + start));
        }
    }
}

fn run(e: u32) {
    let group = e % g.depth;
    let row = e / g.depth % g.rows;
    let batch = e / g.depth / g.rows;
    let start = batch * g.batch_by + row_start(g.causal, g.row_by, row);
    let len = row_len(g.causal, g.inputs, row);
    var low = vec4(0u);
    var high = vec4(0u);
    for (var j = 0u; j < 4u; j++) {
        let at = 4u * group + j;
        let second = g.form > 0u && at >= g.inputs;
        let input = select(at, at - g.inputs, second);
        if row < g.filled && input < len {
            let w = element(start + input * g.by, second);
            low[j] = lower(w);
            high[j] = upper(w);
        }
    }
    if g.wide == 1u {
        operand[2u * e] = low;
        operand[2u * e + 1u] = high;
    } else {
        operand[e] = low;
    }
}
