// Element types to fp64 and back, eight tokens at a time, and exp(d) - 1 - d: what one GPU thread does with numbers.
//
// Everything under csrc/cuda but the launches is inline functions for host and device alike, so that
// csrc/tests/cuda_emulation.cpp runs the same index arithmetic on a CPU, where every access can be checked
// (GSPO_EXPECT).
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "../scalars.h"
#include "../sequence_ratio.h"

#ifndef GSPO_EXPECT
#define GSPO_EXPECT(condition) ((void)sizeof(condition))  // not evaluated
#endif
#if defined(__CUDA_ARCH__)
#define GSPO_UNROLL _Pragma("unroll")
#else
#define GSPO_UNROLL
#endif

namespace gspo {
namespace cuda {

// Consecutive tokens that a thread takes at once: 16 bytes of bf16, 32 of fp32. Which thread adds a token is counted
// from the sequence's start and not from an aligned address, so that sums have the same bits at any alignment.
constexpr int kGroup = 8;

struct BFloat16 { uint16_t bits; };
struct Half { uint16_t bits; };

GSPO_INLINE float float_of(uint32_t bits) {
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

GSPO_INLINE uint32_t bits_of(float x) {
  uint32_t out;
  memcpy(&out, &x, 4);
  return out;
}

GSPO_INLINE double widen(double x) { return x; }
GSPO_INLINE double widen(float x) { return x; }
GSPO_INLINE double widen(uint8_t x) { return x; }
GSPO_INLINE double widen(BFloat16 x) { return float_of((uint32_t)x.bits << 16); }
GSPO_INLINE double widen(Half x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest < 0x0400u) return float_of(sign | bits_of((float)rest * 0x1p-24f));  // subnormal
  return float_of(sign | (rest >= 0x7c00u ? (rest << 13) | 0x7f800000u : (rest << 13) + (112u << 23)));
}

// To the nearest, ties to even; by way of fp32 for half precision, as torch converts.
GSPO_INLINE void narrow(double x, double& out) { out = x; }
GSPO_INLINE void narrow(double x, float& out) { out = (float)x; }
GSPO_INLINE void narrow(double x, BFloat16& out) {
  const float f = (float)x;
  const uint32_t bits = bits_of(f);
  out.bits = (uint16_t)(f != f ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
GSPO_INLINE void narrow(double x, Half& out) {
  const uint32_t bits = bits_of((float)x), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
  uint32_t half;
  if (size > 0x7f800000u) {
    half = 0x7e00u;  // not a number
  } else if (size >= 0x477ff000u) {
    half = 0x7c00u;  // 65520 and above round to infinity
  } else if (size < 0x38800000u) {
    half = bits_of(float_of(size) + 0.5f) - 0x3f000000u;  // below 2^-14: the addition rounds to multiples of 2^-24
  } else {
    half = ((size + 0x0fffu + ((size >> 13) & 1u)) >> 13) - (112u << 10);
  }
  out.bits = (uint16_t)(sign | half);
}

// ---- Groups: the widest aligned access where there is one ----

template <class T>
struct Raw {
  static constexpr int kBytes = sizeof(T) * kGroup < 16 ? sizeof(T) * kGroup : 16;
  static constexpr int kParts = sizeof(T) * kGroup / kBytes;
  alignas(16) T of[kGroup];
};

template <class T>
GSPO_INLINE bool whole(const T* at, int64_t count) {
  return count == kGroup && (uintptr_t)at % Raw<T>::kBytes == 0;
}

template <class T>
GSPO_INLINE void load_as(const void* data, int64_t first, int64_t count, double (&out)[kGroup]) {
  const T* from = (const T*)data + first;
  Raw<T> raw;
  constexpr int kBytes = Raw<T>::kBytes;
  if (whole(from, count)) {
    GSPO_UNROLL
    for (int p = 0; p < Raw<T>::kParts; ++p) {
      memcpy((char*)raw.of + p * kBytes, __builtin_assume_aligned((const char*)from + p * kBytes, kBytes), kBytes);
    }
  } else {
    GSPO_UNROLL
    for (int i = 0; i < kGroup; ++i) raw.of[i] = i < count ? from[i] : T{};
  }
  GSPO_UNROLL
  for (int i = 0; i < kGroup; ++i) out[i] = widen(raw.of[i]);
}

// Elements [first, first + count) of a vector of `size`, then zeros; all zeros where there is no vector. The type is a
// branch that every thread takes the same way: kernels for each combination of types would be hundreds.
GSPO_INLINE void load_group(const Vector& from, int64_t size, int64_t first, int64_t count, double (&out)[kGroup]) {
  if (from.data == nullptr) {
    GSPO_UNROLL
    for (int i = 0; i < kGroup; ++i) out[i] = 0.0;
    return;
  }
  GSPO_EXPECT(first >= 0 && count > 0 && count <= kGroup && first + count <= size);
  switch (from.type) {
    case Scalar::kFloat: return load_as<float>(from.data, first, count, out);
    case Scalar::kDouble: return load_as<double>(from.data, first, count, out);
    case Scalar::kBFloat16: return load_as<BFloat16>(from.data, first, count, out);
    case Scalar::kHalf: return load_as<Half>(from.data, first, count, out);
    default: return load_as<uint8_t>(from.data, first, count, out);
  }
}

template <class T>
GSPO_INLINE void store_as(void* data, int64_t first, int64_t count, const double (&values)[kGroup]) {
  T* to = (T*)data + first;
  Raw<T> raw;
  constexpr int kBytes = Raw<T>::kBytes;
  GSPO_UNROLL
  for (int i = 0; i < kGroup; ++i) narrow(values[i], raw.of[i]);
  if (whole(to, count)) {
    GSPO_UNROLL
    for (int p = 0; p < Raw<T>::kParts; ++p) {
      memcpy(__builtin_assume_aligned((char*)to + p * kBytes, kBytes), (const char*)raw.of + p * kBytes, kBytes);
    }
  } else {
    GSPO_UNROLL
    for (int i = 0; i < kGroup; ++i) {
      if (i < count) to[i] = raw.of[i];
    }
  }
}

GSPO_INLINE void store_group(void* to, Scalar type, int64_t size, int64_t first, int64_t count,
                             const double (&values)[kGroup]) {
  GSPO_EXPECT(first >= 0 && count > 0 && count <= kGroup && first + count <= size);
  switch (type) {
    case Scalar::kFloat: return store_as<float>(to, first, count, values);
    case Scalar::kDouble: return store_as<double>(to, first, count, values);
    case Scalar::kBFloat16: return store_as<BFloat16>(to, first, count, values);
    default: return store_as<Half>(to, first, count, values);
  }
}

// ---- exp(d) - 1 - d: the difference of expm1 loses digits for small d, where a series has them (to 2e-13) ----

GSPO_INLINE double k3_term(double d) {
  if (!(fabs(d) <= 0.25)) return expm1(d) - d;
  double q = d * (1.0 / 3628800) + 1.0 / 362880;  // q = sum of d^k / (k + 2)!
  q = q * d + 1.0 / 40320;
  q = q * d + 1.0 / 5040;
  q = q * d + 1.0 / 720;
  q = q * d + 1.0 / 120;
  q = q * d + 1.0 / 24;
  q = q * d + 1.0 / 6;
  q = q * d + 0.5;
  return d * d * q;
}

}  // namespace cuda
}  // namespace gspo
