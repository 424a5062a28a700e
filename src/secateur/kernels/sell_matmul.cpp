// The oracle.
#include "finite.h"
#include "sell.h"

namespace {

template <class Column, class T>
void multiply(const Matmul& call, int64_t panel, int64_t row) {
  const Sell& weight = *static_cast<const Sell*>(call.weight);
  const T* values = static_cast<const T*>(weight.values);
  const Column* columns = static_cast<const Column*>(weight.columns);
  const T* x = static_cast<const T*>(call.x) + row * weight.inputs;
  const int64_t wild = ::wild(x, weight.inputs);
  for (int lane = 0; lane < LANES; lane++) {
    const int64_t output = weight.rows[panel * LANES + lane];
    if (output >= weight.outputs) break;
    Sum sum;
    int64_t input = 0;
    for (int64_t step = weight.offsets[panel]; step < weight.offsets[panel + 1]; step++) {
      input = moved(input, columns[step * LANES + lane]);
      sum.add(widen(values[step * LANES + lane]), widen(x[input]));
    }
    const float bias = call.bias ? widen(static_cast<const T*>(call.bias)[output]) : 0.0f;
    narrow(sum.of(wild) + bias, static_cast<T*>(call.y) + row * weight.outputs + output);
  }
}

template <class Column, class T>
void matmul(const void* pointer, int64_t begin, int64_t end) {
  const Matmul& call = *static_cast<const Matmul*>(pointer);
  for (int64_t panel = begin; panel < end; panel++)
    for (int64_t row = 0; row < call.rows; row++) multiply<Column, T>(call, panel, row);
}

}  // namespace

#define SELL(bits, Column, name, T)                                                           \
  extern "C" void sell##bits##_row_##name(const Matmul* call, int64_t panel, int64_t row) {   \
    multiply<Column, T>(*call, panel, row);                                                   \
  }                                                                                           \
  extern "C" void sell##bits##_matmul_##name##_base(const void* call, int64_t begin, int64_t end) { \
    matmul<Column, T>(call, begin, end);                                                      \
  }
SELL(8, uint8_t, f32, float)
SELL(8, uint8_t, bf16, bf16)
SELL(8, uint8_t, f16, f16)
SELL(16, int16_t, f32, float)
SELL(16, int16_t, bf16, bf16)
SELL(16, int16_t, f16, f16)
