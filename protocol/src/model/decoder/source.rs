//! A weight file, read from front to back once: every byte goes into the digest, and nothing is allocated that the file's
//! length does not vouch for. Where a tensor lies is noted then, and its values are read when somebody takes them.

use std::io::{Read, Seek, SeekFrom};

use sha2::{Digest, Sha256};

use super::refuse;
use crate::Error;
use crate::model::tensors::f16_to_f32;

/// Bytes that are converted at a time; a multiple of every block.
const CHUNK: u64 = 34 * 18 * 20 * 4;

/// How values are stored, in blocks along a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    F32,
    F16,
    Bf16,
    /// 32 signed bytes times one half-precision scale.
    Q8_0,
    /// 32 nibbles less 8 times one half-precision scale; the low nibbles are the first 16 values.
    Q4_0,
    /// 32 nibbles times one half-precision scale, plus another; the low nibbles are the first 16 values.
    Q4_1,
}

impl Format {
    /// Values and bytes of a block.
    pub(super) fn block(self) -> (u64, u64) {
        match self {
            Format::F32 => (1, 4),
            Format::F16 | Format::Bf16 => (1, 2),
            Format::Q8_0 => (32, 34),
            Format::Q4_0 => (32, 18),
            Format::Q4_1 => (32, 20),
        }
    }

    /// Bytes of `count` values; `None` where they do not fill blocks or 64 bits do not count them.
    pub(super) fn bytes(self, count: u64) -> Option<u64> {
        let (values, bytes) = self.block();
        if count.is_multiple_of(values) { (count / values).checked_mul(bytes) } else { None }
    }

    fn decode(self, data: &[u8], out: &mut Vec<f32>) {
        let half = |b: [u8; 2]| f16_to_f32(u16::from_le_bytes(b));
        match self {
            Format::F32 => out.extend(data.as_chunks().0.iter().copied().map(f32::from_le_bytes)),
            Format::F16 => out.extend(data.as_chunks().0.iter().copied().map(half)),
            Format::Bf16 => {
                let wide = |b: [u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16);
                out.extend(data.as_chunks().0.iter().copied().map(wide));
            }
            Format::Q8_0 => {
                for [a, b, quants @ ..] in data.as_chunks::<34>().0 {
                    let scale = half([*a, *b]);
                    out.extend(quants.iter().map(|q| scale * f32::from(q.cast_signed())));
                }
            }
            Format::Q4_0 => {
                for [a, b, quants @ ..] in data.as_chunks::<18>().0 {
                    let scale = half([*a, *b]);
                    let value = |nibble: u8| scale * (f32::from(nibble) - 8.0);
                    out.extend(quants.iter().map(|q| value(q & 15)));
                    out.extend(quants.iter().map(|q| value(q >> 4)));
                }
            }
            Format::Q4_1 => {
                for [a, b, c, d, quants @ ..] in data.as_chunks::<20>().0 {
                    let (scale, least) = (half([*a, *b]), half([*c, *d]));
                    let value = |nibble: u8| scale * f32::from(nibble) + least;
                    out.extend(quants.iter().map(|q| value(q & 15)));
                    out.extend(quants.iter().map(|q| value(q >> 4)));
                }
            }
        }
    }
}

/// What values are read from.
pub(super) trait Bytes: Read + Seek + Send {}

impl<T: Read + Seek + Send> Bytes for T {}

/// Where a tensor's values lie in a file that is as long as was checked.
pub(super) struct Place {
    at: u64,
    bytes: u64,
    format: Format,
}

impl Place {
    /// The values, all finite.
    pub(super) fn read(&self, file: &str, from: &mut dyn Bytes, tensor: &str) -> Result<Vec<f32>, Error> {
        let unreadable = |e: std::io::Error| Error::Model(format!("{file}: cannot be read: {e}"));
        let (block, width) = self.format.block();
        let mut values = Vec::with_capacity((self.bytes / width * block) as usize);
        from.seek(SeekFrom::Start(self.at)).map_err(unreadable)?;
        let mut left = self.bytes;
        let mut part = vec![0; left.min(CHUNK) as usize];
        while left > 0 {
            part.truncate(left.min(CHUNK) as usize);
            from.read_exact(&mut part).map_err(unreadable)?;
            left -= part.len() as u64;
            self.format.decode(&part, &mut values);
        }
        // A bound derived from such a weight would be meaningless.
        if values.iter().any(|v| !v.is_finite()) {
            return refuse(format!("{file}: tensor {tensor} holds a value that is not finite"));
        }
        Ok(values)
    }
}

/// The unread part of a file.
pub(super) struct Source<'a> {
    name: &'a str,
    inner: &'a mut dyn Read,
    hash: &'a mut Sha256,
    left: u64,
    len: u64,
}

impl<'a> Source<'a> {
    /// `len` is the file's whole length; it enters the digest first, so that no two lists of files hash alike.
    pub(super) fn new(name: &'a str, inner: &'a mut dyn Read, len: u64, hash: &'a mut Sha256) -> Source<'a> {
        hash.update(len.to_le_bytes());
        Source { name, inner, hash, left: len, len }
    }

    pub(super) fn left(&self) -> u64 {
        self.left
    }

    /// Bytes read so far.
    pub(super) fn position(&self) -> u64 {
        self.len - self.left
    }

    /// The next `n` bytes.
    pub(super) fn bytes(&mut self, n: u64) -> Result<Vec<u8>, Error> {
        if n > self.left {
            return self.refuse(format!("truncated: {n} bytes are announced where {} are left", self.left));
        }
        let mut bytes = vec![0; n as usize];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        if N as u64 > self.left {
            return self.refuse("truncated".into());
        }
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    /// Reads over `n` bytes, which are still part of the digest.
    pub(super) fn skip(&mut self, mut n: u64) -> Result<(), Error> {
        while n > 0 {
            let part = n.min(CHUNK);
            self.bytes(part)?;
            n -= part;
        }
        Ok(())
    }

    /// Where the next `count` values lie; reads over them.
    pub(super) fn place(&mut self, tensor: &str, format: Format, count: u64) -> Result<Place, Error> {
        let Some(bytes) = format.bytes(count).filter(|bytes| *bytes <= self.left) else {
            return self.refuse(format!("truncated: tensor {tensor} is announced with {count} values"));
        };
        let at = self.position();
        self.skip(bytes)?;
        Ok(Place { at, bytes, format })
    }

    pub(super) fn refuse<T>(&self, why: String) -> Result<T, Error> {
        refuse(format!("{}: {why}", self.name))
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), Error> {
        if let Err(e) = self.inner.read_exact(bytes) {
            return self.refuse(format!("cannot be read: {e}"));
        }
        self.hash.update(&*bytes);
        self.left -= bytes.len() as u64;
        Ok(())
    }
}
