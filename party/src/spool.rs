//! Bundles on disk, each a file that one session reads once.
//!
//! **The file.** It is made under a random name, for its owner alone, and unlinked before its first byte: nothing finds
//! it by name afterwards, and the system frees it when its handle closes, also where the process is killed. Steps follow
//! in the program's order, each its ciphertext and then a tag for every [`PIECE`] of it. The party server runs on Unix only.
//!
//! **Who sees what.** The disk, and whoever reads it, sees ciphertext of AES-256-GCM and lengths, which follow from a
//! public program. Every bundle has a fresh key from the system's randomness. It is never written, both ends of the file share
//! one expansion of it, and that is wiped with the last of them; what stays of GHASH's key could forge tags, not read.
//! Nonces count the pieces of a bundle from zero and each is sealed once, front to back. So what an earlier process
//! left, or a session has used, opens under no key: single use needs no bookkeeping on disk.
//!
//! **What is altered is refused.** A piece that was changed, cut or moved fails its tag, at the latest before its step is
//! handed on: a session computes with what was dealt or ends with [`SpoolError::Altered`].
//!
//! **Bounds.** `[pool] spool_mb` bounds the bytes of all files, tags included. Where the disk takes less, the spool stays
//! at what it took; where it gives back something else, the spool is not used again. Either lasts until a restart and
//! is logged once.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use aes_gcm::aes::Aes256;
use aes_gcm::{AeadInOut, Aes256Gcm, KeyInit};
use tacet_protocol::wipe::Wiped;
use tokio::runtime::Handle;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use zeroize::{ZeroizeOnDrop, Zeroizing};

use crate::config::hex;
use crate::fail::{Fail, code, fail};
use crate::flow::{Held, Room};
use crate::{PartyError, lock};

/// Bytes under one tag: few enough to stay in a processor's cache between encryption and authentication.
const PIECE: usize = 64 << 10;
const TAG: usize = 16;
/// Ends of the names of our files.
const SUFFIX: &str = ".bundle";

/// What a step of `len` payload bytes takes.
fn on_disk(len: usize) -> u64 {
    (len + tags(len)) as u64
}

fn tags(len: usize) -> usize {
    len.div_ceil(PIECE) * TAG
}

/// Builds only while the cipher is wiped when it is dropped.
const _: fn() = || {
    fn wiped<T: ZeroizeOnDrop>() {}
    wiped::<Aes256>();
};

/// Why a bundle cannot be kept on disk or read from it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpoolError {
    /// The operating system.
    #[error("the disk of [pool] spool_dir: {0}")]
    Io(#[from] io::Error),
    /// The file is not as it was written.
    #[error("the disk of [pool] spool_dir gave back something else than was written to it")]
    Altered,
    /// Its end came before that of the program.
    #[error("not all of the bundle was written to [pool] spool_dir")]
    Short,
}

impl SpoolError {
    /// Whether the disk is at fault, rather than whoever was to fill the bundle.
    pub fn is_fault(&self) -> bool {
        !matches!(self, SpoolError::Short)
    }
}

impl From<SpoolError> for Fail {
    fn from(e: SpoolError) -> Fail {
        fail(code::PROTOCOL, format!("a bundle that was dealt ahead is lost: {e}; try again"))
    }
}

struct Space {
    bundles: u64,
    used: u64,
    most: u64,
    stopped: bool,
}

/// A folder for bundles, bounded in bytes.
pub struct Spool {
    dir: PathBuf,
    space: Mutex<Space>,
}

impl Spool {
    /// Makes the folder if it is absent, for its owner alone, and removes what an earlier process may have left in it.
    ///
    /// # Errors
    /// A folder that others may enter, that belongs to another user, or that cannot be written.
    pub fn open(dir: &Path, bytes: u64) -> Result<Spool, PartyError> {
        let refused = |what: String| PartyError::Config(format!("pool.spool_dir {}: {what}", dir.display()));
        let io = |e: io::Error| refused(e.to_string());
        match DirBuilder::new().mode(0o700).create(dir) {
            Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(io(e)),
            _ => {}
        }
        let found = std::fs::metadata(dir).map_err(io)?;
        let mode = found.permissions().mode() & 0o777;
        if !found.is_dir() || mode & 0o077 != 0 {
            return Err(refused(format!("mode {mode:o}: name a folder that is for its owner alone (chmod 700)")));
        }
        for entry in std::fs::read_dir(dir).map_err(io)? {
            let entry = entry.map_err(io)?;
            if is_ours(&entry.file_name().to_string_lossy()) {
                removed(std::fs::remove_file(entry.path())).map_err(io)?;
            }
        }
        let space = Space { bundles: 0, used: 0, most: bytes, stopped: false };
        let spool = Spool { dir: dir.to_path_buf(), space: Mutex::new(space) };
        if spool.create().and_then(|f| f.metadata()).map_err(io)?.uid() != found.uid() {
            return Err(refused("it belongs to another user: name one of your own".into()));
        }
        Ok(spool)
    }

