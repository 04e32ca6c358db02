//! Packing by byte permutations of 512-bit registers.
//!
//! A value of [`Vbmi`] is proof that the processor has the instructions; only `detect` makes one. Besides calling functions
//! compiled for those instructions, the unsafe code here is unaligned loads and stores, each through a reference to an array
//! of exactly that size.

use std::arch::x86_64::*;

use super::mask;

/// Bytes of a register.
const WIDE: usize = 64;

/// Proof of AVX-512 F, BW and VBMI.
#[derive(Clone, Copy)]
pub(super) struct Vbmi(());

/// Where the bytes of eight words are in their packed bits.
struct Layout {
    /// Bits by which each word is shifted in its first byte.
    shift: [u64; 8],
    /// The byte of the words, 0 to 63, that packed byte `i` takes from the even and from the odd ones, of which neighbours
    /// share no byte; and for which packed bytes there is one.
    taken: [[u8; WIDE]; 2],
    there: [u64; 2],
    /// The packed byte that byte `i` of the shifted words comes from.
    given: [u8; WIDE],
}

/// Widest words that fit their lane when they are shifted.
const WIDEST: u32 = 57;

/// Of words of so many bits.
static LAYOUTS: [Layout; WIDEST as usize + 1] = {
    let mut all = [const { Layout { shift: [0; 8], taken: [[0; WIDE]; 2], there: [0; 2], given: [0; WIDE] } }; _];
    let mut bits = 1;
    while bits < all.len() {
        all[bits].fill(bits);
        bits += 1;
    }
    all
};

impl Layout {
    const fn fill(&mut self, bits: usize) {
        let mut word = 0;
        while word < WIDE {
            let (j, at) = (word / 8, word / 8 * bits);
            let packed = at / 8 + word % 8;
            self.shift[j] = (at % 8) as u64;
            self.given[word] = packed as u8;
            if packed <= (at + bits - 1) / 8 {
                self.taken[j % 2][packed] = word as u8;
                self.there[j % 2] |= 1 << packed;
            }
            word += 1;
        }
    }
}

impl Vbmi {
    pub(super) fn detect() -> Option<Vbmi> {
        let all = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vbmi");
        all.then_some(Vbmi(()))
    }

    /// Packs the first words, a multiple of eight of them, and says how many; what comes after their bytes is still to be written.
    pub(super) fn pack(self, words: &[u64], bits: u32, out: &mut [u8]) -> usize {
        // Of narrower words more than two meet in a byte; wider ones shifted exceed their register's lane.
        if !(8..=WIDEST).contains(&bits) || words.len() < 8 || out.len() < WIDE {
            return 0;
        }
        // SAFETY: `self` proves the features.
        unsafe { pack(words, bits, out) }
    }

    /// Unpacks the first words, a multiple of eight of them, and says how many.
    pub(super) fn unpack(self, bytes: &[u8], bits: u32, words: &mut [u64]) -> usize {
        if bits > WIDEST || words.len() < 8 || bytes.len() < WIDE {
            return 0;
        }
        // SAFETY: `self` proves the features.
        unsafe { unpack(bytes, bits, words) }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn pack(words: &[u64], bits: u32, out: &mut [u8]) -> usize {
    let l = &LAYOUTS[bits as usize];
    let (keep, shift) = (_mm512_set1_epi64(mask(bits) as i64), load(&l.shift));
    let (even, odd) = (load_bytes(&l.taken[0]), load_bytes(&l.taken[1]));
    let mut done = 0;
    for group in words.as_chunks::<8>().0 {
        // Bytes past the eight words' own are written as zeros, and again by those that come after.
        let Some(to) = out[done / 8 * bits as usize..].first_chunk_mut::<WIDE>() else { break };
        let shifted = _mm512_sllv_epi64(_mm512_and_si512(load(group), keep), shift);
        let even = _mm512_maskz_permutexvar_epi8(l.there[0], even, shifted);
        let odd = _mm512_maskz_permutexvar_epi8(l.there[1], odd, shifted);
        // SAFETY: the array has 64 bytes.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), _mm512_or_si512(even, odd)) };
        done += 8;
    }
    done
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn unpack(bytes: &[u8], bits: u32, words: &mut [u64]) -> usize {
    let l = &LAYOUTS[bits as usize];
    let (keep, shift, given) = (_mm512_set1_epi64(mask(bits) as i64), load(&l.shift), load_bytes(&l.given));
    let mut done = 0;
    for group in words.as_chunks_mut::<8>().0 {
        let Some(from) = bytes[done / 8 * bits as usize..].first_chunk::<WIDE>() else { break };
        let shifted = _mm512_permutexvar_epi8(given, load_bytes(from));
        let whole = _mm512_and_si512(_mm512_srlv_epi64(shifted, shift), keep);
        // SAFETY: the array has eight words.
        unsafe { _mm512_storeu_si512(group.as_mut_ptr().cast(), whole) };
        done += 8;
    }
    done
}

#[target_feature(enable = "avx512f")]
#[inline]
fn load(words: &[u64; 8]) -> __m512i {
    // SAFETY: the array has eight words.
    unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn load_bytes(bytes: &[u8; WIDE]) -> __m512i {
    // SAFETY: the array has 64 bytes.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}
