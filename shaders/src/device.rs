//! An open device: pipelines, buffers, and one job at a time.
//!
//! Buffers that held words are zero again before the next job, on the device by a copy engine's clear in the same
//! submission, in memory shared with it by the processor; on an error they are destroyed.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tacet_protocol::lock;
use wgpu::{BufferUsages, Features, MapMode, PollType};

use crate::MOST_MACS;
use crate::adapter::{self, Adapter};
use crate::error::GpuError;
use crate::evaluation::Gates;
use crate::kernel::{Kernel, Layout, Word};

/// A job that takes longer has hung: jobs are cut to what slow adapters do in a few seconds. Half of what a session may take,
/// by default: others wait for the device meanwhile.
const PATIENCE: Duration = Duration::from_secs(30);

/// Buffers of single products are no larger, whatever the adapter allows: it bounds what a party keeps beside its weights.
const ROOM: usize = 64 << 20;

/// The bytes of uniforms.
const SHAPE: u64 = 16;

/// One product of a batch of matrices, laid out as `wgsl/product.wgsl` says.
pub(crate) struct Job<'a> {
    pub kernel: Kernel,
    pub batch: usize,
    pub rows: usize,
    /// Groups of four columns.
    pub columns: usize,
    /// Groups of four inputs.
    pub depth: usize,
    /// Consecutive batches that read the same right side.
    pub share: usize,
    pub left: &'a [u8],
    pub right: Right<'a>,
    /// How often to compute it; once, but for measuring.
    pub times: usize,
}

impl Job<'_> {
    /// Bytes of the result.
    fn out(&self) -> usize {
        self.batch * self.rows * self.columns * self.kernel.word.group()
    }
}

