//! Named, shape-checked tensors of a checkpoint, each read and handed out once, and the safetensors files they come from.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::source::{Bytes, Format, Place, Source};
use super::{Dense, Norm, config, refuse};
use crate::Error;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The safetensors format's own bound.
const LONGEST_HEADER: u64 = 100_000_000;

/// Ends of names of buffers that older files carry: rotary frequencies, which the configuration gives, and causal masks.
const BUFFERS: [&str; 3] = [".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias"];

/// Whether a directory holds weights as safetensors.
pub(super) fn present(dir: &Path) -> bool {
    dir.join(SINGLE).exists() || dir.join(INDEX).exists()
}

struct Tensor {
    shape: Vec<usize>,
    file: usize,
    place: Place,
    /// Rows of a head, where they are stored in pairs.
    paired: Option<usize>,
}

/// The tensors that nobody took yet, where they are read from, and the digest of the files.
pub(super) struct Weights {
    files: Vec<(String, Box<dyn Bytes>)>,
    tensors: BTreeMap<String, Tensor>,
    pub(super) digest: [u8; 32],
}

impl Weights {
    /// No tensors yet.
    pub(super) fn new(digest: [u8; 32]) -> Weights {
        Weights { files: Vec::new(), tensors: BTreeMap::new(), digest }
    }

    /// `config` is the configuration that the digest covers with the weights.
    pub(super) fn read(dir: &Path, config: &[u8]) -> Result<Weights, Error> {
        let mut hash = hasher();
        hash.update((config.len() as u64).to_le_bytes());
        hash.update(config);
        let mut weights = Weights::new([0; 32]);
        if dir.join(SINGLE).exists() {
            weights.read_file(dir, SINGLE, &mut hash)?;
        } else if dir.join(INDEX).exists() {
            weights.read_shards(dir, &mut hash)?;
        } else {
            return refuse(format!("{} has no {SINGLE}, no {INDEX} and no gguf file", dir.display()));
        }
        weights.digest = hash.finalize().into();
        Ok(weights)
    }

