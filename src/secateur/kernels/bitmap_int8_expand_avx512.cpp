// A step is one expand of bytes: sixteen outputs by four inputs, scaled as floats.
#include <string.h>

#include "bitmap.h"
#include "expand.h"
#include "wide.h"

enum { DEPTH = 4, WIDTH = 64 };  // inputs of a step, and those that are written together

extern "C" void bitmap_int8_expand_bf16_avx512(const void* pointer, int64_t begin, int64_t end) {
  const Expand& call = *static_cast<const Expand*>(pointer);
  const BitmapInt8& scaled = *static_cast<const BitmapInt8*>(call.weight);
  const Bitmap& weight = scaled.bitmap;
  const int64_t steps = (weight.inputs + DEPTH - 1) / DEPTH;
  for (int64_t panel = begin; panel < end; panel++) {
    const int64_t above = panel * LANES, rest = weight.outputs - above, lanes = rest < LANES ? rest : LANES;
    bf16* dense = static_cast<bf16*>(call.dense) + above * weight.inputs;
    const int8_t* value = static_cast<const int8_t*>(weight.values) + weight.offsets[panel];
    const uint64_t* mask = reinterpret_cast<const uint64_t*>(weight.masks) + panel * steps;
    const __m512 scales = load(static_cast<const bf16*>(scaled.scales) + above, first(rest));
    __m512 scale[4];  // of four lanes, for each of their inputs
    for (int i = 0; i < 4; i++) {
      const __m512i lane = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
      scale[i] = _mm512_permutexvar_ps(_mm512_add_epi32(lane, _mm512_set1_epi32(4 * i)), scales);
    }
    for (int64_t input = 0; input < weight.inputs; input += WIDTH) {
      const int64_t left = weight.inputs - input, width = left < WIDTH ? left : WIDTH;
      bf16 chunk[LANES * WIDTH];  // rows as long as a page would all fall into one set of the cache
      for (int64_t at = 0; at < width; at += DEPTH, mask++) {
        const __m512i all = expanded(*mask, value);
        value += __builtin_popcountll(*mask);
        const __m128i four[4] = {_mm512_castsi512_si128(all), _mm512_extracti32x4_epi32(all, 1),
                                 _mm512_extracti32x4_epi32(all, 2), _mm512_extracti32x4_epi32(all, 3)};
        for (int i = 0; i < 4; i++) {
          const __m512 floats = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(four[i])), scale[i]);
          uint64_t lane[4];
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(lane), narrow(floats, bf16()));
          for (int j = 0; j < 4; j++) memcpy(chunk + (4 * i + j) * WIDTH + at, lane + j, sizeof(*lane));
        }
      }
      for (int64_t lane = 0; lane < lanes; lane++)
        memcpy(dense + lane * weight.inputs + input, chunk + lane * WIDTH, size_t(width) * sizeof(bf16));
    }
  }
}
