//! Weights of four bits: sixteen levels at most, equally far apart but for what sixteenths of a unit are rounded by, in
//! each block of inputs of an output. They become 16 bits in registers, and products are those of limbs from there on.

use super::NR;

/// Inputs of a block, as many as the common formats of checkpoints have.
pub(super) const BLOCK: usize = 32;

/// Weights `scale q / 16 + offset`, the quotient rounded to the nearest integer, of [`NR`] outputs and [`BLOCK`] inputs, modulo `2^16`.
#[derive(Clone)]
#[repr(align(64))]
pub(super) struct Block {
    pub(super) scales: [i16; NR],
    pub(super) offsets: [i16; NR],
    /// By pairs of inputs; byte `j` has input `j % 2` of output `j / 2` below and of output `NR / 2 + j / 2` above.
    pub(super) pairs: [[u8; NR]; BLOCK / 2],
}

/// Bytes of a block.
pub(super) const BYTES: usize = size_of::<Block>();

/// The weights of blocks after one another. Inlined into functions that allow wider vectors.
#[inline(always)]
pub(super) fn widen(blocks: &[Block], to: &mut [i16]) {
    let (to, _) = to.as_chunks_mut::<{ 2 * NR }>().0.as_chunks_mut();
    blocks.iter().zip(to).for_each(|(block, to)| block.widen(to));
}

/// The level of a weight that is `above` the least, or one near by where it is none.
fn level(above: u16, scale: i16) -> i32 {
    let level = (16 * u32::from(above)).saturating_sub(8).div_ceil(u32::from(scale.unsigned_abs().max(1)));
    level.min(15).cast_signed()
}

/// What a level is above the least, at most `15 / 16` of 16 bits with their sign.
#[inline(always)]
fn value(level: i32, scale: i16) -> i16 {
    ((level * i32::from(scale) + 8) >> 4) as i16
}

/// How many sixteenths the levels of a block's weights are apart, and the least; `None` where there are more than sixteen, or
/// they are 2048 or more apart.
fn levels(w: &[i16]) -> Option<(i16, i16)> {
    let (least, most) = w.iter().fold((i16::MAX, i16::MIN), |(l, m), w| (l.min(*w), m.max(*w)));
    let range = u32::from(most.abs_diff(least));
    // Those that take some level to the largest weight.
    let scales =
        (1..=15).rev().flat_map(|top| (16 * range).saturating_sub(8).div_ceil(top)..(16 * range + 8).div_ceil(top));
    let mut scales = scales.filter_map(|scale| i16::try_from(scale).ok());
    let above = |w: &i16| w.abs_diff(least);
    let scale = scales.find(|s| w.iter().all(|w| value(level(above(w), *s), *s).cast_unsigned() == above(w)))?;
    Some((scale, least))
}

/// Whether a row has such blocks.
pub(super) fn holds(row: &[i16]) -> bool {
    row.len().is_multiple_of(BLOCK) && row.chunks(BLOCK).all(|block| levels(block).is_some())
}

