// token_surrogate_forward and token_surrogate_backward for the CPU, under the names of
// gspo_megatron/ops/token_surrogate.py (schema, fake and autograd are there).
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "../cpu/kernels.h"
#include "../token_surrogate.h"
#include "checks.h"
#include "cpu.h"

namespace gspo {
namespace {

using namespace cpu;

// The inputs of both passes: checked, contiguous, and alive as long as this is.
struct Inputs {
  at::Tensor fresh, old, mask, bounds, advantages;
  SurrogateTokens tokens;

  Inputs(const at::Tensor& logp_new, const at::Tensor& logp_old, const at::Tensor& loss_mask,
         const at::Tensor& cu_seqlens, const at::Tensor& weights, ClipBounds clip) {
    const int64_t size = logp_new.numel();
    fresh = vector(logp_new, "logp_new", size);
    tokens.logp_new = {fresh.const_data_ptr(), float_type(fresh, "logp_new")};
    mask = vector(loss_mask, "mask", size);
    tokens.mask = {mask.const_data_ptr(), mask_type(mask)};
    bounds = boundaries(cu_seqlens, size);
    tokens.cu_seqlens = bounds.const_data_ptr<int32_t>();
    tokens.num_sequences = bounds.numel() - 1;
    old = vector(logp_old, "logp_old", size);
    tokens.logp_old = {old.const_data_ptr(), float_type(old, "logp_old")};
    tokens.by_token = check_advantages(weights, tokens.num_sequences, size, at::Device(at::kCPU));
    advantages = vector(weights, "advantages", weights.numel());
    tokens.advantages = {advantages.const_data_ptr(), advantage_type(advantages)};
    tokens.clip = clip;
  }
};

std::tuple<at::Tensor, at::Tensor> token_surrogate_forward(
    const at::Tensor& logp_new, const at::Tensor& logp_old, const at::Tensor& mask, const at::Tensor& cu_seqlens,
    const std::optional<at::Tensor>& entropy, const at::Tensor& advantages, double clip_low, double clip_high,
    double clip_dual) {
  const int64_t tokens = logp_new.numel();
  const Inputs in(logp_new, logp_old, mask, cu_seqlens, advantages, {1.0 - clip_low, 1.0 + clip_high, clip_dual});
  SurrogateForwardArguments a = {in.tokens, {}, nullptr, nullptr};
  at::Tensor entropies;
  if (entropy) {
    entropies = vector(*entropy, "entropy", tokens);
    a.entropy = {entropies.const_data_ptr(), float_type(entropies, "entropy")};
  }
  const int64_t size = in.tokens.num_sequences;
  const at::Tensor table = at::empty({size, kSurrogateColumns}, at::kDouble);
  const at::Tensor scratch = at::empty({scratch_rows(tokens), kSurrogateColumns}, at::kDouble);
  a.table = table.mutable_data_ptr<double>();
  a.scratch = scratch.mutable_data_ptr<double>();
  const Kernels& run = kernels();
  // One position past the last token, where sequences without tokens may start.
  over_chunks(tokens + 1, kChunkTokens, kTokensPerThread,
              [&](int64_t begin, int64_t end) { run.surrogate_forward(a, begin, end); });
  add_blocks(in.tokens.cu_seqlens, size, kSurrogateColumns, a.table, a.scratch);
  const at::Tensor objective = at::empty({size}, at::kDouble);
  double* out = objective.mutable_data_ptr<double>();
  for (int64_t s = 0; s < size; ++s) out[s] = a.table[s * kSurrogateColumns + kObjective];
  return {objective, table};
}

at::Tensor token_surrogate_backward(const at::Tensor& grad, const at::Tensor& logp_new, const at::Tensor& logp_old,
                                    const at::Tensor& mask, const at::Tensor& cu_seqlens, const at::Tensor& advantages,
                                    double clip_low, double clip_high, double clip_dual) {
  const Inputs in(logp_new, logp_old, mask, cu_seqlens, advantages, {1.0 - clip_low, 1.0 + clip_high, clip_dual});
  check_grad(grad, in.tokens.num_sequences, at::Device(at::kCPU));
  const at::Tensor factors = grad.contiguous();
  const at::Tensor out = at::empty({logp_new.numel()}, logp_new.scalar_type());
  const SurrogateBackwardArguments a = {in.tokens, factors.const_data_ptr<double>(), out.mutable_data_ptr(),
                                        in.tokens.logp_new.type};
  const Kernels& run = kernels();
  over_chunks(logp_new.numel(), kChunkTokens, kTokensPerThread,
              [&](int64_t begin, int64_t end) { run.surrogate_backward(a, begin, end); });
  return out;
}

}  // namespace
}  // namespace gspo

TORCH_LIBRARY_IMPL(gspo_megatron, CPU, m) {
  m.impl("token_surrogate_forward", gspo::token_surrogate_forward);
  m.impl("token_surrogate_backward", gspo::token_surrogate_backward);
}
