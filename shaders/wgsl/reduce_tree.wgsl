// Adds the threads' parts in workgroup memory.

var<workgroup> parts: array<Group, THREADS>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) tile: vec3<u32>, @builtin(local_invocation_index) i: u32) {
    parts[i] = part(tile, i);
    for (var half = THREADS / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if i < half {
            parts[i] = plus(parts[i], parts[i + half]);
        }
    }
    if i == 0u {
        store(tile, parts[0]);
    }
}
