// A workgroup for each of `g.n`, whose threads can add.

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) at: vec3<u32>,
    @builtin(num_workgroups) all: vec3<u32>,
    @builtin(local_invocation_index) i: u32,
) {
    let row = at.y * all.x + at.x;
    if row < g.n {
        run(row, i);
    }
}

var<workgroup> sums: array<Word, THREADS>;

// The sum over the threads, of which all must take part.
fn total(i: u32, own: Word) -> Word {
    sums[i] = own;
    for (var half = THREADS / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if i < half {
            sums[i] = plus(sums[i], sums[i + half]);
        }
    }
    workgroupBarrier();
    let sum = sums[0];
    workgroupBarrier();
    return sum;
}
