// Sixteen floats and how they come from and go to memory in each type, for the kernels with 512-bit registers.
#pragma once
#include <immintrin.h>

#include "numbers.h"

// The lanes that exist: fewer than sixteen at the end of a matrix.
static inline __mmask16 first(int64_t count) { return count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1); }

// Zeros that the compiler does not know to be zeros.
static inline __m512i cleared() {
  __m512i zeros = _mm512_setzero_si512();
  __asm__("" : "+v"(zeros));
  return zeros;
}

// The values that come next, each where its mask has a bit: 16 of 32 bits, 32 of 16 or 64 of 8. On some processors (Zen 5)
// an expansion from memory waits for what its register held before, though all of it is overwritten: five cycles, where one
// into a register that was just cleared takes one.
static inline __m512i expanded(uint16_t mask, const void* values) {
  return _mm512_mask_expandloadu_epi32(cleared(), mask, values);
}

static inline __m512i expanded(uint32_t mask, const void* values) {
  return _mm512_mask_expandloadu_epi16(cleared(), mask, values);
}

static inline __m512i expanded(uint64_t mask, const void* values) {
  return _mm512_mask_expandloadu_epi8(cleared(), mask, values);
}

static inline __m512 widen(__m256i halves, bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

static inline __m512 widen(__m256i halves, f16) { return _mm512_cvtph_ps(halves); }

static inline __m256i narrow(__m512 value, bf16) {
  const __m512i bits = _mm512_castps_si512(value), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));  // a NaN must stay one
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}

static inline __m256i narrow(__m512 value, f16) { return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT); }

static inline __m512 load(const float* from, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, from); }

template <class T>
static inline __m512 load(const T* from, __mmask16 lanes) {
  return widen(_mm256_maskz_loadu_epi16(lanes, from), T());
}

static inline void store(float* to, __mmask16 lanes, __m512 value) { _mm512_mask_storeu_ps(to, lanes, value); }

template <class T>
static inline void store(T* to, __mmask16 lanes, __m512 value) {
  _mm256_mask_storeu_epi16(to, lanes, narrow(value, T()));
}

#ifdef __AVX512BF16__
// Two numbers in all lanes.
static inline __m512bh pair_of(const bf16* two) {
  typedef int32_t __attribute__((may_alias, aligned(2))) Pair;
  return (__m512bh)_mm512_set1_epi32(*reinterpret_cast<const Pair*>(two));
}
#endif
