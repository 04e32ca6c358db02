//! An evaluator whose values are on a device: the processor draws and receives words, the device computes all that lies
//! between two openings.
//!
//! A row's function of wide range ([`crate::gates::spline`]) is made by the processor, which has opened words and the cipher; the device is fed its
//! share.
//!
//! Who sees what: the device belongs to the evaluator and holds what its memory would. Messages are those of an evaluation on
//! the processor, byte for byte; how the device is fed depends on shapes only.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use crate::backend::{Evaluation, Part};
use crate::gates::parts::Parts;
use crate::gates::{Masked, Take, index, seeded};
use crate::prg::{Prg, StepPrg, Words};
use crate::program::{Id, Kind, Op, Program};
use crate::ring::{check_packed, mask, packed_len, unpack};
use crate::wipe::{Wiped, wipe};
use crate::{Error, EvaluatorIo, Role};

/// Words in bytes that a device is fed: word `i` is the `bits` bits from bit `8 at + stride i` on, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// First byte, a multiple of four.
    pub at: usize,
    /// Bits from one word to the next: those of the ring where words were received, of a keystream's where they are drawn.
    pub stride: u32,
    /// Ring of the words.
    pub bits: u32,
}

/// Operations up to an opening and with it, or from the last one to the program's end, and what a device is fed for them.
#[derive(Debug)]
pub struct Segment {
    /// The operations.
    pub steps: Range<usize>,
    /// What the other evaluator sent of each value opened at the end of the segment before.
    pub opened: Vec<Source>,
    /// Of each operation, this evaluator's halves of what is dealt; of one that the processor computes, its share.
    pub dealt: Vec<Vec<Source>>,
    /// This evaluator's halves of the masks of each value that is opened.
    pub masks: Vec<Source>,
    /// Bytes in all. A word's last bits may be read together with up to eight bytes after them, which are there.
    pub bytes: usize,
}

/// Bytes that are read beside those of the last word.
const BEYOND: usize = 8;

/// The segments of a program, for one evaluator.
pub fn segments(p: &Program, role: Role) -> Vec<Segment> {
    let mut all = Vec::new();
    let (mut start, mut opened): (usize, &[Id]) = (0, &[]);
    let opens = |step: usize| matches!(p.ops[step].kind, Kind::Open);
    let mut ends: Vec<usize> = (1..=p.ops.len()).filter(|end| opens(end - 1)).collect();
    // What comes after the last opening, if only what the other evaluator sent.
    ends.push(p.ops.len());
    for end in ends {
        let mut at = 0;
        let mut place = |len: usize, bits: u32, drawn: bool| {
            let stride = if drawn { 8 * Words::width(bits) as u32 } else { bits };
            let source = Source { at, stride, bits };
            at = (at + packed_len(len, stride)).next_multiple_of(4);
            source
        };
        let value = |v: &Id| (p.values[*v].len(), p.values[*v].bits);
        let opened_now = opened.iter().map(value).map(|(len, bits)| place(len, bits, false)).collect();
        let dealt = (start..end).map(|step| {
            if let Kind::Spline(g) = &p.ops[step].kind {
                return vec![place(g.rows, 64, false)];
            }
            let tensors = p.ops[step].kind.dealt().into_iter().enumerate();
            let drawn = |slot: usize| seeded(step as u32, slot as u32) == index(role);
            tensors.map(|(slot, (len, bits))| place(len, bits, drawn(slot))).collect()
        });
        let dealt = dealt.collect();
        opened = if end > start && opens(end - 1) { &p.ops[end - 1].inputs } else { &[] };
        let masks = opened.iter().map(value).map(|(len, bits)| place(len, bits, true)).collect();
        all.push(Segment { steps: start..end, opened: opened_now, dealt, masks, bytes: at + BEYOND });
        start = end;
    }
    all
}

/// What a value is held as: a share, or masked words with a half of the mask. Wiped when dropped.
#[derive(Default)]
pub(super) struct Held {
    pub share: Vec<u64>,
    pub masked: Masked,
}

impl Drop for Held {
    fn drop(&mut self) {
        wipe(&mut self.share);
        self.masked.wipe();
    }
}

