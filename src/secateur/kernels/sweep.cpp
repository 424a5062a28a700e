// The oracle.
#include "sweep.h"

extern "C" void sweep_f32_base(const void* pointer, int64_t begin, int64_t end) {
  const Sweep& call = *static_cast<const Sweep*>(pointer);
  const int64_t last = end * 16 < call.rows ? end * 16 : call.rows;
  float* const change = static_cast<float*>(scratch(call.columns * sizeof(float)));
  for (int64_t row = begin * 16; row < last; row++)
    for (int64_t column = 0; column < call.columns; column++) {
      const float* const factor = call.factor + column * call.factor_apart;
      const float plain = call.plain[row * call.plain_apart + column];
      float& push = call.push[row * call.push_apart + column];
      float sum = push;
      for (int64_t i = 0; i < column; i++) sum += factor[i] * change[i];
      const float mended = plain + sum / factor[column], weighed = mended * factor[column];
      const float q = !call.stays || call.stays[row * call.stays_apart + column] ? mended : 0;
      change[column] = plain - q;
      call.found[row * call.found_apart + column] = call.stays ? plain - q : weighed * weighed;
      if (call.stays) push = q;
    }
}
