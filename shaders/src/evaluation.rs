//! Evaluations on a device: an evaluator's values stay there from one opening to the next.
//!
//! A program is laid out once: every value has a place in an arena of ring words, every operation is a few dispatches, and
//! the parameters of all are on the device before the first. Between two openings the processor draws this evaluator's halves
//! of masks and of what is dealt, which with what was received go to the device in one piece; what comes back is the message
//! of the next opening. Programs of which something has no kernel here (heads of few scores or of very many levels, rotations of
//! a part of a head) or exceeds the bounds below, and those of which the driver refuses a kernel, are computed as on a processor,
//! with products on the device.

mod arena;
mod compile;
mod gate;
mod lower;
mod on_device;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use tacet_protocol::program::Program;
use tacet_protocol::{Error, Role, lock};
use wgpu::BufferUsages;

use crate::State;
use crate::device::{Device, buffer};
use crate::error::GpuError;
use crate::kernel::{By, Kernel, Word};
use crate::told::About;
use compile::Compiled;
pub(crate) use gate::Gates;
use gate::SLOT;
use lower::Ways;
pub(crate) use on_device::OnDevice;

/// Most bytes of an evaluation's arena, and of what it is fed at a time: places in it are 32-bit numbers of bits.
const MOST: usize = 1 << 28;

/// Most bytes that the buffers of all evaluations have at a time.
const ALL: usize = 1 << 30;

/// Bytes of a ring word.
const WORD: usize = 8;

/// Programs whose layout is remembered.
const REMEMBERED: usize = 16;

/// What is known between evaluations.
#[derive(Default)]
pub(crate) struct Layouts {
    /// By a program's digest, and whether the evaluator leads; none where the processor evaluates.
    known: HashMap<([u8; 32], bool), Option<Arc<Layout>>>,
    /// Whether the driver has refused what an evaluation takes: it would again.
    refused: bool,
    /// Bytes of the buffers that there are.
    held: usize,
}

/// A program laid out, with its public words on the device.
struct Layout {
    compiled: Compiled,
    params: wgpu::Buffer,
    tables: wgpu::Buffer,
}

/// The way of a layer's products in its ring, and the outputs of each part of its weights.
struct Layer {
    word: Word,
    by: By,
    parts: Vec<Range<usize>>,
}

/// What the device's weights and preferences decide, of layers by their step.
struct Choice<'a> {
    device: &'a Device,
    layers: HashMap<usize, Layer>,
}

impl Ways for Choice<'_> {
    fn linear(&self, step: usize, rows: usize) -> (Kernel, Vec<Range<usize>>) {
        let Layer { word, by, parts } = &self.layers[&step];
        (Kernel { word: *word, by: *by, layout: self.device.layout(rows) }, parts.clone())
    }

    fn most_macs(&self) -> usize {
        self.device.most_macs
    }

    fn words(&self, rows: usize, bits: u32) -> Kernel {
        let word = if bits <= 32 { Word::Narrow } else { self.device.wide() };
        Kernel { word, by: By::Words, layout: self.device.layout(rows) }
    }
}

/// Lays a program out for a device, which gets its weights; none where something, weights among it, has no kernel or no room,
/// or the driver refuses it. Nothing has been computed then.
pub(crate) fn open(state: &Arc<Mutex<State>>, p: &Program, role: Role) -> Result<Option<OnDevice>, Error> {
    let mut locked = lock(state);
    let key = (p.digest(), role == Role::E1);
    // Programs that go on where another ended have no digest of their own.
    let known = if p.past() == 0 { locked.layouts.known.get(&key).cloned() } else { None };
    if locked.layouts.refused || matches!(known, Some(None)) {
        return Ok(None);
    }
    let Some(resident) = locked.weights(p)? else { return Ok(None) };
    let mut weights = HashMap::new();
    let mut layers = HashMap::new();
    for (step, resident) in resident {
        let (word, by) = resident.way(&locked.device, p.values[p.ops[step].outputs[0]].bits);
        let (parts, buffers): (Vec<_>, Vec<_>) = resident.parts.into_iter().unzip();
        layers.insert(step, Layer { word, by, parts });
        weights.extend(buffers.into_iter().enumerate().map(|(part, buffer)| ((step, part), buffer)));
    }
    let State { device, layouts, told, .. } = &mut *locked;
    let layout = match known {
        Some(layout) => Ok(layout),
        None => lay_out(device, layers, p, role),
    };
    let made = layout.and_then(|layout| {
        if p.past() == 0 && !layouts.known.contains_key(&key) {
            if layouts.known.len() == REMEMBERED {
                layouts.known.clear();
            }
            layouts.known.insert(key, layout.clone());
        }
        let Some(layout) = layout else { return Ok(None) };
        if layouts.held + OnDevice::bytes(&layout.compiled) > ALL {
            return Ok(None);
        }
        OnDevice::new(Arc::clone(state), device, layout, &weights).map(Some)
    });
    match made {
        Err(e @ GpuError::Refused { .. }) => {
            layouts.refused = true;
            told.once(About::Gates, || format!("the processor computes gates from now on: {e}"));
        }
        Err(e @ GpuError::OutOfMemory { .. }) => {
            told.once(About::Evaluations, || format!("the processor computes gates without room: {e}"));
        }
        Err(e) => return Err(e.into()),
        Ok(None) => {}
        Ok(Some(new)) => {
            layouts.held += new.held();
            return Ok(Some(new));
        }
    }
    Ok(None)
}

/// None where something has no kernel or no room.
fn lay_out(
    device: &Device,
    layers: HashMap<usize, Layer>,
    p: &Program,
    role: Role,
) -> Result<Option<Arc<Layout>>, GpuError> {
    let most = device.room_for_all.min(MOST);
    let Ok(mut compiled) = Compiled::new(p, role, most, &Choice { device, layers }) else { return Ok(None) };
    let put = |words: Vec<u32>, usage| -> Result<wgpu::Buffer, GpuError> {
        let b = buffer(&device.device, (4 * words.len()).max(SLOT), usage | BufferUsages::COPY_DST);
        device.check()?;
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        device.queue.write_buffer(&b, 0, &bytes);
        Ok(b)
    };
    let params = put(std::mem::take(&mut compiled.lowered.params), BufferUsages::UNIFORM)?;
    let tables = put(std::mem::take(&mut compiled.lowered.tables), BufferUsages::STORAGE)?;
    Ok(Some(Arc::new(Layout { compiled, params, tables })))
}

#[cfg(test)]
mod tests;
