// A workgroup for each row and four columns; its threads go along the inputs.

const THREADS: u32 = 64;

// This thread's part of the result.
fn part(tile: vec3<u32>, i: u32) -> Group {
    let x_start = (tile.z * shape.rows + tile.y) * shape.depth;
    let w_start = (tile.z / shape.share * shape.columns + tile.x) * 4u * shape.depth;
    var sums: array<Sum, 4>;
    for (var d = i; d < shape.depth; d += THREADS) {
        let x = left(x[x_start + d]);
        sums[0] = accumulate(sums[0], x, right(w_start + d));
        sums[1] = accumulate(sums[1], x, right(w_start + shape.depth + d));
        sums[2] = accumulate(sums[2], x, right(w_start + 2u * shape.depth + d));
        sums[3] = accumulate(sums[3], x, right(w_start + 3u * shape.depth + d));
    }
    return group(finish(sums[0]), finish(sums[1]), finish(sums[2]), finish(sums[3]));
}

fn store(tile: vec3<u32>, sum: Group) {
    y[(tile.z * shape.rows + tile.y) * shape.columns + tile.x] = sum;
}
