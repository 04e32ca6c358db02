//! A [`Program`]: the static list of operations that dealer, evaluators, cost model and planner share.
//!
//! It depends on public facts only (the model and the number of tokens). Values are numbered; an operation names the
//! values it reads and the values it makes. Every operation is one step; a step's number labels its randomness.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::Error;
use crate::gates::bits::{And, CountClear};
use crate::gates::broadcast::{Broadcast, Variance};
use crate::gates::cosine::Cosine;
use crate::gates::exp::{Exp, FlagRescale};
use crate::gates::grid::Grid;
use crate::gates::hadamard::Hadamard;
use crate::gates::join::Join;
use crate::gates::local::{Gain, Truncate};
use crate::gates::pad::PadKeys;
use crate::gates::product::HeadProduct;
use crate::gates::reached::Reached;
use crate::gates::rescale::Rescale;
use crate::gates::residual::Residual;
use crate::gates::rotate::Rotate;
use crate::gates::rowmax::RowMax;
use crate::gates::spline::Spline;
use crate::gates::squares::Squares;
use crate::gates::tails::Tails;
use crate::gates::turn::Turn;
use crate::gates::{Dealt, dealt_bytes};
use crate::gemm::Weights;
use crate::ring::packed_len;

/// Index of a value.
pub type Id = usize;

/// A value's static facts.
#[derive(Clone, Debug)]
pub struct Value {
    /// Name for people.
    pub name: String,
    /// Words along each axis, row-major.
    pub shape: Vec<usize>,
    /// Ring Z_2^bits, or 64 for packed XOR bits.
    pub bits: u32,
    /// Packed bits, shared by XOR.
    pub xor: bool,
    /// What one unit is worth; 0 where columns have scales of their own.
    pub ulp: f64,
    /// Proven bound on the magnitude in units, for every text; 0 for bits.
    pub bound: f64,
}

impl Value {
    /// Words.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are no words.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A public linear layer in integers: `rows_out` accumulators and their bias.
#[derive(Serialize, Deserialize)]
pub struct Linear {
    /// Quantised weights; `None` where a role plans without them.
    #[serde(skip)]
    pub weights: Option<Weights>,
    /// Bias in units of each accumulator.
    pub bias: Vec<i64>,
    /// Multiply-accumulates a row.
    pub macs: usize,
    /// Hash of weights and bias, part of the program digest.
    pub digest: [u8; 32],
}

impl Linear {
    /// The weights.
    ///
    /// # Errors
    /// [`Error::Plan`] where they were left out.
    pub fn weights(&self) -> Result<&Weights, Error> {
        let reason = || "planned without weights: plan with them to evaluate".into();
        self.weights.as_ref().ok_or_else(|| Error::Plan { op: "linear layer".into(), reason: reason() })
    }
}

/// What an operation does.
pub enum Kind {
    /// The client's share.
    Input,
    /// Shares to masked values: the one communication step between evaluators.
    Open,
    /// Public linear layer on a share.
    Linear { rows: usize, layer: Arc<Linear> },
    /// See [`Truncate`].
    Truncate(Truncate),
    /// See [`Gain`].
    Gain(Gain),
    /// Sums of each row of scores.
    RowSum(Grid),
    /// The first row of `cols` elements.
    First { cols: usize },
    /// The last row of `cols` elements.
    Last { cols: usize },
    /// The rows of one masked tensor after those of another: both evaluators and the dealer only put words in order.
    Append,
    /// Marks of all positions, a share: those of past ones, then those of `rows` new ones, or 1 where none are given.
    Marks { rows: usize },
    /// See [`Turn`].
    Turn(Turn),
    /// See [`Rotate`].
    Rotate(Rotate),
    /// See [`Hadamard`].
    Hadamard(Hadamard),
    /// See [`Reached`].
    Reached(Reached),
    /// Lowers the scores of padded keys: see [`PadKeys`].
    PadKeys(PadKeys),
    /// See [`Rescale`].
    Rescale(Rescale),
    /// See [`Residual`].
    Residual(Residual),
    /// See [`HeadProduct`].
    Product(HeadProduct),
    /// See [`RowMax`].
    RowMax(RowMax),
    /// See [`And`].
    And(And),
    /// See [`CountClear`].
    CountClear(CountClear),
    /// See [`Exp`].
    Exp(Exp),
    /// See [`FlagRescale`].
    FlagRescale(FlagRescale),
    /// See [`Spline`].
    Spline(Spline),
    /// See [`Variance`].
    Variance(Variance),
    /// See [`Squares`].
    Squares(Squares),
    /// See [`Broadcast`].
    Broadcast(Broadcast),
    /// See [`Cosine`].
    Cosine(Cosine),
    /// See [`Tails`].
    Tails(Tails),
    /// See [`Join`].
    Join(Join),
}

impl Kind {
    /// Name of the operation.
    pub fn name(&self) -> &'static str {
        match self {
            Kind::Input => "input",
            Kind::Open => "open",
            Kind::Linear { .. } => "linear",
            Kind::Truncate(_) => "truncate",
            Kind::Gain(_) => "gain",
            Kind::RowSum(_) => "row-sum",
            Kind::First { .. } => "first",
            Kind::Last { .. } => "last",
            Kind::Append => "append",
            Kind::Marks { .. } => "marks",
            Kind::Turn(_) => "turn",
            Kind::Rotate(_) => "rotate",
            Kind::Hadamard(_) => "hadamard",
            Kind::Reached(_) => "reached",
            Kind::PadKeys(_) => "pad-keys",
            Kind::Rescale(_) => "rescale",
            Kind::Residual(_) => "residual",
            Kind::Product(_) => "product",
            Kind::RowMax(_) => "row-max",
            Kind::And(_) => "and",
            Kind::CountClear(_) => "count",
            Kind::Exp(_) => "exp",
            Kind::FlagRescale(_) => "flag-rescale",
            Kind::Spline(_) => "spline",
            Kind::Variance(_) => "variance",
            Kind::Squares(_) => "squares",
            Kind::Broadcast(_) => "broadcast",
            Kind::Cosine(_) => "cosine-series",
            Kind::Tails(_) => "tails",
            Kind::Join(_) => "join",
        }
    }

