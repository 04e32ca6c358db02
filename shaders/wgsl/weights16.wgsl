// Weights of sixteen bits, as a word of four signed lower bytes and one of four signed upper bytes.

alias Packed = vec2<u32>;

@group(0) @binding(2) var<storage, read> weights: array<Packed>;

// The upper byte of the largest weights is one more than it can say; sixteen bits of the sum are right.
fn unpack(w: Packed) -> vec4<i32> {
    return ((unpack4xI8(w.x) + (unpack4xI8(w.y) << vec4(8u))) << vec4(16u)) >> vec4(16u);
}

// Dot products of four limbs with the weights; `below` is the limb under them, which upper bytes reach up from.
fn dots(x: vec4<u32>, below: u32, w: Packed) -> vec4<i32> {
    return vec4(
        dot4I8Packed(x.x, w.x) + dot4I8Packed(below, w.y),
        dot4I8Packed(x.y, w.x) + dot4I8Packed(x.x, w.y),
        dot4I8Packed(x.z, w.x) + dot4I8Packed(x.y, w.y),
        dot4I8Packed(x.w, w.x) + dot4I8Packed(x.z, w.y),
    );
}
