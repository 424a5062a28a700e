// Products of matrices in tiles of 8 x 48 sums in registers. Of what they multiply 48 rows of the right matrix at a time lie
// in the first cache, and in the second as many of the left one as are used before the next 48 come.
#pragma once
#include "product_lay.h"

namespace {

enum { UP = 8, ACROSS = 48, STEPS = 128, TALL = 768 };  // rows of a tile, its columns; dwords and rows laid out at once

// One tile, of a panel of 8 and one of 48.
template <class T>
inline void add(const float* left, const float* right, int64_t steps, float* to, int64_t apart, int64_t rows, int64_t columns,
                float scale, bool fresh) {
  __m512 sum[UP][3] = {};
  for (int64_t k = 0; k < steps; k++, left += UP, right += ACROSS) {
    // What the sums are added to is asked for little by little: all at once it keeps what is multiplied waiting.
    if (k % 4 == 0 && k < 16 * UP) __builtin_prefetch(to + k / 16 * apart + k / 4 % 4 * LANES, 1);
    __m512 x[3];
#pragma GCC unroll 3
    for (int j = 0; j < 3; j++) x[j] = _mm512_load_ps(right + j * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < UP; i++)
#pragma GCC unroll 3
      for (int j = 0; j < 3; j++) {  // compilers load the dword by an instruction of its own
        if constexpr (sizeof(T) == 4) __asm__("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sum[i][j]) : "v"(x[j]), "m"(left[i]));
        else __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum[i][j]) : "v"(x[j]), "m"(left[i]));
      }
  }
  const __m512 share = _mm512_set1_ps(scale);
#pragma GCC unroll 8
  for (int i = 0; i < UP; i++) {
    if (i >= rows) break;
#pragma GCC unroll 3
    for (int j = 0; j < 3; j++) {
      const int64_t some = least(LANES, columns - j * LANES);
      if (some <= 0) break;
      float* const place = to + i * apart + j * LANES;
      const __m512 before = fresh ? _mm512_setzero_ps() : __m512(load_some(place, some));
      store_some(place, Vector(_mm512_fmadd_ps(share, sum[i][j], before)), some);
    }
  }
}

template <class T>
void multiply(const void* pointer, int64_t begin, int64_t end) {
  enum { EACH = 4 / sizeof(T), DEEP = STEPS * EACH };
  const Product& call = *static_cast<const Product*>(pointer);
  int64_t start, last;
  rows_of(call, begin, end, &start, &last);
  float* const right = static_cast<float*>(scratch((TALL + ACROSS) * STEPS * sizeof(float)));
  float* const left = right + ACROSS * STEPS;
  for (int64_t k = 0; k < call.depth || k == 0; k += DEEP) {
    const int64_t deep = least(DEEP, call.depth - k), steps = (deep + EACH - 1) / EACH;
    const bool fresh = call.fresh && k == 0;
    for (int64_t first = start; first < last; first += TALL) {
      const int64_t tall = least(TALL, last - first);
      lay<UP, T>(call.left, first, tall, k, deep, steps, left);
      const int64_t columns = call.lower ? least(call.columns, first + tall) : call.columns;
      for (int64_t column = 0; column < columns; column += ACROSS) {
        lay<ACROSS, T>(call.right, column, least(ACROSS, columns - column), k, deep, steps, right);
        // Of a tile that lies above the diagonal nothing is wanted.
        const int64_t begin = call.lower && column > first ? (column - first) / UP * UP : 0;
        for (int64_t row = begin; row < tall; row += UP)
          add<T>(left + row * steps, right, steps, call.to + (first + row) * call.apart + column, call.apart,
                 least(UP, tall - row), least(ACROSS, columns - column), call.scale, fresh);
      }
    }
  }
}

}  // namespace