    /// Both ends of a file for a bundle of these steps; none where there is no room for it.
    pub fn claim(self: &Arc<Spool>, steps: &[(u32, usize)]) -> Option<(Writer, Reader)> {
        let bytes = steps.iter().map(|s| on_disk(s.1)).sum();
        let claim = {
            let mut s = lock(&self.space);
            if s.used.checked_add(bytes)? > s.most {
                return None;
            }
            s.used += bytes;
            s.bundles += 1;
            Claim { spool: Arc::clone(self), bytes }
        };
        match self.create().and_then(|file| Ok((file, key()?))) {
            Ok((file, key)) => Some(ends(Kept { file, aead: Aes256Gcm::new((&*key).into()), claim }, steps)),
            Err(e) => {
                claim.full(&e.into());
                None
            }
        }
    }

    /// Bundles here, and their bytes.
    pub fn used(&self) -> (u64, u64) {
        let s = lock(&self.space);
        (s.bundles, s.used)
    }

    /// A file without a name.
    fn create(&self) -> io::Result<File> {
        let mut name = [0; 16];
        random(&mut name)?;
        let path = self.dir.join(hex(&name) + SUFFIX);
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        removed(std::fs::remove_file(&path))?;
        Ok(file)
    }

    fn stop(&self, why: &SpoolError, most: impl Fn(&Space) -> u64) {
        let mut s = lock(&self.space);
        s.most = s.most.min(most(&s));
        if !std::mem::replace(&mut s.stopped, true) {
            eprintln!("spool bounded to {} MB until a restart reason={:?}", s.most / 1_000_000, why.to_string());
        }
    }
}

fn random(out: &mut [u8]) -> io::Result<()> {
    getrandom::fill(out).map_err(|e| io::Error::other(format!("no randomness: {e}")))
}

fn key() -> io::Result<Zeroizing<[u8; 32]>> {
    let mut key = Zeroizing::new([0; 32]);
    random(&mut *key)?;
    Ok(key)
}

