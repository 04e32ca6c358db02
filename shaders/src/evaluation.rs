//! Evaluations on a device: an evaluator's values stay there from one opening to the next.
//!
//! A program is laid out once: every value has a place in an arena of ring words, every operation is a few dispatches, and
//! the parameters of all are on the device before the first. Between two openings the processor draws this evaluator's halves
//! of masks and of what is dealt, which with what was received go to the device in one piece; what comes back is the message
//! of the next opening. Programs with operations or sizes that have no kernel here are computed as on a processor, with
//! products on the device.

mod arena;
mod compile;
mod gate;
mod lower;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tacet_protocol::backend::{Evaluation, Part};
use tacet_protocol::program::{Id, Kind, Program};
use tacet_protocol::{Error, Role};
use wgpu::{BufferUsages, MapMode};

use crate::State;
use crate::device::{Device, buffer};
use crate::error::GpuError;
use crate::kernel::{By, Kernel, Word};
use compile::Compiled;
pub(crate) use gate::Gates;
use gate::SLOT;
use lower::{Command, Operand, Ways};

/// Most bytes of an evaluation's arena, and of what it is fed at a time: places in it are 32-bit numbers of bits.
const MOST: usize = 1 << 28;

/// Bytes of a ring word.
const WORD: usize = 8;

/// Programs whose layout is remembered.
const REMEMBERED: usize = 16;

/// What is kept of programs between evaluations.
#[derive(Default)]
pub(crate) struct Layouts(HashMap<([u8; 32], bool), Arc<Layout>>);

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
    fn linear(&self, step: usize, rows: usize, _: u32) -> (Kernel, Vec<Range<usize>>) {
        let Layer { word, by, parts } = &self.layers[&step];
        (Kernel { word: *word, by: *by, layout: self.device.layout(rows) }, parts.clone())
    }

    fn words(&self, rows: usize, bits: u32) -> Kernel {
        let word = if bits <= 32 { Word::Narrow } else { self.device.wide() };
        Kernel { word, by: By::Words, layout: self.device.layout(rows) }
    }
}

/// Lays a program out for a device, which gets its weights; none where something has no kernel or no room.
pub(crate) fn open(state: &Arc<Mutex<State>>, p: &Program, role: Role) -> Result<Option<OnDevice>, Error> {
    let mut locked = lock(state);
    let mut weights = HashMap::new();
    let mut layers = HashMap::new();
    for (step, op) in p.ops.iter().enumerate() {
        let Kind::Linear { layer, .. } = &op.kind else { continue };
        let resident = locked.weights(layer)?.clone();
        let (word, by) = resident.way(&locked.device, layer.weights()?.cols_in(), p.values[op.outputs[0]].bits);
        let (parts, buffers): (Vec<_>, Vec<_>) = resident.parts.into_iter().unzip();
        layers.insert(step, Layer { word, by, parts });
        weights.extend(buffers.into_iter().enumerate().map(|(part, buffer)| ((step, part), buffer)));
    }
    let State { device, layouts, .. } = &mut *locked;
    let key = (p.digest(), role == Role::E1);
    let layout = match layouts.0.get(&key).filter(|_| p.past() == 0) {
        Some(known) => Arc::clone(known),
        None => {
            let Some(new) = lay_out(device, layers, p, role)? else { return Ok(None) };
            let new = Arc::new(new);
            // Programs that go on where another ended have no digest of their own.
            if p.past() == 0 {
                if layouts.0.len() == REMEMBERED {
                    layouts.0.clear();
                }
                layouts.0.insert(key, Arc::clone(&new));
            }
            new
        }
    };
    Ok(Some(OnDevice::new(Arc::clone(state), &mut locked.device, layout, &weights)?))
}

