// The oracle. An output is NaN where a zero of its row meets something that is not finite, as in a dense product: it is
// when more inputs are not finite than its weights, other than zero, meet.
#include "block.h"
#include "numbers.h"

namespace {

inline bool finite(float value) { return (bits_of_float(value) & 0x7f800000) != 0x7f800000; }

template <class T>
void multiply(const Matmul& call, int64_t item, int64_t row) {
  const Block& weight = *static_cast<const Block*>(call.weight);
  const T* x = static_cast<const T*>(call.x) + row * weight.inputs;
  int64_t wild = 0;
  for (int64_t input = 0; input < weight.inputs; input++) wild += !finite(widen(x[input]));
  for (int64_t lane = 0; lane < weight.rows; lane++) {
    const int64_t output = item * weight.rows + lane;
    float sum = 0;
    int64_t met = 0;
    for (int64_t block = weight.offsets[item]; block < weight.offsets[item + 1]; block++) {
      const T* values = static_cast<const T*>(weight.values) + block * weight.columns * weight.rows;
      for (int64_t column = 0; column < weight.columns; column++) {
        const float w = widen(values[column * weight.rows + lane]);
        if (w == 0) continue;
        const float in = widen(x[weight.places[block] * weight.columns + column]);
        sum += w * in;
        met += !finite(in);
      }
    }
    if (met < wild) sum = float_of_bits(0x7fc00000);
    const float bias = call.bias ? widen(static_cast<const T*>(call.bias)[output]) : 0.0f;
    narrow(sum + bias, static_cast<T*>(call.y) + row * weight.outputs + output);
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
