//! The GGUF container, versions 2 and 3, little-endian: metadata, and tensors in F32, F16, BF16, Q8_0, Q4_0 or Q4_1.
//!
//! Layout: magic, version, tensor count, metadata count; metadata (name, type, value); tensor descriptions (name,
//! dimensions from the contiguous one outwards, type, offset); then, aligned, the tensors' bytes. Source: the format's
//! document in ggml, `docs/gguf.md`.

use serde_json::{Map, Value};

use super::source::{Format, Source};
use super::weights::Weights;
use crate::Error;

/// A tensor has at most four dimensions in ggml.
const MOST_DIMENSIONS: u32 = 4;

/// Of a name or a text, in bytes; chat templates are the longest.
const LONGEST_TEXT: u64 = 1 << 20;

/// ggml's types by number, for errors; those that are read are in [`format_of`].
const TYPES: [&str; 40] = [
    "F32",
    "F16",
    "Q4_0",
    "Q4_1",
    "Q4_2",
    "Q4_3",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q8_1",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "Q8_K",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ3_XXS",
    "IQ1_S",
    "IQ4_NL",
    "IQ3_S",
    "IQ2_S",
    "IQ4_XS",
    "I8",
    "I16",
    "I32",
    "I64",
    "F64",
    "IQ1_M",
    "BF16",
    "Q4_0_4_4",
    "Q4_0_4_8",
    "Q4_0_8_8",
    "TQ1_0",
    "TQ2_0",
    "IQ4_NL_4_4",
    "IQ4_NL_4_8",
    "IQ4_NL_8_8",
    "MXFP4",
];

struct Description {
    name: String,
    /// Rows first, as everywhere else.
    shape: Vec<usize>,
    count: u64,
    kind: u32,
    offset: u64,
}

/// The tensors of a file whose header was read.
pub(super) struct Contents {
    descriptions: Vec<Description>,
    alignment: u64,
}

/// Reads up to the first tensor. An array of the metadata becomes its length: those of a language model are its
/// tokeniser's.
pub(super) fn header(source: &mut Source) -> Result<(Map<String, Value>, Contents), Error> {
    if &source.array()? != b"GGUF" {
        return source.refuse("not a gguf file".into());
    }
    let version = word(source)?;
    if !(2..=3).contains(&version) {
        return source.refuse(format!("gguf version {version} is not supported, 2 and 3 are (little-endian)"));
    }
    let (tensors, entries) = (long(source)?, long(source)?);
    // Both counts are a stranger's: each turn of a loop consumes bytes or fails, and nothing is reserved for them.
    let mut metadata = Map::new();
    for _ in 0..entries {
        let name = text(source)?;
        let kind = word(source)?;
        let value = value(source, &name, kind)?;
        if metadata.insert(name.clone(), value).is_some() {
            return source.refuse(format!("{name} is there twice"));
        }
    }
    let mut descriptions = Vec::new();
    for _ in 0..tensors {
        descriptions.push(description(source)?);
    }
    let alignment = metadata.remove("general.alignment").map_or(Some(32), |v| v.as_u64());
    let Some(alignment) = alignment.filter(|a| a.is_power_of_two() && *a <= 1 << 20) else {
        return source.refuse("general.alignment is not a power of two of reasonable size".into());
    };
    descriptions.sort_by_key(|d| d.offset);
    Ok((metadata, Contents { descriptions, alignment }))
}

impl Contents {
    /// Reads over the rest.
    pub(super) fn read(self, source: &mut Source) -> Result<Weights, Error> {
        pad(source, self.alignment)?;
        let start = source.position();
        let mut weights = Weights::new([0; 32]);
        for d in self.descriptions {
            let Some(format) = format_of(d.kind) else {
                let kind = TYPES.get(d.kind as usize).map_or(format!("type {}", d.kind), |name| (*name).into());
                return source
                    .refuse(format!("tensor {} is {kind}, expected F32, F16, BF16, Q8_0, Q4_0 or Q4_1", d.name));
            };
            if !d.shape.last().is_some_and(|cols| (*cols as u64).is_multiple_of(format.block().0)) {
                return source.refuse(format!("tensor {} cannot be {:?} values of {format:?}", d.name, d.shape));
            }
            if start.checked_add(d.offset) != Some(source.position()) {
                return source.refuse(format!("tensor {} does not follow the one before it", d.name));
            }
            let place = source.place(&d.name, format, d.count)?;
            weights.insert(d.name, d.shape, place)?;
            pad(source, self.alignment)?;
        }
        if source.left() > 0 {
            return source.refuse(format!("{} bytes follow the last tensor", source.left()));
        }
        Ok(weights)
    }
}

