//! A program as a device computes it: dispatches for each segment, and where everything lies. Depends on shapes only.

use tacet_protocol::backend::Part;
use tacet_protocol::program::{Id, Kind, Op, Program};
use tacet_protocol::ring::packed_len;
use tacet_protocol::run::{Segment, segments};
use tacet_protocol::{Error, Role};

use super::WORD;
use super::arena::Arena;
use super::gate::Gate;
use super::lower::{At, Lowered, Places, Unfit, Ways, half, lower};

/// A packed part of a message: its place in the arena, and bytes.
pub(super) type Packed = (usize, usize);

/// One evaluator's side of a program.
pub(super) struct Compiled {
    /// Of each segment, where its dispatches end, and what it sends.
    pub segments: Vec<(usize, Vec<Packed>)>,
    pub lowered: Lowered,
    /// Words of the arena.
    pub arena: usize,
    /// Most bytes that are fed.
    pub fed: usize,
    places: Vec<Places>,
    /// Words of each value.
    pub lens: Vec<usize>,
}

impl Compiled {
    /// Place and number of a value's words.
    pub fn place(&self, v: Id, part: Part) -> Result<(usize, usize), Error> {
        let p = &self.places[v];
        let at = match part {
            Part::Share => p.share,
            Part::Masked => p.masked,
            Part::Mask => p.mask,
        };
        let missing = || Error::Device(format!("value {v} of the program is not kept as {part:?}"));
        Ok((at.ok_or_else(missing)?, self.lens[v]))
    }

    /// Where no buffer may have more than so many bytes.
    pub fn new(p: &Program, role: Role, most: usize, ways: &dyn Ways) -> Result<Compiled, Unfit> {
        let segments = segments(p, role);
        let fed = segments.iter().map(|s| s.bytes).max().unwrap_or(0);
        let largest = p.values.iter().map(|v| v.len() * WORD).max().unwrap_or(0);
        // Before anything is made of what could not be used.
        if fed.max(largest) > most {
            return Err(Unfit);
        }
        let last = p.last_use();
        let mut c = Compiler {
            p,
            leads: role == Role::E1,
            ways,
            arena: Arena::default(),
            places: vec![Places::default(); p.values.len()],
            gone: vec![false; p.values.len()],
            lowered: Lowered::default(),
        };
        // Brought from outside: shares, and what was left in whichever form.
        for v in p.inputs() {
            c.places[v].share = c.take(v);
        }
        for &v in &p.carried()[0] {
            c.places[v] = c.all_of(v);
        }
        let mut ends = Vec::with_capacity(segments.len());
        for (i, segment) in segments.iter().enumerate() {
            let opened: &[Id] = match i.checked_sub(1) {
                Some(before) => &p.ops[segments[before].steps.end - 1].outputs,
                None => &[],
            };
            for (v, source) in opened.iter().zip(&segment.opened) {
                let (m, [at, form]) = (c.places[*v].masked.unwrap_or_default() as u32, half(*source));
                let f = &p.values[*v];
                c.lowered.gate(Gate::Unmask, f.len(), &[m, f.bits, u32::from(f.xor), at, form]);
            }
            let mut packed = Vec::new();
            for step in segment.steps.clone() {
                let op = &p.ops[step];
                packed = c.operation(op, step, segment)?;
                for v in op.inputs.iter().chain(&op.outputs).filter(|v| last[**v] == step && **v != p.output()) {
                    c.forget(*v);
                }
            }
            ends.push((c.lowered.commands.len(), packed));
        }
        let lens = p.values.iter().map(|v| v.len()).collect();
        let sizes = [c.arena.len() * WORD, 4 * c.lowered.tables.len()];
        if sizes.into_iter().chain(c.lowered.operands).any(|bytes| bytes > most) {
            return Err(Unfit);
        }
        Ok(Compiled { segments: ends, arena: c.arena.len(), places: c.places, lowered: c.lowered, fed, lens })
    }
}

struct Compiler<'a> {
    p: &'a Program,
    leads: bool,
    ways: &'a dyn Ways,
    arena: Arena,
    places: Vec<Places>,
    gone: Vec<bool>,
    lowered: Lowered,
}

