#include <string.h>

#include "expand.h"
#include "nm.h"
#include "numbers.h"

enum { WIDTH = 64 };  // inputs that are written together

extern "C" void nm_expand_bf16_base(const void* pointer, int64_t begin, int64_t end) {
  const Expand& call = *static_cast<const Expand*>(pointer);
  const NM& weight = *static_cast<const NM*>(call.weight);
  const int bits = weight.m <= 4 ? 2 : 4;
  const int64_t groups = weight.inputs / weight.m, slots = groups * weight.n;
  const int64_t together = WIDTH / weight.m;
  for (int64_t panel = begin; panel < end; panel++) {
    const int64_t first = panel * LANES, left = weight.outputs - first, lanes = left < LANES ? left : LANES;
    bf16* dense = static_cast<bf16*>(call.dense) + first * weight.inputs;
    const bf16* value = static_cast<const bf16*>(weight.values) + panel * slots * LANES;
    const uint8_t* byte = weight.places + panel * slots * 2 * bits;
    for (int64_t group = 0; group < groups; group += together) {
      const int64_t here = groups - group < together ? groups - group : together, width = here * weight.m;
      bf16 chunk[LANES * WIDTH] = {};  // rows as long as a page would all fall into one set of the cache
      for (int64_t at = 0; at < width; at += weight.m)
        for (int64_t n = 0; n < weight.n; n++, value += LANES, byte += 2 * bits) {
          uint64_t places = 0;
          memcpy(&places, byte, bits == 2 ? 4 : 8);
          for (int64_t lane = 0; lane < LANES; lane++) {
            const int64_t place = places >> (lane * bits) & ((1 << bits) - 1);
            // What is missing is a zero of either sign at place 0, which must not change the weight there.
            chunk[lane * WIDTH + at + place] |= value[lane] & 0x7fff ? value[lane] : 0;
          }
        }
      for (int64_t lane = 0; lane < lanes; lane++)
        memcpy(dense + lane * weight.inputs + group * weight.m, chunk + lane * WIDTH, size_t(width) * sizeof(bf16));
    }
  }
}