/// The right side of a product.
pub(crate) enum Right<'a> {
    /// Weights on the device.
    Resident(&'a wgpu::Buffer),
    /// Words to send along.
    Sent(&'a [u8]),
}

/// What the device said since it was last asked.
#[derive(Default)]
struct Trouble {
    lost: Option<String>,
    other: Option<GpuError>,
}

/// Tells whether a device is gone, also while it works.
pub(crate) struct Health(Arc<Mutex<Trouble>>);

impl Health {
    pub(crate) fn lost(&self) -> bool {
        lock(&self.0).lost.is_some()
    }
}

pub(crate) struct Device {
    pub about: Adapter,
    /// Most bytes of a binding of a job.
    pub room: usize,
    /// Most bytes of any binding.
    pub room_for_all: usize,
    /// Most multiply-accumulates of a dispatch of an evaluation, and of those that go to the device together.
    pub most_macs: usize,
    /// Whether dot products of bytes are faster than products of words, in rings up to 32 bits and above.
    pub dots: [bool; 2],
    /// Whether wide words may be u64.
    pub int64: bool,
    pub device: wgpu::Device,
    pub queue: wgpu::Queue,
    trouble: Arc<Mutex<Trouble>>,
    pub bindings: wgpu::BindGroupLayout,
    pipelines: HashMap<Kernel, wgpu::ComputePipeline>,
    /// Kernels of gates.
    pub gates: Gates,
    shape: wgpu::Buffer,
    scratch: Option<Scratch>,
}

impl Device {
    /// Opens an adapter.
    pub(crate) fn open(adapter: &wgpu::Adapter) -> Result<Device, GpuError> {
        let about = Adapter::of(adapter);
        let unusable = |reason: String| GpuError::Unusable { adapter: about.to_string(), reason };
        let asked = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor {
            label: None,
            required_features: adapter.features() & (Features::SHADER_INT64 | Features::SUBGROUP),
            required_limits: adapter::limits(adapter),
            ..Default::default()
        }));
        let (device, queue) = asked.map_err(|e| unusable(e.to_string()))?;
        let trouble = Arc::new(Mutex::new(Trouble::default()));
        let (heard, name) = (Arc::clone(&trouble), about.to_string());
        device.on_uncaptured_error(Arc::new(move |e: wgpu::Error| {
            let adapter = name.clone();
            let e = match e {
                wgpu::Error::OutOfMemory { .. } => GpuError::OutOfMemory { adapter },
                wgpu::Error::Validation { description: reason, .. }
                | wgpu::Error::Internal { description: reason, .. } => GpuError::Refused { adapter, reason },
            };
            // What follows from the first error says less.
            lock(&heard).other.get_or_insert(e);
        }));
        let heard = Arc::clone(&trouble);
        device.set_device_lost_callback(move |why, text| {
            lock(&heard).lost.get_or_insert(format!("{why:?} {text}").trim().to_string());
        });
        let bindings = bindings(&device, false, [true, true, false]);
        let gates = Gates::new(&device);
        let limits = device.limits();
        let room = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size / 2);
        let shape = buffer(&device, SHAPE as usize, BufferUsages::UNIFORM | BufferUsages::COPY_DST);
        let room_for_all = usize::try_from(room).unwrap_or(ROOM) & !255;
        let room = room_for_all.min(ROOM);
        let int64 = about.int64;
        let new = Device {
            about,
            room,
            room_for_all,
            most_macs: MOST_MACS,
            dots: [false; 2],
            int64,
            device,
            queue,
            trouble,
            bindings,
            pipelines: HashMap::new(),
            gates,
            shape,
            scratch: None,
        };
        new.check()?;
        Ok(new)
    }

    /// The words of rings above 32 bits.
    pub(crate) fn wide(&self) -> Word {
        if self.int64 { Word::Native } else { Word::Pair }
    }

    /// Gives everything back.
    pub(crate) fn close(&mut self) {
        self.scratch = None;
        self.device.destroy();
        self.gone("it was closed");
    }

    pub(crate) fn health(&self) -> Health {
        Health(Arc::clone(&self.trouble))
    }

    /// Tiles, or rows where there are few.
    pub(crate) fn layout(&self, rows: usize) -> Layout {
        match rows {
            8.. => Layout::Tiles,
            _ if self.about.subgroups => Layout::RowsBySubgroups,
            _ => Layout::Rows,
        }
    }

    /// Fails if the device said that something is wrong.
    pub(crate) fn check(&self) -> Result<(), GpuError> {
        let mut t = lock(&self.trouble);
        let other = t.other.take();
        match &t.lost {
            Some(reason) => Err(GpuError::Lost { adapter: self.about.to_string(), reason: reason.clone() }),
            None => other.map_or(Ok(()), Err),
        }
    }

    pub(crate) fn gone(&self, reason: &str) -> GpuError {
        let reason = lock(&self.trouble).lost.get_or_insert(reason.to_string()).clone();
        GpuError::Lost { adapter: self.about.to_string(), reason }
    }

    /// Puts public weights on the device.
    pub(crate) fn resident(&self, bytes: &[u8]) -> Result<wgpu::Buffer, GpuError> {
        let b = buffer(&self.device, bytes.len(), BufferUsages::STORAGE | BufferUsages::COPY_DST);
        self.check()?;
        self.queue.write_buffer(&b, 0, bytes);
        self.queue.submit([]);
        self.check()?;
        Ok(b)
    }

    /// Compiles a kernel.
    pub(crate) fn compile(
        &self,
        source: String,
        bindings: &wgpu::BindGroupLayout,
    ) -> Result<wgpu::ComputePipeline, GpuError> {
        let module = self.device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label: None,
            source: wgpu::ShaderSource::Wgsl(source.into()),
        });
        let layout = self.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: None,
            bind_group_layouts: &[Some(bindings)],
            immediate_size: 0,
        });
        let pipeline = self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: None,
            layout: Some(&layout),
            module: &module,
            entry_point: None,
            // Every element that is read was written before.
            compilation_options: wgpu::PipelineCompilationOptions {
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: None,
        });
        self.check()?;
        Ok(pipeline)
    }

    pub(crate) fn pipeline(&mut self, kernel: Kernel) -> Result<wgpu::ComputePipeline, GpuError> {
        if let Some(p) = self.pipelines.get(&kernel) {
            return Ok(p.clone());
        }
        let pipeline = self.compile(kernel.source(), &self.bindings)?;
        self.pipelines.insert(kernel, pipeline.clone());
        Ok(pipeline)
    }

    /// Computes, and shows the result to `take`.
    ///
    /// # Errors
    /// Nothing was shown; what the device held is destroyed.
    pub(crate) fn run(&mut self, job: &Job, take: impl FnOnce(&[u8])) -> Result<(), GpuError> {
        self.check()?;
        let pipeline = self.pipeline(job.kernel)?;
        let sent = if let Right::Sent(bytes) = job.right { bytes } else { &[] };
        let needs = [job.left.len(), sent.len(), job.out()];
        // Only a job that went well gives them back; dropped, they are destroyed.
        let scratch = match self.scratch.take().filter(|s| s.fits(needs)) {
            Some(s) => s,
            None => Scratch::new(&self.device, needs, self.room),
        };
        self.check()?;
        self.submit(job, &pipeline, &scratch)?;
        self.finish(job, &scratch, take)?;
        self.scratch = Some(scratch);
        Ok(())
    }

    fn submit(&self, job: &Job, pipeline: &wgpu::ComputePipeline, s: &Scratch) -> Result<(), GpuError> {
        let sent = if let Right::Sent(bytes) = job.right { bytes } else { &[] };
        let start = s.left.size();
        let at = |from: u64, bytes: &[u8]| -> Result<(), wgpu::MapRangeError> {
            if !bytes.is_empty() {
                s.up.slice(from..from + bytes.len() as u64).get_mapped_range_mut()?.copy_from_slice(bytes);
            }
            Ok(())
        };
        at(0, job.left).and_then(|()| at(start, sent)).map_err(|e| self.gone(&e.to_string()))?;
        s.up.unmap();
        let uniforms = [job.rows, job.columns, job.depth, job.share].map(|n| (n as u32).to_le_bytes());
        self.queue.write_buffer(&self.shape, 0, uniforms.as_flattened());
        let (right, right_len) = match job.right {
            Right::Resident(b) => (b, b.size()),
            Right::Sent(bytes) => (&s.right, bytes.len() as u64),
        };
        let whole = |binding, buffer, len: u64| wgpu::BindGroupEntry {
            binding,
            resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                buffer,
                offset: 0,
                size: std::num::NonZeroU64::new(len),
            }),
        };
        let group = self.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &self.bindings,
            entries: &[
                whole(0, &self.shape, SHAPE),
                whole(1, &s.left, job.left.len() as u64),
                whole(2, right, right_len),
                whole(3, &s.out, job.out() as u64),
            ],
        });
        let mut encoder = self.device.create_command_encoder(&Default::default());
        encoder.copy_buffer_to_buffer(&s.up, 0, &s.left, 0, job.left.len() as u64);
        if !sent.is_empty() {
            encoder.copy_buffer_to_buffer(&s.up, start, &s.right, 0, sent.len() as u64);
        }
        {
            let mut pass = encoder.begin_compute_pass(&Default::default());
            pass.set_pipeline(pipeline);
            pass.set_bind_group(0, &group, &[]);
            let [x, y] = job.kernel.workgroups(job.rows, job.columns);
            for _ in 0..job.times {
                pass.dispatch_workgroups(x as u32, y as u32, job.batch as u32);
            }
        }
        encoder.copy_buffer_to_buffer(&s.out, 0, &s.down, 0, job.out() as u64);
        encoder.clear_buffer(&s.left, 0, Some(job.left.len() as u64));
        if !sent.is_empty() {
            encoder.clear_buffer(&s.right, 0, Some(sent.len() as u64));
        }
        encoder.clear_buffer(&s.out, 0, Some(job.out() as u64));
        self.queue.submit([encoder.finish()]);
        self.check()
    }

    /// Waits for all that was submitted and maps so many bytes of each buffer.
    pub(crate) fn map(&self, buffers: &[(&wgpu::Buffer, MapMode, u64)]) -> Result<(), GpuError> {
        let failed = Arc::new(Mutex::new(false));
        for (b, mode, len) in buffers {
            let failed = Arc::clone(&failed);
            b.slice(..*len).map_async(*mode, move |r| *lock(&failed) |= r.is_err());
        }
        // A device that is lost while it is waited for ends in a panic inside wgpu.
        let wait = PollType::Wait { submission_index: None, timeout: Some(PATIENCE) };
        match catch_unwind(AssertUnwindSafe(|| self.device.poll(wait))) {
            Ok(Ok(_)) => self.check()?,
            Ok(Err(_)) => {
                // Its last handle, dropped, would wait for it without end: there is always one more.
                std::mem::forget(self.queue.clone());
                return Err(self.gone(&format!("no answer within {} s", PATIENCE.as_secs())));
            }
            Err(_) => return Err(self.gone("it failed while it was waited for")),
        }
        if *lock(&failed) {
            return Err(self.gone("its memory cannot be read"));
        }
        Ok(())
    }

    fn finish(&self, job: &Job, s: &Scratch, take: impl FnOnce(&[u8])) -> Result<(), GpuError> {
        let out = job.out() as u64;
        self.map(&[(&s.down, MapMode::Read, out), (&s.up, MapMode::Write, s.up.size())])?;
        let end = |e: wgpu::MapRangeError| self.gone(&e.to_string());
        take(&s.down.slice(..out).get_mapped_range().map_err(end)?);
        s.down.unmap();
        let sent = if let Right::Sent(bytes) = job.right { bytes.len() as u64 } else { 0 };
        for (from, len) in [(0, job.left.len() as u64), (s.left.size(), sent)] {
            if len > 0 {
                s.up.slice(from..from + len).get_mapped_range_mut().map_err(end)?.slice(..).fill(0);
            }
        }
        let mut encoder = self.device.create_command_encoder(&Default::default());
        encoder.clear_buffer(&s.down, 0, Some(out));
        self.queue.submit([encoder.finish()]);
        self.check()
    }
}

