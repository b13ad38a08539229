//! What multiplies two packed panels.

use burn::tensor::bf16;

use super::pack::{PANEL, STEP, TILE};

/// Instructions that multiply bf16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Engine {
    /// Plain Rust: what the others are tested against, and too slow for anything else.
    Plain,
    /// AVX-512's dot products of pairs (`vdpbf16ps`).
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AMX's tiles (`tdpbf16ps`).
    #[cfg(target_arch = "x86_64")]
    Amx,
}

impl Engine {
    /// Those that this machine has.
    #[cfg(test)]
    pub(crate) fn all() -> Vec<Engine> {
        #[allow(unused_mut)]
        let mut all = vec![Engine::Plain];
        #[cfg(target_arch = "x86_64")]
        {
            if super::select::has_avx512() {
                all.push(Engine::Avx512);
            }
            if super::select::has_amx() {
                all.push(Engine::Amx);
            }
        }
        all
    }

    /// Sets this thread up for [`multiply_panels`](Self::multiply_panels), until the result is dropped.
    pub(super) fn configure(self) -> Configured {
        #[cfg(target_arch = "x86_64")]
        if self == Engine::Amx {
            // SAFETY: `select` names AMX only where the processor and the system have it.
            unsafe { x86::load_configuration() };
        }
        Configured(self)
    }

    /// `sums = left · right`: panels of as many steps.
    pub(super) fn multiply_panels(
        self,
        left: &[bf16],
        right: &[bf16],
        sums: &mut [f32; PANEL * PANEL],
    ) {
        assert_eq!(left.len(), right.len());
        assert!(left.len().is_multiple_of(2 * TILE));
        match self {
            Engine::Plain => plain(left, right, sums),
            // SAFETY: `select` names an engine only where the processor has it, the lengths were checked
            // above, and `configure` has set up the tiles of this thread.
            #[cfg(target_arch = "x86_64")]
            Engine::Avx512 => unsafe { x86::avx512(left, right, sums) },
            #[cfg(target_arch = "x86_64")]
            Engine::Amx => unsafe { x86::amx(left, right, sums) },
        }
    }
}

/// A thread that is set up.
pub(super) struct Configured(Engine);

impl Drop for Configured {
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        if self.0 == Engine::Amx {
            // SAFETY: as in `configure`.
            unsafe { x86::release() };
        }
    }
}

fn plain(left: &[bf16], right: &[bf16], sums: &mut [f32; PANEL * PANEL]) {
    sums.fill(0.0);
    for (left, right) in left
        .chunks_exact(2 * TILE)
        .zip(right.chunks_exact(2 * TILE))
    {
        for row in 0..PANEL {
            for column in 0..PANEL {
                let values = &left[row * STEP..][..STEP];
                let right = &right[column / 16 * TILE + column % 16 * 2..];
                let products =
                    (0..STEP).map(|k| values[k].to_f32() * right[k / 2 * STEP + k % 2].to_f32());
                sums[row * PANEL + column] += products.sum::<f32>();
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_set1_epi32,
        _mm512_setzero_ps, _mm512_storeu_ps,
    };

    use super::{PANEL, STEP, TILE, bf16};

    /// Rows whose sums are in registers at once, two vectors of 16 columns each.
    const ROWS: usize = 8;

    /// # Safety
    /// The processor has `avx512f` and `avx512bf16`; both panels have as many whole steps.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn avx512(left: &[bf16], right: &[bf16], sums: &mut [f32; PANEL * PANEL]) {
        let steps = left.len() / (2 * TILE);
        for first in (0..PANEL).step_by(ROWS) {
            let mut rows = [[_mm512_setzero_ps(); 2]; ROWS];
            for step in 0..steps {
                // Rows of a step lie one after the other across both tiles.
                let left = left[step * 2 * TILE + first * STEP..].as_ptr();
                let right = right[step * 2 * TILE..].as_ptr();
                for pair in 0..STEP / 2 {
                    // SAFETY: pair and row are inside the step that the slices begin with; a vector of
                    // pairs is as long as a row of a tile.
                    unsafe {
                        let columns =
                            [right.add(pair * STEP), right.add(TILE + pair * STEP)].map(|at| {
                                std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(
                                    at.cast(),
                                ))
                            });
                        for (row, sums) in rows.iter_mut().enumerate() {
                            let values = left
                                .add(row * STEP + 2 * pair)
                                .cast::<i32>()
                                .read_unaligned();
                            let values =
                                std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(values));
                            sums[0] = _mm512_dpbf16_ps(sums[0], values, columns[0]);
                            sums[1] = _mm512_dpbf16_ps(sums[1], values, columns[1]);
                        }
                    }
                }
            }
            for (row, found) in rows.into_iter().enumerate() {
                let output = &mut sums[(first + row) * PANEL..][..PANEL];
                // SAFETY: two vectors of 16 are 32 sums.
                unsafe {
                    _mm512_storeu_ps(output.as_mut_ptr(), found[0]);
                    _mm512_storeu_ps(output[16..].as_mut_ptr(), found[1]);
                }
            }
        }
    }

    /// All eight tiles: 16 rows of 64 bytes (Intel's manual, `LDTILECFG`).
    #[repr(C, align(64))]
    struct Configuration {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        bytes_a_row: [u16; 16],
        rows: [u8; 16],
    }

    static CONFIGURATION: Configuration = Configuration {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        bytes_a_row: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
        rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
    };

    /// # Safety
    /// The processor has AMX and the system lets this process use it.
    pub(super) unsafe fn load_configuration() {
        // SAFETY: the operand is a valid configuration of 64 bytes.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const CONFIGURATION, options(nostack, readonly));
        }
    }

    /// # Safety
    /// As [`load_configuration`].
    pub(super) unsafe fn release() {
        // SAFETY: the instruction has no operand.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }

    /// Four tiles of sums; each step loads two tiles of rows and two of columns.
    ///
    /// # Safety
    /// [`load_configuration`] was called on this thread; both panels have as many whole steps.
    pub(super) unsafe fn amx(left: &[bf16], right: &[bf16], sums: &mut [f32; PANEL * PANEL]) {
        let steps = left.len() / (2 * TILE);
        if steps == 0 {
            sums.fill(0.0);
            return;
        }
        // SAFETY: each step reads two tiles of 1,024 bytes at either pointer, which `steps` keeps inside
        // the slices; the four tiles of sums, with rows 128 bytes apart, fill `sums`.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{left} + {row}*1]",
                "tileloadd tmm6, [{right} + {row}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{right} + {row}*1 + 1024]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{left} + {row}*1 + 1024]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {left}, 2048",
                "add {right}, 2048",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{sums} + {line}*1], tmm0",
                "tilestored [{sums} + {line}*1 + 64], tmm1",
                "tilestored [{sums} + {line}*1 + 2048], tmm2",
                "tilestored [{sums} + {line}*1 + 2112], tmm3",
                left = inout(reg) left.as_ptr() => _,
                right = inout(reg) right.as_ptr() => _,
                steps = inout(reg) steps => _,
                sums = in(reg) sums.as_mut_ptr(),
                row = in(reg) 64usize,
                line = in(reg) 4 * PANEL,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}
