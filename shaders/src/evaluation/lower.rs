//! What kernels an operation is, and with which parameters.

mod bits;
mod functions;
mod linear;
mod positions;
mod residual;
mod rows;
mod series;
mod words;

use tacet_protocol::gates::grid::Grid;
use tacet_protocol::program::{Kind, Op, Program};
use tacet_protocol::run::Source;

use super::gate::{Gate, SLOT, THREADS};
use crate::MOST_WORKGROUPS;
use crate::kernel::Kernel;

/// The operand that a kernel of a gate reads or writes beside the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Operand {
    Left,
    Right,
    Product,
}

/// One dispatch.
pub(super) enum Command {
    /// A gate's kernel, with the parameters of a slot.
    Gate { gate: Gate, slot: usize, workgroups: [u32; 2], operand: Operand },
    /// A matrix product of the operands, from the given bytes of the left one and of the result on, with its shape in a slot; of
    /// weights where they are given, by their layer's step and part.
    Product {
        kernel: Kernel,
        slot: usize,
        workgroups: [u32; 3],
        starts: [usize; 2],
        sizes: [usize; 3],
        macs: usize,
        weights: Option<(usize, usize)>,
    },
}

/// Places of a value's words in the arena.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Places {
    pub share: Option<usize>,
    pub masked: Option<usize>,
    pub mask: Option<usize>,
}

/// Of a program that is left to the processor: something has no kernel, or no room.
#[derive(Debug)]
pub(super) struct Unfit;

/// What is made of a program's operations.
#[derive(Default)]
pub(super) struct Lowered {
    pub commands: Vec<Command>,
    /// Parameters, [`SLOT`] bytes for each kernel.
    pub params: Vec<u32>,
    /// Public words.
    pub tables: Vec<u32>,
    /// Most bytes of each operand.
    pub operands: [usize; 3],
    /// Where the table of angles is, if it is there.
    angles: Option<u32>,
}

impl Lowered {
    fn slot(&mut self, params: &[u32]) -> usize {
        let slot = self.params.len() * 4 / SLOT;
        assert!(params.len() * 4 <= SLOT, "parameters fit their place");
        self.params.extend_from_slice(params);
        self.params.resize((slot + 1) * SLOT / 4, 0);
        slot
    }

    fn dispatch(&mut self, gate: Gate, operand: Operand, n: usize, params: &[u32]) {
        if n == 0 {
            return;
        }
        let groups = if gate.by_rows() { n } else { n.div_ceil(THREADS) };
        let x = groups.min(MOST_WORKGROUPS);
        let workgroups = [x as u32, groups.div_ceil(x) as u32];
        let slot = self.slot(&[&[n as u32], params].concat());
        self.commands.push(Command::Gate { gate, slot, workgroups, operand });
    }

    /// A gate's kernel, for `n` words or rows, which is its first parameter.
    pub fn gate(&mut self, gate: Gate, n: usize, params: &[u32]) {
        self.dispatch(gate, Operand::Left, n, params);
    }

    /// Puts ring words among the public tables; returns where they start.
    pub fn table(&mut self, words: impl IntoIterator<Item = u64>) -> u32 {
        let at = self.tables.len() as u32;
        self.tables.extend(words.into_iter().flat_map(|w| [w as u32, (w >> 32) as u32]));
        at
    }

    /// The same of half words.
    pub fn table32(&mut self, words: impl IntoIterator<Item = u32>) -> u32 {
        let at = self.tables.len() as u32;
        self.tables.extend(words);
        at
    }
}

/// Where a half lies: its first u32 among what is fed, and its form.
pub(super) fn half(s: Source) -> [u32; 2] {
    [s.at as u32 / 4, s.stride | s.bits << 8]
}

/// Keys that the first row reads where each row reads one more than the one before; none where all read the same.
pub(super) fn causal(grid: &Grid) -> u32 {
    if grid.causal { grid.row_len(0) as u32 } else { 0 }
}

