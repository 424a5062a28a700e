#include <string.h>

#include "expand.h"
#include "numbers.h"
#include "sell.h"

namespace {

template <class Column>
void expand(const void* pointer, int64_t begin, int64_t end) {
  const Expand& call = *static_cast<const Expand*>(pointer);
  const Sell& weight = *static_cast<const Sell*>(call.weight);
  const bf16* values = static_cast<const bf16*>(weight.values);
  const Column* columns = static_cast<const Column*>(weight.columns);
  for (int64_t panel = begin; panel < end; panel++) {
    const int64_t first = panel * LANES, left = weight.outputs - first, lanes = left < LANES ? left : LANES;
    bf16* dense[LANES];
    for (int64_t lane = 0; lane < lanes; lane++) {
      dense[lane] = static_cast<bf16*>(call.dense) + weight.rows[first + lane] * weight.inputs;
      memset(dense[lane], 0, size_t(weight.inputs) * sizeof(bf16));
    }
    int64_t input[LANES] = {};
    for (int64_t step = weight.offsets[panel]; step < weight.offsets[panel + 1]; step++)
      for (int64_t lane = 0; lane < lanes; lane++) {
        input[lane] = moved(input[lane], columns[step * LANES + lane]);
        // What fills up a lane is a zero for an input that may have a weight, which must not change.
        dense[lane][input[lane]] |= values[step * LANES + lane];
      }
  }
}

}  // namespace

extern "C" void sell8_expand_bf16_base(const void* call, int64_t begin, int64_t end) { expand<uint8_t>(call, begin, end); }
extern "C" void sell16_expand_bf16_base(const void* call, int64_t begin, int64_t end) { expand<int16_t>(call, begin, end); }
