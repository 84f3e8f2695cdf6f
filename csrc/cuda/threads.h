// The exchange of sums between the threads of a GPU block: what only the device compiler understands.
#pragma once

#include "blocks.h"

namespace gspo {
namespace cuda {

// Sums of all threads, in thread 0: lanes by halving distances, then warps in order. All threads of the block call it.
template <int kN>
static __device__ __forceinline__ void add_threads(double (&sums)[kN]) {
  __shared__ double warps[kWarps][kN];
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    double other[kN];
#pragma unroll
    for (int c = 0; c < kN; ++c) other[c] = __shfl_down_sync(0xffffffffu, sums[c], distance);
    add_partials(sums, other, kN);  // lanes that have no partner add their own; lane 0 never sees those
  }
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int c = 0; c < kN; ++c) warps[threadIdx.x / kWarp][c] = sums[c];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int w = 1; w < kWarps; ++w) add_partials(sums, warps[w], kN);
  }
}

}  // namespace cuda
}  // namespace gspo
