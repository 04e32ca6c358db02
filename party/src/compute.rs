//! Where this party computes: on its processor's threads, or on a graphics adapter products and what an evaluator does between two
//! openings.
//!
//! All that a device computes is exact, so that no other party can tell; which one it was shows in the time a session takes, which
//! depends on shapes. A device that fails ends the sessions that used it, before anything more is sent. The next session
//! opens it again; where it was only preferred, and is gone for good, the processor takes over.

use std::sync::Arc;

use tacet_protocol::Error;
use tacet_protocol::backend::{Backend, Cpu};
use tacet_protocol::gemm::Threads;

use crate::PartyError;
use crate::config::BackendKind;

#[cfg(feature = "gpu")]
use {
    crate::lock,
    std::sync::Mutex,
    tacet_protocol::Role,
    tacet_protocol::backend::Evaluation,
    tacet_protocol::gates::product::HeadProduct,
    tacet_protocol::program::{Linear, Program},
    tacet_shaders::{Choice, Gpu, GpuError},
};

/// What a party computes with.
pub struct Compute {
    cpu: Arc<dyn Backend>,
    #[cfg(feature = "gpu")]
    kind: BackendKind,
    #[cfg(feature = "gpu")]
    gpu: Mutex<Option<Arc<Gpu>>>,
}

#[cfg(feature = "gpu")]
impl Compute {
    /// Opens what was asked for, with so many threads of the processor; 0 for all.
    ///
    /// # Errors
    /// `gpu` was asked for, and there is no adapter or it cannot be opened; or the system gives no threads.
    pub fn open(kind: BackendKind, threads: usize) -> Result<Compute, PartyError> {
        let cpu = cpu(threads)?;
        let gpu = match (kind, open(kind, &*cpu)) {
            (_, Ok(gpu)) => gpu,
            (BackendKind::Gpu, Err(e)) => return Err(PartyError::Config(format!("backend = \"gpu\": {e}"))),
            (_, Err(e)) => {
                eprintln!("computing on the processor: {e}");
                None
            }
        };
        Ok(Compute { cpu, kind, gpu: Mutex::new(gpu) })
    }

    /// Its name, for people.
    pub fn name(&self) -> String {
        lock(&self.gpu).as_ref().map_or("cpu".into(), |g| g.adapter().to_string())
    }

    /// Products and whole evaluations that an adapter was given, since it was opened last.
    pub fn on_adapter(&self) -> [u64; 2] {
        lock(&self.gpu).as_ref().map_or([0; 2], |g| [g.products(), g.evaluations()])
    }

    /// What a session computes with.
    ///
    /// # Errors
    /// `gpu` was asked for, and it is gone.
    pub fn backend(&self) -> Result<Arc<dyn Backend>, Error> {
        let mut gpu = lock(&self.gpu);
        if gpu.as_ref().is_some_and(|g| g.lost()) {
            match (self.kind, open(self.kind, &*self.cpu)) {
                (_, Ok(again)) => *gpu = again,
                (BackendKind::Gpu, Err(e)) => return Err(e),
                (_, Err(e)) => {
                    eprintln!("computing on the processor from now on: {e}");
                    *gpu = None;
                }
            }
        }
        Ok(match &*gpu {
            Some(gpu) => Arc::new(Beside { gpu: Arc::clone(gpu), cpu: Arc::clone(&self.cpu) }),
            None => Arc::clone(&self.cpu),
        })
    }
}

/// An adapter beside the processor's threads.
#[cfg(feature = "gpu")]
struct Beside {
    gpu: Arc<Gpu>,
    cpu: Arc<dyn Backend>,
}

#[cfg(feature = "gpu")]
impl Backend for Beside {
    fn linear(&self, layer: &Arc<Linear>, x: &[u64], rows: usize, bits: u32) -> Result<Vec<u64>, Error> {
        self.gpu.linear(layer, x, rows, bits)
    }

    fn product(&self, g: &HeadProduct, pairs: &[(&[u64], &[u64])]) -> Result<Vec<u64>, Error> {
        self.gpu.product(g, pairs)
    }

    fn threads(&self) -> Option<Threads> {
        self.cpu.threads()
    }

