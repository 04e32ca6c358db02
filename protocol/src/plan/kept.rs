//! Plans of large models, kept on disk between starts.
//!
//! To plan a model of billions of weights takes minutes: its matrices' norms are bounded closely. The result is a function of
//! the checkpoint and of this code alone, so a role may read what it wrote itself. A file counts only where its hash covers the
//! checkpoint's digest and that of the running program's file, so no other model's plan and none of another release is ever
//! taken; a file that is damaged or cut short is as good as none. Every weight is covered too. Nothing in a plan is secret,
//! and it is as trusted as the checkpoint and the program beside which it lies: whoever may write to the folder could as well
//! change these. A party whose plan is another one than its peers' is found by the program's digest, as ever.
//!
//! A file is the packed weights, layer after layer, then all the rest, its length, and the hash.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::decoder::{DecoderPlanner, Keep};
use super::layer::BlockPlan;
use super::norm::PreNorm;
use super::rows::{Wide, weights_in_blocks};
use crate::gemm::Packed;
use crate::hex;
use crate::model::decoder::Config;

/// Weights in blocks from which on planning takes longer than it takes to read a plan.
const LEAST: usize = 1 << 28;
/// Bytes of the length and the hash at a file's end.
const END: u64 = 8 + 32;
/// How long a file may be in the making.
const UNFINISHED: Duration = Duration::from_secs(3600);

/// A folder of plans.
#[derive(Clone, Debug)]
pub struct Shelf {
    dir: PathBuf,
    least: usize,
}

/// What planning tells while it goes on.
#[derive(Debug)]
pub enum Progress<'a> {
    /// So many blocks of so many are planned.
    Planned(usize, usize),
    /// This file had the plan.
    Found(&'a Path),
    /// This file has the plan from now on.
    Kept(&'a Path),
    /// The plan is not kept in this folder, which is only slower.
    NotKept(&'a Path, &'a io::Error),
}

/// All of a plan but the weights; its larger parts are borrowed where it is written.
#[derive(Serialize, Deserialize)]
struct Rest<Blocks, Norm, Head> {
    longest: usize,
    blocks: Blocks,
    last_norm: Norm,
    head: Head,
    k: u32,
    embedded: f64,
    /// None where the plan was made without them.
    weights: Vec<(Packed, [u8; 32])>,
}

type Owned = Rest<Vec<BlockPlan>, PreNorm, Wide>;

impl Shelf {
    /// Plans in `dir`, which is made when the first is kept.
    pub fn new(dir: impl Into<PathBuf>) -> Shelf {
        Shelf { dir: dir.into(), least: LEAST }
    }

    /// Whether a model is so large that its plan is kept.
    pub(super) fn takes(&self, c: &Config) -> bool {
        weights_in_blocks(c) >= self.least
    }

    /// The folder.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    fn file(&self, model: &[u8; 32], build: &[u8; 32]) -> PathBuf {
        self.dir.join(format!("{}-{}.plan", hex(&model[..16]), hex(&build[..8])))
    }

    /// The plan that is kept of a model, with weights where they are asked for, and its file.
    pub(super) fn find(&self, c: &Config, model: [u8; 32], keep: Keep) -> Option<(DecoderPlanner, PathBuf)> {
        let build = build()?;
        let path = self.file(&model, &build);
        let mut file = File::open(&path).ok()?;
        let len = file.metadata().ok()?.len();
        file.seek(SeekFrom::Start(len.checked_sub(END)?)).ok()?;
        let (mut rest_len, mut hash) = ([0; 8], [0; 32]);
        file.read_exact(&mut rest_len).ok()?;
        file.read_exact(&mut hash).ok()?;
        let rest_len = u64::from_le_bytes(rest_len);
        let packed = (len - END).checked_sub(rest_len)?;
        file.seek(SeekFrom::Start(packed)).ok()?;
        let mut rest = vec![0; usize::try_from(rest_len).ok()?];
        file.read_exact(&mut rest).ok()?;
        if covering(&model, &build, &rest) != hash {
            return None;
        }
        let rest: Owned = postcard::from_bytes(&rest).ok()?;
        let Rest { longest, blocks, last_norm, head, k, embedded, weights } = rest;
        let mut p = DecoderPlanner { config: c.clone(), longest, blocks, last_norm, head, k, embedded, model };
        if keep == Keep::Weights {
            file.rewind().ok()?;
            let mut file = BufReader::with_capacity(1 << 20, file);
            let mut layers = layers(&mut p);
            if weights.len() != layers.len() {
                return None;
            }
            for (wide, (packed, hash)) in layers.iter_mut().zip(weights) {
                let mut hashed = Hashed { inner: &mut file, hash: Sha256::new() };
                let weights = packed.read(&mut hashed).ok()?;
                if <[u8; 32]>::from(hashed.hash.finalize()) != hash {
                    return None;
                }
                Arc::get_mut(&mut wide.layer.linear)?.weights = Some(weights);
            }
        }
        Some((p, path))
    }

    /// Writes a plan in place of those of the same model that other releases wrote; one without weights only where there is
    /// none, since another role may have kept one with them meanwhile.
    pub(super) fn keep(&self, p: &mut DecoderPlanner) -> io::Result<PathBuf> {
        let build = build().ok_or_else(|| io::Error::other("the running program's file cannot be read"))?;
        let path = self.file(&p.model, &build);
        if p.head.layer.linear.weights.is_none() && self.find(&p.config, p.model, Keep::Shapes).is_some() {
            return Ok(path);
        }
        make_dir(&self.dir)?;
        self.clear(&p.model, &path)?;
        let unfinished = path.with_extension(format!("{}.tmp", std::process::id()));
        let written = write(&unfinished, p, &build).and_then(|()| fs::rename(&unfinished, &path));
        if written.is_err() {
            let _ = fs::remove_file(&unfinished);
        }
        written.map(|()| path)
    }

    /// Removes what other releases kept of a model, and what was begun and never finished.
    fn clear(&self, model: &[u8; 32], path: &Path) -> io::Result<()> {
        let begins = hex(&model[..16]);
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let (name, other) = (entry.file_name(), entry.path());
            let of_model = name.to_str().is_some_and(|n| n.starts_with(&begins));
            let old = |m: fs::Metadata| m.modified().ok()?.elapsed().ok().map(|age| age > UNFINISHED);
            let unfinished = other.extension().is_some_and(|e| e == "tmp");
            if of_model && other != path && (!unfinished || entry.metadata().ok().and_then(old) == Some(true)) {
                fs::remove_file(other)?;
            }
        }
        Ok(())
    }
}

