//! Ring words as the kernels read them: groups of four along the inner axis, padded with zeros.

use tacet_protocol::ring::mask;

use crate::kernel::Word;

/// Appends a row of words, padded to whole groups; bits above the word's width are dropped.
pub(crate) fn push_row(to: &mut Vec<u8>, word: Word, row: &[u64]) {
    let groups = row.len().div_ceil(4);
    let from = to.len();
    to.resize(from + groups * word.group(), 0);
    let out = &mut to[from..];
    if word == Word::Narrow {
        for (to, x) in out.chunks_exact_mut(4).zip(row) {
            to.copy_from_slice(&(*x as u32).to_le_bytes());
        }
    } else {
        for (i, x) in row.iter().enumerate() {
            let at = i / 4 * 32 + i % 4 * 4;
            out[at..at + 4].copy_from_slice(&(*x as u32).to_le_bytes());
            out[at + 16..at + 20].copy_from_slice(&((x >> 32) as u32).to_le_bytes());
        }
    }
}

/// Reads a row of words back into the ring.
pub(crate) fn read_row(from: &[u8], word: Word, bits: u32, to: &mut [u64]) {
    let half = |at: usize| u64::from(u32::from_le_bytes([from[at], from[at + 1], from[at + 2], from[at + 3]]));
    let keep = mask(bits);
    for (i, x) in to.iter_mut().enumerate() {
        *x = keep
            & match word {
                Word::Narrow => half(i * 4),
                Word::Pair | Word::Native => {
                    let at = i / 4 * 32 + i % 4 * 4;
                    half(at) | half(at + 16) << 32
                }
            };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_padded_to_groups() {
        let row: Vec<u64> = (1..=6u64).map(|i| i * 0x1_0000_0001).collect();
        for (word, bits) in [(Word::Narrow, 32), (Word::Pair, 64), (Word::Native, 35)] {
            let mut bytes = vec![7];
            push_row(&mut bytes, word, &row);
            assert_eq!(bytes.len(), 1 + 2 * word.group());
            let mut back = [0; 8];
            read_row(&bytes[1..], word, bits, &mut back);
            let want: Vec<u64> = row.iter().chain(&[0, 0]).map(|w| w & mask(bits)).collect();
            assert_eq!(back[..], want[..]);
        }
    }
}
