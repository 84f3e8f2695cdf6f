// What the bindings of the CPU kernels share: checked vectors and boundaries, and how work is split between threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>

#include "../sequence_ratio.h"
#include "checks.h"

namespace gspo {
namespace cpu {

constexpr int64_t kChunkTokens = 8192;       // a thread takes whole chunks; results do not depend on it
constexpr int64_t kTokensPerThread = 32768;  // below this a second thread costs more than it brings
constexpr int64_t kChunkSequences = 1024;

inline at::Tensor vector(const at::Tensor& x, const char* name, int64_t size) {
  return gspo::vector(x, name, size, at::Device(at::kCPU));
}

// [S + 1] int32, monotone and inside [0, T]: every index that the kernels compute is then in range.
inline at::Tensor boundaries(const at::Tensor& cu, int64_t num_tokens) {
  const at::Tensor out = boundary_vector(cu, at::Device(at::kCPU));
  const int32_t* bounds = out.const_data_ptr<int32_t>();
  const int64_t last = out.numel() - 1;
  TORCH_CHECK_VALUE(bounds[0] >= 0, "cu_seqlens[0] = ", bounds[0], " is negative");
  bool falls = false;  // first all at once, which is one quick pass
  for (int64_t i = 0; i < last; ++i) falls |= bounds[i] > bounds[i + 1];
  for (int64_t i = 0; falls && i < last; ++i) {
    TORCH_CHECK_VALUE(bounds[i] <= bounds[i + 1], "cu_seqlens[", i + 1, "] = ", bounds[i + 1],
                      " is less than cu_seqlens[", i, "] = ", bounds[i]);
  }
  TORCH_CHECK_VALUE(bounds[last] <= num_tokens, "cu_seqlens ends at ", bounds[last], " but there are ", num_tokens,
                    " tokens");
  return out;
}

template <class F>
void over_chunks(int64_t count, int64_t chunk, int64_t per_thread, const F& work) {
  const int64_t chunks = (count + chunk - 1) / chunk;
  at::parallel_for(0, chunks, per_thread / chunk, [&](int64_t begin, int64_t end) {
    work(begin * chunk, std::min(end * chunk, count));
  });
}

// Adds the sums of each sequence's later blocks, in scratch, to those of its first one, in the table.
inline void add_blocks(const int32_t* cu, int64_t size, int columns, double* table, const double* scratch) {
  over_chunks(size, kChunkSequences, 16 * kChunkSequences, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      for (int64_t at = cu[s] + kBlockTokens; at < cu[s + 1]; at += kBlockTokens) {
        add_partials(table + s * columns, scratch + scratch_row(at) * columns, columns);
      }
    }
  });
}

}  // namespace cpu
}  // namespace gspo