    /// How many of the first values read are needed with their masks by halves, see [`crate::gates::Halves`].
    pub(crate) fn by_halves(&self) -> usize {
        match self {
            Kind::Rescale(_) | Kind::FlagRescale(_) | Kind::Rotate(_) => 1,
            Kind::Broadcast(g) => usize::from(g.k_x < g.k),
            Kind::Join(_) | Kind::Residual(_) => 2,
            _ => 0,
        }
    }

    /// Tensors dealt for the operation.
    pub fn dealt(&self) -> Vec<Dealt> {
        match self {
            Kind::Rescale(g) => g.dealt(),
            Kind::Residual(g) => g.dealt(),
            Kind::Product(g) => g.dealt(),
            Kind::RowMax(g) => g.dealt(),
            Kind::And(g) => g.dealt(),
            Kind::CountClear(g) => g.dealt(),
            Kind::Exp(g) => g.dealt(),
            Kind::FlagRescale(g) => g.dealt(),
            Kind::Spline(g) => g.dealt(),
            Kind::Variance(g) => g.dealt(),
            Kind::Squares(g) => g.dealt(),
            Kind::Broadcast(g) => g.dealt(),
            Kind::Cosine(g) => g.dealt(),
            Kind::Tails(g) => g.dealt(),
            Kind::Join(g) => g.dealt(),
            Kind::Turn(g) => g.dealt(),
            Kind::Rotate(g) => g.dealt(),
            Kind::Hadamard(g) => g.dealt(),
            Kind::Reached(g) => g.dealt(),
            Kind::Input
            | Kind::Open
            | Kind::Linear { .. }
            | Kind::Truncate(_)
            | Kind::Gain(_)
            | Kind::RowSum(_)
            | Kind::First { .. }
            | Kind::Last { .. }
            | Kind::Append
            | Kind::Marks { .. }
            | Kind::PadKeys(_) => Vec::new(),
        }
    }
}

/// One operation; its index in the program is its step.
pub struct Op {
    /// What it does.
    pub kind: Kind,
    /// Values read.
    pub inputs: Vec<Id>,
    /// Values made.
    pub outputs: Vec<Id>,
}

