// Vectors of GSPO_LANES doubles in the compiler's own vector type, loads from every element type, exp and the k3 term;
// intrinsics only where the compiler finds no short way.
// Included once by each instruction set's file, inside its namespace: nothing here may have a shared symbol.

typedef double VecD __attribute__((vector_size(8 * GSPO_LANES)));
typedef double Pair __attribute__((vector_size(16)));
typedef double Four __attribute__((vector_size(32)));
typedef int64_t VecI __attribute__((vector_size(8 * GSPO_LANES)));
typedef float VecF __attribute__((vector_size(4 * GSPO_LANES)));
typedef uint32_t VecU __attribute__((vector_size(4 * GSPO_LANES)));
typedef int32_t VecS __attribute__((vector_size(4 * GSPO_LANES)));
typedef uint16_t VecH __attribute__((vector_size(2 * GSPO_LANES)));
typedef uint8_t VecB __attribute__((vector_size(GSPO_LANES)));

struct BFloat16 { uint16_t bits; };
struct Half { uint16_t bits; };

template <class V, class T>
GSPO_INLINE V read(const T* from) {
  V out;
  __builtin_memcpy(&out, from, sizeof(V));
  return out;
}

// ---- Masks, and what differs by instruction set: GCC's own vectors make several instructions of each with AVX512 ----

#if GSPO_LANES == 8

typedef __mmask8 Keep;  // one bit a lane
constexpr Keep kAll = 0xff;  // GCC 12 warns of the intrinsics without a mask: they start from an undefined register

GSPO_INLINE VecD widen(VecF x) { return (VecD)_mm512_maskz_cvtps_pd(kAll, (__m256)x); }
GSPO_INLINE Keep positive(VecF x) { return _mm256_cmp_ps_mask((__m256)x, _mm256_setzero_ps(), _CMP_GT_OQ); }
GSPO_INLINE Keep not_zero(const uint8_t* p) {
  const __m128i bytes = _mm_loadl_epi64((const __m128i*)p);
  return (Keep)_mm_test_epi8_mask(bytes, bytes);
}
GSPO_INLINE Keep first_lanes(int64_t n) { return n >= GSPO_LANES ? kAll : n > 0 ? (Keep)((1u << n) - 1) : (Keep)0; }
GSPO_INLINE VecD kept(Keep keep, VecD x) { return (VecD)_mm512_maskz_mov_pd(keep, (__m512d)x); }
GSPO_INLINE VecD add_one(Keep keep, VecD to) {
  return (VecD)_mm512_mask_add_pd((__m512d)to, keep, (__m512d)to, _mm512_set1_pd(1.0));
}
GSPO_INLINE VecD larger(VecD a, VecD b) { return (VecD)_mm512_maskz_max_pd(kAll, (__m512d)a, (__m512d)b); }
GSPO_INLINE bool any_above(VecD x, double bound) {
  return _mm512_cmp_pd_mask((__m512d)x, _mm512_set1_pd(bound), _CMP_GT_OQ) != 0;
}

#else

typedef VecI Keep;  // all bits of a lane

GSPO_INLINE VecD widen(VecF x) { return __builtin_convertvector(x, VecD); }
GSPO_INLINE Keep positive(VecF x) { return widen(x) > 0.0; }
GSPO_INLINE Keep not_zero(const uint8_t* p) { return __builtin_convertvector(read<VecB>(p), VecI) != 0; }
GSPO_INLINE Keep first_lanes(int64_t n) {
#if GSPO_LANES == 4
  return VecI{0, 1, 2, 3} < n;
#else
  return VecI{0, 1} < n;
#endif
}
GSPO_INLINE VecD kept(Keep keep, VecD x) { return (VecD)((VecI)x & keep); }
GSPO_INLINE VecD add_one(Keep keep, VecD to) { return to + kept(keep, VecD{} + 1.0); }
GSPO_INLINE VecD larger(VecD a, VecD b) { return a > b ? a : b; }
GSPO_INLINE bool any_above(VecD x, double bound) {
  const VecI over = x > bound;
  int64_t any = 0;
  for (int l = 0; l < GSPO_LANES; ++l) any |= over[l];
  return any != 0;
}

#endif

// What counts: mask > 0, or not 0 for bytes and booleans.
GSPO_INLINE Keep trained(const float* p) { return positive(read<VecF>(p)); }
GSPO_INLINE Keep trained(const uint8_t* p) { return not_zero(p); }

GSPO_INLINE VecD load(const double* p) { return read<VecD>(p); }
GSPO_INLINE VecD load(const float* p) { return widen(read<VecF>(p)); }
GSPO_INLINE VecD load(const BFloat16* p) {
  return widen((VecF)(__builtin_convertvector(read<VecH>(p), VecU) << 16));
}
GSPO_INLINE VecD load(const uint8_t* p) { return __builtin_convertvector(read<VecB>(p), VecD); }
GSPO_INLINE VecD load(const Half* p) {
  const VecU bits = __builtin_convertvector(read<VecH>(p), VecU);
  const VecU sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
  const VecU normal = (rest << 13) + (112u << 23);            // exponent bias 15 to 127
  const VecU special = (rest << 13) | 0x7f800000u;            // infinity, not a number
  const VecF tiny = __builtin_convertvector((VecS)rest, VecF) * 0x1p-24f;  // subnormal: mantissa x 2^-24
  VecU out = rest >= 0x7c00u ? special : normal;
  out = rest < 0x0400u ? (VecU)tiny : out;
  return widen((VecF)(out | sign));
}

