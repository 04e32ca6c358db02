//! Matrix products: operands are brought into the products' order, and what they make back.

use tacet_protocol::gates::product::{HeadProduct, Side};
use tacet_protocol::program::Linear;

use super::{At, Command, Lowered, Operand, Unfit, Ways, causal};
use crate::MOST_WORKGROUPS;
use crate::evaluation::gate::Gate;
use crate::kernel::{Kernel, Word};

/// A batch of products: rows, groups of four columns and of four inputs, and how many batches read the same right side.
struct Shape {
    batch: usize,
    rows: usize,
    columns: usize,
    depth: usize,
    share: usize,
}

/// Rows of a dispatch of several are a multiple: tiles are whole, and bindings start where every adapter lets them, since 256
/// bytes divide this many groups.
const ALIGNED: usize = 32;

impl Lowered {
    /// One product that is too much for a dispatch goes in several, of some rows each.
    fn multiply(
        &mut self,
        kernel: Kernel,
        s: &Shape,
        weights: Option<(usize, usize)>,
        most: usize,
    ) -> Result<(), Unfit> {
        let of_a_row = s.batch * s.columns * s.depth * 16;
        let fit = most.checked_div(of_a_row).unwrap_or(s.rows);
        let step = if s.batch == 1 && fit < s.rows { fit / ALIGNED * ALIGNED } else { s.rows };
        if step == 0 || step * of_a_row > most {
            return Err(Unfit);
        }
        let group = kernel.word.group();
        let right = if weights.is_some() { 0 } else { s.batch / s.share * s.columns * 4 * s.depth * group };
        let sizes = |rows: usize| [s.batch * rows * s.depth * group, right, s.batch * rows * s.columns * group];
        self.operands.iter_mut().zip(sizes(s.rows)).for_each(|(most, size)| *most = size.max(*most));
        for first in (0..s.rows).step_by(step) {
            let rows = step.min(s.rows - first);
            let [x, y] = kernel.workgroups(rows, s.columns);
            if x.max(y).max(s.batch) > MOST_WORKGROUPS {
                return Err(Unfit);
            }
            let slot = self.slot(&[rows, s.columns, s.depth, s.share].map(|n| n as u32));
            let workgroups = [x, y, s.batch].map(|n| n as u32);
            let starts = [s.depth, s.columns].map(|groups| first * groups * group);
            let (sizes, macs) = (sizes(rows), rows * of_a_row);
            self.commands.push(Command::Product { kernel, slot, workgroups, starts, sizes, macs, weights });
        }
        Ok(())
    }
}

fn wide(kernel: Kernel) -> u32 {
    u32::from(kernel.word != Word::Narrow)
}

pub(super) fn linear(to: &mut Lowered, at: &At, rows: usize, layer: &Linear, ways: &dyn Ways) -> Result<(), Unfit> {
    let bits = at.p.values[at.op.outputs[0]].bits;
    let (inputs, all) = (at.len_in(0) / rows.max(1), layer.bias.len());
    let (kernel, parts) = ways.linear(at.step, rows);
    let depth = inputs.div_ceil(4);
    let bias = to.table(layer.bias.iter().map(|b| *b as u64));
    let [n, width] = [rows, inputs].map(|n| n as u32);
    let params = [n, depth as u32, n, width, 0, width, 1, 0, wide(kernel), 0, 0, at.share(0), 0];
    to.dispatch(Gate::Gather, Operand::Left, rows * depth, &params);
    for (part, outputs) in parts.into_iter().enumerate() {
        let columns = outputs.len().div_ceil(4);
        to.multiply(
            kernel,
            &Shape { batch: 1, rows, columns, depth, share: 1 },
            Some((at.step, part)),
            ways.most_macs(),
        )?;
        let [cols, groups, start, by] = [outputs.len(), columns, outputs.start, all].map(|n| n as u32);
        let y = at.out(0) + start;
        let params = [n, cols, groups, 0, by, 0, wide(kernel), bits, y, at.lead(), bias + 2 * start, 0, 0, 0];
        to.dispatch(Gate::Scatter, Operand::Product, rows * outputs.len(), &params);
    }
    Ok(())
}

pub(super) fn product(to: &mut Lowered, at: &At, g: &HeadProduct, ways: &dyn Ways) -> Result<(), Unfit> {
    let (rows, keys, dim) = (g.grid.rows, g.grid.keys, g.dim);
    let kernel = ways.words(rows, g.k);
    let (head, causal) = (g.grid.len() as u32, causal(&g.grid));
    // Either side's rows among the words of a value: by batch, by row, by input; none grows where rows are whole.
    let (queries, scores) = ([dim, g.heads * dim].map(|n| n as u32), [head, keys as u32]);
    let kv = (g.kv_heads * dim) as u32;
    let (inputs, width, left, left_grows, right, made, made_grows) = match g.side {
        Side::Scores => (dim, keys, queries, 0, [dim as u32, kv, 1], scores, causal),
        Side::Attend => (keys, dim, scores, causal, [dim as u32, 1, kv], queries, 0),
    };
    // The sum of two products is one over the inputs of both.
    let (depth, columns) = ((2 * inputs).div_ceil(4), width.div_ceil(4));
    let [n, d, i, lead, wide] = [rows as u32, depth as u32, inputs as u32, at.lead(), wide(kernel)];
    let params = [n, d, n, i, left[0], left[1], 1, left_grows, wide, 2, lead, at.masked(0), at.mask(0)];
    to.dispatch(Gate::Gather, Operand::Left, g.heads * rows * depth, &params);
    let padded = columns * 4;
    let params =
        [padded as u32, d, width as u32, i, right[0], right[1], right[2], 0, wide, 1, lead, at.masked(1), at.mask(1)];
    to.dispatch(Gate::Gather, Operand::Right, g.kv_heads * padded * depth, &params);
    to.multiply(
        kernel,
        &Shape { batch: g.heads, rows, columns, depth, share: g.heads / g.kv_heads },
        None,
        ways.most_macs(),
    )?;
    let [half, form] = at.half(0);
    let (cols, groups) = (width as u32, columns as u32);
    let params = [n, cols, groups, made[0], made[1], made_grows, wide, g.k, at.out(0), 0, 0, 1, half, form];
    to.dispatch(Gate::Scatter, Operand::Product, g.heads * rows * width, &params);
    Ok(())
}
