#include <string.h>

#include "expand.h"
#include "numbers.h"
#include "sell.h"

extern "C" void sell_expand_bf16_base(const void* pointer, int64_t begin, int64_t end) {
  const Expand& call = *static_cast<const Expand*>(pointer);
  const Sell& weight = *static_cast<const Sell*>(call.weight);
  const bf16* values = static_cast<const bf16*>(weight.values);
  for (int64_t panel = begin; panel < end; panel++) {
    const int64_t first = panel * LANES, left = weight.outputs - first, lanes = left < LANES ? left : LANES;
    bf16* dense = static_cast<bf16*>(call.dense) + first * weight.inputs;
    memset(dense, 0, size_t(lanes * weight.inputs) * sizeof(bf16));
    for (int64_t step = weight.offsets[panel]; step < weight.offsets[panel + 1]; step++)
      for (int64_t lane = 0; lane < lanes; lane++)
        // What fills up a lane is a zero for input 0, which must not change the weight there.
        dense[lane * weight.inputs + weight.columns[step * LANES + lane]] |= values[step * LANES + lane];
  }
}
