// Eight values of a block are R outputs by 8 / R inputs, or half of sixteen outputs: those inputs are spread over the
// register, each R times, and what the inputs add to an output is folded together once, at the end.
#include "block.h"
#include "eight.h"
#include "streams.h"

namespace {

enum { AHEAD = 1024 };

void scalar(const Matmul& call, int64_t item, int64_t row, float) { block_row_f32(&call, item, row); }
void scalar(const Matmul& call, int64_t item, int64_t row, bf16) { block_row_bf16(&call, item, row); }
void scalar(const Matmul& call, int64_t item, int64_t row, f16) { block_row_f16(&call, item, row); }

// Half of the inputs of sixteen values, each in R lanes.
template <int R>
inline __m256 spread(const float* x, int half) {
  if (R == 16) return _mm256_broadcast_ss(x);
  x += half * 8 / R;
  if (R == 8) return _mm256_broadcast_ss(x);
  if (R == 1) return _mm256_loadu_ps(x);
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256 some = _mm256_castps128_ps256(_mm_loadu_ps(x));  // beyond the last input there is room
  return _mm256_permutevar8x32_ps(some, _mm256_srli_epi32(lane, R == 4 ? 2 : 1));
}

template <int R, class T>
struct Row : BlockRow<R, T> {
  using BlockRow<R, T>::values;
  using BlockRow<R, T>::places;
  __m256 low = _mm256_setzero_ps(), high = low;

  void step(const Matmul&, const Block& weight, int64_t, const float* x) {
    const float* in = x + *places++ * weight.columns;
    for (int64_t part = weight.columns * R / 16; part > 0; part--, values += 16, in += 16 / R) {
      _mm_prefetch(reinterpret_cast<const char*>(values) + AHEAD, _MM_HINT_T0);
      low = _mm256_fmadd_ps(eight(values), spread<R>(in, 0), low);
      high = _mm256_fmadd_ps(eight(values + 8), spread<R>(in, 1), high);
    }
  }

  void finish(int64_t item, const Matmul& call, const Block& weight, int64_t row, const float*) const {
    float all[16], result[16] = {};
    _mm256_storeu_ps(all, low);
    _mm256_storeu_ps(all + 8, high);
    for (int at = 0; at < 16; at++) result[at % R] += all[at];
    const int64_t output = item * R;
    const T* const bias = call.bias ? static_cast<const T*>(call.bias) + output : nullptr;
    store_lanes(_mm256_loadu_ps(result), _mm256_loadu_ps(result + 8), bias,
                static_cast<T*>(call.y) + row * weight.outputs + output, R);
  }
};

template <int R, class T>
void rows(const Matmul& call, const Block& weight, int64_t begin, int64_t end) {
  float* const x = static_cast<float*>(scratch((weight.inputs + 8) * sizeof(float)));
  for (int64_t row = 0; row < call.rows; row++) {
    const bool wild = widen_row(static_cast<const T*>(call.x) + row * weight.inputs, weight.inputs, x);
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

extern "C" void block_matmul_f32_avx2(const void* call, int64_t begin, int64_t end) { matmul<float>(call, begin, end); }

extern "C" void block_matmul_bf16_avx2(const void* call, int64_t begin, int64_t end) { matmul<bf16>(call, begin, end); }

extern "C" void block_matmul_f16_avx2(const void* call, int64_t begin, int64_t end) { matmul<f16>(call, begin, end); }