#[cfg(test)]
impl Device {
    /// The contents of all buffers for words.
    pub(crate) fn left_over(&self) -> Result<Vec<u8>, GpuError> {
        let s = self.scratch.as_ref().expect("a job was run");
        s.up.unmap();
        let all = [&s.up, &s.left, &s.right, &s.out];
        let whole: u64 = all.iter().map(|b| b.size()).sum();
        let to = buffer(&self.device, whole as usize, BufferUsages::MAP_READ | BufferUsages::COPY_DST);
        let mut encoder = self.device.create_command_encoder(&Default::default());
        let mut at = 0;
        for b in all {
            encoder.copy_buffer_to_buffer(b, 0, &to, at, b.size());
            at += b.size();
        }
        self.queue.submit([encoder.finish()]);
        to.slice(..).map_async(MapMode::Read, |r| r.unwrap());
        s.down.slice(..).map_async(MapMode::Read, |r| r.unwrap());
        s.up.slice(..).map_async(MapMode::Write, |r| r.unwrap());
        self.device.poll(PollType::wait_indefinitely()).unwrap();
        self.check()?;
        let mut bytes = to.slice(..).get_mapped_range().unwrap().to_vec();
        bytes.extend_from_slice(&s.down.slice(..).get_mapped_range().unwrap());
        s.down.unmap();
        Ok(bytes)
    }