/// Readable by this user alone: nothing in it is secret, but nobody else should write there.
fn make_dir(dir: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.recursive(true).create(dir)
}

fn write(path: &Path, p: &mut DecoderPlanner, build: &[u8; 32]) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
    let mut weights = Vec::new();
    for wide in layers(p) {
        let Some(w) = &wide.layer.linear.weights else { continue };
        let mut hashed = Hashed { inner: &mut out, hash: Sha256::new() };
        w.write(&mut hashed)?;
        weights.push((w.packed(), hashed.hash.finalize().into()));
    }
    let DecoderPlanner { longest, blocks, last_norm, head, k, embedded, model, .. } = &*p;
    let (longest, k, embedded) = (*longest, *k, *embedded);
    let rest = Rest { longest, blocks, last_norm, head, k, embedded, weights };
    let rest = postcard::to_allocvec(&rest).map_err(io::Error::other)?;
    out.write_all(&rest)?;
    out.write_all(&(rest.len() as u64).to_le_bytes())?;
    out.write_all(&covering(model, build, &rest))?;
    out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
}

/// Every public layer, in the order of their weights in a file.
fn layers(p: &mut DecoderPlanner) -> Vec<&mut Wide> {
    let mut all: Vec<&mut Wide> = Vec::new();
    for b in &mut p.blocks {
        all.extend([&mut b.query.wide, &mut b.key.wide, &mut b.values, &mut b.output, &mut b.mlp.act]);
        all.extend(b.mlp.times.as_mut());
        all.push(&mut b.mlp.down);
    }
    all.push(&mut p.head);
    all
}

fn covering(model: &[u8; 32], build: &[u8; 32], rest: &[u8]) -> [u8; 32] {
    let hash = Sha256::new().chain_update(b"tacet plan 1\0").chain_update(model).chain_update(build);
    hash.chain_update(rest).finalize().into()
}

/// The digest of the running program's file: other code may plan otherwise.
fn build() -> Option<[u8; 32]> {
    let mut file = File::open(std::env::current_exe().ok()?).ok()?;
    let mut hashed = Hashed { inner: &mut file, hash: Sha256::new() };
    io::copy(&mut hashed, &mut io::sink()).ok()?;
    Some(hashed.hash.finalize().into())
}

/// Hashes what passes.
struct Hashed<'a, T> {
    inner: &'a mut T,
    hash: Sha256,
}

impl<T: Read> Read for Hashed<'_, T> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(to)?;
        self.hash.update(&to[..n]);
        Ok(n)
    }
}