/// None where something has no kernel or no room.
fn lay_out(
    device: &Device,
    layers: HashMap<usize, Layer>,
    p: &Program,
    role: Role,
) -> Result<Option<Layout>, GpuError> {
    let Ok(compiled) = Compiled::new(p, role, &Choice { device, layers }) else { return Ok(None) };
    let lowered = &compiled.lowered;
    let sizes = [compiled.arena * WORD, compiled.fed, 4 * lowered.tables.len()];
    if sizes.into_iter().chain(lowered.operands).any(|bytes| bytes > device.room_for_all.min(MOST)) {
        return Ok(None);
    }
    let put = |words: &[u32], usage| -> Result<wgpu::Buffer, GpuError> {
        let b = buffer(&device.device, (4 * words.len()).max(SLOT), usage | BufferUsages::COPY_DST);
        device.check()?;
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        device.queue.write_buffer(&b, 0, &bytes);
        Ok(b)
    };
    let params = put(&lowered.params, BufferUsages::UNIFORM)?;
    let tables = put(&lowered.tables, BufferUsages::STORAGE)?;
    Ok(Some(Layout { compiled, params, tables }))
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A dispatch whose pipeline and bindings are made.
struct Ready {
    pipeline: wgpu::ComputePipeline,
    bindings: wgpu::BindGroup,
    /// Where a gate's parameters lie.
    slot: Option<u32>,
    workgroups: [u32; 3],
}

/// Parts of buffers: binding, buffer, first byte and bytes.
fn bind(device: &Device, layout: &wgpu::BindGroupLayout, all: &[(u32, &wgpu::Buffer, u64, u64)]) -> wgpu::BindGroup {
    let entry = |(binding, buffer, offset, size)| {
        let size = std::num::NonZeroU64::new(size);
        let resource = wgpu::BindingResource::Buffer(wgpu::BufferBinding { buffer, offset, size });
        wgpu::BindGroupEntry { binding, resource }
    };
    let entries: Vec<_> = all.iter().copied().map(entry).collect();
    device.device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout, entries: &entries })
}

/// The dispatches of a program, in order.
fn ready(
    device: &mut Device,
    layout: &Layout,
    weights: &HashMap<(usize, usize), wgpu::Buffer>,
    [arena, fed]: [&wgpu::Buffer; 2],
    operands: &[wgpu::Buffer; 3],
) -> Result<Vec<Ready>, GpuError> {
    let Layout { compiled, params, tables } = layout;
    let [left, right, product] = operands;
    let gates = [left, right, product].map(|operand| {
        let all = [arena, fed, tables, operand].into_iter().zip(1..);
        let whole = all.map(|(b, binding)| (binding, b, 0, b.size()));
        let all: Vec<_> = std::iter::once((0, params, 0, SLOT as u64)).chain(whole).collect();
        bind(device, &device.gates.bindings, &all)
    });
    let mut ready = Vec::with_capacity(compiled.lowered.commands.len());
    for command in &compiled.lowered.commands {
        ready.push(match command {
            Command::Gate { gate, slot, workgroups: [x, y], operand } => {
                let pipeline = gate::pipeline(device, *gate)?;
                let bindings = gates[match operand {
                    Operand::Left => 0,
                    Operand::Right => 1,
                    Operand::Product => 2,
                }]
                .clone();
                Ready { pipeline, bindings, slot: Some((slot * SLOT) as u32), workgroups: [*x, *y, 1] }
            }
            Command::Product { kernel, slot, workgroups, sizes: [l, r, made], weights: part } => {
                let pipeline = device.pipeline(*kernel)?;
                let (other, len) = match part {
                    Some(part) => (&weights[part], weights[part].size()),
                    None => (right, *r as u64),
                };
                let all = [
                    (0, params, (slot * SLOT) as u64, 16),
                    (1, left, 0, *l as u64),
                    (2, other, 0, len),
                    (3, product, 0, *made as u64),
                ];
                let bindings = bind(device, &device.bindings, &all);
                Ready { pipeline, bindings, slot: None, workgroups: *workgroups }
            }
        });
    }
    device.check()?;
    Ok(ready)
}

