//! Secrets in every form in which they could be written down, and a search for them.

use std::path::{Path, PathBuf};

use tacet_protocol::ring::pack;

/// Tokens of a run that is looked for: fewer could be there by chance.
const RUN: usize = 4;

/// Byte strings that nobody but the client may hold, each with what it is.
#[derive(Default)]
pub struct Secrets(Vec<(String, Vec<u8>)>);

impl Secrets {
    fn add(&mut self, what: impl Into<String>, bytes: impl Into<Vec<u8>>) {
        let bytes = bytes.into();
        assert!(bytes.len() >= 6, "too short to be told from chance");
        self.0.push((what.into(), bytes));
    }

    /// A text and every long word of it; as it is, in hexadecimal digits, and in UTF-16.
    pub fn text(&mut self, text: &str) {
        let words = text.split_whitespace().filter(|w| w.len() >= 8);
        for part in std::iter::once(text).chain(words) {
            let hex: String = part.bytes().map(|b| format!("{b:02x}")).collect();
            self.add(format!("text {part:?}"), part);
            self.add(format!("hexadecimal {part:?}"), hex);
            self.add(format!("UTF-16 {part:?}"), part.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>());
        }
    }

    /// Every run of four tokens: decimal with three separators, and as little-endian words of three sizes.
    pub fn tokens(&mut self, tokens: &[u32]) {
        assert!(tokens.len() >= RUN, "{tokens:?}");
        for run in tokens.windows(RUN) {
            self.decimal("tokens", &run.iter().map(|t| u64::from(*t)).collect::<Vec<_>>());
            self.add(format!("16-bit tokens {run:?}"), le(run, |t| (t as u16).to_le_bytes()));
            self.add(format!("32-bit tokens {run:?}"), le(run, |t| t.to_le_bytes()));
            self.add(format!("64-bit tokens {run:?}"), le(run, |t| u64::from(t).to_le_bytes()));
        }
    }

    /// Words of a share: decimal, as they are packed, and as 32-bit and 64-bit words.
    pub fn share(&mut self, words: &[u64], bits: u32) {
        for run in words.chunks_exact(RUN) {
            self.decimal("share", run);
            // Padding is no part of the secret.
            let whole = RUN * bits as usize / 8;
            self.add("packed share", &pack(run, bits)[..whole]);
            self.add("32-bit share", le(run, |w| (w as u32).to_le_bytes()));
            self.add("64-bit share", le(run, u64::to_le_bytes));
        }
    }

    /// Real numbers: as they print, and as 32-bit and 64-bit floats.
    pub fn numbers(&mut self, what: &str, numbers: &[f64]) {
        for run in numbers.chunks_exact(RUN) {
            self.add(format!("{what} as f32"), le(run, |v| (v as f32).to_le_bytes()));
            self.add(format!("{what} as f64"), le(run, f64::to_le_bytes));
            // Shorter ones are somebody's seconds.
            for v in run.iter().filter(|v| v.abs() > 0.01 && v.to_string().len() >= 8) {
                self.add(format!("{what} {v}"), format!("{v:.6}"));
                self.add(format!("{what} {v} to the last digit"), v.to_string());
            }
        }
    }

    fn decimal(&mut self, what: &str, words: &[u64]) {
        for separator in [",", ", ", " "] {
            let joined = words.iter().map(u64::to_string).collect::<Vec<_>>().join(separator);
            self.add(format!("{what} {joined:?}"), joined);
        }
    }

    /// What of it is in these bytes.
    pub fn within(&self, bytes: &[u8]) -> Vec<&str> {
        let found = self.0.iter().filter(|(_, s)| bytes.windows(s.len()).any(|w| w == &s[..]));
        found.map(|(what, _)| what.as_str()).collect()
    }

