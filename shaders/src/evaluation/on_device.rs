//! An evaluation's buffers and dispatches.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use tacet_protocol::backend::{Evaluation, Part};
use tacet_protocol::program::Id;
use tacet_protocol::{Error, lock};
use wgpu::{BufferUsages, MapMode};

use super::compile::Compiled;
use super::gate::{self, SLOT};
use super::lower::{Command, Operand};
use super::{Layout, WORD};
use crate::State;
use crate::device::{Device, buffer};
use crate::error::GpuError;

/// A dispatch whose pipeline and bindings are made.
struct Ready {
    pipeline: wgpu::ComputePipeline,
    bindings: wgpu::BindGroup,
    /// Where a gate's parameters lie.
    slot: Option<u32>,
    workgroups: [u32; 3],
    /// Multiply-accumulates of a product.
    macs: usize,
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
                Ready { pipeline, bindings, slot: Some((slot * SLOT) as u32), workgroups: [*x, *y, 1], macs: 0 }
            }
            Command::Product { kernel, slot, workgroups, starts, sizes: [l, r, made], macs, weights: part } => {
                let pipeline = device.pipeline(*kernel)?;
                let (other, len) = match part {
                    Some(part) => (&weights[part], weights[part].size()),
                    None => (right, *r as u64),
                };
                let all = [
                    (0, params, (slot * SLOT) as u64, 16),
                    (1, left, starts[0] as u64, *l as u64),
                    (2, other, 0, len),
                    (3, product, starts[1] as u64, *made as u64),
                ];
                let bindings = bind(device, &device.bindings, &all);
                Ready { pipeline, bindings, slot: None, workgroups: *workgroups, macs: *macs }
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
    /// Whether all that was asked of the device went well, so that `up` is mapped and nothing else is.
    whole: bool,
}

impl OnDevice {
    /// Of each buffer: arena, what is fed, operands, what goes up and what comes down.
    fn sizes(c: &Compiled) -> [usize; 7] {
        let sent = |packed: &Vec<(usize, usize)>| packed.iter().map(|(_, bytes)| bytes.next_multiple_of(WORD)).sum();
        let sent = c.segments.iter().map(|(_, packed)| sent(packed)).max().unwrap_or(0);
        let widest = WORD * c.lens.iter().max().copied().unwrap_or(0);
        let [left, right, product] = c.lowered.operands;
        let all = [c.arena * WORD, c.fed, left, right, product, widest.max(c.fed), widest.max(sent)];
        all.map(|bytes| bytes.next_multiple_of(16).max(SLOT))
    }

    /// Bytes that an evaluation has on the device.
    pub(super) fn bytes(c: &Compiled) -> usize {
        OnDevice::sizes(c).iter().sum()
    }

    /// The same of this one.
    pub(super) fn held(&self) -> usize {
        OnDevice::bytes(&self.layout.compiled)
    }

