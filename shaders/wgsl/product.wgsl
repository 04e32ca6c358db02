// y = x w^T for each of a batch: what the kernels have in common.
//
// Everything lies in groups of four along its second axis, padded with zeros: x is rows x depth groups, w is columns x
// depth groups, y is rows x columns groups. Consecutive `share` batches read the same w.

struct Shape {
    rows: u32,
    // Groups of four columns.
    columns: u32,
    // Groups of four inputs.
    depth: u32,
    share: u32,
}

@group(0) @binding(0) var<uniform> shape: Shape;
@group(0) @binding(1) var<storage, read> x: array<Group>;
@group(0) @binding(3) var<storage, read_write> y: array<Group>;
