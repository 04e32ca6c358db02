//! The kernels of gates: which WGSL files make one up, and their pipelines.

use std::collections::HashMap;

use crate::device::{Device, bindings};
use crate::error::GpuError;

/// Bytes between the parameters of two kernels, a multiple of what every adapter asks for.
pub(super) const SLOT: usize = 256;

/// Threads of a workgroup.
pub(super) const THREADS: usize = 64;

/// One kernel, named like its file in `wgsl/gates`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Gate {
    Mask,
    Unmask,
    Pack,
    Truncate,
    Rescale,
    Gather,
    Scatter,
    Exp,
    ExpFlags,
    Cosine,
    Copy,
    Gain,
    RowSum,
    PadKeys,
    Broadcast,
    Variance,
    Squares,
    Residual,
    Join,
    Tails,
    RowMax,
    And,
    CountClear,
    FlagRescale,
    Reached,
    Turn,
    Rotate,
    Hadamard,
}

impl Gate {
    /// All that there are.
    #[cfg(test)]
    const ALL: &[Gate] = &[
        Gate::Mask,
        Gate::Unmask,
        Gate::Pack,
        Gate::Truncate,
        Gate::Rescale,
        Gate::Gather,
        Gate::Scatter,
        Gate::Exp,
        Gate::ExpFlags,
        Gate::Cosine,
        Gate::Copy,
        Gate::Gain,
        Gate::RowSum,
        Gate::PadKeys,
        Gate::Broadcast,
        Gate::Variance,
        Gate::Squares,
        Gate::Residual,
        Gate::Join,
        Gate::Tails,
        Gate::RowMax,
        Gate::And,
        Gate::CountClear,
        Gate::FlagRescale,
        Gate::Reached,
        Gate::Turn,
        Gate::Rotate,
        Gate::Hadamard,
    ];

    fn own(self) -> &'static str {
        match self {
            Gate::Mask => include_str!("../../wgsl/gates/mask.wgsl"),
            Gate::Unmask => include_str!("../../wgsl/gates/unmask.wgsl"),
            Gate::Pack => include_str!("../../wgsl/gates/pack.wgsl"),
            Gate::Truncate => include_str!("../../wgsl/gates/truncate.wgsl"),
            Gate::Rescale => include_str!("../../wgsl/gates/rescale.wgsl"),
            Gate::Gather => include_str!("../../wgsl/gates/gather.wgsl"),
            Gate::Scatter => include_str!("../../wgsl/gates/scatter.wgsl"),
            Gate::Exp => include_str!("../../wgsl/gates/exp.wgsl"),
            Gate::ExpFlags => include_str!("../../wgsl/gates/exp_flags.wgsl"),
            Gate::Cosine => include_str!("../../wgsl/gates/cosine.wgsl"),
            Gate::Copy => include_str!("../../wgsl/gates/copy.wgsl"),
            Gate::Gain => include_str!("../../wgsl/gates/gain.wgsl"),
            Gate::RowSum => include_str!("../../wgsl/gates/row_sum.wgsl"),
            Gate::PadKeys => include_str!("../../wgsl/gates/pad_keys.wgsl"),
            Gate::Broadcast => include_str!("../../wgsl/gates/broadcast.wgsl"),
            Gate::Variance => include_str!("../../wgsl/gates/variance.wgsl"),
            Gate::Squares => include_str!("../../wgsl/gates/squares.wgsl"),
            Gate::Residual => include_str!("../../wgsl/gates/residual.wgsl"),
            Gate::Join => include_str!("../../wgsl/gates/join.wgsl"),
            Gate::Tails => include_str!("../../wgsl/gates/tails.wgsl"),
            Gate::RowMax => include_str!("../../wgsl/gates/row_max.wgsl"),
            Gate::And => include_str!("../../wgsl/gates/and.wgsl"),
            Gate::CountClear => include_str!("../../wgsl/gates/count_clear.wgsl"),
            Gate::FlagRescale => include_str!("../../wgsl/gates/flag_rescale.wgsl"),
            Gate::Reached => include_str!("../../wgsl/gates/reached.wgsl"),
            Gate::Turn => include_str!("../../wgsl/gates/turn.wgsl"),
            Gate::Rotate => include_str!("../../wgsl/gates/rotate.wgsl"),
            Gate::Hadamard => include_str!("../../wgsl/gates/hadamard.wgsl"),
        }
    }

    /// Whether a workgroup, and not a thread, is for each of the first parameter.
    pub(super) fn by_rows(self) -> bool {
        matches!(
            self,
            Gate::Exp
                | Gate::Gain
                | Gate::RowSum
                | Gate::PadKeys
                | Gate::Variance
                | Gate::Squares
                | Gate::Residual
                | Gate::RowMax
                | Gate::CountClear
                | Gate::Reached
        )
    }

    /// Its WGSL, with 64-bit integers or without; declarations may come in any order.
    fn source(self, int64: bool) -> String {
        let word = match int64 {
            true => include_str!("../../wgsl/gates/word_native.wgsl"),
            false => include_str!("../../wgsl/gates/word_pair.wgsl"),
        };
        let shared = [
            word,
            include_str!("../../wgsl/gates/memory.wgsl"),
            include_str!("../../wgsl/gates/words.wgsl"),
            include_str!("../../wgsl/gates/grid.wgsl"),
        ];
        let head = match self {
            Gate::Exp | Gate::ExpFlags => include_str!("../../wgsl/gates/exp_head.wgsl"),
            _ => "",
        };
        let main = match self.by_rows() {
            true => include_str!("../../wgsl/gates/rows.wgsl"),
            false => include_str!("../../wgsl/gates/threads.wgsl"),
        };
        [&shared[..], &[main, head, self.own()]].concat().join("\n")
    }
}

