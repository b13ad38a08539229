//! Which engine is used: what the processor has, where it is faster than widening to f32, and whether it
//! computes right.

use std::sync::OnceLock;

use burn::tensor::bf16;

use super::{Engine, Halves, Sink, multiply};

/// Names an engine (`amx`, `avx512`, `plain`) or `off`, for measuring.
const VARIABLE: &str = "CALOR_CPU_BF16";

/// How products of bf16 are computed on this machine, and why: none where widening to f32 is the best.
#[derive(Clone, Debug)]
pub(crate) struct Choice {
    pub engine: Option<Engine>,
    /// In words, for people.
    pub reason: String,
}

/// The engine of this process; none where bf16 is widened to f32.
pub(crate) fn engine() -> Option<Engine> {
    choice().engine
}

/// Found out once.
pub(crate) fn choice() -> &'static Choice {
    static CHOICE: OnceLock<Choice> = OnceLock::new();
    CHOICE.get_or_init(|| {
        let asked = std::env::var(VARIABLE).unwrap_or_default();
        choose(&asked)
    })
}

fn choose(asked: &str) -> Choice {
    let widened = |reason: &str| Choice {
        engine: None,
        reason: format!("widened to f32 ({reason})"),
    };
    let named = |engine: Engine, name: &str, by: &str| match is_right(engine) {
        true => Choice {
            engine: Some(engine),
            reason: format!("{name}{by}"),
        },
        false => widened(&format!(
            "{name} computes something else than plain products"
        )),
    };
    match asked {
        "off" => return widened(&format!("{VARIABLE}=off")),
        "plain" => return named(Engine::Plain, "plain loops", " (asked for)"),
        #[cfg(target_arch = "x86_64")]
        "amx" if has_amx() => return named(Engine::Amx, "AMX", " (asked for)"),
        #[cfg(target_arch = "x86_64")]
        "avx512" if has_avx512() => return named(Engine::Avx512, "AVX-512", " (asked for)"),
        _ => {}
    }
    #[cfg(target_arch = "x86_64")]
    {
        // A tile's product is that of sixteen rows at once: nothing widened comes near.
        if has_amx() {
            return named(Engine::Amx, "AMX", "");
        }
        // By the maker and not by a measurement: the same machine has to compute the same every time. AMD's
        // from Zen 4 on multiply pairs at twice f32's rate; Intel's, which have AMX for it, at half.
        if has_avx512() {
            return match &maker() {
                b"AuthenticAMD" => named(Engine::Avx512, "AVX-512", ""),
                _ => widened("AVX-512's products of bf16 are slower than f32's here"),
            };
        }
    }
    widened("no instruction multiplies bf16 here")
}

/// Whether an engine finds what plain loops find.
fn is_right(engine: Engine) -> bool {
    let (rows, inner, columns) = (40, 70, 50);
    let numbers = |count: usize, step: usize| -> Vec<bf16> {
        (0..count)
            .map(|i| bf16::from_f32((i * step % 61) as f32 / 32.0 - 0.9))
            .collect()
    };
    let (left, right) = (numbers(rows * inner, 7), numbers(inner * columns, 11));
    let product = |engine| {
        let mut output = vec![0.0f32; rows * columns];
        let terms = [(
            Halves::new(&left, rows, inner),
            Halves::new(&right, inner, columns),
        )];
        multiply(engine, &terms, Sink::Wide(&mut output));
        output
    };
    let pairs = product(engine).into_iter().zip(product(Engine::Plain));
    pairs
        .into_iter()
        .all(|(found, expected)| (found - expected).abs() <= 1e-4)
}

#[cfg(target_arch = "x86_64")]
pub(super) fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16")
}

/// As the processor names its maker.
#[cfg(target_arch = "x86_64")]
fn maker() -> [u8; 12] {
    // SAFETY: every processor of this architecture has the instruction.
    #[allow(unused_unsafe)]
    let found = unsafe { std::arch::x86_64::__cpuid_count(0, 0) };
    let mut name = [0; 12];
    for (part, word) in name
        .chunks_exact_mut(4)
        .zip([found.ebx, found.edx, found.ecx])
    {
        part.copy_from_slice(&word.to_le_bytes());
    }
    name
}

/// Whether the processor has AMX for bf16 and Linux lets this process use its state.
#[cfg(target_arch = "x86_64")]
pub(super) fn has_amx() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    *HAS.get_or_init(|| {
        use std::arch::x86_64::__cpuid_count;
        // Intel's manual, CPUID leaf 7: bits of EDX.
        const BF16: u32 = 1 << 22;
        const TILE: u32 = 1 << 24;
        // SAFETY: every processor of this architecture has the instruction.
        #[allow(unused_unsafe)]
        let (highest, features) = unsafe { (__cpuid_count(0, 0).eax, __cpuid_count(7, 0).edx) };
        highest >= 7 && features & (BF16 | TILE) == BF16 | TILE && system_permits()
    })
}

/// Linux keeps the tiles' state for a process only after it has asked (`arch_prctl`,
/// `ARCH_REQ_XCOMP_PERM`).
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn system_permits() -> bool {
    const REQUEST: libc::c_int = 0x1023;
    const TILE_DATA: libc::c_ulong = 18;
    // SAFETY: the call takes two numbers and changes nothing but the process's permission.
    unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) == 0 }
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn system_permits() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_that_is_named_is_taken_where_it_is_there() {
        assert_eq!(choose("off").engine, None);
        assert!(choose("off").reason.contains("CALOR_CPU_BF16=off"));
        assert_eq!(choose("plain").engine, Some(Engine::Plain));
        for engine in Engine::all() {
            assert!(is_right(engine), "{engine:?}");
        }
        // Whatever it is, it says why.
        assert!(!choose("").reason.is_empty());
        #[cfg(target_arch = "x86_64")]
        assert_eq!(
            choose("avx512").engine == Some(Engine::Avx512),
            has_avx512()
        );
    }
}
