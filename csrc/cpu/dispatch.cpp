// The choice between the instruction sets that the CPU kernels are compiled for (kernels_*.cpp).
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

namespace gspo {

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
