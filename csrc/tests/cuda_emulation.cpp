// The CUDA kernels on a CPU: blocks.h and token_blocks.h for every block and thread of the grid, in an order that the
// caller draws, with every access checked. Not part of the library; tests/ops/test_cuda_emulation.py builds it as a
// program.
//
// It shows that index arithmetic, sums, conversions and clamping are right and that no result depends on the order of
// blocks and threads. It cannot show what only a GPU has: the shuffles themselves, races, launches, speed.
//
// Standard input: Header, then the vectors that it announces; standard output: table, loss, ratios, clipped, slopes,
// gradient; then of the token surrogate table, objective, gradient. Vectors are in heap blocks of their exact size, for
// the address sanitizer.
#include <stdio.h>
#include <stdlib.h>

#define GSPO_EXPECT(condition) \
  ((condition) ? (void)0 : (fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition), abort()))
#include "../cuda/token_blocks.h"

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

using namespace gspo;
using namespace gspo::cuda;

namespace {

struct Header {
  int64_t tokens, sequences, order;  // order: 0 counts up, anything else seeds a shuffle
  int64_t new_type, old_type, mask_type, entropy_type, advantages_type, gradient_type;  // Scalar; -1: no vector
  int64_t by_token;
  int64_t shift;  // elements past a 16-byte boundary at which vectors start
  double low, high, dual, denominator, grad_loss;
};

int64_t width(int64_t type) {
  const int64_t bytes[] = {4, 8, 2, 2, 1};
  return bytes[type];
}

void expect(bool good, const char* what) {
  if (!good) {
    fprintf(stderr, "%s\n", what);
    abort();
  }
}

// A vector of the standard input, `shift` elements past an aligned address.
struct Input {
  std::vector<char> memory;
  Vector vector;
  Input(int64_t type, int64_t size, int64_t shift) {
    if (type < 0) return;
    const int64_t bytes = size * width(type), before = shift * width(type);
    memory.resize(before + bytes);
    memory.shrink_to_fit();
    if (memory.empty()) return;
    expect((int64_t)fread(memory.data() + before, 1, bytes, stdin) == bytes, "the input is too short");
    vector = {memory.data() + before, (Scalar)type};
  }
};

// The numbers from 0 to n in the order to run them.
std::vector<int64_t> order_of(int64_t n, int64_t seed) {
  std::vector<int64_t> out(n);
  std::iota(out.begin(), out.end(), 0);
  std::mt19937_64 random(seed);
  if (seed != 0) std::shuffle(out.begin(), out.end(), random);
  return out;
}

// What add_threads in threads.h leaves in thread 0.
template <int kN>
void add_threads(double (&sums)[kThreads][kN]) {
  for (int warp = 0; warp < kWarps; ++warp) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      for (int lane = 0; lane < distance; ++lane) {
        add_partials(sums[warp * kWarp + lane], sums[warp * kWarp + lane + distance], kN);
      }
    }
    if (warp > 0) add_partials(sums[0], sums[warp * kWarp], kN);
  }
}

// The sums of every block and then of every sequence; `add` is the share of a thread, `finish` the second level.
template <int kN, class Arguments, class Add, class Finish>
void run_sums(const Arguments& a, int64_t order, const Add& add, const Finish& finish) {
  const int64_t places = block_places(a.packing), size = a.packing.num_sequences;
  std::vector<int> written(places, 0), trips(a.packing.num_tokens, 0);
  for (int64_t place : order_of(places, order)) {
    const Block block = block_at(a.packing, place);
    if (!block.exists) continue;
    for (int64_t t = block.begin; t < block.end; ++t) ++trips[t];
    double sums[kThreads][kN] = {};
    for (int64_t thread : order_of(kThreads, order)) add(block, (int)thread, sums[thread]);
    add_threads(sums);
    std::copy(sums[0], sums[0] + kN, row_at(a, place));
    written[place] = 1;
  }
  bool all_sound = true;
  for (int64_t s = 0; s < size; ++s) all_sound = all_sound && sound(a.packing, s);
  if (all_sound) {  // every token of a sequence is read once; every row that is added was written
    const int64_t begin = size > 0 ? a.packing.cu_seqlens[0] : 0, end = size > 0 ? a.packing.cu_seqlens[size] : 0;
    for (int64_t t = 0; t < a.packing.num_tokens; ++t) {
      expect(trips[t] == (t >= begin && t < end), "a token was not read exactly once");
    }
    for (int64_t s = 0; s < size; ++s) {
      for (int64_t at = a.packing.cu_seqlens[s] + kBlockTokens; at < a.packing.cu_seqlens[s + 1]; at += kBlockTokens) {
        expect(written[size + scratch_row(at)], "a scratch row is added that no block has written");
      }
    }
  }
  for (int64_t i : order_of(size * a.columns, order)) finish(i / a.columns, (int)(i % a.columns));
}

template <int kN>
void run_partials(const PartialsArguments& a, int64_t order) {
  run_sums<kN>(a, order, [&](const Block& block, int thread, double (&sums)[kN]) {
    thread_partials(a, block, thread, sums);
  }, [&](int64_t s, int column) { finish_column(a, s, column); });
}

