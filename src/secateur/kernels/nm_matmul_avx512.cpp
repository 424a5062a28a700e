// A group of x fills a register, repeated when it is smaller; the places of a slot, moved to the bottom of their lanes,
// pick from it. The bits above a place belong to the next lanes and pick another repetition of the same input, which
// for groups of 2 and 4 makes no difference; groups of 8 have 4 bits of their own, of which the highest is zero.
#include "nm.h"
#include "streams.h"
#include "wide.h"

namespace {

enum { AHEAD = 2048 };

void scalar(const Matmul& call, int64_t panel, int64_t row, float) { nm_row_f32(&call, panel, row); }
void scalar(const Matmul& call, int64_t panel, int64_t row, bf16) { nm_row_bf16(&call, panel, row); }
void scalar(const Matmul& call, int64_t panel, int64_t row, f16) { nm_row_f16(&call, panel, row); }

template <int M>
inline __m512 group(const float* x) {
  if (M == 2) return _mm512_castsi512_ps(_mm512_set1_epi64(*reinterpret_cast<const int64_t*>(x)));
  if (M == 4) return _mm512_broadcast_f32x4(_mm_loadu_ps(x));
  if (M == 8) return _mm512_castpd_ps(_mm512_broadcast_f64x4(_mm256_loadu_pd(reinterpret_cast<const double*>(x))));
  return _mm512_loadu_ps(x);
}

// The places of a slot, each at the bottom of its lane.
template <int M>
inline __m512i places(const uint8_t* at) {
  int low, high;
  __builtin_memcpy(&low, at, 4);
  if (M <= 4) {
    const __m512i down = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_srlv_epi32(_mm512_set1_epi32(low), down);
  }
  __builtin_memcpy(&high, at + 4, 4);
  const __m512i down = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
  return _mm512_srlv_epi32(_mm512_mask_set1_epi32(_mm512_set1_epi32(low), 0xff00, high), down);
}

// N rows of x times some panels, `apart` from one to the next.
template <int M, int N, int PANELS, class T>
void rows(const Matmul& call, const NM& weight, int64_t panel, int64_t apart, int64_t row, const float* x,
          int64_t stride) {
  const int64_t groups = weight.inputs / M, bytes = M <= 4 ? 4 : 8, slots = groups * weight.n, next = apart * slots;
  const T* values = static_cast<const T*>(weight.values) + panel * slots * LANES;
  const uint8_t* place = weight.places + panel * slots * bytes;
  const bool asks = call.rows > 1 || asks_ahead();
  __m512 sum[2][PANELS][N];  // two chains
  for (int p = 0; p < PANELS; p++)
    for (int n = 0; n < N; n++) sum[0][p][n] = sum[1][p][n] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; g++) {
    __m512 in[N];
    for (int n = 0; n < N; n++) in[n] = group<M>(x + (row + n) * stride + g * M);
    for (int64_t slot = 0; slot < weight.n; slot++, values += LANES, place += bytes)
#pragma GCC unroll 4
      for (int p = 0; p < PANELS; p++) {
        const T* const here = values + p * next * LANES;
        if (asks) _mm_prefetch(reinterpret_cast<const char*>(here) + AHEAD, _MM_HINT_T0);
        const __m512 w = load(here, 0xffff);
        const __m512i from = places<M>(place + p * next * bytes);
        for (int n = 0; n < N; n++)
          sum[slot & 1][p][n] = _mm512_fmadd_ps(w, _mm512_permutexvar_ps(from, in[n]), sum[slot & 1][p][n]);
      }
  }
  for (int p = 0; p < PANELS; p++) {
    const int64_t at = (panel + p * apart) * LANES;
    const __mmask16 lanes = first(weight.outputs - at);
    const __m512 bias = call.bias ? load(static_cast<const T*>(call.bias) + at, lanes) : _mm512_setzero_ps();
    for (int n = 0; n < N; n++)
      store(static_cast<T*>(call.y) + (row + n) * weight.outputs + at, lanes,
            _mm512_add_ps(_mm512_add_ps(sum[0][p][n], sum[1][p][n]), bias));
  }
}

// Rows [row, row + count) of x, all finite.
template <int M, class T>
void finite_rows(const Matmul& call, const NM& weight, int64_t panel, int64_t row, int64_t count, const float* x,
                 int64_t stride) {
  const int64_t end = row + count;
  for (; row + 4 <= end; row += 4) rows<M, 4, 1, T>(call, weight, panel, 1, row, x, stride);
  if (end - row >= 2) rows<M, 2, 1, T>(call, weight, panel, 1, row, x, stride), row += 2;
  if (end - row >= 1) rows<M, 1, 1, T>(call, weight, panel, 1, row, x, stride);
}

template <int M, class T>
void panels(const Matmul& call, int64_t begin, int64_t end) {
  const NM& weight = *static_cast<const NM*>(call.weight);
  const int64_t inputs = weight.inputs, stride = (inputs + 15) / 16 * 16;
  // x as floats, then for each row whether something in it is not finite.
  float* const x = static_cast<float*>(scratch(call.rows * (stride + 1) * sizeof(float)));
  int32_t* const wild = reinterpret_cast<int32_t*>(x + call.rows * stride);
  const __m512i infinite = _mm512_set1_epi32(0x7f800000);
  for (int64_t row = 0; row < call.rows; row++) {
    __mmask16 found = 0;
    for (int64_t input = 0; input < inputs; input += 16) {
      const __m512 some = load(static_cast<const T*>(call.x) + row * inputs + input, first(inputs - input));
      found |= _mm512_cmpeq_epi32_mask(_mm512_and_si512(_mm512_castps_si512(some), infinite), infinite);
      _mm512_store_ps(x + row * stride + input, some);
    }
    wild[row] = found;
  }
  if (call.rows == 1 && !wild[0])
    begin = abreast<STREAMS>(begin, end, [&](int64_t panel, int64_t apart) {
      rows<M, 1, STREAMS, T>(call, weight, panel, apart, 0, x, stride);
    });
  for (int64_t panel = begin; panel < end; panel++)
    for (int64_t row = 0, next = 0; row < call.rows; row = next) {
      for (next = row; next < call.rows && !wild[next]; next++) {
      }
      if (next > row)
        finite_rows<M, T>(call, weight, panel, row, next - row, x, stride);
      else
        scalar(call, panel, next++, T());
    }
}

template <class T>
void matmul(const void* pointer, int64_t begin, int64_t end) {
  const Matmul& call = *static_cast<const Matmul*>(pointer);
  switch (static_cast<const NM*>(call.weight)->m) {
    case 2:
      return panels<2, T>(call, begin, end);
    case 4:
      return panels<4, T>(call, begin, end);
    case 8:
      return panels<8, T>(call, begin, end);
    default:
      return panels<16, T>(call, begin, end);
  }
}

}  // namespace

extern "C" void nm_matmul_f32_avx512(const void* call, int64_t begin, int64_t end) { matmul<float>(call, begin, end); }

extern "C" void nm_matmul_bf16_avx512(const void* call, int64_t begin, int64_t end) { matmul<bf16>(call, begin, end); }

extern "C" void nm_matmul_f16_avx512(const void* call, int64_t begin, int64_t end) { matmul<f16>(call, begin, end); }
