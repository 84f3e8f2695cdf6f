// The CPU kernels against plain sums in long double, in vectors that end where their heap block ends. Not part of the
// library; tests/ops/test_sanitizers.py builds it as a program, with the address and undefined-behaviour sanitizers.
//
// It shows that no kernel reads or writes outside its inputs, for every element type, packing and split into ranges,
// that everything it promises is written, and that no bit depends on the split. Rounding to half precision is tested
// against torch elsewhere; here it must only be as near as the type allows. The instruction set is the library's choice
// (GSPO_MEGATRON_ISA). Prints its name and the number of comparisons.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "../cpu/kernels.h"
#include "../sequence_ratio.h"

using namespace gspo;

namespace {

std::mt19937_64 random_bits(1);
int64_t comparisons = 0;
const Vector nothing;

int64_t width(Scalar type) {
  const int64_t bytes[] = {4, 8, 2, 2, 1};
  return bytes[(int)type];
}

// sign, exponent and mantissa by the definition of the two 16-bit formats.
long double half_precision(uint16_t bits, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const long double fraction = std::ldexp((long double)(bits & ((1 << mantissa_bits) - 1)), -mantissa_bits);
  const long double sign = bits >> 15 ? -1.0L : 1.0L;
  if (exponent == (1 << exponent_bits) - 1) return fraction != 0 ? NAN : sign * INFINITY;
  return sign * (exponent == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1 + fraction, exponent - bias));
}

template <class T>
T element(const Vector& from, int64_t i) {
  T out;
  memcpy(&out, (const char*)from.data + i * sizeof(T), sizeof(T));
  return out;
}

long double number(const Vector& from, int64_t i) {
  switch (from.type) {
    case Scalar::kFloat: return element<float>(from, i);
    case Scalar::kDouble: return element<double>(from, i);
    case Scalar::kBFloat16: return half_precision(element<uint16_t>(from, i), 8);
    case Scalar::kHalf: return half_precision(element<uint16_t>(from, i), 5);
    default: return element<uint8_t>(from, i);
  }
}

// `size` elements, `shift` elements past an aligned address, the last byte of the heap block being their last.
struct Buffer {
  std::unique_ptr<char[]> memory;
  Vector vector;
  Buffer(Scalar type, int64_t size, int64_t shift) : memory(new char[(size + shift) * width(type)]) {
    memset(memory.get(), 0x55, (size + shift) * width(type));
    // Where there is nothing, torch gives no address either.
    vector = {size > 0 ? memory.get() + shift * width(type) : nullptr, type};
  }
  // About this value: what the checks compare with is read back.
  void put(int64_t i, double value) {
    char* at = (char*)vector.data + i * width(vector.type);
    const float single = (float)value;
    uint32_t bits;
    memcpy(&bits, &single, 4);
    uint16_t brain = (uint16_t)(bits >> 16);
    const int exponent = (int)((bits >> 23) & 255u) - 112;  // fp16's
    const uint32_t fraction = bits >> 13 & 0x3ffu, tiny = exponent > -10 && exponent <= 0 ? fraction >> -exponent : 0u;
    const uint32_t size = !std::isfinite(single) ? 0x7c01u : exponent > 0 ? (uint32_t)exponent << 10 | fraction : tiny;
    const uint16_t half = (uint16_t)((bits >> 16 & 0x8000u) | size);
    const uint8_t byte = value > 0;
    switch (vector.type) {
      case Scalar::kFloat: memcpy(at, &single, 4); break;
      case Scalar::kDouble: memcpy(at, &value, 8); break;
      case Scalar::kBFloat16: memcpy(at, &brain, 2); break;
      case Scalar::kHalf: memcpy(at, &half, 2); break;
      default: memcpy(at, &byte, 1);
    }
  }
};

void expect(bool good, const char* what, int64_t where, long double got = 0, long double want = 0) {
  ++comparisons;
  if (good) return;
  fprintf(stderr, "%s at %lld: %.17Lg, expected %.17Lg\n", what, (long long)where, got, want);
  abort();
}

