//! Where a small trained decoder, stories260K, is looked for.

use std::path::PathBuf;

/// Its directory under `TACET_SHARED`; nothing and a word about it if it is absent.
pub fn trained() -> Option<PathBuf> {
    let Some(base) = std::env::var_os("TACET_SHARED").map(PathBuf::from) else {
        println!("skipped: TACET_SHARED is not set; it names the folder with data/stories260k-hf");
        return None;
    };
    let dir = base.join("data/stories260k-hf");
    if dir.is_dir() {
        return Some(dir);
    }
    println!("skipped: {} is absent; TACET_SHARED names the folder with data/stories260k-hf", dir.display());
    None
}