/// One evaluation. Its buffers serve no other.
pub(crate) struct OnDevice {
    state: Arc<Mutex<State>>,
    layout: Arc<Layout>,
    ready: Vec<Ready>,
    arena: wgpu::Buffer,
    fed: wgpu::Buffer,
    operands: [wgpu::Buffer; 3],
    /// Mapped between segments.
    up: wgpu::Buffer,
    down: wgpu::Buffer,
}

impl OnDevice {
    fn new(
        state: Arc<Mutex<State>>,
        device: &mut Device,
        layout: Arc<Layout>,
        weights: &HashMap<(usize, usize), wgpu::Buffer>,
    ) -> Result<OnDevice, GpuError> {
        let Compiled { arena, fed, lowered, segments, lens, .. } = &layout.compiled;
        let on_device = BufferUsages::STORAGE | BufferUsages::COPY_DST | BufferUsages::COPY_SRC;
        let new = |bytes: usize, usage| buffer(&device.device, bytes.next_multiple_of(16).max(SLOT), usage);
        let sent = |packed: &Vec<(usize, usize)>| packed.iter().map(|(_, bytes)| bytes.next_multiple_of(WORD)).sum();
        let sent = segments.iter().map(|(_, packed)| sent(packed)).max().unwrap_or(0);
        let widest = WORD * lens.iter().max().copied().unwrap_or(0);
        let arena = new(arena * WORD, on_device);
        let operands = lowered.operands.map(|bytes| new(bytes, on_device));
        let up = new(widest.max(*fed), BufferUsages::MAP_WRITE | BufferUsages::COPY_SRC);
        let down = new(widest.max(sent), BufferUsages::MAP_READ | BufferUsages::COPY_DST);
        let fed = new(*fed, on_device);
        device.check()?;
        let ready = ready(device, &layout, weights, [&arena, &fed], &operands)?;
        Ok(OnDevice { state, layout, ready, arena, fed, operands, up, down })
    }

    /// Writes to the mapped buffer.
    fn write(&self, device: &Device, bytes: &[u8]) -> Result<(), GpuError> {
        let mut range =
            self.up.slice(..bytes.len() as u64).get_mapped_range_mut().map_err(|e| device.gone(&e.to_string()))?;
        range.copy_from_slice(bytes);
        drop(range);
        self.up.unmap();
        Ok(())
    }

    /// Waits, and leaves `up` mapped; reads so many bytes of `down`.
    fn read(&self, device: &Device, bytes: usize) -> Result<Vec<u8>, GpuError> {
        let up = (&self.up, MapMode::Write, self.up.size());
        if bytes == 0 {
            device.map(&[up])?;
            return Ok(Vec::new());
        }
        device.map(&[up, (&self.down, MapMode::Read, bytes as u64)])?;
        let read = self.down.slice(..bytes as u64).get_mapped_range().map_err(|e| device.gone(&e.to_string()))?;
        let out = read.to_vec();
        drop(read);
        self.down.unmap();
        Ok(out)
    }
}

impl Evaluation for OnDevice {
    fn put(&mut self, v: Id, part: Part, words: &[u64]) -> Result<(), Error> {
        let state = lock(&self.state);
        let device = &state.device;
        device.check()?;
        let (place, len) = self.layout.compiled.place(v, part);
        debug_assert_eq!(len, words.len());
        let bytes = zeroize::Zeroizing::new(words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>());
        self.write(device, &bytes)?;
        let mut encoder = device.device.create_command_encoder(&Default::default());
        encoder.copy_buffer_to_buffer(&self.up, 0, &self.arena, (place * WORD) as u64, bytes.len() as u64);
        device.queue.submit([encoder.finish()]);
        self.read(device, 0)?;
        Ok(())
    }