// Every range once, in a drawn order: what several threads do. `length` 0: all in one.
template <class Run>
void in_ranges(int64_t count, int64_t length, const Run& run) {
  if (length == 0) return run(int64_t(0), count);
  std::vector<int64_t> order((count + length - 1) / length);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random_bits);
  for (int64_t i : order) run(i * length, std::min((i + 1) * length, count));
}

std::vector<int64_t> range_lengths(int64_t tokens) { return {0, 8192, tokens < 2000 ? 1 : 1237}; }

struct Packing {
  std::vector<int32_t> cu;
  int64_t tokens;
  // `around` tokens that belong to no sequence stand before the first and after the last.
  Packing(const std::vector<int>& lengths, int around) : cu(1, around) {
    for (int length : lengths) cu.push_back(cu.back() + length);
    cu.shrink_to_fit();
    tokens = cu.back() + around;
  }
  int64_t size() const { return (int64_t)cu.size() - 1; }
};

struct Inputs {  // masked tokens and those of no sequence hold not-a-number
  Buffer fresh, old, mask, entropy, advantages;
  Inputs(const Packing& p, Scalar fresh_type, Scalar old_type, Scalar mask_type, Scalar entropy_type,
         Scalar advantages_type, int64_t shift, double spread)
      : fresh(fresh_type, p.tokens, shift), old(old_type, p.tokens, shift), mask(mask_type, p.tokens, shift),
        entropy(entropy_type, p.tokens, shift), advantages(advantages_type, p.tokens, shift) {
    std::normal_distribution<double> normal;
    for (int64_t t = 0; t < p.tokens; ++t) {
      const bool inside = t >= p.cu.front() && t < p.cu.back(), keep = random_bits() % 4 > 0;
      const bool hole = !inside || (!keep && random_bits() % 2);
      const double base = -3 * std::abs(normal(random_bits));
      fresh.put(t, hole ? NAN : base + spread * normal(random_bits));
      old.put(t, hole ? NAN : base);
      mask.put(t, keep || !inside);
      entropy.put(t, hole ? NAN : std::abs(normal(random_bits)));
      advantages.put(t, hole ? NAN : normal(random_bits));
    }
  }
};

void check_row(const double* row, const Inputs& in, bool entropy, int columns, int64_t begin, int64_t end) {
  long double want[kTokenColumns] = {}, size[kTokenColumns] = {};
  for (int64_t t = begin; t < end; ++t) {
    if (!(number(in.mask.vector, t) > 0)) continue;
    const long double d = number(in.fresh.vector, t) - number(in.old.vector, t), k3 = std::expm1(d) - d;
    const long double a = number(in.advantages.vector, t);
    const long double terms[kTokenColumns] = {
        1, d, d * d, k3, std::abs(d), entropy ? number(in.entropy.vector, t) : 0,
        a > 0 ? a : 0, a < 0 ? a : 0, (long double)(a > 0), (long double)(a < 0)};
    for (int c = 0; c < columns; ++c) {
      want[c] = c == kMaxAbs ? std::max(want[c], terms[c]) : want[c] + terms[c];
      size[c] += std::abs(terms[c]);
    }
  }
  for (int c = 0; c < columns; ++c) {
    expect(std::abs(row[c] - want[c]) <= 1e-11L * size[c], "a column of the table", c, row[c], want[c]);
  }
}

