// The variants of k_blocked_matmul, in vectors of LANES floats: one source for every processor.
#pragma once
#include "blocked_rows.h"

namespace {

void scalar(const Matmul& call, int64_t chunk, int64_t row, float) { k_blocked_row_f32(&call, chunk, row); }
void scalar(const Matmul& call, int64_t chunk, int64_t row, bf16) { k_blocked_row_bf16(&call, chunk, row); }
void scalar(const Matmul& call, int64_t chunk, int64_t row, f16) { k_blocked_row_f16(&call, chunk, row); }

template <class T, class X = Floats<T, uint8_t, 1>>
void matmul(const void* pointer, int64_t begin, int64_t end) {
  const Matmul& call = *static_cast<const Matmul*>(pointer);
  const KBlocked& weight = *static_cast<const KBlocked*>(call.weight);
  multiply_blocked<T, uint8_t, 1, X>(call, weight, begin * CHUNK, end * CHUNK, nullptr);
  for (int64_t row = 0; row < call.rows; row++)
    if (!finite(static_cast<const T*>(call.x) + row * weight.inputs, weight.inputs))
      for (int64_t chunk = begin; chunk < end; chunk++) scalar(call, chunk, row, T());
}

}  // namespace
