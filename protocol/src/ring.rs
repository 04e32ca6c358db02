//! Arithmetic in Z_2^bits: words are `u64` holding a value mod `2^bits`, and travel packed at `bits` bits each.

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod simd;

use crate::Error;
use crate::vector::{self, Kernel};

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
    let mut out = vec![0; packed_len(words.len(), bits)];
    pack_to(words, bits, &mut out);
    out
}

/// [`pack`] into exactly `packed_len(words.len(), bits)` bytes.
pub fn pack_to(words: &[u64], bits: u32, out: &mut [u8]) {
    assert!((1..=64).contains(&bits), "a ring has 1 to 64 bits");
    assert_eq!(out.len(), packed_len(words.len(), bits), "the packed length of {} words", words.len());
    #[cfg(target_arch = "x86_64")]
    let (words, out) = match simd::Vbmi::detect() {
        Some(v) => {
            let done = v.pack(words, bits, out);
            (&words[done..], &mut out[done / 8 * bits as usize..])
        }
        None => (words, out),
    };
    vector::run(Pack { words, bits, out });
}

/// Inverse of [`pack`]: exactly `packed_len(n, bits)` bytes, and zero padding, or an error.
pub fn unpack(bytes: &[u8], n: usize, bits: u32) -> Result<Vec<u64>, Error> {
    check_packed(bytes, n, bits)?;
    let mut words = vec![0; n];
    unpack_to(bytes, bits, &mut words);
    Ok(words)
}

/// Whether these are the packed bytes of `n` words.
pub fn check_packed(bytes: &[u8], n: usize, bits: u32) -> Result<(), Error> {
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
    Ok(())
}

/// The first words of packed bytes; bytes that are missing count as zero.
pub fn unpack_to(bytes: &[u8], bits: u32, words: &mut [u64]) {
    assert!((1..=64).contains(&bits), "a ring has 1 to 64 bits");
    #[cfg(target_arch = "x86_64")]
    let (bytes, words) = match simd::Vbmi::detect() {
        Some(v) => {
            let done = v.unpack(bytes, bits, words);
            (&bytes[done / 8 * bits as usize..], &mut words[done..])
        }
        None => (bytes, words),
    };
    vector::run(Unpack { bytes, bits, words });
}

/// Word `i` of packed bytes; bytes that are missing count as zero.
pub fn word_at(bytes: &[u8], bits: u32, i: usize) -> u64 {
    let at = i * bits as usize;
    let mut le = [0; 16];
    let from = &bytes[(at / 8).min(bytes.len())..];
    let n = from.len().min(16);
    le[..n].copy_from_slice(&from[..n]);
    (u128::from_le_bytes(le) >> (at % 8)) as u64 & mask(bits)
}

struct Pack<'a> {
    words: &'a [u64],
    bits: u32,
    out: &'a mut [u8],
}

impl Kernel for Pack<'_> {
    #[inline(always)]
    fn run(self) {
        match self.bits {
            1..=8 => pack_groups::<8>(self.words, self.bits, self.out),
            9..=16 => pack_groups::<4>(self.words, self.bits, self.out),
            17..=32 => pack_groups::<2>(self.words, self.bits, self.out),
            33..=63 => pack_groups::<1>(self.words, self.bits, self.out),
            _ => self.out.as_chunks_mut().0.iter_mut().zip(self.words).for_each(|(to, w)| *to = w.to_le_bytes()),
        }
    }
}

/// `G` words at a time, whose bits fit a word.
#[inline(always)]
fn pack_groups<const G: usize>(words: &[u64], bits: u32, out: &mut [u8]) {
    let (keep, wide) = (mask(bits), bits * G as u32);
    let (to, rest) = out.as_chunks_mut::<8>();
    let mut to = to.iter_mut();
    // Fewer than 64 bits wait between groups.
    let (mut waiting, mut held) = (0u64, 0u32);
    let mut put = |group: u64, wide: u32| {
        waiting |= group << held;
        held += wide;
        if held >= 64 {
            if let Some(to) = to.next() {
                *to = waiting.to_le_bytes();
            }
            held -= 64;
            // Without a shift by 64, where nothing is left.
            waiting = group >> 1 >> (wide - held - 1);
        }
    };
    let (groups, last) = words.as_chunks::<G>();
    for group in groups {
        let mut all = 0;
        for (i, w) in group.iter().enumerate() {
            all |= (w & keep) << (i as u32 * bits);
        }
        put(all, wide);
    }
    for w in last {
        put(w & keep, bits);
    }
    let tail = waiting.to_le_bytes();
    match to.next() {
        Some(to) => *to = tail,
        None => rest.copy_from_slice(&tail[..rest.len()]),
    }
}