void check_partials(const Packing& p, const Inputs& in, bool entropy, bool by_token) {
  const int columns = by_token ? kTokenColumns : kColumns;
  std::vector<double> first;
  for (int64_t length : range_lengths(p.tokens)) {
    // Not a number, so that what is used without being written shows.
    std::vector<double> table(p.size() * columns, NAN), scratch(scratch_rows(p.tokens) * columns, NAN);
    const PartialsArguments a = {in.fresh.vector, in.old.vector, in.mask.vector, entropy ? in.entropy.vector : nothing,
                                 by_token ? in.advantages.vector : nothing, p.cu.data(), p.size(), p.tokens, columns,
                                 table.data(), scratch.data()};
    in_ranges(p.tokens + 1, length, [&](int64_t begin, int64_t end) { kernels().partials(a, begin, end); });
    for (int64_t s = 0; s < p.size(); ++s) {
      for (int64_t at = p.cu[s] + kBlockTokens; at < p.cu[s + 1]; at += kBlockTokens) {
        add_partials(&table[s * columns], &scratch[scratch_row(at) * columns], columns);
      }
    }
    if (length == 0) {
      first = table;
      for (int64_t s = 0; s < p.size(); ++s) check_row(&table[s * columns], in, entropy, columns, p.cu[s], p.cu[s + 1]);
    }
    expect(table.empty() || memcmp(table.data(), first.data(), table.size() * 8) == 0, "bits for ranges of", length);
  }
}

// The results of drawn tables, for advantages by sequence or by token; some sequences are empty.
void check_results(int64_t size, bool by_token, Scalar type, int64_t shift) {
  const int columns = by_token ? kTokenColumns : kColumns;
  const ClipBounds clip = {0.95, 1.1, 1.3};
  std::normal_distribution<double> normal;
  std::vector<double> table(size * columns), ratios(size, NAN), clipped(2 * size, NAN), slopes(2 * size, NAN);
  Buffer advantages(type, size, shift);
  for (int64_t s = 0; s < size; ++s) {
    double* row = &table[s * columns];
    row[kNumTokens] = (double)(random_bits() % 4);
    row[kSumLogRatio] = row[kNumTokens] * 0.2 * normal(random_bits);
    for (int c = kSumPositive; c < columns; ++c) row[c] = row[kNumTokens] * (c == kSumNegative ? -1 : 1);
    advantages.put(s, normal(random_bits));
  }
  const ResultArguments a = {table.data(), columns, by_token ? nothing : advantages.vector, clip,
                             ratios.data(), clipped.data(), slopes.data()};
  const double got = kernels().results(a, 0, size);
  long double objective = 0, scale = 0;
  for (int64_t s = 0; s < size; ++s) {
    const double* row = &table[s * columns];
    const long double n = row[kNumTokens], ratio = n > 0 ? std::exp((long double)row[kSumLogRatio] / n) : 1;
    const long double upper = std::min(ratio, 1.1L), lower = std::max(std::min(ratio, 1.3L), 0.95L);
    const long double advantage = by_token ? 0 : number(advantages.vector, s);
    const long double term = by_token ? upper - lower : advantage * (advantage < 0 ? lower : upper);
    objective += n > 0 ? term : 0, scale += 1 + std::abs(term);
    expect(std::abs(ratios[s] - ratio) <= 1e-15L * ratio, "a ratio", s, ratios[s], ratio);
    const bool plus = by_token || advantage > 0, minus = by_token || advantage < 0;
    const double low = minus && ratio < 0.95L ? n : 0, high = (plus && ratio > 1.1L) * n + (minus && ratio > 1.3L) * n;
    expect(clipped[2 * s] == low && clipped[2 * s + 1] == high, "tokens clipped", s);
    const long double slope = n > 0 ? ratio * (by_token ? 1 : advantage) / n : 0;
    const long double positive = by_token ? (ratio == upper) * slope : (low + high == 0) * slope;
    const long double negative = by_token ? (ratio == lower) * slope : positive;
    const long double wrong = std::abs(slopes[2 * s] - positive) + std::abs(slopes[2 * s + 1] - negative);
    expect(wrong <= 1e-15L * std::abs(slope), "a slope", s, slopes[2 * s], positive);
  }
  expect(std::abs(got - objective) <= 1e-15L * scale, "the objective", size, got, objective);
}

