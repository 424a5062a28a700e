// The variants of sell_blocked_matmul in vectors of LANES floats, for processors that cannot look 256 inputs up: a gather of
// each vector, by an instruction or one by one. x, as floats, lies in the first cache.
#pragma once
#include "sell_blocked.h"
#include "vectors.h"
#ifdef __aarch64__
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif

namespace {

enum { AHEAD = 1024 };  // bytes

#ifdef __aarch64__
inline Vector load(const f16* from) {
  return Vector(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(from)))));
}

inline Vector gathered(const float* from, const uint8_t* columns) {
  return Vector{from[columns[0]], from[columns[1]], from[columns[2]], from[columns[3]]};
}
#else
inline Vector load(const f16* from) {
  return Vector(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

inline Vector gathered(const float* from, const uint8_t* columns) {
  const __m128i some = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(columns));
  return Vector(_mm256_i32gather_ps(from, _mm256_cvtepu8_epi32(some), 4));
}
#endif

// A row of x as floats; false where something in it is not finite.
template <class T>
bool widened(const T* x, int64_t inputs, float* to) {
  Vector wild = {};  // NaN from then on
  int64_t input = 0;
  for (; input + LANES <= inputs; input += LANES) {
    const Vector some = load(x + input);
    store(to + input, some);
    wild += some * 0.0f;
  }
  for (; input < inputs; input++) wild[0] += (to[input] = widen(x[input])) * 0.0f;
  float sum = 0;
  for (int lane = 0; lane < LANES; lane++) sum += wild[lane];
  return sum == 0;
}

template <class T>
void multiply(const Matmul& call, const SellBlocked& weight, int64_t item, int64_t row, const float* x) {
  const Chunk chunk(weight, item);
  const T* const values = static_cast<const T*>(weight.values);
  float all[CHUNK] = {};
  for (int64_t panel = chunk.first; panel < chunk.first + chunk.blocks * chunk.panels; panel++) {
    const float* const of_block = x + (panel - chunk.first) / chunk.panels * DEPTH;
    Vector sums[STEP / LANES] = {};
    for (int64_t at = weight.offsets[panel] * STEP; at < weight.offsets[panel + 1] * STEP; at += STEP) {
      __builtin_prefetch(reinterpret_cast<const char*>(values + at) + AHEAD);
      __builtin_prefetch(weight.columns + at + AHEAD);
#pragma GCC unroll 8
      for (int i = 0; i < STEP / LANES; i++)
        sums[i] += load(values + at + LANES * i) * gathered(of_block, weight.columns + at + LANES * i);
    }
    float made[STEP];
    for (int i = 0; i < STEP / LANES; i++) store(made + LANES * i, sums[i]);
    for (int i = 0; i < PANEL; i++) all[weight.rows[panel * PANEL + i]] += made[2 * i] + made[2 * i + 1];
  }
  put<T>(all, chunk, call, row, weight.outputs);
}

template <class T>
void matmul(const void* pointer, int64_t begin, int64_t end) {
  const Matmul& call = *static_cast<const Matmul*>(pointer);
  const SellBlocked& weight = *static_cast<const SellBlocked*>(call.weight);
  float* const x = static_cast<float*>(scratch(size_t(weight.inputs) * sizeof(float)));
  for (int64_t row = 0; row < call.rows; row++) {
    const bool finite = widened(static_cast<const T*>(call.x) + row * weight.inputs, weight.inputs, x);
    for (int64_t item = begin; item < end; item++)
      if (finite)
        multiply<T>(call, weight, item, row, x);
      else
        sell_blocked_row(call, item, row, T());
  }
}

}  // namespace
