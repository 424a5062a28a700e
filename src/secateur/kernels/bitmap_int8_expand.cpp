#include <string.h>

#include "bitmap.h"
#include "expand.h"
#include "numbers.h"

enum { DEPTH = 4, WIDTH = 64 };  // inputs of a step, and those that are written together

extern "C" void bitmap_int8_expand_bf16_base(const void* pointer, int64_t begin, int64_t end) {
  const Expand& call = *static_cast<const Expand*>(pointer);
  const BitmapInt8& scaled = *static_cast<const BitmapInt8*>(call.weight);
  const Bitmap& weight = scaled.bitmap;
  const int64_t steps = (weight.inputs + DEPTH - 1) / DEPTH;
  for (int64_t panel = begin; panel < end; panel++) {
    const int64_t first = panel * LANES, left = weight.outputs - first, lanes = left < LANES ? left : LANES;
    bf16* dense = static_cast<bf16*>(call.dense) + first * weight.inputs;
    const int8_t* value = static_cast<const int8_t*>(weight.values) + weight.offsets[panel];
    const uint8_t* mask = weight.masks + panel * steps * 2 * DEPTH;
    float scale[LANES] = {};
    for (int64_t lane = 0; lane < lanes; lane++) scale[lane] = widen(static_cast<const bf16*>(scaled.scales)[first + lane]);
    for (int64_t input = 0; input < weight.inputs; input += WIDTH) {
      const int64_t left = weight.inputs - input, width = left < WIDTH ? left : WIDTH;
      bf16 chunk[LANES * WIDTH] = {};  // rows as long as a page would all fall into one set of the cache
      for (int64_t at = 0; at < width; at += DEPTH, mask += 2 * DEPTH) {
        uint64_t bits;
        memcpy(&bits, mask, sizeof(bits));
        for (; bits; bits &= bits - 1) {
          const int64_t bit = __builtin_ctzll(bits), lane = bit / DEPTH;
          narrow(float(*value++) * scale[lane], chunk + lane * WIDTH + at + bit % DEPTH);
        }
      }
      for (int64_t lane = 0; lane < lanes; lane++)
        memcpy(dense + lane * weight.inputs + input, chunk + lane * WIDTH, size_t(width) * sizeof(bf16));
    }
  }
}
