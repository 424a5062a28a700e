// Eight floats and how they come from memory in each type, for the kernels with 256-bit registers.
#pragma once
#include <immintrin.h>

#include "numbers.h"

static inline __m256 eight(const float* from) { return _mm256_loadu_ps(from); }

static inline __m256 eight(const bf16* from) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

static inline __m256 eight(const f16* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

// A row of x as floats, and whether something in it is not finite.
template <class T>
static inline bool widen_row(const T* x, int64_t inputs, float* to) {
  const __m256i infinite = _mm256_set1_epi32(0x7f800000);
  __m256i found = _mm256_setzero_si256();
  int64_t input = 0;
  for (; input + 8 <= inputs; input += 8) {
    const __m256 some = eight(x + input);
    const __m256i exponent = _mm256_and_si256(_mm256_castps_si256(some), infinite);
    found = _mm256_or_si256(found, _mm256_cmpeq_epi32(exponent, infinite));
    _mm256_storeu_ps(to + input, some);
  }
  bool wild = !_mm256_testz_si256(found, found);
  for (; input < inputs; input++) {
    to[input] = widen(x[input]);
    wild |= (bits_of_float(to[input]) & 0x7f800000) == 0x7f800000;
  }
  return wild;
}

// Sums of sixteen lanes to y, as many of them as there are, with the bias added.
template <class T>
static inline void store_lanes(__m256 low, __m256 high, const T* bias, T* y, int64_t lanes) {
  float all[16];
  _mm256_storeu_ps(all, low);
  _mm256_storeu_ps(all + 8, high);
  for (int64_t lane = 0; lane < lanes && lane < 16; lane++)
    narrow(all[lane] + (bias ? widen(bias[lane]) : 0.0f), y + lane);
}