/// Exact costs of a program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Cost {
    /// Openings, one after another.
    pub rounds: u32,
    /// Payload bytes of openings, each way.
    pub opened_bytes: u64,
    /// Payload bytes from the dealer to E1 and E2.
    pub dealt_bytes: [u64; 2],
    /// Multiply-accumulates of the public linear layers, per evaluator.
    pub multiplications: u64,
}

/// One line of a plan.
#[derive(Clone, Debug, serde::Serialize)]
pub struct OpLine {
    /// Step.
    pub index: usize,
    /// Operation.
    pub op: &'static str,
    /// Names of the values made.
    pub detail: String,
    /// Shape of the first value made.
    pub shape: Vec<usize>,
    /// Ring of the first value made.
    pub bits: u32,
    /// Its scale: what one unit is worth.
    pub scale: f64,
    /// Its proven bound, in its scale, or in units where it has no single one.
    pub bound: f64,
    /// Rounds.
    pub rounds: u32,
    /// Opened bytes, each way.
    pub opened_bytes: u64,
    /// Dealt bytes, to both.
    pub dealt_bytes: u64,
}

/// What a program's output is to the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A sum over the rows that are not padding.
    Sum,
    /// The first row.
    First,
    /// Logits of one position or more; padding comes before the text.
    Logits,
}

/// A planned model for one number of tokens.
pub struct Program {
    /// Values.
    pub values: Vec<Value>,
    /// Operations in order.
    pub ops: Vec<Op>,
    /// Positions before the program's own, of which a session keeps what is carried.
    pub(crate) past: usize,
    pub(crate) tokens: usize,
    /// The embedded rows; where rows may be padding a bit for each that is not; where the keys of past positions may have to
    /// move, the cosines and sines of that (see [`Turn`]).
    pub(crate) inputs: Vec<Id>,
    pub(crate) output: Id,
    /// Values that the program before this one left, and those that this one leaves, in the same order.
    pub(crate) carried: [Vec<Id>; 2],
    pub(crate) result: Outcome,
    pub(crate) digest: [u8; 32],
}

impl Program {
    /// A program without a model and a state: what tests and benches of a backend compute.
    pub fn of(values: Vec<Value>, ops: Vec<Op>, inputs: Vec<Id>, output: Id) -> Program {
        let (carried, result) = ([Vec::new(), Vec::new()], Outcome::Sum);
        Program { values, ops, past: 0, tokens: 0, inputs, output, carried, result, digest: [0; 32] }.seal(&[0; 32])
    }

    /// Values that a program before this one leaves for it, and those that this one leaves.
    pub fn carried(&self) -> &[Vec<Id>; 2] {
        &self.carried
    }

    /// The last step that reads or makes each value; what is left for a program after this one is read past every step.
    pub fn last_use(&self) -> Vec<usize> {
        let mut last = vec![0; self.values.len()];
        for (i, op) in self.ops.iter().enumerate() {
            op.inputs.iter().chain(&op.outputs).for_each(|v| last[*v] = i);
        }
        self.carried[1].iter().for_each(|v| last[*v] = usize::MAX);
        last
    }

    /// Positions before those of this program.
    pub fn past(&self) -> usize {
        self.past
    }

