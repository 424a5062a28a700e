// The oracle.
#include "finite.h"
#include "k_blocked.h"

namespace {

template <class T>
void multiply(const Matmul& call, int64_t chunk, int64_t row) {
  const KBlocked& weight = *static_cast<const KBlocked*>(call.weight);
  const T* values = static_cast<const T*>(weight.values);
  const uint8_t* columns = static_cast<const uint8_t*>(weight.columns);
  const T* x = static_cast<const T*>(call.x) + row * weight.inputs;
  const int64_t first = chunk * CHUNK, fours = weight.padded / ABREAST;
  const int64_t last = first + CHUNK < weight.padded ? first + CHUNK : weight.padded;
  const int64_t not_finite = wild(x, weight.inputs);
  Sum sums[CHUNK];
  for (int64_t block = 0; block * weight.depth < weight.inputs; block++)
    for (int64_t place = first; place < last; place++) {
      const int64_t output = weight.rows[block * weight.padded + place] - first;
      const int64_t* steps = weight.offsets + block * fours + place / ABREAST;
      for (int64_t step = steps[0]; step < steps[1]; step++)
        for (int i = 0; i < each<T>(); i++) {
          const int64_t at = (step * ABREAST + place % ABREAST) * each<T>() + i;
          sums[output].add(widen(values[at]), widen(x[block * weight.depth + columns[at]]));
        }
    }
  for (int64_t output = first; output < last && output < weight.outputs; output++) {
    const float found = sums[output - first].of(not_finite);
    const float bias = call.bias ? widen(static_cast<const T*>(call.bias)[output]) : 0.0f;
    narrow(found + bias, static_cast<T*>(call.y) + row * weight.outputs + output);
  }
}

template <class T>
void matmul(const void* pointer, int64_t begin, int64_t end) {
  const Matmul& call = *static_cast<const Matmul*>(pointer);
  for (int64_t chunk = begin; chunk < end; chunk++)
    for (int64_t row = 0; row < call.rows; row++) multiply<T>(call, chunk, row);
}

}  // namespace

extern "C" void k_blocked_row_f32(const Matmul* call, int64_t chunk, int64_t row) { multiply<float>(*call, chunk, row); }
extern "C" void k_blocked_row_bf16(const Matmul* call, int64_t chunk, int64_t row) { multiply<bf16>(*call, chunk, row); }
extern "C" void k_blocked_row_f16(const Matmul* call, int64_t chunk, int64_t row) { multiply<f16>(*call, chunk, row); }

extern "C" void k_blocked_matmul_f32_base(const void* call, int64_t begin, int64_t end) {
  matmul<float>(call, begin, end);
}

extern "C" void k_blocked_matmul_bf16_base(const void* call, int64_t begin, int64_t end) {
  matmul<bf16>(call, begin, end);
}

extern "C" void k_blocked_matmul_f16_base(const void* call, int64_t begin, int64_t end) {
  matmul<f16>(call, begin, end);
}
