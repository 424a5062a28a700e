// The oracle: every weight looked up by its bit, and multiplied whether it is kept or not, so that zero times infinity
// is NaN here as in a dense product.
#include "bitmap.h"
#include "numbers.h"

namespace {

template <class T>
void multiply(const Matmul& call, const Bitmap& weight, int64_t panel, int64_t row) {
  const int depth = 4 / sizeof(T);
  const int64_t steps = (weight.inputs + depth - 1) / depth;
  const uint8_t* mask = weight.masks + panel * steps * 2 * depth;
  const T* value = static_cast<const T*>(weight.values) + weight.offsets[panel];
  const T* x = static_cast<const T*>(call.x) + row * weight.inputs;
  float sum[LANES] = {};
  for (int64_t step = 0; step < steps; step++, mask += 2 * depth) {
    for (int bit = 0; bit < LANES * depth; bit++) {
      const bool kept = mask[bit / 8] >> (bit % 8) & 1;
      const float w = kept ? widen(*value++) : 0.0f;
      const int64_t input = step * depth + bit % depth;
      if (input < weight.inputs) sum[bit / depth] += w * widen(x[input]);
    }
  }
  for (int lane = 0; lane < LANES; lane++) {
    const int64_t output = panel * LANES + lane;
    if (output >= weight.outputs) break;
    const float bias = call.bias ? widen(static_cast<const T*>(call.bias)[output]) : 0.0f;
    narrow(sum[lane] + bias, static_cast<T*>(call.y) + row * weight.outputs + output);
  }
}

template <class T>
void matmul(const void* pointer, int64_t begin, int64_t end) {
  const Matmul& call = *static_cast<const Matmul*>(pointer);
  const Bitmap& weight = *static_cast<const Bitmap*>(call.weight);
  for (int64_t panel = begin; panel < end; panel++)
    for (int64_t row = 0; row < call.rows; row++) multiply<T>(call, weight, panel, row);
}

}  // namespace

extern "C" void bitmap_matmul_f32_base(const void* call, int64_t begin, int64_t end) {
  matmul<float>(call, begin, end);
}

extern "C" void bitmap_matmul_bf16_base(const void* call, int64_t begin, int64_t end) {
  matmul<bf16>(call, begin, end);
}

extern "C" void bitmap_matmul_f16_base(const void* call, int64_t begin, int64_t end) {
  matmul<f16>(call, begin, end);
}