/// What an operation reads and makes.
pub(super) struct At<'a> {
    pub p: &'a Program,
    pub op: &'a Op,
    pub step: usize,
    pub inputs: Vec<Places>,
    pub outputs: Vec<Places>,
    /// Halves of what is dealt.
    pub dealt: Vec<Source>,
    pub leads: bool,
}

impl At<'_> {
    /// The share of the n-th value read.
    pub fn share(&self, n: usize) -> u32 {
        self.inputs[n].share.unwrap_or_default() as u32
    }

    /// Masked words of the n-th value read.
    pub fn masked(&self, n: usize) -> u32 {
        self.inputs[n].masked.unwrap_or_default() as u32
    }

    /// The own half of the mask of the n-th value read.
    pub fn mask(&self, n: usize) -> u32 {
        self.inputs[n].mask.unwrap_or_default() as u32
    }

    /// The share of the n-th value made.
    pub fn out(&self, n: usize) -> u32 {
        self.outputs[n].share.unwrap_or_default() as u32
    }

    /// The n-th half of what is dealt.
    pub fn half(&self, n: usize) -> [u32; 2] {
        half(self.dealt[n])
    }

    /// Words of the n-th value read.
    pub fn len_in(&self, n: usize) -> usize {
        self.p.values[self.op.inputs[n]].len()
    }

    /// One where this evaluator leads.
    pub fn lead(&self) -> u32 {
        u32::from(self.leads)
    }
}

/// What a device is, as far as it decides on kernels.
pub(super) trait Ways {
    /// The kernel, and the outputs of each part of the weights, of a linear layer.
    fn linear(&self, step: usize, rows: usize) -> (Kernel, Vec<std::ops::Range<usize>>);
    /// Most multiply-accumulates of a dispatch.
    fn most_macs(&self) -> usize;
    /// The kernel of products of words.
    fn words(&self, rows: usize, bits: u32) -> Kernel;
}

/// Adds an operation that neither opens nor is an input.
pub(super) fn lower(to: &mut Lowered, at: &At, ways: &dyn Ways) -> Result<(), Unfit> {
    match &at.op.kind {
        Kind::Linear { rows, layer } => linear::linear(to, at, *rows, layer, ways)?,
        Kind::Product(g) => linear::product(to, at, g, ways)?,
        Kind::Truncate(g) => words::truncate(to, at, g),
        Kind::Rescale(g) => words::rescale(to, at, g),
        Kind::Exp(g) => series::exp(to, at, g)?,
        Kind::Cosine(g) => series::cosine(to, at, g),
        Kind::Gain(g) => rows::gain(to, at, g),
        Kind::RowSum(grid) => rows::row_sum(to, at, grid),
        Kind::First { cols } => rows::slice(to, at, 0, *cols),
        Kind::Last { cols } => rows::slice(to, at, at.len_in(0) - cols, *cols),
        Kind::Marks { rows } => rows::marks(to, at, *rows),
        Kind::PadKeys(g) => rows::pad_keys(to, at, g),
        Kind::Broadcast(g) => rows::broadcast(to, at, g),
        Kind::Variance(g) => rows::variance(to, at, g),
        Kind::Squares(g) => rows::squares(to, at, g),
        Kind::Residual(g) => residual::residual(to, at, g),
        Kind::Join(g) => functions::join(to, at, g),
        Kind::Tails(g) => functions::tails(to, at, g),
        Kind::Spline(g) => functions::spline(to, at, g),
        Kind::RowMax(g) => bits::row_max(to, at, g)?,
        Kind::And(g) => bits::and(to, at, g),
        Kind::CountClear(g) => bits::count_clear(to, at, g)?,
        Kind::FlagRescale(g) => bits::flag_rescale(to, at, g),
        Kind::Reached(g) => positions::reached(to, at, g),
        Kind::Turn(g) => positions::turn(to, at, g)?,
        Kind::Rotate(g) => positions::rotate(to, at, g)?,
        Kind::Hadamard(g) => positions::hadamard(to, at, g),
        // Those are the compiler's own.
        Kind::Input | Kind::Open | Kind::Append => {}
    }
    Ok(())
}