impl<T: Write> Write for Hashed<'_, T> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(from)?;
        self.hash.update(&from[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::decoder::Checkpoint;

    fn model() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors/qwen3")
    }

    /// A folder of this test's own.
    fn shelf(name: &str) -> Shelf {
        let dir = std::env::temp_dir().join(format!("tacet-plans-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        Shelf { dir, least: 0 }
    }

    /// What the planner's programs and weights come to.
    fn all(p: &mut DecoderPlanner) -> (Vec<[u8; 32]>, Vec<Option<Vec<u8>>>) {
        let digests = [8, 16].map(|n| p.program(true, 0, n, false).unwrap().digest()).to_vec();
        let bytes = |w: &crate::gemm::Weights| {
            let mut out = Vec::new();
            w.write(&mut out).unwrap();
            out
        };
        (digests, layers(p).into_iter().map(|w| w.layer.linear.weights.as_ref().map(bytes)).collect())
    }

    fn load(shelf: &Shelf, keep: Keep) -> (DecoderPlanner, Vec<String>) {
        let told = std::sync::Mutex::new(Vec::new());
        let (p, _) = DecoderPlanner::load(&model(), keep, Some(shelf), &|p| {
            let text = match p {
                Progress::Planned(..) => "planned",
                Progress::Found(_) => "found",
                Progress::Kept(_) => "kept",
                Progress::NotKept(..) => "not kept",
            };
            told.lock().unwrap().push(text.to_string());
        })
        .unwrap();
        let mut told = told.into_inner().unwrap();
        told.dedup();
        (p, told)
    }

    #[test]
    fn what_is_read_is_what_was_planned() {
        let shelf = shelf("same");
        let (mut want, embedding) = DecoderPlanner::read(Checkpoint::open(&model()).unwrap(), Keep::Weights).unwrap();
        let (mut first, told) = load(&shelf, Keep::Shapes);
        assert_eq!(told, ["planned", "kept"]);
        assert!(all(&mut first).1.iter().all(Option::is_none));
        // One without weights does for whoever needs none, and is replaced by one with them.
        assert_eq!(load(&shelf, Keep::Shapes).1, ["found"]);
        assert_eq!(load(&shelf, Keep::Weights).1, ["planned", "kept"]);
        let (mut again, told) = load(&shelf, Keep::Weights);
        assert_eq!(told, ["found"]);
        assert!(all(&mut want) == all(&mut again));
        let (mut shapes, told) = load(&shelf, Keep::Shapes);
        assert_eq!(told, ["found"]);
        assert!(all(&mut shapes) == all(&mut first));
        // Who planned without weights beside one who kept some leaves those.
        shelf.keep(&mut shapes).unwrap();
        assert_eq!(load(&shelf, Keep::Weights).1, ["found"]);
        let (_, tables) = DecoderPlanner::load(&model(), Keep::Shapes, Some(&shelf), &|_| ()).unwrap();
        assert_eq!((tables.digest(), tables.tokens), (embedding.digest(), embedding.tokens));
        assert_eq!(fs::read_dir(&shelf.dir).unwrap().count(), 1);
        // Small models' are not kept.
        let large = Shelf::new(shelf.dir.join("large"));
        assert_eq!(load(&large, Keep::Weights).1, ["planned"]);
        assert!(!large.dir.exists());
        fs::remove_dir_all(&shelf.dir).unwrap();
    }

    #[test]
    fn a_damaged_file_is_none_and_one_of_another_release_goes() {
        let shelf = shelf("damaged");
        load(&shelf, Keep::Weights);
        let path = fs::read_dir(&shelf.dir).unwrap().next().unwrap().unwrap().path();
        let good = fs::read(&path).unwrap();
        let of_another = path.with_file_name(path.file_name().unwrap().to_str().unwrap().replace('-', "-0"));
        fs::write(&of_another, &good).unwrap();
        let checkpoint = Checkpoint::open(&model()).unwrap();
        let (c, m) = (checkpoint.config().clone(), checkpoint.digest());
        let at_random = |i: usize| i * 7919 % good.len();
        for i in 0..40 {
            let mut bad = good.clone();
            bad[at_random(i)] ^= 1 << (i % 8);
            fs::write(&path, &bad).unwrap();
            assert!(shelf.find(&c, m, Keep::Weights).is_none(), "byte {}", at_random(i));
            fs::write(&path, &good[..at_random(i)]).unwrap();
            assert!(shelf.find(&c, m, Keep::Weights).is_none(), "cut after {}", at_random(i));
            fs::write(&path, &good).unwrap();
            assert!(shelf.find(&c, m, Keep::Weights).is_some());
            assert!(shelf.find(&c, [0; 32], Keep::Shapes).is_none());
        }
        fs::write(&path, []).unwrap();
        assert_eq!(load(&shelf, Keep::Weights).1, ["planned", "kept"]);
        assert!(fs::read(&path).unwrap() == good && !of_another.exists());
        fs::remove_dir_all(&shelf.dir).unwrap();
        // A folder that cannot be made is only slower.
        fs::write(&shelf.dir, []).unwrap();
        assert_eq!(load(&shelf, Keep::Weights).1, ["planned", "not kept"]);
        fs::remove_file(&shelf.dir).unwrap();
    }
}
