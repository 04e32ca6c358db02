// Adds the threads' parts within subgroups, then the subgroups' sums in workgroup memory.

var<workgroup> sums: array<Group, THREADS>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) tile: vec3<u32>,
    @builtin(local_invocation_index) i: u32,
    @builtin(subgroup_size) size: u32,
    @builtin(subgroup_invocation_id) lane: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
) {
    var sum = part(tile, i);
    for (var distance = 1u; distance < min(size, THREADS); distance *= 2u) {
        sum = plus(sum, shuffle(sum, distance));
    }
    if lane == 0u {
        sums[subgroup] = sum;
    }
    workgroupBarrier();
    if i == 0u {
        for (var s = 1u; s < subgroups; s++) {
            sum = plus(sum, sums[s]);
        }
        store(tile, sum);
    }
}
