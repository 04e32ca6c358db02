// Weights of eight bits, four to a word.

alias Packed = u32;

@group(0) @binding(2) var<storage, read> weights: array<Packed>;

fn unpack(w: Packed) -> vec4<i32> {
    return unpack4xI8(w);
}

// Dot products of four limbs with the weights; `below` is the limb under them.
fn dots(x: vec4<u32>, below: u32, w: Packed) -> vec4<i32> {
    return vec4(dot4I8Packed(x.x, w), dot4I8Packed(x.y, w), dot4I8Packed(x.z, w), dot4I8Packed(x.w, w));
}
