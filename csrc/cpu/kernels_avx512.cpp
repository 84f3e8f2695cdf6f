// All CPU kernels for x86-64 with AVX512; used only where the machine has it (dispatch.cpp).
// Headers come before the pragma: nothing of theirs may be compiled for this instruction set.
#include <math.h>
#include <stdint.h>

#include "kernels.h"

#ifdef GSPO_X86_KERNELS
#include <immintrin.h>

#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
#define GSPO_ISA avx512
#define GSPO_LANES 8
#include "sequence_ratio.inc"
#include "sequence_results.inc"
#include "token_surrogate.inc"

namespace gspo {
const Kernels kAvx512Kernels = {
    "avx512", avx512::partials, avx512::results, avx512::gradient,
    avx512::surrogate_forward, avx512::surrogate_backward,
};
}
#endif
