// Types, shapes and devices of the operators' tensors, in the words of the Python references
// (gspo_megatron/ops/sequence_ratio_reference.py, token_surrogate_reference.py).
#pragma once

#include <ATen/core/Tensor.h>

#include "../scalars.h"
#include "../sequence_ratio.h"

namespace gspo {

inline Scalar float_type(const at::Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case at::kFloat: return Scalar::kFloat;
    case at::kDouble: return Scalar::kDouble;
    case at::kBFloat16: return Scalar::kBFloat16;
    case at::kHalf: return Scalar::kHalf;
    default: TORCH_CHECK_TYPE(false, name, " is ", x.scalar_type(), "; expected fp32, fp64, bf16 or fp16");
  }
}

inline Scalar advantage_type(const at::Tensor& x) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble, "advantages is ", x.scalar_type(),
                   "; expected fp32 or fp64");
  return x.scalar_type() == at::kDouble ? Scalar::kDouble : Scalar::kFloat;
}

inline Scalar mask_type(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Scalar::kFloat;
    case at::kDouble: return Scalar::kDouble;
    case at::kBool:
    case at::kByte: return Scalar::kByte;
    default: TORCH_CHECK_TYPE(false, "mask is ", x.scalar_type(), "; expected bool, uint8, fp32 or fp64");
  }
}

// A contiguous vector of `size` numbers on this device.
inline at::Tensor vector(const at::Tensor& x, const char* name, int64_t size, at::Device device) {
  TORCH_CHECK_VALUE(x.device() == device, name, " is on ", x.device(), "; all inputs must be on one device, here ",
                    device);
  TORCH_CHECK_VALUE(x.dim() == 1 && x.numel() == size, name, " has shape ", x.sizes(), "; expected [", size, "]");
  return x.contiguous();
}

// A contiguous [S + 1] int32, whatever its values.
inline at::Tensor boundary_vector(const at::Tensor& cu, at::Device device) {
  TORCH_CHECK_VALUE(cu.device() == device, "cu_seqlens is on ", cu.device(),
                    "; all inputs must be on one device, here ", device);
  TORCH_CHECK_TYPE(cu.scalar_type() == at::kInt, "cu_seqlens is ", cu.scalar_type(), "; expected int32");
  TORCH_CHECK_VALUE(cu.dim() == 1 && cu.numel() >= 1, "cu_seqlens has shape ", cu.sizes(), "; expected [S + 1]");
  return cu.contiguous();
}

// [S], or [T] with one a token ([S] where S = T). Returns whether they differ by token.
inline bool check_advantages(const at::Tensor& advantages, int64_t size, int64_t tokens, at::Device device) {
  const bool by_token = advantages.numel() != size;
  advantage_type(advantages);
  TORCH_CHECK_VALUE(advantages.dim() == 1 && (!by_token || advantages.numel() == tokens), "advantages has shape ",
                    advantages.sizes(), "; expected [", size, "], one a sequence, or [", tokens, "], one a token");
  TORCH_CHECK_VALUE(advantages.device() == device, "advantages is on ", advantages.device(),
                    "; all inputs must be on one device, here ", device);
  return by_token;
}

// What gspo_forward gets beside its packing. Returns whether advantages differ by token.
inline bool check_forward(const at::Tensor& partials, const at::Tensor& advantages, int64_t size, int64_t tokens,
                          double denominator, at::Device device) {
  const bool by_token = check_advantages(advantages, size, tokens, device);
  TORCH_CHECK_VALUE(partials.device() == device, "partials is on ", partials.device(),
                    "; all inputs must be on one device, here ", device);
  TORCH_CHECK_TYPE(partials.scalar_type() == at::kDouble, "partials is ", partials.scalar_type(), "; expected fp64");
  TORCH_CHECK_VALUE(partials.dim() == 2 && partials.size(0) == size &&
                        (partials.size(1) == kTokenColumns || (!by_token && partials.size(1) == kColumns)),
                    "partials has shape ", partials.sizes(), "; expected [", size, ", ",
                    by_token ? int(kTokenColumns) : int(kColumns), "]");
  TORCH_CHECK_VALUE(denominator > 0, "denominator = ", denominator, " must be positive");
  return by_token;
}

// What gspo_backward gets from gspo_forward.
inline void check_backward(const at::Tensor& grad_loss, const at::Tensor& slopes, int64_t size, at::Device device) {
  TORCH_CHECK_VALUE(grad_loss.numel() == 1 && grad_loss.scalar_type() == at::kDouble && grad_loss.device() == device,
                    "grad_loss must be one fp64 number on ", device);
  TORCH_CHECK_VALUE(slopes.dim() == 2 && slopes.size(0) == size && slopes.size(1) == 2 && slopes.device() == device &&
                        slopes.scalar_type() == at::kDouble,
                    "slopes must be [", size, ", 2] fp64 on ", device);
}

// What token_surrogate_backward gets beside the inputs of the forward.
inline void check_grad(const at::Tensor& grad, int64_t size, at::Device device) {
  TORCH_CHECK_VALUE(grad.dim() == 1 && grad.size(0) == size && grad.device() == device &&
                        grad.scalar_type() == at::kDouble,
                    "grad must be [", size, "] fp64 on ", device);
}

}  // namespace gspo
