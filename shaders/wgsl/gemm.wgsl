// Tiles of 32 rows by 64 columns; a thread has two rows and four columns of one.

const ROWS: u32 = 32;
const COLUMNS: u32 = 64;
// Groups of inputs that a tile goes through at a time.
const DEPTH: u32 = 4;

var<workgroup> lefts: array<Left, ROWS * DEPTH>;
var<workgroup> rights: array<Right, COLUMNS * DEPTH>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) tile: vec3<u32>, @builtin(local_invocation_index) i: u32) {
    let first_row = tile.y * ROWS;
    let first_column = tile.x * COLUMNS;
    let x_start = tile.z * shape.rows * shape.depth;
    let w_start = tile.z / shape.share * shape.columns * 4u * shape.depth;
    // What this thread loads: one group of x, if it is among the first half, and one of w.
    let at_row = first_row + i / DEPTH;
    let at_column = min(first_column + i / DEPTH, shape.columns * 4u - 1u);
    let at_depth = i % DEPTH;
    // What it computes.
    let row = i / 16u * 2u;
    let column = i % 16u * 4u;

    var a: array<Sum, 4>;
    var b: array<Sum, 4>;
    for (var start = 0u; start < shape.depth; start += DEPTH) {
        let depth = start + at_depth;
        if i < ROWS * DEPTH {
            var g: Group;
            // Groups past the end are zero, so that it does not matter what they meet.
            if at_row < shape.rows && depth < shape.depth {
                g = x[x_start + at_row * shape.depth + depth];
            }
            lefts[at_depth * ROWS + i / DEPTH] = left(g);
        }
        rights[at_depth * COLUMNS + i / DEPTH] = right(w_start + at_column * shape.depth + min(depth, shape.depth - 1u));
        workgroupBarrier();
        for (var d = 0u; d < DEPTH; d++) {
            let xa = lefts[d * ROWS + row];
            let xb = lefts[d * ROWS + row + 1u];
            let w0 = rights[d * COLUMNS + column];
            let w1 = rights[d * COLUMNS + column + 1u];
            let w2 = rights[d * COLUMNS + column + 2u];
            let w3 = rights[d * COLUMNS + column + 3u];
            a[0] = accumulate(a[0], xa, w0);
            a[1] = accumulate(a[1], xa, w1);
            a[2] = accumulate(a[2], xa, w2);
            a[3] = accumulate(a[3], xa, w3);
            b[0] = accumulate(b[0], xb, w0);
            b[1] = accumulate(b[1], xb, w1);
            b[2] = accumulate(b[2], xb, w2);
            b[3] = accumulate(b[3], xb, w3);
        }
        workgroupBarrier();
    }

    let columns = first_column / 4u + i % 16u;
    let to = (tile.z * shape.rows + first_row + row) * shape.columns + columns;
    if columns < shape.columns && first_row + row < shape.rows {
        y[to] = group(finish(a[0]), finish(a[1]), finish(a[2]), finish(a[3]));
    }
    if columns < shape.columns && first_row + row + 1u < shape.rows {
        y[to + shape.columns] = group(finish(b[0]), finish(b[1]), finish(b[2]), finish(b[3]));
    }
}
