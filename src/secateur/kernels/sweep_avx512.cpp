// Thirty-two rows of the matrix side by side, the changes of the columns so far in the first cache. Four sums at a
// time, or each product would wait for the one before.
#include <immintrin.h>

#include "sweep.h"

namespace {

template <int N>
void rows_of(const Sweep& call, int64_t row, const __mmask16* lanes) {
  __m512* const change = static_cast<__m512*>(scratch(call.columns * N * sizeof(__m512)));
  for (int64_t column = 0; column < call.columns; column++) {
    const float* const factor = call.factor + column * call.stride;
    const int64_t at = column * call.rows + row;
    __m512 even[N], odd[N];
    for (int n = 0; n < N; n++) {
      even[n] = _mm512_maskz_loadu_ps(lanes[n], call.push + at + 16 * n);
      odd[n] = _mm512_setzero_ps();
    }
    int64_t i = 0;
    for (; i + 2 <= column; i += 2) {
      const __m512 first = _mm512_set1_ps(factor[i]), second = _mm512_set1_ps(factor[i + 1]);
      for (int n = 0; n < N; n++) {
        even[n] = _mm512_fmadd_ps(first, change[i * N + n], even[n]);
        odd[n] = _mm512_fmadd_ps(second, change[(i + 1) * N + n], odd[n]);
      }
    }
    if (i < column)
      for (int n = 0; n < N; n++) even[n] = _mm512_fmadd_ps(_mm512_set1_ps(factor[i]), change[i * N + n], even[n]);
    const __m512 own = _mm512_set1_ps(factor[column]);
    for (int n = 0; n < N; n++) {
      const __m512 plain = _mm512_maskz_loadu_ps(lanes[n], call.plain + at + 16 * n);
      const __m512 mended = _mm512_add_ps(plain, _mm512_div_ps(_mm512_add_ps(even[n], odd[n]), own));
      const __mmask16 stays = _mm_test_epi8_mask(_mm_maskz_loadu_epi8(lanes[n], call.stays + at + 16 * n), _mm_set1_epi8(-1));
      const __m512 lost = _mm512_mask_sub_ps(plain, stays, plain, mended);
      change[column * N + n] = lost;
      _mm512_mask_storeu_ps(call.change + at + 16 * n, lanes[n], lost);
    }
  }
}

}  // namespace

extern "C" void sweep_f32_avx512(const void* pointer, int64_t begin, int64_t end) {
  const Sweep& call = *static_cast<const Sweep*>(pointer);
  for (int64_t item = begin; item < end;) {
    const int64_t row = item * 16, left = call.rows - row;
    const int64_t second = left - 16;
    const __mmask16 lanes[2] = {left >= 16 ? __mmask16(0xffff) : __mmask16((1u << left) - 1),
                                second >= 16 ? __mmask16(0xffff) : __mmask16(second > 0 ? (1u << second) - 1 : 0)};
    if (item + 2 <= end) rows_of<2>(call, row, lanes), item += 2;
    else rows_of<1>(call, row, lanes), item += 1;
  }
}