GSPO_INLINE VecD absolute(VecD x) { return (VecD)((VecI)x & INT64_MAX); }

// Folds a register to two lanes, upper half onto lower half.
#if GSPO_LANES == 2
template <class Fold>
GSPO_INLINE Pair fold_to_pair(VecD x, const Fold&) { return x; }
#else
template <class Fold>
GSPO_INLINE Pair fold_to_pair(VecD x, const Fold& fold) {
#if GSPO_LANES == 8
  const Four four = fold(Four{x[0], x[1], x[2], x[3]}, Four{x[4], x[5], x[6], x[7]});
#else
  const Four four = x;
#endif
  return fold(Pair{four[0], four[1]}, Pair{four[2], four[3]});
}
#endif

// exp(d) to a few units in the last place, 0 where it would be subnormal; and exp(d) - 1 - d, the k3 term, as exactly
// where it is not tiny and with 13 digits where it is: with d = n ln 2 + r, it is 2^n r^2 q(r) + ((2^n - 1) +
// (2^n r - d)), and at n = 0 all but the first term is exactly 0. Everything is halved (h = 2^(n-1)) so that n = 1024
// has a finite h and an overflow gives infinity.
struct Exponential {
  VecD value, k3;
};

GSPO_INLINE Exponential exponential(VecD d) {
  const VecD zero = {};
  const VecD high = zero + 710.0, low = zero - 708.0;
  VecD x = d > high ? high : d;
  x = x < low ? low : x;
  const VecD shifted = x * 0x1.71547652b82fep+0 + 0x1.8p52;  // the low bits now hold n, rounded to nearest
  const VecD n = shifted - 0x1.8p52;
  const VecD r = (x - n * 0x1.62e42fefa3800p-1) - n * 0x1.ef35793c76730p-45;  // ln 2 in two parts
  const VecD h = (VecD)(((VecI)shifted + 1022) << 52);
  VecD q = r * (1.0 / 479001600) + 1.0 / 39916800;  // q = sum of r^k / (k + 2)!
  q = q * r + 1.0 / 3628800;
  q = q * r + 1.0 / 362880;
  q = q * r + 1.0 / 40320;
  q = q * r + 1.0 / 5040;
  q = q * r + 1.0 / 720;
  q = q * r + 1.0 / 120;
  q = q * r + 1.0 / 24;
  q = q * r + 1.0 / 6;
  q = q * r + 0.5;
  const VecD rest = r * r * q, value = 2.0 * (h * (1.0 + (r + rest)));
  return {d < low ? zero : value, 2.0 * (h * rest + ((h - 0.5) + (h * r - 0.5 * d)))};
}

GSPO_INLINE VecD k3_term(VecD d) { return exponential(d).k3; }

constexpr double kSmall = 0.25;

// The same where every |d| <= kSmall, which is nearly always: no range reduction, terms to d^10 (relative error 2e-13).
GSPO_INLINE VecD k3_term_small(VecD d) {
  VecD q = d * (1.0 / 3628800) + 1.0 / 362880;
  q = q * d + 1.0 / 40320;
  q = q * d + 1.0 / 5040;
  q = q * d + 1.0 / 720;
  q = q * d + 1.0 / 120;
  q = q * d + 1.0 / 24;
  q = q * d + 1.0 / 6;
  q = q * d + 0.5;
  return d * d * q;
}

template <int kBytes>
struct BitsOf;
template <>
struct BitsOf<2> { typedef uint16_t __attribute__((may_alias)) type; };
template <>
struct BitsOf<4> { typedef uint32_t __attribute__((may_alias)) type; };
template <>
struct BitsOf<8> { typedef uint64_t __attribute__((may_alias)) type; };
template <class T>
using Bits = typename BitsOf<sizeof(T)>::type;

// ---- One number to the gradient's element type, rounded to nearest even ----

template <class T>
GSPO_INLINE T narrow(double x) { return (T)x; }

template <>
inline __attribute__((always_inline)) BFloat16 narrow<BFloat16>(double x) {
  const float f = (float)x;
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {(uint16_t)(f != f ? 0x7fc0u : rounded)};
}

template <>
inline __attribute__((always_inline)) Half narrow<Half>(double x) {
  const float f = (float)x;
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  // Multiplying away and back overflows to infinity what fp16 cannot hold.
  float magnitude = (f < 0 ? -f : f) * 0x1p+112f * 0x1p-110f;
  uint32_t bias = (bits + bits) & 0xff000000u;
  bias = bias < 0x71000000u ? 0x71000000u : bias;
  uint32_t shift_bits = (bias >> 1) + 0x07800000u;
  float shift;
  __builtin_memcpy(&shift, &shift_bits, 4);
  magnitude += shift;  // rounds the mantissa to fp16's 10 bits
  __builtin_memcpy(&bits, &magnitude, 4);
  const uint32_t out = ((bits >> 13) & 0x7c00u) + (bits & 0x0fffu);
  return {(uint16_t)(sign | (f != f ? 0x7e00u : out))};
}
