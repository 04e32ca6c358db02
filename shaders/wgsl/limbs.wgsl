// Signed bytes of words: x = sum_l limb_l 2^(8 l), each limb in [-128, 127].

// What taking every limb as signed owes to the limb above it.
const OWED: vec4<u32> = vec4(0x80808080u);

// Limb by limb, the bytes of four words side by side.
fn transpose(x: vec4<u32>) -> vec4<u32> {
    return vec4(
        pack4xU8(x),
        pack4xU8(x >> vec4(8u)),
        pack4xU8(x >> vec4(16u)),
        pack4xU8(x >> vec4(24u)),
    );
}
