//! Plain loops, compiled for the vector units that are found at run time.
//!
//! A [`Kernel`]'s loop is inlined into a function that may use wider vectors, and the compiler vectorises it there. All
//! versions compute the same words: integer arithmetic wraps alike, and floating point is IEEE without contraction.

/// A loop worth vectorising. `run` has to be `#[inline(always)]`, and so does what it calls.
pub(crate) trait Kernel {
    /// Does the work.
    fn run(self);
}

/// Runs a kernel with the widest vectors that this processor has.
#[inline]
pub(crate) fn run(k: impl Kernel) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("bmi1")
            && is_x86_feature_detected!("bmi2")
        {
            // SAFETY: the processor has the features.
            return unsafe { x86::avx512(k) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("bmi1") && is_x86_feature_detected!("bmi2") {
            // SAFETY: the processor has the feature.
            return unsafe { x86::avx2(k) };
        }
    }
    k.run();
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Kernel;

    #[target_feature(enable = "avx2,bmi1,bmi2")]
    pub fn avx2(k: impl Kernel) {
        k.run();
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi1,bmi2")]
    pub fn avx512(k: impl Kernel) {
        k.run();
    }
}
