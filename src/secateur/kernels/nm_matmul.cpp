// The oracle. An output is NaN where a zero of its row meets something that is not finite, as in a dense product: it is
// when more inputs are not finite than its weights, other than zero, meet.
#include "nm.h"
#include "numbers.h"

namespace {

inline bool finite(float value) { return (bits_of_float(value) & 0x7f800000) != 0x7f800000; }

template <class T>
void multiply(const Matmul& call, int64_t panel, int64_t row) {
  const NM& weight = *static_cast<const NM*>(call.weight);
  const int bits = weight.m <= 4 ? 2 : 4;
  const int64_t groups = weight.inputs / weight.m, slots = groups * weight.n;
  const T* x = static_cast<const T*>(call.x) + row * weight.inputs;
  int64_t wild = 0;
  for (int64_t input = 0; input < weight.inputs; input++) wild += !finite(widen(x[input]));
  for (int lane = 0; lane < LANES; lane++) {
    const int64_t output = panel * LANES + lane;
    if (output >= weight.outputs) break;
    float sum = 0;
    int64_t met = 0;
    for (int64_t slot = 0; slot < slots; slot++) {
      const int64_t at = panel * slots + slot;
      const uint8_t byte = weight.places[at * 2 * bits + lane * bits / 8];
      const int place = byte >> (lane * bits % 8) & ((1 << bits) - 1);
      const float w = widen(static_cast<const T*>(weight.values)[at * LANES + lane]);
      if (w == 0) continue;
      const float in = widen(x[slot / weight.n * weight.m + place]);
      sum += w * in;
      met += !finite(in);
    }
    if (met < wild) sum = float_of_bits(0x7fc00000);
    const float bias = call.bias ? widen(static_cast<const T*>(call.bias)[output]) : 0.0f;
    narrow(sum + bias, static_cast<T*>(call.y) + row * weight.outputs + output);
  }
}

template <class T>
void matmul(const void* pointer, int64_t begin, int64_t end) {
  const Matmul& call = *static_cast<const Matmul*>(pointer);
  for (int64_t panel = begin; panel < end; panel++)
    for (int64_t row = 0; row < call.rows; row++) multiply<T>(call, panel, row);
}

}  // namespace

extern "C" void nm_row_f32(const Matmul* call, int64_t panel, int64_t row) { multiply<float>(*call, panel, row); }
extern "C" void nm_row_bf16(const Matmul* call, int64_t panel, int64_t row) { multiply<bf16>(*call, panel, row); }
extern "C" void nm_row_f16(const Matmul* call, int64_t panel, int64_t row) { multiply<f16>(*call, panel, row); }

extern "C" void nm_matmul_f32_base(const void* call, int64_t begin, int64_t end) { matmul<float>(call, begin, end); }

extern "C" void nm_matmul_bf16_base(const void* call, int64_t begin, int64_t end) { matmul<bf16>(call, begin, end); }

extern "C" void nm_matmul_f16_base(const void* call, int64_t begin, int64_t end) { matmul<f16>(call, begin, end); }
