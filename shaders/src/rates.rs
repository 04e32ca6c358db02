//! How fast the kernels are on this device.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use tacet_protocol::backend::Backend;
use tacet_protocol::gates::rescale::Rescale;
use tacet_protocol::gemm::Weights;
use tacet_protocol::prg::{Prg, SessionKey};
use tacet_protocol::program::{Kind, Linear, Op, Program, Value};
use tacet_protocol::{Error, EvaluatorIo, Role, run};

use crate::device::{Device, Job, Right};
use crate::error::GpuError;
use crate::kernel::{By, Kernel, Layout, Word};
use crate::{Gpu, MOST_MACS};

/// One kernel's rate on one shape.
#[derive(Clone, Debug)]
pub struct Rate {
    /// Words, what they are multiplied by, and how threads share the work.
    pub kernel: String,
    /// Rows, inputs and columns.
    pub shape: [usize; 3],
    /// 10^9 multiply-accumulates a second, without transfers.
    pub gmacs: f64,
}

/// Rows, groups of inputs, groups of columns.
pub(crate) type Shape = [usize; 3];

/// A layer of middling size.
pub(crate) const MIDDLING: Shape = [64, 256, 256];

/// Seconds of one product without transfers: what another dispatch of it adds.
fn seconds(device: &mut Device, kernel: Kernel, [rows, depth, columns]: Shape) -> Result<f64, GpuError> {
    let left = vec![0x5a; rows * depth * kernel.word.group()];
    let right = match kernel.by {
        By::Words => vec![0x5a; columns * 4 * depth * kernel.word.group()],
        By::Weights { bytes } | By::Dots { bytes } => vec![0x5a; columns * 4 * depth * 4 * usize::from(bytes)],
    };
    let resident = device.resident(&right)?;
    let mut best = |times| -> Result<f64, GpuError> {
        let right = Right::Resident(&resident);
        let job = Job { kernel, batch: 1, rows, columns, depth, share: 1, left: &left, right, times };
        let mut best = f64::INFINITY;
        for _ in 0..3 {
            let start = Instant::now();
            device.run(&job, |_| ())?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        Ok(best)
    };
    // Compiles it.
    best(1)?;
    let more = if MOST_MACS / (rows * depth * columns * 16) >= 8 { 8 } else { 2 };
    let (one, all) = (best(1)?, best(1 + more)?);
    Ok((all - one).max(1e-9) / more as f64)
}

impl Device {
    /// Measures which kernels are the faster ones: whether an adapter has instructions for dot products is not told.
    pub(crate) fn prefer(&mut self, shape: Shape) -> Result<(), GpuError> {
        let words = [(Word::Narrow, Word::Narrow), (self.wide(), Word::Pair)];
        for (wide, (whole, bytes)) in words.into_iter().enumerate() {
            let mut time = |word, by| seconds(self, Kernel { word, by, layout: Layout::Tiles }, shape);
            self.dots[wide] = time(bytes, By::Dots { bytes: 1 })? < time(whole, By::Weights { bytes: 1 })?;
        }
        Ok(())
    }

    fn can(&self, kernel: Kernel) -> bool {
        (self.about.int64 || kernel.word != Word::Native)
            && (self.about.subgroups || kernel.layout != Layout::RowsBySubgroups)
    }
}

/// A program of gates of middling size: rescaled columns, opened before and after.
fn gates() -> Program {
    let (rows, cols) = (128, 1536);
    let (mult, shift, k_in, k_out) = (vec![123_456_789; cols], 29, 30, 32);
    let kind = Kind::Rescale(Rescale {
        rows,
        stride: cols,
        first: 0,
        mult: Arc::new(mult),
        shift,
        k_in,
        k_out,
        bias: Vec::new(),
    });
    let value = |bits| Value { name: String::new(), shape: vec![rows, cols], bits, xor: false, ulp: 1.0, bound: 0.0 };
    let op =
        |kind, inputs: &[usize], outputs: &[usize]| Op { kind, inputs: inputs.to_vec(), outputs: outputs.to_vec() };
    let ops = vec![
        op(Kind::Input, &[], &[0]),
        op(Kind::Open, &[0], &[1]),
        op(kind, &[1], &[2]),
        op(Kind::Open, &[2], &[3]),
        op(Kind::Last { cols: 1 }, &[0], &[4]),
    ];
    let last = Value { shape: vec![1], ..value(k_in) };
    Program::of(vec![value(k_in), value(k_in), value(k_out), value(k_out), last], ops, vec![0], 4)
}

/// Another evaluator and a dealer that send zeros.
struct Zeros<'a>(&'a dyn Backend);

