// A step is four gathers of eight inputs each; x, as floats, lies in the first cache.
#include "eight.h"
#include "sell_blocked.h"

namespace {

enum { AHEAD = 1024 };

template <class T>
void multiply(const Matmul& call, const SellBlocked& weight, int64_t item, int64_t row, const float* x) {
  const Chunk chunk(weight, item);
  float all[CHUNK] = {};
  for (int64_t panel = chunk.first; panel < chunk.first + chunk.blocks * chunk.panels; panel++) {
    const float* const of_block = x + (panel - chunk.first) / chunk.panels * DEPTH;
    const int64_t from = weight.offsets[panel] * STEP, to = weight.offsets[panel + 1] * STEP;
    const T* const values = static_cast<const T*>(weight.values);
    __m256 sums[4] = {};
    for (int64_t at = from; at < to; at += STEP) {
      _mm_prefetch(reinterpret_cast<const char*>(values + at) + AHEAD, _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(weight.columns + at) + AHEAD, _MM_HINT_T0);
      for (int i = 0; i < 4; i++) {
        const __m128i eight_of = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(weight.columns + at + 8 * i));
        const __m256 inputs = _mm256_i32gather_ps(of_block, _mm256_cvtepu8_epi32(eight_of), 4);
        sums[i] = _mm256_fmadd_ps(eight(values + at + 8 * i), inputs, sums[i]);
      }
    }
    float made[STEP];
    for (int i = 0; i < 4; i++) _mm256_storeu_ps(made + 8 * i, sums[i]);
    for (int lane = 0; lane < LANES; lane++) all[weight.rows[panel * LANES + lane]] += made[2 * lane] + made[2 * lane + 1];
  }
  put<T>(all, chunk, call, row, weight.outputs);
}

template <class T>
void matmul(const void* pointer, int64_t begin, int64_t end) {
  const Matmul& call = *static_cast<const Matmul*>(pointer);
  const SellBlocked& weight = *static_cast<const SellBlocked*>(call.weight);
  float* const x = static_cast<float*>(scratch((weight.inputs + 15) / 16 * 64));
  for (int64_t row = 0; row < call.rows; row++) {
    const bool wild = widen_row(static_cast<const T*>(call.x) + row * weight.inputs, weight.inputs, x);
    for (int64_t item = begin; item < end; item++)
      if (wild)
        sell_blocked_row(call, item, row, T());
      else
        multiply<T>(call, weight, item, row, x);
  }
}

}  // namespace

#define SELL(name, T)                                                                               \
  extern "C" void sell_blocked_matmul_##name##_avx2(const void* call, int64_t begin, int64_t end) { \
    matmul<T>(call, begin, end);                                                                    \
  }
SELL(f32, float)
SELL(bf16, bf16)
SELL(f16, f16)
