//! Arithmetic in Z_2^bits: words are `u64` holding a value mod `2^bits`, and travel packed at `bits` bits each.

use crate::Error;

/// All-ones over the low `bits` bits, `1 <= bits <= 64`.
#[inline]
pub const fn mask(bits: u32) -> u64 {
    debug_assert!(bits >= 1 && bits <= 64);
    u64::MAX >> (64 - bits)
}

/// The representative of `x` mod `2^bits` in `[-2^(bits-1), 2^(bits-1))`.
#[inline]
pub const fn signed(x: u64, bits: u32) -> i64 {
    let unused = 64 - bits;
    ((x << unused) as i64) >> unused
}

/// Bytes that [`pack`] makes of `n` words.
#[inline]
pub const fn packed_len(n: usize, bits: u32) -> usize {
    (n * bits as usize).div_ceil(8)
}

/// Packs words little-endian, bit by bit; bits above `bits` in a word are dropped and the padding is zero.
pub fn pack(words: &[u64], bits: u32) -> Vec<u8> {
    assert!((1..=64).contains(&bits), "a ring has 1 to 64 bits");
    match bits {
        1 => pack_bits(words),
        8 => words.iter().map(|&w| w as u8).collect(),
        16 => pack_bytes::<2>(words),
        24 => pack_bytes::<3>(words),
        32 => pack_bytes::<4>(words),
        64 => pack_bytes::<8>(words),
        _ => pack_any(words, bits),
    }
}

/// Inverse of [`pack`]: exactly `packed_len(n, bits)` bytes, and zero padding, or an error.
pub fn unpack(bytes: &[u8], n: usize, bits: u32) -> Result<Vec<u64>, Error> {
    let malformed = |reason| Error::Malformed { what: "packed words", reason };
    if !(1..=64).contains(&bits) {
        return Err(malformed(format!("a ring of {bits} bits")));
    }
    let expected = n.checked_mul(bits as usize).map(|total| total.div_ceil(8));
    if expected != Some(bytes.len()) {
        let got = bytes.len();
        return Err(malformed(format!("{got} bytes for {n} words of {bits} bits")));
    }
    let used = (n * bits as usize) % 8;
    if used != 0 && bytes.last().is_some_and(|&last| last >> used != 0) {
        return Err(malformed("padding bits are set".into()));
    }
    Ok(match bits {
        1 => unpack_bits(bytes, n),
        8 => bytes.iter().map(|&b| u64::from(b)).collect(),
        16 => unpack_bytes::<2>(bytes),
        24 => unpack_bytes::<3>(bytes),
        32 => unpack_bytes::<4>(bytes),
        64 => unpack_bytes::<8>(bytes),
        _ => unpack_any(bytes, n, bits),
    })
}

fn pack_bits(words: &[u64]) -> Vec<u8> {
    let byte = |group: &[u64]| group.iter().enumerate().fold(0, |b, (i, &w)| b | ((w & 1) as u8) << i);
    words.chunks(8).map(byte).collect()
}

fn unpack_bits(bytes: &[u8], n: usize) -> Vec<u64> {
    let mut words = Vec::with_capacity(bytes.len() * 8);
    for &byte in bytes {
        words.extend((0..8).map(|i| u64::from(byte >> i & 1)));
    }
    words.truncate(n);
    words
}

fn pack_bytes<const B: usize>(words: &[u64]) -> Vec<u8> {
    let mut out = vec![0; words.len() * B];
    for (to, word) in out.chunks_exact_mut(B).zip(words) {
        to.copy_from_slice(&word.to_le_bytes()[..B]);
    }
    out
}

fn unpack_bytes<const B: usize>(bytes: &[u8]) -> Vec<u64> {
    let word = |from: &[u8]| {
        let mut le = [0; 8];
        le[..B].copy_from_slice(from);
        u64::from_le_bytes(le)
    };
    bytes.chunks_exact(B).map(word).collect()
}

