// The oracle for 8-bit values: whole numbers are added up as floats, and scaled once at the end.
#include "bitmap.h"
#include "numbers.h"

namespace {

enum { DEPTH = 4 };

template <class T>
void multiply(const Matmul& call, const BitmapInt8& scaled, int64_t panel, int64_t row) {
  const Bitmap& weight = scaled.bitmap;
  const int64_t steps = (weight.inputs + DEPTH - 1) / DEPTH;
  const uint8_t* mask = weight.masks + panel * steps * 2 * DEPTH;
  const int8_t* value = static_cast<const int8_t*>(weight.values) + weight.offsets[panel];
  const T* x = static_cast<const T*>(call.x) + row * weight.inputs;
  float sum[LANES] = {};
  for (int64_t step = 0; step < steps; step++, mask += 2 * DEPTH) {
    for (int bit = 0; bit < LANES * DEPTH; bit++) {
      const bool kept = mask[bit / 8] >> (bit % 8) & 1;
      const float w = kept ? float(*value++) : 0.0f;
      const int64_t input = step * DEPTH + bit % DEPTH;
      if (input < weight.inputs) sum[bit / DEPTH] += w * widen(x[input]);
    }
  }
  for (int lane = 0; lane < LANES; lane++) {
    const int64_t output = panel * LANES + lane;
    if (output >= weight.outputs) break;
    const float scale = widen(static_cast<const T*>(scaled.scales)[output]);
    const float bias = call.bias ? widen(static_cast<const T*>(call.bias)[output]) : 0.0f;
    narrow(sum[lane] * scale + bias, static_cast<T*>(call.y) + row * weight.outputs + output);
  }
}

template <class T>
void matmul(const void* pointer, int64_t begin, int64_t end) {
  const Matmul& call = *static_cast<const Matmul*>(pointer);
  const BitmapInt8& weight = *static_cast<const BitmapInt8*>(call.weight);
  for (int64_t panel = begin; panel < end; panel++)
    for (int64_t row = 0; row < call.rows; row++) multiply<T>(call, weight, panel, row);
}

}  // namespace

extern "C" void bitmap_int8_matmul_f32_base(const void* call, int64_t begin, int64_t end) {
  matmul<float>(call, begin, end);
}

extern "C" void bitmap_int8_matmul_bf16_base(const void* call, int64_t begin, int64_t end) {
  matmul<bf16>(call, begin, end);
}

extern "C" void bitmap_int8_matmul_f16_base(const void* call, int64_t begin, int64_t end) {
  matmul<f16>(call, begin, end);
}
