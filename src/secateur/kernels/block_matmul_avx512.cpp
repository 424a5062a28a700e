// Sixteen values of a block are R outputs by 16 / R inputs: those inputs are spread over the register, each R times, and
// what the inputs add to an output is folded together once, at the end.
#include "block.h"
#include "streams.h"
#include "wide.h"

namespace {

enum { AHEAD = 2048 };

void scalar(const Matmul& call, int64_t item, int64_t row, float) { block_row_f32(&call, item, row); }
void scalar(const Matmul& call, int64_t item, int64_t row, bf16) { block_row_bf16(&call, item, row); }
void scalar(const Matmul& call, int64_t item, int64_t row, f16) { block_row_f16(&call, item, row); }

// 16 / R floats, each in R lanes.
template <int R>
inline __m512 spread(const float* x) {
  if (R == 16) return _mm512_set1_ps(*x);
  if (R == 1) return _mm512_loadu_ps(x);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512 some = _mm512_maskz_loadu_ps((1u << (16 / R)) - 1, x);
  return _mm512_permutexvar_ps(_mm512_srli_epi32(lane, R == 8 ? 3 : R == 4 ? 2 : 1), some);
}

template <int R, class T>
struct Row : BlockRow<R, T> {
  using BlockRow<R, T>::values;
  using BlockRow<R, T>::places;
  __m512 sum = _mm512_setzero_ps();

  void step(const Matmul&, const Block& weight, int64_t, const float* x) {
    const float* in = x + *places++ * weight.columns;
    for (int64_t part = weight.columns * R / 16; part > 0; part--, values += 16, in += 16 / R) {
      _mm_prefetch(reinterpret_cast<const char*>(values) + AHEAD, _MM_HINT_T0);
      sum = _mm512_fmadd_ps(load(values, 0xffff), spread<R>(in), sum);
    }
  }

  void finish(int64_t item, const Matmul& call, const Block& weight, int64_t row, const float*) const {
    alignas(64) float all[16];
    _mm512_store_ps(all, sum);
    for (int lane = 0; lane < R; lane++) {
      float result = 0;
      for (int at = lane; at < 16; at += R) result += all[at];
      const int64_t output = item * R + lane;
      if (call.bias) {
        const __m512 bias = load(static_cast<const T*>(call.bias) + output, 1);
        result += _mm512_cvtss_f32(bias);
      }
      store(static_cast<T*>(call.y) + row * weight.outputs + output, 1, _mm512_set1_ps(result));
    }
  }
};

template <int R, class T>
void rows(const Matmul& call, const Block& weight, int64_t begin, int64_t end) {
  const __m512i infinite = _mm512_set1_epi32(0x7f800000);
  float* const x = static_cast<float*>(scratch((weight.inputs + 15) / 16 * 64));
  for (int64_t row = 0; row < call.rows; row++) {
    __mmask16 wild = 0;
    for (int64_t input = 0; input < weight.inputs; input += 16) {
      const __m512 some =
          load(static_cast<const T*>(call.x) + row * weight.inputs + input, first(weight.inputs - input));
      wild |= _mm512_cmpeq_epi32_mask(_mm512_and_si512(_mm512_castps_si512(some), infinite), infinite);
      _mm512_store_ps(x + input, some);
    }
    if (wild)
      for (int64_t item = begin; item < end; item++) scalar(call, item, row, T());
    else
      side_by_side<Row<R, T>>(begin, end, call, weight, row, static_cast<const float*>(x));
  }
}

template <class T>
void matmul(const void* pointer, int64_t begin, int64_t end) {
  const Matmul& call = *static_cast<const Matmul*>(pointer);
  const Block& weight = *static_cast<const Block*>(call.weight);
  const bool fills = weight.rows * weight.columns % 16 == 0;
  if (fills && weight.rows == 16) return rows<16, T>(call, weight, begin, end);
  if (fills && weight.rows == 8) return rows<8, T>(call, weight, begin, end);
  if (fills && weight.rows == 4) return rows<4, T>(call, weight, begin, end);
  if (fills && weight.rows == 2) return rows<2, T>(call, weight, begin, end);
  if (fills && weight.rows == 1) return rows<1, T>(call, weight, begin, end);
  for (int64_t item = begin; item < end; item++)
    for (int64_t row = 0; row < call.rows; row++) scalar(call, item, row, T());
}

}  // namespace

extern "C" void block_matmul_f32_avx512(const void* call, int64_t begin, int64_t end) {
  matmul<float>(call, begin, end);
}

extern "C" void block_matmul_bf16_avx512(const void* call, int64_t begin, int64_t end) {
  matmul<bf16>(call, begin, end);
}

extern "C" void block_matmul_f16_avx512(const void* call, int64_t begin, int64_t end) {
  matmul<f16>(call, begin, end);
}