/// Evaluates a program on a device from the values that are there at its start. Returns the output's share and, of what the
/// program leaves, shares or masked words.
pub(super) fn evaluate(
    p: &Program,
    role: Role,
    mut prg: Prg,
    start: Vec<(Id, Held)>,
    device: &mut dyn Evaluation,
    io: &mut dyn EvaluatorIo,
) -> Result<(Vec<u64>, Vec<Held>), Error> {
    let mut masked = vec![false; p.values.len()];
    for (v, held) in start {
        let all = [(Part::Share, &held.share), (Part::Masked, &held.masked.m), (Part::Mask, &held.masked.l)];
        all.into_iter().filter(|(_, w)| !w.is_empty()).try_for_each(|(part, w)| device.put(v, part, w))?;
        masked[v] = !held.masked.m.is_empty();
    }
    let mut received = Vec::new();
    let mut opened = HashMap::new();
    let spline = |op: &Op| matches!(op.kind, Kind::Spline(_)).then(|| op.inputs[0]);
    let read: HashSet<Id> = p.ops.iter().filter_map(spline).collect();
    let parts = Parts::new(io.backend().threads());
    let all = segments(p, role);
    // One place for all: what lies between the words that are fed is of no account.
    let mut fed = Wiped::new(vec![0; all.iter().map(|s| s.bytes).max().unwrap_or(0)]);
    for (i, segment) in all.into_iter().enumerate() {
        let fed = &mut fed[..segment.bytes];
        let from = From { p, role, received: &received, opened: &opened, parts: &parts };
        from.feed(&mut prg, &segment, fed, io)?;
        let message = device.run(i, fed)?;
        let Some(last) = segment.steps.last() else { break };
        let op = &p.ops[last];
        if !matches!(op.kind, Kind::Open) {
            break;
        }
        op.outputs.iter().for_each(|v| masked[*v] = true);
        // The message goes, so what is read of it is read before.
        let mut own = HashMap::new();
        let mut rest = message.as_slice();
        for (v, out) in op.inputs.iter().zip(&op.outputs) {
            let (f, head) = (&p.values[*v], rest);
            let len = packed_len(f.len(), f.bits);
            rest = &head[len..];
            if read.contains(out) {
                own.insert(*out, unpack(&head[..len], f.len(), f.bits)?);
            }
        }
        received = super::exchange(last as u32, message, io)?;
        let mut rest = received.as_slice();
        for (v, out) in op.inputs.iter().zip(&op.outputs) {
            let f = &p.values[*v];
            let head;
            (head, rest) = rest.split_at(packed_len(f.len(), f.bits));
            check_packed(head, f.len(), f.bits)?;
            if let Some(mut m) = own.remove(out) {
                let other = unpack(head, f.len(), f.bits)?;
                m.iter_mut().zip(other).for_each(|(m, o)| *m = m.wrapping_add(o) & mask(f.bits));
                opened.insert(*out, m);
            }
        }
    }
    // What is put in order only is masked like what it is made of.
    for op in p.ops.iter().filter(|op| matches!(op.kind, Kind::Append)) {
        op.outputs.iter().for_each(|v| masked[*v] = true);
    }
    let mut left = |v: &Id| -> Result<Held, Error> {
        let mut held = Held::default();
        if masked[*v] {
            held.masked.m = device.get(*v, Part::Masked)?;
            held.masked.l = device.get(*v, Part::Mask)?;
        } else {
            held.share = device.get(*v, Part::Share)?;
        }
        Ok(held)
    };
    let kept = p.carried[1].iter().map(&mut left).collect::<Result<_, _>>()?;
    Ok((device.get(p.output, Part::Share)?, kept))
}

/// What a device is fed from.
struct From<'a> {
    p: &'a Program,
    role: Role,
    /// What the other evaluator sent of the last opening.
    received: &'a [u8],
    /// Masked words of what the processor computes with.
    opened: &'a HashMap<Id, Vec<u64>>,
    parts: &'a Parts,
}

impl From<'_> {
    /// Writes what a device is fed for a segment.
    fn feed(&self, prg: &mut Prg, segment: &Segment, fed: &mut [u8], io: &mut dyn EvaluatorIo) -> Result<(), Error> {
        let (p, role, mut rest) = (self.p, self.role, self.received);
        let opened = segment.steps.start.checked_sub(1).map_or(&[][..], |step| &p.ops[step].inputs);
        for (source, v) in segment.opened.iter().zip(opened) {
            let head;
            (head, rest) = rest.split_at(packed_len(p.values[*v].len(), source.bits));
            fed[source.at..][..head.len()].copy_from_slice(head);
        }
        for (step, sources) in segment.steps.clone().zip(&segment.dealt) {
            let op = &p.ops[step];
            let mut drawn = prg.step(step as u32)?;
            if matches!(op.kind, Kind::Open) {
                for (slot, (source, v)) in segment.masks.iter().zip(&op.inputs).enumerate() {
                    draw(&mut drawn, slot, *source, p.values[*v].len(), fed)?;
                }
                continue;
            }
            let message = super::dealt(p, step, role, io)?;
            if let Kind::Spline(g) = &op.kind {
                let missing = || Error::Device(format!("step {step} reads a value that was never opened"));
                let m = self.opened.get(&op.inputs[0]).ok_or_else(missing)?;
                let mut take = Take::new(drawn, role, &message).by(self.parts.clone());
                let share = Wiped::new(g.eval(&mut take, m)?);
                let to = fed[sources[0].at..].as_chunks_mut().0;
                to.iter_mut().zip(share.iter()).for_each(|(to, word)| *to = word.to_le_bytes());
                continue;
            }
            let mut rest = message.as_slice();
            for (slot, (source, (len, bits))) in sources.iter().zip(op.kind.dealt()).enumerate() {
                if seeded(step as u32, slot as u32) == index(role) {
                    draw(&mut drawn, slot, *source, len, fed)?;
                    continue;
                }
                let head;
                (head, rest) = rest.split_at(packed_len(len, bits));
                check_packed(head, len, bits)?;
                fed[source.at..][..head.len()].copy_from_slice(head);
            }
        }
        Ok(())
    }
}

/// The keystream of a slot.
fn draw(prg: &mut StepPrg, slot: usize, source: Source, len: usize, fed: &mut [u8]) -> Result<(), Error> {
    let bytes = len * Words::width(source.bits);
    prg.words(slot as u32, source.bits)?.bytes(&mut fed[source.at..][..bytes]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::{pack, word_at};

    #[test]
    fn drawn_and_received_words_are_read_alike() {
        let key = crate::prg::SessionKey::from_seed([9; 32]);
        for bits in 1..=64 {
            let mut want = [0; 21];
            Prg::new(&key).fill(3, 1, bits, &mut want).unwrap();
            let mut fed = vec![0; 21 * Words::width(bits) + BEYOND];
            let source = Source { at: 0, stride: 8 * Words::width(bits) as u32, bits };
            draw(&mut Prg::new(&key).step(3).unwrap(), 1, source, 21, &mut fed).unwrap();
            let packed = pack(&want, bits);
            for (i, want) in want.into_iter().enumerate() {
                assert_eq!(word_at(&fed, source.stride, i) & crate::ring::mask(bits), want);
                assert_eq!(word_at(&packed, bits, i), want);
            }
        }
    }
}
