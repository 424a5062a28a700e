#include <string.h>

#include "expand.h"
#include "sell_blocked.h"

extern "C" void sell_blocked_expand_bf16_base(const void* pointer, int64_t begin, int64_t end) {
  const Expand& call = *static_cast<const Expand*>(pointer);
  const SellBlocked& weight = *static_cast<const SellBlocked*>(call.weight);
  const bf16* const values = static_cast<const bf16*>(weight.values);
  for (int64_t item = begin; item < end; item++) {
    const Chunk chunk(weight, item);
    bf16* const dense = static_cast<bf16*>(call.dense) + chunk.output * weight.inputs;
    memset(dense, 0, size_t(chunk.outputs * weight.inputs) * sizeof(bf16));
    for (int64_t panel = chunk.first; panel < chunk.first + chunk.blocks * chunk.panels; panel++) {
      const int64_t input = (panel - chunk.first) / chunk.panels * DEPTH;
      for (int64_t at = weight.offsets[panel] * STEP; at < weight.offsets[panel + 1] * STEP; at++) {
        const int64_t row = weight.rows[panel * PANEL + at % STEP / 2];
        // What fills up an output is a zero for an input that may have a weight, which must not change.
        if (row < chunk.outputs) dense[row * weight.inputs + input + weight.columns[at]] |= values[at];
      }
    }
  }
}
