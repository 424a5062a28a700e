// Two steps are 64 weights: what is picked of two planes becomes two vectors of pairs.
#include "sell_blocked_rows.h"

namespace {

struct Pairs {
  Plane low, high;

  void begin(const uint8_t* from, int64_t room) {
    low.load(from + 2 * room);
    high.load(from + 3 * room);
  }

  void pick(__m512i columns, __m512bh (&x)[2]) const {
    // Bytes are interleaved within 128 bits: what will be of the first vector has to lie first in all four.
    columns = _mm512_permutexvar_epi64(_mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0), columns);
    const __mmask64 later = _mm512_movepi8_mask(columns);
    const __m512i below = low.of(columns, later), above = high.of(columns, later);
    x[0] = (__m512bh)_mm512_unpacklo_epi8(below, above);
    x[1] = (__m512bh)_mm512_unpackhi_epi8(below, above);
  }

  void sum(const uint8_t* columns, const bf16* values, int64_t steps, float* made) const {
    const auto pairs = [&](int i) { return (__m512bh)_mm512_loadu_si512(values + i * STEP); };
    const bool asks = asks_ahead();
    __m512 sums[2] = {};
    __m512bh x[2];
    for (; steps > 1; steps -= 2, columns += 2 * STEP, values += 2 * STEP) {
      if (asks) ask_for(columns, values);
      pick(two_steps(columns), x);
      for (int i = 0; i < 2; i++) sums[i] = _mm512_dpbf16_ps(sums[i], x[i], pairs(i));
    }
    if (steps) {
      pick(one_step(columns), x);
      sums[0] = _mm512_dpbf16_ps(sums[0], x[0], pairs(0));
    }
    _mm512_store_ps(made, _mm512_add_ps(sums[0], sums[1]));
  }
};

}  // namespace

extern "C" void sell_blocked_matmul_bf16_avx512bf16(const void* call, int64_t begin, int64_t end) {
  matmul<bf16, Pairs>(call, begin, end);
}