    fn evaluation(&self, p: &Program, role: Role) -> Result<Option<Box<dyn Evaluation>>, Error> {
        self.gpu.evaluation(p, role)
    }
}

/// The adapter that a choice stands for; none is as good as any where there was no wish for one.
#[cfg(feature = "gpu")]
fn open(kind: BackendKind, cpu: &dyn Backend) -> Result<Option<Arc<Gpu>>, Error> {
    let choice = match kind {
        BackendKind::Cpu => return Ok(None),
        BackendKind::Auto => Choice::Hardware,
        BackendKind::Gpu => Choice::Any,
    };
    let gpu = match Gpu::open(choice) {
        Err(GpuError::NoAdapter(_)) if kind == BackendKind::Auto => return Ok(None),
        opened => opened?,
    };
    if kind == BackendKind::Auto && !gpu.pays(cpu)? {
        eprintln!("computing on the processor: it is faster than {}", gpu.adapter());
        return Ok(None);
    }
    Ok(Some(Arc::new(gpu)))
}

/// The processor: sessions share the threads, and one alone is that of each session.
fn cpu(threads: usize) -> Result<Arc<dyn Backend>, PartyError> {
    Ok(match threads {
        1 => Arc::new(Cpu),
        n => Arc::new(Threads::new(n)?),
    })
}

#[cfg(not(feature = "gpu"))]
impl Compute {
    /// Opens what was asked for, with so many threads of the processor; 0 for all.
    ///
    /// # Errors
    /// `gpu` was asked for, or the system gives no threads.
    pub fn open(kind: BackendKind, threads: usize) -> Result<Compute, PartyError> {
        match kind {
            BackendKind::Gpu => Err(PartyError::Config(
                "backend = \"gpu\": this build computes on the processor only: build it with the feature gpu".into(),
            )),
            BackendKind::Auto | BackendKind::Cpu => Ok(Compute { cpu: cpu(threads)? }),
        }
    }

    /// Its name, for people.
    pub fn name(&self) -> String {
        "cpu".into()
    }

    /// Products and whole evaluations on an adapter.
    pub fn on_adapter(&self) -> [u64; 2] {
        [0; 2]
    }

    /// What a session computes with.
    pub fn backend(&self) -> Result<Arc<dyn Backend>, Error> {
        Ok(Arc::clone(&self.cpu))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_is_always_there() {
        let compute = Compute::open(BackendKind::Cpu, 2).unwrap();
        assert_eq!(compute.name(), "cpu");
        assert_eq!(compute.backend().unwrap().threads().map(|t| t.count()), Some(2));
        assert!(Compute::open(BackendKind::Cpu, 1).is_ok_and(|c| c.backend().is_ok_and(|b| b.threads().is_none())));
        assert!(Compute::open(BackendKind::Auto, 1).is_ok_and(|c| c.backend().is_ok()));
    }

    #[test]
    fn a_wish_for_an_adapter_is_met_or_refused() {
        match Compute::open(BackendKind::Gpu, 2) {
            Ok(c) => assert!(c.name() != "cpu" && c.backend().is_ok_and(|b| b.threads().is_some())),
            Err(e) => assert!(e.to_string().contains("backend = \"gpu\""), "{e}"),
        }
    }

    #[cfg(feature = "gpu")]
    #[test]
    fn a_lost_device_is_opened_again_for_the_next_session() {
        let Ok(compute) = Compute::open(BackendKind::Gpu, 1) else {
            return println!("skipped: this machine has no graphics adapter, nor lavapipe");
        };
        let held = Arc::clone(lock(&compute.gpu).as_ref().unwrap());
        held.close();
        compute.backend().unwrap();
        let again = Arc::clone(lock(&compute.gpu).as_ref().unwrap());
        assert!(held.lost() && !again.lost());
        // Where it does not come back: a wish is given up, an order is not.
        *lock(&compute.gpu) = Some(held);
        let gone = |kind| Compute { cpu: Arc::new(Cpu), kind, gpu: Mutex::new(lock(&compute.gpu).clone()) };
        let auto = gone(BackendKind::Auto);
        assert!(auto.backend().is_ok());
        assert!(lock(&auto.gpu).as_ref().is_none_or(|g| !g.lost()), "not the lost one");
    }
}