impl Compiler<'_> {
    fn take(&mut self, v: Id) -> Option<usize> {
        Some(self.arena.take(self.p.values[v].len()))
    }

    /// Of a value that another program left, what its readers need: what no operation reads may have been left as either.
    fn all_of(&mut self, v: Id) -> Places {
        let readers = || self.p.ops.iter().filter(|op| op.inputs.contains(&v));
        let shares = readers().any(|op| matches!(op.kind, Kind::Marks { .. } | Kind::PadKeys(_)));
        let masked = readers().any(|op| !matches!(op.kind, Kind::Marks { .. } | Kind::PadKeys(_)));
        let mut take = |wanted: bool| wanted.then(|| self.take(v)).flatten();
        Places { share: take(shares || !masked), masked: take(masked || !shares), mask: take(masked || !shares) }
    }

    /// The place stays known: what has been read for the last time is left as it is until another value needs the room.
    fn forget(&mut self, v: Id) {
        // An operation may read a value twice.
        if std::mem::replace(&mut self.gone[v], true) {
            return;
        }
        let Places { share, masked, mask } = self.places[v];
        [share, masked, mask].into_iter().flatten().for_each(|at| self.arena.give(at, self.p.values[v].len()));
    }

    fn operation(&mut self, op: &Op, step: usize, segment: &Segment) -> Result<Vec<Packed>, Unfit> {
        match op.kind {
            Kind::Open => return Ok(self.open(op, segment)),
            Kind::Input => return Ok(Vec::new()),
            Kind::Append => {
                self.append(op);
                return Ok(Vec::new());
            }
            _ => {}
        }
        for v in &op.outputs {
            self.places[*v] = Places { share: self.take(*v), ..Places::default() };
        }
        let of = |ids: &[Id]| ids.iter().map(|v| self.places[*v]).collect();
        let dealt = segment.dealt[step - segment.steps.start].clone();
        let (p, leads, inputs, outputs) = (self.p, self.leads, of(&op.inputs), of(&op.outputs));
        lower(&mut self.lowered, &At { p, op, step, inputs, outputs, dealt, leads }, self.ways)?;
        Ok(Vec::new())
    }

    /// Masked words and masks of one value after those of another.
    fn append(&mut self, op: &Op) {
        let out = op.outputs[0];
        let (m, l) = (self.take(out), self.take(out));
        self.places[out] = Places { share: None, masked: m, mask: l };
        let mut at = 0;
        for v in &op.inputs {
            let (len, from) = (self.p.values[*v].len(), self.places[*v]);
            for (from, to) in [(from.masked, m), (from.mask, l)] {
                let [from, to] = [from, to].map(|place| place.unwrap_or_default() as u32);
                self.lowered.gate(Gate::Copy, len, &[0, 0, from, to + at]);
            }
            at += len as u32;
        }
    }

    fn open(&mut self, op: &Op, segment: &Segment) -> Vec<Packed> {
        let mut packed = Vec::with_capacity(op.inputs.len());
        for ((v, out), source) in op.inputs.iter().zip(&op.outputs).zip(&segment.masks) {
            let f = &self.p.values[*v];
            let words = (f.len() * f.bits as usize).div_ceil(64);
            let (m, l, to) = (self.arena.take(f.len()), self.arena.take(f.len()), self.arena.take(words));
            self.places[*out] = Places { share: None, masked: Some(m), mask: Some(l) };
            let [x, at_m, at_l] = [self.places[*v].share.unwrap_or_default(), m, l].map(|at| at as u32);
            let [at, form] = half(*source);
            let lowered = &mut self.lowered;
            lowered.gate(Gate::Mask, f.len(), &[x, at_m, at_l, f.bits, u32::from(f.xor), at, form]);
            lowered.gate(Gate::Pack, words, &[f.len() as u32, at_m, to as u32, f.bits]);
            packed.push((to, packed_len(f.len(), f.bits)));
        }
        // They are read before any other kernel writes.
        packed.iter().for_each(|(to, bytes)| self.arena.give(*to, bytes.div_ceil(8)));
        packed
    }
}
