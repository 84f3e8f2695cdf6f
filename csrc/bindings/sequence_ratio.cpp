// sequence_partials, gspo_forward and gspo_backward for the CPU, under the names of gspo_megatron/ops/sequence_ratio.py
// (schema, fake and autograd are there). Checks what memory safety needs, allocates, and splits the work.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "../cpu/kernels.h"
#include "../sequence_ratio.h"
#include "checks.h"
#include "cpu.h"

namespace gspo {
namespace {

using namespace cpu;

// The kernels know masks of bytes and of fp32; comparing another type with 0 is exact.
at::Tensor narrow_mask(const at::Tensor& mask) { return mask.scalar_type() == at::kDouble ? mask.gt(0) : mask; }

// Old log-probs in half precision have a kernel only beside new ones of the same type; widening them is exact.
at::Tensor widen_old(const at::Tensor& old, const at::Tensor& fresh) {
  const bool half = old.scalar_type() == at::kBFloat16 || old.scalar_type() == at::kHalf;
  return half && old.scalar_type() != fresh.scalar_type() ? old.to(at::kFloat) : old;
}

at::Tensor sequence_partials(const at::Tensor& logp_new, const at::Tensor& logp_old, const at::Tensor& mask,
                             const at::Tensor& cu_seqlens, const std::optional<at::Tensor>& entropy,
                             const std::optional<at::Tensor>& token_advantages) {
  const int64_t tokens = logp_new.numel();
  PartialsArguments a;
  // Held until the end: contiguous() may have made copies.
  const at::Tensor fresh = vector(logp_new, "logp_new", tokens);
  const at::Tensor old = widen_old(vector(logp_old, "logp_old", tokens), fresh);
  const at::Tensor kept = narrow_mask(vector(mask, "mask", tokens)), bounds = boundaries(cu_seqlens, tokens);
  a.logp_new = {fresh.const_data_ptr(), float_type(fresh, "logp_new")};
  a.logp_old = {old.const_data_ptr(), float_type(old, "logp_old")};
  a.mask = {kept.const_data_ptr(), mask_type(kept)};
  at::Tensor entropies, advantages;
  if (entropy) {
    entropies = vector(*entropy, "entropy", tokens);
    a.entropy = {entropies.const_data_ptr(), float_type(entropies, "entropy")};
  }
  if (token_advantages) {
    advantages = vector(*token_advantages, "advantages", tokens);
    a.advantages = {advantages.const_data_ptr(), advantage_type(advantages)};
  }
  a.cu_seqlens = bounds.const_data_ptr<int32_t>();
  a.num_sequences = bounds.numel() - 1;
  a.num_tokens = tokens;
  a.columns = token_advantages ? kTokenColumns : kColumns;
  const at::Tensor table = at::empty({a.num_sequences, a.columns}, at::kDouble);
  const at::Tensor scratch = at::empty({scratch_rows(tokens), a.columns}, at::kDouble);
  a.table = table.mutable_data_ptr<double>();
  a.scratch = scratch.mutable_data_ptr<double>();

  const Kernels& run = kernels();
  // One position past the last token, where sequences without tokens may start.
  over_chunks(tokens + 1, kChunkTokens, kTokensPerThread,
              [&](int64_t begin, int64_t end) { run.partials(a, begin, end); });
  add_blocks(a.cu_seqlens, a.num_sequences, a.columns, a.table, a.scratch);
  return table;
}

// The objectives' sum, added in runs of kChunkSequences whatever the number of threads.
double sum_results(const ResultArguments& a, int64_t size) {
  const at::Tensor sums = at::empty({(size + kChunkSequences - 1) / kChunkSequences}, at::kDouble);
  double* sum = sums.mutable_data_ptr<double>();
  over_chunks(size, kChunkSequences, 4 * kChunkSequences, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kChunkSequences) {
      sum[first / kChunkSequences] = kernels().results(a, first, std::min(first + kChunkSequences, end));
    }
  });
  double total = 0.0;
  for (int64_t c = 0; c < sums.numel(); ++c) total += sum[c];
  return total;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gspo_forward(
    const at::Tensor& logp_new, const at::Tensor& partials, const at::Tensor& advantages, const at::Tensor& mask,
    const at::Tensor& cu_seqlens, double clip_low, double clip_high, double denominator, double clip_dual) {
  const int64_t size = cu_seqlens.numel() - 1, tokens = logp_new.numel();
  vector(mask, "mask", tokens);  // read by the backward alone; an error belongs here
  mask_type(mask);
  float_type(logp_new, "logp_new");
  boundaries(cu_seqlens, tokens);
  const bool by_token = check_forward(partials, advantages, size, tokens, denominator, at::Device(at::kCPU));

  const at::Tensor table = partials.contiguous(), weights = advantages.contiguous();
  const at::Tensor ratios = at::empty({size}, at::kDouble), clipped = at::empty({size, 2}, at::kDouble);
  const at::Tensor slopes = at::empty({size, 2}, at::kDouble), loss = at::empty({}, at::kDouble);
  ResultArguments a;
  a.table = table.const_data_ptr<double>();
  a.columns = table.size(1);
  // Where advantages differ by token, their sums are in the table.
  if (!by_token) a.advantages = {weights.const_data_ptr(), advantage_type(weights)};
  a.clip = {1.0 - clip_low, 1.0 + clip_high, clip_dual};
  a.ratios = ratios.mutable_data_ptr<double>();
  a.clipped = clipped.mutable_data_ptr<double>();
  a.slopes = slopes.mutable_data_ptr<double>();
  const double objective = sum_results(a, size);
  *loss.mutable_data_ptr<double>() = -objective / denominator;
  return {loss, ratios, clipped, slopes};
}

at::Tensor gspo_backward(const at::Tensor& grad_loss, const at::Tensor& slopes,
                         const std::optional<at::Tensor>& token_advantages, const at::Tensor& mask,
                         const at::Tensor& cu_seqlens, double denominator, at::ScalarType dtype) {
  const int64_t size = cu_seqlens.numel() - 1, tokens = mask.numel();
  check_backward(grad_loss, slopes, size, at::Device(at::kCPU));
  const at::Tensor kept = narrow_mask(vector(mask, "mask", tokens)), bounds = boundaries(cu_seqlens, tokens);
  const at::Tensor factors = slopes.contiguous();
  const at::Tensor out = at::empty({tokens}, dtype);
  GradientArguments a;
  a.gradient = out.mutable_data_ptr();
  a.type = float_type(out, "gradient");
  a.mask = {kept.const_data_ptr(), mask_type(kept)};
  at::Tensor advantages;
  if (token_advantages) {
    advantages = vector(*token_advantages, "advantages", tokens);
    a.advantages = {advantages.const_data_ptr(), advantage_type(advantages)};
  }
  a.cu_seqlens = bounds.const_data_ptr<int32_t>();
  a.num_sequences = size;
  a.slopes = factors.const_data_ptr<double>();
  a.scale = -*grad_loss.const_data_ptr<double>() / denominator;
  const Kernels& run = kernels();
  over_chunks(tokens, kChunkTokens, kTokensPerThread, [&](int64_t begin, int64_t end) { run.gradient(a, begin, end); });
  return out;
}

std::string instruction_set() { return kernels().instruction_set; }

}  // namespace
}  // namespace gspo

TORCH_LIBRARY_IMPL(gspo_megatron, CPU, m) {
  m.impl("sequence_partials", gspo::sequence_partials);
  m.impl("gspo_forward", gspo::gspo_forward);
  m.impl("gspo_backward", gspo::gspo_backward);
}

TORCH_LIBRARY_FRAGMENT(gspo_megatron, m) { m.def("instruction_set() -> str", gspo::instruction_set); }