    fn read_shards(&mut self, dir: &Path, hash: &mut Sha256) -> Result<(), Error> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let bytes = config::read(&dir.join(INDEX))?;
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(&bytes);
        let Index { weight_map } = serde_json::from_slice(&bytes).or_else(|e| refuse(format!("{INDEX}: {e}")))?;
        let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (tensor, shard) in &weight_map {
            // A shard lies beside its index: nothing else of the disk is read.
            if shard.contains(['/', '\\']) || !shard.ends_with(".safetensors") {
                return refuse(format!("{INDEX}: {shard:?} is not the name of a safetensors file"));
            }
            shards.entry(shard).or_default().push(tensor);
        }
        for (shard, announced) in shards {
            let held = self.read_file(dir, shard, hash)?;
            if let Some(tensor) = announced.iter().find(|tensor| !held.iter().any(|h| h == *tensor)) {
                return refuse(format!("{shard}: tensor {tensor} is missing, though {INDEX} puts it there"));
            }
            if let Some(tensor) = held.iter().find(|tensor| weight_map.get(*tensor).is_none_or(|s| s != shard)) {
                return refuse(format!("{shard}: tensor {tensor} is not where {INDEX} puts it"));
            }
        }
        Ok(())
    }

    fn read_file(&mut self, dir: &Path, name: &str, hash: &mut Sha256) -> Result<Vec<String>, Error> {
        let (mut file, len) = open(&dir.join(name))?;
        let held = self.read_safetensors(&mut Source::new(name, &mut file, len, hash))?;
        self.came_from(name, Box::new(file));
        Ok(held)
    }

    /// The file that the last tensors were found in.
    pub(super) fn came_from(&mut self, name: &str, file: Box<dyn Bytes>) {
        self.files.push((name.into(), file));
    }

    /// Returns the names of all tensors of the file.
    pub(super) fn read_safetensors(&mut self, source: &mut Source) -> Result<Vec<String>, Error> {
        let header = u64::from_le_bytes(source.array()?);
        if header > LONGEST_HEADER {
            return source.refuse(format!("truncated or not a safetensors file: its header is {header} bytes long"));
        }
        let header = source.bytes(header)?;
        // This checks that the tensors' ranges have the lengths of their shapes and follow one another without a hole.
        let metadata: Metadata = match serde_json::from_slice(&header) {
            Ok(metadata) => metadata,
            Err(e) => return source.refuse(format!("truncated or not a safetensors file ({e})")),
        };
        let data = metadata.data_len() as u64;
        if data != source.left() {
            return source.refuse(format!("truncated: {data} bytes of tensors expected, {} found", source.left()));
        }
        let names = metadata.offset_keys();
        for name in &names {
            let Some(info) = metadata.info(name) else { continue };
            let bytes = (info.data_offsets.1 - info.data_offsets.0) as u64;
            if BUFFERS.iter().any(|end| name.ends_with(end)) {
                source.skip(bytes)?;
                continue;
            }
            let format = match info.dtype {
                Dtype::F32 => Format::F32,
                Dtype::F16 => Format::F16,
                Dtype::BF16 => Format::Bf16,
                other => return source.refuse(format!("tensor {name} is {other:?}, expected F32, F16 or BF16")),
            };
            let place = source.place(name, format, info.shape.iter().product::<usize>() as u64)?;
            self.insert(name.clone(), info.shape.clone(), place)?;
        }
        Ok(names)
    }

    pub(super) fn insert(&mut self, name: String, shape: Vec<usize>, place: Place) -> Result<(), Error> {
        self.add(name, Tensor { shape, file: self.files.len(), place, paired: None })
    }

    fn add(&mut self, name: String, tensor: Tensor) -> Result<(), Error> {
        if self.tensors.contains_key(&name) {
            return refuse(format!("tensor {name} is there twice"));
        }
        self.tensors.insert(name, tensor);
        Ok(())
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The same tensors under the names that `name` makes of theirs and their shapes, with the rows of a head where it says
    /// that they are stored in pairs: row `2 i + j` is then row `i + j rows / 2`.
    pub(super) fn renamed(
        mut self,
        mut name: impl FnMut(String, &[usize]) -> Result<(String, Option<usize>), Error>,
    ) -> Result<Weights, Error> {
        for (theirs, mut tensor) in std::mem::take(&mut self.tensors) {
            let (ours, paired) = name(theirs, &tensor.shape)?;
            tensor.paired = paired;
            self.add(ours, tensor)?;
        }
        Ok(self)
    }

    /// Rows of a matrix that is there.
    pub(super) fn rows(&self, name: &str) -> Option<usize> {
        self.tensors.get(name)?.shape.first().copied()
    }

    pub(super) fn take(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
        let values = self.peek(name, shape)?;
        self.tensors.remove(name);
        Ok(values)
    }

    /// Reads a tensor that is read again before the end.
    pub(super) fn peek(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
        let Some(tensor) = self.tensors.get(name) else {
            return refuse(format!("tensor {name} is missing"));
        };
        if tensor.shape != shape {
            return refuse(format!("tensor {name} is {:?}, expected {shape:?}", tensor.shape));
        }
        let (file, from) = &mut self.files[tensor.file];
        let values = tensor.place.read(file, &mut **from, name)?;
        Ok(match tensor.paired {
            Some(rows) => in_order(&values, rows, values.len() / shape[0]),
            None => values,
        })
    }

    /// `name.weight`, `out x inp`, and `name.bias` where the family has one.
    pub(super) fn dense(&mut self, name: &str, out: usize, inp: usize, biased: bool) -> Result<Dense, Error> {
        Ok(Dense {
            weight: self.take(&format!("{name}.weight"), &[out, inp])?,
            bias: if biased { self.take(&format!("{name}.bias"), &[out])? } else { vec![0.0; out] },
            out,
            inp,
        })
    }

    /// `name.weight`, and `name.bias` of norms that shift.
    pub(super) fn norm(&mut self, name: &str, width: usize, shifted: bool) -> Result<Norm, Error> {
        Ok(Norm {
            weight: self.take(&format!("{name}.weight"), &[width])?,
            bias: if shifted { self.take(&format!("{name}.bias"), &[width])? } else { vec![0.0; width] },
        })
    }

    /// The head; where `tied`, its weight is the embedding table.
    pub(super) fn head(&mut self, table: &str, (vocab, hidden): (usize, usize), tied: bool) -> Result<Dense, Error> {
        const HEAD: &str = "lm_head.weight";
        let weight = self.take(if tied { table } else { HEAD }, &[vocab, hidden])?;
        if tied && self.has(HEAD) && self.take(HEAD, &[vocab, hidden])? != weight {
            return refuse(format!("tensor {HEAD} is not the embedding that tie_word_embeddings says it is"));
        }
        Ok(Dense { weight, bias: vec![0.0; vocab], out: vocab, inp: hidden })
    }

    /// Refuses the first tensor that nobody took: computing without it would be computing another model.
    pub(super) fn finish(&self) -> Result<(), Error> {
        match self.tensors.first_key_value() {
            Some((name, _)) => {
                refuse(format!("tensor {name} is in the weights, but its configuration has no use for it"))
            }
            None => Ok(()),
        }
    }
}

/// Row `2 i + j` of a head goes to row `i + j rows / 2`.
fn in_order(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let mut ordered = Vec::with_capacity(values.len());
    for head in values.chunks_exact(rows * cols) {
        for j in 0..2 {
            head.chunks_exact(cols).skip(j).step_by(2).for_each(|row| ordered.extend(row));
        }
    }
    ordered
}

/// Of every format, before the first file.
pub(super) fn hasher() -> Sha256 {
    let mut hash = Sha256::new();
    hash.update(b"tacet decoder 1\0");
    hash
}

/// The file and its length.
pub(super) fn open(path: &Path) -> Result<(BufReader<File>, u64), Error> {
    let unreadable = |e| Error::Model(format!("cannot read {}: {e}", path.display()));
    let file = File::open(path).map_err(unreadable)?;
    let len = file.metadata().map_err(unreadable)?.len();
    Ok((BufReader::new(file), len))
}
