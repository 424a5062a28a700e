// The oracle.
#include "activate.h"

#include <math.h>

#include "numbers.h"

namespace {

inline float activated(const Activate& call, float x) {
  if (call.kind == SILU) return x / (1 + expf(-x));
  return x < call.low ? call.low : x > call.high ? call.high : x;
}

template <class T>
void activate(const void* pointer, int64_t begin, int64_t end) {
  const Activate& call = *static_cast<const Activate*>(pointer);
  const int64_t behind = end * SPAN < call.count ? end * SPAN : call.count;
  const T *const x = static_cast<const T*>(call.x), *const times = static_cast<const T*>(call.times);
  T* const y = static_cast<T*>(call.y);
  for (int64_t i = begin * SPAN; i < behind; i++) {
    T found;
    narrow(activated(call, widen(x[i])), &found);
    if (times) narrow(widen(found) * widen(times[i]), &found);
    y[i] = found;
  }
}

}  // namespace

extern "C" void activate_f32_base(const void* call, int64_t begin, int64_t end) { activate<float>(call, begin, end); }
extern "C" void activate_bf16_base(const void* call, int64_t begin, int64_t end) { activate<bf16>(call, begin, end); }
extern "C" void activate_f16_base(const void* call, int64_t begin, int64_t end) { activate<f16>(call, begin, end); }
