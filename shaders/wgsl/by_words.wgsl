// Words times words.

alias Left = Four;
alias Right = Four;
alias Sum = Four;

@group(0) @binding(2) var<storage, read> others: array<Group>;

fn left(x: Group) -> Left {
    return load(x);
}

fn right(at: u32) -> Right {
    return load(others[at]);
}

fn accumulate(sum: Sum, x: Left, y: Right) -> Sum {
    return multiply(sum, x, y);
}

fn finish(sum: Sum) -> Word {
    return total(sum);
}