void check_gradient(const Packing& p, const Inputs& in, Scalar type, bool by_token, int64_t shift) {
  const double precision[] = {0x1p-24, 0x1p-53, 0x1p-8, 0x1p-11, 0};
  std::vector<double> slopes(2 * p.size());
  std::normal_distribution<double> normal;
  for (double& slope : slopes) slope = normal(random_bits);
  for (int64_t length : range_lengths(p.tokens)) {
    const Buffer out(type, p.tokens, shift);
      const GradientArguments a = {(void*)out.vector.data, type, in.mask.vector,
                                 by_token ? in.advantages.vector : nothing, p.cu.data(), p.size(), slopes.data(), -0.5};
    in_ranges(p.tokens, length, [&](int64_t begin, int64_t end) {
      // What stands next to the range belongs to another thread.
      const int64_t bytes = width(type), low = std::max(begin - 40, int64_t(0)), high = std::min(end + 40, p.tokens);
      const char* data = (const char*)out.vector.data;
      const std::vector<char> before(data + low * bytes, data + begin * bytes);
      const std::vector<char> after(data + end * bytes, data + high * bytes);
      kernels().gradient(a, begin, end);
      expect(std::equal(before.begin(), before.end(), data + low * bytes), "a token before the range", begin);
      expect(std::equal(after.begin(), after.end(), data + end * bytes), "a token after the range", end);
    });
    for (int64_t t = 0, s = 0; t < p.tokens; ++t) {
      while (s < p.size() && t >= p.cu[s + 1]) ++s;
      long double want = 0;
      if (t >= p.cu[0] && s < p.size() && number(in.mask.vector, t) > 0) {
        const long double advantage = number(in.advantages.vector, t);
        want = -0.5L * (by_token ? advantage * slopes[2 * s + (advantage < 0)] : slopes[2 * s]);
      }
      const long double got = number(out.vector, t);
      expect(std::abs(got - want) <= precision[(int)type] * std::abs(want) + 0x1p-24, "the gradient", t, got, want);
    }
  }
}

std::vector<std::vector<int>> packings() {
  std::vector<int> up(70), short_ones(300, 16), alone(200, 0);
  std::iota(up.begin(), up.end(), 0);  // every length around the widths of vectors
  alone[100] = 9000;
  return {{}, {0}, {1}, {7}, {8}, {0, 0, 3, 0}, {7, 8, 9, 1, 33}, up, short_ones, alone,
          {4095, 4097, 4096, 1}, {5, 12289, 0, 8192, 3}};
}

// The rest is drawn. Wide log-ratios and narrow ones, because the k3 terms have a form for each.
void check_types(Scalar fresh, Scalar old, Scalar mask) {
  const Scalar floats[] = {Scalar::kFloat, Scalar::kDouble, Scalar::kBFloat16, Scalar::kHalf};
  for (const std::vector<int>& lengths : packings()) {
    for (int shift : {0, 1, 3}) {
      const auto draw = [](int n) { return (int)(random_bits() % n); };
      const Packing p(lengths, draw(2) * 5);
      const Inputs in(p, fresh, old, mask, floats[draw(4)], floats[draw(2)], shift, draw(3) ? 0.01 : 2.0);
      const bool by_token = draw(2);
      check_partials(p, in, draw(2), by_token);
      check_gradient(p, in, fresh, by_token, shift);
    }
  }
}

}  // namespace

int main() {
  for (Scalar fresh : {Scalar::kFloat, Scalar::kDouble, Scalar::kBFloat16, Scalar::kHalf}) {
    for (Scalar mask : {Scalar::kFloat, Scalar::kByte}) {
      check_types(fresh, Scalar::kFloat, mask);
      check_types(fresh, Scalar::kDouble, mask);
      if (width(fresh) == 2) check_types(fresh, fresh, mask);
    }
  }
  for (int64_t size : {0, 1, 7, 8, 130, 1000}) {
    for (Scalar type : {Scalar::kFloat, Scalar::kDouble}) {
      for (bool by_token : {false, true}) check_results(size, by_token, type, size % 2);
    }
  }
  const Packing long_one({131073, 70001}, 0);
  const Inputs in(long_one, Scalar::kFloat, Scalar::kFloat, Scalar::kFloat, Scalar::kFloat, Scalar::kFloat, 1, 0.05);
  check_partials(long_one, in, true, true);
  printf("%s %lld\n", kernels().instruction_set, (long long)comparisons);
  return 0;
}
