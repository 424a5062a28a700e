// A step is two gathers of eight inputs each; x, as floats, lies in the first cache.
#include "eight.h"
#include "sell.h"
#include "streams.h"

namespace {

enum { AHEAD = 1024 };

// The inputs of eight lanes, step by step.
template <class Column>
struct Inputs;

template <>
struct Inputs<int16_t> {
  __m256i next(const int16_t* columns) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(columns)));
  }
};

template <>
struct Inputs<uint8_t> {
  __m256i at = _mm256_setzero_si256();

  __m256i next(const uint8_t* distances) {
    at = _mm256_add_epi32(at, _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(distances))));
    return at;
  }
};

// A panel as it is read.
template <class Column, class T>
struct Panel {
  const T* values;
  const Column* columns;
  int64_t left;
  Inputs<Column> inputs[2];
  __m256 low = _mm256_setzero_ps(), high = low;

  void begin(int64_t panel, const Matmul&, const Sell& weight, int64_t, const float*) {
    const int64_t first = weight.offsets[panel];
    values = static_cast<const T*>(weight.values) + first * LANES;
    columns = static_cast<const Column*>(weight.columns) + first * LANES;
    left = weight.offsets[panel + 1] - first;
  }

  void step(const Matmul&, const Sell&, int64_t, const float* x) {
    _mm_prefetch(reinterpret_cast<const char*>(values) + AHEAD, _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(columns) + AHEAD, _MM_HINT_T0);
    low = _mm256_fmadd_ps(eight(values), _mm256_i32gather_ps(x, inputs[0].next(columns), 4), low);
    high = _mm256_fmadd_ps(eight(values + 8), _mm256_i32gather_ps(x, inputs[1].next(columns + 8), 4), high);
    values += LANES;
    columns += LANES;
  }

  void finish(int64_t panel, const Matmul& call, const Sell& weight, int64_t row, const float*) const {
    float all[LANES];
    _mm256_storeu_ps(all, low);
    _mm256_storeu_ps(all + 8, high);
    put<T>(all, panel, call, weight, row);
  }
};

template <class Column, class T, void (*row_of)(const Matmul*, int64_t, int64_t)>
void matmul(const void* pointer, int64_t begin, int64_t end) {
  const Matmul& call = *static_cast<const Matmul*>(pointer);
  const Sell& weight = *static_cast<const Sell*>(call.weight);
  float* const room = static_cast<float*>(scratch((weight.inputs + 15) / 16 * 64));
  for (int64_t row = 0; row < call.rows; row++) {
    const bool wild = widen_row(static_cast<const T*>(call.x) + row * weight.inputs, weight.inputs, room);
    if (wild)
      for (int64_t panel = begin; panel < end; panel++) row_of(&call, panel, row);
    else
      side_by_side<Panel<Column, T>>(begin, end, call, weight, row, static_cast<const float*>(room));
  }
}

}  // namespace

#define SELL(bits, Column, name, T)                                                                    \
  extern "C" void sell##bits##_matmul_##name##_avx2(const void* call, int64_t begin, int64_t end) { \
    matmul<Column, T, sell##bits##_row_##name>(call, begin, end);                                      \
  }
SELL(8, uint8_t, f32, float)
SELL(8, uint8_t, bf16, bf16)
SELL(8, uint8_t, f16, f16)
SELL(16, int16_t, f32, float)
SELL(16, int16_t, bf16, bf16)
SELL(16, int16_t, f16, f16)
