// Words times weights by dot products of bytes. Sums wrap, which does no harm: the highest bit that counts is the 32nd.

alias Left = vec4<u32>;
alias Right = Packed;
alias Sum = vec4<i32>;

fn left(x: Group) -> Left {
    return transpose((x + OWED) ^ OWED);
}

fn right(at: u32) -> Right {
    return weights[at];
}

fn accumulate(sum: Sum, x: Left, w: Right) -> Sum {
    return sum + dots(x, 0u, w);
}

fn finish(sum: Sum) -> Word {
    let s = bitcast<vec4<u32>>(sum) << vec4(0u, 8u, 16u, 24u);
    return s.x + s.y + s.z + s.w;
}
