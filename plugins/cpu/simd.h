// Vectors of 32-bit numbers as wide as the machine's, and what the kernels do with them. Written with the vector
// extensions of GCC and clang, so that one source serves AVX-512, AVX2 and machines that have neither.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace difa {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4), may_alias));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4), may_alias));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4), may_alias));
typedef float UnalignedFloats __attribute__((vector_size(kLanes * 4), may_alias, aligned(4)));
typedef int32_t UnalignedInts __attribute__((vector_size(kLanes * 4), may_alias, aligned(4)));

inline Floats load(const float* from) { return *reinterpret_cast<const UnalignedFloats*>(from); }
inline void store(float* to, Floats value) { *reinterpret_cast<UnalignedFloats*>(to) = value; }
inline Floats all(float value) { return Floats{} + value; }
// The larger of two numbers; b where one is NaN.
inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// 2^(x - smaller) for x <= 0 and a whole number 0 <= smaller < 127 with a relative error below 2e-7 (the polynomial's
// own: 3e-9); 0 below 2^-127, NaN for every NaN.
inline Floats exp2(Floats x, float smaller = 0) {
  x = larger(all(smaller - 127), x);
  const float magic = 12582912.0f + 127 - smaller;  // 1.5 * 2^23: adding it leaves the exponent's bits in the low ones
  const Floats shifted = x + magic;
  const Floats f = x - (shifted - magic);  // in [-0.5, 0.5]
  Floats p = all(1.5461445e-4f);
  p = p * f + 1.3400428e-3f;
  p = p * f + 9.6180567e-3f;
  p = p * f + 5.5503272e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314721e-1f;
  p = p * f + 1.0f;
  // The power of two is a factor and not added to p's exponent: whatever bits a NaN has, a product with it is NaN.
  return p * reinterpret_cast<Floats>(reinterpret_cast<Words>(shifted) << 23);
}

// Storage types other than float. Arithmetic is in float.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline float to_float(Half value) {
  _Float16 half;
  std::memcpy(&half, &value.bits, 2);
  return static_cast<float>(half);
}

inline void from_float(float value, float& to) { to = value; }
inline void from_float(float value, BFloat16& to) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  to.bits = value != value ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void from_float(float value, Half& to) {
  const _Float16 half = static_cast<_Float16>(value);
  std::memcpy(&to.bits, &half, 2);
}

// `count` numbers, `step` apart, as float.
template <class T>
inline void widen(const T* from, int64_t step, int count, float* to) {
  for (int i = 0; i < count; ++i) to[i] = to_float(from[i * step]);
}

#if defined(__AVX512F__)
inline void widen_row(const Half* from, int count, float* to) {
  int i = 0;
  for (; i + 16 <= count; i += 16)
    _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
  widen(from + i, 1, count - i, to + i);
}
#elif defined(__F16C__)
inline void widen_row(const Half* from, int count, float* to) {
  int i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  widen(from + i, 1, count - i, to + i);
}
#else
inline void widen_row(const Half* from, int count, float* to) { widen(from, 1, count, to); }
#endif
inline void widen_row(const BFloat16* from, int count, float* to) { widen(from, 1, count, to); }  // the compiler's loop
inline void widen_row(const float* from, int count, float* to) { std::memcpy(to, from, count * sizeof(float)); }

template <class T>
inline void narrow(const float* from, int count, T* to) {
  for (int i = 0; i < count; ++i) from_float(from[i], to[i]);
}

// out[c * out_step + r] = in[r * in_step + c] for a square of kLanes numbers of 32 bits.
inline void transpose_square(const float* in, int64_t in_step, float* out, int64_t out_step) {
#if defined(__clang__)
  for (int r = 0; r < kLanes; ++r)
    for (int c = 0; c < kLanes; ++c) out[c * out_step + r] = in[r * in_step + c];
#else
  Ints a[kLanes];
  for (int r = 0; r < kLanes; ++r) a[r] = *reinterpret_cast<const UnalignedInts*>(in + r * in_step);
#pragma GCC unroll 4
  for (int s = 1; s < kLanes; s *= 2) {
    Ints low, high;
    for (int i = 0; i < kLanes; ++i) {
      low[i] = i & s ? kLanes + i - s : i;
      high[i] = i & s ? kLanes + i : i + s;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) {
      if (r & s) continue;
      const Ints one = a[r], two = a[r + s];
      a[r] = __builtin_shuffle(one, two, low);
      a[r + s] = __builtin_shuffle(one, two, high);
    }
  }
  for (int r = 0; r < kLanes; ++r) *reinterpret_cast<UnalignedInts*>(out + r * out_step) = a[r];
#endif
}

// out (cols, rows) = in (rows, cols) transposed; `rows` is a multiple of kLanes.
inline void transpose(const float* in, int64_t in_step, int rows, int cols, float* out, int64_t out_step) {
  for (int r = 0; r < rows; r += kLanes) {
    int c = 0;
    for (; c + kLanes <= cols; c += kLanes)
      transpose_square(in + r * in_step + c, in_step, out + c * out_step + r, out_step);
    for (; c < cols; ++c)
      for (int i = 0; i < kLanes; ++i) out[c * out_step + r + i] = in[(r + i) * in_step + c];
  }
}

}  // namespace difa
