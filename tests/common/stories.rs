//! A temporary copy of a small trained decoder, stories260K, from `TACET_SHARED`.

#[path = "trained.rs"]
mod trained;

use std::path::PathBuf;

/// A folder that goes away with the test.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new(test: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("tacet-test-{test}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The copy, or nothing and a word about it.
pub fn stories(test: &str) -> Option<Folder> {
    let dir = trained::trained()?;
    let copy = Folder::new(test);
    for file in std::fs::read_dir(dir).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), copy.0.join(file.file_name())).unwrap();
    }
    Some(copy)
}