fn description(source: &mut Source) -> Result<Description, Error> {
    let name = text(source)?;
    let dimensions = word(source)?;
    if !(1..=MOST_DIMENSIONS).contains(&dimensions) {
        return source.refuse(format!("tensor {name} has {dimensions} dimensions"));
    }
    let (mut shape, mut count) = (Vec::new(), Some(1u64));
    for _ in 0..dimensions {
        let size = long(source)?;
        count = count.and_then(|c| c.checked_mul(size)).filter(|c| *c > 0 && *c <= 1 << 48);
        shape.insert(0, size as usize);
    }
    let (kind, offset) = (word(source)?, long(source)?);
    match count {
        Some(count) => Ok(Description { name, shape, count, kind, offset }),
        None => source.refuse(format!("tensor {name} cannot have shape {shape:?}")),
    }
}

fn format_of(kind: u32) -> Option<Format> {
    match kind {
        0 => Some(Format::F32),
        1 => Some(Format::F16),
        2 => Some(Format::Q4_0),
        3 => Some(Format::Q4_1),
        8 => Some(Format::Q8_0),
        30 => Some(Format::Bf16),
        _ => None,
    }
}

fn value(source: &mut Source, name: &str, kind: u32) -> Result<Value, Error> {
    Ok(match kind {
        0 => u8::from_le_bytes(source.array()?).into(),
        1 => i8::from_le_bytes(source.array()?).into(),
        2 => u16::from_le_bytes(source.array()?).into(),
        3 => i16::from_le_bytes(source.array()?).into(),
        4 => u32::from_le_bytes(source.array()?).into(),
        5 => i32::from_le_bytes(source.array()?).into(),
        6 => f32::from_le_bytes(source.array()?).into(),
        7 => match source.array()? {
            [0] => false.into(),
            [1] => true.into(),
            _ => return source.refuse(format!("{name} is neither true nor false")),
        },
        8 => text(source)?.into(),
        9 => array(source, name)?,
        10 => long(source)?.into(),
        11 => i64::from_le_bytes(source.array()?).into(),
        12 => f64::from_le_bytes(source.array()?).into(),
        _ => return source.refuse(format!("{name} has unknown type {kind}")),
    })
}

/// Reads over an array.
fn array(source: &mut Source, name: &str) -> Result<Value, Error> {
    let (kind, len) = (word(source)?, long(source)?);
    let width = match kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        10..=12 => 8,
        8 => {
            for _ in 0..len {
                let text = long(source)?;
                source.skip(text)?;
            }
            0
        }
        _ => return source.refuse(format!("{name} is an array of type {kind}, which is not supported")),
    };
    source.skip(len.saturating_mul(width))?;
    Ok(format!("array of {len}").into())
}

fn pad(source: &mut Source, alignment: u64) -> Result<(), Error> {
    let past = source.position() % alignment;
    // The last tensor may end the file.
    source.skip(if past == 0 { 0 } else { (alignment - past).min(source.left()) })
}

fn word(source: &mut Source) -> Result<u32, Error> {
    Ok(u32::from_le_bytes(source.array()?))
}

fn long(source: &mut Source) -> Result<u64, Error> {
    Ok(u64::from_le_bytes(source.array()?))
}

fn text(source: &mut Source) -> Result<String, Error> {
    let len = long(source)?;
    if len > LONGEST_TEXT {
        return source.refuse(format!("a name or a text of the metadata is {len} bytes long"));
    }
    let bytes = source.bytes(len)?;
    String::from_utf8(bytes).or_else(|_| source.refuse("a name or a text of the metadata is not UTF-8".into()))
}
