// A step is one gather of sixteen inputs and one multiplication; x, as floats, lies in the first cache.
#include "sell.h"
#include "wide.h"

namespace {

enum { AHEAD = 2048 };  // bytes of values

void scalar(const Matmul& call, int64_t panel, int64_t row, float) { sell_row_f32(&call, panel, row); }
void scalar(const Matmul& call, int64_t panel, int64_t row, bf16) { sell_row_bf16(&call, panel, row); }
void scalar(const Matmul& call, int64_t panel, int64_t row, f16) { sell_row_f16(&call, panel, row); }

inline __m512 gathered(const int16_t* columns, const float* x) {
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns));
  return _mm512_i32gather_ps(_mm512_cvtepu16_epi32(narrow), x, 4);
}

template <class T>
void multiply(const Matmul& call, const Sell& weight, int64_t panel, int64_t row, const float* x) {
  const int64_t begin = weight.offsets[panel], end = weight.offsets[panel + 1];
  const T* values = static_cast<const T*>(weight.values) + begin * LANES;
  const int16_t* columns = weight.columns + begin * LANES;
  __m512 sum[4] = {};  // four chains: a gather is slow, and they are independent
  int64_t left = end - begin;
  for (; left >= 4; left -= 4) {
    for (int i = 0; i < 4; i++) {
      _mm_prefetch(reinterpret_cast<const char*>(values + i * LANES) + AHEAD, _MM_HINT_T0);
      if (i % 2) _mm_prefetch(reinterpret_cast<const char*>(columns + i * LANES) + AHEAD, _MM_HINT_T0);
      sum[i] = _mm512_fmadd_ps(load(values + i * LANES, 0xffff), gathered(columns + i * LANES, x), sum[i]);
    }
    values += 4 * LANES;
    columns += 4 * LANES;
  }
  for (; left; left--, values += LANES, columns += LANES)
    sum[0] = _mm512_fmadd_ps(load(values, 0xffff), gathered(columns, x), sum[0]);
  const int64_t at = panel * LANES;
  const __mmask16 lanes = first(weight.outputs - at);
  const __m512 bias = call.bias ? load(static_cast<const T*>(call.bias) + at, lanes) : _mm512_setzero_ps();
  const __m512 all = _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3]));
  store(static_cast<T*>(call.y) + row * weight.outputs + at, lanes, _mm512_add_ps(all, bias));
}

// One row of x at a time, over all panels: it stays in the first cache, and the weights of a chunk in the second.
template <class T>
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
    for (int64_t panel = begin; panel < end; panel++)
      if (wild)
        scalar(call, panel, row, T());
      else
        multiply<T>(call, weight, panel, row, room);
  }
}

}  // namespace

extern "C" void sell_matmul_f32_avx512(const void* call, int64_t begin, int64_t end) {
  matmul<float>(call, begin, end);
}

extern "C" void sell_matmul_bf16_avx512(const void* call, int64_t begin, int64_t end) {
  matmul<bf16>(call, begin, end);
}

extern "C" void sell_matmul_f16_avx512(const void* call, int64_t begin, int64_t end) {
  matmul<f16>(call, begin, end);
}
