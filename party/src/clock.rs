//! Where a thread's time goes.

use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

/// What the calling thread has had of a processor since it began.
pub fn processor() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// Microseconds.
pub fn micros(d: Duration) -> u64 {
    d.as_micros() as u64
}

/// What `wait` gives, once its time is added to `sum`.
pub fn timed<T>(sum: &mut Duration, wait: impl FnOnce() -> T) -> T {
    let since = Instant::now();
    let result = wait();
    *sum += since.elapsed();
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_waits_has_no_processor() {
        let mut waited = Duration::ZERO;
        let before = processor();
        timed(&mut waited, || std::thread::sleep(Duration::from_millis(200)));
        let asleep = processor() - before;
        assert!(waited >= Duration::from_millis(200) && asleep < waited, "{asleep:?} of {waited:?}");
        let mut n = 1u64;
        while processor() == before + asleep {
            n = std::hint::black_box(n.wrapping_mul(3));
        }
    }
}
