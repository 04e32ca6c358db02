use super::*;
use proptest::prelude::*;

/// A small generator, so that shapes of a megabyte need no strategy.
pub(super) fn noise(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed;
    move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
}

fn linear_reference(x: &[u64], rows: usize, out: usize, inp: usize, w: &[i16], bits: u32) -> Vec<u64> {
    let mut y = vec![0u64; rows * out];
    for (at, y) in y.iter_mut().enumerate() {
        for i in 0..inp {
            let weight = i64::from(w[at % out * inp + i]) as u64;
            *y = y.wrapping_add(x[at / out * inp + i].wrapping_mul(weight));
        }
        *y &= mask(bits);
    }
    y
}

fn check_linear(x: &[u64], rows: usize, out: usize, inp: usize, w: &[i16], bits: u32) {
    let expected = linear_reference(x, rows, out, inp, w, bits);
    for weights in Weights::of_every_kind(out, inp, w) {
        for level in Level::all() {
            let mut got = vec![1; rows * out];
            linear_on(level, x, rows, &weights, bits, &mut got);
            let what = || format!("{level:?}, {} bits a weight: {rows} x {inp} -> {out}, {bits} bits", weights.bits());
            assert!(got == expected, "{}", what());
        }
    }
}

fn check_product(a: &[u64], b: &[u64], (m, k, n): (usize, usize, usize), bits: u32) {
    let mut transposed = vec![0; k * n];
    let mut expected = vec![0u64; m * n];
    for i in 0..m {
        for j in 0..n {
            for l in 0..k {
                let term = a[i * k + l].wrapping_mul(b[l * n + j]);
                expected[i * n + j] = expected[i * n + j].wrapping_add(term);
                transposed[j * k + l] = b[l * n + j];
            }
        }
    }
    expected.iter_mut().for_each(|e| *e &= mask(bits));
    for level in Level::all() {
        let mut got = vec![1; m * n];
        product_on(level, a, b, (m, k, n), Order::Rows, bits, &mut got);
        assert!(got == expected, "{level:?}: {m} x {k} x {n}, {bits} bits");
        got.fill(1);
        product_on(level, a, &transposed, (m, k, n), Order::Columns, bits, &mut got);
        assert!(got == expected, "{level:?} transposed: {m} x {k} x {n}, {bits} bits");
    }
}

const WIDTHS: [u32; 12] = [1, 8, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64];

#[test]
fn extremes_wrap_as_the_ring_does() {
    let words = [0, 1, 0x7fff, 0x8000, 0xffff, 0x7fff_8000, 0x8000_0000, 0xffff_ffff, 1 << 63, u64::MAX];
    for weight in [i16::MIN, -255, -128, -1, 0, 1, 127, 255, i16::MAX] {
        for word in words {
            for bits in WIDTHS {
                check_linear(&[word; 2 * 130], 2, 3, 130, &[weight; 3 * 130], bits);
            }
        }
    }
    for word in words {
        for bits in WIDTHS {
            check_product(&[word; 3 * 70], &[word.wrapping_neg() ^ 1; 70 * 2], (3, 70, 2), bits);
        }
    }
}

#[test]
fn deep_sums_stay_exact_in_wide_rings() {
    // One sign throughout: the largest 32-bit partial sums that the cut of the inner dimension allows.
    for weight in [127, -127, 128, -128, 255, 256, -256, 2047, 16384, i16::MIN] {
        for word in [0x7fff, 0x8000, 0x8000_8000_8000_8000] {
            check_linear(&[word; 5000], 1, 1, 5000, &[weight; 5000], 64);
        }
    }
}

#[test]
fn every_tile_height_and_model_shapes() {
    let mut next = noise(1);
    for rows in 1..=2 * MR + 1 {
        let x: Vec<u64> = (0..rows * 37).map(|_| next()).collect();
        let w: Vec<i16> = (0..40 * 37).map(|_| next() as i8 as i16).collect();
        for bits in WIDTHS {
            check_linear(&x, rows, 40, 37, &w, bits);
        }
        check_product(&x, &x[..37 * rows], (rows, 37, rows), 32);
        check_product(&x, &x[..37 * rows], (rows, 37, rows), 64);
    }
    let x: Vec<u64> = (0..9 * 3000).map(|_| next()).collect();
    let w: Vec<i16> = (0..384 * 3000).map(|_| next() as i8 as i16).collect();
    check_linear(&x, 9, 384, 3000, &w, 32);
    check_linear(&x, 9, 384, 3000, &w, 64);
}

/// Weights of one magnitude in each row, up to `most` in all.
fn ternary(out: usize, inp: usize, most: u16, next: &mut impl FnMut() -> u64) -> Vec<i16> {
    let mut w = Vec::with_capacity(out * inp);
    for _ in 0..out {
        let scale = (next() % (u64::from(most) + 1)) as i16;
        w.extend((0..inp).map(|_| (next() % 3) as i16 - 1).map(|t| t * scale));
    }
    w
}

