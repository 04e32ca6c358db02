// Words times weights, by multiplications of whole words.

alias Left = Four;
alias Right = vec4<i32>;
alias Sum = Four;

fn left(x: Group) -> Left {
    return load(x);
}

fn right(at: u32) -> Right {
    return unpack(weights[at]);
}

fn accumulate(sum: Sum, x: Left, w: Right) -> Sum {
    return weigh(sum, x, w);
}

fn finish(sum: Sum) -> Word {
    return total(sum);
}
