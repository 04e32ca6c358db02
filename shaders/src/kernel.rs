//! The kernels: which WGSL files make one up.

use std::fmt;

/// How ring words are computed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Word {
    /// One u32, for rings up to 32 bits.
    Narrow,
    /// A pair of u32.
    Pair,
    /// One u64; needs `SHADER_INT64`.
    Native,
}

impl Word {
    /// Bytes of a group of four words in a buffer.
    pub(crate) fn group(self) -> usize {
        if self == Word::Narrow { 16 } else { 32 }
    }
}

/// What words are multiplied by, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum By {
    /// Weights, whole words at a time.
    Weights { bytes: u8 },
    /// Weights, by dot products of bytes; sums in rings above 32 bits are exact up to [`DOTS_INPUTS`] inputs.
    Dots { bytes: u8 },
    /// Other words.
    Words,
}

/// Inputs up to which [`By::Dots`] is exact in rings above 32 bits.
pub(crate) const DOTS_INPUTS: usize = (1 << 16) - 1;

/// Largest weight that [`By::Dots`] takes: its upper byte, rounded, is still a signed byte.
pub(crate) const DOTS_LARGEST: u32 = 127 * 256 + 127;

/// How threads share the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Layout {
    /// Tiles of rows and columns.
    Tiles,
    /// A workgroup a row and four columns; parts are added in workgroup memory.
    Rows,
    /// The same; parts are added within subgroups first. Needs `SUBGROUP`.
    RowsBySubgroups,
}

/// One kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Kernel {
    pub word: Word,
    pub by: By,
    pub layout: Layout,
}

/// Rows and columns of a tile.
const TILE: (usize, usize) = (32, 64);

impl Kernel {
    /// Workgroups along the columns, of which there are so many groups of four, and along the rows.
    pub(crate) fn workgroups(self, rows: usize, columns: usize) -> [usize; 2] {
        match self.layout {
            Layout::Tiles => [(columns * 4).div_ceil(TILE.1), rows.div_ceil(TILE.0)],
            Layout::Rows | Layout::RowsBySubgroups => [columns, rows],
        }
    }

    /// Its WGSL; declarations may come in any order.
    pub(crate) fn source(self) -> String {
        let word: &[&str] = match self.word {
            Word::Narrow => &[include_str!("../wgsl/word32.wgsl")],
            Word::Pair => &[include_str!("../wgsl/group64.wgsl"), include_str!("../wgsl/word64.wgsl")],
            Word::Native => &[include_str!("../wgsl/group64.wgsl"), include_str!("../wgsl/word64_native.wgsl")],
        };
        let weights = |bytes| match bytes {
            1 => include_str!("../wgsl/weights8.wgsl"),
            _ => include_str!("../wgsl/weights16.wgsl"),
        };
        let dots = match self.word {
            Word::Narrow => include_str!("../wgsl/dots32.wgsl"),
            _ => include_str!("../wgsl/dots64.wgsl"),
        };
        let by: &[&str] = match self.by {
            By::Weights { bytes } => &[weights(bytes), include_str!("../wgsl/by_weights.wgsl")],
            By::Dots { bytes } => &[weights(bytes), include_str!("../wgsl/limbs.wgsl"), dots],
            By::Words => &[include_str!("../wgsl/by_words.wgsl")],
        };
        let shuffle = match self.word {
            Word::Narrow => include_str!("../wgsl/shuffle32.wgsl"),
            _ => include_str!("../wgsl/shuffle64.wgsl"),
        };
        let gemv = include_str!("../wgsl/gemv.wgsl");
        let layout: &[&str] = match self.layout {
            Layout::Tiles => &[include_str!("../wgsl/gemm.wgsl")],
            Layout::Rows => &[gemv, include_str!("../wgsl/reduce_tree.wgsl")],
            Layout::RowsBySubgroups => &[gemv, shuffle, include_str!("../wgsl/reduce_subgroups.wgsl")],
        };
        [&[include_str!("../wgsl/product.wgsl")], word, by, layout].concat().join("\n")
    }

    /// All that there are.
    pub(crate) fn all() -> impl Iterator<Item = Kernel> {
        let by = |word| {
            let all = [1, 2].into_iter().flat_map(|bytes| [By::Weights { bytes }, By::Dots { bytes }]);
            // Dot products need no 64-bit integers.
            all.chain([By::Words]).filter(move |by| word != Word::Native || !matches!(by, By::Dots { .. }))
        };
        let words = [Word::Narrow, Word::Pair, Word::Native].into_iter();
        words.flat_map(move |word| {
            by(word).flat_map(move |by| {
                [Layout::Tiles, Layout::Rows, Layout::RowsBySubgroups].map(move |layout| Kernel { word, by, layout })
            })
        })
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let word = match self.word {
            Word::Narrow => "u32",
            Word::Pair => "2 x u32",
            Word::Native => "u64",
        };
        let by = match self.by {
            By::Weights { bytes } => format!("i{}", 8 * bytes),
            By::Dots { bytes } => format!("i{} by bytes", 8 * bytes),
            By::Words => "words".into(),
        };
        let layout = match self.layout {
            Layout::Tiles => "tiles",
            Layout::Rows => "rows",
            Layout::RowsBySubgroups => "rows by subgroups",
        };
        write!(f, "{word} x {by}, {layout}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wgpu::naga::front::wgsl;
    use wgpu::naga::valid::{Capabilities, ValidationFlags, Validator};

    /// Without an adapter: every kernel parses, is valid with no more than the features it is used with, and needs no more
    /// workgroup memory than every adapter has.
    #[test]
    fn every_kernel_is_valid() {
        for kernel in Kernel::all() {
            let source = kernel.source();
            let module =
                wgsl::parse_str(&source).unwrap_or_else(|e| panic!("{kernel:?}: {}", e.emit_to_string(&source)));
            let mut needs = Capabilities::empty();
            needs.set(Capabilities::SHADER_INT64, kernel.word == Word::Native);
            needs.set(Capabilities::SUBGROUP, kernel.layout == Layout::RowsBySubgroups);
            let mut validator = Validator::new(ValidationFlags::all(), needs);
            validator.subgroup_stages(wgpu::naga::valid::ShaderStages::COMPUTE);
            validator.subgroup_operations(wgpu::naga::valid::SubgroupOperationSet::all());
            let valid = validator.validate(&module);
            let info = valid.unwrap_or_else(|e| panic!("{kernel:?}: {}", e.emit_to_string(&source)));
            let mut layouter = wgpu::naga::proc::Layouter::default();
            layouter.update(module.to_ctx()).unwrap();
            let shared = module.global_variables.iter().filter(|(_, v)| v.space == wgpu::naga::AddressSpace::WorkGroup);
            let bytes: u32 = shared.map(|(_, v)| layouter[v.ty].to_stride()).sum();
            assert!(bytes <= 16 << 10, "{kernel:?}: {bytes} bytes of workgroup memory");
            let entry = &module.entry_points[0];
            assert!(
                entry.workgroup_size.iter().product::<u32>() <= 256 && info.get_entry_point(0).sampling_set.is_empty()
            );
        }
    }
}