impl EvaluatorIo for Zeros<'_> {
    fn dealt(&mut self, _: u32, len: usize) -> Result<Vec<u8>, Error> {
        Ok(vec![0; len])
    }

    fn exchange(&mut self, _: u32, out: Vec<u8>) -> Result<Vec<u8>, Error> {
        Ok(vec![0; out.len()])
    }

    fn backend(&self) -> &dyn Backend {
        self.0
    }
}

/// Seconds of an evaluation.
fn evaluation(p: &Program, backend: &dyn Backend) -> Result<f64, Error> {
    let input = p.inputs().map(|v| vec![1; p.values[v].len()]).collect();
    let prg = Prg::new(&SessionKey::from_seed([0; 32]));
    let start = Instant::now();
    run::evaluate(p, Role::E1, prg, input, &mut Zeros(backend))?;
    Ok(start.elapsed().as_secs_f64())
}

impl Gpu {
    /// Measures whether a layer of middling size takes less time here, with transfers, than on this processor; and if so,
    /// whether gates do, which are left to the processor from then on if they do not.
    ///
    /// # Errors
    /// Those of the device, and of the processor.
    pub fn pays(&self, processor: &dyn Backend) -> Result<bool, Error> {
        let (rows, width) = (128, 768);
        let ints: Vec<i16> = (0..width * width).map(|i| (i * 7919 % 4096) as i16 - 2048).collect();
        let layer = Arc::new(Linear {
            weights: Some(Weights::new(width, width, &ints)),
            bias: vec![0; width],
            macs: width * width,
            digest: [0; 32],
        });
        let x = vec![0x1234_5678; rows * width];
        let seconds = |backend: &dyn Backend| -> Result<f64, Error> {
            let start = Instant::now();
            backend.linear(&layer, &x, rows, 32)?;
            Ok(start.elapsed().as_secs_f64())
        };
        // The first one compiles.
        let (mut here, mut there) = (f64::INFINITY, f64::INFINITY);
        for _ in 0..4 {
            here = here.min(seconds(self)?);
            there = there.min(seconds(processor)?);
        }
        if here < there {
            let pay = self.gates_pay(processor)?;
            self.gates.store(pay, Relaxed);
        }
        Ok(here < there)
    }

    /// The same of gates.
    pub(crate) fn gates_pay(&self, processor: &dyn Backend) -> Result<bool, Error> {
        let p = gates();
        let (mut here, mut there) = (f64::INFINITY, f64::INFINITY);
        for _ in 0..4 {
            here = here.min(evaluation(&p, self)?);
            there = there.min(evaluation(&p, processor)?);
        }
        Ok(here < there)
    }

    /// Measures every kernel that the device can run. Software adapters get less to do.
    ///
    /// # Errors
    /// Those of the device.
    pub fn rates(&self) -> Result<Vec<Rate>, GpuError> {
        let device = &mut self.state().device;
        let mut rates = Vec::new();
        for kernel in Kernel::all().filter(|k| device.can(*k)).collect::<Vec<_>>() {
            let rows = if kernel.layout == Layout::Tiles { 128 } else { 1 };
            let inner = match (device.about.hardware, kernel.by) {
                (true, By::Words) => 128,
                (true, _) => 1024,
                (false, _) => 64,
            };
            let shape @ [_, depth, columns] = [rows, inner, inner];
            let macs = (rows * depth * columns * 16) as f64;
            let gmacs = macs / seconds(device, kernel, shape)? / 1e9;
            rates.push(Rate { kernel: kernel.to_string(), shape: [rows, depth * 4, columns * 4], gmacs });
        }
        Ok(rates)
    }
}
