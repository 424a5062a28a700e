// The oracle, an item sixteen rows of the matrix.
#include "sweep.h"

extern "C" void sweep_f32_base(const void* pointer, int64_t begin, int64_t end) {
  const Sweep& call = *static_cast<const Sweep*>(pointer);
  const int64_t last = end * 16 < call.rows ? end * 16 : call.rows;
  for (int64_t row = begin * 16; row < last; row++)
    for (int64_t column = 0; column < call.columns; column++) {
      const float* const factor = call.factor + column * call.stride;
      const int64_t at = column * call.rows + row;
      float sum = call.push[at];
      for (int64_t i = 0; i < column; i++) sum += factor[i] * call.change[i * call.rows + row];
      const float mended = call.plain[at] + sum / factor[column];
      call.change[at] = call.plain[at] - (call.stays[at] ? mended : 0);
    }
}