void run_surrogate(const SurrogateForwardArguments& a, int64_t order) {
  constexpr int kN = kSurrogateColumns;
  run_sums<kN>(a, order, [&](const Block& block, int thread, double (&sums)[kN]) {
    thread_surrogate(a, block, thread, sums);
  }, [&](int64_t s, int column) { finish_surrogate(a, s, column); });
}

void run_forward(const ForwardArguments& a, int64_t order) {
  for (int64_t block : order_of(objective_rows(a.packing.num_sequences), order)) {
    double sums[kThreads][1] = {};
    for (int64_t thread : order_of(kThreads, order)) {
      const int64_t s = block * kThreads + thread;
      if (s < a.packing.num_sequences) sums[thread][0] = sequence_forward(a, s);
    }
    add_threads(sums);
    a.scratch[block] = sums[0][0];
  }
  double sums[kThreads][1];
  for (int thread = 0; thread < kThreads; ++thread) sums[thread][0] = thread_objective(a, thread);
  add_threads(sums);
  *a.loss = -sums[0][0] / a.denominator;
}

// The gradient of `type` that `run` writes for one span and thread, `shift` elements past an aligned address.
template <class Run>
std::vector<char> run_gradient(const Header& h, const Run& run) {
  std::vector<char> memory((h.tokens + h.shift) * width(h.gradient_type), 0x55);
  char* out = memory.data() + h.shift * width(h.gradient_type);
  for (int64_t span : order_of(divide_up(h.tokens, kSpan), h.order)) {
    for (int64_t thread : order_of(kThreads, h.order)) run(out, span, (int)thread);
  }
  return std::vector<char>(memory.begin() + h.shift * width(h.gradient_type), memory.end());
}

void put(const void* data, size_t size, size_t count) {
  expect(count == 0 || fwrite(data, size, count, stdout) == count, "the output is closed");
}

}  // namespace

int main() {
  Header h;
  expect(fread(&h, sizeof(h), 1, stdin) == 1, "the input is too short");
  const int64_t tokens = h.tokens, size = h.sequences;
  std::vector<int32_t> cu(size + 1);
  expect(fread(cu.data(), 4, size + 1, stdin) == (size_t)size + 1, "the input is too short");
  const Input fresh(h.new_type, tokens, h.shift), old(h.old_type, tokens, h.shift), mask(h.mask_type, tokens, h.shift);
  const Input entropy(h.entropy_type, tokens, h.shift);
  const Input advantages(h.advantages_type, h.by_token ? tokens : size, h.shift);
  const Vector nothing, by_token = h.by_token ? advantages.vector : nothing;
  const Packing packing = {cu.data(), size, tokens};

  const int columns = h.by_token ? kTokenColumns : kColumns;
  // Not a number, so that what is used without being written shows.
  std::vector<double> table(size * columns, NAN), scratch(scratch_rows(tokens) * columns, NAN);
  const PartialsArguments partials = {packing,  fresh.vector, old.vector,   mask.vector,   entropy.vector,
                                      by_token, columns,      table.data(), scratch.data()};
  h.by_token ? run_partials<kTokenColumns>(partials, h.order) : run_partials<kColumns>(partials, h.order);

  std::vector<double> ratios(size, NAN), clipped(2 * size, NAN), slopes(2 * size, NAN);
  std::vector<double> objectives(objective_rows(size), NAN), loss(1, NAN);
  const ClipBounds clip = {h.low, h.high, h.dual};
  const Vector by_sequence = h.by_token ? nothing : advantages.vector;
  const ForwardArguments forward = {packing,       table.data(),   columns,       by_sequence,       clip,
                                    h.denominator, ratios.data(),  clipped.data(), slopes.data(),    objectives.data(),
                                    loss.data()};
  run_forward(forward, h.order);

  const Scalar type = (Scalar)h.gradient_type;
  const std::vector<char> gradient = run_gradient(h, [&](char* out, int64_t span, int thread) {
    thread_gradient({packing, out, type, mask.vector, by_token, slopes.data(), &h.grad_loss, h.denominator}, span,
                    thread);
  });

  // The token surrogate of the same inputs; the gradient of the objectives is grad_loss, 2 grad_loss, 3 grad_loss, ...
  std::vector<double> sums(size * kSurrogateColumns, NAN), rest(scratch_rows(tokens) * kSurrogateColumns, NAN);
  std::vector<double> objective(size, NAN), grad(size);
  for (int64_t s = 0; s < size; ++s) grad[s] = h.grad_loss * (s + 1);
  const SurrogateTokens inputs = {fresh.vector, old.vector, mask.vector, advantages.vector, h.by_token != 0, clip};
  run_surrogate({packing, inputs, entropy.vector, sums.data(), rest.data(), objective.data()}, h.order);
  const std::vector<char> slope = run_gradient(h, [&](char* out, int64_t span, int thread) {
    thread_surrogate_gradient({packing, inputs, grad.data(), out, type}, span, thread);
  });

  put(table.data(), 8, table.size());
  put(loss.data(), 8, 1);
  put(ratios.data(), 8, ratios.size());
  put(clipped.data(), 8, clipped.size());
  put(slopes.data(), 8, slopes.size());
  put(gradient.data(), 1, gradient.size());
  put(sums.data(), 8, sums.size());
  put(objective.data(), 8, objective.size());
  put(slope.data(), 1, slope.size());
  return 0;
}
