// Thirty-two rows of the matrix side by side, turned so that a column is two registers. Columns go by eight: what those
// before them changed is added to all eight at once, so that it is read once for them, and sums do not wait for one another.
#define LANES 16
#include "sweep.h"
#include "vectors.h"

namespace {

enum { EIGHT = 8 };

// Sixteen columns of `rows` rows, turned. What is not there is zero.
inline void read(const float* from, int64_t apart, int64_t rows, int64_t columns, Vector (&to)[LANES]) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) to[i] = i < rows ? load_some(from + i * apart, columns) : Vector{};
  turn(to);
}

inline void write(Vector (&from)[LANES], float* to, int64_t apart, int64_t rows, int64_t columns) {
  turn(from);
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++)
    if (i < rows) store_some(to + i * apart, from[i], columns);
}

// For each of sixteen columns, which rows stay.
inline void read(const uint8_t* from, int64_t apart, int64_t rows, int64_t columns, __mmask16 (&to)[LANES]) {
  const __mmask16 there = __mmask16((1u << columns) - 1);
  Vector bytes[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++)
    bytes[i] = i < rows ? Vector(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, from + i * apart))) : Vector{};
  turn(bytes);
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) to[i] = _mm512_test_epi32_mask(__m512i(bytes[i]), __m512i(bytes[i]));
}

// N times sixteen rows from `row` on, of which `count` are there.
template <int N>
void rows_of(const Sweep& call, int64_t row, int64_t count) {
  __m512* const change = static_cast<__m512*>(scratch((call.columns + LANES) * N * sizeof(__m512)));
  for (int64_t first = 0; first < call.columns; first += LANES) {
    const int64_t columns = least(LANES, call.columns - first);
    Vector plain[N][LANES], push[N][LANES], found[N][LANES];
    __mmask16 stays[N][LANES];
    for (int n = 0; n < N; n++) {
      const int64_t at = row + n * LANES, rows = count - n * LANES;
      read(call.plain + at * call.plain_apart + first, call.plain_apart, rows, columns, plain[n]);
      read(call.push + at * call.push_apart + first, call.push_apart, rows, columns, push[n]);
      if (call.stays) read(call.stays + at * call.stays_apart + first, call.stays_apart, rows, columns, stays[n]);
    }
    // A row is a page or more from the next: no processor foresees that the next rows are wanted.
    const int64_t next = row + N * LANES, ahead = least(N * LANES, call.rows - next);
    for (int64_t i = next; i < next + ahead; i++) {
      __builtin_prefetch(call.plain + i * call.plain_apart + first, 0, 2);
      __builtin_prefetch(call.push + i * call.push_apart + first, 0, 2);
    }
    for (int64_t half = 0; half < columns; half += EIGHT) {
      const int64_t begin = first + half, last = call.columns - 1;
      const float* factor[EIGHT];  // a column that is not there has the last one's: nothing of it is kept
      __m512 sum[EIGHT][N];
#pragma GCC unroll 8
      for (int j = 0; j < EIGHT; j++) {
        factor[j] = call.factor + least(begin + j, last) * call.factor_apart;
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) sum[j][n] = __m512(push[n][half + j]);
      }
      for (int64_t i = 0; i < begin; i++) {
        __m512 lost[N];
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) lost[n] = change[i * N + n];
#pragma GCC unroll 8
        for (int j = 0; j < EIGHT; j++) {
          const __m512 share = _mm512_set1_ps(factor[j][i]);
#pragma GCC unroll 2
          for (int n = 0; n < N; n++) sum[j][n] = _mm512_fmadd_ps(share, lost[n], sum[j][n]);
        }
      }
#pragma GCC unroll 8
      for (int j = 0; j < EIGHT; j++) {
        const float weight = factor[j][least(begin + j, last)];
        const __m512 own = _mm512_set1_ps(weight), inverse = _mm512_set1_ps(1 / weight);
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) {
          const __m512 before = __m512(plain[n][half + j]);
          const __m512 mended = _mm512_fmadd_ps(sum[j][n], inverse, before);
          const __m512 q = call.stays ? _mm512_maskz_mov_ps(stays[n][half + j], mended) : mended;
          const __m512 lost = _mm512_sub_ps(before, q), weighed = _mm512_mul_ps(mended, own);
          change[(begin + j) * N + n] = lost;
          push[n][half + j] = Vector(q);
          found[n][half + j] = Vector(call.stays ? lost : _mm512_mul_ps(weighed, weighed));
#pragma GCC unroll 8
          for (int later = j + 1; later < EIGHT; later++)
            sum[later][n] = _mm512_fmadd_ps(_mm512_set1_ps(factor[later][least(begin + j, last)]), lost, sum[later][n]);
        }
      }
    }
    for (int n = 0; n < N; n++) {
      const int64_t at = row + n * LANES, rows = count - n * LANES;
      write(found[n], call.found + at * call.found_apart + first, call.found_apart, rows, columns);
      if (call.stays) write(push[n], call.push + at * call.push_apart + first, call.push_apart, rows, columns);
    }
  }
}

}  // namespace

extern "C" void sweep_f32_avx512(const void* pointer, int64_t begin, int64_t end) {
  const Sweep& call = *static_cast<const Sweep*>(pointer);
  const int64_t last = least(end * LANES, call.rows);
  for (int64_t row = begin * LANES; row < last; row += 2 * LANES) {
    const int64_t count = least(2 * LANES, last - row);
    if (count > LANES) rows_of<2>(call, row, count);
    else rows_of<1>(call, row, count);
  }
}
