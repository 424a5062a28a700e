// A group of x fills a register, repeated when it is smaller, and two when it is larger; the places of eight lanes, moved
// to the bottom of theirs, pick from it. What bits above a place do is told in nm_matmul_avx512.cpp.
#include "eight.h"
#include "nm.h"
#include "streams.h"

namespace {

enum { AHEAD = 1024 };

void scalar(const Matmul& call, int64_t panel, int64_t row, float) { nm_row_f32(&call, panel, row); }
void scalar(const Matmul& call, int64_t panel, int64_t row, bf16) { nm_row_bf16(&call, panel, row); }
void scalar(const Matmul& call, int64_t panel, int64_t row, f16) { nm_row_f16(&call, panel, row); }

// M floats, from which lanes pick.
template <int M>
struct Group {
  __m256 low, high;  // high only where there are sixteen

  explicit Group(const float* x) {
    if (M == 2)
      low = _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(x)));
    else if (M == 4)
      low = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x));
    else
      low = _mm256_loadu_ps(x);
    high = M == 16 ? _mm256_loadu_ps(x + 8) : low;
  }

  __m256 pick(__m256i place) const {
    const __m256 found = _mm256_permutevar8x32_ps(low, place);
    if (M < 16) return found;
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(place, 28));  // bit 3 where a blend looks for it
    return _mm256_blendv_ps(found, _mm256_permutevar8x32_ps(high, place), upper);
  }
};

// The places of eight lanes of a slot, each at the bottom of its lane.
template <int M>
inline __m256i places(const uint8_t* at, int half) {
  uint32_t eight_places = 0;
  __builtin_memcpy(&eight_places, at + half * (M <= 4 ? 2 : 4), M <= 4 ? 2 : 4);
  const __m256i down = M <= 4 ? _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14) : _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  return _mm256_srlv_epi32(_mm256_set1_epi32(int(eight_places)), down);
}

// N rows of x times some panels, `apart` from one to the next.
template <int M, int N, int PANELS, class T>
void rows(const Matmul& call, const NM& weight, int64_t panel, int64_t apart, int64_t row, const float* x,
          int64_t stride) {
  const int64_t groups = weight.inputs / M, bytes = M <= 4 ? 4 : 8, slots = groups * weight.n, next = apart * slots;
  const T* values = static_cast<const T*>(weight.values) + panel * slots * LANES;
  const uint8_t* place = weight.places + panel * slots * bytes;
  __m256 low[PANELS][N], high[PANELS][N];
  for (int p = 0; p < PANELS; p++)
    for (int n = 0; n < N; n++) low[p][n] = high[p][n] = _mm256_setzero_ps();
  for (int64_t g = 0; g < groups; g++)
    for (int64_t slot = 0; slot < weight.n; slot++, values += LANES, place += bytes)
#pragma GCC unroll 4
      for (int p = 0; p < PANELS; p++) {
        const T* const from = values + p * next * LANES;
        _mm_prefetch(reinterpret_cast<const char*>(from) + AHEAD, _MM_HINT_T0);
        const __m256 first = eight(from), second = eight(from + 8);
        const __m256i here = places<M>(place + p * next * bytes, 0), there = places<M>(place + p * next * bytes, 1);
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) {
          const Group<M> in(x + (row + n) * stride + g * M);
          low[p][n] = _mm256_fmadd_ps(first, in.pick(here), low[p][n]);
          high[p][n] = _mm256_fmadd_ps(second, in.pick(there), high[p][n]);
        }
      }
  for (int p = 0; p < PANELS; p++) {
    const int64_t at = (panel + p * apart) * LANES;
    const T* const bias = call.bias ? static_cast<const T*>(call.bias) + at : nullptr;
    for (int n = 0; n < N; n++)
      store_lanes(low[p][n], high[p][n], bias, static_cast<T*>(call.y) + (row + n) * weight.outputs + at,
                  weight.outputs - at);
  }
}

template <int M, class T>
void panels(const Matmul& call, int64_t begin, int64_t end) {
  const NM& weight = *static_cast<const NM*>(call.weight);
  const int64_t inputs = weight.inputs;
  // x as floats, then for each row whether something in it is not finite.
  float* const x = static_cast<float*>(scratch(call.rows * (inputs + 1) * sizeof(float)));
  int32_t* const wild = reinterpret_cast<int32_t*>(x + call.rows * inputs);
  for (int64_t row = 0; row < call.rows; row++)
    wild[row] = widen_row(static_cast<const T*>(call.x) + row * inputs, inputs, x + row * inputs);
  if (call.rows == 1 && !wild[0])
    begin = abreast<STREAMS>(begin, end, [&](int64_t panel, int64_t apart) {
      rows<M, 1, STREAMS, T>(call, weight, panel, apart, 0, x, inputs);
    });
  for (int64_t panel = begin; panel < end; panel++)
    for (int64_t row = 0; row < call.rows; row++) {
      if (wild[row])
        scalar(call, panel, row, T());
      else if (row + 1 < call.rows && !wild[row + 1])
        rows<M, 2, 1, T>(call, weight, panel, 1, row++, x, inputs);
      else
        rows<M, 1, 1, T>(call, weight, panel, 1, row, x, inputs);
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

extern "C" void nm_matmul_f32_avx2(const void* call, int64_t begin, int64_t end) { matmul<float>(call, begin, end); }

extern "C" void nm_matmul_bf16_avx2(const void* call, int64_t begin, int64_t end) { matmul<bf16>(call, begin, end); }

extern "C" void nm_matmul_f16_avx2(const void* call, int64_t begin, int64_t end) { matmul<f16>(call, begin, end); }