/// Whether a name is of a file that a process was killed over before it was unlinked.
fn is_ours(name: &str) -> bool {
    name.strip_suffix(SUFFIX).is_some_and(|n| n.len() == 32 && n.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// A party that starts may remove the names of another one's files too, since they are about to go.
fn removed(r: io::Result<()>) -> io::Result<()> {
    r.or_else(|e| if e.kind() == ErrorKind::NotFound { Ok(()) } else { Err(e) })
}

/// Room for one bundle, free again when this is dropped.
struct Claim {
    spool: Arc<Spool>,
    bytes: u64,
}

impl Claim {
    /// The disk did not take this bundle: the spool stays at what it took of others.
    fn full(&self, why: &SpoolError) {
        self.spool.stop(why, |s| s.used - self.bytes);
    }

    /// The disk did not give this bundle back.
    fn broken(&self, why: &SpoolError) {
        self.spool.stop(why, |_| 0);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut s = lock(&self.spool.space);
        s.used -= self.bytes;
        s.bundles -= 1;
    }
}

/// What both ends share; the file closes before its room is free.
struct Kept {
    file: File,
    aead: Aes256Gcm,
    claim: Claim,
}

fn ends(kept: Kept, steps: &[(u32, usize)]) -> (Writer, Reader) {
    let ((done, written), kept) = (unbounded_channel(), Arc::new(kept));
    let reader = Reader { kept: Arc::clone(&kept), piece: 0, at: 0, steps: steps.to_vec(), written };
    (Writer { kept, piece: 0, at: 0, done }, reader)
}

fn nonce(piece: &mut u64) -> [u8; 12] {
    let mut n = [0; 12];
    n[4..].copy_from_slice(&piece.to_be_bytes());
    *piece += 1;
    n
}

/// Writes a bundle's steps.
pub struct Writer {
    kept: Arc<Kept>,
    piece: u64,
    at: u64,
    done: UnboundedSender<()>,
}

impl Writer {
    /// Seals one step and writes it; blocks. The plaintext is gone when this returns.
    ///
    /// # Errors
    /// The disk did not take it.
    pub fn put(mut self, mut bytes: Wiped<u8>) -> Result<Writer, SpoolError> {
        let mut tags = Vec::with_capacity(tags(bytes.len()));
        for piece in bytes.chunks_mut(PIECE) {
            let nonce = nonce(&mut self.piece);
            let sealed = self.kept.aead.encrypt_inout_detached(&nonce.into(), b"", piece.into());
            tags.extend_from_slice(&sealed.expect("a piece is far shorter than what a nonce is good for"));
        }
        let (file, end) = (&self.kept.file, self.at + bytes.len() as u64);
        let written = file.write_all_at(&bytes, self.at).and_then(|()| file.write_all_at(&tags, end));
        if let Err(e) = written {
            let e = e.into();
            self.kept.claim.full(&e);
            return Err(e);
        }
        self.at = end + tags.len() as u64;
        // Whoever has the other end may have dropped it: the bundle is then read for what follows on its stream.
        let _ = self.done.send(());
        Ok(self)
    }
}

/// Reads a bundle's steps, once.
pub struct Reader {
    kept: Arc<Kept>,
    piece: u64,
    at: u64,
    steps: Vec<(u32, usize)>,
    written: UnboundedReceiver<()>,
}

impl Reader {
    /// Hands all steps on, as far ahead as `room` allows and not before they were written; blocks. Ends early where
    /// nobody takes them any more.
    ///
    /// # Errors
    /// The file is not as it was written, or less of it was.
    pub fn run(mut self, room: &Room, to: &UnboundedSender<Held>, handle: &Handle) -> Result<(), SpoolError> {
        for (step, len) in std::mem::take(&mut self.steps) {
            self.written.blocking_recv().ok_or(SpoolError::Short)?;
            let permit = handle.block_on(room.wait(len));
            let bytes = self.next(len).inspect_err(|e| self.kept.claim.broken(e))?;
            if to.send(Held { step, bytes, permit }).is_err() {
                break;
            }
        }
        Ok(())
    }

    fn next(&mut self, len: usize) -> Result<Wiped<u8>, SpoolError> {
        let (mut bytes, mut sealed) = (Wiped::new(vec![0; len]), vec![0; tags(len)]);
        let (file, end) = (&self.kept.file, self.at + len as u64);
        let read = file.read_exact_at(&mut bytes, self.at).and_then(|()| file.read_exact_at(&mut sealed, end));
        read.map_err(|e| if e.kind() == ErrorKind::UnexpectedEof { SpoolError::Altered } else { e.into() })?;
        self.at = end + sealed.len() as u64;
        for (piece, tag) in bytes.chunks_mut(PIECE).zip(sealed.as_chunks::<TAG>().0) {
            let nonce = nonce(&mut self.piece);
            let opened = self.kept.aead.decrypt_inout_detached(&nonce.into(), b"", piece.into(), &(*tag).into());
            opened.map_err(|_| SpoolError::Altered)?;
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::channel;

    /// A folder of this test's own, removed at its end.
    struct Folder(PathBuf);

    impl Folder {
        fn new() -> Folder {
            let mut name = [0; 8];
            random(&mut name).unwrap();
            Folder(std::env::temp_dir().join(format!("tacet-spool-{}", hex(&name))))
        }

        fn names(&self) -> Vec<String> {
            let entries = std::fs::read_dir(&self.0).unwrap();
            entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    const STEPS: [(u32, usize); 5] = [(3, 1), (4, PIECE - 1), (9, 2 * PIECE), (10, 2 * PIECE), (12, 3 * PIECE + 5)];

    fn spool(bytes: u64) -> (Folder, Arc<Spool>) {
        let folder = Folder::new();
        let spool = Arc::new(Spool::open(&folder.0, bytes).unwrap());
        (folder, spool)
    }

    fn payload((step, len): (u32, usize)) -> Vec<u8> {
        (0..len).map(|i| (i * 7 + i / 251 + step as usize) as u8).collect()
    }

    fn write(mut writer: Writer) {
        for s in STEPS {
            writer = writer.put(Wiped::new(payload(s))).unwrap();
        }
    }

    /// Steps with their payload, and how the reading ended.
    type Read = (Vec<(u32, Vec<u8>)>, Result<(), SpoolError>);

    fn read(reader: Reader) -> Read {
        let rt = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let ((to, mut from), room) = (channel(), Room::new(1 << 30));
        let result = reader.run(&room, &to, rt.handle());
        let mut got = Vec::new();
        while let Ok(mut h) = from.try_recv() {
            got.push((h.step, h.bytes.take()));
        }
        (got, result)
    }

    fn whole(reader: Reader) -> bool {
        let (got, result) = read(reader);
        result.is_ok() && got == STEPS.map(|s| (s.0, payload(s)))
    }

    fn bundle() -> u64 {
        STEPS.iter().map(|s| on_disk(s.1)).sum()
    }

    #[test]
    fn what_was_written_comes_back_once_and_leaves_nothing() {
        let (folder, spool) = spool(2 * bundle());
        let (writer, reader) = spool.claim(&STEPS).unwrap();
        assert_eq!((folder.names(), spool.used()), (vec![], (1, bundle())));
        // The reader follows a writer that is at work.
        let writing = std::thread::spawn(move || write(writer));
        let file = reader.kept.file.try_clone().unwrap();
        assert!(whole(reader));
        writing.join().unwrap();
        assert_eq!((folder.names(), spool.used()), (vec![], (0, 0)));
        let mut raw = vec![0; bundle() as usize];
        file.read_exact_at(&mut raw, 0).unwrap();
        assert_eq!(file.metadata().unwrap().len(), bundle());
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        for s in STEPS.into_iter().filter(|s| s.1 > 16) {
            let head = &payload(s)[..16];
            assert!(!raw.windows(16).any(|w| w == head), "plaintext of step {}", s.0);
        }
    }

    #[test]
    fn every_bundle_has_a_key_of_its_own() {
        let (_folder, spool) = spool(2 * bundle());
        let files = [0, 1].map(|_| {
            let (writer, reader) = spool.claim(&STEPS).unwrap();
            write(writer);
            reader
        });
        let bytes = files.each_ref().map(|r| {
            let mut raw = vec![0; bundle() as usize];
            r.kept.file.read_exact_at(&mut raw, 0).unwrap();
            raw
        });
        assert_ne!(bytes[0], bytes[1], "the same payload");
        // One bundle's file in place of another's.
        files[0].kept.file.write_all_at(&bytes[1], 0).unwrap();
        let [a, b] = files;
        assert!(matches!(read(a), (got, Err(SpoolError::Altered)) if got.is_empty()));
        assert!(whole(b));
    }

    /// Writes a bundle, changes its file, and says how many steps came before the error.
    fn altered(change: impl Fn(&File)) -> usize {
        let (_folder, spool) = spool(2 * bundle());
        let (writer, reader) = spool.claim(&STEPS).unwrap();
        write(writer);
        change(&reader.kept.file);
        let (got, result) = read(reader);
        assert!(matches!(result, Err(SpoolError::Altered)), "{result:?}");
        assert!(got.iter().zip(STEPS).all(|(g, s)| *g == (s.0, payload(s))), "never wrong bytes");
        assert!(spool.claim(&STEPS).is_none(), "a disk that gave back something else is not used again");
        got.len()
    }

    fn flip(file: &File, at: u64) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
    }

    #[test]
    fn a_changed_byte_is_refused_wherever_it_is() {
        let mut at = 0;
        for (i, (_, len)) in STEPS.into_iter().enumerate() {
            // The first and last byte of the ciphertext and of its tags.
            for offset in [0, len as u64 - 1, len as u64, on_disk(len) - 1] {
                assert_eq!(altered(|f| flip(f, at + offset)), i, "byte {offset} of step {i}");
            }
            at += on_disk(len);
        }
    }

    #[test]
    fn a_truncated_file_is_refused() {
        assert_eq!(altered(|f| f.set_len(bundle() - 1).unwrap()), 4);
        assert_eq!(altered(|f| f.set_len(on_disk(1)).unwrap()), 1);
        assert_eq!(altered(|f| f.set_len(0).unwrap()), 0);
    }

    #[test]
    fn pieces_and_steps_in_another_order_are_refused() {
        let swap = |f: &File, [a, b]: [u64; 2], len: usize| {
            let (mut x, mut y) = (vec![0; len], vec![0; len]);
            f.read_exact_at(&mut x, a).unwrap();
            f.read_exact_at(&mut y, b).unwrap();
            f.write_all_at(&y, a).unwrap();
            f.write_all_at(&x, b).unwrap();
        };
        let third: u64 = STEPS[..2].iter().map(|s| on_disk(s.1)).sum();
        let (len, tags) = (STEPS[2].1, third + STEPS[2].1 as u64);
        assert_eq!(altered(|f| swap(f, [third, third + on_disk(len)], on_disk(len) as usize)), 2, "steps");
        let pieces = |f: &File| {
            swap(f, [third, third + PIECE as u64], PIECE);
            swap(f, [tags, tags + TAG as u64], TAG);
        };
        assert_eq!(altered(pieces), 2, "pieces with their tags");
    }

    #[test]
    fn files_take_no_more_than_their_bound() {
        let (_folder, spool) = spool(2 * bundle() - 1);
        let one = spool.claim(&STEPS).unwrap();
        assert!(spool.claim(&STEPS).is_none());
        assert_eq!(spool.used(), (1, bundle()));
        drop(one);
        assert_eq!(spool.used(), (0, 0));
        assert!(spool.claim(&STEPS).is_some(), "room that was given back");
    }

    #[test]
    fn a_full_disk_bounds_the_spool_and_spares_what_it_holds() {
        let Ok(full) = OpenOptions::new().read(true).write(true).open("/dev/full") else {
            return println!("skipped: this system has no /dev/full");
        };
        let (_folder, spool) = spool(10 * bundle());
        let (writer, reader) = spool.claim(&STEPS).unwrap();
        write(writer);
        let (victim, _) = spool.claim(&STEPS).unwrap();
        let mut kept = Arc::into_inner(victim.kept).unwrap();
        kept.file = full;
        let (victim, behind) = ends(kept, &STEPS);
        let e = victim.put(Wiped::new(payload(STEPS[0]))).err().unwrap();
        assert!(matches!(&e, SpoolError::Io(e) if e.kind() == ErrorKind::StorageFull), "{e}");
        assert!(matches!(read(behind), (got, Err(SpoolError::Short)) if got.is_empty()));
        assert!(spool.claim(&STEPS).is_none(), "it does not grow");
        assert!(whole(reader));
        assert_eq!(spool.used(), (0, 0));
        assert!(spool.claim(&STEPS).is_some(), "one bundle did fit");
    }

    #[test]
    fn a_bundle_that_was_not_finished_or_is_not_taken_ends_its_reader() {
        let (_folder, spool) = spool(2 * bundle());
        let (writer, reader) = spool.claim(&STEPS).unwrap();
        drop(writer.put(Wiped::new(payload(STEPS[0]))).unwrap());
        let (got, result) = read(reader);
        assert!(matches!(result, Err(SpoolError::Short)) && got.len() == 1);
        let (writer, reader) = spool.claim(&STEPS).expect("the disk is not to blame");
        write(writer);
        let rt = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let ((to, from), room) = (channel(), Room::new(PIECE));
        // It waits for room that is free when its steps are dropped.
        let reading = std::thread::spawn(move || reader.run(&room, &to, rt.handle()));
        drop(from);
        assert!(reading.join().unwrap().is_ok());
        assert_eq!(spool.used(), (0, 0));
    }

    #[test]
    fn the_folder_is_its_owners_and_is_emptied_of_what_is_ours() {
        let folder = Folder::new();
        let open = || Spool::open(&folder.0, 1).map(drop).map_err(|e| e.to_string());
        assert_eq!(open(), Ok(()));
        let mode = |m: u32| std::fs::set_permissions(&folder.0, PermissionsExt::from_mode(m)).unwrap();
        assert_eq!(std::fs::metadata(&folder.0).unwrap().permissions().mode() & 0o777, 0o700);
        for name in [&("0a".repeat(16) + SUFFIX), "notes.bundle", "0a"] {
            std::fs::write(folder.0.join(name), "left").unwrap();
        }
        assert_eq!(open(), Ok(()));
        let mut names = folder.names();
        names.sort();
        assert_eq!(names, ["0a", "notes.bundle"]);
        mode(0o750);
        assert!(open().unwrap_err().contains("chmod 700"));
        mode(0o700);
        let file = Spool::open(&folder.0.join("0a"), 1).map(drop).unwrap_err().to_string();
        assert!(file.contains("pool.spool_dir"), "{file}");
        assert!(Spool::open(&folder.0.join("no/parent"), 1).is_err());
    }
}
