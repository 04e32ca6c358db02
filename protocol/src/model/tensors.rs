//! Named, shape-checked tensors out of a safetensors file.

use safetensors::{Dtype, SafeTensors};

use super::{Dense, Norm};
use crate::Error;

pub(super) struct Tensors<'a> {
    file: SafeTensors<'a>,
    prefix: &'static str,
}

fn refuse<T>(why: String) -> Result<T, Error> {
    Err(Error::Model(format!("model.safetensors: {why}")))
}

impl<'a> Tensors<'a> {
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Tensors<'a>, Error> {
        let file = match SafeTensors::deserialize(bytes) {
            Ok(file) => file,
            Err(e) => return refuse(format!("truncated or not a safetensors file ({e})")),
        };
        // Files saved from a model with a head have every encoder tensor under `bert.`.
        let headed = file.names().iter().any(|name| name.starts_with("bert.embeddings."));
        Ok(Tensors { file, prefix: if headed { "bert." } else { "" } })
    }

    pub(super) fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Vec<f32>, Error> {
        self.values(name, &[rows, cols])
    }

    pub(super) fn dense(&self, name: &str, out: usize, inp: usize) -> Result<Dense, Error> {
        Ok(Dense {
            weight: self.matrix(&format!("{name}.weight"), out, inp)?,
            bias: self.values(&format!("{name}.bias"), &[out])?,
            out,
            inp,
        })
    }

    pub(super) fn norm(&self, name: &str, width: usize) -> Result<Norm, Error> {
        // Checkpoints converted from TensorFlow call the pair gamma and beta.
        let tf = self.file.tensor(&format!("{}{name}.gamma", self.prefix)).is_ok();
        let (weight, bias) = if tf { ("gamma", "beta") } else { ("weight", "bias") };
        Ok(Norm {
            weight: self.values(&format!("{name}.{weight}"), &[width])?,
            bias: self.values(&format!("{name}.{bias}"), &[width])?,
        })
    }

    fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
        let name = format!("{}{name}", self.prefix);
        let Ok(view) = self.file.tensor(&name) else {
            return refuse(format!("tensor {name} is missing"));
        };
        if view.shape() != shape {
            return refuse(format!("tensor {name} is {:?}, expected {shape:?}", view.shape()));
        }
        let data = view.data();
        let values: Vec<f32> = match view.dtype() {
            Dtype::F32 => words(data).map(f32::from_le_bytes).collect(),
            Dtype::F16 => words(data).map(|b| f16_to_f32(u16::from_le_bytes(b))).collect(),
            Dtype::BF16 => words(data).map(|b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)).collect(),
            other => {
                return refuse(format!("tensor {name} is {other:?}, expected F32, F16 or BF16"));
            }
        };
        // A bound derived from such a weight would be meaningless.
        if values.iter().any(|v| !v.is_finite()) {
            return refuse(format!("tensor {name} holds a value that is not finite"));
        }
        Ok(values)
    }
}

fn words<const N: usize>(data: &[u8]) -> impl Iterator<Item = [u8; N]> {
    data.as_chunks::<N>().0.iter().copied()
}

/// Exact: every half-precision value is a single-precision one.
pub(super) fn f16_to_f32(half: u16) -> f32 {
    let bits = u32::from(half & 0x7fff) << 13;
    let magnitude = match half >> 10 & 31 {
        31 => f32::from_bits(bits | 0x7f80_0000),
        // The two exponents' biases differ by 112; subnormals become normal by the same multiplication.
        _ => f32::from_bits(bits) * f32::from_bits((127 + 112) << 23),
    };
    if half >> 15 == 1 { -magnitude } else { magnitude }
}
