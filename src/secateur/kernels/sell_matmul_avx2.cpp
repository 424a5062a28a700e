// A step is two gathers of eight inputs each; x, as floats, lies in the first cache.
#include "eight.h"
#include "sell.h"

namespace {

void scalar(const Matmul& call, int64_t panel, int64_t row, float) { sell_row_f32(&call, panel, row); }
void scalar(const Matmul& call, int64_t panel, int64_t row, bf16) { sell_row_bf16(&call, panel, row); }
void scalar(const Matmul& call, int64_t panel, int64_t row, f16) { sell_row_f16(&call, panel, row); }

template <class T>
void multiply(const Matmul& call, const Sell& weight, int64_t panel, int64_t row, const float* x) {
  const T* values = static_cast<const T*>(weight.values);
  __m256 sum[2] = {};
  for (int64_t step = weight.offsets[panel]; step < weight.offsets[panel + 1]; step++)
    for (int half = 0; half < 2; half++) {
      const int64_t at = step * LANES + 8 * half;
      const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weight.columns + at));
      const __m256 in = _mm256_i32gather_ps(x, _mm256_cvtepu16_epi32(narrow), 4);
      sum[half] = _mm256_fmadd_ps(eight(values + at), in, sum[half]);
    }
  const int64_t at = panel * LANES;
  const T* const bias = call.bias ? static_cast<const T*>(call.bias) + at : nullptr;
  store_lanes(sum[0], sum[1], bias, static_cast<T*>(call.y) + row * weight.outputs + at, weight.outputs - at);
}

template <class T>
void matmul(const void* pointer, int64_t begin, int64_t end) {
  const Matmul& call = *static_cast<const Matmul*>(pointer);
  const Sell& weight = *static_cast<const Sell*>(call.weight);
  float* const room = static_cast<float*>(scratch((weight.inputs + 15) / 16 * 64));
  for (int64_t row = 0; row < call.rows; row++) {
    const bool wild = widen_row(static_cast<const T*>(call.x) + row * weight.inputs, weight.inputs, room);
    for (int64_t panel = begin; panel < end; panel++)
      if (wild)
        scalar(call, panel, row, T());
      else
        multiply<T>(call, weight, panel, row, room);
  }
}

}  // namespace

extern "C" void sell_matmul_f32_avx2(const void* call, int64_t begin, int64_t end) { matmul<float>(call, begin, end); }

extern "C" void sell_matmul_bf16_avx2(const void* call, int64_t begin, int64_t end) { matmul<bf16>(call, begin, end); }

extern "C" void sell_matmul_f16_avx2(const void* call, int64_t begin, int64_t end) { matmul<f16>(call, begin, end); }
