//! The GPU backend of the interpreters, over wgpu: Vulkan, Metal or DX12.
//!
//! [`Gpu`] is a [`Backend`]: shares times public weights (resident on the device, a byte or two each), and shares times
//! shares, in Z_2^bits, and whole [evaluations](tacet_protocol::backend::Evaluation), whose values stay on the device from one
//! opening to the next, but for reciprocals and inverse roots of rows (splines): the processor computes those from what was
//! opened and feeds the device its shares of them. All is equal to the processor's bit for bit. The kernels are the files of `wgsl/`, those of gates in
//! `wgsl/gates/`. Products in rings up to 32 bits are computed in u32; all else in u64 where the adapter has them and in pairs
//! of u32 where not; products of bytes (`dot4I8Packed`) replace those of words where they are faster, and subgroups add where
//! there are some. An adapter needs nothing of all that, and only what WebGPU promises on old hardware. Operands of single
//! products that exceed its bindings go in parts; an evaluation that does is left to the processor, but for its products.
//! What the device has no memory for is computed by the processor: products of layers whose weights do not fit, and the
//! gates of programs with such layers.
//!
//! **Who sees what.** Nothing new to anyone. The device belongs to the party and holds what the party's memory holds: an
//! evaluator's shares, masked values, halves of masks and of what is dealt, a dealer's masks, each while one product is
//! computed or one evaluation lasts, and public weights for as long as the party runs. Nothing is shared between sessions:
//! buffers that held words are zero again before the next product, or destroyed. Jobs, their sizes and their number depend on
//! shapes only. Memory that wgpu or the driver may copy buffers to is beyond that, and so is who else may use the device: an
//! operator gives it to nobody else.
#![forbid(unsafe_code)]

mod adapter;
mod device;
mod error;
mod evaluation;
mod kernel;
mod layers;
mod linear;
mod product;
mod rates;
mod told;
mod words;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};

use tacet_protocol::backend::{Backend, Cpu, Evaluation};
use tacet_protocol::gates::product::HeadProduct;
use tacet_protocol::gemm::Threads;
use tacet_protocol::program::{Kind, Linear, Program};
use tacet_protocol::{Error, Role, lock};

pub use adapter::{Adapter, Choice, adapters};
pub use error::GpuError;
pub use rates::Rate;

use device::{Device, Health};
use evaluation::Layouts;
use layers::Layers;
use linear::Resident;
use told::{About, Told};

/// Multiply-accumulates of a job: well within what drivers let a device work at a time.
const MOST_MACS: usize = 1 << 31;

/// Workgroups along an axis that every adapter takes.
const MOST_WORKGROUPS: usize = 65_535;

/// Multiply-accumulates below which a processor is done before a device has answered: some hundred microseconds.
const SMALL: usize = 1 << 21;

/// Rows below which a program that goes on where another ended is not evaluated on a device: what the session keeps would
/// travel there and back for a few rows.
const FEW: usize = 8;

/// An open device, which does one thing at a time.
pub struct Gpu {
    about: Adapter,
    small: usize,
    health: Health,
    products: AtomicU64,
    evaluations: AtomicU64,
    /// Whether gates are computed here too.
    gates: AtomicBool,
    /// Computes what has no room here.
    processor: Arc<dyn Backend>,
    state: Arc<Mutex<State>>,
}

struct State {
    device: Device,
    layers: Layers,
    layouts: Layouts,
    told: Told,
}

impl State {
    /// The weights of a program's layers by their step, which are put on the device where they are not; none where not all
    /// have room.
    fn weights(&mut self, p: &Program) -> Result<Option<HashMap<usize, Resident>>, Error> {
        let mut all = Some(HashMap::new());
        for (step, op) in p.ops.iter().enumerate() {
            let Kind::Linear { layer, .. } = &op.kind else { continue };
            match (self.layers.get(&self.device, layer)?, &mut all) {
                (Some(resident), Some(all)) => _ = all.insert(step, resident),
                _ => all = None,
            }
        }
        self.tell_missing();
        Ok(all)
    }

    fn tell_missing(&mut self) {
        if let Some(what) = self.layers.missing() {
            let adapter = &self.device.about;
            let line =
                || format!("{what} {adapter}: the processor computes them, and gates of programs that have them");
            self.told.once(About::Weights, line);
        }
    }

    /// What the device made of a product; none where it has no room for it.
    fn product<T>(&mut self, made: Result<T, GpuError>) -> Result<Option<T>, Error> {
        match made {
            Err(e @ (GpuError::OutOfMemory { .. } | GpuError::TooLarge { .. })) => {
                self.told.once(About::Products, || format!("the processor computes products without room: {e}"));
                Ok(None)
            }
            made => Ok(Some(made?)),
        }
    }
}

