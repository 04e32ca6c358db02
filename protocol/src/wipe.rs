//! Vectors of secrets that are wiped when they go, a vector register at a time.
//!
//! `Vec`'s own `Zeroize` writes element by element, which for the bytes of a round takes as long as to encrypt them.

use std::ops::{Deref, DerefMut};

use zeroize::{DefaultIsZeroes, Zeroize};

/// Zeroes a vector, its spare room included, and empties it.
pub fn wipe<T: DefaultIsZeroes>(v: &mut Vec<T>) {
    v.resize(v.capacity(), T::default());
    v.as_mut_slice().zeroize();
    v.clear();
}

/// Puts words after others; where that takes another place, the old one is wiped.
pub fn append<T: DefaultIsZeroes>(v: &mut Vec<T>, more: &[T]) {
    let len = v.len() + more.len();
    if len > v.capacity() {
        // Room to grow, so that one by one does not mean to copy all each time.
        let mut grown = Vec::with_capacity(len + len / 4);
        grown.extend_from_slice(v);
        wipe(v);
        *v = grown;
    }
    v.extend_from_slice(more);
}

/// A vector that is wiped when it is dropped, and does not print.
pub struct Wiped<T: DefaultIsZeroes>(Vec<T>);

impl<T: DefaultIsZeroes> Wiped<T> {
    /// From now on this is a secret.
    pub fn new(v: Vec<T>) -> Wiped<T> {
        Wiped(v)
    }

    /// Gives up the wiping.
    pub fn take(&mut self) -> Vec<T> {
        std::mem::take(&mut self.0)
    }
}

impl<T: DefaultIsZeroes> Drop for Wiped<T> {
    fn drop(&mut self) {
        wipe(&mut self.0);
    }
}

impl<T: DefaultIsZeroes> Deref for Wiped<T> {
    type Target = Vec<T>;

    fn deref(&self) -> &Vec<T> {
        &self.0
    }
}

impl<T: DefaultIsZeroes> DerefMut for Wiped<T> {
    fn deref_mut(&mut self) -> &mut Vec<T> {
        &mut self.0
    }
}

impl AsRef<[u8]> for Wiped<u8> {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl<T: DefaultIsZeroes> std::fmt::Debug for Wiped<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Wiped({} elements)", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_goes_and_nothing_prints() {
        let mut v = Vec::with_capacity(10);
        v.extend([7u64; 6]);
        v.truncate(3);
        wipe(&mut v);
        assert!(v.is_empty() && v.capacity() >= 10);
        for n in 0..100 {
            append(&mut v, &[n, n]);
        }
        assert!(v.len() == 200 && v.iter().enumerate().all(|(i, w)| *w == i as u64 / 2));
        v.clear();
        v.resize(6, 1);
        assert_eq!(format!("{:?}", Wiped::new(v)), "Wiped(6 elements)");
    }
}