struct Unpack<'a> {
    bytes: &'a [u8],
    bits: u32,
    words: &'a mut [u64],
}

/// Bytes that hold eight words at any width, with what loads of whole words read past them.
const WINDOW: usize = 72;

impl Kernel for Unpack<'_> {
    #[inline(always)]
    fn run(self) {
        let Unpack { mut bytes, bits, mut words } = self;
        if bits == 64 {
            let whole = bytes.as_chunks::<8>().0;
            let n = words.len().min(whole.len());
            words[..n].iter_mut().zip(whole).for_each(|(word, le)| *word = u64::from_le_bytes(*le));
            (bytes, words) = (&bytes[8 * n..], &mut words[n..]);
        }
        let (blocks, last) = words.as_chunks_mut::<8>();
        for block in blocks {
            match bytes.first_chunk::<WINDOW>() {
                Some(window) => unpack_block(window, bits, block),
                None => unpack_block(&padded(bytes), bits, block),
            }
            bytes = &bytes[bytes.len().min(bits as usize)..];
        }
        let mut block = [0; 8];
        unpack_block(&padded(bytes), bits, &mut block);
        last.copy_from_slice(&block[..last.len()]);
    }
}

#[inline(always)]
fn padded(bytes: &[u8]) -> [u8; WINDOW] {
    let mut window = [0; WINDOW];
    let n = bytes.len().min(WINDOW);
    window[..n].copy_from_slice(&bytes[..n]);
    window
}

#[inline(always)]
fn unpack_block(window: &[u8; WINDOW], bits: u32, block: &mut [u64; 8]) {
    let keep = mask(bits);
    for (j, word) in block.iter_mut().enumerate() {
        let at = j as u32 * bits;
        // At most 56; said so that no bound has to be checked.
        let byte = (at / 8) as usize & 63;
        let mut le = [0; 8];
        le.copy_from_slice(&window[byte..byte + 8]);
        let shift = at % 8;
        let mut v = u64::from_le_bytes(le) >> shift;
        if bits > 57 {
            v |= u64::from(window[byte + 8]) << 1 << (63 - shift);
        }
        *word = v & keep;
    }
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
        fn unpack_inverts_pack_at_every_width(words in prop::collection::vec(any::<u64>(), 0..150)) {
            for bits in 1..=64 {
                let bytes = pack(&words, bits);
                // The loops that any processor has.
                let (mut packed, mut wide) = (vec![0xff; bytes.len()], vec![u64::MAX; words.len()]);
                vector::run(Pack { words: &words, bits, out: &mut packed });
                vector::run(Unpack { bytes: &bytes, bits, words: &mut wide });
                prop_assert_eq!(&packed, &bytes);
                prop_assert_eq!(&wide, &unpack(&bytes, words.len(), bits).unwrap());
                prop_assert_eq!(bytes.len(), packed_len(words.len(), bits));
                let reduced: Vec<u64> = words.iter().map(|w| w & mask(bits)).collect();
                prop_assert_eq!(&unpack(&bytes, words.len(), bits).unwrap(), &reduced);
                for (i, w) in reduced.iter().enumerate() {
                    prop_assert_eq!(word_at(&bytes, bits, i), *w);
                }
                // Against a reference, bit by bit.
                let bit = |i: usize| words.get(i / bits as usize).map_or(0, |w| (w >> (i % bits as usize) & 1) as u8);
                let plain: Vec<u8> = (0..bytes.len()).map(|b| (0..8).fold(0, |v, i| v | bit(8 * b + i) << i)).collect();
                prop_assert_eq!(plain, bytes);
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
