// The kernels for any machine, and the choice between instruction sets.
#include <stdlib.h>
#include <string.h>

#define GSPO_ISA generic
#define GSPO_LANES 2  // SSE2, NEON
#include "sequence_ratio.inc"
#include "sequence_results.inc"
#include "token_surrogate.inc"

namespace gspo {

const Kernels kGenericKernels = {
    "generic", generic::partials, generic::results, generic::gradient,
    generic::surrogate_forward, generic::surrogate_backward,
};

static const Kernels& widest() {
#ifdef GSPO_X86_KERNELS
  const char* wanted = getenv("GSPO_MEGATRON_ISA");
  const bool any = wanted == nullptr || *wanted == 0;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  if (avx512 && (any || strcmp(wanted, "avx512") == 0)) return kAvx512Kernels;
  if (avx2 && (any || strcmp(wanted, "generic") != 0)) return kAvx2Kernels;
#endif
  return kGenericKernels;
}

const Kernels& kernels() {
  static const Kernels& chosen = widest();
  return chosen;
}

}  // namespace gspo
