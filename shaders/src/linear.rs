//! Shares times public weights.

use std::ops::Range;

use tacet_protocol::gemm::Weights;
use zeroize::Zeroizing;

use crate::device::{Device, Job, Right};
use crate::error::GpuError;
use crate::kernel::{By, DOTS_INPUTS, DOTS_LARGEST, Kernel, Word};
use crate::words::{push_row, read_row};
use crate::{MOST_MACS, MOST_WORKGROUPS};

/// A layer's weights on the device, in parts that can be bound.
#[derive(Clone)]
pub(crate) struct Resident {
    inputs: usize,
    /// Bytes of a weight.
    bytes: u8,
    /// Whether dot products of bytes give the right sums.
    dots: bool,
    /// Outputs of each part, whole groups but for the end.
    pub(crate) parts: Vec<(Range<usize>, wgpu::Buffer)>,
}

/// Bytes that a weight of these needs.
pub(crate) fn bytes(w: &Weights) -> u8 {
    match w.bits() {
        // The processor's own packing has looked at each.
        8 => 1,
        16 => 2,
        _ => {
            let mut all = (0..w.rows_out()).flat_map(|o| (0..w.cols_in()).map(move |i| w.at(o, i)));
            if all.all(|w| i8::try_from(w).is_ok()) { 1 } else { 2 }
        }
    }
}

/// Bytes of these on a device, padded, with so many a weight.
pub(crate) fn size(w: &Weights, bytes: u8) -> usize {
    w.rows_out().next_multiple_of(4) * w.cols_in().next_multiple_of(4) * usize::from(bytes)
}

impl Resident {
    /// Puts a layer's weights on the device, so many bytes each.
    pub(crate) fn new(device: &Device, w: &Weights, bytes: u8) -> Result<Resident, GpuError> {
        let group = 4 * w.cols_in().div_ceil(4) * 4 * usize::from(bytes);
        let groups = (device.room / group.max(1)).min(device.room / Word::Pair.group()).min(MOST_WORKGROUPS);
        if groups == 0 {
            let what = format!("a layer of {} inputs", w.cols_in());
            return Err(GpuError::TooLarge { adapter: device.about.to_string(), what, limit: device.room });
        }
        let mut largest = i16::MIN;
        let parts = (0..w.rows_out()).step_by(groups * 4).map(|from| {
            let outputs = from..(from + groups * 4).min(w.rows_out());
            let (packed, most) = pack(w, outputs.clone(), bytes);
            largest = largest.max(most);
            Ok((outputs, device.resident(&packed)?))
        });
        let parts = parts.collect::<Result<_, GpuError>>()?;
        Ok(Resident { inputs: w.cols_in(), bytes, dots: i64::from(largest) <= i64::from(DOTS_LARGEST), parts })
    }

    /// How products in Z_2^bits are computed.
    pub(crate) fn way(&self, device: &Device, bits: u32) -> (Word, By) {
        let narrow = bits <= 32;
        let bytes = self.bytes;
        let dots = device.dots[usize::from(!narrow)] && self.dots && (narrow || self.inputs <= DOTS_INPUTS);
        match (narrow, dots) {
            (true, false) => (Word::Narrow, By::Weights { bytes }),
            (true, true) => (Word::Narrow, By::Dots { bytes }),
            (false, true) => (Word::Pair, By::Dots { bytes }),
            (false, false) => (device.wide(), By::Weights { bytes }),
        }
    }

    /// `x W^T` in Z_2^bits.
    pub(crate) fn apply(
        &self,
        device: &mut Device,
        w: &Weights,
        x: &[u64],
        rows: usize,
        bits: u32,
    ) -> Result<Vec<u64>, GpuError> {
        let (inp, out) = (w.cols_in(), w.rows_out());
        let (word, by) = self.way(device, bits);
        let depth = inp.div_ceil(4);
        let widest = self.parts.iter().map(|(o, _)| o.len().div_ceil(4)).max().unwrap_or(1);
        let most = device.room / (depth.max(widest) * word.group());
        let most = most.min(MOST_MACS / (depth * widest * 16)).clamp(1, MOST_WORKGROUPS);
        if depth * word.group() > device.room {
            let what = format!("a row of {inp} words");
            return Err(GpuError::TooLarge { adapter: device.about.to_string(), what, limit: device.room });
        }
        let mut y = Zeroizing::new(vec![0; rows * out]);
        let mut left = Zeroizing::new(Vec::with_capacity(most.min(rows) * depth * word.group()));
        for (x, y) in x.chunks(most * inp).zip(y.chunks_mut(most * out)) {
            let rows = x.len() / inp;
            left.clear();
            x.chunks_exact(inp).for_each(|row| push_row(&mut left, word, row));
            let kernel = Kernel { word, by, layout: device.layout(rows) };
            for (outputs, weights) in &self.parts {
                let columns = outputs.len().div_ceil(4);
                let right = Right::Resident(weights);
                let job = Job { kernel, batch: 1, rows, columns, depth, share: 1, left: &left, right, times: 1 };
                device.run(&job, |made| {
                    for (made, y) in made.chunks_exact(columns * word.group()).zip(y.chunks_exact_mut(out)) {
                        read_row(made, word, bits, &mut y[outputs.clone()]);
                    }
                })?;
            }
        }
        Ok(std::mem::take(&mut *y))
    }
}

/// Rows of weights in groups of four inputs, padded to groups of four outputs: lower bytes, then upper ones; and the largest
/// weight. To look each up takes most of the time, so each is looked up once.
fn pack(w: &Weights, outputs: Range<usize>, bytes: u8) -> (Vec<u8>, i16) {
    let depth = w.cols_in().div_ceil(4);
    let group = 4 * usize::from(bytes);
    let mut to = Vec::with_capacity(outputs.len().next_multiple_of(4) * depth * group);
    let (mut row, mut largest) = (vec![0; 4 * depth], i16::MIN);
    for o in outputs.clone() {
        let filled = &mut row[..w.cols_in()];
        filled.iter_mut().enumerate().for_each(|(i, to)| *to = w.at(o, i));
        largest = filled.iter().fold(largest, |most, w| most.max(*w));
        for four in row.as_chunks::<4>().0 {
            to.extend_from_slice(&four.map(|w| w as u8));
            if bytes == 2 {
                // What the lower byte, as a signed one, leaves.
                to.extend_from_slice(&four.map(|w| ((i32::from(w) - i32::from(w as i8)) >> 8) as u8));
            }
        }
    }
    to.resize(outputs.len().next_multiple_of(4) * depth * group, 0);
    (to, largest)
}
