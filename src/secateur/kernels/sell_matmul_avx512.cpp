// A step is one gather of sixteen inputs and one multiplication; x, as floats, lies in the first cache.
#include "sell.h"
#include "wide.h"

namespace {

enum { AHEAD = 2048 };  // bytes

// The inputs of the lanes, step by step.
template <class Column>
struct Inputs;

template <>
struct Inputs<int16_t> {
  __m512i next(const int16_t* columns) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns)));
  }
};

template <>
struct Inputs<uint8_t> {
  __m512i at = _mm512_setzero_si512();

  __m512i next(const uint8_t* distances) {
    at = _mm512_add_epi32(at, _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(distances))));
    return at;
  }
};

// A panel as it is read. Two sums in turn: a gather is slow, and they are independent.
template <class Column, class T>
struct Panel {
  const T* values;
  const Column* columns;
  int64_t left;  // steps
  Inputs<Column> inputs;
  __m512 even = _mm512_setzero_ps(), odd = even;

  void begin(const Sell& weight, int64_t panel) {
    const int64_t step = weight.offsets[panel];
    values = static_cast<const T*>(weight.values) + step * LANES;
    columns = static_cast<const Column*>(weight.columns) + step * LANES;
    left = weight.offsets[panel + 1] - step;
  }

  void step(const float* x, __m512& sum) {
    _mm_prefetch(reinterpret_cast<const char*>(values) + AHEAD, _MM_HINT_T0);
    sum = _mm512_fmadd_ps(load(values, 0xffff), _mm512_i32gather_ps(inputs.next(columns), x, 4), sum);
    values += LANES;
    columns += LANES;
  }

  void two_steps(const float* x) {
    _mm_prefetch(reinterpret_cast<const char*>(columns) + AHEAD, _MM_HINT_T0);
    step(x, even);
    step(x, odd);
  }

  void finish(const Matmul& call, const Sell& weight, int64_t panel, int64_t row, const float* x, int64_t done) {
    for (left -= done; left >= 2; left -= 2) two_steps(x);
    if (left) step(x, even);
    const int64_t at = panel * LANES;
    const __mmask16 lanes = first(weight.outputs - at);
    const __m512 bias = call.bias ? load(static_cast<const T*>(call.bias) + at, lanes) : _mm512_setzero_ps();
    store(static_cast<T*>(call.y) + row * weight.outputs + at, lanes, _mm512_add_ps(_mm512_add_ps(even, odd), bias));
  }
};

// Some panels at once, `apart` from one to the next: memory gives more to several streams than to one.
template <int PANELS, class Column, class T>
int64_t abreast(const Matmul& call, const Sell& weight, int64_t begin, int64_t end, int64_t row, const float* x) {
  const int64_t apart = (end - begin) / PANELS;
  for (int64_t panel = begin; panel < begin + apart; panel++) {
    Panel<Column, T> panels[PANELS];
    int64_t both = INT64_MAX;  // steps that all of them have, by twos
    for (int p = 0; p < PANELS; p++) {
      panels[p].begin(weight, panel + p * apart);
      both = panels[p].left / 2 < both ? panels[p].left / 2 : both;
    }
    for (int64_t left = both; left > 0; left--)
#pragma GCC unroll 4
      for (int p = 0; p < PANELS; p++) panels[p].two_steps(x);
    for (int p = 0; p < PANELS; p++) panels[p].finish(call, weight, panel + p * apart, row, x, 2 * both);
  }
  return begin + PANELS * apart;
}

// One row of x at a time, over all panels: it stays in the first cache, and the weights of a chunk in the second.
template <class Column, class T, void (*row_of)(const Matmul*, int64_t, int64_t)>
void matmul(const void* pointer, int64_t begin, int64_t end) {
  const Matmul& call = *static_cast<const Matmul*>(pointer);
  const Sell& weight = *static_cast<const Sell*>(call.weight);
  float* const room = static_cast<float*>(scratch((weight.inputs + 15) / 16 * 64));
  for (int64_t row = 0; row < call.rows; row++) {
    const T* const x = static_cast<const T*>(call.x) + row * weight.inputs;
    __mmask16 wild = 0;
    for (int64_t input = 0; input < weight.inputs; input += 16) {
      const __m512 some = load(x + input, first(weight.inputs - input));
      const __m512i exponent = _mm512_and_si512(_mm512_castps_si512(some), _mm512_set1_epi32(0x7f800000));
      wild |= _mm512_cmpeq_epi32_mask(exponent, _mm512_set1_epi32(0x7f800000));
      _mm512_store_ps(room + input, some);
    }
    if (wild) {
      for (int64_t panel = begin; panel < end; panel++) row_of(&call, panel, row);
      continue;
    }
    int64_t panel = abreast<4, Column, T>(call, weight, begin, end, row, room);
    panel = abreast<2, Column, T>(call, weight, panel, end, row, room);
    abreast<1, Column, T>(call, weight, panel, end, row, room);
  }
}

}  // namespace

#define SELL(bits, Column, name, T)                                                                    \
  extern "C" void sell##bits##_matmul_##name##_avx512(const void* call, int64_t begin, int64_t end) { \
    matmul<Column, T, sell##bits##_row_##name>(call, begin, end);                                      \
  }
SELL(8, uint8_t, f32, float)
SELL(8, uint8_t, bf16, bf16)
SELL(8, uint8_t, f16, f16)
SELL(16, int16_t, f32, float)
SELL(16, int16_t, bf16, bf16)
SELL(16, int16_t, f16, f16)
