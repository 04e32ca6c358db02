// What all gates share: where values, what is fed and public tables lie.
//
// A ring word takes two u32, the lower half first. Bits above a value's ring are zero.

@group(0) @binding(1) var<storage, read_write> arena: array<vec2<u32>>;
@group(0) @binding(2) var<storage, read> fed: array<u32>;
@group(0) @binding(3) var<storage, read> tables: array<u32>;
@group(0) @binding(4) var<storage, read_write> operand: array<vec4<u32>>;

const THREADS: u32 = 64u;

fn load(at: u32) -> Word {
    let w = arena[at];
    return join(w.x, w.y);
}

fn store(at: u32, w: Word) {
    arena[at] = vec2(lower(w), upper(w));
}

// Word `i` of a public table that starts at `at`.
fn constant(at: u32, i: u32) -> Word {
    return join(tables[at + 2u * i], tables[at + 2u * i + 1u]);
}

// Word `i` of what is fed from `at` on; the form has the words' stride in its lower byte, then their ring.
fn half(at: u32, form: u32, i: u32) -> Word {
    let start = i * (form & 0xffu);
    let place = at + start / 32u;
    let by = start % 32u;
    var low = fed[place];
    var high = fed[place + 1u];
    if by != 0u {
        let above = 32u - by;
        low = (low >> by) | (high << above);
        high = (high >> by) | (fed[place + 2u] << above);
    }
    return keep(join(low, high), form >> 8u);
}

// Where the table entry of item `e` starts, among `count` of `size` numbers each whose first is their first item.
fn part_of(e: u32, at: u32, count: u32, size: u32) -> u32 {
    var low = 0u;
    var high = count;
    while high - low > 1u {
        let middle = (low + high) / 2u;
        if tables[at + middle * size] <= e {
            low = middle;
        } else {
            high = middle;
        }
    }
    return at + low * size;
}
