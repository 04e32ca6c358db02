//! Which adapters there are, and which one to take.

use std::fmt;

use wgpu::{Backends, DeviceType, Features, InstanceDescriptor, InstanceFlags, Limits};

use crate::GpuError;

/// Which adapters will do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// Hardware only: a software adapter is slower than the processor's own kernels.
    Hardware,
    /// Any, hardware first.
    Any,
}

/// An adapter, for people.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// The device's name.
    pub name: String,
    /// `discrete`, `integrated`, `virtual`, `software` or `other`.
    pub kind: &'static str,
    /// `Vulkan`, `Metal` or `DX12`.
    pub api: String,
    /// The driver and its version.
    pub driver: String,
    /// Largest buffer that a kernel can bind, in bytes.
    pub binding: u64,
    /// Whether kernels may use 64-bit integers.
    pub int64: bool,
    /// Whether kernels may use operations of subgroups.
    pub subgroups: bool,
    /// Whether [`Choice::Hardware`] takes adapters of this kind.
    pub hardware: bool,
}

impl Adapter {
    pub(crate) fn of(adapter: &wgpu::Adapter) -> Adapter {
        let info = adapter.get_info();
        let features = adapter.features();
        Adapter {
            kind: match info.device_type {
                DeviceType::DiscreteGpu => "discrete",
                DeviceType::IntegratedGpu => "integrated",
                DeviceType::VirtualGpu => "virtual",
                DeviceType::Cpu => "software",
                DeviceType::Other => "other",
            },
            api: format!("{:?}", info.backend),
            driver: format!("{} {}", info.driver, info.driver_info).trim().to_string(),
            binding: adapter.limits().max_storage_buffer_binding_size,
            int64: features.contains(Features::SHADER_INT64),
            subgroups: features.contains(Features::SUBGROUP),
            hardware: rank(info.device_type) <= 2,
            name: info.name,
        }
    }
}

impl fmt::Display for Adapter {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} ({}, {})", self.name, self.kind, self.api)
    }
}

/// Best first.
fn rank(kind: DeviceType) -> u32 {
    match kind {
        DeviceType::DiscreteGpu => 0,
        DeviceType::IntegratedGpu => 1,
        DeviceType::VirtualGpu => 2,
        DeviceType::Other => 3,
        DeviceType::Cpu => 4,
    }
}

/// All adapters that can compute, best first. None without a driver: libraries are looked for at run time only.
pub(crate) fn all() -> Vec<wgpu::Adapter> {
    let wanted =
        InstanceDescriptor { flags: InstanceFlags::empty(), ..InstanceDescriptor::new_without_display_handle() };
    let instance = wgpu::Instance::new(wanted);
    let mut all = pollster::block_on(instance.enumerate_adapters(Backends::PRIMARY));
    all.retain(|a| a.get_downlevel_capabilities().flags.contains(wgpu::DownlevelFlags::COMPUTE_SHADERS));
    all.sort_by_key(|a| rank(a.get_info().device_type));
    all
}

/// The adapters of this machine, best first.
pub fn adapters() -> Vec<Adapter> {
    all().iter().map(Adapter::of).collect()
}

/// The best adapter of those that will do.
pub(crate) fn choose(choice: Choice) -> Result<wgpu::Adapter, GpuError> {
    let all = all();
    let seen: Vec<String> = all.iter().map(|a| Adapter::of(a).to_string()).collect();
    let will_do = |a: &wgpu::Adapter| choice == Choice::Any || Adapter::of(a).hardware;
    all.into_iter().find(will_do).ok_or_else(|| {
        GpuError::NoAdapter(if seen.is_empty() {
            "no Vulkan, Metal or DX12 driver offers one: install the driver, or compute with --backend cpu".into()
        } else {
            format!("only {} is there, in software", seen.join(", "))
        })
    })
}

/// What to ask of an adapter: what the kernels need everywhere, with its own bounds on buffers.
pub(crate) fn limits(adapter: &wgpu::Adapter) -> Limits {
    let has = adapter.limits();
    Limits {
        max_storage_buffer_binding_size: has.max_storage_buffer_binding_size,
        max_buffer_size: has.max_buffer_size,
        ..Limits::downlevel_defaults()
    }
}
