// Two steps are 64 weights: what is picked of the planes becomes four vectors of floats.
#include "sell_blocked_rows.h"

namespace {

template <class T>
struct Floats {
  enum { LOWEST = lowest(T()) };
  Plane planes[PLANES];

  void begin(const uint8_t* from, int64_t room) {
    for (int p = LOWEST; p < PLANES; p++) planes[p].load(from + p * room);
  }

  // The inputs of 64 columns, in their order.
  void pick(__m512i columns, __m512 (&x)[4]) const {
    // Bytes, then words, are interleaved within 128 bits: what will be of the first vector has to lie first in all four.
    columns = _mm512_permutexvar_epi32(_mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0), columns);
    const __mmask64 later = _mm512_movepi8_mask(columns);
    __m512i bytes[PLANES];
    for (int p = 0; p < PLANES; p++) bytes[p] = p < LOWEST ? _mm512_setzero_si512() : planes[p].of(columns, later);
    for (int half = 0; half < 2; half++) {
      const __m512i low = half ? _mm512_unpackhi_epi8(bytes[0], bytes[1]) : _mm512_unpacklo_epi8(bytes[0], bytes[1]);
      const __m512i high = half ? _mm512_unpackhi_epi8(bytes[2], bytes[3]) : _mm512_unpacklo_epi8(bytes[2], bytes[3]);
      x[2 * half] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low, high));
      x[2 * half + 1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low, high));
    }
  }

  void sum(const uint8_t* columns, const T* values, int64_t steps, float* made) const {
    const bool asks = asks_ahead();
    __m512 sums[4] = {}, x[4];
    for (; steps > 1; steps -= 2, columns += 2 * STEP, values += 2 * STEP) {
      if (asks) ask_for(columns, values);
      pick(two_steps(columns), x);
      for (int i = 0; i < 4; i++) sums[i] = _mm512_fmadd_ps(x[i], load(values + i * PANEL, 0xffff), sums[i]);
    }
    if (steps) {
      pick(one_step(columns), x);
      for (int i = 0; i < 2; i++) sums[i] = _mm512_fmadd_ps(x[i], load(values + i * PANEL, 0xffff), sums[i]);
    }
    // The two weights of an output lie next to one another.
    const __m512 low = _mm512_add_ps(sums[0], sums[2]), high = _mm512_add_ps(sums[1], sums[3]);
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
    _mm512_store_ps(made, _mm512_add_ps(_mm512_permutex2var_ps(low, even, high), _mm512_permutex2var_ps(low, odd, high)));
  }
};

}  // namespace

#define SELL(name, T)                                                                                 \
  extern "C" void sell_blocked_matmul_##name##_avx512(const void* call, int64_t begin, int64_t end) { \
    matmul<T, Floats<T>>(call, begin, end);                                                           \
  }
SELL(f32, float)
SELL(bf16, bf16)
SELL(f16, f16)