    /// Rows: a text's padded length, or the new positions of a sequence.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Digest over operations, parameters and quantised weights.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    pub(crate) fn seal(mut self, model: &[u8; 32]) -> Self {
        let mut h = Sha256::new();
        h.update(b"tacet program 1");
        h.update(model);
        h.update((self.tokens as u64).to_le_bytes());
        for op in &self.ops {
            // The Debug form of a gate spells out every parameter, floats to the last bit.
            let text = match &op.kind {
                Kind::Rescale(g) => format!("{g:?}"),
                Kind::Residual(g) => format!("{g:?}"),
                Kind::Product(g) => format!("{g:?}"),
                Kind::RowMax(g) => format!("{g:?}"),
                Kind::And(g) => format!("{g:?}"),
                Kind::CountClear(g) => format!("{g:?}"),
                Kind::Exp(g) => format!("{g:?}"),
                Kind::FlagRescale(g) => format!("{g:?}"),
                Kind::Spline(g) => format!("{g:?}"),
                Kind::Variance(g) => format!("{g:?}"),
                Kind::Squares(g) => format!("{g:?}"),
                Kind::Broadcast(g) => format!("{g:?}"),
                Kind::Cosine(g) => {
                    // Millions of floats, spelled out in a tenth of the time as they are.
                    for series in &g.columns.coef {
                        h.update((series.len() as u64).to_le_bytes());
                        let bits: Vec<u8> = series.iter().flat_map(|a| a.to_bits().to_le_bytes()).collect();
                        h.update(bits);
                    }
                    let Cosine { rows, columns, period, f_out, k_out } = g;
                    format!("cosine series {rows} {:?} {period} {f_out} {k_out}", columns.turns)
                }
                Kind::Tails(g) => format!("{g:?}"),
                Kind::Join(g) => format!("{g:?}"),
                Kind::PadKeys(g) => format!("{g:?}"),
                Kind::Truncate(g) => format!("{g:?}"),
                Kind::Gain(g) => format!("{g:?}"),
                Kind::Turn(g) => format!("{g:?}"),
                Kind::Rotate(g) => format!("{g:?}"),
                Kind::Hadamard(g) => format!("{g:?}"),
                Kind::Reached(g) => format!("{g:?}"),
                Kind::Linear { rows, layer } => format!("linear {rows} {:?}", layer.digest),
                Kind::RowSum(g) => format!("row-sum {g:?}"),
                Kind::Marks { rows } => format!("marks {rows}"),
                Kind::First { cols } => format!("first {cols}"),
                Kind::Last { cols } => format!("last {cols}"),
                Kind::Input | Kind::Open | Kind::Append => op.kind.name().to_string(),
            };
            let line = format!("{text} {:?} {:?}", op.inputs, op.outputs);
            h.update((line.len() as u64).to_le_bytes());
            h.update(line);
        }
        for v in &self.values {
            h.update(format!("{:?} {} {}", v.shape, v.bits, v.xor));
        }
        h.update(format!("{:?} {:?} {}", self.inputs, self.carried, self.output));
        self.digest = h.finalize().into();
        self
    }

    /// Payload bytes of an opening's message, each way.
    pub fn opening_len(&self, op: &Op) -> usize {
        op.inputs.iter().map(|v| packed_len(self.values[*v].len(), self.values[*v].bits)).sum()
    }

    /// Payload bytes the dealer sends to E1 and E2 for a step.
    pub fn dealt_len(&self, step: usize) -> [u64; 2] {
        dealt_bytes(step as u32, &self.ops[step].kind.dealt())
    }

    /// Exact costs.
    pub fn cost(&self) -> Cost {
        let mut c = Cost::default();
        for (i, op) in self.ops.iter().enumerate() {
            let d = self.dealt_len(i);
            c.dealt_bytes[0] += d[0];
            c.dealt_bytes[1] += d[1];
            match &op.kind {
                Kind::Open => {
                    c.rounds += 1;
                    c.opened_bytes += self.opening_len(op) as u64;
                }
                Kind::Linear { rows, layer } => c.multiplications += (rows * layer.macs) as u64,
                _ => {}
            }
        }
        c
    }

    /// One line per operation.
    pub fn describe(&self) -> Vec<OpLine> {
        let line = |(index, op): (usize, &Op)| {
            let v = &self.values[op.outputs[0]];
            let open = matches!(op.kind, Kind::Open);
            OpLine {
                index,
                op: op.kind.name(),
                detail: op.outputs.iter().map(|o| self.values[*o].name.as_str()).collect::<Vec<_>>().join(" + "),
                shape: v.shape.clone(),
                bits: v.bits,
                scale: v.ulp,
                bound: if v.ulp > 0.0 { v.bound * v.ulp } else { v.bound },
                rounds: u32::from(open),
                opened_bytes: if open { self.opening_len(op) as u64 } else { 0 },
                dealt_bytes: self.dealt_len(index).iter().sum(),
            }
        };
        self.ops.iter().enumerate().map(line).collect()
    }

    /// The client's inputs.
    pub fn inputs(&self) -> impl Iterator<Item = Id> + '_ {
        self.inputs.iter().copied()
    }

    /// The result.
    pub fn output(&self) -> Id {
        self.output
    }

    /// Ring of the result.
    pub fn output_bits(&self) -> u32 {
        self.values[self.output].bits
    }

    /// Words of the result.
    pub fn output_len(&self) -> usize {
        self.values[self.output].len()
    }
}
