// A thread for each of `g.n`.

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) at: vec3<u32>,
    @builtin(num_workgroups) all: vec3<u32>,
    @builtin(local_invocation_index) i: u32,
) {
    let e = (at.y * all.x + at.x) * THREADS + i;
    if e < g.n {
        run(e);
    }
}