impl Block {
    /// Rows of [`NR`] outputs or fewer, each of one block, which [`holds`].
    pub(super) fn new<'a>(rows: impl Iterator<Item = &'a [i16]>) -> Block {
        let mut block = Block { scales: [0; NR], offsets: [0; NR], pairs: [[0; NR]; BLOCK / 2] };
        for (o, row) in rows.enumerate() {
            let (scale, offset) = levels(row).unwrap_or_default();
            (block.scales[o], block.offsets[o]) = (scale, offset);
            for (i, w) in row.iter().enumerate() {
                let level = level(w.abs_diff(offset), scale) as u8;
                block.pairs[i / 2][o % (NR / 2) * 2 + i % 2] |= level << (o / (NR / 2) * 4);
            }
        }
        block
    }

    /// The weight of input `i` of output `o`.
    pub(super) fn at(&self, o: usize, i: usize) -> i16 {
        let level = self.pairs[i / 2][o % (NR / 2) * 2 + i % 2] >> (o / (NR / 2) * 4) & 15;
        value(level.into(), self.scales[o]).wrapping_add(self.offsets[o])
    }

    /// The weights by pairs of inputs, an output's two side by side. Inlined into functions that allow wider vectors.
    #[inline(always)]
    pub(super) fn widen(&self, to: &mut [[i16; 2 * NR]; BLOCK / 2]) {
        let scales: [i16; 2 * NR] = std::array::from_fn(|j| self.scales[j / 2]);
        let offsets: [i16; 2 * NR] = std::array::from_fn(|j| self.offsets[j / 2]);
        for (to, pair) in to.iter_mut().zip(&self.pairs) {
            let weight = |level: u8, j: usize| value(level.into(), scales[j]).wrapping_add(offsets[j]);
            let (lower, upper) = to.split_at_mut(NR);
            lower.iter_mut().zip(pair).enumerate().for_each(|(j, (w, q))| *w = weight(q & 15, j));
            upper.iter_mut().zip(pair).enumerate().for_each(|(j, (w, q))| *w = weight(q >> 4, NR + j));
        }
    }

    /// All bytes.
    pub(super) fn bytes(&self) -> impl Iterator<Item = u8> {
        let scales = self.scales.iter().flat_map(|s| s.to_le_bytes());
        let offsets = self.offsets.iter().flat_map(|t| t.to_le_bytes());
        scales.chain(offsets).chain(self.pairs.iter().flatten().copied())
    }

    /// The block of such bytes: any are one.
    pub(super) fn from_bytes(bytes: &[u8; BYTES]) -> Block {
        let (words, _) = bytes.as_chunks::<2>();
        let (pairs, _) = bytes[4 * NR..].as_chunks();
        Block {
            scales: std::array::from_fn(|o| i16::from_le_bytes(words[o])),
            offsets: std::array::from_fn(|o| i16::from_le_bytes(words[NR + o])),
            pairs: std::array::from_fn(|i| pairs[i]),
        }
    }

    /// The largest magnitude.
    pub(super) fn largest(&self) -> u32 {
        let mut wide = [[0; 2 * NR]; BLOCK / 2];
        self.widen(&mut wide);
        wide.as_flattened().iter().fold(0, |m, w| m.max(w.unsigned_abs().into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_sixteen_levels_come_back() {
        for (apart, least) in [(0, 5), (1, -8), (1, i16::MIN), (300, -2000), (2047, i16::MIN), (7, 32000)] {
            let row = |o: usize| {
                let w = (0..BLOCK).map(move |i| (apart * ((i * 7 + o) % 16) as i32 + i32::from(least)) as i16);
                w.collect::<Vec<_>>()
            };
            for count in [1, 17, NR] {
                let rows: Vec<Vec<i16>> = (0..count).map(row).collect();
                assert!(rows.iter().all(|row| holds(row)), "{apart}, {least}");
                let block = Block::new(rows.iter().map(|row| &row[..]));
                let again = Block::from_bytes(&block.bytes().collect::<Vec<_>>().try_into().unwrap());
                let mut wide = [[0; 2 * NR]; BLOCK / 2];
                again.widen(&mut wide);
                for (o, row) in rows.iter().enumerate() {
                    for (i, w) in row.iter().enumerate() {
                        assert!(again.at(o, i) == *w && wide[i / 2][2 * o + i % 2] == *w, "{apart}, {least}");
                    }
                }
            }
            let mut other = row(0);
            other[9] = least.wrapping_add(1);
            assert_eq!(holds(&other), apart <= 1, "{apart}, {least}");
            assert!(!holds(&other[1..]));
        }
        let far: Vec<i16> = (0..BLOCK).map(|i| [i16::MIN, i16::MAX][i % 2]).collect();
        assert!(!holds(&far));
        for scale in [16, 17, 31, 40, 5001, i16::MAX] {
            for offset in [i16::MIN, -30_000] {
                let row: Vec<i16> = (0..BLOCK as i32).map(|i| value(i * 5 % 16, scale).wrapping_add(offset)).collect();
                assert!(holds(&row), "{scale}");
                let block = Block::new([&row[..]].into_iter());
                assert!((0..BLOCK).all(|i| block.at(0, i) == row[i]), "{scale}");
            }
        }
        let seventeen: Vec<i16> = (0..BLOCK as i16).map(|i| i % 17).collect();
        assert!(!holds(&seventeen));
    }
}
