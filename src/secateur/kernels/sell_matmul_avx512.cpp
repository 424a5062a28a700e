// A step is one gather of sixteen inputs and one multiplication; x, as floats, lies in the first cache.
#include "sell.h"
#include "streams.h"
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
  int64_t left;  // by two
  bool odd_one;
  Inputs<Column> inputs;
  __m512 even = _mm512_setzero_ps(), odd = even;

  void begin(int64_t panel, const Matmul&, const Sell& weight, int64_t, const float*) {
    const int64_t first = weight.offsets[panel], steps = weight.offsets[panel + 1] - first;
    values = static_cast<const T*>(weight.values) + first * LANES;
    columns = static_cast<const Column*>(weight.columns) + first * LANES;
    left = steps / 2;
    odd_one = steps % 2;
  }

  void add(const float* x, __m512& sum) {
    _mm_prefetch(reinterpret_cast<const char*>(values) + AHEAD, _MM_HINT_T0);
    sum = _mm512_fmadd_ps(load(values, 0xffff), _mm512_i32gather_ps(inputs.next(columns), x, 4), sum);
    values += LANES;
    columns += LANES;
  }

  void step(const Matmul&, const Sell&, int64_t, const float* x) {
    _mm_prefetch(reinterpret_cast<const char*>(columns) + AHEAD, _MM_HINT_T0);
    add(x, even);
    add(x, odd);
  }

  void finish(int64_t panel, const Matmul& call, const Sell& weight, int64_t row, const float* x) {
    if (odd_one) add(x, even);
    alignas(64) float all[LANES];
    _mm512_store_ps(all, _mm512_add_ps(even, odd));
    put<T>(all, panel, call, weight, row);
  }
};

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
    side_by_side<Panel<Column, T>>(begin, end, call, weight, row, static_cast<const float*>(room));
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
