//! Words times words, head by head: the sum of several products is one product over all their inputs.

use tacet_protocol::gates::product::{HeadProduct, Side};
use zeroize::Zeroizing;

use crate::device::{Device, Job, Right};
use crate::error::GpuError;
use crate::kernel::{By, Kernel, Word};
use crate::words::{push_row, read_row};
use crate::{MOST_MACS, MOST_WORKGROUPS};

/// Inputs of one product, and columns.
fn shape(g: &HeadProduct) -> (usize, usize) {
    match g.side {
        Side::Scores => (g.dim, g.grid.keys),
        Side::Attend => (g.grid.keys, g.dim),
    }
}

/// Multiply-accumulates.
pub(crate) fn macs(g: &HeadProduct, pairs: usize) -> usize {
    pairs * g.heads * g.grid.rows * g.grid.keys * g.dim
}

/// What a [`tacet_protocol::backend::Backend`] says of products.
pub(crate) fn product(device: &mut Device, g: &HeadProduct, pairs: &[(&[u64], &[u64])]) -> Result<Vec<u64>, GpuError> {
    let word = if g.k <= 32 { Word::Narrow } else { device.wide() };
    let (inputs, width) = shape(g);
    let share = g.heads / g.kv_heads;
    let (depth, columns) = ((pairs.len() * inputs).div_ceil(4), width.div_ceil(4));
    // Where each row of scores starts among those of its head.
    let starts: Vec<usize> =
        (0..g.grid.rows).scan(0, |at, i| Some(std::mem::replace(at, *at + g.grid.row_len(i)))).collect();
    let (row, other) = (depth.max(columns) * word.group(), columns * 4 * depth * word.group());
    if row > device.room / share || other > device.room {
        let what = format!("a head of {} keys", g.grid.keys);
        return Err(GpuError::TooLarge { adapter: device.about.to_string(), what, limit: device.room });
    }
    let kv = (device.room / other).min(device.room / (row * share * g.grid.rows)).clamp(1, g.kv_heads);
    let most = device.room / (row * share * kv);
    let most = most.min(MOST_MACS / (depth * columns * 16 * share * kv)).clamp(1, MOST_WORKGROUPS);
    let mut y = Zeroizing::new(vec![0; g.out_len()]);
    // Large enough at once: a vector that grows leaves its words behind.
    let mut left = Zeroizing::new(Vec::with_capacity(share * kv * most.min(g.grid.rows) * depth * word.group()));
    let mut right = Zeroizing::new(Vec::with_capacity(kv * columns * 4 * depth * word.group()));
    let mut line = Zeroizing::new(vec![0; pairs.len() * inputs]);
    for first in (0..g.kv_heads).step_by(kv) {
        let groups = first..(first + kv).min(g.kv_heads);
        right.clear();
        for group in groups.clone() {
            for c in 0..width {
                for ((_, b), line) in pairs.iter().zip(line.chunks_exact_mut(inputs)) {
                    column(g, b, group, c, line);
                }
                push_row(&mut right, word, &line);
            }
            let padded = right.len() + (columns * 4 - width) * depth * word.group();
            right.resize(padded, 0);
        }
        let heads = groups.start * share..groups.end * share;
        for first in (0..g.grid.rows).step_by(most) {
            let rows = first..(first + most).min(g.grid.rows);
            left.clear();
            for h in heads.clone() {
                for i in rows.clone() {
                    for ((a, _), line) in pairs.iter().zip(line.chunks_exact_mut(inputs)) {
                        let (from, len) = match g.side {
                            Side::Scores => ((i * g.heads + h) * g.dim, g.dim),
                            Side::Attend => (h * g.grid.len() + starts[i], g.grid.row_len(i)),
                        };
                        line[..len].copy_from_slice(&a[from..from + len]);
                        line[len..].fill(0);
                    }
                    push_row(&mut left, word, &line);
                }
            }
            let kernel = Kernel { word, by: By::Words, layout: device.layout(rows.len()) };
            let (batch, right) = (heads.len(), Right::Sent(&right));
            let job = Job { kernel, batch, rows: rows.len(), columns, depth, share, left: &left, right, times: 1 };
            device.run(&job, |made| {
                let places = heads.clone().flat_map(|h| rows.clone().map(move |i| (h, i)));
                for ((h, i), made) in places.zip(made.chunks_exact(columns * word.group())) {
                    let (from, len) = match g.side {
                        Side::Scores => (h * g.grid.len() + starts[i], g.grid.row_len(i)),
                        Side::Attend => ((i * g.heads + h) * g.dim, g.dim),
                    };
                    read_row(made, word, g.k, &mut y[from..from + len]);
                }
            })?;
        }
    }
    Ok(std::mem::take(&mut *y))
}

/// Column `c` of the right side of the head group `group`.
fn column(g: &HeadProduct, b: &[u64], group: usize, c: usize, to: &mut [u64]) {
    let stride = g.kv_heads * g.dim;
    match g.side {
        Side::Scores => to.copy_from_slice(&b[c * stride + group * g.dim..][..g.dim]),
        Side::Attend => to.iter_mut().enumerate().for_each(|(j, to)| *to = b[j * stride + group * g.dim + c]),
    }
}