impl Gpu {
    /// Opens the best adapter of those that will do.
    ///
    /// # Errors
    /// None that will do, or one that cannot be opened.
    pub fn open(choice: Choice) -> Result<Gpu, GpuError> {
        let mut device = Device::open(&adapter::choose(choice)?)?;
        if device.about.hardware {
            device.prefer(rates::MIDDLING)?;
        }
        let about = device.about.clone();
        let (health, gates) = (device.health(), AtomicBool::new(true));
        let (products, evaluations) = <(AtomicU64, AtomicU64)>::default();
        let told = Told::new(|_| ());
        let state = State { device, layers: Layers::new(), layouts: Layouts::default(), told };
        let (processor, state) = (Arc::new(Cpu), Arc::new(Mutex::new(state)));
        Ok(Gpu { about, small: SMALL, health, products, evaluations, gates, processor, state })
    }

    /// The same device beside a processor, which computes what has no room on it and lends its threads. The first time that
    /// something is left to the processor for want of room, or for a driver that refuses it, `told` is given a line that
    /// says so.
    pub fn beside(self, processor: Arc<dyn Backend>, told: impl Fn(&str) + Send + Sync + 'static) -> Gpu {
        self.state().told = Told::new(told);
        Gpu { processor, ..self }
    }

    /// The same device for every product: small ones, too, which a processor computes in less time.
    pub fn for_all(self) -> Gpu {
        Gpu { small: 0, ..self }
    }

    /// The adapter.
    pub fn adapter(&self) -> &Adapter {
        &self.about
    }

    /// Whether the device is gone; then every product fails.
    pub fn lost(&self) -> bool {
        self.health.lost()
    }

    /// Products that it was given so far.
    pub fn products(&self) -> u64 {
        self.products.load(Relaxed)
    }

    /// Evaluations that it was given so far.
    pub fn evaluations(&self) -> u64 {
        self.evaluations.load(Relaxed)
    }

    /// Puts the weights of a program's layers on the device, so that no session waits for that; those without room are left
    /// to the processor.
    ///
    /// # Errors
    /// A program without weights; those of the device, which come late.
    pub fn hold(&self, p: &Program) -> Result<(), Error> {
        let state = &mut *self.state();
        state.weights(p)?;
        Ok(state.device.map(&[])?)
    }

    /// Gives the device up: products fail from now on, as after a driver's reset.
    pub fn close(&self) {
        self.state().device.close();
    }

    /// A product that the device made, or else the processor.
    fn made(
        &self,
        made: Option<Vec<u64>>,
        processor: impl FnOnce() -> Result<Vec<u64>, Error>,
    ) -> Result<Vec<u64>, Error> {
        self.products.fetch_add(u64::from(made.is_some()), Relaxed);
        made.map_or_else(processor, Ok)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl Backend for Gpu {
    fn linear(&self, layer: &Arc<Linear>, x: &[u64], rows: usize, bits: u32) -> Result<Vec<u64>, Error> {
        let w = layer.weights()?;
        let macs = rows * w.cols_in() * w.rows_out();
        if macs == 0 || macs < self.small {
            return Cpu.linear(layer, x, rows, bits);
        }
        let made = {
            let state = &mut *self.state();
            match state.layers.get(&state.device, layer)? {
                Some(weights) => {
                    let made = weights.apply(&mut state.device, w, x, rows, bits);
                    state.product(made)?
                }
                None => {
                    state.tell_missing();
                    None
                }
            }
        };
        self.made(made, || self.processor.linear(layer, x, rows, bits))
    }

    fn product(&self, g: &HeadProduct, pairs: &[(&[u64], &[u64])]) -> Result<Vec<u64>, Error> {
        let macs = product::macs(g, pairs.len());
        if macs == 0 || macs < self.small {
            return Cpu.product(g, pairs);
        }
        let made = {
            let state = &mut *self.state();
            let made = product::product(&mut state.device, g, pairs);
            state.product(made)?
        };
        self.made(made, || self.processor.product(g, pairs))
    }

    fn threads(&self) -> Option<Threads> {
        self.processor.threads()
    }

    fn evaluation(&self, p: &Program, role: Role) -> Result<Option<Box<dyn Evaluation>>, Error> {
        let count = |wanted: fn(&Kind) -> bool| p.ops.iter().filter(|op| wanted(&op.kind)).count();
        let layers = count(|kind| matches!(kind, Kind::Linear { .. }));
        let few = p.past() > 0 && p.tokens() < FEW;
        if few || !self.gates.load(Relaxed) || (p.cost().multiplications as usize) < self.small * layers {
            return Ok(None);
        }
        let Some(new) = evaluation::open(&self.state, p, role)? else { return Ok(None) };
        let products = layers + count(|kind| matches!(kind, Kind::Product(_)));
        self.products.fetch_add(products as u64, Relaxed);
        self.evaluations.fetch_add(1, Relaxed);
        Ok(Some(Box::new(new)))
    }
}

#[cfg(test)]
mod tests;
