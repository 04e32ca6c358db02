//! Where this party computes: on its processor's threads, or on a graphics adapter products and what an evaluator does between two
//! openings.
//!
//! All that a device computes is exact, so that no other party can tell; which one it was shows in the time a session takes, which
//! depends on shapes and on the device's memory. What it has no room for, the processor computes beside it. A device that fails
//! ends the sessions that used it, before anything more is sent. The next session opens it again; where it was only
//! preferred, and is gone for good or fails often, the processor takes over.

use std::sync::Arc;

use tacet_protocol::Error;
use tacet_protocol::backend::{Backend, Cpu};
use tacet_protocol::gemm::Threads;
use tacet_protocol::program::Program;

use crate::PartyError;
use crate::config::BackendKind;

#[cfg(feature = "gpu")]
use {
    crate::lock,
    std::sync::Mutex,
    std::time::{Duration, Instant},
    tacet_shaders::{Choice, Gpu, GpuError},
};

/// A preferred device that is lost again within this time is not opened once more: every session would fail after some of its
/// time.
#[cfg(feature = "gpu")]
const OFTEN: Duration = Duration::from_secs(3600);

/// What a party computes with.
pub struct Compute {
    cpu: Arc<dyn Backend>,
    #[cfg(feature = "gpu")]
    kind: BackendKind,
    #[cfg(feature = "gpu")]
    gpu: Mutex<Option<Arc<Gpu>>>,
    /// When a device was last found to be lost.
    #[cfg(feature = "gpu")]
    lost: Mutex<Option<Instant>>,
}

#[cfg(feature = "gpu")]
impl Compute {
    /// Opens what was asked for, with so many threads of the processor; 0 for all.
    ///
    /// # Errors
    /// `gpu` was asked for, and there is no adapter or it cannot be opened; or the system gives no threads.
    pub fn open(kind: BackendKind, threads: usize) -> Result<Compute, PartyError> {
        let cpu = cpu(threads)?;
        let gpu = preferred(kind, open(kind, &cpu), "").map_err(ordered)?;
        Ok(Compute { cpu, kind, gpu: Mutex::new(gpu), lost: Mutex::default() })
    }

    /// Gets an adapter ready for a program and others of the same layers, before any session waits for it: their weights go
    /// there.
    ///
    /// # Errors
    /// `gpu` was asked for, and it fails; a program without weights.
    pub fn prepare(&self, p: &Program) -> Result<(), PartyError> {
        let mut gpu = lock(&self.gpu);
        if let Some(held) = gpu.clone() {
            let held = held.hold(p).map(|()| Some(held));
            *gpu = preferred(self.kind, held, "").map_err(ordered)?;
        }
        Ok(())
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
            let before = lock(&self.lost).replace(Instant::now());
            let often = self.kind == BackendKind::Auto && before.is_some_and(|at| at.elapsed() < OFTEN);
            let again = match often {
                true => Err(Error::Device("the adapter was lost twice within an hour".into())),
                false => open(self.kind, &self.cpu),
            };
            *gpu = preferred(self.kind, again, " from now on")?;
        }
        Ok(match &*gpu {
            Some(gpu) => Arc::clone(gpu) as Arc<dyn Backend>,
            None => Arc::clone(&self.cpu),
        })
    }
}

/// An adapter, or the processor in place of one that was only preferred and fails.
#[cfg(feature = "gpu")]
fn preferred(kind: BackendKind, made: Result<Option<Arc<Gpu>>, Error>, since: &str) -> Result<Option<Arc<Gpu>>, Error> {
    match made {
        Err(e) if kind != BackendKind::Gpu => {
            eprintln!("computing on the processor{since}: {e}");
            Ok(None)
        }
        made => made,
    }
}

/// The error of an adapter that was asked for.
#[cfg(feature = "gpu")]
fn ordered(e: Error) -> PartyError {
    PartyError::Config(format!("backend = \"gpu\": {e}"))
}

/// The adapter that a choice stands for, beside the processor; none is as good as any where there was no wish for one.
#[cfg(feature = "gpu")]
fn open(kind: BackendKind, cpu: &Arc<dyn Backend>) -> Result<Option<Arc<Gpu>>, Error> {
    let choice = match kind {
        BackendKind::Cpu => return Ok(None),
        BackendKind::Auto => Choice::Hardware,
        BackendKind::Gpu => Choice::Any,
    };
    let gpu = match Gpu::open(choice) {
        Err(GpuError::NoAdapter(_)) if kind == BackendKind::Auto => return Ok(None),
        opened => opened?,
    };
    if kind == BackendKind::Auto && !gpu.pays(&**cpu)? {
        eprintln!("computing on the processor: it is faster than {}", gpu.adapter());
        return Ok(None);
    }
    Ok(Some(Arc::new(gpu.beside(Arc::clone(cpu), |line| eprintln!("{line}")))))
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

    /// The processor is ready.
    ///
    /// # Errors
    /// None.
    pub fn prepare(&self, _: &Program) -> Result<(), PartyError> {
        Ok(())
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
        let gone = |lost| Compute {
            cpu: Arc::new(Cpu),
            kind: BackendKind::Auto,
            gpu: Mutex::new(lock(&compute.gpu).clone()),
            lost: Mutex::new(lost),
        };
        let auto = gone(None);
        assert!(auto.backend().is_ok());
        assert!(lock(&auto.gpu).as_ref().is_none_or(|g| !g.lost()), "not the lost one");
        // Nor any other, if the one before was lost just now.
        let auto = gone(Some(Instant::now()));
        assert!(auto.backend().is_ok() && lock(&auto.gpu).is_none());
    }

    /// A device that fails when it gets its weights: a wish is given up, an order ends the party.
    #[cfg(feature = "gpu")]
    #[test]
    fn an_adapter_is_prepared_before_any_session() {
        let Ok(compute) = Compute::open(BackendKind::Gpu, 1) else {
            return println!("skipped: this machine has no graphics adapter, nor lavapipe");
        };
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../protocol/tests/vectors/llama");
        let model = tacet_protocol::model::decoder::DecoderModel::load(&dir).unwrap();
        let p = tacet_protocol::plan::DecoderPlanner::new(&model).unwrap().program(true, 0, 8, false).unwrap();
        compute.prepare(&p).unwrap();
        let gpu = Arc::clone(lock(&compute.gpu).as_ref().unwrap());
        gpu.close();
        let e = compute.prepare(&p).unwrap_err().to_string();
        assert!(e.contains("backend = \"gpu\"") && e.contains("was lost"), "{e}");
        let auto = Compute { kind: BackendKind::Auto, gpu: Mutex::new(Some(gpu)), ..compute };
        auto.prepare(&p).unwrap();
        assert_eq!(auto.name(), "cpu");
    }
}