#[test]
fn ternary_weights_at_every_height_and_the_ends_of_blocks() {
    let mut next = noise(2);
    for rows in 1..=70 {
        let x: Vec<u64> = (0..rows * 37).map(|_| next()).collect();
        let w = ternary(70, 37, 4095, &mut next);
        for bits in WIDTHS {
            check_linear(&x, rows, 70, 37, &w, bits);
        }
    }
    // Blocks of all kernels, and one more or less.
    for inp in [755, 756, 757, 1007, 1008, 1009, 1512, 1513, 2016, 2017, 5000] {
        let x: Vec<u64> = (0..3 * inp).map(|_| next()).collect();
        let w = ternary(33, inp, 32767, &mut next);
        // Of so few rows that some kernels take another way, too.
        for rows in [1, 3] {
            (1..=64).for_each(|bits| check_linear(&x[..rows * inp], rows, 33, inp, &w, bits));
        }
        // The largest sums of bytes: every entry that is looked up has all bits.
        let once: Vec<i16> = (0..inp).map(|i| i16::from(i % 3 == 0)).collect();
        (1..=64).for_each(|bits| check_linear(&vec![u64::MAX; inp], 1, 1, inp, &once, bits));
        // The largest sums of planes that are cut for exact ones.
        for word in [0x5555_5555_5555_5555, 0xaaaa_aaaa_aaaa_aaaa, 1 << 21, 0x003f_ffff, u64::MAX >> 1, 1 << 63] {
            (33..=64).for_each(|bits| {
                check_linear(&vec![word; inp], 1, 2, inp, &[vec![7; inp], vec![-7; inp]].concat(), bits)
            });
        }
    }
}

/// Weights with sixteen levels in each block of 32 inputs, of all that 16 bits hold where `shift` is 0.
fn four_bits(out: usize, blocks: usize, shift: u64, next: &mut impl FnMut() -> u64) -> Vec<i16> {
    let mut w = Vec::with_capacity(out * blocks * 32);
    for _ in 0..out * blocks {
        let apart = (next() % 2048) >> shift;
        let least = (next() % (65536 - 15 * apart)) as i64 - 32768;
        w.extend((0..32).map(|_| ((next() % 16 * apart) as i64 + least) as i16));
    }
    w
}

#[test]
fn weights_of_four_bits_at_every_height_and_depth() {
    let mut next = noise(4);
    for rows in 1..=70 {
        let x: Vec<u64> = (0..rows * 64).map(|_| next()).collect();
        let w = four_bits(33, 2, rows as u64 % 8, &mut next);
        assert_eq!(Weights::new(33, 64, &w).bits(), 5);
        for bits in WIDTHS {
            check_linear(&x, rows, 33, 64, &w, bits);
        }
    }
    for blocks in [1, 63, 64, 65, 140] {
        let x: Vec<u64> = (0..5 * 32 * blocks).map(|_| next()).collect();
        let w = four_bits(70, blocks, 0, &mut next);
        [32, 33, 47, 48, 62, 64].into_iter().for_each(|bits| check_linear(&x, 5, 70, 32 * blocks, &w, bits));
    }
}

#[test]
fn empty_operands() {
    linear(&[], 0, &Weights::new(2, 3, &[1; 6]), 32, &mut []);
    let mut out = [7; 2];
    linear(&[], 1, &Weights::new(2, 0, &[]), 32, &mut out);
    assert_eq!(out, [0, 0]);
    let mut out = [7; 6];
    matmul(&[], &[], 2, 0, 3, 32, &mut out);
    assert_eq!(out, [0; 6]);
    matmul_bt(&[], &[1; 4], 0, 2, 2, 32, &mut []);
}

proptest! {
    #[test]
    fn kernels_agree_with_the_reference(
        rows in 1usize..20, out in 1usize..70, inp in 1usize..80, bits in 1u32..=64, shift in 0u32..16, seed: u64,
    ) {
        let mut next = noise(seed);
        let x: Vec<u64> = (0..rows * inp).map(|_| next()).collect();
        let w: Vec<i16> = (0..out * inp).map(|_| next() as i16 >> shift).collect();
        check_linear(&x, rows, out, inp, &w, bits);
        let w = ternary(out, inp, u16::MAX >> shift.max(1), &mut next);
        check_linear(&x, rows, out, inp, &w, bits);
        if rows * inp >= 32 {
            let w = four_bits(out, 1, shift.into(), &mut next);
            check_linear(&x[..rows.min(rows * inp / 32) * 32], rows.min(rows * inp / 32), out, 32, &w, bits);
        }
        let b: Vec<u64> = (0..inp * out).map(|_| next()).collect();
        check_product(&x, &b, (rows, inp, out), bits);
    }
}
