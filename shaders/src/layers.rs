//! Layers whose weights a device holds, and those that it has no room for.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use tacet_protocol::Error;
use tacet_protocol::program::Linear;

use crate::device::Device;
use crate::error::GpuError;
use crate::linear::{self, Resident};

/// Operands of a product, its result, and the copy of that which is read: what weights leave free, times [`Device::room`].
const SPARE: usize = 4;

/// A layer that was asked for.
struct Known {
    owner: Weak<Linear>,
    /// Bytes of the weights, wherever they are.
    size: usize,
    /// None where the processor computes.
    resident: Option<Resident>,
}

/// All that were asked for, by their digest and shape.
pub(crate) struct Layers {
    known: HashMap<([u8; 32], usize, usize), Known>,
    /// Most bytes of weights: what there were once there was no memory for more.
    pub(crate) most: usize,
}

impl Layers {
    pub(crate) fn new() -> Layers {
        Layers { known: HashMap::new(), most: usize::MAX }
    }

    /// A layer's weights, which are put on the device if they are not there; none where it has no room for them. Clones of
    /// handles.
    ///
    /// # Errors
    /// A layer without weights; those of the device, but for that.
    pub(crate) fn get(&mut self, device: &Device, layer: &Arc<Linear>) -> Result<Option<Resident>, Error> {
        let w = layer.weights()?;
        let name = (layer.digest, w.rows_out(), w.cols_in());
        if let Some(known) = self.known.get(&name) {
            return Ok(known.resident.clone());
        }
        // Those of layers that no program has any more make room.
        self.known.retain(|_, l| l.owner.strong_count() > 0);
        let bytes = linear::bytes(w);
        let size = linear::size(w, bytes);
        let made = match size <= self.most.saturating_sub(self.held()) {
            true => Resident::new(device, w, bytes).map(Some),
            false => Ok(None),
        };
        let resident = match made {
            Err(GpuError::OutOfMemory { .. }) => {
                self.full(SPARE * device.room);
                None
            }
            Err(GpuError::TooLarge { .. }) => None,
            made => made?,
        };
        self.known.insert(name, Known { owner: Arc::downgrade(layer), size, resident: resident.clone() });
        Ok(resident)
    }

    /// There was no memory for more: no other weights go to the device while these are there, and some of them leave what
    /// products need.
    fn full(&mut self, spare: usize) {
        let mut left = spare;
        for known in self.known.values_mut() {
            if left > 0 && known.resident.take().is_some() {
                left = left.saturating_sub(known.size);
            }
        }
        self.most = self.held();
    }

    /// Bytes of weights on the device.
    pub(crate) fn held(&self) -> usize {
        self.known.values().filter(|l| l.resident.is_some()).map(|l| l.size).sum()
    }

    /// What there is no room for, for people; none where there is for all.
    pub(crate) fn missing(&self) -> Option<String> {
        let missing: Vec<usize> = self.known.values().filter(|l| l.resident.is_none()).map(|l| l.size).collect();
        let megabytes = |bytes: usize| bytes as f64 / 1e6;
        (!missing.is_empty()).then(|| {
            format!(
                "the weights of {} of {} layers ({:.1} of {:.1} MB) do not fit",
                missing.len(),
                self.known.len(),
                megabytes(missing.iter().sum()),
                megabytes(self.known.values().map(|l| l.size).sum()),
            )
        })
    }
}

#[cfg(test)]
impl Layers {
    /// The parts of each layer's weights; none of those that the processor computes.
    pub(crate) fn parts(&self) -> Vec<usize> {
        self.known.values().map(|l| l.resident.as_ref().map_or(0, |r| r.parts.len())).collect()
    }
}
