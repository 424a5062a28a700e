// The oracle.
#include "block.h"
#include "finite.h"

namespace {

template <class T>
void multiply(const Matmul& call, int64_t item, int64_t row) {
  const Block& weight = *static_cast<const Block*>(call.weight);
  const T* x = static_cast<const T*>(call.x) + row * weight.inputs;
  const int64_t wild = ::wild(x, weight.inputs);
  for (int64_t lane = 0; lane < weight.rows; lane++) {
    const int64_t output = item * weight.rows + lane;
    Sum sum;
    for (int64_t block = weight.offsets[item]; block < weight.offsets[item + 1]; block++) {
      const T* values = static_cast<const T*>(weight.values) + block * weight.columns * weight.rows;
      const T* in = x + weight.places[block] * weight.columns;
      for (int64_t column = 0; column < weight.columns; column++)
        sum.add(widen(values[column * weight.rows + lane]), widen(in[column]));
    }
    const float bias = call.bias ? widen(static_cast<const T*>(call.bias)[output]) : 0.0f;
    narrow(sum.of(wild) + bias, static_cast<T*>(call.y) + row * weight.outputs + output);
  }
}

template <class T>
void matmul(const void* pointer, int64_t begin, int64_t end) {
  const Matmul& call = *static_cast<const Matmul*>(pointer);
  for (int64_t item = begin; item < end; item++)
    for (int64_t row = 0; row < call.rows; row++) multiply<T>(call, item, row);
}

}  // namespace

extern "C" void block_row_f32(const Matmul* call, int64_t item, int64_t row) { multiply<float>(*call, item, row); }
extern "C" void block_row_bf16(const Matmul* call, int64_t item, int64_t row) { multiply<bf16>(*call, item, row); }
extern "C" void block_row_f16(const Matmul* call, int64_t item, int64_t row) { multiply<f16>(*call, item, row); }

extern "C" void block_matmul_f32_base(const void* call, int64_t begin, int64_t end) { matmul<float>(call, begin, end); }

extern "C" void block_matmul_bf16_base(const void* call, int64_t begin, int64_t end) { matmul<bf16>(call, begin, end); }

extern "C" void block_matmul_f16_base(const void* call, int64_t begin, int64_t end) { matmul<f16>(call, begin, end); }