    fn run(&mut self, segment: usize, fed: &[u8]) -> Result<Vec<u8>, Error> {
        let state = lock(&self.state);
        let device = &state.device;
        device.check()?;
        let segments = &self.layout.compiled.segments;
        let start = segment.checked_sub(1).map_or(0, |before| segments[before].0);
        let (end, packed) = &segments[segment];
        self.write(device, fed)?;
        let mut encoder = device.device.create_command_encoder(&Default::default());
        encoder.copy_buffer_to_buffer(&self.up, 0, &self.fed, 0, (fed.len() as u64).next_multiple_of(4));
        {
            let mut pass = encoder.begin_compute_pass(&Default::default());
            for r in &self.ready[start..*end] {
                pass.set_pipeline(&r.pipeline);
                pass.set_bind_group(0, &r.bindings, r.slot.as_slice());
                let [x, y, z] = r.workgroups;
                pass.dispatch_workgroups(x, y, z);
            }
        }
        let mut at = 0;
        for (place, bytes) in packed {
            let whole = bytes.next_multiple_of(WORD) as u64;
            encoder.copy_buffer_to_buffer(&self.arena, (place * WORD) as u64, &self.down, at, whole);
            at += whole;
        }
        device.queue.submit([encoder.finish()]);
        let read = self.read(device, at as usize)?;
        let mut rest = read.as_slice();
        let mut message = Vec::with_capacity(read.len());
        for (_, bytes) in packed {
            let (own, after) = rest.split_at(bytes.next_multiple_of(WORD));
            message.extend_from_slice(&own[..*bytes]);
            rest = after;
        }
        Ok(message)
    }

    fn get(&mut self, v: Id, part: Part) -> Result<Vec<u64>, Error> {
        let state = lock(&self.state);
        let device = &state.device;
        device.check()?;
        let (place, len) = self.layout.compiled.place(v, part);
        self.up.unmap();
        let mut encoder = device.device.create_command_encoder(&Default::default());
        encoder.copy_buffer_to_buffer(&self.arena, (place * WORD) as u64, &self.down, 0, (len * WORD) as u64);
        device.queue.submit([encoder.finish()]);
        let bytes = zeroize::Zeroizing::new(self.read(device, len * WORD)?);
        Ok(bytes.as_chunks().0.iter().map(|w| u64::from_le_bytes(*w)).collect())
    }
}

impl OnDevice {
    fn buffers(&self) -> [&wgpu::Buffer; 6] {
        let [left, right, product] = &self.operands;
        [&self.arena, &self.fed, left, right, product, &self.down]
    }

    /// Zeroes all that held words.
    fn clear(&self, device: &Device) {
        if let Ok(mut up) = self.up.slice(..).get_mapped_range_mut() {
            up.slice(..).fill(0);
        }
        self.up.unmap();
        let mut encoder = device.device.create_command_encoder(&Default::default());
        self.buffers().into_iter().for_each(|b| encoder.clear_buffer(b, 0, None));
        device.queue.submit([encoder.finish()]);
    }
}

impl Drop for OnDevice {
    /// Where the device still answers, nothing is left in memory that it may give to others.
    fn drop(&mut self) {
        let state = lock(&self.state);
        if state.device.check().is_ok() {
            self.clear(&state.device);
        }
        self.buffers().into_iter().chain([&self.up]).for_each(|b| b.destroy());
    }
}

#[cfg(test)]
impl OnDevice {
    /// The bytes of all buffers, after [`Self::clear`].
    fn contents(&self, device: &Device) -> Vec<u8> {
        let all = [&self.arena, &self.fed, &self.operands[0], &self.operands[1], &self.operands[2], &self.up];
        let whole = all.iter().map(|b| b.size()).sum();
        let to = buffer(&device.device, whole as usize, BufferUsages::MAP_READ | BufferUsages::COPY_DST);
        let mut encoder = device.device.create_command_encoder(&Default::default());
        let mut at = 0;
        for b in all {
            encoder.copy_buffer_to_buffer(b, 0, &to, at, b.size());
            at += b.size();
        }
        device.queue.submit([encoder.finish()]);
        device.map(&[(&to, MapMode::Read, whole), (&self.down, MapMode::Read, self.down.size())]).unwrap();
        let mut bytes = to.slice(..).get_mapped_range().unwrap().to_vec();
        bytes.extend_from_slice(&self.down.slice(..).get_mapped_range().unwrap());
        self.down.unmap();
        bytes
    }
}

#[cfg(test)]
mod tests;