/// The pipelines of a device.
pub(crate) struct Gates {
    pub bindings: wgpu::BindGroupLayout,
    pipelines: HashMap<(Gate, bool), wgpu::ComputePipeline>,
}

impl Gates {
    pub(crate) fn new(device: &wgpu::Device) -> Gates {
        let bindings = bindings(device, true, [false, true, true, false]);
        Gates { bindings, pipelines: HashMap::new() }
    }
}

/// A gate's pipeline, compiled when it is first asked for.
pub(super) fn pipeline(device: &mut Device, gate: Gate) -> Result<wgpu::ComputePipeline, GpuError> {
    let int64 = device.int64;
    if let Some(known) = device.gates.pipelines.get(&(gate, int64)) {
        return Ok(known.clone());
    }
    let new = device.compile(gate.source(int64), &device.gates.bindings)?;
    device.gates.pipelines.insert((gate, int64), new.clone());
    Ok(new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use wgpu::naga::front::wgsl;
    use wgpu::naga::valid::{Capabilities, ValidationFlags, Validator};

    /// Without an adapter: every kernel parses, is valid with no more than the features it is used with, and its parameters
    /// fit their place.
    #[test]
    fn every_kernel_is_valid() {
        assert!(Gate::ALL.iter().enumerate().all(|(i, gate)| *gate as usize == i));
        assert_eq!(Gate::ALL.last(), Some(&Gate::Hadamard));
        for (gate, int64) in Gate::ALL.iter().flat_map(|gate| [(*gate, false), (*gate, true)]) {
            let source = gate.source(int64);
            let module = wgsl::parse_str(&source).unwrap_or_else(|e| panic!("{gate:?}: {}", e.emit_to_string(&source)));
            let mut needs = Capabilities::empty();
            needs.set(Capabilities::SHADER_INT64, int64);
            let valid = Validator::new(ValidationFlags::all(), needs).validate(&module);
            valid.unwrap_or_else(|e| panic!("{gate:?}: {}", e.emit_to_string(&source)));
            let mut layouter = wgpu::naga::proc::Layouter::default();
            layouter.update(module.to_ctx()).unwrap();
            let own = module.global_variables.iter().find(|(_, v)| v.space == wgpu::naga::AddressSpace::Uniform);
            assert!(layouter[own.unwrap().1.ty].to_stride() as usize <= SLOT, "{gate:?}");
            assert_eq!(module.entry_points[0].workgroup_size, [THREADS as u32, 1, 1]);
        }
    }
}
