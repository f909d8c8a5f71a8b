//! Which vector instructions the processor has, found out once.

use std::fmt;
use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use super::simd::{Avx2, Avx512, Avx512Bf16, Avx512Vnni};
use super::simd::{Portable, Simd};

/// An instruction set that the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// Whatever the target always has, through code the compiler vectorises.
    Portable,
    /// 8 lanes with fused multiply-add.
    Avx2,
    /// 16 lanes with fused multiply-add.
    Avx512,
    /// The same, with products of 8 bits.
    Avx512Vnni,
    /// The same, with products of bf16 as well.
    Avx512Bf16,
}

impl Isa {
    /// The best this processor has, or what `UNDERSTUDY_ISA` (`portable`, `avx2`, `avx512`,
    /// `avx512vnni`, `avx512bf16`) asks for where the processor has that. The answer never changes within a process.
    pub fn detect() -> Self {
        static FOUND: OnceLock<Isa> = OnceLock::new();
        *FOUND.get_or_init(|| {
            let best = Self::available().pop().unwrap_or(Self::Portable);
            Self::asked().unwrap_or(best)
        })
    }

    /// Whether `UNDERSTUDY_ISA` has chosen it: then loops do what is no instruction.
    pub fn chosen() -> bool {
        Self::asked().is_some()
    }

    fn asked() -> Option<Self> {
        let asked = std::env::var("UNDERSTUDY_ISA").ok()?;
        Self::available().into_iter().find(|isa| isa.to_string() == asked)
    }

    /// All that this processor has, the best last.
    pub fn available() -> Vec<Self> {
        let mut list = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if Avx2::detect().is_some() {
                list.push(Self::Avx2);
            }
            if Avx512::detect().is_some() {
                list.push(Self::Avx512);
            }
            if Avx512Vnni::detect().is_some() {
                list.push(Self::Avx512Vnni);
            }
            if Avx512Bf16::detect().is_some() {
                list.push(Self::Avx512Bf16);
            }
        }
        list
    }

    /// Whether products of bf16 are instructions here, not loops.
    pub fn multiplies_bf16(self) -> bool {
        self == Self::Avx512Bf16
    }

    /// Whether products of 8 bits are instructions here, not loops.
    pub fn multiplies_int8(self) -> bool {
        matches!(self, Self::Avx512Vnni | Self::Avx512Bf16)
    }

    /// Floats in one vector.
    pub(crate) fn lanes(self) -> usize {
        match self {
            Self::Portable => Portable::LANES,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => Avx2::LANES,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 | Self::Avx512Vnni | Self::Avx512Bf16 => Avx512::LANES,
            #[cfg(not(target_arch = "x86_64"))]
            _ => Portable::LANES,
        }
    }

    /// Rows of the register block of products.
    pub(crate) fn rows(self) -> usize {
        match self {
            Self::Portable => Portable::ROWS,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => Avx2::ROWS,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 | Self::Avx512Vnni | Self::Avx512Bf16 => Avx512::ROWS,
            #[cfg(not(target_arch = "x86_64"))]
            _ => Portable::ROWS,
        }
    }

    /// Columns of the register block of products: the width of a panel of packed weights.
    pub(crate) fn panel(self) -> usize {
        2 * self.lanes()
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "avx512vnni",
            Self::Avx512Bf16 => "avx512bf16",
        })
    }
}

/// A computation written once for all instruction sets.
///
/// `run` and everything it calls with vectors in hand must be `#[inline(always)]`: only code inlined
/// into one of the functions of [`dispatch`] is compiled with that function's instructions.
pub(crate) trait Kernel {
    /// Does the work with the vectors of `S`.
    fn run<S: Simd>(self, s: S);
}

/// The one place where an instruction set is chosen.
#[inline]
pub(crate) fn dispatch<K: Kernel>(isa: Isa, kernel: K) {
    match isa {
        Isa::Portable => kernel.run(Portable),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => match Avx2::detect() {
            // SAFETY: the token is proof that the processor has these instructions.
            Some(token) => unsafe { with_avx2(token, kernel) },
            None => panic!("this processor has no AVX2 with FMA"),
        },
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => match Avx512::detect() {
            // SAFETY: the token is proof that the processor has these instructions.
            Some(token) => unsafe { with_avx512(token, kernel) },
            None => panic!("this processor has no AVX-512"),
        },
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni => match Avx512Vnni::detect() {
            // SAFETY: the token is proof that the processor has these instructions.
            Some(token) => unsafe { with_avx512_vnni(token, kernel) },
            None => panic!("this processor has no AVX512-VNNI"),
        },
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16 => match Avx512Bf16::detect() {
            // SAFETY: the token is proof that the processor has these instructions.
            Some(token) => unsafe { with_avx512_bf16(token, kernel) },
            None => panic!("this processor has no AVX512-BF16"),
        },
        #[cfg(not(target_arch = "x86_64"))]
        _ => kernel.run(Portable),
    }
}

/// # Safety
/// The processor has AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn with_avx2<K: Kernel>(token: Avx2, kernel: K) {
    kernel.run(token);
}

/// # Safety
/// The processor has AVX-512F, AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
unsafe fn with_avx512<K: Kernel>(token: Avx512, kernel: K) {
    kernel.run(token);
}

/// # Safety
/// The processor has AVX512-VNNI, AVX-512F, AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512vnni,avx512f,avx2,fma")]
unsafe fn with_avx512_vnni<K: Kernel>(token: Avx512Vnni, kernel: K) {
    kernel.run(token);
}

/// # Safety
/// The processor has AVX512-BF16, AVX512-VNNI, AVX-512F, AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512bf16,avx512vnni,avx512f,avx2,fma")]
unsafe fn with_avx512_bf16<K: Kernel>(token: Avx512Bf16, kernel: K) {
    kernel.run(token);
}
