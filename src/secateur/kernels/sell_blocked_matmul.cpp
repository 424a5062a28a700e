// The oracle.
#include "finite.h"
#include "sell_blocked.h"

namespace {

template <class T>
void multiply(const Matmul& call, int64_t item, int64_t row) {
  const SellBlocked& weight = *static_cast<const SellBlocked*>(call.weight);
  const T* const values = static_cast<const T*>(weight.values);
  const T* const x = static_cast<const T*>(call.x) + row * weight.inputs;
  const int64_t wild = ::wild(x, weight.inputs);
  const Chunk chunk(weight, item);
  Sum sums[CHUNK];
  for (int64_t panel = chunk.first; panel < chunk.first + chunk.blocks * chunk.panels; panel++) {
    const T* const of_block = x + (panel - chunk.first) / chunk.panels * DEPTH;
    for (int64_t at = weight.offsets[panel] * STEP; at < weight.offsets[panel + 1] * STEP; at++)
      sums[weight.rows[panel * PANEL + at % STEP / 2]].add(widen(values[at]), widen(of_block[weight.columns[at]]));
  }
  float all[CHUNK];
  for (int i = 0; i < CHUNK; i++) all[i] = sums[i].of(wild);
  put<T>(all, chunk, call, row, weight.outputs);
}

template <class T>
void matmul(const void* pointer, int64_t begin, int64_t end) {
  const Matmul& call = *static_cast<const Matmul*>(pointer);
  for (int64_t chunk = begin; chunk < end; chunk++)
    for (int64_t row = 0; row < call.rows; row++) multiply<T>(call, chunk, row);
}

}  // namespace

#define SELL(name, T)                                                                               \
  extern "C" void sell_blocked_row_##name(const Matmul* call, int64_t chunk, int64_t row) {         \
    multiply<T>(*call, chunk, row);                                                                 \
  }                                                                                                 \
  extern "C" void sell_blocked_matmul_##name##_base(const void* call, int64_t begin, int64_t end) { \
    matmul<T>(call, begin, end);                                                                    \
  }
SELL(f32, float)
SELL(bf16, bf16)
SELL(f16, f16)