    /// What of it is in the files under a folder, or in their names; and the number of bytes that were read.
    pub fn under(&self, dir: &Path) -> (Vec<(PathBuf, String)>, usize) {
        let (mut found, mut read) = (Vec::new(), 0);
        for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
            let path = entry.path();
            let mut bytes = path.as_os_str().as_encoded_bytes().to_vec();
            if entry.file_type().unwrap().is_dir() {
                let (more, n) = self.under(&path);
                found.extend(more);
                read += n;
            } else {
                let content = std::fs::read(&path).unwrap();
                read += content.len();
                bytes.push(0);
                bytes.extend(content);
            }
            found.extend(self.within(&bytes).into_iter().map(|what| (path.clone(), what.to_string())));
        }
        (found, read)
    }
}

fn le<T: Copy, const N: usize>(run: &[T], bytes: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    run.iter().flat_map(|t| bytes(*t)).collect()
}

#[test]
fn the_search_finds_every_form_and_nothing_else() {
    let mut s = Secrets::default();
    s.text("quaffing xylophones");
    s.tokens(&[401, 7, 290, 33, 512]);
    s.share(&[0x1234_5678, 0x9abc_def0, 0x0fed_cba9, 0x8765_4321], 32);
    s.share(&[0x1_2345, 0x3_6789, 0x2_abcd, 0x0_ef01], 18);
    s.numbers("vector", &[0.12345678, -0.53125, 0.25, 0.0078125]);
    let planted: [(&str, &[u8]); 17] = [
        ("text", b"{\"prompt\":\"quaffing xylophones\"}"),
        ("text", b"error at xylophones."),
        ("hexadecimal", b"786c7966 71756166 66696e67 71756166666696e67 7175616666696e67"),
        ("UTF-16", b"q\0u\0a\0f\0f\0i\0n\0g\0"),
        ("tokens", b"[1, 401, 7, 290, 33]"),
        ("tokens", b"7 290 33 512"),
        ("tokens", b"x=7,290,33,512"),
        ("16-bit tokens", &[9, 0x91, 1, 7, 0, 0x22, 1, 33, 0, 9]),
        ("32-bit tokens", &[9, 7, 0, 0, 0, 0x22, 1, 0, 0, 33, 0, 0, 0, 0, 2, 0, 0]),
        ("64-bit tokens", &le(&[401, 7, 290, 33], |t: u64| t.to_le_bytes())),
        ("share", b"305419896, 2596069104, 267242409, 2271560481"),
        ("32-bit share", &le(&[0x1234_5678, 0x9abc_def0, 0x0fed_cba9, 0x8765_4321], u32::to_le_bytes)),
        ("packed share", &pack(&[0x1_2345, 0x3_6789, 0x2_abcd, 0x0_ef01], 18)),
        ("vector as f32", &le(&[0.12345678, -0.53125, 0.25, 0.0078125], f32::to_le_bytes)),
        ("vector as f64", &le(&[0.12345678, -0.53125, 0.25, 0.0078125], f64::to_le_bytes)),
        ("vector 0.12345678", b"cosine of 0.123457"),
        ("vector -0.53125 to", b"[-0.53125, 0.25"),
    ];
    let dir = std::env::temp_dir().join(format!("tacet-canary-{}", std::process::id()));
    std::fs::create_dir_all(dir.join("deep/er")).unwrap();
    let noise = [b"401, 7, 290 quaff xylophon 0.1234".to_vec(), le(&[7, 290, 33], |t: u32| t.to_le_bytes())].concat();
    let (file, other) = (dir.join("deep/er/party.log"), dir.join("metrics"));
    std::fs::write(&other, &noise).unwrap();
    std::fs::write(&file, &noise).unwrap();
    assert_eq!(s.under(&dir), (Vec::new(), 2 * noise.len()));
    for (what, form) in planted {
        std::fs::write(&file, [&noise, form, &noise].concat()).unwrap();
        let (found, _) = s.under(&dir);
        assert!(found.iter().any(|(at, w)| *at == file && w.starts_with(what)), "{what} {form:?}: {found:?}");
        assert!(found.iter().all(|(at, _)| *at == file), "{found:?}");
    }
    std::fs::write(dir.join("xylophones.core"), b"").unwrap();
    assert!(s.under(&dir).0.iter().any(|(at, _)| at.ends_with("xylophones.core")));
    std::fs::remove_dir_all(dir).unwrap();
}
