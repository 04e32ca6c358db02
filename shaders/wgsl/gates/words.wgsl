// Arithmetic on words that either kind of words serves. Words may be secret: none decides a branch or a place in memory; counts
// of bits and places may.

fn word(a: u32) -> Word {
    return join(a, 0u);
}

// All ones where the bit is one, else zero.
fn spread(bit: u32) -> Word {
    return join(0u - bit, 0u - bit);
}

fn bit_and(a: Word, b: Word) -> Word {
    return join(lower(a) & lower(b), upper(a) & upper(b));
}

fn bit_or(a: Word, b: Word) -> Word {
    return join(lower(a) | lower(b), upper(a) | upper(b));
}

fn bit_xor(a: Word, b: Word) -> Word {
    return join(lower(a) ^ lower(b), upper(a) ^ upper(b));
}

fn bit_not(a: Word) -> Word {
    return join(~lower(a), ~upper(a));
}

fn negative(a: Word) -> Word {
    return minus(word(0u), a);
}

// The sum in a ring, or of bits.
fn added(a: Word, b: Word, exclusive: u32, bits: u32) -> Word {
    if exclusive == 1u {
        return keep(bit_xor(a, b), bits);
    }
    return keep(plus(a, b), bits);
}

// Bit `n` of 64.
fn bit(a: Word, n: u32) -> u32 {
    return lower(right_by(a, n)) & 1u;
}

// The bit `1 << n`.
fn power(n: u32) -> Word {
    return left_by(word(1u), n);
}

// The lowest `bits` bits, of 1 to 64.
fn keep(a: Word, bits: u32) -> Word {
    let high = select(upper(a) & ((1u << ((bits - 32u) % 32u)) - 1u), upper(a), bits == 64u);
    if bits < 32u {
        return join(lower(a) & ((1u << bits) - 1u), 0u);
    }
    return join(lower(a), high);
}

// The whole product of two halves.
fn product(a: u32, b: u32) -> vec2<u32> {
    let a0 = a & 0xffffu;
    let a1 = a >> 16u;
    let b0 = b & 0xffffu;
    let b1 = b >> 16u;
    let low = a0 * b0;
    // Below 2^32: the product of two halves leaves room for the upper half of another.
    let middle = a1 * b0 + (low >> 16u);
    let other = a0 * b1 + (middle & 0xffffu);
    return vec2(a * b, a1 * b1 + (middle >> 16u) + (other >> 16u));
}

// round(v by / 2^shift), half up, mod 2^64: of an unsigned v below 2^63 and a signed word, where shift < 128.
fn scaled(v: Word, by: Word, shift: u32) -> Word {
    let below = upper(by) >> 31u;
    let size = minus(bit_xor(by, spread(below)), spread(below));
    // Four digits of the magnitude.
    let p00 = product(lower(v), lower(size));
    let p01 = product(lower(v), upper(size));
    let p10 = product(upper(v), lower(size));
    let p11 = product(upper(v), upper(size));
    let middle = plus(plus(word(p00.y), join(p01.x, 0u)), word(p10.x));
    let high = plus(plus(plus(join(p11.x, p11.y), word(p01.y)), word(p10.y)), word(upper(middle)));
    var low = join(p00.x, lower(middle));
    var top = high;
    // The sign, and half of a unit.
    let sign = spread(below);
    low = minus(bit_xor(low, sign), sign);
    let carry = select(0u, below, (lower(low) | upper(low)) == 0u);
    top = plus(bit_xor(top, sign), word(carry));
    if shift == 0u {
        return low;
    }
    if shift <= 64u {
        let sum = plus(low, power(shift - 1u));
        top = plus(top, word(select(0u, 1u, less(sum, low))));
        if shift == 64u {
            return top;
        }
        return bit_or(right_by(sum, shift), left_by(top, 64u - shift));
    }
    top = plus(top, power(shift - 65u));
    let by_top = shift - 64u;
    let fill = spread(upper(top) >> 31u);
    return bit_or(right_by(top, by_top), left_by(fill, 64u - by_top));
}

// Without the branch that `||` is.
fn less(a: Word, b: Word) -> bool {
    return (upper(a) < upper(b)) | ((upper(a) == upper(b)) & (lower(a) < lower(b)));
}
