// All CPU kernels for x86-64 with AVX2; used only where the machine has it (dispatch.cpp).
// Headers come before the pragma: nothing of theirs may be compiled for this instruction set.
#include <math.h>
#include <stdint.h>

#include "kernels.h"

#ifdef GSPO_X86_KERNELS
#include <immintrin.h>

#pragma GCC target("avx2,fma")
#define GSPO_ISA avx2
#define GSPO_LANES 4
#include "sequence_ratio.inc"
#include "sequence_results.inc"
#include "token_surrogate.inc"

namespace gspo {
const Kernels kAvx2Kernels = {
    "avx2", avx2::partials, avx2::results, avx2::gradient,
    avx2::surrogate_forward, avx2::surrogate_backward,
};
}
#endif