    pub(super) fn new(
        state: Arc<Mutex<State>>,
        device: &mut Device,
        layout: Arc<Layout>,
        weights: &HashMap<(usize, usize), wgpu::Buffer>,
    ) -> Result<OnDevice, GpuError> {
        let on_device = BufferUsages::STORAGE | BufferUsages::COPY_DST | BufferUsages::COPY_SRC;
        let [arena, fed, left, right, product, up, down] = OnDevice::sizes(&layout.compiled);
        let [arena, fed, left, right, product] =
            [arena, fed, left, right, product].map(|bytes| buffer(&device.device, bytes, on_device));
        let up = buffer(&device.device, up, BufferUsages::MAP_WRITE | BufferUsages::COPY_SRC);
        let down = buffer(&device.device, down, BufferUsages::MAP_READ | BufferUsages::COPY_DST);
        let operands = [left, right, product];
        device.check()?;
        let ready = ready(device, &layout, weights, [&arena, &fed], &operands)?;
        Ok(OnDevice { state, layout, ready, arena, fed, operands, up, down, whole: true })
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

impl OnDevice {
    fn try_put(&self, device: &Device, v: Id, part: Part, words: &[u64]) -> Result<(), Error> {
        device.check()?;
        let (place, len) = self.layout.compiled.place(v, part)?;
        if len != words.len() {
            let reason = format!("{} words in place of {len}", words.len());
            return Err(Error::Malformed { what: "value", reason });
        }
        let bytes = zeroize::Zeroizing::new(words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>());
        self.write(device, &bytes)?;
        let mut encoder = device.device.create_command_encoder(&Default::default());
        encoder.copy_buffer_to_buffer(&self.up, 0, &self.arena, (place * WORD) as u64, bytes.len() as u64);
        device.queue.submit([encoder.finish()]);
        self.read(device, 0)?;
        Ok(())
    }

    fn try_run(&self, device: &Device, segment: usize, fed: &[u8]) -> Result<Vec<u8>, Error> {
        device.check()?;
        let segments = &self.layout.compiled.segments;
        let start = segment.checked_sub(1).map_or(0, |before| segments[before].0);
        let (end, packed) = &segments[segment];
        self.write(device, fed)?;
        let mut encoder = device.device.create_command_encoder(&Default::default());
        encoder.copy_buffer_to_buffer(&self.up, 0, &self.fed, 0, (fed.len() as u64).next_multiple_of(4));
        let mut rest = &self.ready[start..*end];
        while !rest.is_empty() {
            // As much as a driver lets a device work at a time, and one dispatch at least.
            let mut macs = 0;
            let most = rest.iter().take_while(|r| {
                macs += r.macs;
                macs <= device.most_macs
            });
            let now;
            (now, rest) = rest.split_at(most.count().max(1));
            let mut pass = encoder.begin_compute_pass(&Default::default());
            for r in now {
                pass.set_pipeline(&r.pipeline);
                pass.set_bind_group(0, &r.bindings, r.slot.as_slice());
                let [x, y, z] = r.workgroups;
                pass.dispatch_workgroups(x, y, z);
            }
            drop(pass);
            if !rest.is_empty() {
                let next = device.device.create_command_encoder(&Default::default());
                device.queue.submit([std::mem::replace(&mut encoder, next).finish()]);
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

    fn try_get(&self, device: &Device, v: Id, part: Part) -> Result<Vec<u64>, Error> {
        device.check()?;
        let (place, len) = self.layout.compiled.place(v, part)?;
        self.up.unmap();
        let mut encoder = device.device.create_command_encoder(&Default::default());
        encoder.copy_buffer_to_buffer(&self.arena, (place * WORD) as u64, &self.down, 0, (len * WORD) as u64);
        device.queue.submit([encoder.finish()]);
        let bytes = zeroize::Zeroizing::new(self.read(device, len * WORD)?);
        Ok(bytes.as_chunks().0.iter().map(|w| u64::from_le_bytes(*w)).collect())
    }
}

/// What was not whole before is not after.
impl Evaluation for OnDevice {
    fn put(&mut self, v: Id, part: Part, words: &[u64]) -> Result<(), Error> {
        let done = self.try_put(&lock(&self.state).device, v, part, words);
        self.whole &= done.is_ok();
        done
    }

    fn run(&mut self, segment: usize, fed: &[u8]) -> Result<Vec<u8>, Error> {
        let message = self.try_run(&lock(&self.state).device, segment, fed);
        self.whole &= message.is_ok();
        message
    }

    fn get(&mut self, v: Id, part: Part) -> Result<Vec<u64>, Error> {
        let words = self.try_get(&lock(&self.state).device, v, part);
        self.whole &= words.is_ok();
        words
    }
}

impl OnDevice {
    fn buffers(&self) -> [&wgpu::Buffer; 6] {
        let [left, right, product] = &self.operands;
        [&self.arena, &self.fed, left, right, product, &self.down]
    }

    /// Zeroes all that held words, of an evaluation that went well.
    pub(super) fn clear(&mut self, device: &Device) {
        self.whole = false;
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
    /// After an evaluation that went well, nothing is left in memory that the device may give to others.
    fn drop(&mut self) {
        let state = Arc::clone(&self.state);
        let mut state = lock(&state);
        if self.whole && !state.device.health().lost() {
            self.clear(&state.device);
        }
        self.buffers().into_iter().chain([&self.up]).for_each(|b| b.destroy());
        state.layouts.held -= self.held();
    }
}

#[cfg(test)]
impl OnDevice {
    /// Multiply-accumulates of each dispatch.
    pub(super) fn dispatches(&self) -> Vec<usize> {
        self.ready.iter().map(|r| r.macs).collect()
    }

    /// The bytes of all buffers, after [`Self::clear`].
    pub(super) fn contents(&self, device: &Device) -> Vec<u8> {
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