fn pack_any(words: &[u64], bits: u32) -> Vec<u8> {
    let keep = mask(bits);
    let len = packed_len(words.len(), bits);
    let mut out = Vec::with_capacity(len + 8);
    // Between words fewer than 64 bits wait here, so that 64 more always fit.
    let (mut waiting, mut held) = (0u128, 0u32);
    for &word in words {
        waiting |= u128::from(word & keep) << held;
        held += bits;
        if held >= 64 {
            out.extend_from_slice(&(waiting as u64).to_le_bytes());
            waiting >>= 64;
            held -= 64;
        }
    }
    out.extend_from_slice(&(waiting as u64).to_le_bytes());
    out.truncate(len);
    out
}

fn unpack_any(bytes: &[u8], n: usize, bits: u32) -> Vec<u64> {
    let keep = mask(bits);
    let mut words = Vec::with_capacity(n);
    let mut chunks = bytes.chunks_exact(8);
    let (mut waiting, mut held) = (0u128, 0u32);
    let mut tail = [0; 8];
    let rest = chunks.remainder();
    tail[..rest.len()].copy_from_slice(rest);
    for _ in 0..n {
        if held < bits {
            let chunk = chunks.next().and_then(|c| c.try_into().ok()).unwrap_or(tail);
            waiting |= u128::from(u64::from_le_bytes(chunk)) << held;
            held += 64;
        }
        words.push(waiting as u64 & keep);
        waiting >>= bits;
        held -= bits;
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn masks_and_signs() {
        assert_eq!((mask(1), mask(32), mask(64)), (1, 0xffff_ffff, u64::MAX));
        assert_eq!((signed(0xff, 8), signed(0x7f, 8), signed(1, 1)), (-1, 127, -1));
        assert_eq!((signed(1 << 31, 32), signed(u64::MAX, 64)), (i64::from(i32::MIN), -1));
        assert_eq!(signed(0xabcd_0000_0005, 32), 5, "bits above the ring do not matter");
    }

    #[test]
    fn layout_is_little_endian_bit_by_bit() {
        assert_eq!(pack(&[0b101, 0b011, 0b110], 3), [0b1001_1101, 0b1]);
        assert_eq!(pack(&[1, 0, 1, 1, 0, 0, 0, 1, 1], 1), [0b1000_1101, 1]);
        assert_eq!(pack(&[0x0001_0203, 0xfffe_fdfc], 24), [3, 2, 1, 0xfc, 0xfd, 0xfe]);
        assert_eq!(pack(&[0x1_2345, 0xf_6789], 20), [0x45, 0x23, 0x91, 0x78, 0xf6]);
    }

    #[test]
    fn wrong_lengths_widths_and_padding_are_refused() {
        for bits in 1..=64 {
            let bytes = pack(&[0; 13], bits);
            assert_eq!(bytes.len(), packed_len(13, bits));
            assert!(unpack(&bytes[1..], 13, bits).is_err());
            assert!(unpack(&[&bytes[..], &[0]].concat(), 13, bits).is_err());
            let mut padded = bytes.clone();
            *padded.last_mut().unwrap() |= 0x80;
            assert_eq!(unpack(&padded, 13, bits).is_err(), bits % 8 != 0, "{bits}");
        }
        for bits in [0, 65, u32::MAX] {
            assert!(unpack(&[], 0, bits).is_err());
        }
        assert!(unpack(&[], usize::MAX, 64).is_err());
        assert!(unpack(&[], 0, 17).unwrap().is_empty());
    }

    proptest! {
        #[test]
        fn unpack_inverts_pack_at_every_width(words in prop::collection::vec(any::<u64>(), 0..70)) {
            for bits in 1..=64 {
                let bytes = pack(&words, bits);
                prop_assert_eq!(bytes.len(), packed_len(words.len(), bits));
                let reduced: Vec<u64> = words.iter().map(|w| w & mask(bits)).collect();
                prop_assert_eq!(&unpack(&bytes, words.len(), bits).unwrap(), &reduced);
                prop_assert_eq!(&pack_any(&words, bits), &bytes, "the general path agrees");
                prop_assert_eq!(&unpack_any(&bytes, words.len(), bits), &reduced);
            }
        }

        #[test]
        fn signed_is_a_representative(x in any::<u64>(), bits in 1u32..=64) {
            let s = signed(x, bits);
            prop_assert_eq!(s as u64 & mask(bits), x & mask(bits));
            prop_assert!(i128::from(s) >= -(1i128 << (bits - 1)) && i128::from(s) < 1i128 << (bits - 1));
        }
    }
}