    /// As if the device had said so.
    pub(crate) fn say(&self, e: GpuError) {
        lock(&self.trouble).other = Some(e);
    }

    /// Asks for what the device refuses.
    pub(crate) fn ask_too_much(&self) {
        buffer(&self.device, self.device.limits().max_buffer_size as usize + 4, BufferUsages::COPY_DST);
    }
}

/// A kernel's bindings: parameters, at an offset that a dispatch says or not, then buffers that are read only or not.
pub(crate) fn bindings<const N: usize>(
    device: &wgpu::Device,
    dynamic: bool,
    read_only: [bool; N],
) -> wgpu::BindGroupLayout {
    let entry = |binding, ty, has_dynamic_offset| wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset, min_binding_size: None },
        count: None,
    };
    let mut entries = vec![entry(0, wgpu::BufferBindingType::Uniform, dynamic)];
    let buffers = read_only.map(|read_only| wgpu::BufferBindingType::Storage { read_only });
    entries.extend(buffers.into_iter().zip(1..).map(|(ty, binding)| entry(binding, ty, false)));
    device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: None, entries: &entries })
}

pub(crate) fn buffer(device: &wgpu::Device, size: usize, usage: BufferUsages) -> wgpu::Buffer {
    let mapped_at_creation = usage.contains(BufferUsages::MAP_WRITE);
    device.create_buffer(&wgpu::BufferDescriptor { label: None, size: size as u64, usage, mapped_at_creation })
}

/// Buffers for the words of a job. Between jobs they are zero, and `up` is mapped.
struct Scratch {
    /// What goes to `left`, then what goes to `right`.
    up: wgpu::Buffer,
    left: wgpu::Buffer,
    right: wgpu::Buffer,
    out: wgpu::Buffer,
    down: wgpu::Buffer,
}

impl Scratch {
    fn new(device: &wgpu::Device, needs: [usize; 3], room: usize) -> Scratch {
        let [left, right, out] = needs.map(|n| n.next_power_of_two().min(room).max(n).max(256));
        let on_device = BufferUsages::STORAGE | BufferUsages::COPY_DST | BufferUsages::COPY_SRC;
        Scratch {
            up: buffer(device, left + right, BufferUsages::MAP_WRITE | BufferUsages::COPY_SRC),
            left: buffer(device, left, on_device),
            right: buffer(device, right, on_device),
            out: buffer(device, out, on_device),
            down: buffer(device, out, BufferUsages::MAP_READ | BufferUsages::COPY_DST),
        }
    }

    fn fits(&self, needs: [usize; 3]) -> bool {
        [&self.left, &self.right, &self.out].iter().zip(needs).all(|(b, n)| b.size() >= n as u64)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        [&self.up, &self.left, &self.right, &self.out, &self.down].iter().for_each(|b| b.destroy());
    }
}
