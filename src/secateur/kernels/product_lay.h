// How what a product multiplies is laid out: in panels of rows, in dwords of one number or of two of bfloat16.
#pragma once
#define LANES 16
#include "product.h"
#include "vectors.h"

namespace {

// Dwords of numbers that lie side by side; zero where there are no more than `some` numbers.
inline Vector dwords(const float* from, int64_t some) { return load_some(from, least(LANES, some)); }
inline Vector dwords(const bf16* from, int64_t some) {
  return Vector(_mm512_maskz_loadu_epi16(some < 32 ? (uint32_t(1) << some) - 1 : 0xffffffffu, from));
}

// The same of sixteen rows that lie side by side, of which `rows` are there: their next number, or their next two.
inline Vector across(const float* from, int64_t, int64_t, int64_t rows) { return load_some(from, rows); }
inline Vector across(const bf16* from, int64_t step, int64_t some, int64_t rows) {
  const __mmask16 there = __mmask16((1u << rows) - 1), both = some > 1 ? there : __mmask16(0);
  const __m512i first = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from));
  const __m512i second = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(both, from + (some > 1 ? step : 0)));
  return Vector(_mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
}

// Rows of a matrix in panels of WIDE, zeros behind the last number and behind the last row, up to a multiple of WHOLE:
// to[panel][step][row], a dword each. Where they are TURNED, sixteen steps of sixteen rows change places.
template <int WIDE, class T, int WHOLE = WIDE, bool TURNED = false>
void lay(const Strided& from, int64_t first, int64_t rows, int64_t k, int64_t depth, int64_t steps, float* to) {
  enum { EACH = 4 / sizeof(T), PART = WIDE < LANES ? WIDE : LANES };
  const int64_t whole = (rows + WHOLE - 1) / WHOLE * WHOLE;
  for (int64_t row = 0; row < whole; row += LANES) {
    const int64_t there = rows > row ? least(LANES, rows - row) : 0;
    for (int64_t at = 0; at < steps; at += LANES) {
      const int64_t some = depth - at * EACH;
      const T* const corner = static_cast<const T*>(from.data) + (first + row) * from.apart + (k + at * EACH) * from.step;
      Vector tile[LANES];
      if (from.step == 1) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) tile[i] = i < there ? dwords(corner + i * from.apart, some) : Vector{};
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
          tile[i] = i * EACH < some ? across(corner + i * EACH * from.step, from.step, some - i * EACH, there) : Vector{};
      }
      if ((from.step == 1) != TURNED) turn(tile);
#pragma GCC unroll 2
      for (int part = 0; part < LANES; part += PART) {
        if (row + part >= whole) break;
        float* const panel = to + (row + part) / WIDE * (WIDE * steps) + (row + part) % WIDE;
        for (int64_t i = 0; i < least(LANES, steps - at); i++) {
          float* const place = panel + (at + i) * WIDE;
          const __m512 value = __m512(tile[i]);
          if constexpr (PART == LANES) _mm512_storeu_ps(place, value);
          else _mm256_storeu_ps(place, part ? _mm512_extractf32x8_ps(value, 1) : _mm512_castps512_ps256(value));
        }
      }
    }
  }
}

// The rows of items [begin, end). Of a lower triangle the last come first: they take longest, and threads end together.
inline void rows_of(const Product& call, int64_t begin, int64_t end, int64_t* first, int64_t* last) {
  const int64_t items = (call.rows + ROWS_OF_AN_ITEM - 1) / ROWS_OF_AN_ITEM;
  *first = (call.lower ? items - end : begin) * ROWS_OF_AN_ITEM;
  *last = least((call.lower ? items - begin : end) * ROWS_OF_AN_ITEM, call.rows);
}

}  // namespace
