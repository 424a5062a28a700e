// The oracle.
#include "finite.h"
#include "sell.h"

namespace {

template <class T>
void multiply(const Matmul& call, int64_t panel, int64_t row) {
  const Sell& weight = *static_cast<const Sell*>(call.weight);
  const T* values = static_cast<const T*>(weight.values);
  const T* x = static_cast<const T*>(call.x) + row * weight.inputs;
  const int64_t wild = ::wild(x, weight.inputs);
  for (int lane = 0; lane < LANES; lane++) {
    const int64_t output = panel * LANES + lane;
    if (output >= weight.outputs) break;
    Sum sum;
    for (int64_t step = weight.offsets[panel]; step < weight.offsets[panel + 1]; step++)
      sum.add(widen(values[step * LANES + lane]), widen(x[weight.columns[step * LANES + lane]]));
    const float bias = call.bias ? widen(static_cast<const T*>(call.bias)[output]) : 0.0f;
    narrow(sum.of(wild) + bias, static_cast<T*>(call.y) + row * weight.outputs + output);
  }
}

template <class T>
void matmul(const void* pointer, int64_t begin, int64_t end) {
  const Matmul& call = *static_cast<const Matmul*>(pointer);
  for (int64_t panel = begin; panel < end; panel++)
    for (int64_t row = 0; row < call.rows; row++) multiply<T>(call, panel, row);
}

}  // namespace

extern "C" void sell_row_f32(const Matmul* call, int64_t panel, int64_t row) { multiply<float>(*call, panel, row); }
extern "C" void sell_row_bf16(const Matmul* call, int64_t panel, int64_t row) { multiply<bf16>(*call, panel, row); }
extern "C" void sell_row_f16(const Matmul* call, int64_t panel, int64_t row) { multiply<f16>(*call, panel, row); }

extern "C" void sell_matmul_f32_base(const void* call, int64_t begin, int64_t end) { matmul<float>(call, begin, end); }

extern "C" void sell_matmul_bf16_base(const void* call, int64_t begin, int64_t end) { matmul<bf16>(call, begin, end); }

extern "C" void sell_matmul_f16_base(const void* call, int64_t begin, int64_t end) { matmul<f16>(call, begin, end); }
