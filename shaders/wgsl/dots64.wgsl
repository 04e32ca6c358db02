// Words times weights by dot products of bytes. A sum takes 2^15 at most from each input: exact up to 2^16 - 1 inputs.

alias Left = Group;
alias Right = Packed;

struct Sum {
    lower: vec4<i32>,
    upper: vec4<i32>,
}

fn left(x: Group) -> Left {
    let owing = plus(x, Group(OWED, OWED));
    return Group(transpose(owing.lower ^ OWED), transpose(owing.upper ^ OWED));
}

fn right(at: u32) -> Right {
    return weights[at];
}

fn accumulate(sum: Sum, x: Left, w: Right) -> Sum {
    return Sum(sum.lower + dots(x.lower, 0u, w), sum.upper + dots(x.upper, x.lower.w, w));
}

fn finish(sum: Sum) -> Word {
    let low = bitcast<vec4<u32>>(sum.lower);
    let carried = bitcast<vec4<u32>>(sum.lower >> vec4(31u, 24u, 16u, 8u));
    let high = bitcast<vec4<u32>>(sum.upper) << vec4(0u, 8u, 16u, 24u);
    return total(Group(low << vec4(0u, 8u, 16u, 24u), carried + high));
}
