// What the bindings of the CUDA kernels share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "../cuda/blocks.h"

namespace gspo {
namespace cuda {

inline at::Tensor fp64(at::IntArrayRef shape, at::Device device) {
  return at::empty(shape, at::TensorOptions().dtype(at::kDouble).device(device));
}

inline Packing packing_of(const at::Tensor& bounds, int64_t tokens) {
  return {bounds.const_data_ptr<int32_t>(), bounds.numel() - 1, tokens};
}

}  // namespace cuda
}  // namespace gspo
