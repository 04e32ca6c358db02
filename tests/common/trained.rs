//! Where a small trained decoder, stories260K, is looked for.

use std::path::PathBuf;

/// Its directory under `TACET_SHARED` or `../shared`; nothing and a word about it if it is absent.
pub fn trained() -> Option<PathBuf> {
    let base = std::env::var_os("TACET_SHARED")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared"), PathBuf::from);
    let dir = base.join("data/stories260k-hf");
    if dir.is_dir() {
        return Some(dir);
    }
    println!("skipped: {} is absent; TACET_SHARED names the folder that holds data/", dir.display());
    None
}
