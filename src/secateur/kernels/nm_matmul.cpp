// The oracle.
#include "finite.h"
#include "nm.h"

namespace {

template <class T>
void multiply(const Matmul& call, int64_t panel, int64_t row) {
  const NM& weight = *static_cast<const NM*>(call.weight);
  const int bits = weight.m <= 4 ? 2 : 4;
  const int64_t groups = weight.inputs / weight.m, slots = groups * weight.n;
  const T* x = static_cast<const T*>(call.x) + row * weight.inputs;
  const int64_t wild = ::wild(x, weight.inputs);
  for (int lane = 0; lane < LANES; lane++) {
    const int64_t output = panel * LANES + lane;
    if (output >= weight.outputs) break;
    Sum sum;
    for (int64_t slot = 0; slot < slots; slot++) {
      const int64_t at = panel * slots + slot;
      const uint8_t byte = weight.places[at * 2 * bits + lane * bits / 8];
      const int place = byte >> (lane * bits % 8) & ((1 << bits) - 1);
      sum.add(widen(static_cast<const T*>(weight.values)[at * LANES + lane]),
              widen(x[slot / weight.n * weight.m + place]));
    }
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

extern "C" void nm_row_f32(const Matmul* call, int64_t panel, int64_t row) { multiply<float>(*call, panel, row); }
extern "C" void nm_row_bf16(const Matmul* call, int64_t panel, int64_t row) { multiply<bf16>(*call, panel, row); }
extern "C" void nm_row_f16(const Matmul* call, int64_t panel, int64_t row) { multiply<f16>(*call, panel, row); }

extern "C" void nm_matmul_f32_base(const void* call, int64_t begin, int64_t end) { matmul<float>(call, begin, end); }

extern "C" void nm_matmul_bf16_base(const void* call, int64_t begin, int64_t end) { matmul<bf16>(call, begin, end); }

extern "C" void nm_matmul_f16_base(const void* call, int64_t begin, int64_t end) { matmul<f16>(call, begin, end); }
